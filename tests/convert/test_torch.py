"""The reader and the writers in `tests/published.py` against torch, where it is installed."""

import collections
import pickle

import numpy as np
import pytest

from dimo_jax.convert import files, pickles
from dimo_jax.types import UserError
from tests import published

torch = pytest.importorskip("torch")


def test_torch_reads_what_the_test_helpers_write(tmp_path):
  w = np.arange(6, dtype=np.float32).reshape(2, 3)
  content = {"state_dict": collections.OrderedDict(a=w, b=np.asfortranarray(2 * w)), "epoch": 3}
  for write in (published.zip_file, published.legacy_file):
    read = torch.load(write(tmp_path / "x", content), weights_only=True)
    assert read["epoch"] == 3
    np.testing.assert_array_equal(read["state_dict"]["a"].numpy(), w)
    np.testing.assert_array_equal(read["state_dict"]["b"].numpy(), 2 * w)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_is_read(tmp_path, zipped):
  tensors = {
    "half": torch.randn(3, 4, dtype=torch.float16),
    "brain": torch.randn(3, 4).to(torch.bfloat16),
    "transposed": torch.randn(3, 4).t(),
    "cut": torch.randn(4, 4)[1:, ::2],
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "whole": torch.arange(4),
    "parameter": torch.nn.Parameter(torch.randn(2)),
  }
  content = {"state_dict": tensors, "epoch": 1, "dtype": torch.float32, "size": torch.Size([1])}
  path = tmp_path / "x"
  torch.save(content, path, _use_new_zipfile_serialization=zipped)
  archive = files.read(path)
  assert archive.layout == ("zip" if zipped else "legacy") and set(archive.tensors) == set(tensors)
  for name, value in tensors.items():
    expected = value.detach().float() if value.is_floating_point() else value
    np.testing.assert_array_equal(archive.tensors[name], expected.numpy(), err_msg=name)


def test_networks_that_torch_pickles_are_read(tmp_path):
  network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  plain = pickle.dumps({"ema": network}, protocol=4)
  (tmp_path / "plain").write_bytes(plain)
  torch.save({"ema": network}, tmp_path / "zip")
  torch.save({"ema": network}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
  expected = network.state_dict()
  for layout in ("plain", "zip", "legacy"):
    archive = files.read(tmp_path / layout)
    assert (archive.layout, set(archive.tensors)) == (layout, set(expected))
    for name, value in expected.items():
      np.testing.assert_array_equal(archive.tensors[name], value.numpy(), err_msg=name)


def test_repeated_elements_and_complex_numbers_are_refused(tmp_path):
  for name, tensor, needle in (
    ("expanded", torch.ones(1).expand(4), "overlaps itself"),
    ("complex", torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
  ):
    torch.save({"w": tensor}, tmp_path / name)
    with pytest.raises(UserError, match=needle):
      pickles.read(tmp_path / name)
