"""Which router `python -m pipelines.serve` starts with: one that fits its model, found before Ray starts."""

import os
from dataclasses import dataclass

from mlflow.exceptions import MlflowException

from harmonica.builtin import CHAMPION as BUILTIN_CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.io.paths import local
from harmonica.models.loading import LoadedModel, ModelConfig, load_model
from pipelines.serving.image_sampler import UNCACHED, check_is_whole
from pipelines.tracking import registry
from pipelines.tracking.mlflow_store import database_of, tracking_uri, without_credentials


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A router to serve; at most one of the first two is set."""

    tracking_uri: str = ""
    """MLflow, whose champion is followed."""
    router: str = ""
    """Artifact folder, or `uncached`."""
    words: str
    """Which it is, and why, for the user."""


def choose_router(model: ModelConfig, router: str, registered_model: str, storage_path: str) -> Choice:
    """The router asked for; else the registry's champion, the built-in one, or none at all, the first that
    fits. Where there is a champion and nothing fits, nothing is chosen for the user.

    Args:
        router: artifact folder or `uncached`; empty where none was asked for.
        storage_path: folder whose mlflow.db is looked into where MLFLOW_TRACKING_URI is not set.

    Raises:
        ValueError: the model cannot be loaded or draws no pictures, or no router fits; says which setting
            helps.
    """
    loaded = load_model(model)
    check_is_whole(loaded)
    if router == UNCACHED:
        return Choice(router=router, words="every branch computed (--router uncached)")
    if router:
        router = str(local(router, "router"))
        if why_not := _why_not(RouterArtifact.load(router), loaded):
            raise ValueError(f"router is {router}, which does not fit model.path {model.path}: {why_not}")
        return Choice(router=router, words=f"the router in {router}")
    champion = _champion(registered_model, storage_path)
    why_no_champion = champion.why_not or _why_not(champion.artifact, loaded)
    if not why_no_champion:
        which = f"version {champion.version} of {registered_model}, the champion in MLflow"
        return Choice(tracking_uri=champion.uri, words=which)
    why_not_builtin = _why_not(RouterArtifact.load(BUILTIN_CHAMPION), loaded)
    if not why_not_builtin:
        return Choice(router=str(BUILTIN_CHAMPION), words=f"the built-in champion ({why_no_champion})")
    if champion.artifact is None:
        return Choice(
            router=UNCACHED,
            words=f"every branch computed, since there is no router for {model.path} ({why_no_champion}): "
            "train one, or give --router FOLDER",
        )
    raise ValueError(
        f"router is '' and version {champion.version} of {registered_model}, the champion in MLflow, does "
        f"not fit model.path {model.path} ({why_no_champion}): give --router FOLDER, --router {UNCACHED} to "
        "compute every branch, or --registered-model NAME"
    )


@dataclass(frozen=True, kw_only=True)
class _Champion:
    uri: str = ""
    version: str = ""
    artifact: RouterArtifact | None = None
    why_not: str = ""
    """Why there is none."""


def _champion(registered_model: str, storage_path: str) -> _Champion:
    has_store = database_of(storage_path).exists()
    if not (os.environ.get("MLFLOW_TRACKING_URI") or has_store):
        return _Champion(why_not="no MLflow store yet")
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


def _why_not(artifact: RouterArtifact | None, loaded: LoadedModel) -> str:
    """What of the model a router was not made for; empty where it fits."""
    assert artifact is not None, "there is one where nothing says why not"
    try:
        artifact.check(loaded.model, artifact.sampler)
    except ValueError as error:
        return str(error).partition(": use it as")[0]
    return ""
