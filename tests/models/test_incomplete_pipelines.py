"""Text pipelines' folders in which something is missing: refused before Ray starts, with the true reason."""

import shutil
from pathlib import Path

import pytest
import ray
from processes import free_port
from tiny_pipeline import make_vae
from tiny_text import TOKENS, make_encoder
from tiny_text_pipeline import Form, sharded, variant, without, write_text_pipeline

from harmonica.data.conditions import check_conditions, make_conditions
from harmonica.models.loading import ModelConfig, load_model
from pipelines import workflow
from pipelines.stages import Workflow

ENCODER, VAE, TRANSFORMER = (
    "text_encoder/model",
    "vae/diffusion_pytorch_model",
    "transformer/diffusion_pytorch_model",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_pipeline(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "pixart")


def arguments(folder: Path, *more: str) -> list[str]:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red cat\n")
    settings = {"model.path": folder, "model.text-tokens": TOKENS, "prompts.max-tokens": TOKENS}
    settings |= {"prompts.path": prompts, "storage-path": folder.parent / "runs", "serve.port": free_port()}
    return ["fashion-text", *(f"--{name}={value}" for name, value in settings.items()), *more]


def one_shard_less(part: str, stem: str) -> Form:
    def change(folder: Path) -> None:
        sharded()(folder)
        sorted((folder / part).glob(f"{stem}-*.safetensors"))[1].unlink()

    return change


def of_another_width(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    make_encoder(width=12).save_pretrained(folder / "text_encoder")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("tokenizer"), "pixart has no tokenizer/tokenizer_config.json; it holds model_index.json, "),
        (
            without("tokenizer/tokenizer.json"),
            "has no tokenizer/tokenizer.json or spiece.model; tokenizer/ holds tokenizer_config.json",
        ),
        (without("text_encoder"), "pixart has no text_encoder/config.json; it holds model_index.json, "),
        (
            without(f"{ENCODER}.safetensors"),
            "text_encoder has no model.safetensors or pytorch_model.bin, whole",
        ),
        (one_shard_less("text_encoder", "model"), "text_encoder lacks model-00002-of-0"),
        (of_another_width, "gives width 12 and the model takes 10: use the encoder of the model's own"),
        (
            without("text_encoder", "tokenizer", "model_index.json"),
            "has no text_encoder/ and tokenizer/ and the",
        ),
        (without(f"{TRANSFORMER}.safetensors"), "transformer has no diffusion_pytorch_model.safetensors or"),
        (
            one_shard_less("transformer", "diffusion_pytorch_model"),
            "transformer lacks diffusion_pytorch_model-0",
        ),
        (without(f"{VAE}.safetensors"), "error: model.vae: "),
        (without("vae"), "model.vae is '' and "),
    ],
)
def test_what_is_missing_is_said_before_ray_starts(
    folder: Path, spoil: Form, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    assert workflow.main(arguments(folder)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not ray.is_initialized()


@pytest.mark.parametrize("stages", [["train"], ["serve"], ["prompts", "train", "serve"]])
def test_only_the_stages_that_embed_want_a_text_encoder(
    folder: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    without("text_encoder", "tokenizer")(folder)
    assert workflow.main(arguments(folder, "--stages", *stages)) == 2
    words = "no embedded prompts yet" if stages == ["train"] else "no tokenizer/tokenizer_config.json"
    assert words in capsys.readouterr().err


FORMS: dict[str, Form] = {
    "fp16": variant("fp16"),
    "bf16": variant("bf16"),
    "fp16 shards": variant("fp16", max_shard_size="8KB"),
    "pickle": lambda folder: make_vae().save_pretrained(folder / "vae", safe_serialization=False),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_local_folder_is_let_through_and_loads(folder: Path, name: str) -> None:
    if name == "pickle":
        without(f"{VAE}.safetensors")(folder)
    FORMS[name](folder)
    loaded = load_model(ModelConfig(path=str(folder), text_tokens=TOKENS))
    check_conditions(loaded)
    assert make_conditions(loaded, "cpu", dtype="float32").of(["a red cat"], [""]).embeddings.isfinite().all()
    assert loaded.load_vae() is not None
    checked = Workflow(workflow.parse(arguments(folder), workflow.PRESETS, "workflow.py"))
    checked.check()
    assert not ray.is_initialized()
