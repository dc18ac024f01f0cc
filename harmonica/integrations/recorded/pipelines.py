"""Put a recorded router's plan on the transformers of a pipeline."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.pipeline_transformer import refuse_other_caches
from harmonica.integrations.recorded.branches import describe
from harmonica.integrations.recorded.kinds import ARCHITECTURE_KEY
from harmonica.integrations.recorded.planned_trajectory import PlannedTrajectory
from harmonica.integrations.recorded.trajectory import TransformerCall
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import views_of
from harmonica.integrations.recorded.weights import fingerprint_of
from harmonica.integrations.weight_check import matched_fingerprint, other_weights
from harmonica.models.fingerprint import Fingerprint

_MORE_TRANSFORMERS = ("transformer_2", "unconditional_transformer")


def transformers_of(pipe: Any) -> list[nn.Module]:
    """Return a pipeline's transformers; the first one decides the branches.

    Args:
        pipe: a diffusers pipeline, or its transformer.

    Raises:
        ValueError: a pipeline without a transformer, or with a second one of another shape.
    """
    if isinstance(pipe, nn.Module):
        return [pipe]
    first = getattr(pipe, "transformer", None)
    if first is None:
        second = getattr(pipe, "transformer_2", None)
        has_unet = getattr(pipe, "unet", None) is not None
        if second is None:
            raise ValueError(
                f"pipe is a {type(pipe).__name__}, which has no transformer"
                f"{': its denoiser is a UNet' if has_unet else ''}; give a pipeline with pipe.transformer"
            )
        return [second]
    found = [first]
    for name in _MORE_TRANSFORMERS:
        other = getattr(pipe, name, None)
        if other is None:
            continue
        if type(other) is not type(first) or len(list(other.modules())) != len(list(first.modules())):
            raise ValueError(
                f"pipe.{name} has other blocks than pipe.transformer: one router has one row of branches for "
                "both, so they have to be of one class and depth"
            )
        found.append(other)
    return found


def is_recorded(artifact: RouterArtifact) -> bool:
    """Return whether the router's branches were found by recording."""
    return ARCHITECTURE_KEY in artifact.model


def planned_calls(
    transformers: Sequence[nn.Module],
    forwards: Sequence[Any],
    artifact: RouterArtifact,
    *,
    allow_other_sampler: bool,
    check_weights: bool,
    is_compiled: bool = False,
) -> Iterator[TransformerCall]:
    """Yield the call that replaces each transformer's forward.

    Raises:
        ValueError: another cache is on, or the router was made for another class or other weights.
    """
    check_router(transformers, artifact, lambda: fingerprint_of(transformers), check_weights=check_weights)
    views = views_of(transformers, forwards, cacheable=artifact.model["cacheable"], is_compiled=is_compiled)
    return calls_of(views, artifact, allow_other_sampler=allow_other_sampler)


def check_router(
    transformers: Sequence[nn.Module],
    artifact: RouterArtifact,
    fingerprint: Callable[[], Fingerprint],
    *,
    check_weights: bool,
) -> None:
    """Check that a router was made for these transformers.

    Args:
        fingerprint: reads it from their weights.

    Raises:
        ValueError: another cache is on, or the router was made for another class or other weights.
    """
    model = artifact.model
    if (count := model.get("transformers", 1)) != len(transformers):
        raise ValueError(
            f"the router was made for {count} transformers that share a pipeline's trajectories and is given "
            f"{len(transformers)}: apply it to the pipeline that it was trained in"
        )
    for transformer in transformers:
        name = type(transformer).__name__
        if name != model[ARCHITECTURE_KEY]:
            raise ValueError(
                f"transformer is a {name} and the router was made for a {model[ARCHITECTURE_KEY]}: train a "
                "router for this class"
            )
        refuse_other_caches(transformer)
    parameters = [each for transformer in transformers for each in transformer.parameters()]
    found = matched_fingerprint(parameters, fingerprint, artifact, check_weights=check_weights)
    if found.exact not in (model["weights"], *artifact.rounded_weights.values()):
        raise other_weights(found, artifact)


def calls_of(
    views: Sequence[RecordedTransformer], artifact: RouterArtifact, *, allow_other_sampler: bool
) -> Iterator[TransformerCall]:
    """Yield what takes the place of each transformer's forward."""
    trajectory = PlannedTrajectory(
        views,
        artifact.plan,
        artifact.reuse,
        check_view=_BranchCheck(artifact.model),
        check_pipeline=_SchedulerCheck(artifact, allow_other_sampler),
    )
    return trajectory.calls()


class _BranchCheck:
    """Refuses branches that are not those that a router was trained for."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._model = model

    def __call__(self, view: RecordedTransformer) -> None:
        found, wanted = describe(view.branches), self._model["branches"]
        if found == wanted:
            return
        other = next(
            (str(one["name"]) for one in found if one not in wanted),
            next((str(one["name"]) for one in wanted if one not in found), "the order"),
        )
        raise ValueError(
            f"transformer has {len(found)} branches under diffusers {view.shape()['diffusers']} and the "
            f"router was made for {len(wanted)} under {self._model['diffusers']}; they differ in {other}: "
            "use that version and the model's own configuration, or train a router anew"
        )


class _SchedulerCheck:
    """Refuses a pipeline whose scheduler is of another class than the router's."""

    def __init__(self, artifact: RouterArtifact, allow_other: bool) -> None:
        self._wanted = (artifact.sampler.scheduler or {}).get("_class_name", "")
        self._allow_other = allow_other

    def __call__(self, pipe: Any) -> None:
        found = type(getattr(pipe, "scheduler", None)).__name__
        if self._wanted and found != self._wanted and not self._allow_other:
            raise ValueError(
                f"pipe.scheduler is a {found} and the router was made for a {self._wanted}: give the "
                "pipeline that, or apply with allow_other_sampler to measure what it is worth here"
            )
