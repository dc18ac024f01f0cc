"""Correct a model's output by what it gave at earlier steps.

Under a plan, a reused step's output is wrong by an error that the next computed step lets one see: it lies
off the line of its neighbours. So at each step, computed or reused, the sampler is given
`o_i + sum over k of c_ik (o_(i+k) - o_(i+k+1))` of the last outputs o, uncorrected, with weights c of the
step: learned (`harmonica.training.plans.forecast_fit`), or, without training, fixed
(`harmonica.core.plan_builders.with_fixed_correction`). Guidance is linear, so that correcting both halves
corrects what is guided. It costs one addition of the latents' size a step.

Ours, close to the corrector of a predictor-corrector sampler (UniPC, Zhao et al. 2023, Section 3.1), whose
weights follow from the noise schedule and not from the plan; `tests/benchmarks/RESULTS.md` has what it is
worth.
"""

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache


def corrected(output_NCHW: Tensor, step: int, outputs: BranchCache | None, channels: int) -> Tensor:
    """Return the output of `step`, corrected, and keep it as it was given.

    Args:
        outputs: the trajectory's last outputs, kept like those of a single branch; None corrects nothing.
        channels: number of channels that predict noise or velocity; others, as the learned variance, are not
            corrected.
    """
    if outputs is None:
        return output_NCHW
    outputs.write(0, step, output_NCHW[:, :channels])
    predicted_NCHW = outputs.read(0, step)
    if channels >= output_NCHW.shape[1]:
        return predicted_NCHW
    return torch.cat([predicted_NCHW, output_NCHW[:, channels:]], dim=1)
