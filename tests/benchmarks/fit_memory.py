"""Memory of the measured start and of the fit of forecasts at full size, counted on tensors without values.

    python -m tests.benchmarks.fit_memory [dit-256 dit-512 pixart-256 pixart-512 pixart-1024
        pixart-2048] [--layers 28]

One image under guidance, 20 steps, even steps at 1.8x, one probe, weights in bfloat16 and not counted: as it
is, with branches that are computed again (`train.forecast.activation_checkpointing`), and with what is left
in the host's memory too (`train.forecast.activation_offloading`), the host's bytes beside the device's.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harmonica.core.plan import Plan, correction_of
from harmonica.core.plan_builders import even_plan
from harmonica.core.segments import with_segments
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer, freeze
from harmonica.models.dit.config import dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.text_blocks import KINDS
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.training.memory_savings import MemorySavings
from harmonica.training.plans.fitted_weights import FittedWeights, linear_weights
from harmonica.training.plans.forecast_sketch import sketch_image_error
from harmonica.training.plans.step_sketch import sketch_steps
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.live_tensors import SAVINGS, peaks_in_both

STEPS, SPEEDUP = 20, 1.8
WIDTH = 4096  # of the T5 that PixArt was trained with
LEAN = "recomputed | offloaded"
MODELS = ["dit-256", "dit-512", "pixart-256", "pixart-512", "pixart-1024", "pixart-2048"]


def dit(image_size: int, layers: int) -> tuple[BranchedTransformer, object]:
    """DiT-XL/2, and one label."""
    shape = replace(dit_shape("DiT-XL/2", image_size), num_layers=layers)
    return DiT(shape), torch.zeros(1, dtype=torch.long)


def pixart(image_size: int, layers: int) -> tuple[BranchedTransformer, object]:
    """PixArt with all three kinds of sub-layers, and one prompt."""
    ensure_torchvision_imports()
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from harmonica.models.pixart.model import PixArt

    transformer = PixArtTransformer2DModel(
        sample_size=image_size // 8,
        num_layers=layers,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    tokens = 300 if image_size == 2048 else 120  # PixArt-Sigma's and PixArt-alpha's
    text, mask = torch.zeros(1, tokens, WIDTH), torch.ones(1, tokens, dtype=torch.bool)
    condition = TextCondition(
        embeddings=text, mask=mask, negative_embeddings=text.clone(), negative_mask=mask.clone()
    )
    return PixArt(transformer, cacheable=KINDS, text_tokens=tokens), condition


def planned(sampler: Sampler) -> Plan:
    """Even steps in segments, with forecasts of two differences and a correction."""
    plan = with_segments(even_plan(STEPS, sampler.model.macs(), SPEEDUP), sampler.model)
    correction = correction_of(torch.full((STEPS, 1), 0.1, dtype=torch.float64))
    weights = FittedWeights(linear_weights(plan, 2), torch.zeros(STEPS, 0))
    return replace(weights.of(plan), correction=correction)


def measure(name: str, layers: int) -> None:
    """Print a row: the start and the fit, each under all savings, in GiB."""
    kind, size = name.split("-")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model, condition = {"dit": dit, "pixart": pixart}[kind](int(size), layers)
        freeze(Hardware(dtype=torch.bfloat16).place(model))
    steps = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5, clip_sample=False)
    sampler, keys = make_sampler(model, steps), SampleKeys.of(0, [0])
    shape, plan = (1, model.in_channels, model.sample_size, model.sample_size), planned(sampler)

    def start(savings: MemorySavings) -> None:
        with mode:
            batch = Batch(torch.zeros(shape), condition, keys)
            sketch_steps(sampler, batch, reach=16, corrections=1, probes=1, segments=True, savings=savings)

    def fit(savings: MemorySavings) -> None:
        with mode:
            noise = torch.zeros(shape)
            batch = Batch(noise, condition, keys)
            sketch_image_error(sampler, plan, batch, noise, order=2, probes=1, savings=savings)

    cells = [name]
    for run in (start, fit):
        for savings in (SAVINGS["none"], SAVINGS["recomputed"], SAVINGS["both"]):
            device, host = peaks_in_both(model, partial(run, savings))
            cells.append(f"{device / 2**30:.1f}" + (f" and {host / 2**30:.1f}" if host else ""))
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """A row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--layers", type=int, default=28)
    chosen = parser.parse_args()
    print(f"| | start | {LEAN} | fit | {LEAN} |\n|---|---|---|---|---|---|---|")
    for name in chosen.models:
        measure(name, chosen.layers)


if __name__ == "__main__":
    main()
