"""The result of a run as one HTML file for people, and as a table for the terminal.

The file is self-contained: pictures are embedded, plots are inline SVG that follows the reader's
light or dark theme, and nothing is fetched.
"""

import base64
import contextlib
import importlib.metadata
import io
import math
import numbers
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from dimo_jax.types import UserError
from dimo_jax.writers import write_atomically

__all__ = [
  "console_table",
  "curve",
  "embed",
  "page",
  "quality_plots",
  "versions",
  "write_report",
]

Row = Mapping[str, Any]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "dimo-jax")

# key, heading, format, explanation; the columns of both tables, in order
COLUMNS = (
  ("model", "model", "s", ""),
  ("sampler", "sampler", "s", ""),
  ("steps", "steps", "d", "network evaluations in sequence per image"),
  ("frechet_distance", "FD", ".3f", "Fréchet distance of classifier features; lower is better"),
  (
    "frechet_distance_normalized",
    "FD/tr",
    ".4f",
    "FD over the trace of the reference features' covariance; lower is better",
  ),
  ("class_agreement", "agree", ".3f", "images classified as the class asked for; higher is better"),
  ("precision", "prec", ".3f", "images that look real; higher is better"),
  ("recall", "recall", ".3f", "real images within reach of the model; higher is better"),
  ("token_entropy", "entropy", ".2f", "mean entropy of the tokens at a position, nats"),
  ("nearest_distance", "nearest", ".2f", "median pixel distance to the nearest training image"),
  ("images_per_second", "img/s", ",.1f", "images per second, compilation excluded"),
  ("num_images", "images", "d", "images behind the row; FD falls as they grow"),
  ("seed", "seed", "d", "training seed"),
)
MODELS = ("real", "tokenizer", "teacher", "student")  # order of rows and series
REFERENCES = MODELS[:2]  # not generated: the data, and what the tokenizer makes of them

# stage in `curves`, heading, metrics drawn together
PANELS = (
  ("teacher", "Teacher loss", ("teacher/loss",)),
  ("distill", "Generator loss", ("generator/loss",)),
  ("distill", "Fake-score loss", ("fake_score/loss",)),
  ("distill", "Entropy (nats)", ("generator/entropy", "fake_score/entropy", "teacher/entropy")),
  ("distill", "Gradient norm", ("generator/grad_norm", "fake_score/grad_norm")),
  ("distill", "Disagreement", ("distill/disagreement",)),
)
WIDE_RANGE = 20  # of distances: a larger ratio is drawn on a logarithmic axis
LONG_LABEL = 27  # characters: two columns of longer ones do not fit below a plot
MAX_POINTS = 300  # a longer curve is averaged over equal runs of rows

# Matplotlib draws in these colours; each becomes a CSS variable that the page's theme sets.
INK, LINE = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
CSS_COLORS = {INK: "--ink", LINE: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}


def console_table(results: Sequence[Row]) -> str:
  """The rows of results.json as an aligned plain-text table, real data and teacher first."""
  columns = [column for column in COLUMNS if any(column[0] in row for row in results)]
  lines = [[heading for _, heading, _, _ in columns]]
  lines += [[_format(row.get(key), spec) for key, _, spec, _ in columns] for row in _sort(results)]
  widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
  lines.insert(1, ["-" * width for width in widths])
  aligns = ["<" if spec == "s" else ">" for _, _, spec, _ in columns]
  return "\n".join(
    "  ".join(f"{c:{a}{w}}" for c, a, w in zip(cells, aligns, widths, strict=True)).rstrip()
    for cells in lines
  )


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  results: Sequence[Row],
  curves: Mapping[str, Sequence[Row]],
  grids: Sequence[tuple[str | os.PathLike, str]],
  config_text: str,
  versions: Mapping[str, str],
  notes: Sequence[str],
) -> None:
  """Writes the report; directories are made, an older report is replaced.

  Args:
    path: the HTML file.
    title: heading of the page.
    results: rows of results.json; needed keys are model (one of MODELS), sampler, steps and
      frechet_distance, the others may be missing or None.
    curves: rows of metrics with "step", for "teacher" and "distill"; missing metrics are skipped.
    grids: (PNG file, caption) of the picture grids.
    config_text: the full configuration.
    versions: package or device name to version.
    notes: paragraphs of plain text.

  Raises:
    UserError: a picture cannot be read.
  """
  results = _sort(results)
  student = _best(results, "student")
  samplers = dict.fromkeys((row["model"], row["sampler"]) for row in results)
  best = [_best(results, *names) for names in samplers]
  rows = [
    {
      "model": row["model"],
      "is_student": row is student,
      "is_best": any(row is other for other in best),
      "cells": [
        {
          "text": _format(row.get(key), spec),
          "is_text": spec == "s",
          "is_key": key == "frechet_distance",
        }
        for key, _, spec, _ in COLUMNS
      ],
    }
    for row in results
  ]
  html = page(
    _BODY,
    title=title,
    summary=_summary(results),
    columns=COLUMNS,
    rows=rows,
    quality_plots=quality_plots(results),
    curve_plots=_curve_plots(curves),
    pictures=[{"source": embed(image), "caption": caption} for image, caption in grids],
    config_text=config_text,
    versions=versions,
    notes=notes,
  )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, html)


def page(body: str, **context: Any) -> str:
  """A whole page: the template of its body, which may use the parts below, and what it takes;
  `title` among it.
  """
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  return environment.from_string(_PARTS + _HEAD + body + _FOOT).render(**context)


def _sort(results: Iterable[Row]) -> list[Row]:
  def order(row: Row) -> tuple[int, str, int]:
    model = MODELS.index(row["model"]) if row["model"] in MODELS else len(MODELS)
    return model, row["sampler"], row["steps"]

  return sorted(results, key=order)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and math.isfinite(value)


def _format(value: Any, spec: str) -> str:
  if value is None:
    return "-"
  return format(value, spec)


def _best(results: Iterable[Row], model: str, sampler: str | None = None) -> Row | None:
  """The row of a model (and sampler, if given) with the lowest finite Fréchet distance."""
  rows = [
    row
    for row in results
    if row["model"] == model
    and sampler in (None, row["sampler"])
    and _is_number(row["frechet_distance"])
  ]
  return min(rows, key=lambda row: row["frechet_distance"], default=None)


def _summary(results: Sequence[Row]) -> list[dict[str, str]]:
  """The three numbers to compare first: student, teacher, and the floor of real data."""
  cards = []
  titles = {"student": "Best student", "teacher": "Best teacher", "real": "Real data, test split"}
  for model, title in titles.items():
    row = _best(results, model)
    if row is None:
      continue
    details = [row["sampler"]]
    if row["steps"] > 1:
      details.append(f"{row['steps']} steps")
    if row.get("images_per_second"):
      details.append(f"{row['images_per_second']:,.0f} images/s")
    if row.get("num_images"):
      details.append(f"{row['num_images']:,} images")
    value = _format(row["frechet_distance"], ".3f")
    cards.append({"title": title, "value": value, "details": ", ".join(details), "model": model})
  return cards


def quality_plots(results: Sequence[Row]) -> list[dict[str, str]]:
  """Fréchet distance against steps and against milliseconds per image."""
  series: dict[str, dict[int, list[Row]]] = {}
  for row in results:
    if row["model"] not in REFERENCES and _is_number(row["frechet_distance"]):
      name = f"{row['model']}, {row['sampler']}"
      series.setdefault(name, {}).setdefault(row["steps"], []).append(row)
  if not series:
    return []
  floor = _best(results, "real")
  distances = [
    row["frechet_distance"]
    for by_steps in series.values()
    for rows in by_steps.values()
    for row in rows
  ]
  plots = []
  for title, is_time in (("Quality against steps", False), ("Quality against time", True)):
    figure, axes = _figure("milliseconds per image" if is_time else "steps", "Fréchet distance")
    ticks: set[float] = set()
    for color, (name, by_steps) in zip(_cycle(len(series)), series.items(), strict=True):
      points = []
      for steps, rows in sorted(by_steps.items()):
        rates = [r["images_per_second"] for r in rows if r.get("images_per_second")]
        if is_time and not rates:
          continue
        x = 1000 / statistics.fmean(rates) if is_time else steps
        points.append((x, statistics.fmean(r["frechet_distance"] for r in rows)))
      if not points:
        continue
      ticks.update(x for x, _ in points)
      marker = "*" if name.startswith("student") else "o"
      size = 11 if marker == "*" else 5
      axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=size, label=name)
    if not ticks:
      continue
    if floor is not None:
      distance = floor["frechet_distance"]
      axes.axhline(distance, label="real test images", color=INK, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=10 if is_time else 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(
      LogLocator(subs=(1, 2, 5)) if is_time else FixedLocator(sorted(ticks))
    )
    if 0 < WIDE_RANGE * min(distances) < max(distances):
      axes.set_yscale("log")
      axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
      axes.yaxis.set_minor_locator(NullLocator())
    else:
      highest = max(*distances, floor["frechet_distance"] if floor else 0.0)
      axes.set_ylim(0, 1.1 * highest or 1.0)  # whole markers
    plots.append({"title": title, "svg": _svg(figure, axes, title)})
  return plots


def curve(x_label: str, title: str, x: Sequence[float], y: Sequence[float], *, best: int) -> str:
  """One line over numbers as inline SVG, its best point starred."""
  figure, axes = _figure(x_label, title)
  axes.plot(x, y, color=SERIES[0], marker="o", markersize=5)
  axes.plot(x[best], y[best], color=SERIES[1], marker="*", markersize=12)
  return _svg(figure, axes, title, legend=False)


def _curve_plots(curves: Mapping[str, Sequence[Row]]) -> list[dict[str, str]]:
  """One panel for each group of metrics that was recorded."""
  plots = []
  for stage, title, names in PANELS:
    figure, axes = _figure("step", None)
    drawn = 0
    for color, name in zip(_cycle(len(names)), names, strict=True):
      points = [
        (float(row["step"]), float(row[name]))
        for row in curves.get(stage, ())
        if _is_number(row.get(name))
      ]
      if points:
        axes.plot(*zip(*_thin(points), strict=True), color=color, label=name.split("/")[0])
        drawn += 1
    if drawn:
      plots.append({"title": title, "svg": _svg(figure, axes, title, legend=len(names) > 1)})
  return plots


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """At most MAX_POINTS points: the means of equally long runs."""
  run = math.ceil(len(points) / MAX_POINTS)
  runs = [points[start : start + run] for start in range(0, len(points), run)]
  return [(statistics.fmean(x for x, _ in r), statistics.fmean(y for _, y in r)) for r in runs]


def _cycle(num: int) -> list[str]:
  return [SERIES[i % len(SERIES)] for i in range(num)]


def _figure(x_label: str, y_label: str | None) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(4.4, 2.9), layout="constrained")
  axes = figure.add_subplot()
  axes.set_xlabel(x_label, color=INK)
  if y_label:
    axes.set_ylabel(y_label, color=INK)
  axes.tick_params(which="both", colors=INK, length=0, labelsize=9)
  axes.grid(color=LINE, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.set_frame_on(False)
  return figure, axes


def _svg(figure: Figure, axes: Axes, title: str, legend: bool = True) -> str:
  """The figure as inline SVG: no background, text as text, colours as CSS variables."""
  if legend:
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    figure.legend(
      loc="outside lower center",
      ncols=1 if longest > LONG_LABEL else 2,
      fontsize=8,
      frameon=False,
      labelcolor=INK,
    )
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  for color, variable in CSS_COLORS.items():
    svg = svg.replace(color, f"var({variable})")
  return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def embed(image: str | os.PathLike) -> str:
  """A PNG file as the address of an <img>.

  Raises:
    UserError: it cannot be read.
  """
  try:
    data = Path(image).read_bytes()
  except OSError as error:
    raise UserError(f"report: cannot read the picture {image} ({error.strerror})") from error
  return "data:image/png;base64," + base64.b64encode(data).decode()


_PARTS = """{% macro drawn(plots, kind) %}
<div class="plots {{ kind }}">
{% for plot in plots %}
<figure><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}</figure>
{% endfor %}
</div>
{% endmacro %}
{% macro shown(pictures) %}
<div class="pictures">
{% for picture in pictures %}
<figure><div class="scroll"><img src="{{ picture.source }}" alt="{{ picture.caption }}"></div>
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endmacro %}
{% macro meanings(columns) %}
<details><summary>What the columns mean</summary>
<dl>
{% for key, heading, spec, meaning in columns if meaning %}
<dt>{{ heading }}</dt><dd>{{ meaning }}</dd>
{% endfor %}
</dl>
</details>
{% endmacro %}
{% macro listed(versions) %}
<h2>Versions</h2>
<dl>
{% for name, version in versions.items() %}
<dt>{{ name }}</dt><dd>{{ version }}</dd>
{% endfor %}
</dl>
{% endmacro %}
"""
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --paper: #ffffff; --panel: #f6f7f8; --ink: #1d2329; --soft: #606a74; --line: #dde1e5;
  --best: #e6f2ec; --series-0: #2f6fb0; --series-1: #c8791c; --series-2: #1f8a5f;
  --series-3: #8a56a8; --series-4: #b5433f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --panel: #1c2126; --ink: #e4e7ea; --soft: #9aa4ae; --line: #333a41;
    --best: #1b3429; --series-0: #6fa8de; --series-1: #e5a556; --series-2: #5cc39a;
    --series-3: #bd92d8; --series-4: #e07f7b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: .9rem; margin: 0 0 .25rem; font-weight: 600; }
p { max-width: 70ch; margin: 0 0 .75rem; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
.below { margin-top: .75rem; }
.cards, .plots, .pictures { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.quality { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.pictures { grid-template-columns: 1fr; }
.card, figure { background: var(--panel); border-radius: 8px; padding: .9rem 1rem; margin: 0; }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; font-weight: 600; }
.card.student { background: var(--best); }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figure img { image-rendering: pixelated; margin-bottom: .5rem; }
.scroll { overflow-x: auto; background:  /* a shadow where there is more to the side */
  linear-gradient(to right, var(--paper) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--soft), transparent) left / .5rem 100% no-repeat scroll,
  linear-gradient(to left, var(--soft), transparent) right / .5rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.group td { border-top: 2px solid var(--line); }
tr.student td { background: var(--best); font-weight: 600; }
td.key { font-weight: 600; }
@media (max-width: 600px) {
  table { font-size: .8rem; }
  th, td { padding: .35rem .4rem; }
  td.text { white-space: normal; }
  .pictures figure { min-width: 0; }
  .pictures img { width: auto; min-width: 34rem; }
}
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); border-radius: 8px; padding: 1rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.45; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
"""
_FOOT = """</body>
</html>
"""
_BODY = """<h1>{{ title }}</h1>
{% if summary %}
<div class="cards">
{% for card in summary %}
<div class="card {{ card.model }}"><h3>{{ card.title }}</h3><b>{{ card.value }}</b>
<span class="soft">{{ card.details }}</span></div>
{% endfor %}
</div>
<p class="soft below">Fréchet distance (FD) to the training images; lower is better, and it depends
on the number of images.</p>
{% endif %}
{% if rows %}
<h2>Results</h2>
<div class="scroll">
<table>
<thead><tr>
{% for key, heading, spec, meaning in columns %}
<th{% if spec == "s" %} class="text"{% endif %} title="{{ meaning }}">{{ heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr class="{{ 'student' if row.is_student }}
{{- ' group' if not loop.first and loop.previtem.model != row.model }}">
{% for cell in row.cells %}
<td class="{{ 'text' if cell.is_text }}{{ 'key' if row.is_best and cell.is_key }}">
{{- cell.text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{{ meanings(columns) }}
{% endif %}
{% if quality_plots %}
<h2>Quality and cost</h2>
{{ drawn(quality_plots, "quality") }}
{% endif %}
{% if pictures %}
<h2>Samples</h2>
{{ shown(pictures) }}
{% endif %}
{% if curve_plots %}
<h2>Training</h2>
{{ drawn(curve_plots, "") }}
{% endif %}
{% if notes %}
<h2>Notes</h2>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% endif %}
{{ listed(versions) if versions }}
{% if config_text %}
<h2>Configuration</h2>
<details><summary>Full configuration</summary>
<pre>{{ config_text }}</pre>
</details>
{% endif %}
"""


def versions() -> dict[str, str]:
  """Packages, Python and device, for the record."""
  found = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  device = jax.devices()[0]
  return found | {
    "python": platform.python_version(),
    "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
  }
