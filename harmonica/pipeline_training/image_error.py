"""Measure lambda (HarmoniCa's IEPO) by whole calls of a pipeline.

A pipeline's loop cannot be entered in the middle, so runs do not share what lies before the step that they
differ at: a refresh costs T full generations, and `harmonica.training.iepo` half of that.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from harmonica.training.iepo import SMALLEST_ERROR, IepoKind

Errors = dict[int, list[float]]
Run = Callable[[Collection[int], Errors | None], Tensor]
"""Latents of a generation in which some steps compute everything; fills the errors of the others."""


def image_error(run: Run, num_steps: int, kind: IepoKind) -> Tensor:
    """Return lambda (T-1,), the mean squared change of the final latents.

    The kinds are those of `harmonica.training.iepo.image_error_proxy`.
    """
    steps = range(num_steps - 1)
    errors: Errors | None = {} if kind == "sensitivity" else None
    if kind == "cumulative":
        finals = [run([i for i in steps if i < soft], None) for soft in (*steps, num_steps - 1)]
        return torch.stack([_mean_squared(finals[i], finals[i + 1]) for i in steps])
    all_soft = run((), errors)
    change_T = torch.stack([_mean_squared(run((i,), None), all_soft) for i in steps])
    if errors is None:
        return change_T
    # A step without an entry had nothing to reuse, and cost nothing.
    error_T = torch.tensor([sum(errors.get(i, [0.0])) / len(errors.get(i, [0.0])) for i in steps])
    return change_T / error_T.to(change_T).clamp_min(SMALLEST_ERROR)


def _mean_squared(ours: Tensor, other: Tensor) -> Tensor:
    return (ours - other).float().square().mean()
