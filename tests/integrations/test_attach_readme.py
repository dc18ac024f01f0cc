"""README's example of `harmonica.apply`, run as it stands on a small pipeline, in both orders of import."""

import re
from pathlib import Path

import tiny_pixart
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from tiny_pipeline import LINEAR, make_vae
from tiny_text import make_encoder, make_tokenizer

from harmonica.core.artifact import RouterArtifact
from harmonica.models.pixart.model import PixArt
from harmonica.samplers import SamplerConfig, make_sampler
from tests.integrations.test_torchvision_ops import ROOT, outcome, start, write_plugins

PIPELINES = "PixArtAlphaPipeline, PixArtSigmaPipeline, DiTPipeline, FluxPipeline, SanaPipeline"
# Hub name, router, device and file, as README has them.
PLACES = {
    r'from_pretrained\("[^"]+"': 'from_pretrained("{folder}/pipeline"',
    r'"runs/NAME/router"': '"{folder}/router"',
    r'"cuda"': '"cpu"',
    r'"even.png"': '"{folder}/even {name}.png"',
    r'"harmonica.png"': '"{folder}/{name}.png"',
}


def example() -> str:
    """The block of README that applies a plan."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "harmonica.apply(" in block]
    return found


def write_folder(folder: Path) -> None:
    """A PixArt-alpha of 256 pixels with random weights, and a router for it at README's settings."""
    transformer = tiny_pixart.make_transformer("alpha", sample_size=32, patch_size=8).float()
    pipe = tiny_pixart.pipeline_class("alpha")(
        tokenizer=make_tokenizer(),
        text_encoder=make_encoder(),
        vae=make_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**LINEAR),
    )
    pipe.save_pretrained(folder / "pipeline")
    model = PixArt(transformer, text_tokens=120)
    settings = SamplerConfig(name="dpm-solver++", num_inference_steps=20, guidance_scale=4.5)
    logits = torch.randn(20, len(model.branches), generator=torch.Generator().manual_seed(0))
    sampler = make_sampler(model, settings)
    artifact = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})
    artifact.save(folder / "router")


def test_the_example_runs_in_both_orders_of_import(tmp_path):
    """The package after diffusers, as README has it, and before; without torch's plug-ins too then."""
    write_folder(tmp_path)
    plugins, code = write_plugins(tmp_path / "plugins"), example()
    assert code.index("from diffusers") < code.index("import harmonica")
    codes = {
        "after": f"from diffusers import {PIPELINES}\n{code}",
        "before": f"import harmonica.integrations.diffusers_pipeline\n{code}",
    }
    processes = {}
    for name, each in codes.items():
        for pattern, place in PLACES.items():
            each, count = re.subn(pattern, place.format(folder=tmp_path, name=name), each)
            assert count == 1, f"README's example has {pattern} {count} times"
        processes[name] = start(each, plugins, plugins=name == "after")
    for name, process in processes.items():
        exit_code, said = outcome(process)
        assert exit_code == 0, said
        for each in (name, f"even {name}"):
            assert Image.open(tmp_path / f"{each}.png").size == (64, 64)
