"""A plan on a transformer with adapters, and with weights in another form: fused."""

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from tiny_attached import Case, apart, planned
from tolerances import of_pass
from torch import Tensor, nn

import harmonica

# Adapters


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it; PEFT itself is not installed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        dtype = layer.weight.dtype
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False, dtype=dtype)})

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
