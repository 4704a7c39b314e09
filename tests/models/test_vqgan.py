import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dimo_jax.convert import __main__ as convert_main
from dimo_jax.convert import families, files, vqgan
from dimo_jax.models.vqgan import VQGAN
from dimo_jax.teachers.vqgan import VQGANTokenizer
from dimo_jax.types import UserError
from tests.helpers import GOLDEN

CHECKPOINT = GOLDEN / "02_vqgan_last.ckpt"
MODEL_YAML = (GOLDEN / "02_vqgan_model.yaml").read_text()
ATOL = 1e-5  # of images and latents: the recording differs from float64 by 2e-6


@pytest.fixture(scope="module")
def io(golden):
  return golden("02_vqgan_io")


@pytest.fixture(scope="module")
def state_dict():
  return dict(files.read(CHECKPOINT).tensors)


@pytest.fixture(scope="module")
def network(state_dict):
  return VQGAN(**vqgan.settings(state_dict, model_yaml=MODEL_YAML))


@pytest.fixture(scope="module")
def params(state_dict, network):
  return jax.tree.map(jnp.asarray, vqgan.from_published(state_dict, network))


@pytest.fixture(scope="module")
def apply(network):
  """One compiled function for every call of the same method and shapes."""
  return jax.jit(
    lambda params, x, method: network.apply({"params": params}, x, method=method),
    static_argnames="method",
  )


def nhwc(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1))


def codes_of(io):
  return jnp.asarray(io["codes"], jnp.int32)


def test_decoded_images_are_the_references(io, apply, params):
  images = apply(params, codes_of(io), "decode")
  assert images.dtype == jnp.float32
  assert abs(images - nhwc(io["decoded_f64"])).max() < ATOL
  assert abs(images).max() > 1.2  # not clipped here


def test_codes_are_the_references(io, apply, params):
  latents = apply(params, nhwc(io["image"]), "latents")
  assert abs(latents - nhwc(io["encoder_latent"])).max() < ATOL
  codes = apply(params, nhwc(io["image"]), "encode")
  np.testing.assert_array_equal(codes, io["indices"])
  assert len(np.unique(codes)) > 8


def test_reconstructions_are_the_references(io, apply, params):
  images = apply(params, nhwc(io["image"]), "__call__")
  assert abs(images - nhwc(io["reconstruction"])).max() < ATOL


def test_compiled_and_plain_agree(io, network, apply, params):
  codes = codes_of(io)[:1]
  plain = network.apply({"params": params}, codes, method="decode")
  assert abs(apply(params, codes, "decode") - plain).max() < ATOL


def test_bfloat16_is_the_decoders_alone(io, network, params):
  half = network.clone(dtype=jnp.bfloat16)
  images = jax.jit(lambda p, x: half.apply({"params": p}, x, method="decode"))(params, codes_of(io))
  assert images.dtype == jnp.float32
  assert 1e-4 < abs(images - nhwc(io["decoded_f64"])).max() < 0.1
  codes = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode"))(
    params, nhwc(io["image"])
  )
  np.testing.assert_array_equal(codes, io["indices"])


def products(jaxpr):
  """The precisions of all matrix products and convolutions of a program."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      found.append(equation.params["precision"])
    for inner in core.jaxprs_in_params(equation.params):
      found += products(inner)
  return found


@pytest.mark.parametrize("default", [None, "bfloat16"])
def test_codes_do_not_depend_on_the_default_precision(network, default):
  tree = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

  def traced(method, x):
    with jax.default_matmul_precision(default):
      function = jax.make_jaxpr(lambda tree, x: network.apply(tree, x, method=method))
      return products(function(tree, x).jaxpr)

  encode = traced("encode", jnp.zeros((1, 16, 16, 3)))
  decode = traced("decode", jnp.zeros((1, 8, 8), jnp.int32))
  # Convolutions by level (16, 8 with attention), in the middle, at the ends; two products for each
  # of the two attentions; the codebook.
  assert len(encode) == (2 + 1) + (3 + 4) + (2 + 4 + 2) + 3 + 2 * 2 + 1
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert set(encode) == {highest} and highest not in decode


def test_tokens_are_row_by_row_and_images_within_their_range(io, network, apply, params):
  tokenizer = VQGANTokenizer(network, str(CHECKPOINT))
  assert (tokenizer.codebook_size, tokenizer.grid, tokenizer.image_shape) == (
    32,
    (8, 8),
    (16,) * 2 + (3,),
  )
  fitted = tokenizer.fit(None, 0)
  jax.tree.map(np.testing.assert_array_equal, fitted, params)
  tokens = jax.jit(tokenizer.encode)(fitted, nhwc(io["image"]))
  np.testing.assert_array_equal(tokens, io["indices"].reshape(2, 64))
  images = jax.jit(tokenizer.decode)(fitted, codes_of(io).reshape(3, 64))
  np.testing.assert_allclose(images, nhwc(io["decoded_f64"]).clip(-1, 1), atol=ATOL)
  assert abs(images).max() == 1


def test_random_parameters_follow_the_seed(network):
  tokenizer = VQGANTokenizer(network, "random")
  one, same, other = (tokenizer.fit(None, seed) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert abs(one["codebook"] - other["codebook"]).max() > 0
  assert 0.9 / 32 < abs(one["codebook"]).max() <= 1 / 32


# The converter.


def test_published_names_round_trip(state_dict, network, params):
  back = vqgan.to_published(params)
  assert {key for key in state_dict if key not in back} == {
    key for key in state_dict if key.startswith("loss.")
  }
  for key, value in back.items():
    assert value.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(value, state_dict[key], err_msg=key)
  again = vqgan.from_published(back, network)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_missing_unexpected_and_misshapen_names_are_listed(state_dict, network):
  wrong = dict(state_dict)
  wrong["decoder.up.0.block.1.conv3.weight"] = wrong.pop("decoder.up.0.block.1.conv2.weight")
  wrong["quant_conv.bias"] = np.zeros(15, np.float32)
  with pytest.raises(UserError) as error:
    vqgan.from_published(wrong, network)
  text = str(error.value)
  assert "missing keys decoder.up.0.block.1.conv2.weight;" in text
  near = "decoder.up.0.block.1.conv3.weight (nearest: decoder.up.0.block.1.conv2.weight)"
  assert f"unexpected keys {near};" in text
  assert "misshapen keys quant_conv.bias (15,) for (16,)" in text
  assert "\n" not in text and "loss." not in text
  with pytest.raises(UserError, match="misshapen keys none"):
    vqgan.from_published({}, network)


def test_sizes_are_read_off_the_shapes(state_dict):
  wanted = {
    "resolution": 16,
    "channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
    "z_channels": 16,
    "codebook_size": 32,
    "code_dim": 16,
    "image_channels": 3,
  }
  assert vqgan.settings(state_dict, model_yaml=MODEL_YAML) == wanted
  assert vqgan.settings(state_dict, resolution=16) == wanted
  larger = vqgan.settings(state_dict, resolution=64)
  assert larger == wanted | {"resolution": 64, "attn_resolutions": (32,)}
  with pytest.raises(UserError, match=r"not a VQGAN of .*encoder\.conv_in\.weight' is missing"):
    vqgan.settings({"tok_emb.weight": np.zeros((2, 2))})


@pytest.mark.parametrize(
  ("old", "new", "needle"),
  [
    ("ch: 32", "ch: 64", "ddconfig.ch=64 where the weights have 32"),
    ("- 2", "- 4", r"ddconfig.ch_mult=\(1, 4\) where the weights have \(1, 2\)"),
    ("num_res_blocks: 1", "num_res_blocks: 2", "ddconfig.num_res_blocks=2"),
    ("- 8", "- 16", r"ddconfig.attn_resolutions=\(16,\) where the weights have \(8,\)"),
    ("z_channels: 16", "z_channels: 8", "ddconfig.z_channels=8"),
    ("in_channels: 3", "in_channels: 1", "ddconfig.in_channels=1"),
    ("n_embed: 32", "n_embed: 64", "n_embed=64 where the weights have 32"),
    ("embed_dim: 16", "embed_dim: 8", "embed_dim=8"),
    ("double_z: false", "double_z: true", "double_z"),
    ("n_embed: 32", "", "does not describe a VQGAN .*n_embed"),
    ("params:", "parameters:", "does not describe a VQGAN .*params"),
    ("model:", "model: [", "is no yaml"),
    (MODEL_YAML, "text", "does not describe a VQGAN"),
  ],
)
def test_model_yaml_must_agree(state_dict, old, new, needle):
  assert old in MODEL_YAML
  with pytest.raises(UserError, match=f"model.yaml .*{needle}") as error:
    vqgan.settings(state_dict, model_yaml=MODEL_YAML.replace(old, new))
  assert "\n" not in str(error.value)


def test_model_yaml_may_name_resolutions_that_never_occur(state_dict):
  text = MODEL_YAML.replace("      - 8\n", "      - 8\n      - 999\n")
  assert text != MODEL_YAML
  assert vqgan.settings(state_dict, model_yaml=text)["attn_resolutions"] == (8,)


def test_a_checkpoint_is_known_as_a_vqgan(tmp_path, params):
  (tmp_path / "last.ckpt").write_bytes(CHECKPOINT.read_bytes())
  (tmp_path / "model.yaml").write_text(MODEL_YAML)
  archive = files.read(tmp_path / "last.ckpt")
  assert families.guess(archive) == "vqgan"
  found = families.convert(archive)
  assert found.sizes["tokenizer.grid_size"] == 8 and found.sizes["tokenizer.patch_size"] == 2
  assert found.sizes["tokenizer.channel_mult"] == (1, 2)
  jax.tree.map(np.testing.assert_array_equal, found.parts["tokenizer"], params)


def test_a_converted_file_is_a_tokenizers(tmp_path, network, params):
  (tmp_path / "last.ckpt").write_bytes(CHECKPOINT.read_bytes())
  (tmp_path / "model.yaml").write_text(MODEL_YAML)
  source = ["--source", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "out")]
  assert convert_main.main(source) == 0
  record = json.loads((tmp_path / "out" / "conversion.json").read_text())
  assert record["family"] == "vqgan" and record["sizes"]["tokenizer.attn_resolutions"] == [8]
  path = tmp_path / "out" / "tokenizer.safetensors"
  found = VQGANTokenizer(network, str(path)).fit(None, 0)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  with pytest.raises(UserError, match="code_dim 16 for 8"):
    VQGANTokenizer(network.clone(code_dim=8), str(path)).fit(None, 0)


# The tokenizer's file.


def test_the_file_must_be_of_the_configs_network(network, tmp_path, params):
  (tmp_path / "last.ckpt").write_bytes(CHECKPOINT.read_bytes())
  folder = VQGANTokenizer(network, str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, folder.fit(None, 0), params)
  for change, needle in (
    ({"channels": 64}, "channels 32 for 64"),
    ({"channel_mult": (1, 4)}, r"channel_mult \(1, 2\) for \(1, 4\)"),
    ({"num_res_blocks": 2}, "num_res_blocks 1 for 2"),
    ({"attn_resolutions": (8, 16)}, r"attn_resolutions \(8,\) for \(8, 16\)"),
    ({"z_channels": 8}, "z_channels 16 for 8"),
    ({"codebook_size": 64}, "codebook_size 32 for 64"),
    ({"code_dim": 8}, "code_dim 16 for 8"),
  ):
    other = dataclasses.replace(folder, network=network.clone(**change))
    with pytest.raises(UserError, match=f"tokenizer.path='{tmp_path}': .*{needle}"):
      other.fit(None, 0)
  (tmp_path / "model.yaml").write_text(MODEL_YAML.replace("ch: 32", "ch: 64"))
  with pytest.raises(UserError, match=r"model\.yaml is not of these weights: ddconfig\.ch=64"):
    folder.fit(None, 0)


@pytest.mark.parametrize(
  ("change", "needle"),
  [
    ({"channels": 48}, "tokenizer.channels=48 .* a multiple of 32"),
    ({"channels": 0}, "tokenizer.channels=0 must be 1 or more"),
    ({"channel_mult": (1, 0)}, "tokenizer.channel_mult"),
    ({"channel_mult": ()}, "tokenizer.channel_mult"),
    ({"num_res_blocks": 0}, "tokenizer.num_res_blocks=0"),
    ({"z_channels": 0}, "tokenizer.z_channels=0"),
    ({"codebook_size": 0}, "tokenizer.codebook_size=0"),
    ({"code_dim": 0}, "tokenizer.code_dim=0"),
  ],
)
def test_impossible_sizes_are_refused(network, change, needle):
  with pytest.raises(UserError, match=needle):
    VQGANTokenizer(network.clone(**change), "random")


# Counted in the reference implementation, without its discriminator and perceptual loss.
NUM_PARAMETERS = 72_141_699


def test_number_of_parameters_at_full_size():
  network = VQGAN()
  image = jnp.zeros((1, 256, 256, 3))
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == NUM_PARAMETERS
