"""The recorded quantities once more, slow and obvious, from the reference page and the papers' formulas.

Nothing of `harmonica` is imported and nothing is shared or resumed: every generation is run whole, every
update is written out. What this agrees with may be fast. M is both halves of classifier-free guidance.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from slow_dit import Shape, Use, Weights, network, random_weights
from torch import Tensor

FIRST_LOGIT = 5.0
"""Of row T-1, which is never trained."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a case.json says beside `model`."""

    batch: int = 2
    num_sampling_steps: int = 4
    cfg_scale: float = 1.5
    threshold: float = 0.1
    beta_l1: float = 0.007
    lr: float = 0.01
    epochs: int = 1
    clamp: float = 5.0


def compute_all(branch: int, computed: Tensor) -> Tensor:
    """A model without a cache."""
    return computed


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def timesteps(num_steps: int) -> list[int]:
    """Evenly from 0 to 999; the position is added up, as in the public code, and then rounded."""
    position, result = 0.0, []
    for _ in range(num_steps):
        result.append(round(position))
        position += 999 / (num_steps - 1)
    return result


def signal_shares() -> list[float]:
    """alpha-bar of the 1000 training timesteps: betas in a line from 1e-4 to 0.02."""
    shares, running = [], 1.0
    for t in range(1000):
        running *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        shares.append(running)
    return shares


class SlowCase:
    """One model, router and setting; every method runs all that it needs from the start."""

    def __init__(self, shape: Shape, settings: Settings, weights: Weights, logits: Tensor) -> None:
        self.shape, self.settings = shape, settings
        self.w = {name: value.double() for name, value in weights.items()}
        self.logits = logits.double()
        self.timesteps = timesteps(settings.num_sampling_steps)
        shares = signal_shares()
        self.alpha_bar = [shares[t] for t in self.timesteps]

    @classmethod
    def read(cls, folder: Path) -> "SlowCase":
        """A case folder as it was recorded."""
        case = json.loads((folder / "case.json").read_text())
        shape, settings = Shape(**case.pop("model")), Settings(**case)
        weights = torch.load(folder / "dit_official.pt", weights_only=True)
        with torch.serialization.safe_globals([argparse.Namespace]):
            rows = torch.load(folder / "router_official.pt", weights_only=True)["routers"]
        return cls(shape, settings, weights, torch.stack([rows[f"{i}.prob"] for i in range(len(rows))]))

    def forward(self, x: Tensor, t: int, labels: Tensor) -> Tensor:
        """(n, 2C, S, S)."""
        return network(self.w, self.shape, x, torch.full_like(labels, t), labels, compute_all)

    def guided(self, x_M: Tensor, t: int, labels: Tensor, use: Use = compute_all) -> Tensor:
        """(M, 2C, S, S): both halves see the first one's latents, and the first three channels are guided."""
        n = len(labels)
        conditions = torch.cat([labels, torch.full_like(labels, self.shape.num_classes)])
        both = torch.cat([x_M[:n], x_M[:n]])
        output = network(self.w, self.shape, both, torch.full_like(conditions, t), conditions, use)
        conditional, unconditional = output[:n, :3], output[n:, :3]
        mixed = unconditional + self.settings.cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), output[:, 3:]], dim=1)

    def ddim(self, i: int, x_M: Tensor, output_M: Tensor) -> Tensor:
        """x before step i to x after it: eta = 0, no clipping, coefficients rounded to float32."""
        now, before = self.alpha_bar[i], self.alpha_bar[i - 1] if i else 1.0
        roots = [math.sqrt(value) for value in (1 / now, 1 / now - 1, before, 1 - before)]
        a, b, c, d = torch.tensor(roots).float().double()
        epsilon = output_M[:, : self.shape.in_channels]
        return c * (a * x_M - b * epsilon) + d * epsilon

    def generate(self, noise: Tensor, labels: Tensor, weights: Tensor, refresh: Tensor) -> Tensor:
        """A whole generation (M, C, S, S): branch b of step i gives w * computed + (1 - w) * kept."""
        kept: dict[int, Tensor] = {}
        x_M = torch.cat([noise, noise])
        for i in reversed(range(len(self.timesteps))):

            def use(b: int, computed: Tensor, i: int = i) -> Tensor:
                w = weights[i, b]
                y = computed if w == 1 else w * computed + (1 - w) * kept[b]
                if refresh[i, b]:
                    kept[b] = y
                return y

            x_M = self.ddim(i, x_M, self.guided(x_M, self.timesteps[i], labels, use))
        return x_M

    def plan(self) -> Tensor:
        """(T, B) bool; step T-1 has nothing to reuse."""
        compute = sigmoid(self.logits) > self.settings.threshold
        compute[-1] = True
        return compute

    def soft(self, noise: Tensor, labels: Tensor, steps: set[int]) -> Tensor:
        """A generation under the router's soft weights at `steps`, without a cache at the others."""
        weights, refresh = sigmoid(self.logits), self.plan()
        for i in set(range(len(weights))) - steps:
            weights[i], refresh[i] = 1.0, True
        return self.generate(noise, labels, weights, refresh)

    def iepo(self, noise: Tensor, labels: Tensor, kind: Literal["cumulative", "leave_one_out"]) -> Tensor:
        """lambda (T-1,), two whole generations an entry."""
        trained = set(range(len(self.logits) - 1))
        values = []
        for i in sorted(trained):
            if kind == "cumulative":
                pair = {j for j in trained if j >= i}, {j for j in trained if j > i}
            else:
                pair = trained - {i}, trained
            one, other = (self.soft(noise, labels, steps) for steps in pair)
            values.append(((one - other) ** 2).mean())
        return torch.stack(values)

    def sdt(self, noise: Tensor, labels: Tensor, lambda_T: Tensor) -> dict[str, Tensor]:
        """The `sdt.*` keys from trajectories (epochs, n, ...), AdamW without decay written out."""
        settings, last = self.settings, len(self.logits) - 1
        logits = self.logits.clone()
        first, second = torch.zeros_like(logits), torch.zeros_like(logits)
        numbers: dict[str, list[float]] = {"mse": [], "l1": [], "loss": []}
        gradients, latents = torch.zeros_like(logits[:-1]), []
        for epoch, (epoch_noise, epoch_labels) in enumerate(zip(noise, labels)):
            kept: dict[int, Tensor] = {}
            x_M = torch.cat([epoch_noise, epoch_noise])
            x_M = self.ddim(last, x_M, self.guided(x_M, self.timesteps[last], epoch_labels, kept.setdefault))
            for i in reversed(range(last)):
                row = logits[i].clone().requires_grad_()
                r = sigmoid(row)

                def use(b: int, computed: Tensor, r: Tensor = r, kept: dict[int, Tensor] = kept) -> Tensor:
                    y = r[b] * computed + (1 - r[b]) * kept[b]
                    if r[b] > settings.threshold:
                        kept[b] = y.detach()
                    return y

                teacher = self.guided(x_M, self.timesteps[i], epoch_labels)
                student = self.guided(x_M, self.timesteps[i], epoch_labels, use)
                mse, l1 = ((student - teacher) ** 2).mean(), r.sum()
                loss = lambda_T[i] * mse + settings.beta_l1 * l1
                (gradient,) = torch.autograd.grad(loss, row)
                if epoch == 0:
                    gradients[i] = gradient
                for name, value in (("mse", mse), ("l1", l1), ("loss", loss)):
                    numbers[name].append(value.item())
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                mean, square = first[i] / (1 - 0.9 ** (epoch + 1)), second[i] / (1 - 0.999 ** (epoch + 1))
                logits[i] -= settings.lr * mean / (square.sqrt() + 1e-8)
                logits[:-1] = logits[:-1].clamp(-settings.clamp, settings.clamp)
                x_M = self.ddim(i, x_M, student.detach())
            latents.append(x_M[: len(epoch_labels)])
        table = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        return {f"sdt.{name}": values.reshape(-1, last) for name, values in table.items()} | {
            "sdt.grads_first_epoch": gradients,
            "sdt.final_latents": torch.stack(latents),
            "sdt.router_logits_after": logits,
        }

    def record(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every recorded key from `noise`, `labels`, `sdt.noise` and `sdt.labels`."""
        noise, labels = inputs["noise"], inputs["labels"]
        plan, n = self.plan(), len(labels)
        cumulative = self.iepo(noise, labels, "cumulative")
        return inputs | {
            "timesteps": torch.tensor(self.timesteps),
            "forward.t0": self.forward(noise, 0, labels),
            "forward.t250": self.forward(noise, 250, labels),
            "forward.t999": self.forward(noise, 999, labels),
            "cfg.t500": self.guided(torch.cat([noise, noise]), 500, labels),
            "router.logits": self.logits,
            "plan.compute": plan,
            "ddim.full": self.soft(noise, labels, set())[:n],
            "ddim.cached": self.generate(noise, labels, plan.double(), plan)[:n],
            "iepo.cumulative": cumulative,
            "iepo.leave_one_out": self.iepo(noise, labels, "leave_one_out"),
            **self.sdt(inputs["sdt.noise"], inputs["sdt.labels"], cumulative),
        }


def write_case(folder: Path, shape: Shape, settings: Settings, seed: int, *, tilt: float = 0.0) -> None:
    """A case of random weights and a random router around tau, with its numbers.

    Args:
        tilt: raises the logits of the noisy steps. Their lambda is larger by orders of magnitude and a
            norm over all steps sees no other, unless they are cached less.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(shape, generator)
    tau, size = settings.threshold, (settings.num_sampling_steps, 2 * shape.depth)
    logits = math.log(tau / (1 - tau)) + 2 * torch.randn(size, generator=generator)
    logits += torch.linspace(0, tilt, len(logits))[:, None]
    logits[-1] = FIRST_LOGIT
    batch, side = (settings.batch,), (shape.in_channels, shape.input_size, shape.input_size)
    inputs = {}
    for prefix, leading in (("", batch), ("sdt.", (settings.epochs, *batch))):
        inputs[f"{prefix}noise"] = torch.randn(*leading, *side, generator=generator, dtype=torch.float64)
        inputs[f"{prefix}labels"] = torch.randint(shape.num_classes, leading, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps({"model": asdict(shape), **asdict(settings)}, indent=1))
    torch.save(weights, folder / "dit_official.pt")
    rows = {f"{i}.prob": row.clone() for i, row in enumerate(logits)}
    arguments = argparse.Namespace(l1=settings.beta_l1, lr=settings.lr, cfg_scale=settings.cfg_scale)
    torch.save({"routers": rows, "opt": {}, "args": arguments}, folder / "router_official.pt")
    recorded = SlowCase(shape, settings, weights, logits).record(inputs)
    save_file({key: value.contiguous() for key, value in recorded.items()}, folder / "golden.safetensors")
