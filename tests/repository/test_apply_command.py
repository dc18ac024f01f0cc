"""`harmonica apply`: pipelines drawn with and without a plan, as their routers were trained."""

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from tiny_pipeline_folder import make_pipeline

import harmonica
from harmonica.__main__ import main

PROMPTS = ["a red cat", "the moon"]


def test_a_router_is_judged_by_the_call_that_it_was_trained_for(tmp_path, capsys, monkeypatch):
    """Chroma's default guidance is 5, its default size 1024."""
    folder, router, called = tmp_path / "pipeline", tmp_path / "router", []
    pipe = make_pipeline()
    pipe.save_pretrained(folder)
    call = {"num_inference_steps": 6, "height": 32, "width": 48}
    even = harmonica.EvenSteps(speedup=1.5)
    harmonica.train_pipeline(pipe, PROMPTS, even, call=call | {"output_type": "latent"}).save(router)
    own = diffusers.ChromaPipeline.__call__

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.ChromaPipeline, "__call__", spied)
    output = tmp_path / "both.png"
    asked = [f"--pipeline={folder}", f"--router={router}", f"--output={output}", "--device=cpu"]
    assert main(["apply", *asked, "--prompts", *PROMPTS]) == 0
    assert "x as fast; ideal speedup 1.4" in capsys.readouterr().out
    for given in called:
        assert {name: given[name] for name in call} == call and "guidance_scale" not in given
    assert len(called) == 2 and Image.open(output).size == (2 * 48, 2 * 32)


class _Videos:
    """A pipeline of videos, whose second frame differs under a plan."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs

    def to(self, _: Any) -> "_Videos":
        return self

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(self, subjects: list[str], **_: Any) -> Any:
        return self.outputs.pop(0)


def frames(*values: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in values]


@pytest.mark.parametrize("has_frames", [True, False])
def test_videos_are_compared_frame_by_frame(tmp_path, capsys, monkeypatch, has_frames):
    (tmp_path / "model_index.json").write_text("{}")
    outputs = [SimpleNamespace(frames=[frames(9, 20, 30)]), SimpleNamespace(frames=[frames(10, 30, 31)])]
    pipe = _Videos(outputs if has_frames else [SimpleNamespace(audios=[])])
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    for name, result in (("apply", None), ("remove", None), ("even_speedup", 1.5)):
        monkeypatch.setattr(f"harmonica.cli.apply.{name}", lambda *_, result=result, **__: result)
    output = tmp_path / "both.png"
    asked = [f"--pipeline={tmp_path}", "--speedup=1.8", f"--output={output}", "--device=cpu"]
    if not has_frames:
        assert main(["apply", *asked, "--prompts", "a cat"]) == 2
        assert "pipeline is a _Videos: give one that makes images or videos" in capsys.readouterr().err
        return
    assert main(["apply", *asked, "--prompts", "a cat"]) == 0
    said = capsys.readouterr().out
    # Frames that differ by 1, 10 and 1 of 255.
    mean = np.mean([10 * np.log10(255**2 / change**2) for change in (1, 10, 1)])
    assert "for 1 videos" in said and f"{mean:.1f} dB PSNR from the plain images, mean of 3" in said
    pixels = np.asarray(Image.open(output))
    assert pixels.shape == (8, 6, 3) and {*pixels[:4].flat} == {20} and {*pixels[4:].flat} == {30}
