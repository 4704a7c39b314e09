"""The model card of an export: a README.md with a hub's front matter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from dimo_jax.artifacts import Run
from dimo_jax.evaluation.report import versions

_METHODS = {
  "dimo": ("Di[M]O", "arXiv:2503.15457", "dimo"),
  "dmd2": ("DMD2", "arXiv:2405.14867", "dmd2"),
}
# Columns of the table, where any row has them: key of results.json, heading.
_COLUMNS = (
  ("fid", "FID"),
  ("inception_score", "Inception Score"),
  ("frechet_distance", "Fréchet distance"),
  ("class_agreement", "class agreement"),
  ("precision", "precision"),
  ("recall", "recall"),
  ("token_entropy", "token entropy (nats)"),
)
_ROW = (("model", "model"), ("sampler", "sampler"), ("steps", "steps"))
_SETTINGS = ("objective", "seed", "train", "optim", "precision")  # of the recipe, beside the method


def card(
  run: Run,
  formats: Sequence[str],
  *,
  license_name: str,
  results: Sequence[Mapping[str, Any]],
  notes: Sequence[str],
) -> str:
  """The text of the card.

  Args:
    license_name: the teacher's, which the generator inherits; "" where it is unknown.
    results: rows of results.json that may stand here: of the exported weights, of the teacher, of
      real images. None where nothing was evaluated.
    notes: further paragraphs.
  """
  config = run.recipe.config
  method, paper, tag = _METHODS[config.objective]
  settings = {name: config[name] for name in (*_SETTINGS, config.objective, "sampling")}
  settings = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in settings.items()}
  columns = [(k, title) for k, title in _COLUMNS if any(row.get(k) is not None for row in results)]
  environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
  return environment.from_string(_TEMPLATE).render(
    license=license_name,
    tags=["dimo_jax", "jax", "one-step", "distillation", tag, *formats],
    method=method,
    paper=paper,
    run=run,
    config=config,
    network=_network(run),
    weights="moving average of the generator (EMA)" if run.average else "the generator, no average",
    examples=[label for label in (3, 1, 4) if label < config.data.num_classes] or [0],
    num_steps=run.parts().sampler(run.recipe.models("")).num_steps,
    formats=formats,
    protocol=results[-1].get("protocol", config.evaluation.protocol) if results else "",
    columns=(*_ROW, *columns),
    results=[[_cell(row, key) for key, _ in (*_ROW, *columns)] for row in results],
    last=results[-1] if results else {},
    evaluated=any(row.get("model") == "student" for row in results),
    notes=notes,
    settings=json.dumps(settings, indent=1),
    versions=versions(),
  )


def _network(run: Run) -> str:
  teacher = run.recipe.models("").teacher
  network = getattr(teacher, "network", teacher)
  return type(getattr(network, "model", network)).__name__


def _cell(row: Mapping[str, Any], key: str) -> str:
  value = row.get(key)
  if value is None:
    return "-"
  if isinstance(value, Mapping):  # a sampler with its settings
    return str(value["name"])
  return f"{value:.4g}" if isinstance(value, float) else str(value)


_TEMPLATE = """\
---
{% if license %}
license: {{ license }}
{% else %}
license: other
license_name: unknown
{% endif %}
library_name: dimo_jax
pipeline_tag: unconditional-image-generation
tags:
{% for tag in tags %}
- {{ tag }}
{% endfor %}
---

# {{ method }} generator, {{ num_steps }} step{{ "s" if num_steps > 1 }}, {{ config.data.name }}

Distilled by dimo_jax with {{ method }} ({{ paper }}) from a
`{{ config.teacher.name }}` teacher; class-conditional, {{ config.data.num_classes }} classes.

| | |
| --- | --- |
| network | {{ network }} |
| weights | {{ weights }} |
| training | {{ run.step }} generator updates, {{ run.clock }} fake-score updates, batch \
{{ config.train.batch_size }} x {{ config.train.accumulation }} |
| teacher | {{ config.teacher.path or "trained in the same run" }} |
| teacher's SHA-256 (over its parameters) | `{{ run.teacher_sha256 }}` |
| sampling | {{ num_steps }} network call{{ "s" if num_steps > 1 }} |

## Licence

{% if license %}
{{ license }}: the teacher's, which a distilled generator inherits.
{% else %}
Unknown: a distilled generator inherits its teacher's licence, and nobody said which that is. Find
it out before you pass these weights on (`--license` of the export records it).
{% endif %}

## Use

{% if "linen" in formats %}
`linen/` (parameters as an orbax checkpoint) and any other folder here, by dimo_jax:

    import dimo_jax
    images = dimo_jax.load("DIR").sample(labels={{ examples }}, seed=0)  # uint8 [n, h, w, c]

or `python -m dimo_jax.sample --artifact=DIR --labels={{ examples | join(",") }} --out=grid.png`.

{% endif %}
{% if "torch" in formats %}
`torch/` holds the weights under the key names and in the layouts of the original PyTorch code
(`safetensors.torch.load_file` gives the state dict), and `sampling.json` the settings with which
they were trained to be sampled.

{% endif %}
{% if "stablehlo" in formats %}
`stablehlo/` is a program for JAX that needs no code of this project:

    pip install jax flatbuffers safetensors
    python stablehlo/sample.py {{ examples | join(" ") }} --seed=0 --out=samples.npy

It takes the weights, class ids, seeds and indices of the images. It was lowered for CPU, CUDA and
TPU. The tests of dimo_jax run such programs on CPUs; for CUDA and TPU nothing but the lowering was
verified.

{% endif %}
{% for note in notes %}
{{ note }}

{% endfor %}
## Evaluation

{% if not evaluated %}
None of these weights{{ ": what follows was taken in the same run" if results }}.

{% endif %}
{% if results %}
Protocol `{{ protocol }}`{% if last.num_images %}, {{ last.num_images }} images in the last \
row{% endif %}.{% if last.departures %} Not the protocol's: \
{% for name, value in last.departures.items() %}{{ name }}={{ value }}{{ ", " if not \
loop.last }}{% endfor %}.{% endif %}
{% if last.inception_sha256 %} Inception-v3's features (weights SHA-256 \
`{{ last.inception_sha256[:12] }}`) against statistics with SHA-256 \
`{{ last.statistics_sha256[:12] }}`{% if last.unverified %}; unverified: \
{{ last.unverified | join(", ") }}{% endif %}.
{% else %} The Fréchet distance is taken in the features of a
small classifier{% if last.classifier_sha256 %} (weights SHA-256 \
`{{ last.classifier_sha256[:12] }}`){% endif %}, so it compares with rows of this table only.
{% endif %}

|{% for _, title in columns %} {{ title }} |{% endfor %}

|{% for _ in columns %} --- |{% endfor %}

{% for row in results %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}

## Recipe

    {{ settings | indent }}

Versions: {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not \
loop.last }}{% endfor %}.
"""
