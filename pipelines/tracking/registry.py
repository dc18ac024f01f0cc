"""Keep router artifacts in MLflow's registry, as versions of a registered model.

A version's source is the folder `router/` of the MLflow run that made it: `router.safetensors` and
`config.json` as they are, no MLflow flavour and so no pickle.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harmonica.core.artifact import RouterArtifact

from .mlflow_runs import StageRun, make_client
from .mlflow_store import signed_in, without_credentials

if TYPE_CHECKING:  # elsewhere where it is needed, as in mlflow_runs
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
_FOLDER = "router"
GATE = "harmonica.gate"
"""The tag with the decision about a version that is not promoted on registration."""
PENDING, PASSED, REFUSED, FORCED, NOT_ASKED = "pending", "passed", "refused", "always", "never"
_KEPT_BACK = (PENDING, REFUSED, NOT_ASKED)
_PROMOTED = "harmonica.promoted_to"
"""The tag of a version that has carried an alias; it gets the alias only once."""


def register(
    artifact_folder: Path,
    *,
    name: str,
    run: StageRun,
    alias: str | None = CHAMPION,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Upload an artifact to the MLflow run, register it, and return the version.

    Called again for the same MLflow run, it makes no second version and leaves the first one's files as they
    are, since a registered version never changes. It also leaves the alias where it is by then.

    Args:
        name: name of the registered model.
        alias: alias to point at the version. None leaves that to a later `promote`.
        tags: tags of a new version.

    Raises:
        ValueError: the folder is no router artifact.
    """
    RouterArtifact.load(artifact_folder)
    client = run.client
    _ensure_registered_model(client, name)
    found = version_of_run(name, run)
    if found is not None:
        version = str(found.version)
    else:
        client.log_artifacts(run.mlflow_run_id, str(artifact_folder), artifact_path=_FOLDER)
        # Not runs:/...: a server takes only what lies under the run's own artifact URI, and this is it.
        root = client.get_run(run.mlflow_run_id).info.artifact_uri.rstrip("/")
        pending = {} if alias else {GATE: PENDING}
        created = client.create_model_version(
            name, source=f"{root}/{_FOLDER}", run_id=run.mlflow_run_id, tags=pending | dict(tags or {})
        )
        version = str(created.version)
    if alias and not (found is not None and was_promoted(found, alias)):
        promote(client, name, version, alias)
    return version


def promote(client: "MlflowClient", name: str, version: str, alias: str = CHAMPION) -> None:
    """Point the alias at the version, and remember that it had it."""
    client.set_registered_model_alias(name, alias, version)
    client.set_model_version_tag(name, version, _PROMOTED, alias)


def was_promoted(version: "ModelVersion", alias: str = CHAMPION) -> bool:
    """Return whether the version has ever carried the alias."""
    return version.tags.get(_PROMOTED) == alias


def set_tags(client: "MlflowClient", name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set the tags that the version does not have."""
    before = client.get_model_version(name, version).tags
    for key, value in tags.items():
        if before.get(key) != value:
            client.set_model_version_tag(name, version, key, value)


def version_of_run(name: str, run: StageRun) -> "ModelVersion | None":
    """Return the version that `register` has made of this MLflow run."""
    query = f"name = '{name}' and run_id = '{run.mlflow_run_id}'"
    found = run.client.search_model_versions(query, max_results=1)
    return found[0] if found else None


def current(name: str, alias: str, uri: str) -> "ModelVersion | None":
    """Return the version that carries the alias now, if any does."""
    try:
        return make_client(uri).get_model_version(name, resolve(name, alias, uri))
    except ValueError:
        return None


def resolve(name: str, alias: str, uri: str) -> str:
    """Return the version that carries the alias now.

    Raises:
        ValueError: no such registered model, or the alias is on none of its versions.
    """
    from mlflow.exceptions import MlflowException

    client = make_client(uri)
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        _raise_if_unknown(client, name, alias, uri)
        raise error


def load(name: str, alias: str, uri: str) -> tuple[RouterArtifact, str]:
    """Return the router that carries the alias, and its version.

    Raises:
        ValueError: no such registered model, no such alias, or what lies there is no router artifact.
    """
    version = resolve(name, alias, uri)
    return load_version(name, version, uri), version


def load_version(name: str, version: str, uri: str) -> RouterArtifact:
    """Return the router of a version.

    Raises:
        ValueError: what lies there is no router artifact.
        MlflowException, OSError: the router cannot be fetched.
    """
    import mlflow.artifacts

    source = make_client(uri).get_model_version_download_uri(name, version)
    with tempfile.TemporaryDirectory() as folder:
        server = signed_in(uri)
        path = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=server)
        return RouterArtifact.load(path)


def newest_versions(name: str, uri: str, most: int) -> list[str]:
    """Return the newest versions, newest first.

    Versions that the gate has kept back are left out.

    Args:
        most: largest number of versions.
    """
    found = make_client(uri).search_model_versions(
        f"name = '{name}'", max_results=most, order_by=["version_number DESC"]
    )
    return [str(version.version) for version in found if version.tags.get(GATE) not in _KEPT_BACK]


def _ensure_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _raise_if_unknown(client: "MlflowClient", name: str, alias: str, uri: str) -> None:
    """Check that the server has the name, the alias and the version that carries it.

    Raises:
        ValueError: one of them is missing.
    """
    from mlflow.exceptions import MlflowException

    where = without_credentials(uri)
    known = {model.name: model for model in client.search_registered_models()}
    if name not in known:
        raise ValueError(
            f"registered_model is {name!r}: MLflow at {where} has "
            f"{', '.join(map(repr, sorted(known))) or 'no registered model'}: register a router by "
            "running the workflow, or give another name"
        ) from None
    aliases = client.get_registered_model(name).aliases
    if alias not in aliases:
        raise ValueError(
            f"alias is {alias!r}: {name!r} in MLflow at {where} has "
            f"{', '.join(map(repr, sorted(aliases))) or 'no alias'}: set it in MLflow, or run the workflow"
        ) from None
    try:
        client.get_model_version(name, aliases[alias])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            return
        raise ValueError(
            f"alias is {alias!r}: that of {name!r} in MLflow at {where} is on version {aliases[alias]}, "
            "which is deleted: set it to another one in MLflow, or run the workflow"
        ) from None
