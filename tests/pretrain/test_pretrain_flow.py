"""The built-in flow-matching model: its warm start, its teacher, its training and its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="wants transformers: the text encoder is a T5")

from harmonica.builtin import FASHION_PIXART
from harmonica.data.text_encoder import TextEncoder
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers.noise_schedule import alphas_cumprod
from pipelines.pretrain.evaluate_flow_model import FlowSampler, load_flow_pipeline
from pipelines.pretrain.evaluate_text_model import caption_metrics, random_captions
from pipelines.pretrain.flow_matching import FlowPretrainConfig, FlowTask, export
from pipelines.pretrain.flow_model import (
    FlowBatch,
    embed_captions,
    make_flow_model,
    teacher_velocity,
)
from pipelines.pretrain.learning import Learner

FOLDER = Path(__file__).parents[2] / "pipelines" / "pretrain" / "fashion-sd3"
START = "builtin:fashion-dit"


def pictures(n: int) -> np.ndarray:
    """Grey rectangles (n, 1, 28, 28) uint8, lighter and lighter."""
    images = np.zeros((n, 1, 28, 28), np.uint8)
    images[:, :, 6:22, 8:20] = np.linspace(60, 240, n).astype(np.uint8)[:, None, None, None]
    return images


def clean_images(n: int) -> torch.Tensor:
    return torch.from_numpy(pictures(n)).float() / 127.5 - 1


def make_task(**settings) -> FlowTask:
    return FlowTask(FlowPretrainConfig(**settings), pictures(400), np.arange(400) % 10)


def batch_of(clean: torch.Tensor, sigma: float) -> FlowBatch:
    """The clean images at one sigma."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigmas = torch.full((len(clean),), sigma)
    return FlowBatch((1 - sigma) * clean + sigma * noise, sigmas, noise - clean)


def test_a_batch_lies_between_image_and_noise() -> None:
    clean = clean_images(64)
    batch = FlowBatch.draw(clean, torch.Generator().manual_seed(0))
    share = batch.sigmas[:, None, None, None]
    torch.testing.assert_close(batch.images - share * batch.velocity, clean, rtol=0, atol=1e-5)
    assert 0.01 <= batch.sigmas.min() < 0.1 and 0.9 < batch.sigmas.max() <= 1
    torch.testing.assert_close(batch.timesteps, 1000 * batch.sigmas)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_a_teacher_who_knows_the_noise_gives_the_velocity(sigma: float) -> None:
    clean = clean_images(4)
    batch = batch_of(clean, sigma)

    def knowing(noisy, timestep, label):
        """The noise, from the image: what an ideal DiT would predict."""
        signal = torch.from_numpy(alphas_cumprod()).float()[timestep][:, None, None, None]
        return (noisy - signal.sqrt() * clean[[1, 3]]) / (1 - signal).sqrt()

    found = teacher_velocity(knowing, batch, torch.tensor([0, 0]), [1, 3])
    # The teacher's nearest timestep is up to a part in a hundred of sigma away.
    torch.testing.assert_close(found, batch.velocity[[1, 3]], rtol=0, atol=0.02 / sigma)


def test_the_warm_started_model_denoises_before_any_training() -> None:
    dit, model = load_model(ModelConfig()).model, make_flow_model(START, 0)
    encoder = TextEncoder.load(FASHION_PIXART, dtype="float32")
    clean = clean_images(8)
    batch = batch_of(clean, 0.4)
    embedded = embed_captions(encoder, [""] * 8)
    with torch.no_grad():
        taught = teacher_velocity(dit, batch, torch.full((8,), 10), list(range(8)))
        # What the DiT's last layer gives is noise, and what the image stream keeps of it before training.
        found = model(batch.images, *embedded.values(), batch.timesteps)
        noise = batch.velocity + clean
    assert torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0) > 0.6
    assert torch.nn.functional.cosine_similarity(taught.flatten(), batch.velocity.flatten(), dim=0) > 0.9


def test_captions_are_embedded_up_to_their_end() -> None:
    encoder = TextEncoder.load(FASHION_PIXART, dtype="float32")
    embedded = embed_captions(encoder, ["a bag", ""])
    tokens = embedded["prompt_embeds"].abs().sum(-1) > 0
    assert tokens.sum(1).tolist() == [3, 1]
    mean = embedded["prompt_embeds"][0, :3].mean(0)
    torch.testing.assert_close(embedded["pooled_prompt_embeds"][0], mean)


def test_every_parameter_learns_and_the_loss_of_one_batch_falls() -> None:
    task = make_task(steps=10, warmup_steps=1, decay_steps=1)
    learner = Learner(task.make_model(), task.config)
    rows = np.arange(0, 400, 25)
    clean = torch.from_numpy(task.images[rows]).float() / 127.5 - 1
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    losses = []
    for _ in range(4):
        losses.append(task.loss(learner.model, clean, rows, torch.Generator().manual_seed(0)))
        learner.learn(losses[-1])
    assert losses[-1] < 0.8 * losses[0]
    still = [name for name, p in learner.model.named_parameters() if torch.equal(p, before[name])]
    # A key's bias adds the same to a query's every score, which softmax takes away again; and nothing reads
    # the text that the last block would give.
    idle = ("to_k.bias", "add_k_proj.bias", "blocks.11.attn.add_q_proj.bias")
    assert [name for name in still if not name.endswith(idle)] == []


def test_an_exported_checkpoint_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    config = FlowPretrainConfig(storage_path=str(tmp_path), export=str(tmp_path / "folder"))
    model = make_flow_model(START, 1)
    averaged = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint = tmp_path / config.run_id / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    torch.save(
        {"ema": {name: p.detach() for name, p in averaged.items()}, "step": 3}, checkpoint / "state.pt"
    )
    folder = export(config)
    assert json.loads((folder / "training.json").read_text())["training"]["steps_done"] == 3
    pipe = load_flow_pipeline(folder)
    for name, p in pipe.transformer.named_parameters():
        assert torch.equal(p, averaged[f"transformer.{name}"].half().float()), name
    images = FlowSampler(folder).sample_images(["a dark coat"], 2.0, seed=1)
    assert images.shape == (1, 1, 28, 28) and images.std() > 0.1


def test_the_builtin_model_is_small_and_paints_what_it_is_told() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 16e6
    report = json.loads((FOLDER / "report.json").read_text())
    assert report["guidance"]["2"]["label_accuracy"] >= 0.8
    prompts = random_captions(30, seed=7)
    found = caption_metrics(FlowSampler(FOLDER).sample_images(prompts, 4.5, seed=7), prompts)
    assert found["label_accuracy"] >= 0.7 and found["tone_accuracy"] >= 0.7  # of thirty
