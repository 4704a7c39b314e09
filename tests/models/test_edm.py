import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dimo_jax.convert import edm
from dimo_jax.models import unet
from dimo_jax.models.edm import EDMPrecond, VPPrecond, vp_sigma, vp_time
from dimo_jax.models.mlp import DenoisingMLP
from dimo_jax.models.unet import ADM, SongUNet, downsample, upsample
from dimo_jax.types import UserError
from tests.helpers import state_dict

GOLDEN = ("dhariwal", "dhariwal_multihead", "song_ddpmpp", "song_ncsnpp", "vp_song")
# Of x0, in standard deviations of the recorded one; VPPrecond's is recorded up to 5e-4 at 80.
RTOL = {"dhariwal": 1e-5, "vp_song": 1e-5} | dict.fromkeys(GOLDEN[1:4], 2.5e-5)
# Compiles three times faster; these networks are too small to run slowly.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
FULL_SIZE = {"img_resolution": 64, "label_dim": 1000}  # ImageNet-64; the rest are ADM's defaults


def normal(name, shape):
  """The recordings' deterministic noise."""
  return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def nhwc(x):
  return jnp.asarray(x.transpose(0, 2, 3, 1))


def published(name, io):
  """The recorded weights; the multi-head network's are made from their names."""
  if name != "dhariwal_multihead":
    return state_dict(f"07_edm_{name}")
  weights = {}
  sizes = [tuple(json.loads(shape)) for shape in io["weight_shapes"].tolist()]
  for key, shape in zip(io["weight_table_names"].tolist(), sizes, strict=True):
    noise = normal(key, shape).astype(np.float32)
    if key.endswith("resample_filter"):
      weights[key] = np.full(shape, 0.25, np.float32)
    elif len(shape) > 1:
      weights[key] = noise / np.sqrt(np.float32(np.prod(shape[1:])))
    else:
      weights[key] = np.float32(0.1) * noise + ("norm" in key and key.endswith("weight"))
  return weights


class Case:
  """A recorded network, and one compiled function for all that is recorded of it."""

  def __init__(self, name, io):
    self.name, self.io = name, io
    cls = {"DhariwalUNet": ADM, "SongUNet": SongUNet}[io["config"]["model_type"]]
    fields = {k: v for k, v in io["config"].items() if k in cls.__dataclass_fields__}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    precond = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond}[io["config"]["precond"]]
    self.network = precond(cls(**fields))
    self.published = published(name, io)
    self.params = jax.device_put(edm.from_published(self.published, self.network))
    self.labels, self.no_labels = io["labels_onehot"], np.zeros_like(io["labels_onehot"])
    self.no_augment = np.zeros((4, self.network.model.augment_dim), np.float32)
    cotangent, sigma = nhwc(io["cotangent"]), jnp.asarray(io["sigma"])

    def loss(params, xt, *labels):
      x0, bottleneck = self.network.apply({"params": params}, xt, sigma, *labels, output="both")
      return (x0 * cotangent).sum(), (x0, bottleneck)

    self.gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    self.run(self.labels, self.no_augment)  # compiles

  def run(self, labels, augment_labels):
    return self.gradients(self.params, nhwc(self.io["x"]), labels, augment_labels)


@pytest.fixture(scope="module", params=GOLDEN)
def case(request, golden):
  return Case(request.param, golden(f"07_edm_{request.param}_io"))


def test_outputs(case):
  io = case.io
  recorded = [("denoised", case.labels, case.no_augment)]
  recorded.append(("denoised_nolabel", case.no_labels, case.no_augment))
  if "denoised_aug" in io:
    recorded.append(("denoised_aug", case.labels, io["augment_labels"]))
  for key, labels, augment_labels in recorded:
    _, (x0, bottleneck) = case.run(labels, augment_labels)
    assert x0.dtype == bottleneck.dtype == jnp.float32
    error = abs(x0 - nhwc(io[key])).max() / io[key].std()
    assert error <= RTOL[case.name], f"{key}: largest error {error:.1e} standard deviations"
    if key == "denoised" and "bottleneck" in io:
      np.testing.assert_allclose(bottleneck, nhwc(io["bottleneck"]), rtol=0, atol=1e-5)
  outputs = [case.run(*labels)[1][0] for _, *labels in recorded]
  for other in outputs[1:]:
    assert abs(other - outputs[0]).max() > 1e-3


def test_gradients(case):
  io = case.io
  (d_params, d_xt), _ = case.run(case.labels, case.no_augment)
  atol = 1e-5 * abs(io["dx"]).max()
  np.testing.assert_allclose(d_xt, nhwc(io["dx"]), rtol=1e-4, atol=atol)
  ours = edm.to_published(d_params, case.network)
  names = io["grad_table_names"].tolist()
  unrecorded = {key for key in ours if key not in names and "resample_filter" not in key}
  assert unrecorded <= {"model.map_augment.weight", "model.map_noise.freqs"}
  if "model.map_noise.freqs" in ours:
    assert not ours["model.map_noise.freqs"].any()
  for key, row in zip(names, io["grad_table_l2_sum_absmax_dot"], strict=True):
    gradient, direction = ours[key].astype(np.float64), normal(f"dot/{key}", ours[key].shape)
    got = [np.linalg.norm(gradient), gradient.sum(), abs(gradient).max()]
    got.append((gradient * direction.astype(np.float32)).sum())
    # A sum's rounding is relative to what is summed: 1e-4 of the l1 norm, or of the l2 norm.
    scale = np.array([row[0], abs(gradient).sum(), row[2], row[0]])
    error = abs(np.array(got) - row) / scale
    assert error.max() <= 1e-4, f"{key}: {error}"


def test_published_names_round_trip(case):
  back = edm.to_published(case.params, case.network)
  assert back.keys() == case.published.keys()
  for key, value in case.published.items():
    assert back[key].flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_number_of_parameters(case):
  freqs = sum(v.size for k, v in case.published.items() if k.endswith("freqs"))
  count = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  assert count - freqs == case.io["config"]["n_params"]


@functools.cache
def shapes(network):
  """Paths and shapes of a network's parameters."""
  m = network.model
  xt = jnp.zeros((1, m.img_resolution, m.img_resolution, m.img_channels))
  augment = jnp.zeros((1, m.augment_dim)) if m.augment_dim else None
  tree = jax.eval_shape(network.init, jax.random.key(0), xt, jnp.ones(1), None, augment)
  return {k: v.shape for k, v in traverse_util.flatten_dict(tree["params"], sep="/").items()}


def test_number_of_parameters_at_full_size():
  c, emb, channels, labels = 192, 768, [192, 384, 576, 768], 1000

  def block(cin, cout, attention=False, resample=False):
    norms = 2 * cin + 2 * cout
    convs = 9 * cin * cout + cout + 9 * cout * cout + cout
    skip = cin * cout + cout if cin != cout and not resample else 0
    attends = 2 * cout + (cout * 3 * cout + 3 * cout) + (cout * cout + cout)
    return norms + convs + emb * 2 * cout + 2 * cout + skip + attention * attends

  total = c * emb + emb + emb * emb + emb + labels * emb  # embeddings of noise and class
  total += 9 * 3 * c + c
  skips, x = [c], c
  for level, width in enumerate(channels):
    if level:
      total += block(x, x, resample=True)
      skips.append(x)
    for _ in range(3):
      total += block(x, width, attention=level > 0)
      x = width
      skips.append(x)
  total += block(x, x, attention=True) + block(x, x)
  for level, width in reversed(list(enumerate(channels))):
    if level < 3:
      total += block(x, x, resample=True)
    for _ in range(4):
      total += block(x + skips.pop(), width, attention=level > 0)
      x = width
  total += 2 * c + 9 * c * 3 + 3
  made = shapes(EDMPrecond(ADM(**FULL_SIZE)))
  assert sum(int(np.prod(shape)) for shape in made.values()) == total
  assert round(total / 1e6) == 296  # published


def adm(**options):
  """A small ADM for 8x8 images."""
  fields = {"label_dim": 3, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
  fields |= {"attn_resolutions": (), "channels_per_head": 8, "dropout": 0.0}
  return ADM(8, **fields | options)


def song(**options):
  """A small SongUNet for 8x8 images."""
  fields = {"label_dim": 3, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
  return SongUNet(8, **fields | {"attn_resolutions": (), "dropout": 0.0} | options)


def mlp(**options):
  """A small MLP for 8x8 images of three channels."""
  return DenoisingMLP(8, **{"img_channels": 3, "label_dim": 3, "hidden_dim": 16} | options)


XT = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
SIGMA, CLASS_ID = jnp.asarray([0.3, 3.0]), jnp.asarray([0, 2])


def weights(network):
  """Random weights that depend only on each one's path and shape; none are zero."""
  flat = {
    path: jnp.asarray(normal(path, shape) * (1 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5))
    for path, shape in shapes(network).items()
  }
  return traverse_util.unflatten_dict({k: v.astype(jnp.float32) for k, v in flat.items()}, sep="/")


def denoise(network, params=None, labels=CLASS_ID, **options):
  params = weights(network) if params is None else params
  return jax.jit(
    lambda params: network.apply({"params": params}, jnp.asarray(XT), SIGMA, labels, **options),
    compiler_options=FAST_COMPILE,
  )(params)


def initial(network):
  """Random initial parameters and what the network makes of them."""
  # The default generator takes five times longer to compile.
  key = jax.random.key(0, impl="unsafe_rbg")
  init = jax.jit(network.init_with_output, compiler_options=FAST_COMPILE)
  x0, variables = init(key, jnp.asarray(XT), SIGMA, CLASS_ID)
  return traverse_util.flatten_dict(variables["params"]["model"], sep="/"), x0


@pytest.mark.parametrize(
  ("make", "options"),
  [
    (adm, {"label_dim": 0}),
    (adm, {"augment_dim": 2}),
    (adm, {"model_channels": 16}),
    (adm, {"channel_mult": (1, 1)}),
    (adm, {"channel_mult_emb": 2}),
    (adm, {"num_blocks": 2}),
    (adm, {"attn_resolutions": (8,)}),
    (song, {"label_dim": 0}),
    (song, {"augment_dim": 2}),
    (song, {"model_channels": 16}),
    (song, {"channel_mult": (1, 1)}),
    (song, {"channel_mult_emb": 2}),
    (song, {"num_blocks": 2}),
    (song, {"attn_resolutions": (8,)}),
    (song, {"channel_mult_noise": 2}),
    (song, {"embedding_type": "fourier"}),
    (song, {"encoder_type": "skip"}),
    (song, {"encoder_type": "residual"}),
    (song, {"decoder_type": "skip"}),
    (mlp, {"label_dim": 0}),
    (mlp, {"augment_dim": 2}),
    (mlp, {"hidden_dim": 32}),
    (mlp, {"num_blocks": 2}),
  ],
)
def test_options_that_change_the_parameters(make, options):
  assert shapes(EDMPrecond(make(**options))) != shapes(EDMPrecond(make()))


@pytest.mark.parametrize(
  ("network", "other"),
  [
    (EDMPrecond(adm()), EDMPrecond(adm(channels_per_head=4))),
    (EDMPrecond(mlp()), EDMPrecond(mlp(), sigma_data=1.0)),
    (EDMPrecond(mlp()), VPPrecond(mlp())),
    (EDMPrecond(song()), EDMPrecond(song(resample_filter=(1, 3, 3, 1)))),
  ],
)
def test_options_that_change_the_output(network, other):
  params = weights(network)
  assert shapes(network) == shapes(other)
  assert abs(denoise(network, params) - denoise(other, params)).max() > 1e-3


@pytest.mark.parametrize("make", [adm, song, mlp])
def test_dropout_changes_the_output_only_where_it_is_active(make):
  network, plain = EDMPrecond(make(dropout=0.5)), EDMPrecond(make())
  params = weights(network)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def both(key):
    options = {"deterministic": False, "rngs": {"dropout": key}}
    arguments = {"params": params}, jnp.asarray(XT), SIGMA, CLASS_ID
    return network.apply(*arguments, **options), network.apply(*arguments)

  (first, quiet), (second, _) = both(jax.random.key(0)), both(jax.random.key(1))
  np.testing.assert_allclose(quiet, denoise(plain, params), rtol=0, atol=1e-5)
  assert abs(first - quiet).max() > 1e-2
  assert abs(first - second).max() > 1e-2


@pytest.mark.parametrize("make", [adm, song, mlp])
def test_the_bottleneck_needs_no_decoder(make):
  network = EDMPrecond(make())
  params = weights(network)
  encoder = {
    "model": {k: v for k, v in params["model"].items() if not k.startswith(("dec", "out"))}
  }
  x0, bottleneck = denoise(network, params, output="both")
  assert x0.shape == XT.shape
  assert bottleneck.shape == ((2, 1, 1, 16) if make is mlp else (2, 4, 4, 16))
  np.testing.assert_array_equal(x0, denoise(network, params))
  alone = denoise(network, encoder, output="bottleneck")
  np.testing.assert_allclose(alone, bottleneck, rtol=0, atol=1e-5)


def test_class_labels():
  network = EDMPrecond(mlp())
  params = weights(network)
  wanted = denoise(network, params)
  np.testing.assert_array_equal(wanted, denoise(network, params, jax.nn.one_hot(CLASS_ID, 3)))
  null = denoise(network, params, jnp.full(2, 3))
  np.testing.assert_array_equal(null, denoise(network, params, None))
  np.testing.assert_array_equal(null, denoise(network, params, jnp.zeros((2, 3))))
  assert (abs(wanted - null).max((1, 2, 3)) > 1e-2).all()


@pytest.mark.parametrize("make", [adm, song, mlp])
def test_bfloat16_compute_keeps_float32_parameters_and_output(make):
  full, half = EDMPrecond(make()), EDMPrecond(make(dtype=jnp.bfloat16))
  params = weights(full)
  made = jax.eval_shape(half.init, jax.random.key(0), jnp.asarray(XT), SIGMA, CLASS_ID)
  assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
  outputs, wanted = denoise(half, params, output="both"), denoise(full, params, output="both")
  for output, want in zip(outputs, wanted, strict=True):
    assert output.dtype == jnp.float32
    assert 1e-4 < abs(output - want).max() / want.std() < 0.3


def test_accelerators_compute_the_same(monkeypatch):
  network = EDMPrecond(adm(attn_resolutions=(4,)))
  params = weights(network)
  cpu = denoise(network, params)
  taken = []

  def elsewhere(*args, cpu, default):
    taken.append(cpu)
    return default(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
  np.testing.assert_allclose(denoise(network, params), cpu, rtol=0, atol=2e-5)
  assert taken == [unet._phase_convs]


def test_the_program_of_a_platform_has_only_its_own_convolution():
  network = EDMPrecond(adm(attn_resolutions=()))
  params = weights(network)
  traced = jax.jit(network.apply).trace({"params": params}, jnp.asarray(XT), SIGMA, CLASS_ID)
  counts = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count("convolution(")
    for platform in ("cpu", "tpu")
  }
  assert counts["cpu"] == counts["tpu"] + 3  # four phases in place of one convolution


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 4, 3, 1)])
def test_resampling_is_zero_stuffing_and_filtering(taps):
  f, pad = np.outer(taps, taps) / sum(taps) ** 2, len(taps) // 2 - 1
  x = XT[0, :, :, 0].astype(np.float64)

  def correlate(image, stride):
    size = (len(image) - len(taps)) // stride + 1
    n = len(taps)
    windows = [
      [(image[i * stride :][:n, j * stride :][:, :n] * f).sum() for j in range(size)]
      for i in range(size)
    ]
    return np.array(windows)

  for padded in (True, False):
    wanted = correlate(np.pad(x, pad if padded else 0), 2)
    got = downsample(jnp.asarray(XT), taps, pad=padded)[0, :, :, 0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
  # The transpose: every input pixel adds the filter to the output; then the border is cut off.
  canvas = np.zeros((2 * len(x) + 2 * pad, 2 * len(x) + 2 * pad))
  for i in range(8):
    for j in range(8):
      canvas[2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)] += 4 * x[i, j] * f
  wanted = canvas[pad : pad + 16, pad : pad + 16]
  got = upsample(jnp.asarray(XT), taps)[0, :, :, 0]
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_initial_weights():
  flat, x0 = initial(
    EDMPrecond(adm(label_dim=50, model_channels=32, channel_mult=(1,), attn_resolutions=(8,)))
  )
  for path, leaf in flat.items():
    layer, kind = path.rsplit("/", 1)
    if layer.endswith(("conv1", "proj", "out_conv")) or (kind == "bias" and "norm" in layer):
      assert not leaf.any(), path
    elif kind == "scale":
      assert (leaf == 1).all()
    elif layer == "map_label":
      assert abs(leaf.std() - 1) < 0.05
    else:
      limit = np.prod(flat[f"{layer}/kernel"].shape[:-1]) ** -0.5
      assert 0.75 * limit < abs(leaf).max() <= limit, path
  c_skip = 0.25 / (SIGMA**2 + 0.25)
  np.testing.assert_allclose(x0, c_skip[:, None, None, None] * XT, rtol=1e-5)


def test_initial_weights_of_song():
  flat, _ = initial(
    EDMPrecond(
      song(model_channels=32, channel_mult=(1,), embedding_type="fourier", attn_resolutions=(8,))
    )
  )
  for path, leaf in flat.items():
    layer, kind = path.rsplit("/", 1)
    if kind == "freqs":
      assert 8 < leaf.std() < 24
    elif kind == "kernel":
      *size, cin, cout = leaf.shape
      limit = np.sqrt(6 / (np.prod(size) * (cin + cout)))
      if layer.endswith(("conv1", "proj", "aux_conv")):
        limit *= 1e-5
      elif layer.endswith("qkv"):
        limit *= 0.2**0.5
      assert 0.85 * limit < abs(leaf).max() <= limit * (1 + 1e-6), path
    else:
      assert (leaf == (kind == "scale")).all(), path


def test_scalings_of_edm():
  sigma = jnp.asarray([0.002, 0.5, 80.0])
  c_skip, c_out, c_in, c_noise = EDMPrecond(mlp()).scalings(sigma)
  # A network of unit input and target variance, arXiv:2206.00364, appendix B.6.
  np.testing.assert_allclose(c_in**2 * (0.25 + sigma**2), 1, rtol=1e-6)
  np.testing.assert_allclose((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2, c_out**2, rtol=1e-5)
  np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-6)


def test_times_of_the_variance_preserving_process(golden):
  io = golden("07_edm_vp_song_io")
  t = jnp.asarray(io["vp_t"])
  exact = np.sqrt(np.expm1(0.5 * 19.9 * np.float64(t) ** 2 + 0.1 * np.float64(t)))
  np.testing.assert_allclose(vp_sigma(t), exact, rtol=2e-6)
  np.testing.assert_allclose(vp_time(vp_sigma(t)), t, rtol=2e-6)
  # The recording loses digits below 1e-2: it subtracts 1 from a float32 exponential.
  np.testing.assert_allclose(vp_sigma(t)[1:], io["vp_sigma"][1:], rtol=2e-6)
  np.testing.assert_allclose(
    vp_time(jnp.asarray(io["vp_sigma"])), io["vp_sigma_inv"], rtol=1e-5, atol=1e-7
  )


def test_names_of_the_skip_architectures():
  network = EDMPrecond(
    song(channel_mult=(1, 1, 1), encoder_type="skip", decoder_type="skip", label_dim=0)
  )
  params = weights(network)
  state = edm.to_published(params, network)
  aux = {key.removeprefix("model.") for key in state if "aux" in key and "bias" not in key}
  assert aux == {
    *(f"enc.{r}_aux_{k}" for r in ("4x4", "2x2") for k in ("down.resample_filter", "skip.weight")),
    *(f"dec.{r}_aux_{k}.weight" for r in ("8x8", "4x4", "2x2") for k in ("norm", "conv")),
    *(f"dec.{r}_aux_up.resample_filter" for r in ("8x8", "4x4")),
  }
  back = edm.from_published(state, network)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  # Every resolution's image reaches the output.
  apply = jax.jit(
    lambda params: network.apply({"params": params}, jnp.asarray(XT), SIGMA),
    compiler_options=FAST_COMPILE,
  )
  x0 = apply(params)
  for path in ("enc_2x2_aux_skip", "enc_4x4_aux_skip", "dec_2x2_aux_conv", "dec_4x4_aux_conv"):
    cut = {"model": params["model"] | {path: jax.tree.map(jnp.zeros_like, params["model"][path])}}
    assert abs(apply(cut) - x0).max() > 1e-3, path


def test_foreign_weights_are_refused():
  network = EDMPrecond(adm())
  good = edm.to_published(weights(network), network)
  missing = dict(good)
  del missing["model.map_layer0.bias"], missing["model.enc.4x4_down.conv0.resample_filter"]
  missing["foreign.weight"] = np.zeros(1)
  with pytest.raises(UserError) as error:
    edm.from_published(missing, network)
  for name in (*sorted(set(good) - set(missing)), "foreign.weight"):
    assert name in str(error.value)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="missing keys"):
    edm.from_published({}, network)
  with pytest.raises(UserError, match=r"conv1\.weight \(9, 8, 3, 3\) for \(8, 8, 3, 3\)"):
    edm.from_published(
      good | {"model.enc.8x8_block0.conv1.weight": np.zeros((9, 8, 3, 3))}, network
    )
  bad = np.full((1, 1, 2, 2), 0.5, np.float32)
  with pytest.raises(UserError, match=r"denoiser\.resample_filter"):
    edm.from_published(good | {"model.enc.4x4_down.skip.resample_filter": bad}, network)


@pytest.mark.parametrize(
  ("network", "message"),
  [
    (adm(channels_per_head=64), r"denoiser\.channels_per_head=64 must divide the 16 channels"),
    (adm(model_channels=6, channels_per_head=6), r"18 channels.*4 groups"),
    (adm(model_channels=2, channels_per_head=2), r"2 channels.*0 groups"),
    (adm(img_channels=1), r"shape \(8, 8, 1\) does not fit images of shape \(8, 8, 3\)"),
    (song(img_channels=1), r"shape \(8, 8, 1\) does not fit images of shape \(8, 8, 3\)"),
    (mlp(img_channels=1), r"shape \(8, 8, 1\) does not fit images of shape \(8, 8, 3\)"),
    (
      adm(channel_mult=(1,) * 5),
      r"denoiser\.channel_mult has 5 .* 8 pixels .* halved 4 times",
    ),
    (song(embedding_type="fouriers"), r"denoiser\.embedding_type='fouriers'.*mean 'fourier'"),
    (song(encoder_type="none"), r"denoiser\.encoder_type='none'.*residual, skip, standard"),
    (song(decoder_type="residual"), r"denoiser\.decoder_type='residual'.*skip, standard"),
    (song(resample_filter=(1, 2, 1)), r"denoiser\.resample_filter=\(1, 2, 1\).*even"),
  ],
)
def test_impossible_sizes_are_refused(network, message):
  with pytest.raises(UserError, match=message) as error:
    jax.eval_shape(EDMPrecond(network).init, jax.random.key(0), jnp.asarray(XT), SIGMA, CLASS_ID)
  assert "\n" not in str(error.value)
