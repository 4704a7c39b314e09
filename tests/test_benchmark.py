"""The benchmark's figures: what is counted, and that the command prints them."""

import contextlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from dimo_jax import benchmark, cli
from tests import commands
from tests.helpers import dimo, transformer


def test_median_leaves_the_warm_up_out(monkeypatch):
  clock = iter(float(second) for second in (0, 100, 200, 203, 203, 204, 204, 206))
  monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
  assert benchmark.median_seconds(lambda: 1, repeats=3) == 2.0


@pytest.mark.parametrize(
  ("options", "counts"),
  [
    ({"teacher_guidance": 1.0}, {"generator": 4, "teacher": 1, "fake_score": 4}),
    ({"teacher_guidance": 2.0}, {"generator": 4, "teacher": 2, "fake_score": 4}),
    ({"fake_guidance": 2.0, "fake_rounds": 3}, {"generator": 6, "teacher": 2, "fake_score": 11}),
    ({"fake_train_guidance": 2.0}, {"generator": 4, "teacher": 2, "fake_score": 7}),
  ],
)
def test_forward_passes_of_an_iteration(options, counts):
  """A gradient costs three forward passes; a round generates once."""
  assert dimo(**options).forward_equivalents == counts


def test_flops_of_a_transformer_are_those_of_its_products():
  """XLA counts every operation of the traced program; at this width products are nearly all."""
  net = transformer(num_tokens=64, hidden_dim=512, mlp_dim=2048, num_layers=2)
  tokens, labels = jnp.zeros((1, 64), jnp.int32), jnp.zeros(1, jnp.int32)
  params = jax.eval_shape(net.init, jax.random.key(0), tokens, labels)
  counted = jax.jit(net.apply).lower(params, tokens, labels).cost_analysis()["flops"]
  assert net.forward_flops == pytest.approx(counted, rel=0.05)


def command(*arguments):
  """(exit code, standard output, standard error) of the command on the smallest config."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  out, err = io.StringIO(), io.StringIO()
  with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
    patch.chdir(commands.ROOT)
    patch.setattr(sys, "argv", ["benchmark", "--config=configs/debug.py", *arguments])
    with (
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      pytest.raises(SystemExit) as raised,
    ):
      cli.run(benchmark.dispatch)
  return raised.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def printed():
  code, out, err = command("--repeats=2", "--peak_sizes=64", "--sampling=8,16")
  assert code == 0, err
  return out


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--repeats=0", "--repeats=0 must be 1 or more"),
    ("--sampling=8,a", "--sampling=8,a must be numbers of 1 or more, such as 1,8,64"),
    ("--sampling=0", "--sampling=0 must be numbers of 1 or more"),
    ("--sampling=9", "--sampling=9 must be a positive multiple"),
    ("--peak_sizes=-1", "--peak_sizes=-1 must be numbers of 1 or more"),
  ],
)
def test_bad_use_has_one_line_before_anything_is_timed(argument, message, monkeypatch):
  monkeypatch.setattr(benchmark, "run", lambda *_: pytest.fail("it was timed"))
  code, out, err = command(argument)
  assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1), err
  assert err.startswith(f"error: {message}")


@pytest.mark.ci
def test_the_command_prints_phases_and_one_json_line(printed):
  *lines, last = printed.strip().splitlines()
  result = json.loads(last)
  assert {"generate", "generator_gradient", "fake_score_gradient", "iteration"} == {
    *result["seconds"]
  }
  assert all(value > 0 for value in result["seconds"].values())
  assert result["share_of_peak"] == pytest.approx(
    sum(result["model_flops"].values())
    / result["seconds"]["iteration"]
    / result["matmul_peak_flops_per_second"]
  )
  assert result["iterations_per_second"] == pytest.approx(1 / result["seconds"]["iteration"])
  assert result["compile_seconds"] > 0 and result["program_bytes"]["arguments"] > 0
  rows = result["sampling"]
  assert [(row["model"], row["steps"], row["batch_size"]) for row in rows] == [
    ("generator", 1, 8),
    ("generator", 1, 16),
    ("teacher", 4, 8),
    ("teacher", 4, 16),
  ]
  for row in rows:
    assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
    assert not row["decoded"]  # its tokenizer is fitted on images
  assert len(lines) >= 5 + len(rows)
