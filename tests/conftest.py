"""What tests of the method share: a tiny DiT with random weights that are not silent, and its sampler.

Everything is float64, so that a tolerance can say what is meant.
"""

import ast
import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fork_client
import hypothesis
import other_sums
import pytest
import torch
from execution_cases import fresh
from host_recorder import HostRecorder
from torch import Tensor
from xdist.scheduler import LoadFileScheduling

from harmonica.execution import graphs
from harmonica.models.base import freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import Ddim, SamplerConfig

ROOT = Path(__file__).parents[1]
FORKS = Path(fork_client.__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-forks", action="store_true", help="Ray's workers import everything themselves")


def pytest_configure(config: pytest.Config) -> None:
    """Set the path of child processes, and one thread.

    More than there are free cores make models this small slower by a hundred times.

    `make test-cpus` alone sets another number, and other orders of summation (tests/cpus.py).
    """
    # Installed, the folder `pipelines` has another name: processes that tests start find it in the clone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Ray gives its workers a niceness of 15, which next to tests of another file leaves them a thirtieth of a
    # core by their weights.
    os.environ.setdefault("RAY_worker_niceness", "0")
    torch.set_num_threads(int(os.environ.get("HARMONICA_TEST_THREADS", "1")))
    # By default an example fails that takes 0.2 s, which says how busy the machine is.
    hypothesis.settings.register_profile("without deadlines", deadline=None)
    hypothesis.settings.load_profile("without deadlines")
    if os.environ.get("HARMONICA_TEST_SUMS") == "other":
        config.stash[pytest.StashKey[torch.library.Library]()] = other_sums.install()


_COMPARES = re.compile(
    r"\b(assert_close|assert_allclose|allclose|approx|torch\.equal|apart|check_sample|cosine_similarity|norm)\("
)


@functools.cache
def _comparing(module: ModuleType) -> re.Pattern[str]:
    """How a test of this module compares numbers: itself, or by one of the module's own functions."""
    helpers = inspect.getmembers(module, inspect.isfunction)
    own = [name for name, f in helpers if f.__module__ == module.__name__ and not name.startswith("test_")]
    names = [name for name in own if _COMPARES.search(_source(getattr(module, name)))]
    return re.compile("|".join([_COMPARES.pattern, *(rf"\b{name}\b" for name in names)]))


@functools.cache
def _is_elsewhere(module: ModuleType) -> bool:
    """Whether processes of its own compute, or a store hands out what was computed before."""
    return bool(re.search(r"\b(multiprocessing|mlflow|registry)\b", inspect.getsource(module)))


def _source(thing: Any) -> str:
    """Its text; "" of what was made without any, as some of a library's tests are."""
    try:
        return inspect.getsource(inspect.unwrap(thing))
    except (OSError, TypeError):
        return ""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Whatever compares what this process computed is `numeric`."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("cluster") is not None:
        return
    compares = _comparing(item.module).search(_source(item.function))
    if compares and not _is_elsewhere(item.module):
        item.add_marker("numeric")


def _shares_a_cluster(item: pytest.Item | None) -> bool:
    return "private_cluster" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray clusters come first, since they take longest one after another.

    Those that share one follow each other.
    """
    items.sort(key=lambda item: (item.get_closest_marker("cluster") is None, not _shares_a_cluster(item)))


_FORK_SERVER = pytest.StashKey[subprocess.Popen[bytes]]()


def _start_fork_server(config: pytest.Config) -> None:
    """From now on, Ray's workers are forks of a process that has imported what takes long (support/forks)."""
    address = os.path.join(tempfile.mkdtemp(dir="/tmp"), "socket")  # a socket's path has to be short
    path = os.pathsep.join([str(FORKS), os.environ["PYTHONPATH"]])
    os.environ.update({fork_client.ADDRESS: address, "PYTHONPATH": path})
    # As workers have it (pipelines/runtime/ray_runtime.py): huggingface_hub reads it when it is imported.
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-u", str(FORKS / "fork_server.py"), address]
    server = config.stash[_FORK_SERVER] = subprocess.Popen(command, env=os.environ | own)
    # Its imports would take the cores from a cluster that starts meanwhile, and has half a minute for that.
    while not os.path.exists(address) and server.poll() is None:
        time.sleep(0.1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the server of forks before the first test with a cluster."""
    wanted = item.get_closest_marker("cluster") is not None and not item.config.getoption("--no-forks")
    if wanted and sys.platform == "linux" and _FORK_SERVER not in item.config.stash:
        _start_fork_server(item.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the server of forks, and with it those that are left."""
    if (server := config.stash.get(_FORK_SERVER, None)) is not None:
        server.terminate()
        server.wait()
        shutil.rmtree(os.path.dirname(os.environ[fork_client.ADDRESS]), ignore_errors=True)


@pytest.fixture(scope="module")
def private_cluster() -> None:
    """A private Ray cluster, which goes on for the next file that uses this: a start takes 9 s of a core."""
    from pipelines.runtime.ray_runtime import connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        connect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End the shared cluster before the first test that does not use it."""
    yield
    if _shares_a_cluster(item) and not _shares_a_cluster(nextitem):
        import ray

        ray.shutdown()


@functools.cache
def _with_clusters(path: Path) -> frozenset[str]:
    """Names of the tests of a file that start or join a Ray cluster; "*" is all of them."""
    tree = ast.parse(path.read_text())
    marked = [node for node in tree.body if "mark.cluster" in ast.unparse(getattr(node, "value", node))]
    return frozenset("*" if isinstance(node, ast.Assign) else getattr(node, "name", "") for node in marked)


_NODES = "tests/nodes/"


class _FilesAside(LoadFileScheduling):
    """Files side by side, but tests with Ray clusters after one another, in one process.

    More clusters at once on two cores make them miss their deadlines. Those of `tests/nodes`, which share
    one cluster, are a process of their own, so that both cores are used (tests/benchmarks/RESULTS.md).
    """

    def _split_scope(self, nodeid: str) -> str:
        path: str = super()._split_scope(nodeid)
        clusters = _with_clusters(Path(self.config.rootpath, path))
        name = nodeid.rpartition("::")[2].partition("[")[0]
        if not clusters & {"*", name}:
            return path
        return _NODES if path.startswith(_NODES) else "clusters"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Of pytest-xdist; its own groups (3.8) go unseen by pytest 9.2."""
    return _FilesAside(config, log)


@pytest.fixture
def tiny_shape() -> DiTConfig:
    """The shape of `assets/case_a`: 16 tokens of width 48, six branches."""
    return DiTConfig(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=12,
        num_embeds_ada_norm=10,
    )


@pytest.fixture
def tiny_dit(tiny_shape: DiTConfig) -> DiT:
    model = DiT(tiny_shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    return model.double()


@pytest.fixture
def tiny_sampler(tiny_dit: DiT) -> Ddim:
    """Guided, six steps, as latents are sampled."""
    config = SamplerConfig(
        num_inference_steps=6, guidance_scale=1.5, guidance_channels="first_three", clip_sample=False
    )
    return Ddim(tiny_dit, config)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Noise (4, 4, 8, 8) and labels (4,)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    return noise, torch.randint(10, (4,), generator=generator)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def make_bomb(tmp_path: Path) -> tuple[Callable[[], Any], Path]:
    """An object maker, and the file that appears if a pickle of such an object is executed."""
    marker = tmp_path / "executed"
    return lambda: _Bomb(marker), marker


@pytest.fixture
def host_recorder(monkeypatch) -> None:
    """Steps are recorded on the CPU, as they are on CUDA."""
    monkeypatch.setattr(graphs, "make_recorder", lambda device, known: HostRecorder(known))


@pytest.fixture
def no_codegen(monkeypatch) -> Iterator[None]:
    """Compiled branches run as they were traced, and their graphs are counted from none.

    What Dynamo guards on, and so how many graphs there are, does not depend on the generated code.
    """
    fresh()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    fresh()
