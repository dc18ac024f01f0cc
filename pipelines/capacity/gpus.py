"""Peak rates of GPUs, from NVIDIA's data sheets.

Arithmetic is dense bfloat16 on tensor cores: where a sheet prints the rate with 2:4 sparsity, half of it.
"""

from dataclasses import dataclass

from harmonica.validation.settings import SettingError


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's peak rates."""

    name: str
    flops: float
    """Dense bfloat16 operations a second; a multiply-accumulate is two."""
    bandwidth: float
    """Bytes a second between the chip and its memory."""
    memory: int
    """Bytes of memory, as sold."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 989e12, 4.8e12, 141 * 10**9, "NVIDIA H200 data sheet, SXM"),
        Gpu("H100", 989e12, 3.35e12, 80 * 10**9, "NVIDIA H100 data sheet, SXM"),
        Gpu("A100", 312e12, 2.039e12, 80 * 10**9, "NVIDIA A100 data sheet, 80 GB SXM"),
        Gpu("L40S", 362e12, 0.864e12, 48 * 10**9, "NVIDIA L40S data sheet"),
        Gpu("L4", 121e12, 0.3e12, 24 * 10**9, "NVIDIA L4 data sheet"),
    )
}
"""The GPUs that are known, by name."""


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        SettingError: it is not in the table.
    """
    if name not in GPUS:
        raise SettingError(f"gpu is {name!r}: give one of {', '.join(GPUS)}")
    return GPUS[name]
