"""`python -m harmonica.cli.convert`: weights to the bit, what diffusers makes of them, and what is said."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from tiny_pipeline import make_vae, write_pipeline
from tolerances import of_pass

from harmonica.cli.convert import main
from harmonica.io.safe_load import read_tensors
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT
from harmonica.models.loading import ModelConfig, load_model

SHAPE = DiTConfig(sample_size=8, num_layers=2, num_attention_heads=6, attention_head_dim=64)
"""Of the family's width 384, so that the shape is inferred; small otherwise."""
TIMES = (0, 250, 999)


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A public .pt; `zero=False`, since a silent branch would hide its epsilon."""
    model = DiT(SHAPE)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    path = tmp_path_factory.mktemp("public") / "dit.pt"
    torch.save({"ema": model.state_dict(), "opt": {}}, path)
    return path


@pytest.fixture
def convert(capsys):
    """Exit code and what was said."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def folder(public, tmp_path, convert) -> Path:
    assert convert(public, tmp_path / "folder", "--to", "diffusers")[0] == 0
    return tmp_path / "folder"


@torch.inference_mode()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([7, 1000])
    values = [model(noise, torch.full((2,), t), labels) for t in TIMES]
    return torch.stack([value if isinstance(value, torch.Tensor) else value.sample for value in values])


def moved(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def ours(path: Path) -> DiT:
    return load_model(ModelConfig(path=str(path))).model


def theirs(folder: Path) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)


def test_a_folder_written_by_us_is_the_same_function_in_diffusers(folder, public):
    assert ours(public).config == SHAPE
    reference = outputs(theirs(folder))
    assert moved(outputs(ours(folder)), reference) < of_pass(torch.float32)
    assert ours(folder).config.norm_eps == 1e-6 == theirs(folder).config.norm_eps
    assert moved(outputs(ours(public)), reference) > 1e-3  # the public code is another function
    assert ours(folder).fingerprint() == ours(public).fingerprint()


def test_there_and_back_is_the_same_to_the_bit(folder, public, tmp_path, convert):
    state = read_tensors(public)["ema"]
    for name in ("back.pt", "back.safetensors"):
        assert convert(folder, tmp_path / name, "--to", "public")[0] == 0
        back = read_tensors(tmp_path / name)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)
    assert torch.equal(outputs(ours(tmp_path / "back.pt")), outputs(ours(public)))


def test_it_says_which_function_each_side_is_and_how_far_apart(public, tmp_path, convert):
    _, said = convert(public, tmp_path / "folder", "--to", "diffusers")
    assert re.search(r"wrote .*folder: 2 layers of width 384, [\d,]{9,} parameters", said)
    assert "frequencies half (the public code) -> half - 1 (diffusers)" in said
    percent = float(re.search(r"outputs move by ([\d.]+)%", said)[1])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = noise, torch.tensor([500]), torch.tensor([0])
    with torch.inference_mode():
        wanted = moved(ours(tmp_path / "folder")(*inputs), ours(public)(*inputs))
    assert percent == pytest.approx(100 * wanted, abs=0.006)
    assert percent > 0.1
    assert "no VAE" in said
    _, said = convert(tmp_path / "folder", tmp_path / "again", "--to", "diffusers")
    assert "half - 1 (diffusers), epsilon 1e-06, as before" in said
    _, said = convert(public, tmp_path / "again.pt", "--to", "public")
    assert "half (the public code), epsilon 1e-06, as before" in said


def test_an_epsilon_that_the_public_code_does_not_have_is_said(tmp_path, convert):
    write_pipeline(tmp_path / "pipeline")
    _, said = convert(tmp_path / "pipeline", tmp_path / "dit.pt", "--to", "public")
    assert "half - 1 (diffusers) -> half (the public code)" in said
    assert "epsilon of the MLP norms 1e-05 -> 1e-06" in said


def test_the_pipeline_loads_and_draws(public, tmp_path, convert):
    make_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "labels.txt").write_text("\n".join(f"name {i}, number {i}" for i in range(1000)))
    more = ("--vae", tmp_path / "vae", "--labels", tmp_path / "labels.txt")
    code, said = convert(public, tmp_path / "folder", "--to", "diffusers", *more)
    assert code == 0
    assert "no VAE" not in said
    pipeline = DiTPipeline.from_pretrained(tmp_path / "folder")
    assert pipeline.labels["number 17"] == 17
    assert (pipeline.scheduler.config.clip_sample, pipeline.scheduler.config.beta_end) == (False, 0.02)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 666, 333, 0]  # the public code's
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline([3], num_inference_steps=2, output_type="np", guidance_scale=4.0)
    assert drawn.images.shape == (1, 16, 16, 3)
    loaded = load_model(ModelConfig(path=str(tmp_path / "folder")))
    assert loaded.class_names[17] == "name 17, number 17"
    assert loaded.load_vae() is not None


def test_a_folders_vae_scheduler_and_labels_come_along(tmp_path, convert):
    write_pipeline(tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps_offset": 1}))
    assert convert(tmp_path / "pipeline", tmp_path / "copy", "--to", "diffusers")[0] == 0
    copy = load_model(ModelConfig(path=str(tmp_path / "copy")))
    assert copy.scheduler == json.loads(config.read_text())
    assert copy.vae_folder == tmp_path / "copy" / "vae"
    DiTPipeline.from_pretrained(tmp_path / "copy")


def test_precision_is_kept(public, tmp_path, convert):
    half = {name: value.bfloat16() for name, value in read_tensors(public)["ema"].items()}
    save_file(half, tmp_path / "half.safetensors")
    assert convert(tmp_path / "half.safetensors", tmp_path / "folder", "--to", "diffusers")[0] == 0
    assert convert(tmp_path / "folder", tmp_path / "back.pt", "--to", "public")[0] == 0
    stored = read_tensors(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    back = read_tensors(tmp_path / "back.pt")
    assert all(torch.equal(back[name], value) for name, value in half.items())


def test_a_model_of_another_width_is_given_its_shape(tiny_dit, tmp_path, convert):
    torch.save(tiny_dit.float().state_dict(), tmp_path / "dit.pt")
    arguments = (tmp_path / "dit.pt", tmp_path / "folder", "--to", "diffusers")
    code, said = convert(*arguments)
    assert (code, "bare checkpoint of width 48" in said) == (2, True)
    fields = ("sample_size", "num_layers", "num_attention_heads", "attention_head_dim", "num_embeds_ada_norm")
    shape = [
        text
        for name in fields
        for text in (f"--shape.{name.replace('_', '-')}", getattr(tiny_dit.config, name))
    ]
    code, said = convert(*arguments, "shape:di-t-config", *shape)
    assert code == 0
    assert "DiTPipeline guides by class 1000, the null class here is 10" in said
    assert ours(tmp_path / "folder").config.num_attention_heads == 4


def test_moved_positions_have_no_diffusers_form(public, tmp_path, convert):
    state = dict(read_tensors(public)["ema"])
    torch.save(state | {"pos_embed": state["pos_embed"] + 0.05}, tmp_path / "dit.pt")
    code, said = convert(tmp_path / "dit.pt", tmp_path / "folder", "--to", "diffusers")
    assert (code, "pos_embed is up to 0.05 away from the sine-cosine table" in said) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.pt"]  # nothing half-written


def test_what_is_there_is_replaced_only_on_request(folder, public, tmp_path, convert):
    (folder / "mine.txt").write_text("kept")
    code, said = convert(public, folder, "--to", "diffusers")
    assert (code, "exists: give another path, or --overwrite" in said) == (2, True)
    assert (folder / "mine.txt").exists()
    assert convert(folder, folder, "--to", "diffusers", "--overwrite")[0] == 0  # onto itself
    assert not (folder / "mine.txt").exists()
    assert moved(outputs(ours(folder)), outputs(theirs(folder))) < of_pass(torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
    (tmp_path / "home").mkdir()
    code, said = convert(public, tmp_path / "home", "--to", "diffusers", "--overwrite")
    assert (code, "is a folder without a transformer" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{public}", "out", "--to", "public"), "/out is no checkpoint file: give a name in .pt or"),
        (("{public}", "a.pt", "--to", "public", "--vae", "x"), "vae x has no place in a public checkpoint"),
        (("{public}", "{public}", "--to", "diffusers"), "exists and is of another kind: give another path"),
        (("/none.pt", "out", "--to", "diffusers"), "model.path /none.pt does not exist: give"),
        (("{public}", "out", "--to", "diffusers", "--vae", "/none"), "vae /none does not exist"),
        (("{public}", "out", "--to", "diffusers", "--labels", "{labels}"), "has 2 names: give one for each"),
        (
            ("{public}", "out", "--to", "diffusers", "--labels", "/none.txt"),
            "labels /none.txt cannot be used",
        ),
    ],
)
def test_unusable_input_ends_with_its_cure(
    public, tmp_path, convert, monkeypatch: pytest.MonkeyPatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog"}')
    code, said = convert(*(text.format(public=public, labels="labels.json") for text in arguments))
    assert code == 2
    assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]
