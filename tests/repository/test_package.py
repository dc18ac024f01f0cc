"""The wheel as a stranger gets it: built from the sdist, installed by itself, used from another folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = [(3, 11), (3, 12), (3, 13)]
"""Those that the metadata promises."""
SMALL = [
    "--stages=train",
    "--sampler.num-inference-steps=4",
    "--train.trajectories=1",
    "--train.batch-size=2",
    "--train.initial=normal",
    "--train.start-trajectories=0",
    "--train.choice-trajectories=0",
    "--train.forecast.trajectories=0",
]
CODE_OF_BUILDING = "import sys; from setuptools import build_meta as b; print(b.{}(sys.argv[1]))"


def run(*command: str | Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run in `folder`, without this checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True
    )


def checked(*command: str | Path, folder: Path, **more: str) -> str:
    done = run(*command, folder=folder, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_of(version: tuple[int, int]) -> str | None:
    """An interpreter of this version: on the path, or where pyenv and uv keep theirs; None without one."""
    name = "python{}.{}".format(*version)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local/share/uv/python")
    kept = [*pyenv.glob(f"versions/*/bin/{name}"), *uv.glob(f"*/bin/{name}")]
    for found in filter(None, [shutil.which(name), *map(str, sorted(kept))]):
        # On the path may be a shim of pyenv's that starts nothing.
        said = run(found, "-c", "import sys, venv; print(*sys.version_info[:2])", folder=ROOT)
        if said.stdout.split() == [str(part) for part in version]:
            return found
    return None


def test_the_metadata_names_the_pythons_that_are_tried():
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, tools = made["project"], made["tool"]
    said = [re.fullmatch(r"Programming Language :: Python :: (3)\.(\d+)", c) for c in project["classifiers"]]
    assert [tuple(map(int, match.groups())) for match in said if match] == PYTHONS
    oldest = "{}.{}".format(*PYTHONS[0])
    assert project["requires-python"] == f">={oldest}"
    assert tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}", "it refuses newer syntax"


def parsed(source: str) -> ast.Module:
    return ast.parse(source, feature_version=PYTHONS[0])


def test_every_file_parses_as_the_oldest_python():
    files = [ROOT / "setup.py", ROOT / "workflow.py"]
    for folder in ("harmonica", "pipelines", "cluster", "tests"):
        files += (ROOT / folder).rglob("*.py")
    assert len(files) > 500
    for path in files:
        parsed(path.read_text())
    with pytest.raises(SyntaxError):
        parsed("type Shape = tuple[int, ...]")  # of 3.12


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy of what is under version control or would be: a build leaves files in its folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "harmonica", "pipelines"):
        checked("cp", "-r", ROOT / name, source, folder=ROOT)
    checked(sys.executable, "-c", CODE_OF_BUILDING.format("build_sdist"), target, folder=source)
    return next(target.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    checked(sys.executable, "-c", CODE_OF_BUILDING.format("build_wheel"), folder, folder=source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The `bin` of a fresh environment with the wheel, and with what else is installed here.

    A line in a .pth adds a folder and heeds no .pth in it, so this checkout's own installation is unseen.
    """
    folder = tmp_path_factory.mktemp("environment")
    checked(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    checked(sys.executable, *install, folder=folder)
    site = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)
    Path(site.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_the_wheel_has_two_packages_and_all_of_their_files(wheel):
    names = contents(wheel)
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"harmonica", "harmonica_ray"}
    in_clone = {
        path.relative_to(ROOT).as_posix().replace("pipelines/", "harmonica_ray/", 1)
        for top in ("harmonica", "pipelines")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".html", ".safetensors", ".json", ".txt", ".typed")
    }
    makers = "harmonica_ray/pretrain/"
    examples = {name for name in in_clone if name.startswith(makers)}
    assert examples, "there is something to leave out"
    assert in_clone - examples == {name for name in names if ".dist-info/" not in name}


ALONE = """
import importlib.metadata, pathlib, harmonica
from harmonica.__main__ import COMMANDS
said = importlib.metadata.metadata("harmonica-ray")
print(harmonica.__version__ == said["Version"], said["Requires-Python"], *sorted(COMMANDS))
print(pathlib.Path(harmonica.__file__).parents[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS, ids="{0[0]}.{0[1]}".format)
def test_the_wheel_installs_on_each_python(version, wheel, tmp_path):
    """Without what it depends on, of which the package itself says what is missing."""
    found = python_of(version)
    if found is None:
        pytest.skip("Python {}.{} is not installed".format(*version))
    bin_ = tmp_path / "there" / "bin"
    checked(found, "-m", "venv", "--without-pip", bin_.parent, folder=tmp_path)
    install = ("-m", "pip", "--python", bin_ / "python", "install", "-q", "--no-deps", "--no-index", wheel)
    checked(sys.executable, *install, folder=tmp_path)
    said, site = checked(bin_ / "python", "-I", "-c", ALONE, folder=tmp_path).splitlines()
    assert said == "True >=3.11 apply convert memory sample train"
    assert Path(site).is_relative_to(bin_.parent)
    compiled = [Path(site, name) for name in ("harmonica", "harmonica_ray")]
    checked(bin_ / "python", "-W", "error", "-m", "compileall", "-q", "-f", *compiled, folder=tmp_path)
    assert checked(bin_ / "harmonica", "--version", folder=tmp_path) == "0.1.0\n"
    refused = run(bin_ / "harmonica", "sample", folder=tmp_path)
    assert refused.returncode != 0 and "pip install 'harmonica-ray[" in refused.stderr


@pytest.mark.slow
def test_imports_come_from_the_wheel_and_there_is_no_package_pipelines(scripts, tmp_path):
    code = """
import importlib.util, sys
import harmonica, harmonica_ray.serve, harmonica_ray.stages
assert all(m.__file__.startswith(sys.prefix) for m in (harmonica, harmonica_ray)), harmonica.__file__
assert harmonica.RouterArtifact.__module__ == "harmonica.core.artifact"
absent = "pipelines", "harmonica_ray.pretrain"
print([importlib.util.find_spec(name) for name in absent])
print([name for name in sys.modules if name.partition(".")[0] == "pipelines"])
"""
    assert checked(scripts / "python", "-c", code, folder=tmp_path) == "[None, None]\n[]\n"


@pytest.mark.slow
def test_the_commands_of_the_wheel(scripts, tmp_path):
    assert checked(scripts / "harmonica", "--version", folder=tmp_path) == "0.1.0\n"
    said = checked(scripts / "harmonica", "sample", "--classes", "1", "--rounds=1", folder=tmp_path)
    assert "ideal" in said and (tmp_path / "samples.png").stat().st_size > 0
    settings = checked(scripts / "harmonica-workflow", "fashion", "--help", folder=tmp_path)
    assert "harmonica-workflow fashion" in settings and "--train.trajectories" in settings
    serve = (scripts / "python", "-m", "harmonica_ray.serve", "--help")
    assert "python -m harmonica_ray.serve" in checked(*serve, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_workflow_of_the_wheel_trains_on_ray(scripts, tmp_path):
    """Workers unpickle functions by their module's name, which is that of the wheel."""
    asked = [f"--storage-path={tmp_path / 'runs'}", "--run-id=r1", *SMALL]
    said = checked(scripts / "harmonica-workflow", "fashion", *asked, folder=tmp_path)
    assert "run r1: train" in said
    assert (tmp_path / "runs" / "r1" / "router" / "config.json").is_file()
