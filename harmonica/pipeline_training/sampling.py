"""Calls of a diffusers pipeline for rows of prompts, each row with noise of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.pipeline_training.pipeline_calls import Prompt, batched


@torch.no_grad()
def sample_pipeline(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    seed: int,
    output_type: str = "latent",
) -> Tensor:
    """Call a pipeline for rows of prompts; returns its latents or images (N, ...).

    Args:
        call: the other arguments of the call.
        prompts: of each row.
        rows: the rows' names; with the seed they fix the noise, whatever else is in the batch.
        output_type: as the pipeline takes it: `latent`, or `pt` for images (N, 3, H, W) from 0 to 1.
    """
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    dtype = next(transformers_of(pipe)[0].parameters()).dtype
    given = {name: _placed(value, device, dtype) for name, value in batched(prompts).items()}
    generators = [torch.Generator(device).manual_seed((seed << 32) + row) for row in rows]
    settings = {"output_type": output_type, "return_dict": False}
    output = pipe(**{**call, **given, **settings}, generator=generators)[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a tensor, or those of a list, on the device, in the transformer's precision."""
    if isinstance(value, list):
        return [_placed(each, device, dtype) for each in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
