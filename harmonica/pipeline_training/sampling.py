"""Call a diffusers pipeline for rows of prompts, each with noise of its own."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.validation.settings import require

_SEEDS = 2**32 - 1
"""A generator's seed has 64 bits, half of them for the row. The next seed is that of evaluation."""
Prompt = str | Mapping[str, Any]
"""A prompt, or the tensors of one prompt that the pipeline's `encode_prompt` gave, by the names of the
pipeline's arguments, as in `prompt_embeds`: each (1, ...), or a list of one."""


def sample_pipeline(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    seed: int,
    output_type: str = "latent",
    has_gradient: bool = False,
) -> Tensor:
    """Call a pipeline for rows of prompts; returns its latents or images (N, ...).

    Args:
        call: the other arguments of the call.
        prompts: of each row; embeddings are moved to the pipeline's device and its transformer's precision.
        rows: the rows' names; with the seed they fix the noise, whatever else is in the batch.
        output_type: as the pipeline takes it: `latent`, or `pt` for images (N, 3, H, W) from 0 to 1.
        has_gradient: keep what a backward pass needs.

    Raises:
        ValueError: texts among embeddings, or embeddings of different names or lengths.
    """
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    dtype = next(transformers_of(pipe)[0].parameters()).dtype
    given = {name: _placed(value, device, dtype) for name, value in batched(prompts).items()}
    generators = [torch.Generator(device).manual_seed((seed << 32) + row) for row in rows]
    settings = {"output_type": "latent", "return_dict": False} | dict(call) | given
    if output_type != "latent":
        settings["output_type"] = output_type
    own = type(pipe).__call__
    if has_gradient:
        own = inspect.unwrap(own)  # diffusers' decorator, torch.no_grad
    with torch.set_grad_enabled(has_gradient):
        output = own(pipe, **settings, generator=generators)[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a tensor, or a list's, on the device in the transformer's precision."""
    if isinstance(value, list):
        return [_placed(each, device, dtype) for each in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def check_seed(seed: int) -> None:
    """Refuse a seed that leaves no room for the rows beside it.

    Raises:
        SettingError: it is negative or too large.
    """
    require(0 <= seed < _SEEDS, "seed", seed, f"give a whole number from 0, below {_SEEDS:,} for a pipeline")


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Check that there are prompts.

    Raises:
        ValueError: there is none.
    """
    if not prompts:
        raise ValueError("prompts is empty: give one or more")


def batched(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return a pipeline's arguments for several prompts.

    Raises:
        ValueError: texts among embeddings, or embeddings of different names or lengths.
    """
    if all(isinstance(prompt, str) for prompt in prompts):
        return {"prompt": list(prompts)}
    if any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are texts and embeddings: give the one or the other")
    rows: list[Mapping[str, Any]] = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("prompts are embedded under different names: give all the same arguments")
    arguments: dict[str, Any] = {}
    with_padding = _with_padding(rows[0])
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, Tensor):
            if name in with_padding:
                values = _padded(values)
            if len({value.shape[1:] for value in values}) > 1:
                raise ValueError(
                    f"prompts have {name} of different shapes: embed all with one max_sequence_length"
                )
            arguments[name] = torch.cat(values)
        else:
            arguments[name] = [each for value in values for each in value]
    return arguments


def _with_padding(row: Mapping[str, Any]) -> set[str]:
    """Return the names of embeddings that have a mask beside them, and of the masks."""
    found = set[str]()
    for name in row:
        for mask in (f"{name}_mask", name.replace("embeds", "embeds_mask"), name.replace(*_ATTENTION)):
            if mask in row and mask != name:
                found |= {name, mask}
    return found


_ATTENTION = ("prompt_embeds", "prompt_attention_mask")


def _padded(values: list[Tensor]) -> list[Tensor]:
    """Return tensors (1, S, ...) with zeros behind them, as long as the longest."""
    longest = max(value.shape[1] for value in values)
    return [
        torch.cat([value, value.new_zeros(1, longest - value.shape[1], *value.shape[2:])], 1)
        for value in values
    ]
