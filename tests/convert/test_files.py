"""The one door for weight files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dimo_jax.convert import files
from dimo_jax.types import UserError
from tests import published
from tests.helpers import GOLDEN, state_dict

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def check_golden(archive, layout, wrapper=""):
  assert (archive.layout, archive.wrapper) == (layout, wrapper)
  expected = state_dict("01_masktransformer")
  assert set(archive.tensors) == set(expected)
  for name, value in expected.items():
    assert archive.tensors.shapes[name] == value.shape
    np.testing.assert_array_equal(archive.tensors[name], value, err_msg=name)


def test_the_published_layouts_hold_the_same_weights():
  check_golden(files.read(GOLDEN / "01_masktransformer.safetensors"), "safetensors")
  trainer = files.read(GOLDEN / "01_masktransformer.pth")
  check_golden(trainer, "zip", "model_state_dict")
  assert trainer.settings == {"iter": 123, "global_epoch": 7}
  check_golden(files.read(GOLDEN / "01_masktransformer_legacy.bin"), "legacy")
  check_golden(files.read(str(GOLDEN / "01_ema_model")), "zip")


def test_a_file_is_known_by_its_content_not_its_name(tmp_path):
  named_otherwise = tmp_path / "weights.safetensors"
  published.zip_file(named_otherwise, {"ema": {"w": W}})
  assert files.read(named_otherwise).layout == "zip"
  save_file({"w": W}, tmp_path / "weights.bin")
  assert files.read(tmp_path / "weights.bin").layout == "safetensors"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_floating_tensors_arrive_as_float32(tmp_path, layout, dtype):
  path, content = tmp_path / "x", {"w": W.astype(dtype), "n": np.array([7])}
  if layout == "zip":
    published.zip_file(path, content)
  else:
    save_file(content, path)
  tensors = files.read(path).tensors
  assert tensors["w"].dtype == np.float32 and tensors["n"].dtype == np.int64
  np.testing.assert_array_equal(tensors["w"], W)
  np.testing.assert_array_equal(tensors["n"], [7])


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "ema_model", "ema"])
def test_wrappers_are_opened(tmp_path, wrapper):
  path = published.zip_file(tmp_path / "x", {"epoch": 3, wrapper: {"state_dict": {"w": W}}})
  archive = files.read(path)
  assert list(archive.tensors) == ["w"] and archive.settings == {"epoch": 3}
  assert archive.wrapper == "state_dict"


def test_the_prefix_of_data_parallelism_is_cut_off(tmp_path):
  content = {"module.a": W, "module.b": 2 * W}
  assert set(files.read(published.zip_file(tmp_path / "x", content)).tensors) == {"a", "b"}
  content = {"module.a": W, "b": 2 * W}
  assert set(files.read(published.zip_file(tmp_path / "y", content)).tensors) == set(content)


def test_tensors_are_the_callers_own_and_read_anew(tmp_path):
  save_file({"w": W}, tmp_path / "s")
  published.zip_file(tmp_path / "z", {"w": W})
  for name in ("s", "z"):
    tensors = files.read(tmp_path / name).tensors
    tensors["w"][:] = 0
    np.testing.assert_array_equal(tensors["w"], W)
    with pytest.raises(KeyError):
      tensors["v"]


def test_a_prefix_selects_tensors(tmp_path):
  content = {"fake_unet.w": W, "fake_unet.v": 2 * W, "real_unet.w": 3 * W}
  tensors = files.read(published.zip_file(tmp_path / "x", content)).tensors.under("fake_unet.")
  assert tensors.shapes == {"w": (2, 3), "v": (2, 3)}
  np.testing.assert_array_equal(tensors["v"], 2 * W)
  assert "fake_unet.w" not in tensors


@pytest.mark.parametrize(
  "name",
  [
    "pytorch_model.bin",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "ema_model/pytorch_model.bin",
  ],
)
def test_folders(tmp_path, name):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  if name.endswith("bin"):
    published.zip_file(path, {"w": W})
  else:
    save_file({"w": W}, path)
  (tmp_path / "config.json").write_text(json.dumps({"heads": 4}))
  archive = files.read(tmp_path)
  np.testing.assert_array_equal(archive.tensors["w"], W)
  assert archive.settings == {"heads": 4} and archive.path == path


def test_weights_in_several_files(tmp_path):
  save_file({"a": W}, tmp_path / "model-1.safetensors")
  save_file({"b": 2 * W}, tmp_path / "model-2.safetensors")
  places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": places}))
  tensors = files.read(tmp_path).tensors
  assert set(tensors) == {"a", "b"}
  np.testing.assert_array_equal(tensors["b"], 2 * W)
  for wrong, needle in (
    (places | {"c": "model-2.safetensors"}, "not in its files: c"),
    (places | {"b": "../model-2.safetensors"}, "outside its folder"),
    ({}, "no weight_map"),
  ):
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(UserError, match=needle):
      files.read(tmp_path)


def test_what_is_no_weight_file_is_refused(tmp_path):
  good = tmp_path / "good.safetensors"
  save_file({"w": W}, good)
  (tmp_path / "cut").write_bytes(good.read_bytes()[:-4])
  (tmp_path / "text").write_text("not a network")
  (tmp_path / "nothing").write_bytes(b"")
  (tmp_path / "folder").mkdir()
  published.zip_file(tmp_path / "numbers", {"epoch": 3})
  for name, needle in (
    ("cut", "not a readable safetensors file"),
    ("text", "no PyTorch file, EDM pickle or safetensors file"),
    ("nothing", "no PyTorch file, EDM pickle or safetensors file"),
    ("folder", "holds no weights, such as teacher.safetensors or model.safetensors"),
    ("numbers", "holds no weights"),
    ("nowhere", "does not exist"),
  ):
    with pytest.raises(UserError) as error:
      files.read(tmp_path / name)
    assert needle in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_a_pickled_network(tmp_path):
  tensors = state_dict("07_edm_vp_song")
  made = {"img_resolution": 16, "label_dim": 10, "channel_mult": [1, 2]}
  path = published.edm_pickle(
    tmp_path / "x.pkl", tensors, precond="VPPrecond", model="SongUNet", **made
  )
  archive = files.read(path)
  assert (archive.layout, archive.wrapper) == ("plain", "ema")
  assert archive.settings["class_name"] == "VPPrecond"
  assert archive.settings["model"] == {"class_name": "SongUNet", "training": False, **made}
  assert set(archive.tensors) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(archive.tensors[name], value, err_msg=name)


def test_the_source_code_in_a_pickled_network_is_not_run(tmp_path):
  canary = tmp_path / "canary"
  source = f"open({str(canary)!r}, 'w').close()"
  path = published.edm_pickle(tmp_path / "x.pkl", {"w": W}, source=source)
  assert source.encode() in path.read_bytes()
  assert set(files.read(path).tensors) == {"w"}
  assert not canary.exists()
