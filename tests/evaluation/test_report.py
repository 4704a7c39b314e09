"""The report: complete, self-contained, and the terminal table aligned."""

import base64
import html.parser
import re

import numpy as np
import pytest
from PIL import Image

from dimo_jax import types
from dimo_jax.evaluation import report
from tests import browser


def make_row(model, sampler, steps, distance, rate=100.0, **more):
  row = {"model": model, "sampler": sampler, "steps": steps, "frechet_distance": distance}
  return row | {"images_per_second": rate, "num_images": 1437, "seed": 0} | more


RESULTS = [
  make_row("student", "one step", 1, 0.512),
  make_row("student", "one step", 1, 0.402, seed=1),
  make_row("teacher", "maskgit random order", 16, 0.361, rate=50.0),
  make_row("teacher", "maskgit confidence order", 16, 0.43, token_entropy=2.345),
  make_row("teacher", "maskgit confidence order", 4, 0.5, rate=200.0),
  make_row("real", "real data", 0, 0.33, rate=None),
]


class Page(html.parser.HTMLParser):
  """Tags with attributes, text by tag, and whether every tag was closed."""

  VOID = ("meta", "img", "br", "link")

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if data.strip():
      self.texts.append((self.open[-1] if self.open else "", data.strip()))


@pytest.fixture
def arguments(tmp_path):
  picture = tmp_path / "grid.png"
  Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture)
  steps = range(0, 2000, 2)
  return {
    "title": "Digits <b>&",
    "results": RESULTS,
    "curves": {
      "teacher": [{"step": s, "teacher/loss": 1 / (1 + s)} for s in steps],
      "distill": [{"step": s, "generator/loss": float("nan") if s else 1.0} for s in steps],
    },
    "grids": [(picture, "Student, one step")],
    "config_text": "seed: 0\nname: <digits>",
    "versions": {"jax": "0.10.2"},
    "notes": ["Measured on two cores & nothing else."],
  }


def write(tmp_path, arguments):
  path = tmp_path / "new" / "report.html"
  report.write_report(path, **arguments)
  text = path.read_text(encoding="utf-8")
  page = Page(text)
  assert not page.open
  return text, page


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_in_a_browser(tmp_path, arguments, width):
  if browser.EXECUTABLE is None:
    pytest.skip("chromium is not installed")
  arguments["notes"] = [f"weights sha256 {'0123456789abcdef' * 4}: of the classifier"]
  write(tmp_path, arguments)
  with browser.page(tmp_path / "profile") as page:
    page.open((tmp_path / "new" / "report.html").as_uri(), width)
    page.wait("document.readyState === 'complete'")
    assert page.run("innerWidth") == width  # a phone makes its window wider where something does
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("[...document.images].every(i => i.naturalWidth > 0)")


def test_report_holds_everything_it_was_given(tmp_path, arguments):
  _, page = write(tmp_path, arguments)
  assert ("h1", "Digits <b>&") in page.texts
  assert ("pre", "seed: 0\nname: <digits>") in page.texts
  assert ("dd", "0.10.2") in page.texts
  assert ("p", "Measured on two cores & nothing else.") in page.texts
  cells = [value for tag, value in page.texts if tag == "td"]
  assert len(cells) == len(RESULTS) * len(report.COLUMNS)
  assert cells[:4] == ["real", "real data", "0", "0.330"] and "2.35" in cells
  assert [value for tag, value in page.texts if tag == "b"] == ["0.402", "0.361", "0.330"]
  assert {"FD", "sampler"} <= {value for tag, value in page.texts if tag == "th"}
  images = [attributes for tag, attributes in page.tags if tag == "img"]
  assert [image["alt"] for image in images] == ["Student, one step"]
  data = base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,"))
  assert data == (tmp_path / "grid.png").read_bytes()


def test_report_fetches_nothing(tmp_path, arguments):
  _, page = write(tmp_path, arguments)
  assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
  for _, attributes in page.tags:
    for name in ("src", "href", "xlink:href"):
      assert re.match("data:|#|$", attributes.get(name) or "")
  assert not re.search(r"url\((?!#)|@import", (tmp_path / "new" / "report.html").read_text())


def test_best_student_is_marked(tmp_path, arguments):
  text, _ = write(tmp_path, arguments)
  marked = re.findall(r'<tr class="student.*?</tr>', text, re.DOTALL)
  assert len(marked) == 1 and "0.402" in marked[0]
  keys = re.findall(r'<td class="key">([\d.]+)</td>', text)
  assert sorted(keys) == ["0.330", "0.361", "0.402", "0.430"]  # the best of each sampler


def test_only_recorded_curves_are_drawn_and_follow_the_theme(tmp_path, arguments):
  text, page = write(tmp_path, arguments)
  titles = [value for tag, value in page.texts if tag == "h3"][3:]  # after the three cards
  assert titles == [
    "Quality against steps",
    "Quality against time",
    "Teacher loss",
    "Generator loss",
  ]
  assert text.count("<svg") == len(titles)
  for color, variable in report.CSS_COLORS.items():
    assert color not in text and f"{variable}:" in text
  assert "var(--series-0)" in text and "var(--ink)" in text
  label = [value for tag, value in page.texts if tag == "text"]
  assert {"5", "10", "20"} <= set(label)  # milliseconds at 200, 100 and 50 images per second
  assert "milliseconds per image" in label and "real test images" in label


def test_distances_far_apart_share_a_logarithmic_axis():
  def labels(worst):
    rows = [make_row("teacher", "Heun", 3, worst), make_row("student", "one step", 6, 1.5)]
    return re.findall(r"<text[^>]*>([^<]*)</text>", report.quality_plots(rows)[0]["svg"])

  assert {"10", "100"} <= set(labels(240.0)) and "50" not in labels(240.0)
  assert "0" in labels(24.0) and "100" not in labels(24.0)


def test_the_highest_marker_is_whole(monkeypatch):
  tops = []

  def svg(figure, axes, title):
    tops.append(axes.get_ylim())
    return ""

  monkeypatch.setattr(report, "_svg", svg)
  row = {"model": "student", "sampler": "one step", "steps": 1, "images_per_second": 9.0}
  report.quality_plots([row | {"frechet_distance": distance} for distance in (3.0, 2.9)])
  assert len(tops) == 2 and all(low == 0 and high > 1.05 * 3.0 for low, high in tops)


def test_long_curves_are_averaged():
  points = [(float(i), float(i % 2)) for i in range(4 * report.MAX_POINTS)]
  arguments = {"teacher": [{"step": x, "teacher/loss": y} for x, y in points]}
  (plot,) = report._curve_plots(arguments)
  path = max(re.findall(r'<path d="([^"]*)"', plot["svg"]), key=len)
  assert plot["title"] == "Teacher loss"
  assert len(set(re.findall(r"L [\d.]+ ([\d.]+)", path))) == 1  # every mean is 0.5


def test_empty_report_is_a_page(tmp_path, arguments):
  empty = {"results": [], "curves": {}, "grids": [], "config_text": "", "versions": {}, "notes": []}
  _, page = write(tmp_path, arguments | empty)
  assert not {"table", "svg", "img", "pre", "dl"} & {tag for tag, _ in page.tags}
  assert ("h1", "Digits <b>&") in page.texts


def test_missing_picture_is_named(tmp_path, arguments):
  with pytest.raises(types.UserError, match=r"none\.png"):
    write(tmp_path, arguments | {"grids": [(tmp_path / "none.png", "missing")]})


def test_console_table_is_aligned_and_sorted():
  lines = report.console_table(RESULTS).splitlines()
  assert len(lines) == 2 + len(RESULTS)
  assert [line.split()[0] for line in lines[2:]] == ["real"] + 3 * ["teacher"] + 2 * ["student"]
  end = lines[0].index(" FD") + len(" FD")
  assert [line[:end].split()[-1] for line in lines[2:]] == [
    "0.330",
    "0.500",
    "0.430",
    "0.361",
    "0.512",
    "0.402",
  ]
  assert "precision" not in lines[0] and "prec" not in lines[0]  # no row has it
  assert lines[2].split()[-3:] == ["-", "1437", "0"]
