"""The documentation's code does what its pages say; its commands and the notebook run."""

import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys
import tokenize

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.data.sources import SOURCES
from dimo_jax.objectives.divergences import DIVERGENCES, logit_gradient
from dimo_jax.teachers import TEACHERS
from dimo_jax.types import UserError
from tests import commands

DOCS = commands.ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture
def example(monkeypatch):
  """example(name) -> the imported file of docs/examples; what it registers is forgotten after."""
  registries = SOURCES, TEACHERS, DIVERGENCES
  before = [dict(registry) for registry in registries]
  monkeypatch.syspath_prepend(EXAMPLES)
  yield importlib.import_module
  for registry, rows in zip(registries, before, strict=True):
    registry.clear()
    registry.update(rows)
  for path in EXAMPLES.glob("*.py"):
    sys.modules.pop(path.stem, None)


def code_lines(path: pathlib.Path) -> int:
  """Lines of a file that hold code: no blank lines, comments or docstrings."""
  layout = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
  }  # fmt: skip
  lines: set[int] = set()
  for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
    if token.type not in layout and not token.string.startswith('"""'):
      lines |= set(range(token.start[0], token.end[0] + 1))
  return len(lines)


def test_the_tutorials_are_short():
  assert code_lines(EXAMPLES / "own_teacher.py") <= 60
  assert code_lines(EXAMPLES / "own_divergence.py") <= 10


@pytest.mark.parametrize("objective", ["dimo", "dmd2"])
def test_own_teachers_are_of_both_kinds(example, objective):
  experiment = build(example("own_teacher").get_config(objective))
  assert experiment.teacher.kind == experiment.objective.teacher_kind
  assert experiment.teacher == build(experiment.config).teacher
  with pytest.raises(UserError, match="Teacher has no published key names"):
    prepare.to_published(experiment.teacher, {})


def test_a_teacher_may_be_parameters_by_flat_name(example, tmp_path):
  config = example("own_teacher").get_config()
  params = prepare.random_teacher(build(config))
  config.teacher.path = str(tmp_path / "weights.safetensors")
  flat = traverse_util.flatten_dict(params, sep="/")
  save_file({name: np.asarray(value) for name, value in flat.items()}, config.teacher.path)
  network, tokenizer = prepare.load_teacher(build(config), config.teacher.path)
  jax.tree.map(np.testing.assert_array_equal, network, params)
  assert tokenizer is None
  save_file({"Dense_0/kernel": np.zeros(2)}, config.teacher.path)
  with pytest.raises(UserError, match=r"does not fit .*missing for \("):
    prepare.load_teacher(build(config), config.teacher.path)


@pytest.mark.parametrize(
  ("objective", "fields", "message"),
  [
    ("dimo", {"data.num_classes": 5}, r"null_class=2, .*: data\.num_classes=5 must be that"),
    ("dimo", {"tokenizer.codebook_size": 7}, "8 codes and 4 tokens; tokenizer.* makes 7 and 4"),
    ("dimo", {"tokenizer.grid_size": 3}, "8 codes and 4 tokens; tokenizer.* makes 8 and 9"),
    (
      "dmd2",
      {},
      r"images of shape \(2, 2, 1\); tokenizer\.name='none' .* take tokenizer\.name='pixels'",
    ),
  ],
)
def test_own_teachers_must_fit(example, objective, fields, message):
  config = example("own_teacher").get_config(objective)
  config.data.name, config.tokenizer.name, config.teacher.path = "labels", "none", "random"
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    build(config)


def fails(x):
  raise KeyError("no such part")


@pytest.mark.parametrize(
  ("objective", "output", "message"),
  [
    ("dimo", lambda x: x[..., :8], r"makes \(1, 4, 8\) of one sample, must make \(1, 4, 9\)"),
    ("dimo", lambda x: x + jnp.zeros(7), r"fails on one sample: ValueError: .*test_docs\.py, line"),
    ("dimo", lambda x: (x, x), "makes tuple of one sample"),
    ("dimo", fails, r"fails on one sample: KeyError: 'no such part' .*test_docs\.py, line"),
    ("dmd2", lambda x: x[:, :1], r"makes \(1, 1, 2, 1\) of one sample, must make \(1, 2, 2, 1\)"),
  ],
)
def test_own_networks_must_make_what_they_say(example, objective, output, message):
  module = example("own_teacher")
  own = module.TokenTeacher if objective == "dimo" else module.PixelTeacher

  class Wrong(own):
    def apply(self, *arguments, **options):
      return output(super().apply(*arguments, **options))

  config = module.get_config(objective)
  TEACHERS[config.teacher.name] = lambda config, tokenizer: Wrong()
  with pytest.raises(UserError, match=message):
    build(config)


@pytest.mark.ci
@pytest.mark.parametrize("objective", ["dimo", "dmd2"])
def test_own_teachers_are_distilled(tmp_path_factory, tmp_path, objective):
  """One step of the student draws images of one grey; one of the teacher cannot."""
  config = f"--config=docs/examples/own_teacher.py:{objective}"
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, tmp_path, command=(config,))
    script = [sys.executable, EXAMPLES / "own_teacher_result.py", tmp_path]
    result = subprocess.run(
      script, env=commands.environment(shared), capture_output=True, text=True, check=True
    )
    picture = tmp_path / "own.png"
    sample = ["dimo_jax.sample", f"--artifact={tmp_path}", f"--out={picture}"]
    unknown, known = (
      subprocess.run(
        [sys.executable, "-m", *sample, *extra],
        env=commands.environment(shared),
        capture_output=True,
        text=True,
        check=False,
      )
      for extra in ((), (f"--import={EXAMPLES / 'own_teacher.py'}",))
    )
  assert unknown.returncode == 2 and "imported (commands: --import=FILE.py)" in unknown.stderr
  assert known.returncode == 0 and picture.exists(), known.stderr
  one_step, teacher, student = map(float, re.findall(r"([\d.]+)% are of one grey", result.stdout))
  assert one_step < 50 and teacher > 60 and student > 85, result.stdout
  assert objective == "dmd2" or one_step < 5, result.stdout


def test_an_own_divergence_has_the_gradient_of_its_closed_form(example):
  """`-log sum sqrt(p q)`, whose derivative is `(p - w) / 2` with `w ~ sqrt(p q)`."""
  config = example("own_divergence").get_config()
  assert build(config).objective.divergence == "bhattacharyya"
  divergence = DIVERGENCES[config.dimo.divergence](config.dimo.jeffreys_beta)
  fake, teacher = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (fake, teacher))
  overlap = np.sqrt(p * q).sum(axis=-1)
  np.testing.assert_allclose(divergence(fake, teacher), -np.log(overlap), rtol=1e-5)
  wanted = (p - np.sqrt(p * q) / overlap[..., None]) / 2
  np.testing.assert_allclose(logit_gradient(divergence, fake, teacher), wanted, atol=1e-6)
  assert jnp.abs(divergence(fake, fake)).max() < 1e-6


@pytest.mark.ci
def test_the_distillation_by_hand_takes_three_different_steps(example, capsys):
  rows = example("by_hand") and capsys.readouterr().out.splitlines()
  assert len(rows) == 3
  losses = [json.loads(row.replace("'", '"'))["generator/loss"] for row in rows]
  assert all(np.isfinite(losses)) and len(set(losses)) == 3


def documented_commands() -> list[str]:
  """Every `python -m ...` line of the pages, continuation lines joined."""
  text = "".join(page.read_text().replace("\\\n", " ") for page in PAGES)
  return re.findall(r"^    (python -m dimo_jax.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_has_its_flags(command):
  """Module, flags and configs of a command exist."""
  module, *arguments = command.split()[2:]
  source = pathlib.Path(importlib.util.find_spec(module).origin)
  if source.name == "__init__.py":
    source = source.with_name("__main__.py")
  known = source.read_text() + (commands.ROOT / "dimo_jax" / "cli.py").read_text()
  for argument in arguments:
    flag, _, value = argument.removeprefix("--").partition("=")
    if argument.startswith("--config."):
      continue
    if argument.startswith("--"):
      assert f'"{flag}"' in known or f'"--{flag}"' in known, argument
    if flag == "config":
      assert (commands.ROOT / value.partition(":")[0]).is_file(), argument


@pytest.mark.ci
def test_the_notebook_runs(tmp_path_factory, tmp_path):
  """On the config that it names; its pictures are there, and the export draws the same ones."""
  notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells), "keep outputs out of git"
  with commands.shared_folder(tmp_path_factory) as shared:
    nbclient.NotebookClient(
      notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute(env=commands.environment(shared))
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  pictures = [output for output in outputs if "image/png" in output.get("data", {})]
  printed = "".join(output.get("text", "") for output in outputs)
  assert len(pictures) == 4
  assert "the export draws the same images: True" in printed
