"""The claims of both papers at the scale of 8x8 digits: what `python -m dimo_jax.study` runs.

A preset is what precedes the first override of a variant; a variant without overrides is the
preset itself, at the sweep's shorter length.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Overrides = Mapping[str, Any]  # flat field names and values

SEEDS = (0, 1, 2)  # of the training, the teacher's included
SAMPLING_SEEDS = (1, 2, 3)  # of the evaluation; a run's figures are the means over them


class Preset(NamedTuple):
  """Where a question starts: a config file's name, its variant, and what makes a run short."""

  config: str
  variant: str | None
  short: Overrides


class Question(NamedTuple):
  """One published ablation.

  Attributes:
    title: heading in docs/reproduction.md.
    claim: what was published, with its source.
    preset: a key of PRESETS.
    variants: label to overrides.
  """

  title: str
  claim: str
  preset: str
  variants: Mapping[str, Overrides]


PRESETS = {
  "dimo": Preset("digits", None, {"train.num_steps": 1000}),
  "one_step": Preset("digits_dmd2", "one_step", {"train.num_steps": 250}),
  "four_step": Preset("digits_dmd2", "four_step", {"train.num_steps": 500}),
}

_NO_GAN = {"dmd2.gan_generator_weight": 0.0, "dmd2.gan_critic_weight": 0.0}
_DIMO = "Di[M]O (arXiv:2503.15457)"
_DMD2 = "DMD2 (arXiv:2405.14867)"

QUESTIONS = {
  "r_init": Question(
    "Share of masked initial tokens",
    f"{_DIMO}: 1 collapses, about 0 is unstable, 0.6 is best.",
    "dimo",
    {
      "r_init 1 (all masked)": {"dimo.r_init": 1.0},
      "r_init 0.6": {},
      "r_init 0 (one token masked)": {"dimo.r_init": 0.0},
    },
  ),
  "sigma": Question(
    "Embedding perturbation",
    f"{_DIMO}: a little noise on the embeddings, 0.1, helps.",
    "dimo",
    {"sigma 0": {"dimo.sigma": 0.0}, "sigma 0.1": {}, "sigma 0.5": {"dimo.sigma": 0.5}},
  ),
  "divergence": Question(
    "Divergence",
    f"{_DIMO}: Jeffreys with beta -0.2 is best; the released code takes forward KL.",
    "dimo",
    {
      "Jeffreys -0.2": {"dimo.jeffreys_beta": -0.2},
      "forward KL": {"dimo.divergence": "forward_kl"},
      "Jeffreys 0.5": {},
      "reverse KL": {"dimo.divergence": "reverse_kl"},
    },
  ),
  "teacher_guidance": Question(
    "Guidance of the teacher in training",
    f"{_DIMO}: a guided teacher is better than an unguided one; 2 on ImageNet.",
    "dimo",
    {
      "guidance 1 (none)": {"dimo.teacher_guidance": 1.0},
      "guidance 1.25": {},
      "guidance 2": {"dimo.teacher_guidance": 2.0},
    },
  ),
  "teacher_temperature": Question(
    "Temperature of the target",
    "None is published; the release leaves it at 1.",
    "dimo",
    {
      "temperature 0.6": {"dimo.teacher_temperature": 0.6},
      "temperature 0.8": {},
      "temperature 1": {"dimo.teacher_temperature": 1.0},
    },
  ),
  "label_smoothing": Question(
    "Label smoothing of the fake score",
    f"{_DIMO}: not in the paper; the released code smooths with 0.1.",
    "dimo",
    {"smoothing 0": {}, "smoothing 0.1": {"dimo.label_smoothing": 0.1}},
  ),
  "adam_b1": Question(
    "Adam's b1",
    f"{_DIMO}: 0.9 in both networks.",
    "dimo",
    {
      "generator 0, fake score 0": {},
      "generator 0.9, fake score 0": {"optim.generator.b1": 0.9},
      "generator 0, fake score 0.9": {"optim.fake_score.b1": 0.9},
      "generator 0.9, fake score 0.9": {"optim.generator.b1": 0.9, "optim.fake_score.b1": 0.9},
    },
  ),
  "dimo_reuse": Question(
    "Samples of the generator's update for the fake score",
    "None is published; the release draws new samples for the fake score.",
    "dimo",
    {"new samples": {}, "the update's samples": {"dimo.reuse_samples": True}},
  ),
  "fake_rounds": Question(
    "Two time scales",
    f"{_DMD2}: five fake-score updates for each of the generator beat one (FID 2.61 against 3.48"
    " without the GAN), and beat a five-fold learning rate of the fake score.",
    "one_step",
    {
      "5:1, no GAN": _NO_GAN,
      "1:1, no GAN": {**_NO_GAN, "dmd2.fake_rounds": 1},
      "1:1, no GAN, fake score five times as fast": {
        **_NO_GAN,
        "dmd2.fake_rounds": 1,
        "optim.fake_score.learning_rate": 5e-3,
      },
    },
  ),
  "gan": Question(
    "Distribution matching and the GAN",
    f"{_DMD2}: FID 1.51 with both, 2.61 without the GAN, 2.56 with the GAN alone.",
    "one_step",
    {
      "matching and GAN": {},
      "matching alone": _NO_GAN,
      "GAN alone": {"dmd2.matching_weight": 0.0},
    },
  ),
  "student_inputs": Question(
    "What a four-step student is trained on",
    f"{_DMD2}: backward simulation beats noised real images (SDXL, FID 19.32 against 20.66).",
    "four_step",
    {"backward simulation": {}, "noised real images": {"dmd2.student_inputs": "real"}},
  ),
  "dmd2_reuse": Question(
    "Samples of the generator's update for the first fake-score round",
    "None is published; the release keeps the update's samples for the first of its five rounds.",
    "one_step",
    {"the update's samples": {}, "new samples": {"dmd2.reuse_samples": False}},
  ),
  "f_divergence": Question(
    "f-divergences",
    "f-distill (arXiv:2502.15681): Jensen-Shannon is best, before forward and reverse KL.",
    "one_step",
    {
      "reverse KL (plain DMD2)": {},
      "forward KL": {"dmd2.divergence": "forward_kl"},
      "Jensen-Shannon": {"dmd2.divergence": "jensen_shannon"},
      "squared Hellinger": {"dmd2.divergence": "squared_hellinger"},
      "Jeffreys": {"dmd2.divergence": "jeffreys"},
      "softened reverse KL": {"dmd2.divergence": "softened_reverse_kl"},
      "Neyman": {"dmd2.divergence": "neyman"},
    },
  ),
}
