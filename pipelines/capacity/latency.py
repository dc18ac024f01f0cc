"""Seconds of a forward, from its MACs and stated shares of a GPU's peak rates.

The form is the roofline model's (Williams, Waterman and Patterson 2009, Communications of the ACM 52(4)) with
a fixed time for every kernel of a branch. For M rows and B branches one step takes

    device  2 * MACs * M / (share * FLOP/s) + weight bytes / bandwidth + B * kernel_s
    host    B * launch_s, which runs beside the device: the longer of the two counts

The shares are assumptions, fitted to measurements on one H100 (80 GB, SXM, bfloat16, random weights):
DiT-XL/2 at 256, T = 20, took 52.4 ms at batch 1 and 184.5 ms at batch 8 from CUDA graphs, and 224 and 328 ms
eagerly; PixArt-Sigma, eagerly, 984 ms at 1024 and T = 20, and 2,711 ms at 2048 and T = 8. A test holds the
formula to within a factor of 1.2 of each. Other GPUs are given the same shares, which nobody has measured
here.
"""

from dataclasses import dataclass
from typing import Literal

from .gpus import Gpu
from .sizes import SizedModel

ExecutionLevel = Literal["graphed", "eager"]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The fractions of a GPU's peak rates that are realised."""

    share: float
    """Share of the peak FLOP/s while products run (model FLOPs utilisation without fixed times)."""
    kernel_s: float
    """Seconds of a branch on the GPU that do not depend on the rows."""
    launch_s: float
    """Seconds that the host takes to launch a branch."""
    realised: float
    """Share of a plan's ideal speedup that is realised."""


SAMPLING: dict[ExecutionLevel, Efficiency] = {
    # Plans realised 0.90 to 1.09 of their ideal from graphs, and 0.83 to 0.91 eagerly.
    "graphed": Efficiency(share=0.50, kernel_s=20e-6, launch_s=0.0, realised=0.95),
    "eager": Efficiency(share=0.28, kernel_s=20e-6, launch_s=200e-6, realised=0.87),
}
"""By how branches are run (`model.execution`)."""

TRAINING = Efficiency(share=0.25, kernel_s=270e-6, launch_s=0.0, realised=1.0)
"""Efficiency of router training: 16 and 64 rows of DiT-XL/2, T = 4, took 303 and 761 ms a trajectory. The
host's time is counted on top of the GPU's there, which is what these two numbers say."""


def forward_seconds(
    model: SizedModel, gpu: Gpu, rows: float, efficiency: Efficiency, *, share: float = 0.0
) -> float:
    """Return the seconds of one forward in which every branch is computed.

    Args:
        rows: model rows M, two an image under guidance.
        share: replaces the assumed share of the peak, if above 0.
    """
    products = 2 * model.macs.full * rows / ((share or efficiency.share) * gpu.flops)
    sub_layers = model.sub_layers or model.num_branches
    device = products + model.weight_bytes / gpu.bandwidth + sub_layers * efficiency.kernel_s
    return max(device, sub_layers * efficiency.launch_s)


def sampling_seconds(
    model: SizedModel,
    gpu: Gpu,
    images: int,
    num_steps: int,
    *,
    execution: ExecutionLevel,
    speedup: float = 1.0,
    share: float = 0.0,
) -> float:
    """Return the seconds of a batch's trajectory, without text encoder and VAE.

    Args:
        speedup: the plan's, in MACs (`Plan.ideal_speedup`); 1 computes everything.
    """
    efficiency = SAMPLING[execution]
    full = num_steps * forward_seconds(model, gpu, model.rows * images, efficiency, share=share)
    return full if speedup == 1 else full / max(1.0, speedup * efficiency.realised)
