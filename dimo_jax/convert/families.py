"""The families of published weights: how each is known, what its shapes say, how it becomes ours.

A family is known by its keys alone, so that a file of any layout, and one that was asked for as
another family, can be named. Where two families have the same keys (a teacher and a generator
distilled from it), what an export of ours says of itself decides, else the layout in which each is
published.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from dimo_jax.convert import critic, edm, maskgit, vqgan
from dimo_jax.convert.files import Archive, Tensors
from dimo_jax.models.edm import EDMPrecond, VPPrecond
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.unet import ADM, SongUNet
from dimo_jax.models.vqgan import VQGAN
from dimo_jax.types import Params, UserError, choose

_NETWORKS: dict[str, type[ADM] | type[SongUNet]] = {"adm": ADM, "song": SongUNet}
_IMAGENET_CLASSES = 1000
_PRECONDITIONED = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond}  # by their published names
# Fields of both U-Nets or one of them that shapes tell.
_FIELDS = (
  "model_channels",
  "channel_mult",
  "channel_mult_emb",
  "num_blocks",
  "attn_resolutions",
  "augment_dim",
  "embedding_type",
  "channel_mult_noise",
  "encoder_type",
  "decoder_type",
  "resample_filter",
)
_GRID, _CODES, _CLASSES = "tokenizer.grid_size", "tokenizer.codebook_size", "data.num_classes"
_VOCABULARY = "vocabulary"  # codes, mask id, classes and null class, which share a table
_HEAD, _FAKE, _REAL = "cls_pred_branch.", "fake_unet.", "real_unet."
_NOISE_TABLE = "karras_sigmas"  # a buffer beside them


@dataclasses.dataclass(frozen=True)
class Converted:
  """Published weights as ours.

  Attributes:
    family: a key of FAMILIES.
    sizes: of the architecture, by config field, as far as the file says.
    parts: what is in it by name ("teacher", "generator", "fake_score", "critic", "tokenizer"):
      float32 trees on the host.
  """

  family: str
  sizes: Mapping[str, Any]
  parts: Mapping[str, Params]


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of published file.

  Attributes:
    title: for messages.
    teacher: the value of teacher.name that its networks serve; "" where it holds none.
    student: whether its network was distilled, and is nobody's teacher.
    recognise: whether an archive is of it.
    sizes: of the architecture, by config field.
    convert: the parts, given the archive and whether transformer blocks are stacked.
  """

  title: str
  teacher: str
  recognise: Callable[[Archive], bool]
  sizes: Callable[[Archive], dict[str, Any]]
  convert: Callable[[Archive, bool], dict[str, Params]]
  student: bool = False


def guess(archive: Archive) -> str:
  """The family of an archive.

  Raises:
    UserError: it is of none of them.
  """
  told = archive.settings.get("family")
  if archive.settings.get("role") == "generator" and isinstance(told, str) and told in FAMILIES:
    return told
  for name, family in FAMILIES.items():
    if family.recognise(archive):
      return name
  if any(name.startswith("network/") for name in archive.tensors):
    what = "generator" if is_student(archive) else "teacher"
    raise UserError(f"{archive.path} is a {what} of dimo_jax already")
  names = ", ".join(list(archive.tensors)[:4])
  raise UserError(
    f"{archive.path} is of no known family ({', '.join(FAMILIES)}): it holds {names} ..."
  )


def is_student(archive: Archive) -> bool:
  """Whether a file of ours, exported or converted, says that its network was distilled."""
  conversion = archive.settings.get("conversion")
  family = conversion.get("family") if isinstance(conversion, dict) else None
  told = archive.settings.get("role") == "generator"
  return told or any(name == family and row.student for name, row in FAMILIES.items())


def convert(archive: Archive, family: str = "", *, scan_layers: bool = True) -> Converted:
  """The weights of an archive as ours.

  Args:
    archive: from `files.read`.
    family: a key of FAMILIES; "" guesses it.
    scan_layers: transformer blocks are stacked, as MaskTransformer's `scan_layers` wants them.

  Raises:
    UserError: the family is unknown or another one, or keys are missing, unexpected or misshapen.
  """
  name = family or guess(archive)
  row = choose(FAMILIES, name, "--family")
  try:
    return Converted(name, row.sizes(archive), row.convert(archive, scan_layers))
  except UserError as error:
    others = [other for other, row in FAMILIES.items() if row.recognise(archive)]
    hint = f"; it looks like {others[0]!r}" if others and name not in others else ""
    raise UserError(f"{archive.path}, read as {name!r}: {error}{hint}") from error


def check_sizes(sizes: Mapping[str, Any], network: nn.Module) -> None:
  """Compares a file's sizes with a network's, by config field.

  Raises:
    UserError: fields differ; all of them are named.
  """
  wanted = network_sizes(network)
  # How the table divides into codes and classes, no shape says.
  if _VOCABULARY in sizes and sizes[_VOCABULARY] == wanted.get(_VOCABULARY):
    sizes = {name: size for name, size in sizes.items() if name not in (_CODES, _CLASSES)}
  wrong = [
    f"{name}={found}, the config {wanted[name]}"
    for name, found in sizes.items()
    if name in wanted and found != wanted[name]
  ]
  if wrong:
    raise UserError(f"another architecture: the file has {'; '.join(wrong)}")


def denoiser(
  tensors: Tensors, settings: Mapping[str, Any]
) -> tuple[EDMPrecond | VPPrecond, dict[str, Any]]:
  """(the network that published weights are for, its sizes by config field).

  Args:
    tensors: with the published names.
    settings: of the archive; what a pickled network was made with.

  Raises:
    UserError: no such network, or one with another preconditioning.
  """
  fields = edm.sizes(tensors)
  name = settings.get("class_name", "EDMPrecond")
  if not isinstance(name, str) or name not in _PRECONDITIONED:
    said = name if isinstance(name, str) else type(name).__name__
    raise UserError(f"a network in {said} is not supported; known: {', '.join(_PRECONDITIONED)}")
  precond = _PRECONDITIONED[name]
  model = _NETWORKS[fields.pop("kind")](**fields)
  sigma_data = settings.get("sigma_data")
  told = precond is EDMPrecond and isinstance(sigma_data, float) and sigma_data > 0
  options = {"sigma_data": sigma_data} if told else {}
  network = precond(model, **options)
  sizes = network_sizes(network)
  if "class_name" not in settings:  # weights alone do not say
    sizes = {k: v for k, v in sizes.items() if not k.startswith("process.")}
  return network, sizes


def network_sizes(network: nn.Module) -> dict[str, Any]:
  """The sizes of one of our networks, by config field."""
  if isinstance(network, MaskTransformer):
    return {
      "model.hidden_dim": network.hidden_dim,
      "model.num_layers": network.num_layers,
      "model.mlp_dim": network.mlp_dim,
      _GRID: math.isqrt(network.num_tokens),
      _CODES: network.codebook_size,
      _CLASSES: network.num_classes,
      _VOCABULARY: network.codebook_size + 1 + network.num_classes + 1,
    }
  model, precond = network.model, type(network)
  kind = next((name for name, cls in _NETWORKS.items() if isinstance(model, cls)), "mlp")
  sizes = {f"denoiser.{name}": getattr(model, name) for name in _FIELDS if hasattr(model, name)}
  if kind != "mlp":
    resolutions = [model.img_resolution >> i for i in range(len(model.channel_mult))]
    attending = tuple(res for res in resolutions if res in model.attn_resolutions)
    sizes["denoiser.attn_resolutions"] = attending
  return {
    "denoiser.name": kind,
    **sizes,
    "data.image_size": model.img_resolution,
    _CLASSES: model.label_dim,
    "process.name": "edm" if precond is EDMPrecond else "variance_preserving",
    **({"process.sigma_data": network.sigma_data} if precond is EDMPrecond else {}),
  }


def _masked_sizes(archive: Archive) -> dict[str, Any]:
  found = maskgit.sizes(archive.tensors.shapes)
  vocabulary = found.pop("vocabulary")
  sizes: dict[str, Any] = {_GRID: math.isqrt(found.pop("num_tokens"))}
  sizes |= {f"model.{name}": value for name, value in found.items()}
  codebook_size = vocabulary - _IMAGENET_CLASSES - 2  # one table for codes, mask, classes, null
  if codebook_size > 0:
    sizes |= {_CODES: codebook_size, _CLASSES: _IMAGENET_CLASSES}
  return sizes | {_VOCABULARY: vocabulary}


def _masked(part: str) -> Callable[[Archive, bool], dict[str, Params]]:
  return lambda archive, scan_layers: {
    part: maskgit.from_published(archive.tensors, scan_layers=scan_layers)
  }


def _denoiser(part: str) -> Callable[[Archive, bool], dict[str, Params]]:
  def convert(archive: Archive, scan_layers: bool) -> dict[str, Params]:
    del scan_layers
    network, _ = denoiser(archive.tensors, archive.settings)
    return {part: edm.from_published(archive.tensors, network)}

  return convert


def _guidance(archive: Archive, scan_layers: bool) -> dict[str, Params]:
  """The frozen teacher, the fake score and, where there is one, its GAN head."""
  del scan_layers
  tensors = archive.tensors
  prefixes = (_REAL, _FAKE, _HEAD)
  rest = [name for name in tensors if name != _NOISE_TABLE and not name.startswith(prefixes)]
  if rest:
    raise UserError(f"unexpected keys {', '.join(rest[:4])}; known: {', '.join(prefixes)}")
  parts = {}
  for part, prefix in (("teacher", _REAL), ("fake_score", _FAKE)):
    inner = tensors.under(prefix)
    try:
      network, _ = denoiser(inner, archive.settings)
      parts[part] = edm.from_published(inner, network)
    except UserError as error:
      raise UserError(f"{prefix}: {error}") from error
  if head := tensors.under(_HEAD):
    parts["critic"] = critic.from_published(head)
  return parts


def _vqgan_settings(archive: Archive) -> dict[str, Any]:
  return vqgan.settings(archive.tensors, model_yaml=vqgan.yaml_beside(archive.path))


def _vqgan_sizes(archive: Archive) -> dict[str, Any]:
  fields = _vqgan_settings(archive)
  network = VQGAN(**fields)
  resolution = fields.pop("resolution")
  fields.pop("image_channels")
  sizes = {f"tokenizer.{name}": value for name, value in fields.items()}
  return sizes | {
    "tokenizer.name": "vqgan",
    "tokenizer.grid_size": network.grid_size,
    "tokenizer.patch_size": resolution // network.grid_size,
  }


def _vqgan(archive: Archive, scan_layers: bool) -> dict[str, Params]:
  del scan_layers
  network = VQGAN(**_vqgan_settings(archive))
  return {"tokenizer": vqgan.from_published(archive.tensors, network)}


def _is_masked(archive: Archive) -> bool:
  return "tok_emb.weight" in archive.tensors


def _is_denoiser(archive: Archive) -> bool:
  return any(name.startswith("model.enc.") for name in archive.tensors)


def _is_release(archive: Archive) -> bool:
  """Whether a trainer's plain state dict; teachers are published inside something."""
  return archive.layout in ("zip", "legacy") and not archive.wrapper


def _denoiser_sizes(archive: Archive) -> dict[str, Any]:
  return denoiser(archive.tensors, archive.settings)[1]


# The first row that recognises an archive is its family.
FAMILIES: dict[str, Family] = {
  "dmd2_guidance": Family(
    "DMD2's guidance file (teacher, fake score, GAN head)",
    "edm",
    lambda archive: any(name.startswith(_FAKE) for name in archive.tensors),
    lambda archive: denoiser(archive.tensors.under(_FAKE), archive.settings)[1],
    _guidance,
  ),
  "dmd2": Family(
    "a generator of DMD2",
    "edm",
    lambda archive: _is_denoiser(archive) and _is_release(archive),
    _denoiser_sizes,
    _denoiser("generator"),
    student=True,
  ),
  "edm": Family("an EDM network", "edm", _is_denoiser, _denoiser_sizes, _denoiser("teacher")),
  "dimo": Family(
    "a generator of Di[M]O",
    "maskgit",
    lambda archive: _is_masked(archive) and _is_release(archive),
    _masked_sizes,
    _masked("generator"),
    student=True,
  ),
  "vqgan": Family(
    "a VQGAN",
    "",
    lambda archive: "quantize.embedding.weight" in archive.tensors,
    _vqgan_sizes,
    _vqgan,
  ),
  "maskgit": Family("a MaskGIT", "maskgit", _is_masked, _masked_sizes, _masked("teacher")),
}
