"""Lambda of a router that is trained in a pipeline (HarmoniCa's IEPO), by whole calls of the pipeline.

A pipeline's loop cannot be entered in the middle, so runs do not share what lies before the step that they
differ at: a refresh costs T full generations, and `harmonica.training.iepo` half of that.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from harmonica.pipeline_training.policies import precise
from harmonica.training.iepo import IepoKind

Errors = dict[int, list[float]]
Run = Callable[[Collection[int], Errors | None], Tensor]
"""Latents of a generation in which some steps compute everything; fills the errors of the others."""


def image_changes(run: Run, num_steps: int, kind: IepoKind) -> Tensor:
    """Return (2, T-1): the mean squared changes of the final latents, and the steps' own errors.

    The kinds are those of `harmonica.training.iepo.image_error_proxy`, whose `lambda_of` makes lambda of
    both; the errors are zeros unless it is a sensitivity.
    """
    steps = range(num_steps - 1)
    errors: Errors | None = {} if kind == "sensitivity" else None
    if kind == "cumulative":
        finals = [run([i for i in steps if i < soft], None) for soft in (*steps, num_steps - 1)]
        change_T = torch.stack([_mean_squared(finals[i], finals[i + 1]) for i in steps])
    else:
        all_soft = run((), errors)
        change_T = torch.stack([_mean_squared(run((i,), None), all_soft) for i in steps])
    # A step without an entry had nothing to reuse, and cost nothing.
    each = [(errors or {}).get(i, [0.0]) for i in steps]
    return torch.stack([change_T, change_T.new_tensor([sum(found) / len(found) for found in each])])


def _mean_squared(ours: Tensor, other: Tensor) -> Tensor:
    return precise(ours - other).square().mean()
