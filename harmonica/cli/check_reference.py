"""Compare this implementation with recorded numbers, key by key.

    python -m harmonica.cli.check_reference DIR [--tolerance 1e-5]

DIR holds `case.json`, `dit_official.pt`, `router_official.pt` and `golden.safetensors`. The command prints a
line for each recorded key, with its relative error; the exit code is 1 if any exceeds the tolerance, and 2
if the folder is unusable. A case need not record every key.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.io.paths import local
from harmonica.io.safe_load import load_weights, read_released_router, read_tensors
from harmonica.models.base import freeze
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT
from harmonica.samplers import Ddim, SamplerConfig
from harmonica.training.iepo import IepoKind, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig

_INPUTS = ("noise", "labels", "sdt.noise", "sdt.labels")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The error of our value for one recorded key."""

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
    """Holds the parts of one case that several keys need."""

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
        self.sampler.is_guided = True  # cases have both halves in every mean, also where the scale is 1
        self.router = Router.from_logits(self.logits)
        self.sdt_config = SdtConfig(
            beta=self.case["beta_l1"],
            learning_rate=self.case["lr"],
            threshold=self.case["threshold"],
            clamp=self.case["clamp"],
        )

    def recorded(self, key: str) -> Tensor:
        """Return a recorded input of the keys compared."""
        if key not in self.golden:
            raise ValueError(f"golden.safetensors lacks the input '{key}': add it")
        return self.golden[key]

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return noise and labels."""
        return self.recorded("noise"), self.recorded("labels")

    def compute(self, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield our value of each wanted key that is known, cheap ones first."""
        plan = self.router.plan(self.sdt_config.threshold)
        values: dict[str, Callable[[], Tensor]] = {
            "timesteps": lambda: torch.tensor(self.sampler.timesteps),
            "forward.t0": partial(self._forward, 0),
            "forward.t250": partial(self._forward, 250),
            "forward.t999": partial(self._forward, 999),
            "cfg.t500": partial(self._guided, 500),
            "router.logits": self.router.logits,
            "plan.compute": plan.to_tensor,
            "ddim.full": lambda: sample(self.sampler, *self.inputs),
            "ddim.cached": lambda: sample(self.sampler, *self.inputs, plan),
            "iepo.cumulative": partial(self._lambda, "cumulative"),
            "iepo.leave_one_out": partial(self._lambda, "leave_one_out"),
        }
        for key, value in values.items():
            if key in wanted:
                yield key, value()
        if any(key.startswith("sdt.") for key in wanted):
            yield from self._sdt()

    @torch.inference_mode()
    def _forward(self, t: int) -> Tensor:
        noise, labels = self.inputs
        output_NCHW: Tensor = self.model(noise, torch.full_like(labels, t), labels)
        return output_NCHW

    @torch.inference_mode()
    def _guided(self, t: int) -> Tensor:
        state = self.sampler.start(*self.inputs)
        labels_M = self.model.guided_condition(self.inputs[1])
        return self.sampler.guide(self.model(state.x_MCHW, torch.full_like(labels_M, t), labels_M))

    def _lambda(self, kind: IepoKind) -> Tensor:
        batches = [Batch(*self.inputs)]
        return image_error_proxy(self.sampler, self.router, batches, kind=kind, config=self.sdt_config)

    def _sdt(self) -> Iterator[tuple[str, Tensor]]:
        router = Router.from_logits(self.logits)
        trainer = SdtTrainer(self.sampler, router, self.sdt_config)
        lambda_T = self.recorded("iepo.cumulative")
        gradients: dict[int, Tensor] = {}
        records, latents = [], []
        for noise, labels in zip(self.recorded("sdt.noise"), self.recorded("sdt.labels")):
            epoch_records, final = trainer.train_trajectory(
                [Batch(noise, labels)],
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
    """Yield the error of every recorded key but inputs, in the order computed.

    Raises:
        ValueError: the folder is not a case, or records a key this version does not know.
    """
    for name in ("case.json", "dit_official.pt", "router_official.pt", "golden.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"reference folder {folder} has no {name}: give a folder with all four files")
    try:
        case = _Case(folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"case.json in {folder} lacks or misnames {error}: add it") from error
    missing = set(case.golden) - set(_INPUTS)
    if not missing:
        raise ValueError(f"reference folder {folder} records nothing to compare: add keys")
    for key, ours in case.compute(tuple(missing)):
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
        for comparison in compare(local(folder, "folder")):
            verdict = "ok" if comparison.error <= tolerance else "DIFFERS"
            print(f"{comparison.key:26} {comparison.error:10.3e}  {verdict}")
            worst = max(worst, comparison.error)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return int(worst > tolerance)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
