"""A plan beside hooks: offloading of every kind, casting of weights, and what is refused."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from tiny_attached import STEPS, apart, planned
from tolerances import of_trajectory

import harmonica

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("is_removed_first", [True, False])
@pytest.mark.parametrize("is_applied_first", [True, False])
def test_model_offloading_in_any_order(case, is_applied_first, is_removed_first, device):
    """On the CPU the hooks run, and what they move is there already."""
    without, wanted = planned(case)
    near = 0.0 if device == "cpu" else of_trajectory(STEPS)  # there the same kernels, at one shape
    if is_applied_first:
        harmonica.apply(case.transformer, case.artifact())
    case.pipe.enable_model_cpu_offload(device=device)
    if not is_applied_first:
        harmonica.apply(case.transformer, case.artifact())
    for _ in range(2):
        assert apart(case.run().cpu(), wanted) <= near
        assert case.transformer.device.type == "cpu"
    if is_removed_first:
        harmonica.remove(case.transformer)
        assert apart(case.run().cpu(), without) <= near
        case.pipe.remove_all_hooks()
    else:
        case.pipe.remove_all_hooks()
        assert torch.equal(case.run(), wanted)
        harmonica.remove(case.transformer)
    assert torch.equal(case.run(), without)
    assert not hasattr(case.transformer, "_hf_hook")


def test_offloading_layer_by_layer(dit, pixart):
    """A DiT's weights all lie in layers that the plan calls; a PixArt's blocks have some of their own."""
    without, wanted = planned(dit)
    harmonica.apply(dit.transformer, dit.artifact())
    accelerate.cpu_offload(dit.transformer, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in dit.transformer.parameters()} == {"meta"}
    assert torch.equal(dit.run(), wanted)
    harmonica.remove(dit.transformer)
    with pytest.raises(ValueError, match=r"weights elsewhere \(meta\): apply first, then offload"):
        harmonica.apply(dit.transformer, dit.artifact())
    remove_hook_from_module(dit.transformer, recurse=True)
    assert torch.equal(dit.run(), without)

    harmonica.apply(pixart.transformer, pixart.artifact())
    accelerate.cpu_offload(pixart.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0 has the hook AlignDevicesHook, .*enable_model_cpu_offload"
    ):
        pixart.call(999)


def test_hooks_on_blocks_are_refused(case):
    artifact, block = case.artifact(), case.transformer.transformer_blocks[2]
    handle = block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"transformer_blocks.2 has the hook <lambda>, and a plan does not"):
        harmonica.apply(case.transformer, artifact)
    handle.remove()
    harmonica.apply(case.transformer, artifact)
    case.run()
    apply_group_offloading(case.transformer, torch.device("cpu"), num_blocks_per_group=1)
    with pytest.raises(ValueError, match=r"transformer_blocks.0 has the hook group_offloading"):
        case.run()


def test_what_only_moves_or_converts_weights_is_let_be(dit, pixart):
    for case in (dit, pixart):
        _, wanted = planned(case)
        harmonica.apply(case.transformer, case.artifact())
        case.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)
        # The weights are rounded to float32: 6e-8 each.
        assert apart(case.run(), wanted) < 1e-5


def test_offloading_of_leaves(dit):
    _, wanted = planned(dit)
    harmonica.apply(dit.transformer, dit.artifact())
    apply_group_offloading(dit.transformer, torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(dit.run(), wanted)
