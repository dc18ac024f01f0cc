"""MACs of the public shapes are what torch's counter finds on the meta device."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.models.public_shapes import MODELS
from harmonica.models.text_condition import TextCondition


@pytest.mark.parametrize("name", MODELS)
def test_macs_of_public_models_are_what_torch_counts(name: str) -> None:
    model = MODELS[name]()
    noise = torch.empty(1, model.in_channels, model.sample_size, model.sample_size, device="meta")
    timestep_N = torch.zeros(1, dtype=torch.long, device="meta")
    condition: torch.Tensor | TextCondition = timestep_N
    if not model.num_classes:
        width, tokens = model.text_shape()
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta")
        condition = TextCondition(embeddings=torch.empty(1, tokens, width, device="meta"), mask=mask)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as whole:
            hidden, conditioning = model.embed(noise, timestep_N, condition)
            model.full_pass(hidden, conditioning)
        each = []
        for branch in model.branches:
            with FlopCounterMode(display=False) as counter:
                branch.compute(hidden, conditioning)
            each.append(counter.get_total_flops() / 2)
    assert tuple(each) == model.macs().branches
    assert whole.get_total_flops() / 2 == model.macs().full
