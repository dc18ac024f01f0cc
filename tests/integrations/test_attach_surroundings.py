"""A plan together with what else is done to a pipeline's transformer: compiling, offloading, adapters."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_group_offloading,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from execution_cases import graphs
from tiny_attached import STEPS, Case, apart, config, make_case
from tolerances import of_pass, of_trajectory
from torch import Tensor, nn

import harmonica
from harmonica.samplers import make_sampler


@pytest.fixture(params=["dit", "sigma"])
def case(request, tmp_path) -> Case:
    return make_case(request.param, tmp_path)


@pytest.fixture
def dit(tmp_path) -> Case:
    return make_case("dit", tmp_path)


@pytest.fixture
def pixart(tmp_path) -> Case:
    return make_case("sigma", tmp_path)


def planned(case: Case, **artifact) -> tuple[Tensor, Tensor]:
    """Latents without and with a plan that is taken off again."""
    without = case.run()
    harmonica.apply(case.transformer, case.artifact(**artifact))
    latents = case.run()
    harmonica.remove(case.transformer)
    assert not torch.equal(without, latents)
    return without, latents


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reuse", "has_segments", "is_compiled_first"),
    [("dit", "hold", False, True), ("sigma", "forecast", False, False), ("dit", "forecast", True, False)],
)
def test_a_compiled_transformer_makes_the_same_latents(
    kind, reuse, has_segments, is_compiled_first, tmp_path
):
    """In whole graphs, one for each distinct row or forecast, none compiled again."""
    case, graphs = make_case(kind, tmp_path), []
    how = {"reuse": reuse, "is_corrected": reuse == "forecast", "has_segments": has_segments}
    artifact, transformer = case.artifact(**how), case.transformer
    if not has_segments:
        artifact.logits_TB[1] = artifact.logits_TB[0]
    distinct = STEPS - 1 if reuse == "hold" else STEPS
    without = case.run()
    harmonica.apply(transformer, artifact)
    wanted = [case.run(seed=seed) for seed in (1, 2)]
    harmonica.remove(transformer)

    def backend(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch.compiler.reset()
    # A second graph of one step would be an error.
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        if is_compiled_first:
            case.pipe.transformer = torch.compile(transformer, backend=backend, fullgraph=True)
            harmonica.apply(case.transformer, artifact)
        else:
            harmonica.apply(transformer, artifact)
            case.pipe.transformer = torch.compile(transformer, backend=backend, fullgraph=True)
        for seed, latents in zip((1, 2, 1), wanted + wanted[:1]):
            assert apart(case.run(seed=seed), latents) < of_trajectory(STEPS)
        assert len(graphs) == distinct
    harmonica.remove(case.transformer)
    case.pipe.transformer = transformer
    assert torch.equal(case.run(), without)


@pytest.mark.parametrize(
    ("kind", "reuse", "has_segments"),
    [("dit", "hold", False), ("sigma", "forecast", False), ("dit", "forecast", True)],
)
def test_compiled_branches_make_the_same_latents(kind, reuse, has_segments, tmp_path, no_codegen):
    """With a graph for each kind of branch, not for each row of the plan, and a few for what is reused."""
    case = make_case(kind, tmp_path)
    how = {"reuse": reuse, "is_corrected": reuse == "forecast", "has_segments": has_segments}
    artifact = case.artifact(**how)
    latents = {}
    for execution in ("eager", "compiled"):
        harmonica.apply(case.transformer, artifact, execution=execution)
        latents[execution] = [case.run(seed=seed) for seed in (1, 2)]
        harmonica.remove(case.transformer)
    for ours, wanted in zip(latents["compiled"], latents["eager"]):
        assert apart(ours, wanted) < of_trajectory(STEPS)
    assert 0 < graphs() <= 3 + 7


def test_another_execution_is_refused(case):
    with pytest.raises(ValueError, match="execution is 'graphed': give one of auto, eager, compiled"):
        harmonica.apply(case.transformer, case.artifact(), execution="graphed")


# Offloading


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


def test_a_forward_that_something_wraps_is_left_alone(dit):
    transformer = dit.transformer
    own = transformer.forward
    transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=r"transformer.forward is not the class's own, something wraps it"):
        harmonica.apply(transformer, dit.artifact())
    del transformer.forward
    harmonica.apply(transformer, dit.artifact())
    plan = transformer.forward
    transformer.forward = lambda *args, **kwargs: plan(*args, **kwargs)
    with pytest.raises(ValueError, match=r"transformer.forward is not the plan's, something wraps it"):
        harmonica.remove(transformer)


# Adapters


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it; PEFT itself is not installed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)}).double()
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)}).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapt(case: Case) -> None:
    for block in case.transformer.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            if attention is not None:
                attention.to_k, attention.to_out[0] = Adapted(attention.to_k), Adapted(attention.to_out[0])
        block.ff.net[2] = Adapted(block.ff.net[2])


@pytest.mark.parametrize("is_applied_first", [True, False])
def test_adapters_are_followed_and_are_not_part_of_the_model(case, is_applied_first):
    artifact, plain = case.artifact(), case.call(999)
    if is_applied_first:
        harmonica.apply(case.transformer, artifact)
    adapt(case)
    if not is_applied_first:
        harmonica.apply(case.transformer, artifact)
    adapted = case.call(999)
    harmonica.remove(case.transformer)
    assert apart(adapted, case.call(999)) < of_pass(torch.float64)
    assert apart(adapted, plain) > 1e-3


def test_adapters_that_would_make_a_dits_embedders_differ_are_refused(dit):
    harmonica.apply(dit.transformer, dit.artifact())
    embedder = dit.transformer.transformer_blocks[1].norm1.emb.timestep_embedder
    embedder.linear_1 = Adapted(embedder.linear_1)
    with pytest.raises(ValueError, match=r"blocks.1.norm1.emb.timestep_embedder.linear_1 has an adapter"):
        dit.run()


# How it is called


def test_a_call_takes_and_gives_what_the_transformers_own_does(case):
    times = make_sampler(case.model, config()).timesteps
    plain, near = case.call(times[-1]), of_pass(torch.float64)
    harmonica.apply(case.transformer, case.artifact())
    given = {"cross_attention_kwargs": {"scale": 0.5}, "return_dict": True}
    output = case.transformer(case.noise, timestep=torch.tensor(times[-1]), **case.one_call, **given)
    assert type(output).__name__ == "Transformer2DModelOutput" and apart(output.sample, plain) < near
    (output,) = case.transformer(
        case.noise, timestep=torch.full((2,), times[-1]), **case.one_call, return_dict=False
    )
    assert apart(output, plain) < near
    assert apart(case.call(times[-1], cross_attention_kwargs={}), plain) < near
    with pytest.raises(ValueError, match=r"cross_attention_kwargs has ip_mask: under a plan attention proc"):
        case.call(times[-1], cross_attention_kwargs={"ip_mask": 1})


def test_prompts_may_change_within_a_trajectory(pixart):
    """Keys and values of the text are kept for the very tensors that they were made of."""
    times, artifact = make_sampler(pixart.model, config()).timesteps, pixart.artifact()
    text = pixart.one_call["encoder_hidden_states"] = pixart.one_call["encoder_hidden_states"].clone()
    outputs = []
    for change in (lambda: text, lambda: text.flip(0), lambda: text.mul_(2)):
        harmonica.apply(pixart.transformer, artifact)
        pixart.call(times[-1])
        outputs.append(pixart.call(times[-2], encoder_hidden_states=change()))
        harmonica.remove(pixart.transformer)
    assert len({output.sum().item() for output in outputs}) == 3
    with torch.inference_mode():
        harmonica.apply(pixart.transformer, artifact)
        assert apart(pixart.run(), pixart.ours(artifact)) < of_trajectory(STEPS)


def test_masks_of_a_pixart(pixart):
    arguments, mask = pixart.one_call, pixart.one_call["encoder_attention_mask"]
    unmasked = pixart.call(999, encoder_attention_mask=None)
    harmonica.apply(pixart.transformer, pixart.artifact())
    assert apart(pixart.call(999, encoder_attention_mask=None), unmasked) < of_pass(torch.float64)
    with pytest.raises(ValueError, match=r"encoder_attention_mask has shape \(2, 1, 7\): .* give the mask"):
        pixart.call(999, encoder_attention_mask=(1.0 - mask[:, None]) * -10000)
    with pytest.raises(ValueError, match=r"attention_mask is given: under a plan all image tokens see all"):
        pixart.call(999, attention_mask=torch.ones(2, 16))
    assert set(arguments) == {"encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"}


def test_attention_processors_of_a_pixart(pixart):
    class Custom(AttnProcessor2_0):
        pass

    artifact, (_, wanted) = pixart.artifact(), planned(pixart)
    near = of_pass(torch.float64, 2 * STEPS)
    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        pixart.transformer.set_attn_processor(processor)
        harmonica.apply(pixart.transformer, artifact)
        assert apart(pixart.run(), wanted) < near
        harmonica.remove(pixart.transformer)
    harmonica.apply(pixart.transformer, artifact)
    pixart.transformer.transformer_blocks[1].attn1.set_processor(Custom())  # that one is called
    assert apart(pixart.run(), wanted) < near
    pixart.transformer.transformer_blocks[1].attn2.set_processor(Custom())
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn2 has the attention processor Custom"):
        pixart.run()


# Weights in another form


def fuse(transformer: nn.Module) -> None:
    """`fuse_qkv_projections`, which a DiT's class does not have."""
    with torch.no_grad():
        for module in transformer.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())


@pytest.mark.parametrize("is_applied_first", [True, False])
def test_fused_projections_are_the_same_weights(case, is_applied_first):
    (_, wanted), artifact = planned(case), case.artifact()
    if is_applied_first:
        harmonica.apply(case.transformer, artifact)
    fuse(case.transformer)
    if not is_applied_first:
        harmonica.apply(case.transformer, artifact)
    assert apart(case.run(), wanted) < 1e-12
    assert case.transformer.transformer_blocks[0].attn1.fused_projections


def test_pixarts_own_way_to_fuse_and_back(pixart):
    (_, wanted), artifact = planned(pixart), pixart.artifact()
    with torch.no_grad():
        pixart.transformer.fuse_qkv_projections()
    pixart.transformer.unfuse_qkv_projections()  # which leaves the copies
    harmonica.apply(pixart.transformer, artifact)
    assert apart(pixart.run(), wanted) < 1e-12


def test_an_adapter_fused_into_the_weights_asks_for_check_weights(case):
    artifact = case.artifact()
    adapt(case)
    for module in list(case.transformer.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Adapted):
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                layer.base_layer.weight.data += up @ down
                setattr(module, name, layer.base_layer)
    wanted = case.call(999)
    with pytest.raises(ValueError, match=r"adapter \(LoRA\) fused into them, apply with check_weights=False"):
        harmonica.apply(case.transformer, artifact)
    harmonica.apply(case.transformer, artifact, check_weights=False)
    assert apart(case.call(999), wanted) < 1e-12
    assert case.run().isfinite().all()


# Other caches

CACHES = {
    "pyramid_attention_broadcast": lambda transformer: apply_pyramid_attention_broadcast(
        transformer,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "faster_cache_denoiser": lambda transformer: apply_faster_cache(
        transformer,
        FasterCacheConfig(
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks",),
            is_guidance_distilled=True,
        ),
    ),
    "fbc_leader_block_hook": lambda transformer: apply_first_block_cache(
        transformer, FirstBlockCacheConfig(threshold=0.1)
    ),
    "layer_skip_hook": lambda transformer: apply_layer_skip(
        transformer, LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    ),
}


@pytest.mark.parametrize("is_applied_first", [True, False])
@pytest.mark.parametrize("hook", CACHES)
def test_diffusers_own_caches_are_refused(case, hook, is_applied_first):
    artifact, put_on = case.artifact(), CACHES[hook]
    if is_applied_first:
        harmonica.apply(case.transformer, artifact)
        put_on(case.transformer)
    with pytest.raises(ValueError, match=rf"has the hook {hook}, .*: use that or a plan, not both. Take it"):
        if is_applied_first:
            case.run()
        else:
            put_on(case.transformer)
            harmonica.apply(case.transformer, artifact)


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


def test_blocks_that_another_cache_replaces_are_refused_and_put_back(case):
    """As cache-dit does it: its forward puts other blocks in, and it binds the old one when it goes."""
    _, wanted = planned(case)
    transformer = case.transformer
    harmonica.apply(transformer, case.artifact())
    own, blocks = transformer.forward, transformer.transformer_blocks

    def forward(*args, **kwargs):
        transformer.transformer_blocks = nn.ModuleList([blocks])
        try:
            return own(*args, **kwargs)
        finally:
            transformer.transformer_blocks = blocks

    transformer.forward = forward
    with pytest.raises(
        ValueError, match=r"transformer_blocks are not those that the plan was put on: .*cach"
    ):
        case.run()
    transformer.forward = own.__get__(transformer)
    assert torch.equal(case.run(), wanted)
    harmonica.remove(transformer)


def test_a_forward_that_replaces_the_plans_is_not_passed_over_in_silence(case, caplog):
    without, wanted = planned(case)
    harmonica.apply(case.transformer, case.artifact())
    plan = case.transformer.forward
    case.transformer.forward = type(case.transformer).forward.__get__(case.transformer)
    assert torch.equal(case.run(), without)
    assert "the pipeline's images were made without the plan: something, such as another" in caplog.text
    case.transformer.forward = plan
    caplog.clear()
    assert torch.equal(case.run(), wanted)
    case.pipe.maybe_free_model_hooks()  # by hand: no images, no word
    assert not caplog.records


def test_attention_slicing(pixart):
    _, wanted = planned(pixart)
    harmonica.apply(pixart.transformer, pixart.artifact())
    pixart.pipe.enable_attention_slicing()
    assert apart(pixart.run(), wanted) < 1e-12
