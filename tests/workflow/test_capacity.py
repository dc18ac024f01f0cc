"""Capacity: predictions against what was measured, queueing against simulation, limits, and the command."""

import json
import math

import pytest
from tiny_dit import write_model

from harmonica.integrations.recorded.kinds import BLOCKS, KINDS
from harmonica.training.presets import learned_steps
from harmonica.validation.settings import SettingError
from pipelines.capacity import __main__ as program
from pipelines.capacity.command import CapacityCommand, estimate
from pipelines.capacity.gpus import gpu_named
from pipelines.capacity.latency import TRAINING, forward_seconds, sampling_seconds
from pipelines.capacity.models import sized_model
from pipelines.capacity.queueing import erlang_c, replicas_for, simulate, wait_quantile
from pipelines.capacity.sizes import Size
from pipelines.capacity.training import reduce_seconds, ring_bytes
from pipelines.config.serve import ServeConfig
from pipelines.config.workflow import TrainConfig

H100 = gpu_named("H100")
SAMPLING = [  # one H100, bfloat16, random weights, CUDA events, medians of 5: milliseconds of a trajectory
    ("dit-xl-2", 256, 1, 20, "graphed", 1.0, 52.4),
    ("dit-xl-2", 256, 8, 20, "graphed", 1.0, 184.5),
    ("dit-xl-2", 256, 1, 20, "graphed", 2.0, 24.0),
    ("dit-xl-2", 256, 8, 20, "graphed", 2.0, 102.2),
    ("dit-xl-2", 256, 1, 20, "graphed", 1.59, 34.8),
    ("dit-xl-2", 256, 8, 20, "graphed", 1.59, 122.0),
    ("dit-xl-2", 256, 1, 20, "eager", 1.0, 224.0),
    ("dit-xl-2", 256, 8, 20, "eager", 1.0, 328.0),
    ("pixart-sigma", 1024, 1, 20, "eager", 1.0, 984.0),
    ("pixart-sigma", 1024, 1, 20, "eager", 1.93, 582.0),
    ("pixart-sigma", 2048, 1, 8, "eager", 1.0, 2711.0),
    ("pixart-sigma", 2048, 1, 8, "eager", 2.06, 1437.0),
]


@pytest.mark.parametrize(("name", "side", "images", "steps", "execution", "speedup", "measured_ms"), SAMPLING)
def test_sampling_takes_what_was_measured(name, side, images, steps, execution, speedup, measured_ms):
    model = sized_model(name, Size(height=side, width=side))
    seconds = sampling_seconds(model, H100, images, steps, execution=execution, speedup=speedup)
    assert 1 / 1.2 < 1e3 * seconds / measured_ms < 1.2


@pytest.mark.parametrize(("rows", "measured_ms"), [(16, 303.0), (64, 761.0)])
def test_training_takes_what_was_measured(rows, measured_ms):
    """T = 4: three updates of three forwards each, and the first step."""
    model = sized_model("dit-xl-2", Size())
    seconds = (3 * 3 + 1) * forward_seconds(model, H100, rows, TRAINING)
    assert 1 / 1.2 < 1e3 * seconds / measured_ms < 1.2


def test_macs_are_those_that_are_published():
    """DiT-XL/2: 118.6 GMACs; FLUX.1-dev: cache-dit counts 3,726.87 TFLOPs of 50 steps at 1024."""
    assert sized_model("dit-xl-2", Size()).macs.full / 1e9 == pytest.approx(118.6, rel=0.01)
    flux = sized_model("flux", Size())
    assert 2 * 50 * flux.macs.full / 1e12 == pytest.approx(3726.87, rel=0.01)
    assert flux.num_branches == 1 and flux.weight_bytes / 2 == pytest.approx(11.9e9, rel=0.01)
    by_modules = sized_model("flux", Size(), KINDS)
    assert by_modules.num_branches == flux.sub_layers == 19 * 3 + 38
    assert by_modules.macs.full == flux.macs.full and by_modules.weight_bytes == flux.weight_bytes


def test_all_blocks_as_one_branch_take_less_memory():
    """Learned steps for FLUX.1-dev at 1024 fit on 80 GB."""
    train = TrainConfig.of(learned_steps(target_speedup=2.0))
    blocks, modules = (
        estimate(CapacityCommand(model="flux", cacheable=cacheable, train=train))
        for cacheable in ((BLOCKS,), KINDS)
    )
    assert blocks.training.fits and not modules.training.fits
    assert 1.9 < blocks.speedup < 2.1
    caches = [each.serving[1].memory.caches / each.serving[1].batch for each in (blocks, modules)]
    assert caches[0] < caches[1] / 20
    with pytest.raises(SettingError, match=r"^cacheable is \('attn',\): leave it out for this model"):
        sized_model("dit-xl-2", Size(), ("attn",))


def test_erlang_c_has_the_known_values():
    """One server waits with probability rho; two at load 1 with 1/3."""
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(50, 10.0) < 1e-12


def test_replicas_are_the_fewest_that_keep_to_the_target():
    rate, batch, seconds, target, quantile = 40.0, 4, 1.0, 1.5, 0.95
    count = replicas_for(rate, batch, seconds, target, quantile)
    assert rate / batch * seconds < count
    assert seconds + wait_quantile(count, rate, batch, seconds, quantile) <= target
    if count - 1 > rate / batch * seconds:
        assert seconds + wait_quantile(count - 1, rate, batch, seconds, quantile) > target
    with pytest.raises(ValueError, match="takes 2 s"):
        replicas_for(rate, batch, 2.0, target, quantile)


def test_the_simulation_agrees_with_the_formula_for_one_replica():
    """M/D/1, where Allen and Cunneen's mean is exact: the tail of the two differs little."""
    rate, seconds = 0.7, 1.0
    expected = seconds + wait_quantile(1, rate, 1, seconds, 0.95)
    assert simulate(1, rate, 1, lambda _: seconds, 0.95) == pytest.approx(expected, rel=0.15)


def test_batches_carry_more_than_single_images_can():
    """At three times the rate of single images, batches of 8 that take 1.5 times as long keep up."""
    latency = simulate(1, 3.0, 8, lambda size: 1 + size / 14, 0.95)
    assert latency < 2 * (1 + 8 / 14)


def test_an_all_reduce_of_a_row_is_latency():
    assert reduce_seconds(1, 224, 1e9) == 0 and ring_bytes(1, 224) == 0
    assert ring_bytes(4, 224) == 1.5 * 224
    assert reduce_seconds(8, 224, 12.5e9) == pytest.approx(2 * 3 * 20e-6, rel=0.01)


def test_training_is_shared_among_workers_and_costs_what_the_phases_say():
    one, eight = (
        estimate(CapacityCommand(train=TrainConfig(num_workers=workers, batch_size=64, target_speedup=1.5)))
        for workers in (1, 8)
    )
    speed = one.training.seconds / eight.training.seconds
    assert 4 < speed < 8  # launches do not shrink with the rows
    assert [phase.name for phase in one.training.phases] == ["router"]
    assert one.training.phases[0].network_s == 0 < eight.training.phases[0].network_s
    assert one.training.memory.total > eight.training.memory.total


def test_a_plan_needs_fewer_replicas_and_costs_less():
    found = estimate(CapacityCommand(model="pixart-sigma", gpu_price=2.0))
    uncached, planned = found.serving
    assert planned.replicas < uncached.replicas
    assert uncached.memory.caches < planned.memory.caches / 10
    assert planned.cost_per_1000 == pytest.approx(planned.replicas * 2.0 / (10 * 3600) * 1000)
    for each in found.serving:
        assert each.latency_s <= found.target_s and 0 < each.utilisation < 1
        assert each.replicas >= each.replicas_by_formula


def test_limits_bind_where_their_load_passes_them():
    found = estimate(CapacityCommand())
    places = [limit.binds_at or math.inf for limit in found.limits]
    assert places == sorted(places)
    for limit in found.limits:
        if limit.binds_at:
            assert limit.load(limit.binds_at) > limit.capacity
            assert limit.binds_at == 1 or limit.load(limit.binds_at - 1) <= limit.capacity
    by_name = {limit.name: limit for limit in found.limits}
    assert by_name["workers that share a batch"].binds_at == 1  # 4 samples, 8 GPUs a node
    assert by_name["nodes of Ray's release test many_nodes"].binds_at == 251


def test_more_api_replicas_move_their_limit():
    one, many = (estimate(CapacityCommand(serve=ServeConfig(api_replicas=count))) for count in (1, 20))
    name = "requests that `Api` holds, two batches a replica"
    places = [next(each.binds_at for each in found.limits if each.name == name) for found in (one, many)]
    assert places[0] is not None and places[1] is not None and places[1] > 10 * places[0]


def test_a_model_folder_is_sized(tmp_path):
    model = write_model(tmp_path / "model")
    found = sized_model(model.path, Size())
    assert found.num_branches > 0 and found.macs.full > 0


def test_the_command_prints_tables_or_json(capsys):
    assert program.main(["--gpu-price", "2", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["model"]["branches"] == 56 and numbers["training"]["cost"] > 0
    assert numbers["limits"][0]["binds_at"] >= 1 and set(numbers["limits"][0]["load"]) == {
        "10",
        "100",
        "1000",
    }
    assert program.main(["--gpu-price", "2"]) == 0
    said = capsys.readouterr().out
    assert "Router training" in said and "What breaks first" in said and "At 1,000 nodes" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nothing"], "model is 'nothing': give one of dit-xl-2"),
        (["--gpu", "H42"], "gpu is 'H42': give one of"),
        (["--height", "250", "--width", "250"], "image_size is 250: give a multiple of 16"),
        (["--height", "512"], "width is 256: give that of height (512)"),
        (["--model", "wan-14b", "--frames", "80"], "frames is 80: give a multiple of 4 and one more"),
        (["--model", "flux", "--height", "1000"], "height is 1000: give a multiple of 16"),
        (["--num-inference-steps", "1"], "num_inference_steps is 1: give 2 or more"),
        (["--train.target-speedup", "30"], "train.target_speedup is 30.0: 20 steps"),
        (["--train.num-workers", "3"], "train.batch_size is 4: give a multiple of"),
        (["--serve.latency-target-s", "0.03"], "serve.latency_target_s is 0.03: give"),
        (["--images-per-s", "0"], "images_per_s is 0.0: give"),
    ],
)
def test_unusable_settings_are_one_error(arguments, words, capsys):
    assert program.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_a_width_of_another_shape_is_refused():
    with pytest.raises(SettingError, match="frames is 9"):
        sized_model("dit-xl-2", Size(frames=9))
