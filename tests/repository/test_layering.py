"""`harmonica` is the method alone: it needs neither Ray nor MLflow, and importing it does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("ray", "mlflow", "pipelines")
SOURCES = sorted((ROOT / "harmonica").rglob("*.py"))

IMPORT_EACH = """
import importlib, sys, threading
forbidden, modules = sys.argv[1].split(), sys.argv[2].split()
sys.modules.update(dict.fromkeys(forbidden))  # None there makes an import raise
for name in modules:
    importlib.import_module(name)
print(threading.active_count())
"""


def module_name(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_each(modules: list[str], root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Import the modules, found in `root`, in a new process that runs in `folder`."""
    environment = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, " ".join(FORBIDDEN), " ".join(modules)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def forbidden_imports(source: str) -> set[str]:
    """Forbidden packages that a file imports anywhere, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return {name.split(".")[0] for name in names} & set(FORBIDDEN)


def test_harmonica_imports_alone_and_without_side_effects(tmp_path):
    result = import_each([module_name(source) for source in SOURCES], ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1\n", "an import printed, or left a thread running"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_no_ray_or_mlflow_even_inside_functions(source):
    assert forbidden_imports(source.read_text()) == set()


def test_a_forbidden_import_is_found(tmp_path):
    code = "def late():\n    from mlflow.tracking import MlflowClient\n"
    assert forbidden_imports(code) == {"mlflow"}
    (tmp_path / "offender.py").write_text("import ray\n")
    result = import_each(["offender"], tmp_path, tmp_path)
    assert result.returncode == 1
    assert "import of ray halted" in result.stderr


def test_work_at_import_is_found(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "eager.py").write_text("open('log.txt', 'w').close()\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert import_each(["eager"], tmp_path / "package", folder).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["log.txt"]


NOT_NEEDED_FOR_DIT = (
    *FORBIDDEN,
    *("accelerate", "boto3", "diffusers", "fastapi", "matplotlib", "pandas", "pyarrow"),
    *("pydantic", "rich", "sentencepiece", "tokenizers", "torchmetrics", "transformers", "tyro"),
)
DIT_ALONE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
import torch
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.data.batch import Batch
from harmonica.samplers.noise import SampleKeys
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.core.sampling import sample
from harmonica.training.trainer import RouterTrainer
from harmonica.training.config import TrainingConfig
torch.set_num_threads(1)
model = load_model(ModelConfig()).model
sampler = make_sampler(model, SamplerConfig(num_inference_steps=3))
run = RouterTrainer(sampler, TrainingConfig(trajectories=1, batch_size=2), seed=0)
keys, labels = SampleKeys.of(0, range(2)), torch.arange(2)
noise = torch.from_numpy(keys.start_noise((1, 28, 28)))
run.train_one(Batch(noise, labels, keys))
artifact = RouterArtifact.load(run.artifact().save(sys.argv[2]))
print(sample(sampler, noise, labels, artifact.plan).isfinite().all().item())
"""


def test_a_dit_is_trained_and_sampled_with_torch_timm_and_safetensors(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", DIT_ALONE, " ".join(NOT_NEEDED_FOR_DIT), str(tmp_path / "router")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "True\n", result.stderr


HEAVY = ("diffusers", "mlflow", "timm", "torch._dynamo", "torchmetrics", "torchvision", "transformers")
"""What takes from half a second to three to import; a command's processes import it when they use it."""
LOADED = """
import importlib, sys
for name in sys.argv[2].split():
    importlib.import_module(name)
print([name for name in sys.argv[1].split() if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (("pipelines.workflow", "pipelines.serve"), HEAVY),
        # Of the workers' processes: of training, of Ray Data, of evaluation and of Serve.
        (
            ("pipelines.training.stage", "pipelines.data.stream"),
            (*HEAVY, "matplotlib", "torch.distributed.fsdp"),
        ),
        (("pipelines.training.ray_trainer",), (*HEAVY, "matplotlib", "sqlalchemy", "tyro")),
        # What rows are made with, and what workers tell how far they are.
        (("harmonica.data.samples", "pipelines.training.board"), (*HEAVY, "ray", "torch", "tyro")),
        (("pipelines.evaluation.quality", "pipelines.serving.deployments"), (*HEAVY, "matplotlib")),
    ],
    ids=["commands", "training", "controller", "rows and board", "sampling"],
)
def test_no_process_begins_with_what_it_may_not_need(modules, heavy, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LOADED, " ".join(heavy), " ".join(modules)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "[]\n", result.stderr
