"""Families of published weights: recognised, sized, converted strictly, outputs as recorded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dimo_jax.convert import critic, edm, families, files, maskgit
from dimo_jax.models.edm import EDMPrecond
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.mlp import DenoisingMLP
from dimo_jax.models.unet import ADM
from dimo_jax.types import UserError
from tests import published
from tests.helpers import GOLDEN, head_tensors, perturbed, state_dict

# Compiles three times faster; these networks are too small to run slowly.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
RELEASE = GOLDEN / "07_dmd2_release"
EDM = {
  "dhariwal": ("EDMPrecond", "DhariwalUNet"),
  "song_ddpmpp": ("EDMPrecond", "SongUNet"),
  "song_ncsnpp": ("EDMPrecond", "SongUNet"),
  "vp_song": ("VPPrecond", "SongUNet"),
}
MASKED_SIZES = {
  "tokenizer.grid_size": 4,
  "model.hidden_dim": 64,
  "model.num_layers": 3,
  "model.mlp_dim": 128,
  "vocabulary": 44,
}


def same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
  ("name", "family", "part"),
  [
    ("01_masktransformer.pth", "maskgit", "teacher"),
    ("01_masktransformer.safetensors", "maskgit", "teacher"),
    ("01_masktransformer_legacy.bin", "dimo", "generator"),
    ("01_ema_model", "dimo", "generator"),
  ],
)
def test_masked_transformers(golden, name, family, part):
  converted = families.convert(files.read(GOLDEN / name), scan_layers=False)
  assert (converted.family, list(converted.parts)) == (family, [part])
  assert converted.sizes == MASKED_SIZES
  params = converted.parts[part]
  same(params, maskgit.from_published(state_dict("01_masktransformer")))
  if part == "teacher":
    return
  io = golden("01_masktransformer_io")
  network = MaskTransformer(
    num_tokens=16,
    codebook_size=32,
    num_classes=10,
    hidden_dim=64,
    num_layers=3,
    num_heads=io["config"]["heads"],
    mlp_dim=128,
  )
  families.check_sizes(converted.sizes, network)
  tokens, labels = (io[k].reshape(4, -1).astype(np.int32) for k in ("tokens", "labels"))
  logits = jax.jit(network.apply)({"params": params}, tokens, labels[:, 0])
  np.testing.assert_allclose(logits, io["logits_nodrop"], rtol=0, atol=5e-5)


def test_a_training_starts_from_each_networks_weights(tmp_path):
  tensors = state_dict("05_dimo_train_a_init")
  for net in ("teacher", "generator", "fake"):
    part = {k.removeprefix(f"{net}/"): v for k, v in tensors.items() if k.startswith(f"{net}/")}
    path = published.zip_file(tmp_path / net, {"model_state_dict": part})
    converted = families.convert(files.read(path), "maskgit", scan_layers=True)
    same(converted.parts["teacher"], maskgit.from_published(part, scan_layers=True))


@pytest.mark.parametrize("name", EDM)
def test_edm_pickles_give_the_recorded_outputs(tmp_path, golden, name):
  io, tensors = golden(f"07_edm_{name}_io"), state_dict(f"07_edm_{name}")
  precond, model = EDM[name]
  config = io["config"]
  made = ("img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult")
  path = published.edm_pickle(
    tmp_path / "edm.pkl",
    tensors,
    precond=precond,
    model=model,
    **{key: config[key] for key in made},
  )
  archive = files.read(path)
  converted = families.convert(archive)
  assert (converted.family, list(converted.parts)) == ("edm", ["teacher"])
  for field, value in converted.sizes.items():
    key = field.removeprefix("denoiser.")
    if key in config:
      assert value == (tuple(config[key]) if isinstance(config[key], list) else config[key]), key
  process = "edm" if precond == "EDMPrecond" else "variance_preserving"
  assert converted.sizes["process.name"] == process
  network, _ = families.denoiser(archive.tensors, archive.settings)
  apply = jax.jit(network.apply, compiler_options=FAST_COMPILE)
  augment = np.zeros((4, config["augment_dim"]), np.float32) if config["augment_dim"] else None
  x0 = apply(
    {"params": converted.parts["teacher"]},
    jnp.asarray(io["x"].transpose(0, 2, 3, 1)),
    jnp.asarray(io["sigma"]),
    jnp.asarray(io["labels_onehot"]),
    augment,
  )
  recorded = io["denoised"].transpose(0, 2, 3, 1)
  error = abs(x0 - recorded).max() / recorded.std()
  assert error <= 2.5e-5, error


def test_other_preconditionings_are_refused(tmp_path):
  path = published.edm_pickle(
    tmp_path / "x.pkl", state_dict("07_edm_vp_song"), precond="VEPrecond", model="SongUNet"
  )
  with pytest.raises(UserError, match=r"VEPrecond is not supported; known: EDMPrecond, VPPrecond"):
    families.convert(files.read(path))
  content = {"class_name": [1], "state_dict": state_dict("07_edm_vp_song")}
  path = published.zip_file(tmp_path / "listed.pt", content)
  with pytest.raises(UserError, match="a network in list is not supported"):
    families.convert(files.read(path))


def test_the_release_of_dmd2():
  teacher = state_dict("07_edm_dhariwal")
  archive = files.read(RELEASE)
  network, _ = families.denoiser(archive.tensors, archive.settings)
  generator = families.convert(archive)
  assert (generator.family, list(generator.parts)) == ("dmd2", ["generator"])
  same(generator.parts["generator"], edm.from_published(perturbed(teacher, "generator"), network))
  guidance = families.convert(files.read(RELEASE / "pytorch_model_1.bin"))
  assert guidance.family == "dmd2_guidance" and guidance.sizes == generator.sizes
  assert list(guidance.parts) == ["teacher", "fake_score", "critic"]
  same(guidance.parts["teacher"], edm.from_published(teacher, network))
  fake = edm.from_published(perturbed(teacher, "fake_unet"), network)
  same(guidance.parts["fake_score"], fake)
  same(guidance.parts["critic"], critic.from_published(head_tensors()))


def test_safetensors_and_trainers_files_are_told_apart(tmp_path):
  tensors = state_dict("07_edm_dhariwal")
  save_file(tensors, tmp_path / "x.safetensors")
  assert families.guess(files.read(tmp_path / "x.safetensors")) == "edm"
  published.zip_file(tmp_path / "x.bin", tensors)
  archive = files.read(tmp_path / "x.bin")
  assert families.guess(archive) == "dmd2"
  assert list(families.convert(archive, "edm").parts) == ["teacher"]


def broken(tmp_path, tensors):
  """A file with a missing, an unexpected and a misshapen key."""
  names = sorted(tensors)
  changed = dict(tensors)
  lost = names[len(names) // 2]
  changed[lost + "s"] = changed.pop(lost)
  bent = next(name for name in names if tensors[name].ndim > 1 and name not in (lost, names[0]))
  changed[bent] = np.zeros((7, *tensors[bent].shape[1:]), np.float32)
  return published.zip_file(tmp_path / "x.bin", changed), lost, bent


@pytest.mark.parametrize(
  ("name", "family"),
  [("01_masktransformer", "dimo"), ("07_edm_dhariwal", "dmd2"), ("07_edm_vp_song", "edm")],
)
def test_wrong_keys_are_listed_with_the_nearest(tmp_path, name, family):
  path, lost, bent = broken(tmp_path, state_dict(name))
  with pytest.raises(UserError) as error:
    families.convert(files.read(path), family)
  text = str(error.value)
  assert f"missing keys {lost};" in text
  assert f"unexpected keys {lost}s (nearest: {lost});" in text
  assert re.search(rf"misshapen keys.*{re.escape(bent)} \(7, ", text)
  assert str(path) in text and "\n" not in text


def test_wrong_keys_of_the_parts_of_a_guidance_file(tmp_path):
  tensors = {
    f"{net}_unet.{k}": v
    for net in ("real", "fake")
    for k, v in state_dict("07_edm_dhariwal").items()
  }
  head = {f"cls_pred_branch.{k}": v for k, v in head_tensors().items()}
  path = published.zip_file(tmp_path / "whole", tensors | head)
  assert list(families.convert(files.read(path)).parts) == ["teacher", "fake_score", "critic"]
  path = published.zip_file(tmp_path / "no_head", tensors)
  assert list(families.convert(files.read(path)).parts) == ["teacher", "fake_score"]
  for changes, needle in (
    ({"fake_unet.model.map_layer9.bias": np.zeros(3)}, r"fake_unet\.: .*unexpected.*map_layer9"),
    ({"other.w": np.zeros(3)}, "unexpected keys other.w"),
    ({"karras_sigmas_2": np.zeros(3)}, "unexpected keys karras_sigmas_2"),
    ({"cls_pred_branch.7.weight": np.zeros(3)}, r"GAN head.*unexpected keys 7\.weight"),
    ({"cls_pred_branch.3.scale": np.zeros(3)}, r"GAN head.*unexpected keys 3\.scale"),
    ({"cls_pred_branch.num": np.zeros(3)}, r"GAN head.*unexpected keys num"),
    (
      {"cls_pred_branch.1.bias": np.zeros(3)},
      r"GAN head.*misshapen keys 1\.bias \(3,\) for \(64,\)",
    ),
  ):
    path = published.zip_file(tmp_path / "wrong", tensors | head | changes)
    with pytest.raises(UserError, match=needle):
      families.convert(files.read(path))


def test_files_of_another_family_say_of_which(tmp_path):
  masked, denoiser = GOLDEN / "01_masktransformer.pth", GOLDEN / "07_edm_dhariwal.safetensors"
  for path, family, looks in (
    (masked, "edm", "maskgit"),
    (masked, "dmd2_guidance", "maskgit"),
    (denoiser, "maskgit", "edm"),
    (RELEASE / "pytorch_model_1.bin", "dimo", "dmd2_guidance"),
  ):
    with pytest.raises(UserError, match=f"read as {family!r}: .*looks like {looks!r}"):
      families.convert(files.read(path), family)
  with pytest.raises(UserError, match=r"--family='maskgti'.*did you mean 'maskgit'"):
    families.convert(files.read(masked), "maskgti")
  save_file({"conv.weight": np.zeros((3, 3), np.float32)}, tmp_path / "x")
  with pytest.raises(UserError, match=r"of no known family \(.*edm.*it holds conv.weight"):
    families.convert(files.read(tmp_path / "x"))


def test_sizes_that_no_network_has_are_refused(tmp_path):
  tensors = state_dict("07_edm_dhariwal")
  narrow = tensors | {"model.enc.8x8_block0.conv1.weight": np.zeros((0, 64, 3, 3), np.float32)}
  huge = {k.replace("enc.16x16", f"enc.{2**40}x{2**40}"): v for k, v in tensors.items()}
  for name, changed, needle in (
    ("narrow", narrow, "32 channels do not divide"),
    ("huge", huge, "missing keys model.dec.1099511627776x1099511627776_block0"),
  ):
    path = published.zip_file(tmp_path / name, changed)
    with pytest.raises(UserError) as error:
      families.convert(files.read(path))
    assert needle in str(error.value)


def test_sizes_are_compared_with_the_config():
  sizes = MASKED_SIZES | {"tokenizer.codebook_size": 40, "data.num_classes": 2}
  options = {"codebook_size": 32, "num_classes": 10, "num_tokens": 16, "num_heads": 4}
  network = MaskTransformer(hidden_dim=64, num_layers=3, mlp_dim=128, **options)
  families.check_sizes(sizes, network)  # 32 + 10 or 40 + 2: the table is as long
  with pytest.raises(UserError, match=r"file has model\.num_layers=3, the config 2; vocabulary=44"):
    families.check_sizes(sizes | {"vocabulary": 44}, network.clone(num_layers=2, num_classes=9))
  options = {"img_resolution": 16, "label_dim": 10, "model_channels": 32, "num_blocks": 1}
  adm = ADM(channel_mult=(1, 2), attn_resolutions=(32, 8), **options)  # 32 never occurs
  found = files.read(GOLDEN / "07_edm_dhariwal.safetensors")
  _, sizes = families.denoiser(found.tensors, found.settings)
  families.check_sizes(sizes, EDMPrecond(adm))
  for changes, needle in (
    ({"num_blocks": 2}, r"denoiser\.num_blocks=1, the config 2"),
    ({"channel_mult": (1, 3)}, r"denoiser\.channel_mult=\(1, 2\), the config \(1, 3\)"),
    ({"attn_resolutions": (16,)}, r"denoiser\.attn_resolutions=\(8,\), the config \(16,\)"),
    ({"label_dim": 3, "img_resolution": 32}, r"image_size=16, the config 32; data\.num_classes=10"),
  ):
    with pytest.raises(UserError, match=needle):
      families.check_sizes(sizes, EDMPrecond(adm.clone(**changes)))
  with pytest.raises(UserError, match=r"denoiser\.name=adm, the config mlp"):
    families.check_sizes(sizes, EDMPrecond(DenoisingMLP(img_resolution=16)))
