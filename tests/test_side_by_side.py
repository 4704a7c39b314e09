"""The comparison with the released networks: bad arguments, and iterations around stand-ins."""

import itertools
import multiprocessing
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks import side_by_side

# The interface of the released transformer, and nothing else of it: logits of an embedding.
MASKED = """
import torch
from torch import nn

class MaskTransformer(nn.Module):
  def __init__(self, img_size, hidden_dim, codebook_size, depth, heads, mlp_dim, dropout):
    super().__init__()
    self.tok_emb = nn.Embedding(codebook_size + 1, 8)
    self.pos_emb = nn.Parameter(torch.zeros(8))
    self.bias = nn.Parameter(torch.zeros(codebook_size + 1))
    self.layer = nn.Linear(8, 8)

  def forward(self, tokens, labels, drop_label=None, noise_emb_perturb=0):
    embedded = self.layer(self.tok_emb(tokens.flatten(1)) + self.pos_emb)
    return embedded @ self.tok_emb.weight.T + self.bias
"""
# The same for the released denoiser: an image as it came, times one parameter.
DENOISER = """
import torch
from torch import nn

class EDMPrecond(nn.Module):
  def __init__(self, img_resolution, model_channels, channel_mult, **options):
    super().__init__()
    self.scale = nn.Parameter(torch.ones(()))
    self.width = model_channels * channel_mult[-1]

  def forward(self, images, sigma, labels, return_bottleneck=False):
    if return_bottleneck:
      pooled = nn.functional.avg_pool2d(images, 4).mean(1, keepdim=True)
      return self.scale * pooled.expand(-1, self.width, -1, -1)
    return self.scale * images
"""


def stand_in(folder, package, text, monkeypatch):
  """A clone that holds one module."""
  path = folder.joinpath(*package.split("."))
  path.parent.mkdir(parents=True)
  path.with_suffix(".py").write_text(text)
  monkeypatch.setattr(sys, "path", [*sys.path])  # the iteration puts the clone in front


def moved(iterate, networks):
  """For each network, which of its parameters change in two iterations: in the first the fake score
  still equals the teacher, and nothing is matched.
  """
  before = {
    name: {key: value.detach().clone() for key, value in network.named_parameters()}
    for name, network in networks.items()
  }
  iterate()
  iterate()
  return {
    name: {key for key, value in network.named_parameters() if (value != before[name][key]).any()}
    for name, network in networks.items()
  }


def test_the_released_dimo_iteration_trains_what_is_not_frozen(tmp_path, monkeypatch):
  pytest.importorskip("torch")
  stand_in(tmp_path, "MaskGit_src.Network.transformer", MASKED, monkeypatch)
  trained = {"layer.weight", "layer.bias"}
  changed = moved(*side_by_side.released_dimo(tmp_path))
  assert "layer.weight" in changed.pop("average")  # by so little that smaller ones are rounded off
  assert changed == {"generator": trained, "fake_score": trained, "teacher": set()}


@pytest.mark.parametrize("gan", [True, False])
def test_the_released_dmd2_iteration_trains_generator_fake_score_and_critic(
  gan, tmp_path, monkeypatch
):
  """Without the GAN's weights: by distribution matching and denoising alone."""
  pytest.importorskip("torch")
  stand_in(tmp_path, "third_party.edm.training.networks", DENOISER, monkeypatch)
  config = side_by_side.settings("dmd2")
  for optimizer in (config.optim.generator, config.optim.fake_score):
    optimizer.weight_decay = 0.0  # moves them all
  if not gan:
    config.dmd2.update(gan_generator_weight=0.0, gan_critic_weight=0.0)
  monkeypatch.setattr(side_by_side, "settings", lambda method: config)
  iterate, networks = side_by_side.released_dmd2(tmp_path)
  critic = {key for key, _ in networks["critic"].named_parameters()} if gan else set()
  assert moved(iterate, networks) == {
    "generator": {"scale"},
    "fake_score": {"scale"},
    "critic": critic,
    "teacher": set(),
  }


class Thread(threading.Thread):
  """In place of a process, whose functions could not be replaced."""

  def __init__(self, target, args, daemon):
    super().__init__(target=target, args=args, daemon=daemon)


@pytest.mark.parametrize("size", [7, 8])
def test_sides_take_turns(size, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  turns = []

  def side(name, size):
    generator = torch.nn.Linear(size - 1, 1)
    return lambda: turns.append(name), {"generator": generator}

  def pipe():
    """Its second end is not the thread's own, so that closing it here must not close it there."""
    end, theirs = multiprocessing.Pipe()
    return end, SimpleNamespace(send=theirs.send, recv=theirs.recv, close=lambda: None)

  context = SimpleNamespace(Pipe=pipe, Process=Thread)
  monkeypatch.setattr(side_by_side.multiprocessing, "get_context", lambda kind: context)
  monkeypatch.setattr(side_by_side, "keep_freed_memory", lambda: None)
  monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
  monkeypatch.setattr(side_by_side, "released_dimo", lambda clone: side("released", 7))
  monkeypatch.setattr(side_by_side, "ours", lambda method: (lambda: turns.append("ours"), size))
  monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
  if size == 8:
    with pytest.raises(ValueError, match="differ in their numbers of parameters"):
      side_by_side.take_turns("dimo", tmp_path, 3)
    return
  seconds = side_by_side.take_turns("dimo", tmp_path, 3)
  assert turns == ["released", "ours"] * 5  # two to warm up
  assert seconds == {"released": [1, 1, 1], "ours": [1, 1, 1]}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["dimo", "nowhere"],
      "Network/transformer.py does not exist; give a clone",
    ),
    (["dmd2", "nowhere"], "nowhere/third_party/edm/training does not exist"),
    (["dimo", ".", "--repeats=1"], "--repeats=1 must be at least 2"),
    (["other", "."], "invalid choice"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["side_by_side.py", *arguments])
  with pytest.raises(SystemExit, match="2"):
    side_by_side.main()
  assert message in capsys.readouterr().err
