"""Compare this implementation with recorded numbers, key by key.

    python -m harmonica.reference DIR [--tolerance 1e-5]

DIR holds `case.json`, `dit_official.pt`, `router_official.pt` and `golden.safetensors`. One line a
key with its relative error; exit code 1 if any exceeds the tolerance, 2 if the folder is unusable.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from harmonica.checkpoints import load_weights, read_released_router, read_tensors
from harmonica.diffusion import respaced_timesteps
from harmonica.iepo import image_error_proxy
from harmonica.models.dit import DiT, DiTConfig
from harmonica.router import Router
from harmonica.samplers import Ddim, SamplerConfig, guide
from harmonica.sampling import sample
from harmonica.sdt import SdtConfig, SdtTrainer, freeze

_INPUTS = ("noise", "labels", "sdt.noise", "sdt.labels")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recorded key against ours."""

    key: str
    error: float
    """||ours - recorded|| / ||recorded||, infinite where shapes differ or a value is not a number."""


def _model(case: dict[str, Any], folder: Path) -> DiT:
    shape = case["model"]
    config = DiTConfig(
        sample_size=shape["input_size"],
        patch_size=shape["patch_size"],
        in_channels=shape["in_channels"],
        out_channels=2 * shape["in_channels"],
        num_layers=shape["depth"],
        num_attention_heads=shape["num_heads"],
        attention_head_dim=shape["hidden_size"] // shape["num_heads"],
        num_embeds_ada_norm=shape["num_classes"],
    )
    model = DiT(config)
    load_weights(model, folder / "dit_official.pt")
    freeze(model)
    return model.double()


class _Case:
    """Everything of one case that several keys need."""

    def __init__(self, folder: Path) -> None:
        self.case = json.loads((folder / "case.json").read_text())
        self.golden: dict[str, Tensor] = read_tensors(folder / "golden.safetensors")
        self.model = _model(self.case, folder)
        self.logits = read_released_router(folder / "router_official.pt").double()
        config = SamplerConfig(
            num_inference_steps=self.case["num_sampling_steps"],
            guidance_scale=self.case["cfg_scale"],
            guidance_channels="first_three",
            clip_sample=False,
        )
        self.sampler = Ddim(self.model, config)
        self.noise, self.labels = self.golden["noise"], self.golden["labels"]

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Our value of every key, cheap ones first."""
        yield "timesteps", torch.tensor(respaced_timesteps(self.case["num_sampling_steps"]))
        yield from self._forward()
        router = Router.from_logits(self.logits)
        plan = router.plan(self.case["threshold"])
        yield "router.logits", router.logits()
        yield "plan.compute", plan.to_tensor().double()
        yield "ddim.full", sample(self.sampler, self.noise, self.labels)
        yield "ddim.cached", sample(self.sampler, self.noise, self.labels, plan)
        for kind in ("cumulative", "leave_one_out"):
            yield (
                f"iepo.{kind}",
                image_error_proxy(
                    self.sampler, router, self.noise, self.labels, kind=kind, threshold=self.case["threshold"]
                ),
            )
        yield from self._sdt()

    @torch.inference_mode()
    def _forward(self) -> Iterator[tuple[str, Tensor]]:
        n = len(self.noise)
        for t in (0, 250, 999):
            yield f"forward.t{t}", self.model(self.noise, torch.full((n,), t), self.labels)
        x, condition = self.sampler.start(self.noise, self.labels)
        output = self.model(x, torch.full((2 * n,), 500), condition)
        yield "cfg.t500", guide(output, self.case["cfg_scale"], "first_three", self.model.in_channels)

    def _sdt(self) -> Iterator[tuple[str, Tensor]]:
        config = SdtConfig(
            beta=self.case["beta_l1"],
            learning_rate=self.case["lr"],
            threshold=self.case["threshold"],
            clamp=self.case["clamp"],
        )
        router = Router.from_logits(self.logits)
        trainer = SdtTrainer(self.sampler, router, config)
        lambda_T = self.golden["iepo.cumulative"]
        gradients: dict[int, Tensor] = {}
        records, latents = [], []
        for epoch in range(self.case["epochs"]):
            epoch_records, final = trainer.train_trajectory(
                self.golden["sdt.noise"][epoch],
                self.golden["sdt.labels"][epoch],
                lambda_T,
                on_gradient=lambda i, grad: gradients.setdefault(i, grad.clone()),
            )
            records.append(epoch_records)
            latents.append(final)
        for name in ("mse", "l1", "loss"):
            yield (
                f"sdt.{name}",
                torch.tensor(
                    [[getattr(record, name) for record in row] for row in records], dtype=torch.float64
                ),
            )
        yield "sdt.grads_first_epoch", torch.stack([gradients[i] for i in sorted(gradients)])
        yield "sdt.final_latents", torch.stack(latents)
        yield "sdt.router_logits_after", router.logits()


def _relative_error(ours: Tensor, recorded: Tensor) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    ours, recorded = ours.double(), recorded.double()
    error = (ours - recorded).norm() / recorded.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float("inf") if error.isnan() else error.item()


def compare(folder: Path) -> Iterator[Comparison]:
    """Every recorded key that is not an input, in the order computed.

    Raises:
        ValueError: the folder is not a case, or records a key this version does not know.
    """
    for name in ("case.json", "dit_official.pt", "router_official.pt", "golden.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"reference folder {folder} has no {name}: give a folder with all four files")
    case = _Case(folder)
    missing = set(case.golden) - set(_INPUTS)
    for key, ours in case.compute():
        if key in missing:
            missing.discard(key)
            yield Comparison(key, _relative_error(ours, case.golden[key]))
    if missing:
        raise ValueError(
            f"reference folder {folder} records the unknown keys {sorted(missing)}: update this code"
        )


def main(folder: Annotated[Path, tyro.conf.Positional], *, tolerance: float = 1e-5) -> int:
    """Compare with the recorded numbers in FOLDER."""
    worst = 0.0
    try:
        for comparison in compare(folder):
            verdict = "ok" if comparison.error <= tolerance else "DIFFERS"
            print(f"{comparison.key:26} {comparison.error:10.3e}  {verdict}")
            worst = max(worst, comparison.error)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return int(worst > tolerance)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
