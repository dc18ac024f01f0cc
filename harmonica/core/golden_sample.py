"""A recorded sample that shows whether a router draws the same images elsewhere.

Shapes: N rows, S text tokens, C channels, H W image.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.models.base import BranchedTransformer
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys, sample_noise
from harmonica.validation.finite import check_finite

_KEYS = SampleKeys.of(0, (0,))
_TEXT_ROW, _NEGATIVE_ROW = 1, 2
# Of a sample, relative to its size: what rounding on other devices may change. Another plan of the built-in
# model changes 2%, float64 5e-7 and bfloat16 1.2%, here or where the sample was recorded.
_MAX_DIFFERENCE, _MAX_DIFFERENCE_HALF = 0.003, 0.2


def draw_sample(artifact: RouterArtifact, sampler: Sampler) -> Tensor:
    """Draw an image or latent (C, H, W) from fixed noise, in the model's precision."""
    model = sampler.model
    shape = (model.in_channels, model.sample_size, model.sample_size)
    device = next(iter(model.parameters())).device
    noise = torch.from_numpy(_KEYS.start_noise(shape)).to(device)
    condition = _condition(model, device)
    drawn = sample(sampler, noise, condition, artifact.plan, reuse=artifact.reuse, keys=_KEYS)
    return drawn[0].to("cpu", model.dtype)


def record_sample(artifact: RouterArtifact, sampler: Sampler) -> RouterArtifact:
    """Return the artifact with the sample that `check_sample` compares with.

    Raises:
        NotFinite: what it draws is not finite.
    """
    drawn = draw_sample(artifact, sampler)
    check_finite(drawn[None], "the router's sample is")
    return replace(artifact, sample_CHW=drawn)


def check_sample(artifact: RouterArtifact, sampler: Sampler) -> None:
    """Draw the sample again and compare it with the artifact's, if it has one.

    Raises:
        ValueError: what is drawn is not finite, or differs from what was recorded.
    """
    compare_samples(draw_sample(artifact, sampler), artifact.sample_CHW)


def compare_samples(drawn: Tensor, recorded: Tensor | None) -> None:
    """Compare a sample that was made again with the recorded one, if there is one.

    Args:
        drawn, recorded: an image or latents, of any shape.

    Raises:
        ValueError: what is drawn is not finite, or differs from what was recorded.
    """
    if not drawn.isfinite().all():
        raise ValueError("the router's sample is not finite: the weights or the router are damaged")
    if recorded is None:
        return
    if recorded.shape != drawn.shape:
        raise ValueError(
            f"the router's sample has shape {tuple(drawn.shape)} and {tuple(recorded.shape)} was recorded"
        )
    difference = float((drawn.float() - recorded.float()).norm() / recorded.float().norm())
    is_half = min(drawn.element_size(), recorded.element_size()) < 4
    limit = _MAX_DIFFERENCE_HALF if is_half else _MAX_DIFFERENCE
    if not difference <= limit:
        raise ValueError(
            f"the router's sample differs by {difference:.1%} from the one recorded with it, {limit:.1%} is "
            "what rounding may do: its files or the model's weights are not those it was registered with"
        )


def _condition(model: BranchedTransformer, device: torch.device) -> Any:
    """Return the first class, or random embeddings, which need no text encoder."""
    if model.num_classes:
        return torch.zeros(1, dtype=torch.long, device=device)
    width, num_tokens = model.text_shape()
    positive, negative = (
        torch.from_numpy(sample_noise(0, row, (1, num_tokens, width))).to(device)
        for row in (_TEXT_ROW, _NEGATIVE_ROW)
    )
    mask = torch.ones(1, num_tokens, dtype=torch.bool, device=device)
    sizes: dict[str, Tensor] = {}
    if (pixels := model.size_conditioning()) is not None:
        sizes["resolution"] = torch.tensor([pixels], device=device).float()
        sizes["aspect_ratio"] = torch.full((1, 1), pixels[0] / pixels[1], device=device)
    return TextCondition(
        embeddings=positive, mask=mask, negative_embeddings=negative, negative_mask=mask, **sizes
    )
