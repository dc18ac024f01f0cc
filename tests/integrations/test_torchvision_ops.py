"""torchvision, and with it diffusers, can be imported before this package, whatever it was built for."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import PIL._imagingmath
import pytest

ROOT = Path(__file__).parents[2]
# As torchvision does it at import: an operator that nobody defined is an error.
FAKE = """
import torch
torch.library.register_fake("torchvision::nms", lambda *_: None)
torch.library.register_fake("torchvision::qnms", lambda *_: None)
"""


def write_plugins(folder: Path) -> Path:
    """What pip writes of the project's plug-ins: the environment need not be installed from this tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = folder / "harmonica_ray-0.dist-info"
    written.mkdir(parents=True)
    (written / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (written / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def start(code: str, *folders: Path, plugins: bool = True) -> subprocess.Popen:
    """Python in a process of its own, `folders` first on its path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT, ROOT / "tests"])),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(plugins)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and all output."""
    out, error = process.communicate(timeout=240)
    return process.returncode, out + error


@pytest.fixture
def unfit(tmp_path) -> Path:
    """A torchvision whose compiled operators do not load."""
    package = tmp_path / "unfit" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_text("built for another torch")
    return package.parent


def test_torchvision_is_imported_before_this_package(unfit, tmp_path):
    plugins = write_plugins(tmp_path / "plugins")
    code = "import torch, sys; assert 'torchvision' not in sys.modules; import torchvision; print('imported')"
    with_plugin = start(code, unfit, plugins)
    without = start(code, unfit, plugins, plugins=False)
    assert outcome(with_plugin) == (0, "imported\n")
    code, said = outcome(without)
    assert code == 1 and "operator torchvision::nms does not exist" in said, "the plug-in is what cures it"


def test_a_torchvision_that_fits_keeps_its_own_operators(tmp_path):
    """Nothing is defined for it, and nothing loaded before somebody imports it."""
    package = tmp_path / "fit" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(PIL._imagingmath.__file__, package / f"_C{EXTENSION_SUFFIXES[0]}")  # any that loads
    code = (
        "import torch, sys; loaded = lambda: [p for p in torch.ops.loaded_libraries if 'torchvision' in p];"
        "assert not loaded(); import torchvision; assert len(loaded()) == 1, loaded();"
        "assert not hasattr(torch.ops.torchvision, 'nms')"
    )
    assert outcome(start(code, package.parent, write_plugins(tmp_path / "plugins"))) == (0, "")
