"""Compiling for a TPU that is not here, and reading the compiled program."""

import json
import sys

import jax
import pytest

from configs import debug, imagenet64, imagenet256
from dimo_jax import plan, target
from dimo_jax.sharding import abstract_mesh, bytes_per_device, make_mesh
from dimo_jax.types import UserError
from tests import commands

HLO = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner.1 (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.3 = f32[2]{0} all-reduce(%x), to_apply=%add
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = f32[16,768]{1,0:T(8,128)S(1)} all-reduce(%x), to_apply=%add
  %call = f32[4]{0} fusion(%x), kind=kCustom, calls=%inner.1
  ROOT %w = (s32[]) while(%t), body=%turned, backend_config={"known_trip_count":{"n":"2"}}
}

%turned (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = pred[5]{0} all-to-all(%h), metadata={op_name="all-reduce(x)"}
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %never = f32[9]{0} all-gather(%h)
}

%bounded (p: (s32[], f32[4])) -> pred[] {
  %one = s32[]{:T(128)} constant(99)
  %constant.7.clone = s32[]{:T(128)} constant(24)
  ROOT %lt.2 = pred[]{:T(512)} compare(%counter, %constant.7.clone), direction=LT, metadata={x="y"}
}

%unused (p: f32[4]) -> f32[4] {
  %never.2 = f32[9]{0} all-gather(%h)
}

ENTRY %main (a: f32[8], b: f32[2]) -> f32[] {
  %all-reduce.2 = (f32[8]{0}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), to_apply=%add
  %s = (f32[2,4]{1,0}, f32[16,4]{1,0:T(8,128)}) all-gather-start(%c), dimensions={0}
  %d = f32[16,4]{1,0} all-gather-done(%s)
  %g = ((f32[2], s32[1]), (f32[4], s32[2])) all-gather-start(%c, %e), dimensions={0}
  %r = (f32[6], pred[3]) all-reduce-start(%c, %e), to_apply=%add
  %p = (u32[4]{0}, u32[4]{0}, u32[], u32[]) collective-permute-start(%f)
  %w = (s32[]) while(%q), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"x":1}
  %v = (s32[], f32[4]) while(%q), condition=%cond, body=%turned
  %y = (s32[], f32[4]) while(%q), condition=%bounded, body=%turned
  %n = f8e4m3fn[10]{0} reduce-scatter(%h), to_apply=%add
  %c = f32[4]{0} conditional(%i, %j, %k), branch_computations={%turned, %inner.1}
  ROOT %u = f32[] add(%one, %two)
}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
  in_loops = 3 * 4 * 16 * 768 + (3 + 1) * 4 * 2
  assert target.collectives(HLO) == {
    "all-reduce": {"count": 9, "bytes": in_loops + (4 * 8 + 2 * 6) + (4 * 6 + 3)},
    "all-gather": {"count": 2, "bytes": 4 * 64 + (4 * 4 + 4 * 2)},
    "collective-permute": {"count": 1, "bytes": 16},
    "all-to-all": {"count": 3 * 2 + 2 + 24, "bytes": 32 * 5},
    "reduce-scatter": {"count": 1, "bytes": 10},
  }
  assert (
    target.collectives("ENTRY %main (a: f32[]) -> f32[] {\n ROOT %u = f32[] add(%a, %a)\n}") == {}
  )


def test_without_libtpu_the_line_says_so(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match="--target='v5e:2x2' needs libtpu: pip install libtpu"):
    target.devices("v5e:2x2")


@pytest.mark.parametrize("name", ["cpu:0", "cpu:", "cpu:x", "cpu"])
def test_cpus_are_counted(name):
  with pytest.raises(UserError, match=f"--target='{name}' must be cpu:N, with N of 1 or more"):
    target.devices(name)


@pytest.mark.ci
def test_an_iteration_is_compiled_for_several_cpus(tmp_path):
  out, _ = commands.run(
    tmp_path, tmp_path / "none", "--mode=plan", "--target=cpu:2", "--config.train.batch_size=64"
  )
  result = json.loads(out.splitlines()[-1])
  assert (result["target"], result["devices"]) == ("cpu:2", 2)
  assert set(result["collectives"]) == {"all-reduce"}  # guidance included


@pytest.mark.slow
def test_slices_are_joined_by_data_alone():
  pytest.importorskip("libtpu")
  devices = target.devices("v5e:2x2*2")
  assert {device.slice_index for device in devices} == {0, 1}
  mesh = make_mesh(2, devices)
  assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)
  config = debug.get_config()
  config.mesh.fsdp = 2
  assert target.compile_for(config, "v5e:2x2*2")["devices"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_small_iteration_is_compiled_for_a_tpu(fsdp, capsys):
  pytest.importorskip("libtpu")
  config = debug.get_config()
  config.mesh.fsdp = fsdp
  result = target.compile_for(config, "v5e:2x2")
  assert result["devices"] == 4 and "TPU" in result["device_kind"]
  planner = plan.Planner(config, 4)
  state = planner.memory(planner.layout).state
  assert result["state_bytes"] == sum(state.values())
  compiler = result["compiler"]
  assert compiler["argument_bytes"] > result["state_bytes"]  # a TPU pads, and the batch is one
  assert compiler["temporary_bytes"] > 0
  networks = planner.state.generator.params, planner.state.fake_score.params
  gradients = bytes_per_device(networks, abstract_mesh(4))
  reduced = result["collectives"]["all-reduce"]["bytes"]
  if fsdp == 1:  # both gradients once, and the metrics
    assert gradients < reduced < 1.05 * gradients
    assert "all-gather" not in result["collectives"]
  else:
    assert result["collectives"]["all-gather"]["bytes"] > 0
  assert "by the compiler's own account" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
  ("module", "fields"),
  [
    (imagenet256, {"train.batch_size": 256}),
    (imagenet64, {"train.batch_size": 256, "data.name": "noise"}),
  ],
  ids=["imagenet256", "imagenet64"],
)
def test_the_full_size_is_compiled_for_a_pod(module, fields):
  """One sample on each of 256 chips: what is exchanged is both networks' gradients; with Di[M]O
  nothing else. ADM's are partly summed in bfloat16, in which they are computed, and it has small
  permutations besides.
  """
  pytest.importorskip("libtpu")
  config = module.get_config()
  config.update_from_flattened_dict(fields)
  result = target.compile_for(config, "v5e:16x16")
  planner = plan.Planner(config, 256)
  memory = planner.memory(planner.layout)
  assert result["state_bytes"] == sum(memory.state.values())
  assert result["compiler"]["argument_bytes"] > result["state_bytes"]
  networks = planner.state.generator.params, planner.state.fake_score.params
  rounds = planner.experiment.objective.fake_rounds
  gradients = bytes_per_device((networks[0], [networks[1]] * rounds), abstract_mesh(256))
  reduced = result["collectives"].pop("all-reduce")["bytes"]
  moved = result["collectives"].pop("collective-permute", {"bytes": 0})["bytes"]
  assert not result["collectives"]
  if module is imagenet256:
    assert gradients < reduced < 1.05 * gradients and not moved
  else:
    assert gradients / 2 < reduced < 1.05 * gradients and moved < reduced / 1000


@pytest.mark.slow
def test_an_unknown_topology_is_refused():
  pytest.importorskip("libtpu")
  assert jax.default_backend() == "cpu"
  with pytest.raises(UserError, match="--target='v9:3x3' must be a TPU topology") as error:
    target.devices("v9:3x3")
  assert "\n" not in str(error.value)
