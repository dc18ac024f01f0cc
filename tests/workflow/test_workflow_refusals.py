"""What the workflow's command refuses before any work, in one line; and what may change in a resumed run."""

import contextlib
import io
import json
import re
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tiny_dit import make_artifact, write_model

from harmonica.validation.settings import SettingError
from pipelines import workflow
from pipelines.run_state import resume
from pipelines.training.checkpoints import Checkpoints


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fashion", "--promotion.min-speedup=0.5"], ["promotion.min_speedup is 0.5", "give 1 or more"]),
        (["fashion", "--stages", "train", "register"], ["promote is 'gate'", "add the stage evaluate"]),
        (["fashion", "--stages", "train", "register", "evaluate"], ["no evaluation before", "register"]),
        (["--preset", "emoji"], ["--preset is not an option", "first, as in `harmonica-workflow emoji`"]),
        (["fashion", "--preset=emoji"], ["name the preset first, as in `harmonica-workflow emoji`"]),
        (["fashion", "--preset"], ["name the preset first, as in `harmonica-workflow fashion`"]),
        (["fashoin"], ["preset is 'fashoin'", "give one of fashion, emoji, fashion-text, dit-xl-2-256"]),
        (
            ["fashion", "--stages", "evaluate", "train"],
            ["no router yet", "add the stage train before evaluate"],
        ),
        (["fashion", "--train.target-speedup=1.01"], ["train.target_speedup is 1.01", "give 1.016 or more"]),
        (["fashion", "--train.target-speedup=inf"], ["train.target_speedup is inf", "give a number above 1"]),
        (["fashion", "--train.sdt.learning-rate=nan"], ["train.sdt.learning_rate is nan", "give a number"]),
        (["fashion", "--train.start-trajectories=-1"], ["train.start_trajectories is -1", "give 0 or more"]),
        (["fashion", "--train.targets", "1.5", "50"], ["train.targets is 50.0", "reach", "at most"]),
        (
            [
                "fashion",
                "--stages",
                "compare",
                "--compare.targets",
                "1.4",
                "10",
                "--sampler.num-inference-steps=10",
            ],
            ["compare.targets is 10.0", "10 steps", "reach", "at most"],
        ),
        (["fashion", "--stages", "sweep", "--sweep.targets", "90"], ["sweep.targets is 90.0", "at most"]),
        (["fashion", "--stages", "sweep", "--sweep.targets", "1.001"], ["sweep.targets is 1.001", "or more"]),
        (
            ["fashion", "--stages", "sweep", "--sweep.over=target_cur", "--sweep.targets", "0.99"],
            ["sweep.targets is 0.99", "to 0.95", "can reuse"],
        ),
        (
            ["fashion", "--evaluate.transfer", "diffusers"],
            ["evaluate.transfer is diffusers: leave it out", "there is no scheduler"],
        ),
        (["fashion", "--train.batch-size=3"], ["train.batch_size is 3", "give a multiple of"]),
        (["fashion", "--train.sdt.threshold=2"], ["train.sdt.threshold is 2", "between 0 and 1"]),
        (["fashion", "--sampler.num-inference-steps=1"], ["num_inference_steps is 1", "give 2 to 1000"]),
        (["fashion", "--sampler.guidance-scale=99"], ["sampler.guidance_scale is 99", "give 1 to 50"]),
        (["fashion", "--run-id=../x"], ["run_id is '../x'", "give letters"]),
        (["fashion", "--model.path=/no/such"], ["model.path /no/such does not exist", "give builtin:"]),
        (["dit-xl-2-256-t20"], ["model.path DiT-XL-2-256x256.pt does not exist"]),
        (["fashion", "--storage-path=/proc/x"], ["storage_path /proc/x cannot be written", "writable"]),
        (["fashion", "--storage-path=nope://x"], ["storage_path nope://x is of an unknown kind, nope"]),
        (["fashion", "--storage-path=s3://id:hush@b/p"], ["storage_path is 's3://b/p'", "~/.aws gives it"]),
        (["fashion", "--storage-endpoint=http://a:b@c"], ["storage_endpoint is 'http://c'", "http://host"]),
        (["fashion", "--stages", "prompts"], ["stages is ('prompts',)", "takes labels: leave prompts out"]),
        (["fashion-text", "--stages", "train"], ["no embedded prompts yet", "add the stage prompts"]),
        (["fashion-text", "--prompts.path="], ["prompts.path is ''", "give a .txt or .parquet file, or a"]),
        (
            ["fashion-text", "--prompts.max-tokens=8"],
            ["prompts.max_tokens is 8", "takes 16"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not any(a.startswith("--storage-path") for a in arguments):
        arguments = [*arguments, f"--storage-path={tmp_path}"]
    assert workflow.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    for word in words:
        assert word in error
    assert not ray.is_initialized(), "refused before any work starts"


def parquet_of(column: str) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({column: ["a red shoe"]}), stream)
    return stream.getvalue()


@pytest.mark.parametrize("first", ["fashion-text", "pipeline"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "missing.txt",
            None,
            "cannot be read (FileNotFoundError): give a .txt or .parquet file, or a folder",
        ),
        ("empty.txt", b"", "holds no prompts: give at least one line of text"),
        ("blank.txt", b"\n  \n\t\n", "holds no prompts: give at least one line of text"),
        ("folder/", None, "holds neither .parquet nor .txt: give such a file or a folder of them"),
        ("prompts.pt", b"of another kind", "holds neither .parquet nor .txt: give such a file or a folder"),
        (
            "other.parquet",
            parquet_of("caption"),
            "prompts.column is 'prompt': give a column of text, of caption",
        ),
        ("blank.parquet", b"PAR1", "cannot be read (ArrowInvalid): give a .txt or .parquet file"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_before_any_work(
    first: str, name: str, content: bytes | None, words: str, tmp_path: Path, folder: Path
) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    arguments = [first, f"--prompts.path={path}", f"--storage-path={tmp_path / 'runs'}", "--run-id=r1"]
    if first == "pipeline":
        arguments.append(f"--model.path={folder}")
    if "column" in words:
        arguments.append("--prompts.column=prompt")
    config = workflow.parse(arguments, workflow.PRESETS, "workflow.py")
    with pytest.raises(ValueError, match=re.escape(words)):
        workflow.Workflow(config).check()
    assert not ray.is_initialized()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stages", "sweep", "--sweep.over=target_cur"],
        ["--stages", "compare", "--train.target-psnr=40", "--train.target-speedup=0"],
        ["--train.target-cur=0.4", "--train.target-speedup=0"],
        ["--train.target-speedup=1.016"],
    ],
)
def test_every_target_of_a_preset_can_be_another(arguments: list[str], tmp_path: Path) -> None:
    given = ["fashion", f"--storage-path={tmp_path}", "--stages", "train", *arguments]
    workflow.Workflow(workflow.parse(given, workflow.PRESETS, "workflow.py")).check()


@pytest.mark.parametrize("override", ["--train.trajectoris=3", "--train.trajectories=many"])
def test_a_bad_override_exits_2(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        workflow.main(["fashion", override])
    assert exit_.value.code == 2
    assert override.split("=")[0] in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code = workflow.main(["fashion", f"--model.path={tmp_path / 'model'}", f"--storage-path={tmp_path}"])
    assert code == 2
    assert "cannot be read, it may be truncated: fetch it again" in capsys.readouterr().err


def test_a_taken_port_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert workflow.main(["fashion", f"--storage-path={tmp_path}", f"--serve.port={port}"]) == 2
    error = capsys.readouterr().err
    assert f"serve.port is {port}" in error and "give another port" in error


def test_a_run_is_resumed_with_its_own_settings_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    started = workflow.PRESETS["fashion"]().to_dict() | {"seed": 7}
    (run / "config.json").write_text(json.dumps(started))
    (run / "train" / "checkpoints").mkdir(parents=True)
    (run / "train" / "checkpoints" / "000000001-0123456789abcdef.pt").touch()
    assert workflow.main(["fashion", "--run-id=r1", f"--storage-path={tmp_path / 'runs'}"]) == 2
    assert "seed was 7 and is 0: resume run_id r1 with its own settings" in capsys.readouterr().err


def test_how_a_run_is_placed_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    def prepared(*arguments: str) -> workflow.Workflow:
        given = ["fashion", "--run-id=r1", f"--storage-path={tmp_path}", "--stages", "train", *arguments]
        made = workflow.Workflow(workflow.parse(given, workflow.PRESETS, "workflow.py"))
        made.check()
        return made

    first = prepared()
    resume.begin(first.config, first.storage)
    Checkpoints.of_training(first.storage).save(1, {})
    prepared("--train.num-workers=1", "--train.placement-strategy=SPREAD", "--train.stall-timeout-s=60")
    with pytest.raises(ValueError, match=r"^train.trajectories was \d+ and is 31: resume run_id r1 with"):
        prepared("--train.trajectories=31")


def test_doing_stages_again_wants_a_run() -> None:
    with pytest.raises(ValueError, match="from is 'train': give the --run-id"):
        workflow.parse(["fashion", "--from=train"], workflow.PRESETS, "workflow.py")


def test_a_router_of_another_step_count_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    make_artifact(model).save(tmp_path / "runs" / "r1" / "router")
    arguments = [
        "fashion",
        "--run-id=r1",
        f"--storage-path={tmp_path / 'runs'}",
        f"--model.path={model.path}",
    ]
    assert workflow.main(arguments) == 2
    steps = "sampler.num_inference_steps is 20 and the router was made for 8"
    assert steps in capsys.readouterr().err


def test_a_setting_that_a_stage_refuses_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: workflow.Workflow, stage: str) -> None:
        raise SettingError("train.target_psnr is 200: the nearest plan that reuses a step is at 46.5 dB here")

    monkeypatch.setattr(workflow.Workflow, "tracked", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(workflow.Workflow, "run", refuse)
    assert workflow.main(["fashion", f"--storage-path={tmp_path}", "--stages", "train"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "error: train.target_psnr is 200: the nearest plan that reuses a step is at 46.5 dB here\n"
    )


def test_evaluation_without_a_router_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workflow.main(["fashion", f"--storage-path={tmp_path}", "--stages", "evaluate"]) == 2
    assert "has no router yet: add the stage train" in capsys.readouterr().err
