"""The study: every variant can be built, a run has one row, the page's tables say what rows say."""

import json

import pytest
from flax import traverse_util

from configs.sweeps import digits as sweep
from dimo_jax import study
from dimo_jax.build import build
from dimo_jax.types import UserError
from tests import commands

VARIANTS = [
  pytest.param(question.preset, overrides, id=f"{name}-{label}")
  for name, question in sweep.QUESTIONS.items()
  for label, overrides in question.variants.items()
]
QUESTION = sweep.Question(
  "Noise", "A claim.", "tiny", {"as it is": {}, "more": {"dimo.sigma": 0.5}}
)


@pytest.mark.parametrize(("preset", "overrides"), VARIANTS)
def test_a_variant_is_its_preset_with_its_overrides(preset, overrides):
  fields = traverse_util.flatten_dict(study.config_of(preset, overrides, 7).to_dict(), sep=".")
  wanted = {**sweep.PRESETS[preset].short, **overrides, "seed": 7}
  assert {name: fields[name] for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "overrides"), VARIANTS)
def test_every_variant_can_be_built(preset, overrides):
  assert build(study.config_of(preset, overrides, 7)).objective


def row(seed: int, overrides: dict, **fields) -> study.Row:
  return {"preset": "tiny", "overrides": overrides, "seed": seed, **fields}


def student(distance: float) -> dict:
  return {"frechet_distance": distance, "recall": 0.5, "class_agreement": 1.0, "precision": 0.7}


def test_a_table_has_means_spreads_and_what_stopped():
  rows = [
    row(0, {}, student=student(1.0)),
    row(1, {}, student=student(2.0)),
    row(2, {}, student=student(3.0)),
    row(0, {"dimo.sigma": 0.5}, student=student(4.0)),
    row(1, {"dimo.sigma": 0.5}, stopped="step 3: generator/loss not finite"),
    row(0, {"dimo.sigma": 0.9}, student=student(9.0)),  # another question's
  ]
  lines = study.table(QUESTION, rows).splitlines()
  assert lines[2] == "| as it is | 2.00 ± 1.00 | 1.00, 2.00, 3.00 | 0.50 ± 0.00 | 1.00 ± 0.00 |"
  assert lines[3] == "| more | 4.00 | 4.00, stopped, not run | 0.50 | 1.00 |"
  assert lines[-1] == "Stopped by the health check: step 3: generator/loss not finite."
  assert "9.00" not in "\n".join(lines)


def test_the_page_keeps_everything_but_its_tables(monkeypatch):
  monkeypatch.setattr(sweep, "QUESTIONS", {"noise": QUESTION})
  page = "# Title\n<!-- noise:begin -->\nold\n<!-- noise:end -->\nWhat we think.\n"
  rendered = study.render(page, [row(0, {}, student=student(1.0))])
  assert rendered.startswith("# Title\n<!-- noise:begin -->\n*Published.* A claim.\n")
  assert rendered.endswith("<!-- noise:end -->\nWhat we think.\n") and "old" not in rendered
  assert study.render(rendered, [row(0, {}, student=student(1.0))]) == rendered
  with pytest.raises(UserError, match="noise:begin"):
    study.render("# Title\n", [])


def test_the_page_in_the_repository_is_the_rendering_of_its_rows():
  page = (commands.ROOT / "docs" / "reproduction.md").read_text()
  rows = study.read_rows(commands.ROOT / "docs" / "reproduction.jsonl")
  assert rows
  assert study.render(page, rows) == page


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
  """(rows' file, rows of the first call, of a second one) of one question on the debug config."""
  folder = tmp_path_factory.mktemp("study")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sweep, "QUESTIONS", {"noise": QUESTION})
    patch.setattr(sweep, "SEEDS", (3,))
    patch.setattr(sweep, "PRESETS", {"tiny": sweep.Preset("debug", None, {"train.num_steps": 8})})
    path = folder / "rows.jsonl"
    study.run_all(path, folder / "runs", "")
    first = path.read_text()
    study.run_all(path, folder / "runs", "")
    with pytest.raises(UserError, match="--only='nothing' matches none of noise"):
      study.run_all(path, folder / "runs", "nothing")
  return first, path.read_text()


@pytest.mark.ci
def test_a_run_has_one_row_and_is_not_repeated(studied):
  first, again = studied
  assert first == again
  plain, more = (json.loads(line) for line in first.splitlines())
  assert [plain["overrides"], more["overrides"]] == [{}, {"dimo.sigma": 0.5}]
  assert plain["generator_updates"] == 8
  assert plain["student"]["frechet_distance"] != more["student"]["frechet_distance"]
  assert plain["teacher"]["steps"] == 4 and "teacher" not in more
