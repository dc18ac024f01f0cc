"""A model spread over two processes trains the router of a whole one."""

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_pixart import make_batch, make_pixart
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer, freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.memory_model import Shape
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.sharding import shard_weights, sharded_layers
from harmonica.training.trainer import RouterTrainer

STEPS = SamplerConfig(num_inference_steps=3, guidance_scale=1.5, clip_sample=False)
PLAIN = TrainingConfig(
    batch_size=4, iepo_every=2, initial="normal", sdt=SdtConfig(threshold=0.4, learning_rate=0.1)
)
LEAN = replace(PLAIN, micro_batch_size=1, sdt=replace(PLAIN.sdt, activation_checkpointing=True))
CASES = {"dit float64": PLAIN, "dit bfloat16": LEAN, "pixart float64": PLAIN, "pixart float64, lean": LEAN}


def make(case: str) -> tuple[BranchedTransformer, Tensor, Any]:
    """A model, and four rows for it."""
    if case.startswith("pixart"):
        return make_pixart("sigma"), *make_batch("sigma", 4)
    shape = DiTConfig(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=24, num_embeds_ada_norm=10
    )
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    noise = torch.from_numpy(SampleKeys.of(0, range(4)).start_noise((4, 8, 8)))
    if "float64" in case:
        return model.double(), noise.double(), torch.arange(4)
    for name, parameter in model.named_parameters():
        if not name.startswith(model.full_precision_parts):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model, noise, torch.arange(4)


def trained(model: BranchedTransformer, case: str, noise: Tensor, condition: Any) -> dict[str, Any]:
    """Two trajectories, the first after a refresh of lambda, and samples before and after the last."""
    sampler, config = make_sampler(model, STEPS), CASES[case]
    run = RouterTrainer(sampler, config, seed=0)
    if noise.dtype == torch.float64:
        run.context.sdt = SdtTrainer(sampler, run.router.double(), config.sdt)
    batch = Batch(noise, condition, SampleKeys.of(0, range(len(noise))))
    run.train_one(batch)
    before = sample(sampler, noise, condition, run.router.plan(0.4))
    metrics = run.train_one(batch)
    after = sample(sampler, noise, condition)
    with torch.no_grad():
        alone = model(noise, torch.full((len(noise),), 500), condition)
    return {
        "logits": run.router.logits(),
        "lambda": run.state()["lambda"],
        "mse": torch.tensor(metrics["mse"]),
        "images": torch.cat([before, after]),
        "forward": alone,
    }


def gathered(model: nn.Module) -> int:
    """Layers whose weights are all here now."""
    weights = [next(layer.parameters()) for layer in sharded_layers(model)]
    return sum(not isinstance(weight.data, DTensor) for weight in weights)


def watch(model: BranchedTransformer) -> list[int]:
    """The number of layers gathered as each branch begins."""
    seen: list[int] = []

    def watched(compute):
        def counting(hidden, conditioning):
            seen.append(gathered(model))
            return compute(hidden, conditioning)

        return counting

    for branch in model.branches:
        branch.compute = watched(branch.compute)  # type: ignore[method-assign]
    return seen


def work(rank: int, folder: str) -> None:
    """One of two processes: every case with the whole model, then with half of it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, dict[str, Any]] = {}
    for case in CASES:
        results[case] = {}
        for how in ("whole", "shared"):
            model, noise, condition = make(case)
            if how == "shared":
                fingerprint = model.fingerprint()
                shard_weights(model)
                assert model.fingerprint() == fingerprint
                seen = watch(model)
            mine = slice(2 * rank, 2 * rank + 2)
            results[case][how] = trained(model, case, noise[mine], condition[mine])
        kept = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
        results[case] |= {"bytes": sum(p.nbytes for p in kept), "seen": seen, "end": gathered(model)}
    torch.save(results, f"{folder}/{rank}.pt")
    # The last collectives may still run in gloo's threads, here or in the other process. And layers and their
    # meshes hold process groups, which would go, with those threads, only as the interpreter ends.
    del model, noise, condition, kept
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_shared_model_trains_and_samples_as_a_whole_one(ranks, case: str) -> None:
    for results in ranks:
        whole, shared = results[case]["whole"], results[case]["shared"]
        for key, value in whole.items():
            torch.testing.assert_close(shared[key], value, rtol=1e-6, atol=1e-9)
    logits = [results[case]["shared"]["logits"] for results in ranks]
    assert torch.equal(*logits), "both processes end with the same router"


@pytest.mark.parametrize("case", [case for case in CASES if "float64" in case])
def test_two_processes_train_the_router_of_one(ranks, case: str) -> None:
    model, noise, condition = make(case)
    alone = trained(model, case, noise, condition)
    for key in ("logits", "lambda", "mse"):
        torch.testing.assert_close(ranks[0][case]["shared"][key], alone[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_process_keeps_its_share_and_gathers_a_layer_at_a_time(ranks, case: str) -> None:
    shape = Shape.of(make(case)[0])
    assert shape.weights(2) < 0.6 * shape.weights()
    for results in ranks:
        # Layers that do not divide evenly are padded.
        assert shape.weights(2) <= results[case]["bytes"] <= 1.03 * shape.weights(2)
        assert results[case]["end"] == 0
        if CASES[case] is PLAIN:
            assert set(results[case]["seen"]) == {0}


def test_a_single_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match=r"train.shard_model is True and there is one process .* torchrun"):
        shard_weights(make("dit float64")[0])
