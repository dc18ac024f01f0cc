"""Choose the router that `python -m pipelines.serve` starts with.

It has to fit the model.
"""

import os
from dataclasses import dataclass, replace

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.kinds import ARCHITECTURE_KEY
from harmonica.io.paths import local, shown
from harmonica.models.loading import LoadedModel, ModelConfig, load_model

from ..tracking import registry
from ..tracking.mlflow_store import database_of, tracking_uri, without_credentials
from .model_check import check_is_whole
from .servable_pipeline import ServablePipeline, servable_pipeline
from .serve_args import ServeArgs, builtin_router
from .served_plan import UNCACHED


@dataclass(frozen=True, kw_only=True)
class Choice:
    """This is the router to serve; at most one of `tracking_uri` and `router` is set."""

    tracking_uri: str = ""
    """The MLflow whose champion is served."""
    router: str = ""
    """Artifact folder, `uncached`, or a speed such as `even-1.8x`."""
    summary: str
    """Which router it is and why, for the user."""


def choose_router(model: ModelConfig, router: str, registered_model: str, storage_path: str) -> Choice:
    """Return the router that was asked for, else the first that fits.

    The registry's champion is tried first, then the built-in one. If neither fits, every branch is computed;
    but if the registry has a champion, that is an error.

    Args:
        model: the denoiser that the router has to fit.
        router: artifact folder, `uncached` or a speed such as `even-1.8x`; empty if none was asked for.
        registered_model: name in MLflow's registry.
        storage_path: folder whose mlflow.db is used if MLFLOW_TRACKING_URI is not set.

    Raises:
        ValueError: the model cannot be loaded or cannot generate images, or no router fits; the message names
            the setting that helps.
    """
    mismatch, place = _Fit(model), shown(model.path)
    if router == UNCACHED:
        mismatch.check_model()
        return Choice(router=router, summary="every branch computed (--router uncached)")
    if (even := EvenSteps.named(router)) is not None:
        mismatch.check_model()
        summary = f"evenly spread steps at {even.speedup:g}x, without training (--router {router})"
        return Choice(router=router, summary=summary)
    if router:
        router = str(local(router, "router"))
        if why_not := mismatch(RouterArtifact.load(router)):
            raise ValueError(f"router is {router}, which does not fit model.path {place}: {why_not}")
        return Choice(router=router, summary=f"the router in {router}")
    champion = _champion(registered_model, storage_path)
    why_no_champion = champion.why_not or mismatch(champion.artifact)
    if not why_no_champion:
        which = f"version {champion.version} of {registered_model}, the champion in MLflow"
        return Choice(tracking_uri=champion.uri, summary=which)
    builtin = builtin_router(model)
    if not mismatch(RouterArtifact.load(builtin)):
        return Choice(router=builtin, summary=f"the built-in champion ({why_no_champion})")
    if champion.artifact is None:
        return Choice(
            router=UNCACHED,
            summary=f"every branch computed, since there is no router for {place} ({why_no_champion}): "
            "train one, or give --router FOLDER, or --router even-1.8x, which needs no training",
        )
    raise ValueError(
        f"router is '' and version {champion.version} of {registered_model}, the champion in MLflow, does "
        f"not fit model.path {place} ({why_no_champion}): give --router FOLDER, --router {UNCACHED} to "
        "compute every branch, or --registered-model NAME"
    )


def choose_routers(args: ServeArgs, storage_path: str) -> tuple[ServeArgs, str]:
    """Return the settings with each model's router chosen, and a summary.

    Args:
        args: the settings, with the routers that were asked for.
        storage_path: folder whose mlflow.db is used if MLFLOW_TRACKING_URI is not set.

    Raises:
        ValueError: a model cannot be loaded or cannot generate images, or no router fits it; the message
            names the setting that helps.
    """
    if not args.models:
        one = choose_router(args.model, args.router, args.registered_model, storage_path)
        return args.model_copy(update={"tracking_uri": one.tracking_uri, "router": one.router}), one.summary
    uri, models, summaries = "", {}, []
    for name, served in args.models.items():
        try:
            chosen = choose_router(served.model, served.router, served.registered_model or name, storage_path)
        except ValueError as error:
            raise ValueError(f"models.{name}: {error}") from error
        uri = uri or chosen.tracking_uri
        models[name] = replace(served, router=chosen.router)
        summaries.append(f"{name}: {chosen.summary}")
    return args.model_copy(update={"tracking_uri": uri, "models": models}), "; ".join(summaries)


@dataclass(frozen=True, kw_only=True)
class _Champion:
    uri: str = ""
    version: str = ""
    artifact: RouterArtifact | None = None
    why_not: str = ""
    """The reason if there is no champion."""


def _champion(registered_model: str, storage_path: str) -> _Champion:
    has_store = database_of(storage_path).exists()
    if not (os.environ.get("MLFLOW_TRACKING_URI") or has_store):
        return _Champion(why_not="no MLflow store yet")

    from mlflow.exceptions import MlflowException  # takes a second to import, so not at the top

    uri = tracking_uri(storage_path)
    try:
        try:
            version = registry.resolve(registered_model, registry.CHAMPION, uri)
        except ValueError as error:
            return _Champion(why_not=str(error))
        return _Champion(
            uri=uri, version=version, artifact=registry.load_version(registered_model, version, uri)
        )
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"registered_model is {registered_model!r}, whose champion cannot be fetched from "
            f"{without_credentials(uri)} ({str(error).splitlines()[0]}): see to that MLflow, or "
            "give --router FOLDER"
        ) from error


class _Fit:
    """Says how the model differs from a router's.

    The model is loaded where it has to be: for a router of a branch file, or for none.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._loaded: LoadedModel | None = None
        self._pipeline = servable_pipeline(model)

    def check_model(self) -> None:
        """Check that the model can generate images without a router.

        Raises:
            ValueError: it cannot.
        """
        if self._pipeline is None and self._loaded is None:
            self._loaded = load_model(self._model)
            check_is_whole(self._loaded)

    def __call__(self, artifact: RouterArtifact | None) -> str:
        """Return how the model differs; "" if the router fits.

        Raises:
            ValueError: the model cannot generate images.
        """
        assert artifact is not None, "there is an artifact unless `why_not` says why there is none"
        # Weights are compared where the pipeline is loaded, on the replicas.
        try:
            pipeline = servable_pipeline(self._model, artifact)
        except ValueError as error:
            return str(error)
        if pipeline is not None:
            return _other_class(pipeline, artifact)
        self.check_model()
        assert self._loaded is not None
        return _other_model(self._loaded, artifact)


def _other_class(pipeline: ServablePipeline, artifact: RouterArtifact) -> str:
    made_for = artifact.model.get(ARCHITECTURE_KEY)
    if made_for is None:
        return f"it was made for a {artifact.model.get('architecture')} outside of any pipeline"
    if made_for != pipeline.transformer_class:
        return f"it was made for a {made_for}, and {pipeline.class_name} has a {pipeline.transformer_class}"
    return ""


def _other_model(loaded: LoadedModel, artifact: RouterArtifact) -> str:
    try:
        artifact.check(loaded.model, artifact.sampler)
    except ValueError as error:
        return str(error).partition(": use it as")[0]
    return ""
