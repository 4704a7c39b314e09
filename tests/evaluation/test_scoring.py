"""What the console says of a result."""

from pathlib import Path

import pytest

from dimo_jax.evaluation import scoring


@pytest.mark.parametrize(
  ("row", "line"),
  [
    (
      {"protocol": "digits", "frechet_distance": 2.98765, "recall": 0.72, "memorised": 0.0},
      "student: digits: Fréchet distance 2.988, recall 0.72; row in out.jsonl",
    ),
    (
      {
        "protocol": "adm-imagenet256",
        "unverified": ["statistics", "inception"],
        "departures": {"num_images": 100},
        "fid": 6.9,
        "sfid": None,
      },
      "student: adm-imagenet256 (with num_images=100; unverified: statistics, inception): FID 6.9;"
      " row in out.jsonl",
    ),
    (
      {
        "protocol": "digits",
        "frechet_distance": 3.0,
        "step": 500,
        "sweep": {"field": "sampling.temperature", "value": 3.0},
      },
      "student, step 500, sampling.temperature=3: digits: Fréchet distance 3; row in out.jsonl",
    ),
  ],
)
def test_a_row_is_one_line(row, line, capsys):
  scoring.say_row("student", row, Path("out.jsonl"))
  assert capsys.readouterr().out == f"{line}\n"
