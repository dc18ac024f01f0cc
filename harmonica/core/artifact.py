"""The router artifact: a folder with weights, configuration and a sample.

It names the model and sampler that it was made for, and is refused for any other.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.core.accumulation import kept_bytes
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.io.paths import local
from harmonica.io.safe_load import read_tensors
from harmonica.io.tensor_files import write_tensors
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import Sampler, SamplerConfig
from harmonica.version import __version__

FORMAT_VERSION = 4
_SAMPLE = "sample.safetensors"
_STARTS = {"measured": "learned steps", "even": "even steps"}


@dataclass(frozen=True, kw_only=True)
class RouterArtifact:
    """A trained router with the settings that its use depends on."""

    logits_TB: Tensor
    threshold: float
    sampler: SamplerConfig
    reuse: Reuse
    forecast_TBK: Tensor | None = None
    """Learned weights of the forecasts (`training.plans.forecast_fit`); None where they are linear."""
    correction_TJ: Tensor | None = None
    """Learned weights of the output's correction (`core.correction`); None where there is none."""
    segments: tuple[int, ...] | None = None
    """The first branch of each segment, which are forecast as one (`core.segments`); None where there are
    none."""
    model: dict[str, Any]
    """The model's `identity()`."""
    rounded_weights: Mapping[str, str] = field(default_factory=dict)
    """`model["weights"]` of the same weights in half precision, by the precision's name."""
    ideal_speedup: float
    macs_full: int
    """MACs of one trajectory of one model row without caching."""
    cache_bytes: int = 0
    """Bytes that one image keeps between steps (`harmonica.core.accumulation`), in the precision of
    training."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings and provenance, for people to read."""
    sample_CHW: Tensor | None = None
    """The sample recorded by `golden_sample`, in the model's precision."""

    @property
    def plan(self) -> Plan:
        """Return the plan of these scores at the recorded threshold."""
        learned = self.forecast_TBK, self.correction_TJ, self.segments
        return Plan.from_scores(self.logits_TB.sigmoid(), self.threshold, *learned)

    @property
    def method(self) -> str:
        """Describe how the plan was made: learned, fitted or trained.

        A plan of trained scores is distinguished from one whose trained scores were discarded in favour of
        its initial ones (`harmonica.training.plans.selection`).
        """
        chosen, initial = self.training.get("chosen", "trained"), self.training.get("initial", "")
        name = chosen.partition("_")[0]  # as in measured_0.1
        start = name if name in _STARTS else initial
        forecast = "linear forecast" if self.forecast_TBK is None else "fitted forecast"
        parts = [
            _STARTS.get(start, ""),
            forecast if self.reuse == "forecast" else "held values",
            "trained router" if chosen == "trained" else "",
        ]
        return " + ".join(part for part in parts if part)

    @classmethod
    def build(
        cls,
        logits_TB: Tensor,
        sampler: Sampler,
        *,
        threshold: float,
        reuse: Reuse,
        training: dict[str, Any],
        forecast_TBK: Tensor | None = None,
        correction_TJ: Tensor | None = None,
        segments: tuple[int, ...] | None = None,
    ) -> "RouterArtifact":
        """Build the artifact of a router that was trained with `sampler`."""
        macs = sampler.model.macs()
        learned = forecast_TBK, correction_TJ, segments
        plan = Plan.from_scores(logits_TB.sigmoid(), threshold, *learned)
        return cls(
            logits_TB=logits_TB.detach().float().cpu(),
            threshold=threshold,
            sampler=sampler.config,
            reuse=reuse,
            forecast_TBK=None if forecast_TBK is None else forecast_TBK.detach().float().cpu(),
            correction_TJ=None if correction_TJ is None else correction_TJ.detach().float().cpu(),
            segments=segments,
            model=sampler.model.identity(),
            rounded_weights=sampler.model.fingerprint().rounded,
            ideal_speedup=plan.ideal_speedup(macs),
            macs_full=macs.full * plan.num_steps,
            cache_bytes=kept_bytes(sampler.model, plan, reuse, is_guided=sampler.is_guided),
            training=training,
        )

    @property
    def _format_version(self) -> int:
        """Return the oldest format whose readers leave nothing of it out."""
        if self.segments is not None:
            return FORMAT_VERSION
        if self.correction_TJ is not None:
            return 3
        return 1 if self.forecast_TBK is None else 2

    def save(self, folder: str | Path) -> Path:
        """Write the files and return the folder."""
        folder = local(folder, "router")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"logits": self.logits_TB}
        if self.forecast_TBK is not None:
            tensors["forecast"] = self.forecast_TBK
        if self.correction_TJ is not None:
            tensors["correction"] = self.correction_TJ
        write_tensors(tensors, folder / "router.safetensors")
        if self.sample_CHW is not None:
            write_tensors({"sample": self.sample_CHW}, folder / _SAMPLE)
        plan = self.plan
        config = {
            "format_version": self._format_version,
            "model": self.model,
            "rounded_weights": dict(self.rounded_weights),
            "sampler": self.sampler.to_dict(),
            "threshold": self.threshold,
            "reuse": self.reuse,
            **({} if self.segments is None else {"segments": list(self.segments)}),
            "plan": plan.to_strings(),
            "cur": plan.cur,
            "ideal_speedup": self.ideal_speedup,
            "macs_full": self.macs_full,
            "macs_planned": round(self.macs_full / self.ideal_speedup),
            "cache_bytes": self.cache_bytes,
            "training": self.training,
            "versions": {
                "harmonica": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "RouterArtifact":
        """Read a folder written by `save`.

        Raises:
            ValueError: files missing or damaged, or the stored plan is not the logits' plan.
        """
        folder = local(folder, "router")
        sample = folder / _SAMPLE
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"router {folder} has no readable config.json ({error}): give a router artifact folder"
            ) from error
        try:
            if config["format_version"] not in range(1, FORMAT_VERSION + 1):
                raise ValueError(
                    f"router {folder} has format_version {config['format_version']}, this version reads "
                    f"1 to {FORMAT_VERSION}: install the harmonica that wrote it "
                    f"({config.get('versions', {}).get('harmonica')})"
                )
            tensors = read_tensors(folder / "router.safetensors")
            artifact = cls(
                logits_TB=tensors["logits"],
                threshold=_number(config, "threshold", folder),
                sampler=SamplerConfig(**config["sampler"]),
                reuse=config["reuse"],
                forecast_TBK=tensors.get("forecast"),
                correction_TJ=tensors.get("correction"),
                segments=tuple(config["segments"]) if "segments" in config else None,
                model=_complete(config["model"]),
                rounded_weights=config.get("rounded_weights", {}),
                ideal_speedup=_number(config, "ideal_speedup", folder),
                macs_full=_number(config, "macs_full", folder),
                cache_bytes=config.get("cache_bytes", 0),
                training=config["training"],
                sample_CHW=read_tensors(sample)["sample"] if sample.exists() else None,
            )
            stored_plan = config["plan"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"router {folder}: config.json lacks or misnames {error}: write it again with "
                "RouterArtifact.save"
            ) from error
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"router {folder}: {name} in router.safetensors is not finite: the folder is damaged or "
                    "its training diverged, fetch it again or train again"
                )
        if artifact.plan.to_strings() != stored_plan:
            raise ValueError(
                f"router {folder}: the plan in config.json is not that of router.safetensors at "
                f"threshold {artifact.threshold}: the folder was altered, fetch it again"
            )
        return artifact

    def check(
        self, model: BranchedTransformer, sampler: SamplerConfig, *, allow_other_sampler: bool = False
    ) -> None:
        """Refuse a model, step count or sampler the router was not made for.

        The same weights rounded to half precision are the same model.

        Args:
            allow_other_sampler: only the step count of the sampler has to fit: for measuring transfer.

        Raises:
            ValueError: names the first field that differs and both values.
        """
        made_for, given = self.sampler.to_dict(), sampler.to_dict()
        if allow_other_sampler:
            made_for, given = ({"num_inference_steps": c["num_inference_steps"]} for c in (made_for, given))
        identity = model.identity()
        if identity["weights"] in self.rounded_weights.values():
            identity["weights"] = self.model.get("weights")
        wanted = _prefixed("model", self.model) | _prefixed("sampler", made_for)
        found = _prefixed("model", identity) | _prefixed("sampler", given)
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                cure = "use it as it was trained, or train a router for this setting"
                if name.startswith("sampler.") and name != "sampler.num_inference_steps":
                    cure += "; allow_other_sampler measures what it is worth here"
                raise ValueError(
                    f"{name} is {found.get(name)} and the router was made for {wanted.get(name)}: {cure}"
                )


def _number(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    """Return a number of a router's config.

    Raises:
        ValueError: it is none above 0; a threshold may be 0.
    """
    value = config[name]
    is_number = type(value) in (int, float) and 0 <= value < float("inf")
    if not is_number or (value == 0 and name != "threshold"):
        raise ValueError(
            f"router {folder}: {name} in config.json is {str(value)[:100]!r} and no number above 0: the "
            "folder was altered, fetch it again"
        )
    return value


def _complete(model: dict[str, Any]) -> dict[str, Any]:
    """Artifacts of a DiT from before `norm_eps` was a setting were all made for 1e-6."""
    return {"norm_eps": 1e-6} | model if model["architecture"] == "DiT" else model


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}
