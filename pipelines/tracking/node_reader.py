"""Read the CPU, memory and GPUs of a node.

This is a module of its own, since an actor imports the module of its class: beside the code that speaks to
MLflow, each node would import MLflow and torch for it, seconds of a core at the start of every run.
"""

import shutil
import subprocess

import psutil

_PATIENCE_S = 5.0
_NVIDIA_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class NodeReader:
    """This actor reads the metrics of its node."""

    def __init__(self) -> None:
        self._nvidia = shutil.which("nvidia-smi")  # comes with the driver, so no package is needed
        psutil.cpu_percent()  # each call measures since the one before

    def read(self) -> dict[str, float]:
        """Return the node's metrics.

        Names are such as `cpu_utilization_percentage` and `gpu_0_memory_usage_megabytes`.
        """
        memory = psutil.virtual_memory()
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
        }
        return metrics | self._gpus()

    def _gpus(self) -> dict[str, float]:
        if self._nvidia is None:
            return {}
        command = [self._nvidia, f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S)
        except (OSError, subprocess.SubprocessError):
            return {}
        return gpu_metrics(done.stdout)


def gpu_metrics(table: str) -> dict[str, float]:
    """Return the metrics in nvidia-smi's table.

    Those that a GPU does not report are left out.

    Args:
        table: a line of comma-separated values for each GPU.
    """
    metrics: dict[str, float] = {}
    for line in table.strip().splitlines():
        index, *numbers = (cell.strip() for cell in line.split(","))
        busy, used_mib, total_mib, watts = map(_number, numbers)
        found = {"utilization_percentage": busy, "power_usage_watts": watts}
        if used_mib is not None and total_mib:
            found["memory_usage_megabytes"] = used_mib * 2**20 / 1e6
            found["memory_usage_percentage"] = 100 * used_mib / total_mib
        metrics |= {f"gpu_{index}_{name}": value for name, value in found.items() if value is not None}
    return metrics


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # "[N/A]" and the like
        return None
