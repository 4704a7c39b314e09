"""Draws the curves of a run: python tools/curves.py WORKDIR --out=curves.png"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimo_jax.types import UserError
from dimo_jax.writers import read_metrics

# (stage, title, metrics with their names in a legend); what a run does not have is left out.
PANELS = (
  ("teacher", "teacher: loss", {"teacher/loss": ""}),
  ("teacher", "teacher: accuracy of masked tokens", {"teacher/token_accuracy": ""}),
  ("teacher", "teacher: root mean square error of x0", {"teacher/x0_error": ""}),
  ("distill", "generator: loss", {"generator/loss": ""}),
  ("distill", "fake score: loss", {"fake_score/loss": ""}),
  (
    "distill",
    "entropy, nats per token",
    {"teacher/entropy": "teacher", "generator/entropy": "generator"},
  ),
  (
    "distill",
    "critic: probability of being real",
    {"critic/real_probability": "real images", "critic/fake_probability": "the student's"},
  ),
  ("distill", "student: Fréchet distance", {"evaluation/frechet_distance": ""}),
)
_COLUMNS = 3
_SMOOTHED = 9  # rows under the running mean
_COLORS = ("#2f6fb0", "#c8791c")

Rows = Sequence[dict[str, float | int]]


def draw(workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the curves of both stages of a workdir as a picture.

  Raises:
    UserError: it holds none.
  """
  rows = {stage: read_metrics(workdir / stage) for stage in ("teacher", "distill")}
  panels = [
    (stage, title, shown)
    for stage, title, names in PANELS
    if (shown := {k: v for k, v in names.items() if any(k in row for row in rows[stage])})
  ]
  if not panels:
    raise UserError(f"{str(workdir)!r} holds no metrics; name the workdir of a run")
  num_rows = -(-len(panels) // _COLUMNS)
  figure = Figure(figsize=(3.6 * _COLUMNS, 2.5 * num_rows), layout="constrained")
  axes = figure.subplots(num_rows, _COLUMNS, squeeze=False).flatten()
  for panel, (stage, title, names) in zip(axes, panels, strict=False):
    _draw_panel(panel, rows[stage], names)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("updates" if stage == "teacher" else "generator updates", fontsize=8)
  for panel in axes[len(panels) :]:
    panel.set_axis_off()
  out.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(out, dpi=100)


def _draw_panel(panel: Axes, rows: Rows, names: Mapping[str, str]) -> None:
  for (name, label), color in zip(names.items(), _COLORS, strict=False):
    found = [row for row in rows if name in row]
    steps, values = (np.array([row[key] for row in found]) for key in ("step", name))
    if f"{name}_low" in found[0]:
      low, high = ([row[name + end] for row in found] for end in ("_low", "_high"))
      panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
      panel.plot(steps, values, "o-", color=color, markersize=4)
      panel.set_ylim(bottom=0)
      continue
    panel.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    panel.plot(steps, _running_mean(values), color=color, linewidth=1.6, label=label)
  if len(names) > 1:
    panel.legend(fontsize=8, frameon=False)
  panel.spines[["top", "right"]].set_visible(False)
  panel.tick_params(labelsize=8)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Over as many neighbours as there are, at the ends too."""
  ones = np.ones(min(_SMOOTHED, len(values)))
  return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("curves.png"))
  arguments = parser.parse_args()
  try:
    draw(arguments.workdir, arguments.out)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"wrote {arguments.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
