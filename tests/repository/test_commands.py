"""`harmonica.cli.train` and `harmonica.cli.sample` as a researcher runs them, without Ray."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_dit import write_model
from tiny_pipeline import write_pipeline
from tolerances import of_training

import harmonica
from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.cli import sample, train
from harmonica.cli.train import TrainCommand
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig
from harmonica.training.config import TrainingConfig
from harmonica.training.presets import RECIPES
from harmonica.training.sdt_config import SdtConfig

CASE = Path(__file__).parents[1] / "assets" / "case_a"
SIX_STEPS = SamplerConfig(num_inference_steps=6)


@pytest.fixture
def command(tmp_path) -> TrainCommand:
    settings = TrainingConfig(
        trajectories=4, batch_size=4, iepo_every=2, sdt=SdtConfig(learning_rate=0.1), initial="normal"
    )
    model = write_model(tmp_path / "model")
    return TrainCommand(output=tmp_path / "run", model=model, sampler=SIX_STEPS, train=settings)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quiet(text: str) -> None:
    pass


def test_training_leaves_a_router_its_picture_and_its_curve(command):
    said: list[str] = []
    artifact = train.train(command, said.append)
    assert torch.equal(RouterArtifact.load(command.output / "router").logits_TB, artifact.logits_TB)
    assert Image.open(command.output / "router.png").size[0] > 100
    assert [line["trajectory"] for line in lines_of(command.output)] == [1, 2, 3, 4]
    assert said[-2].startswith("training the router: 4 of 4 trajectories") and said[-1].startswith(
        f"router in {command.output}: CUR"
    )


def test_an_interrupted_training_goes_on_bit_for_bit(command, tmp_path):
    whole = train.train(dataclasses.replace(command, output=tmp_path / "whole"), quiet)

    class Interrupted(Exception):
        pass

    def interrupt(text: str) -> None:
        if text.startswith("training the router: 3 of 4"):
            raise Interrupted

    often = dataclasses.replace(command, train=dataclasses.replace(command.train, checkpoint_interval_s=0.0))
    train._SAY_EVERY_S, before = -1.0, train._SAY_EVERY_S
    try:
        with pytest.raises(Interrupted):
            train.train(often, interrupt)
    finally:
        train._SAY_EVERY_S = before
    assert torch.load(command.output / "state.pt", weights_only=True)["members"][0]["trajectory"] == 2
    resumed = train.train(often, quiet)
    assert torch.equal(resumed.logits_TB, whole.logits_TB)
    assert [line["trajectory"] for line in lines_of(command.output)] == [1, 2, 3, 4], "none twice"
    with pytest.raises(ValueError, match=r"^seed was 0 and is 1: resume the run in .* with its own"):
        train.train(dataclasses.replace(often, seed=1), quiet)


def test_the_recorded_settings_have_no_credentials(command, monkeypatch):
    path, load = command.model.path, train.load_model

    def load_local(model, device):
        return load(dataclasses.replace(model, path=path), device)

    monkeypatch.setattr(train, "load_model", load_local)
    model = dataclasses.replace(command.model, path="s3://id:hush@bucket/model")
    train.train(dataclasses.replace(command, model=model), quiet)
    recorded = json.loads((command.output / "settings.json").read_text())
    assert recorded["model"]["path"] == "s3://bucket/model"
    other = dataclasses.replace(model, path="s3://id:hush@bucket/other")
    with pytest.raises(ValueError, match=r"^model.path was 's3://bucket/model' and is 's3://bucket/other'"):
        train.train(dataclasses.replace(command, model=other), quiet)


LEAN = ("--train.shard-model", "--train.micro-batch-size=1", "--train.sdt.activation-checkpointing")


@pytest.mark.slow
@pytest.mark.parametrize("lean", [(), LEAN], ids=["plain", "lean"])
def test_torchrun_trains_the_same_router_on_two_processes(command, tmp_path, lean):
    alone = train.train(command, quiet)
    arguments = [
        f"--output={tmp_path / 'two'}",
        f"--model.path={command.model.path}",
        "--sampler.num-inference-steps=6",
        "--train.trajectories=4",
        "--train.batch-size=4",
        "--train.iepo=leave_one_out",
        "--train.iepo-every=2",
        "--train.initial=normal",
        "--train.start-trajectories=0",
        "--train.target-speedup=0",
        "--train.choice-trajectories=0",
        "--train.forecast.trajectories=0",
        "--train.sdt.penalty=count",
        "--train.sdt.learning-rate=0.1",
        "--train.sdt.threshold=0.1",
        "--train.sdt.reuse=hold",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "harmonica.cli.train", "fashion", *arguments, *lean],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("router in") == 1, "only rank 0 speaks"
    together = RouterArtifact.load(tmp_path / "two" / "router")
    torch.testing.assert_close(together.logits_TB, alone.logits_TB, **of_training(0.1, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.trajectories=0"], "train.trajectories is 0: give 1 or more"),
        (["--device=cuda"], "device is cuda and torch finds no CUDA device"),
        (["--sampler.name=diffusers"], "there is no scheduler: give a model.path"),
        (["nonsense"], "preset is 'nonsense': give one of fashion, emoji, fashion-text"),
        (["dit-xl-2-512-t20"], "model.path DiT-XL-2-512x512.pt does not exist"),
        (
            ["--model.dtype=bfloat16", "--train.initial=normal", "--train.batch-size=-2"],
            "train.batch_size is -2",
        ),
    ],
)
def test_bad_input_to_training_is_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    assert train.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_presets_are_the_papers():
    released = RECIPES["dit-xl-2-256-t10"]()
    assert (released.train.trajectories, released.train.iepo_every) == (2000, 50), "20,000 updates, C = 500"
    assert (released.train.sdt.beta, released.train.sdt.learning_rate) == (7e-8, 0.01)
    assert released.sampler.guidance_scale == 1.5 and released.train.sdt.threshold == 0.1
    cur = {name: make().train.target_cur for name, make in RECIPES.items() if name.startswith("dit")}
    assert all(cur.pop(name) == 0 for name in ("dit-xl-2-256", "dit-xl-2-512")), "they have learned steps"
    assert cur == {
        "dit-xl-2-256-t10": 0,  # its beta is known
        "dit-xl-2-256-t20": 0.375,
        "dit-xl-2-256-t50": 0.2368,
        "dit-xl-2-512-t20": 0.2598,
    }
    text = {name: make() for name, make in RECIPES.items() if name.startswith("pixart")}
    assert {recipe.sampler.guidance_scale for recipe in text.values()} == {4.5}
    learned = {name: text.pop(name) for name in [*text] if re.fullmatch(r"pixart-\w+-(\d+|2k)", name)}
    assert {name.rsplit("-", 1)[1] for name in learned} == {"256", "512", "1024", "2k"}
    forecasts = {name: recipe.train.forecast for name, recipe in learned.items()}
    assert all(each.segments and each.activation_checkpointing for each in forecasts.values())
    assert {name for name in forecasts if forecasts[name].rows_at_once == 1} == {
        "pixart-alpha-1024",
        "pixart-sigma-2k",
    }
    assert {recipe.sampler.num_inference_steps for recipe in learned.values()} == {20}
    steps = {name.rsplit("-", 1)[1]: recipe.sampler.num_inference_steps for name, recipe in text.items()}
    assert steps == {"dpm20": 20, "iddpm100": 100, "sa25": 25}


@pytest.mark.parametrize(
    ("path", "name", "folder"),
    [("builtin:fashion-dit", "Ankle boot", CHAMPION), ("builtin:emoji-dit", "heart", EMOJI_CHAMPION)],
    ids=["fashion", "emoji"],
)
def test_sampling_with_a_builtin_champion(tmp_path, capsys, path, name, folder):
    output = tmp_path / "grid.png"
    given = [f"--model.path={path}", f"--output={output}", "--rounds=1", "--classes", name, "3"]
    assert sample.main(given) == 0
    said = capsys.readouterr().out
    assert "ddim, 20 steps, guidance 2" in said
    champion = RouterArtifact.load(folder)
    shown = f"CUR {champion.plan.cur:.1%}", f"ideal {champion.ideal_speedup:.2f}x"
    for word in ("full", "cached", *shown, "measured"):
        assert word in said
    assert min(Image.open(output).size) > 200


def test_sampling_a_model_that_takes_prompts(tmp_path, capsys):
    asked = ["--model.path=builtin:fashion-pixart", f"--output={tmp_path / 'x.png'}", "--rounds=1"]
    assert sample.main([*asked, "--num-inference-steps=2", "--prompts", "a coat", "a dark sneaker"]) == 0
    assert "for 2 images" in capsys.readouterr().out
    assert min(Image.open(tmp_path / "x.png").size) > 100
    for given in ([], ["--classes", "coat"]):
        assert sample.main([*asked, *given]) == 2
        assert "takes prompts: give some texts with --prompts" in capsys.readouterr().err
    assert sample.main(["--prompts", "a coat"]) == 2
    assert (
        "prompts is ('a coat',) and the model in builtin:fashion-dit takes classes" in capsys.readouterr().err
    )


def test_a_released_router_gives_the_recorded_plan(tmp_path, capsys, tiny_shape):
    """The public `.pt` and the released router `.pt` go in; its plan is the recorded one."""
    command = sample.SampleCommand(
        router=str(CASE / "router_official.pt"),
        model=ModelConfig(path=str(CASE / "dit_official.pt"), shape=tiny_shape),
        classes=("1", "2"),
        rounds=1,
        output=tmp_path / "out.png",
    )
    latents = sample.run(command)
    assert load_file(tmp_path / "out.safetensors").keys() == latents.keys() == {"full", "cached"}
    assert "give --model.vae for pictures" in capsys.readouterr().out
    router = sample.load_router(command, load_model(command.model))
    recorded = load_file(CASE / "golden.safetensors")["plan.compute"]
    assert router is not None and torch.equal(router.plan.to_tensor(), recorded.bool())


def test_even_steps_need_no_router(tmp_path, capsys):
    asked = [f"--output={tmp_path / 'x.png'}", "--classes", "1", "--rounds=1", "--sampler=dpm-solver++"]
    assert sample.main([*asked, "--router=even-1.5x", "--num-inference-steps=12"]) == 0
    said = capsys.readouterr().out
    macs = load_model(ModelConfig()).model.macs()
    plan = harmonica.EvenSteps(speedup=1.5).plan(12, macs)
    assert "dpm-solver++, 12 steps" in said
    assert f"CUR {plan.cur:.1%}, ideal {plan.ideal_speedup(macs):.2f}x" in said
    assert sample.main([*asked, "--router=even-1x"]) == 2
    assert "router is 'even-1x': give a speed above 1, such as even-1.8x" in capsys.readouterr().err
    assert sample.main([*asked, "--router=even-9x", "--num-inference-steps=4"]) == 2
    assert "speedup is 9.0: 4 steps of this transformer reach" in capsys.readouterr().err


def test_another_sampler_needs_the_flag(tmp_path, capsys):
    asked = [f"--output={tmp_path / 'x.png'}", "--classes", "1", "--rounds=1", "--sampler=dpm-solver++"]
    assert sample.main(asked) == 2
    error = capsys.readouterr().err
    assert "sampler.name is dpm-solver++ and the router was made for ddim" in error
    assert "allow_other_sampler" in error
    assert sample.main([*asked, "--allow-other-sampler"]) == 0
    assert "dpm-solver++, 20 steps" in capsys.readouterr().out
    assert sample.main([*asked, "--allow-other-sampler", "--num-inference-steps=10"]) == 2
    assert "num_inference_steps is 10 and the router was made for 20" in capsys.readouterr().err


def test_a_diffusers_folder_is_sampled_as_its_pipeline_does(tmp_path, capsys):
    folder = write_pipeline(tmp_path / "pipeline")
    asked = [f"--model.path={folder}", f"--output={tmp_path / 'x.png'}", "--rounds=1"]
    assert sample.main([*asked, "--classes", "goldfish", "Tinca tinca", "--num-inference-steps=4"]) == 0
    said = capsys.readouterr().out
    assert "diffusers, 4 steps, guidance 4" in said and "cached" not in said
    assert sample.main([*asked, "--classes", "goldfsh"]) == 2
    assert "classes has 'goldfsh': give a class name (near are goldfish)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(650)
def test_an_xl_shaped_model_trains_samples_saves_and_reloads(tmp_path):
    """One of DiT-XL/2's 28 layers; `python -m tests.benchmarks.xl` is the whole model."""
    # Without AVX-512, products of bfloat16 this wide take minutes.
    has_bfloat16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    dtypes = ("float32", "bfloat16") if has_bfloat16 else ("float32",)
    script = [sys.executable, "-m", "tests.benchmarks.xl", "--layers=1", f"--folder={tmp_path}"]
    script += ["--dtypes", *dtypes]
    root = Path(__file__).parents[2]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stderr
    for dtype in dtypes:
        assert f"{dtype:9} reload router and model, sample" in done.stdout
