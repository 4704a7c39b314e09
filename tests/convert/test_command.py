"""`python -m dimo_jax.convert`, and published files as `teacher.path`."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from dimo_jax import artifacts, prepare
from dimo_jax.build import build
from dimo_jax.convert import __main__ as command
from dimo_jax.convert import edm, files, maskgit
from dimo_jax.prepare import load_teacher, recipe, save_teacher
from dimo_jax.types import UserError
from tests import published
from tests.commands import ROOT
from tests.helpers import GOLDEN, state_dict

RELEASE = GOLDEN / "07_dmd2_release"
# Bytes that a conversion may take beyond those it began with, over the bytes of the parameters.
MAX_MEMORY = 1.5
MEASURE = """
import re, sys
from dimo_jax.convert import __main__ as command
import dimo_jax.artifacts, dimo_jax.convert.maskgit, jax, numpy
def kilobytes(name):
  return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
assert command.main(sys.argv[1:]) == 0
print("peak", kilobytes("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def masked():
  """The recorded MaskGIT's experiment, its path to be set."""
  config = base.get_config()
  config.teacher.path = "set"
  config.data.num_classes = 10
  config.tokenizer.update(grid_size=4, codebook_size=32)
  config.model.update(hidden_dim=64, num_layers=3, num_heads=4, mlp_dim=128)
  config.train.batch_size = 8
  return build(config)


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
  """The recorded ADM's experiment."""
  path = tmp_path_factory.mktemp("data") / "images.npz"
  arrays = {}
  for split in ("train", "test"):
    arrays |= {f"images_{split}": np.zeros((10, 16, 16, 3), np.uint8)}
    arrays |= {f"labels_{split}": np.arange(10)}
  np.savez(path, **arrays)
  config = base.get_config()
  config.objective = "dmd2"
  config.data.update(name="arrays", path=str(path), num_classes=10)
  config.tokenizer.name = "pixels"
  config.teacher.update(name="edm", path="set")
  config.denoiser.update(model_channels=32, channel_mult=(1, 2), num_blocks=1)
  config.denoiser.attn_resolutions = (8,)
  config.optim.frozen = ()
  config.train.batch_size = 8
  return build(config)


def same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_masked_networks_become_teachers(tmp_path, capsys, masked):
  expected = maskgit.from_published(state_dict("01_masktransformer"), scan_layers=True)
  for name, part in (
    ("01_masktransformer.pth", "teacher"),
    ("01_masktransformer_legacy.bin", "generator"),
    ("01_ema_model", "generator"),
  ):
    out = tmp_path / name
    assert command.main([f"--source={GOLDEN / name}", f"--out={out}"]) == 0
    assert f"{part}.safetensors" in capsys.readouterr().out
    if part == "teacher":
      network, _ = load_teacher(masked, str(GOLDEN / name))
      same(network, expected)
      network, tokenizer = load_teacher(masked, out)
      same(network, expected)
      assert not tokenizer
    for path in (GOLDEN / name, out / "generator.safetensors") if part == "generator" else ():
      with pytest.raises(UserError, match=r"teacher\.path=.*a student, and a teacher is wanted"):
        load_teacher(masked, path)
    record = json.loads((out / "conversion.json").read_text())
    assert record["sizes"]["model.num_layers"] == 3
    assert record["files"] == [f"{part}.safetensors"] and len(record["source_sha256"]) == 64
    assert sorted(path.name for path in out.iterdir()) == ["conversion.json", *record["files"]]


def test_who_says_that_it_is_no_student_is_believed(tmp_path, capsys, masked):
  source = GOLDEN / "01_ema_model"
  with pytest.raises(UserError, match=r"python -m dimo_jax.convert --family=maskgit makes a teach"):
    load_teacher(masked, source)
  assert command.main([f"--source={source}", "--family=maskgit", f"--out={tmp_path}"]) == 0
  expected = maskgit.from_published(state_dict("01_masktransformer"), scan_layers=True)
  same(load_teacher(masked, tmp_path)[0], expected)
  capsys.readouterr()


def test_denoisers_become_teachers(tmp_path, capsys, continuous):
  tensors, network = state_dict("07_edm_dhariwal"), continuous.teacher.network
  expected = edm.from_published(tensors, network)
  pickled = published.edm_pickle(tmp_path / "edm.pkl", tensors, img_resolution=16)
  for source in (pickled, RELEASE / "pytorch_model_1.bin"):
    same(load_teacher(continuous, source)[0], expected)
    out = tmp_path / "out" / source.name
    assert command.main([f"--source={source}", f"--out={out}"]) == 0
    same(load_teacher(continuous, out)[0], expected)
  assert sorted(path.name for path in out.iterdir()) == [
    "conversion.json",
    "critic.safetensors",
    "fake_score.safetensors",
    "teacher.safetensors",
  ]
  with pytest.raises(UserError, match=r"a generator of DMD2: a student, and .* --family=edm makes"):
    load_teacher(continuous, RELEASE)
  head = load_file(out / "critic.safetensors")
  assert head["conv_0/kernel"].shape == (4, 4, 64, 64)
  capsys.readouterr()


def test_a_pickled_process_is_compared(tmp_path, continuous):
  path = published.edm_pickle(
    tmp_path / "x.pkl", state_dict("07_edm_dhariwal"), sigma_data=0.7, img_resolution=16
  )
  with pytest.raises(UserError, match=r"process\.sigma_data=0\.7, the config 0\.5"):
    load_teacher(continuous, path)


def test_unfitting_teachers_are_refused_in_one_line(tmp_path, masked, continuous):
  save_file({"codebook": np.zeros((4, 4), np.float32)}, tmp_path / "foreign")
  small = {k: v for k, v in state_dict("01_masktransformer").items() if "layers.2" not in k}
  save_file(small, tmp_path / "small")
  for experiment, path, needle in (
    (masked, RELEASE, "is a generator of DMD2, and teacher.name='maskgit' needs a"),
    (continuous, GOLDEN / "01_ema_model", "is a generator of Di[M]O, and teacher.name='edm' needs"),
    (
      continuous,
      GOLDEN / "07_edm_vp_song.safetensors",
      "the file has denoiser.name=song, the config adm",
    ),
    (masked, tmp_path / "foreign", "of no known family"),
    (masked, tmp_path / "small", "the file has model.num_layers=2, the config 3"),
    (masked, tmp_path / "nowhere", "does not exist"),
    (masked, "hf://owner/repo", "it is not in the cache"),
  ):
    with pytest.raises(UserError) as error:
      load_teacher(experiment, path)
    assert needle in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_our_own_teachers_say_what_shapes_do_not(tmp_path, masked, continuous):
  for experiment, tensors, name, value in (
    (masked, maskgit.from_published(state_dict("01_masktransformer")), "model.num_heads", 2),
    (continuous, prepare.random_teacher(continuous), "denoiser.channels_per_head", 32),
  ):
    fields = {"teacher.name": experiment.config.teacher.name, name: value}
    save_teacher(tmp_path / "teacher.safetensors", tensors, {}, fields, recipe(experiment))
    with pytest.raises(UserError, match=rf"was trained with {name}={value}, and the config says"):
      load_teacher(experiment, tmp_path)


def test_our_own_teachers_fit_whether_their_blocks_are_stacked_or_not(tmp_path, masked):
  tensors = state_dict("01_masktransformer")
  expected = maskgit.from_published(tensors, scan_layers=True)
  for scan_layers in (False, True):
    network = maskgit.from_published(tensors, scan_layers=scan_layers)
    fields = {"teacher.name": "maskgit"}
    save_teacher(tmp_path / "teacher.safetensors", network, {}, fields, recipe(masked))
    same(load_teacher(masked, tmp_path)[0], expected)


def test_a_failure_leaves_what_was_there(tmp_path, capsys, monkeypatch):
  out = tmp_path / "out"
  source = f"--source={RELEASE / 'pytorch_model_1.bin'}"
  assert command.main([source, f"--out={out}"]) == 0
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  assert command.main([f"--source={GOLDEN / '01_ema_model'}", "--family=edm", f"--out={out}"]) == 2
  written = []

  def full(path, *arguments):
    written.append(path)
    if len(written) == 2:
      raise OSError(28, "No space left on device")
    save(path, *arguments)

  save = command.save_params
  monkeypatch.setattr(command, "save_params", full)
  changed = {k: 2 * v for k, v in files.read(RELEASE / "pytorch_model_1.bin").tensors.items()}
  for key, value in changed.items():
    if key.endswith("resample_filter"):
      changed[key] = value / 2
  other = published.zip_file(tmp_path / "other.bin", changed)
  assert command.main([f"--source={other}", f"--out={out}"]) == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 2 and all(line.startswith("error: ") for line in err)
  assert "looks like 'dimo'" in err[0] and "No space left on device" in err[1]
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_file_in_the_way_is_named(tmp_path, capsys):
  (tmp_path / "out").write_text("")
  arguments = [f"--source={GOLDEN / '01_ema_model'}", f"--out={tmp_path / 'out'}"]
  assert command.main(arguments) == 2
  assert "cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.ci
def test_as_a_command():
  arguments = [sys.executable, "-m", "dimo_jax.convert", "--source=nowhere", "--out=out"]
  result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == "error: nowhere does not exist\n"


def _export(path, tensors):
  """A folder of --format=torch that holds the weights."""
  fields = {"model.num_heads": 8, "tokenizer.codebook_size": 32, "data.num_classes": 10}
  recipe = artifacts.load(path, family="dimo", fields=fields).parts.recipe
  folder = path.with_name("export")
  (folder / "ema_model").mkdir(parents=True)
  save_file(tensors, folder / artifacts.TORCH_FILES["masked"])
  manifest = {"format": "torch", "role": "generator", "clock": 0, "recipe": recipe.to_dict()}
  (folder / files.MANIFEST).write_text(json.dumps(manifest))
  return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors", "export"])
def test_a_conversion_holds_its_parameters_once(tmp_path, layout):
  d = 512
  num_layers = 16 if layout == "export" else 7  # loading an export also traces its network, 40 MB
  rng = np.random.default_rng(0)
  shapes = {name: value.shape for name, value in state_dict("01_masktransformer").items()}
  sizes = {64: d, 192: 3 * d, 128: 4 * d}
  tensors = {}
  for name, small in shapes.items():
    if "layers.0" in name or "layers" not in name:
      shape = tuple(sizes.get(n, n) for n in small)
      for i in range(num_layers if "layers" in name else 1):
        tensors[name.replace("layers.0", f"layers.{i}")] = rng.standard_normal(shape, np.float32)
  path, num_bytes = tmp_path / "weights", sum(value.nbytes for value in tensors.values())
  assert num_bytes > 80e6
  if layout in ("safetensors", "export"):
    save_file(tensors, path)
  else:
    {"zip": published.zip_file, "legacy": published.legacy_file}[layout](path, tensors)
  if layout == "export":
    path = _export(path, tensors)
  arguments = [sys.executable, "-c", MEASURE, f"--source={path}", f"--out={tmp_path / 'out'}"]
  result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
  peak = 1024 * int(result.stdout.split()[-1]) / num_bytes
  assert peak < MAX_MEMORY, f"{peak:.2f} times the parameters"
