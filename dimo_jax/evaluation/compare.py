"""One page that sets results side by side: tables with intervals, plots, pictures; no network.

Only results of one protocol, one set of statistics and one feature network stand in one table.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dimo_jax.evaluation import report
from dimo_jax.evaluation.scoring import read_rows
from dimo_jax.types import UserError
from dimo_jax.writers import write_atomically

__all__ = [
  "Results",
  "distance_of",
  "load_all",
  "load_results",
  "write_comparison",
  "write_sweep",
]

# key, heading, format, meaning; `distance` is one of the two distances below
COLUMNS = (
  ("inception_score", "IS", ".1f", "Inception Score; higher is better"),
  ("sfid", "sFID", ".2f", "distance of spatial features; lower is better"),
  ("kid", "KID", ".5f", "squared kernel distance; lower is better"),
  ("class_agreement", "agree", ".3f", "images classified as the class asked for"),
  ("precision", "prec", ".3f", "images that look real; higher is better"),
  ("recall", "recall", ".3f", "real images within reach of the model; higher is better"),
  ("density", "density", ".3f", "real neighbourhoods around an image; about 1 for real images"),
  ("coverage", "cover", ".3f", "real images with a generated one near; higher is better"),
  ("authenticity", "auth", ".3f", "images that are no near copies of a reference image"),
  ("images_per_second", "img/s", ",.1f", "images per second, compilation excluded"),
  ("num_images", "images", ",d", "images behind the row"),
)
_DISTANCES = ("fid", "frechet_distance")


@dataclasses.dataclass(frozen=True)
class Results:
  """Rows of one run.

  Attributes:
    name: what the page calls it.
    rows: as they were written.
    grids: PNG files with captions.
    drawn: of every grid which classes and seeds it shows, None where that is not known.
  """

  name: str
  rows: Sequence[Mapping[str, Any]]
  grids: Sequence[tuple[Path, str]]
  drawn: Sequence[str | None]


def load_results(path: str | os.PathLike, *, num_parts: int = 1) -> Results:
  """The results of a workdir (or its `results.json`, with its last pictures) or of a file of JSON
  lines.

  Args:
    num_parts: of the path's end, by which they are called.

  Raises:
    UserError: there are none, or they cannot be read.
  """
  path = Path(path)
  if path.name == "results.json":
    path = path.absolute().parent
  place = path.absolute() if path.is_dir() else path.absolute().with_suffix("")
  name = "/".join(place.parts[-num_parts:])
  if not path.is_dir():
    rows = read_rows(path)
    shown = [row for row in rows if row.get("pictures")]
    grids = [(path.with_name(row["pictures"]), f"{name}: {_model(row)}") for row in shown]
    drawn = [f"{row['protocol']} {row['seed']}" if "seed" in row else None for row in shown]
    return Results(name, rows, grids, drawn)
  try:
    rows = json.loads((path / "results.json").read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(
      f"{path} has no results.json: no finished run with an evaluation protocol, and no file of"
      " results"
    ) from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} has no readable results.json: {error}") from error
  last = sorted((path / "distill" / "pictures").glob("step_*.png"))[-1:]
  grids = [(file, f"{name}: after {int(file.stem[5:])} updates") for file in last]
  seeds = {row.get("sampling_seed") for row in rows}
  same = f"all classes {seeds.pop()}" if len(seeds) == 1 and None not in seeds else None
  return Results(name, rows, grids, [same] * len(grids))


def load_all(paths: Sequence[str | os.PathLike]) -> list[Results]:
  """`load_results` of each, called by as much of the path's end as tells all of them apart.

  Raises:
    UserError: one is named twice, or as there.
  """
  places = [Path(path).resolve() for path in paths]
  places = [place.parent if place.name == "results.json" else place for place in places]
  for path, place in zip(paths, places, strict=True):
    if places.count(place) > 1:
      raise UserError(f"results {os.fspath(path)!r} are named twice; each must be named once")
  for num_parts in range(1, max((len(place.parts) for place in places), default=1) + 1):
    results = [load_results(path, num_parts=num_parts) for path in paths]
    if len({result.name for result in results}) == len(results):
      break
  return results


def write_comparison(path: Path, results: Sequence[Results]) -> None:
  """Writes the page.

  Raises:
    UserError: two results of one name, a row without a distance, or a picture that is missing.
  """
  names = [result.name for result in results]
  if len(set(names)) < len(names):
    raise UserError(f"results {', '.join(names)}: their names must differ")
  groups: dict[str, list[dict[str, Any]]] = {}
  for result in results:
    for row in result.rows:
      groups.setdefault(_group(row), []).append(_comparable(result.name, row))
  all_drawn = [drawn for result in results for drawn in result.drawn]
  html = report.page(
    _BODY,
    title="Comparison: " + ", ".join(names),
    columns=COLUMNS,
    groups=[_section(title, rows) for title, rows in groups.items()],
    pictures=[
      {"source": report.embed(image), "caption": caption}
      for result in results
      for image, caption in result.grids
    ],
    same_draws=len({drawn or i for i, drawn in enumerate(all_drawn)}) == 1,
    versions=report.versions(),
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, html)


def _group(row: Mapping[str, Any]) -> str:
  """What must agree for numbers to be comparable, as a heading."""
  parts = [str(row.get("protocol", "no protocol recorded"))]
  for key, what in (
    ("statistics_sha256", "statistics"),
    ("inception_sha256", "network"),
    ("classifier_sha256", "classifier"),
  ):
    if row.get(key):
      parts.append(f"{what} {row[key][:8]}")
  if row.get("departures"):
    changed = ", ".join(f"{k}={v}" for k, v in row["departures"].items())
    parts.append(f"not the protocol's: {changed}")
  if row.get("unverified"):
    parts.append(f"unverified: {', '.join(row['unverified'])}")
  return " · ".join(parts)


def _model(row: Mapping[str, Any]) -> str:
  return ", ".join(filter(None, (row.get("model", "images"), _sampler(row))))


def _sampler(row: Mapping[str, Any]) -> str:
  """Its name, and what tells rows of a sweep or of a watch apart."""
  sampler = row.get("sampler", "")
  parts = [sampler.get("name", "") if isinstance(sampler, Mapping) else sampler]
  if "sweep" in row:
    parts.append(f"{row['sweep']['field']}={row['sweep']['value']:g}")
  if "record_sha256" in row:
    parts.append(f"checkpoint {row['step']}")
  return ", ".join(filter(None, parts))


def _comparable(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row under the names that the report's plots know."""
  distance = distance_of(row)
  key = next(key for key in _DISTANCES if row.get(key) is not None)
  model = row.get("model", "images")
  return {
    **row,
    "name": name,
    "label": _model(row),
    "model": model if model in report.REFERENCES else f"{model} of {name}",
    "sampler": _sampler(row),
    "steps": row.get("steps", 0),
    "frechet_distance": distance,
    "low": row.get(f"{key}_low"),
    "high": row.get(f"{key}_high"),
  }


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
  drawn = [row for row in rows if row["steps"]]
  generated = (row for row in rows if row["model"] not in report.REFERENCES)
  best = min(generated, key=distance_of, default=None)
  return {
    "title": title,
    "columns": columns,
    "rows": [
      {
        "name": row["name"],
        "label": row["label"],
        "steps": row["steps"] or "-",
        "is_best": row is best,
        "distance": f"{row['frechet_distance']:.3f}",
        "interval": "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
        "cells": [_cell(row, key, spec) for key, _, spec, _ in columns],
      }
      for row in sorted(rows, key=lambda row: (row["name"], row["label"], row["steps"]))
    ],
    "plots": report.quality_plots([*drawn, *(row for row in rows if row["model"] == "real")]),
  }


def _cell(row: Mapping[str, Any], key: str, spec: str) -> str:
  if row.get(key) is None:
    return "-"
  spread = row.get(f"{key}_std")
  return format(row[key], spec) + ("" if spread is None else f" ± {spread:{spec}}")


def distance_of(row: Mapping[str, Any]) -> float:
  """A result's Fréchet distance, whatever the features.

  Raises:
    UserError: it has none.
  """
  distance = next((row[key] for key in _DISTANCES if row.get(key) is not None), None)
  if distance is None:
    raise UserError(f"a result of {_model(row)} has no distance")
  return distance


def write_sweep(path: Path, field: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes the page of a sweep: distance and Inception Score over the values, and the best point.

  Args:
    rows: results with `sweep = {"field", "value"}`, of one protocol.
  """
  rows = sorted(rows, key=lambda row: row["sweep"]["value"])
  best = min(rows, key=distance_of)
  values = [row["sweep"]["value"] for row in rows]
  curves = [("Fréchet distance", [distance_of(row) for row in rows])]
  other = [
    (heading, [row[key] for row in rows])
    for key, heading in (
      ("inception_score", "Inception Score"),
      ("class_agreement", "class agreement"),
      ("precision", "precision"),
      ("recall", "recall"),
    )
    if all(row.get(key) is not None for row in rows)
  ]
  html = report.page(
    _SWEEP,
    title=f"Sweep of {field}",
    group=_group(best),
    field=field,
    best=f"{best['sweep']['value']:g}",
    distance=f"{distance_of(best):.3f}",
    headings=[heading for heading, _ in (*curves, *other)],
    table=[
      (f"{value:g}", row is best, [f"{numbers[i]:.3f}" for _, numbers in (*curves, *other)])
      for i, (value, row) in enumerate(zip(values, rows, strict=True))
    ],
    plots=[
      {
        "title": heading,
        "svg": report.curve(
          field, heading, values, numbers, best=values.index(best["sweep"]["value"])
        ),
      }
      for heading, numbers in (*curves, *other)
    ],
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, html)


_BODY = """<h1>{{ title }}</h1>
{% for group in groups %}
<section>
<h2>{{ group.title }}</h2>
<div class="scroll">
<table>
<thead><tr><th class="text">run</th><th class="text">model</th><th>steps</th>
<th title="lower is better">distance</th><th title="over the draw of the images">95 %</th>
{% for key, heading, spec, meaning in group.columns %}
<th title="{{ meaning }}">{{ heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in group.rows %}
<tr class="{{ 'student' if row.is_best }}">
<td class="text">{{ row.name }}</td><td class="text">{{ row.label }}</td><td>{{ row.steps }}</td>
<td class="key">{{ row.distance }}</td><td>{{ row.interval }}</td>
{% for cell in row.cells %}
<td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if group.plots %}
{{ drawn(group.plots, "quality below") }}
{% endif %}
</section>
{% endfor %}
<p class="soft below">Distance: Fréchet distance to the reference; lower is better. Its interval is
a bootstrap over the draw of the generated images; ± is the standard deviation over the score's
splits or the kernel distance's subsets; the other numbers have no interval. Numbers of two tables
are not comparable.</p>
{% if pictures %}
<h2>Samples{{ ": same seeds and classes" if same_draws }}</h2>
{{ shown(pictures) }}
{% endif %}
{{ meanings(columns) }}
{{ listed(versions) }}
"""
_SWEEP = """<h1>{{ title }}</h1>
<p>{{ group }}</p>
<div class="cards"><div class="card student"><h3>Best: {{ field }}</h3><b>{{ best }}</b>
<span class="soft">distance {{ distance }}</span></div></div>
{{ drawn(plots, "quality below") }}
<div class="scroll below">
<table>
<thead><tr><th>{{ field }}</th>
{% for heading in headings %}
<th>{{ heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for value, is_best, cells in table %}
<tr class="{{ 'student' if is_best }}"><td>{{ value }}</td>
{% for cell in cells %}
<td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
"""
