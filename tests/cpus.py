"""The numeric tests as other CPUs would run them: `make test-cpus`.

Libraries choose their kernels by the processor. Here each is told in turn to take those of an older or a
newer one, with one thread and with two, and once all sums are taken in another order than any of them
(tests/support/other_sums.py). A setting can be without effect on the machine at hand, and its line says so:
MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors alone, and AMX wants a CPU that has it.

    python -m tests.cpus [what pytest is to run of them: files, -k ...]
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETTINGS: tuple[tuple[int, dict[str, str]], ...] = (
    (1, {}),
    (1, {"HARMONICA_TEST_SUMS": "other"}),
    (1, {"ATEN_CPU_CAPABILITY": "default"}),
    (1, {"ATEN_CPU_CAPABILITY": "avx2"}),
    (1, {"ATEN_CPU_CAPABILITY": "avx512"}),
    (1, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    (1, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    (1, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}),
    (1, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    (1, {"MKL_CBWR": "COMPATIBLE"}),
    (1, OLDEST),
    (2, {}),
    (2, OLDEST),
)
"""Threads, and what the environment has on top: one variable at a time, and both ends."""
ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
PROBE = [sys.executable, "-m", "tests.cpus", "kernels"]


@dataclass
class Outcome:
    threads: int
    setting: dict[str, str]
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    kernels: str = ""
    """What `kernels` said."""
    seconds: float = 0.0
    log: str = ""

    @property
    def name(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.setting.items())
        return f"{told or 'as the CPU is'}, {self.threads} thread{'s' * (self.threads > 1)}"


def kernels() -> str:
    """Eight hexadecimal digits that equal kernels have in common."""
    torch.set_num_threads(int(os.environ.get("HARMONICA_TEST_THREADS", "1")))
    generator, found = torch.Generator().manual_seed(0), hashlib.sha256()
    numbers = torch.randint(-999, 999, (4, 60, 96), generator=generator).double() / 333
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = numbers.to(dtype)
        heads = x.view(4, 60, 8, 12).transpose(1, 2)
        for result in (
            x @ x.mT,
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads),
            torch.nn.functional.layer_norm(x, (96,)),
            torch.nn.functional.gelu(x, approximate="tanh"),
        ):
            found.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


def collect(arguments: list[str]) -> list[str]:
    """Ids of the numeric tests."""
    command = [*PYTEST, "--collect-only", "-m", "numeric and not slow and not gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if done.returncode or not found:
        raise SystemExit(f"{done.stdout}\npytest collected no numeric tests, or not all")
    return found


def run(threads: int, tests: list[str], setting: dict[str, str]) -> Outcome:
    outcome, started = Outcome(threads, setting), time.monotonic()
    environment = os.environ | setting | {"HARMONICA_TEST_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        report, chosen = Path(folder, "report.xml"), Path(folder, "tests")
        chosen.write_text("\n".join(tests))
        done = subprocess.run(
            [*PYTEST, "--tb=short", "--no-showlocals", f"--junitxml={report}", f"@{chosen}"],
            env=environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        outcome.log, outcome.seconds = done.stdout, time.monotonic() - started
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            if case.find("failure") is not None or case.find("error") is not None:
                outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("skipped") is None:
                outcome.passed += 1
    if done.returncode not in (0, 1):
        outcome.failed.append(f"pytest ended with {done.returncode}")
    outcome.kernels = subprocess.run(PROBE, env=environment, cwd=ROOT, capture_output=True, text=True).stdout
    return outcome


def said(outcome: Outcome, plain: str) -> str:
    """A line, and one for each test that failed.

    Args:
        plain: the kernels that the CPU takes of itself.
    """
    counts = f"{outcome.passed} passed, {len(outcome.failed)} failed in {outcome.seconds:.0f} s"
    has_effect = outcome.kernels != plain or not outcome.setting or "HARMONICA_TEST_SUMS" in outcome.setting
    note = "" if has_effect else " (without effect on this CPU: it takes the same kernels)"
    line = f"{'FAILED' if outcome.failed else 'ok':6} {outcome.name}: {counts}{note}"
    return "\n".join([line, *(f"       {test}" for test in outcome.failed)])


def main(arguments: list[str]) -> int:
    """Prints a line for each setting; 1 if a test failed under any."""
    tests = collect(arguments)
    print(f"{len(tests)} numeric tests under {len(SETTINGS)} settings", flush=True)
    own = subprocess.run(PROBE, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    failed: list[Outcome] = []
    for threads in (1, 2):
        settings = [setting for number, setting in SETTINGS if number == threads]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads)) as pool:
            for outcome in pool.map(functools.partial(run, threads, tests), settings):
                print(said(outcome, own), flush=True)
                failed += [outcome] * bool(outcome.failed)
    for outcome in failed:
        print(f"\n{outcome.name}\n{outcome.log[-5000:]}")
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:
        print(kernels())
    else:
        sys.exit(main(sys.argv[1:]))
