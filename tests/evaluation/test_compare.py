"""The comparison page: tables by protocol, intervals, pictures, and how a browser shows it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dimo_jax import types
from dimo_jax.evaluation import compare


def published_row(model, steps, fid, **more):
  row = {
    "protocol": "edm-imagenet64",
    "unverified": ["statistics"],
    "departures": {},
    "fid": fid,
    "fid_low": fid - 0.1,
    "fid_high": fid + 0.1,
    "inception_score": 50.0,
    "precision": 0.71,
    "kid": None,
    "num_images": 50_000,
    "statistics_sha256": "a" * 64,
    "inception_sha256": "b" * 64,
    "model": model,
    "sampler": {"name": "Heun", "guidance_scale": 1.0},
    "steps": steps,
    "images_per_second": 100.0 / steps,
  }
  return row | more


@pytest.fixture
def results(tmp_path):
  """A file of published rows with a picture, and a workdir of the digits."""
  Image.fromarray(np.zeros((200, 900, 3), np.uint8)).save(tmp_path / "first.png")
  rows = [
    published_row("teacher", 8, 3.5),
    published_row("teacher", 16, 2.5),
    published_row("student", 1, 2.75, pictures="first.png"),
    published_row("student", 1, 9.5, departures={"num_images": 5000}),
  ]
  path = tmp_path / "edm.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  workdir = tmp_path / "digits"
  (workdir / "distill" / "pictures").mkdir(parents=True)
  Image.new("RGB", (90, 40)).save(workdir / "distill" / "pictures" / "step_0000007.png")
  row = {"protocol": "digits", "classifier_sha256": "c" * 64, "images_per_second": None, "steps": 0}
  row |= {"model": "real", "sampler": "test split", "frechet_distance": 2.66}
  student = row | {"model": "student", "sampler": "one step", "steps": 1}
  student |= {"frechet_distance": 3.33, "frechet_distance_low": 3.1, "frechet_distance_high": 3.6}
  codes = row | {"model": "tokenizer", "sampler": "test split, reconstructed"}
  codes |= {"frechet_distance": 2.7}
  (workdir / "results.json").write_text(json.dumps([row, codes, student]))
  return [compare.load_results(p) for p in (path, workdir)]


@pytest.fixture
def page(tmp_path, results):
  path = tmp_path / "page" / "compare.html"
  compare.write_comparison(path, results)
  return path


def test_numbers_stand_with_their_own_kind(page):
  text = page.read_text()
  sections = re.findall(r"<h2>(.*?)</h2>(.*?)</section>", text, re.S)
  titles = [title for title, _ in sections]
  assert len(titles) == 3  # 50,000 images, 5000 images, digits
  assert titles[0].startswith("edm-imagenet64 · statistics aaaaaaaa · network bbbbbbbb")
  assert "unverified: statistics" in titles[0]
  assert "not the protocol&#39;s: num_images=5000" in titles[1]
  assert titles[2] == "digits · classifier cccccccc"
  assert "9.500" not in sections[0][1] and "9.500" in sections[1][1]
  assert "2.650 to 2.850" in sections[0][1] and "3.100 to 3.600" in sections[2][1]
  best = re.findall(r'<tr class="student">(.*?)</tr>', sections[0][1], re.S)
  assert len(best) == 1 and "2.500" in best[0]
  best = re.findall(r'<tr class="student">(.*?)</tr>', sections[2][1], re.S)
  assert len(best) == 1 and "3.330" in best[0]  # neither the data nor the tokenizer is a model
  assert "tokenizer" not in sections[2][1][sections[2][1].index("<svg") :]
  assert "KID" not in sections[0][1] and "IS" in sections[0][1]
  assert sections[0][1].count("<svg") == 2


def test_the_page_needs_no_network(page):
  text = page.read_text()
  assert text.count("data:image/png;base64,") == 2
  assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)


def test_a_workdirs_results_file_stands_for_the_workdir(tmp_path):
  (tmp_path / "run").mkdir()
  file = tmp_path / "run" / "results.json"
  file.write_text('[{"protocol": "digits"}]')
  for path in (tmp_path / "run", file):
    found = compare.load_results(path)
    assert (found.name, found.rows) == ("run", [{"protocol": "digits"}])


@pytest.mark.parametrize(
  ("row", "label"),
  [
    ({"sampler": "one step", "step": 7}, "student, one step"),
    (
      {"sampler": {"name": "one step"}, "sweep": {"field": "sampling.temperature", "value": 2.0}},
      "student, one step, sampling.temperature=2",
    ),
    ({"sampler": "one step", "step": 7, "record_sha256": "x"}, "student, one step, checkpoint 7"),
  ],
  ids=["run", "sweep", "watch"],
)
def test_rows_of_sweeps_and_watches_are_told_apart(row, label):
  row = {"model": "student", "protocol": "digits", "frechet_distance": 1.0, **row}
  assert compare._comparable("run", row)["label"] == label


def test_runs_of_one_name_are_called_by_more_of_their_paths(tmp_path, results):
  other = tmp_path / "other" / "digits"
  shutil.copytree(tmp_path / "digits", other)
  paths = [tmp_path / "digits", other, tmp_path / "edm.jsonl"]
  assert [result.name for result in compare.load_all(paths[1:])] == ["digits", "edm"]
  found = compare.load_all(paths)
  here = tmp_path.name
  assert [result.name for result in found] == [f"{here}/digits", "other/digits", f"{here}/edm"]
  assert found[1].grids[0][1] == "other/digits: after 7 updates"
  compare.write_comparison(tmp_path / "page.html", found)
  assert ">other/digits<" in (tmp_path / "page.html").read_text()
  for again in (other, other / "results.json", tmp_path / "digits" / ".." / "other" / "digits"):
    with pytest.raises(types.UserError, match="named twice; each must be named once"):
      compare.load_all([*paths, again])


def test_bad_results_are_one_line(tmp_path, results):
  with pytest.raises(types.UserError, match="edm, edm: their names must differ"):
    compare.write_comparison(tmp_path / "a.html", [results[0]] * 2)
  for content, message in (("{}\n", "line 1, is no result"), ("x\n", "line 1, is no JSON")):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(types.UserError, match=message):
      compare.load_results(tmp_path / "bad.jsonl")
  with pytest.raises(types.UserError, match="cannot be read"):
    compare.load_results(tmp_path / "none.jsonl")
  with pytest.raises(types.UserError, match=r"has no results\.json: no finished run"):
    compare.load_results(tmp_path)
  (tmp_path / "bad.jsonl").write_text('{"protocol": "x"}\n')
  with pytest.raises(types.UserError, match="has no distance"):
    compare.write_comparison(tmp_path / "a.html", [compare.load_results(tmp_path / "bad.jsonl")])
  assert not (tmp_path / "a.html").exists()


# Written into the page: what a reader's browser makes of it, for the dumped document to tell.
PROBE = """
<script>
const root = document.documentElement;
const wide = [...document.querySelectorAll("body *")].filter(
  e => !e.closest(".scroll, svg, pre") && e.getBoundingClientRect().right > innerWidth + 1);
const images = [...document.images];
root.dataset.width = innerWidth;
root.dataset.overflow = root.scrollWidth - root.clientWidth;
root.dataset.wide = wide.map(e => e.tagName).join(" ");
root.dataset.images = images.filter(i => i.complete && i.naturalWidth > 0).length;
root.dataset.plots = [...document.querySelectorAll("svg")].filter(
  e => e.getBoundingClientRect().height > 100).length;
root.dataset.fetched = performance.getEntriesByType("resource").filter(
  e => !e.name.startsWith("data:")).length;
</script>
"""


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_it(page, width):
  """Nothing sticks out at the narrowest window that headless Chromium opens, nor on a desktop."""
  browser = shutil.which("chromium")
  if browser is None:
    pytest.skip("chromium is not installed")
  # In a frame, because a window cannot be as narrow as a phone.
  frame = 390 if width == 500 else width
  page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
  outer = page.with_name("outer.html")
  outer.write_text(
    f'<iframe id="f" src="compare.html" style="width:{frame}px;height:800px;border:0"></iframe>'
    "<script>onload = () => { const d = document.getElementById('f').contentDocument;"
    "Object.assign(document.documentElement.dataset, d.documentElement.dataset) }</script>"
  )
  command = [
    browser,
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--allow-file-access-from-files",
  ]
  command += [f"--window-size={width},900", f"--user-data-dir={page.parent / 'profile'}"]
  command += ["--virtual-time-budget=5000", "--dump-dom", outer.as_uri()]
  run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  found = dict(re.findall(r'data-(\w+)="([^"]*)"', run.stdout.partition("<head>")[0]))
  assert found == {
    "width": str(frame),
    "overflow": "0",
    "wide": "",
    "images": "2",
    "plots": found.get("plots"),
    "fetched": "0",
  }, run.stderr[-500:]
  assert int(found["plots"]) >= 4


@pytest.mark.parametrize(
  ("seeds", "same"), [((0, 0), True), ((0, 1), False), ((None, None), False)]
)
def test_samples_are_called_the_same_only_where_they_are(tmp_path, seeds, same):
  Image.fromarray(np.zeros((20, 90, 3), np.uint8)).save(tmp_path / "first.png")
  files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
  for file, seed in zip(files, seeds, strict=True):
    more = {} if seed is None else {"seed": seed}
    row = published_row("student", 1, 2.5, pictures="first.png", kid=0.5, kid_std=0.25, **more)
    file.write_text(json.dumps(row) + "\n")
  compare.write_comparison(tmp_path / "page.html", [compare.load_results(f) for f in files])
  page = (tmp_path / "page.html").read_text()
  assert ("Samples: same seeds and classes" in page) == same
  assert "<h2>Samples" in page and "0.50000 ± 0.25000" in page
