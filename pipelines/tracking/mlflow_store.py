"""Find and check the store of MLflow's runs and registry.

All processes use the same URI, which is checked before any work starts.
"""

import os
import re
import socket
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from harmonica.io.paths import is_remote, local, resolved, shown

EXPERIMENT = "harmonica"
_VARIABLE = "MLFLOW_TRACKING_URI"
_DATABASES = ("postgresql", "mysql", "mssql")
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PATIENCE_S = 5.0


def database_of(storage_path: str) -> Path:
    """Return the SQLite file beside the runs of a local storage path.

    Raises:
        ValueError: the path is invalid, or remote.
    """
    return local(storage_path, "storage_path") / "mlflow.db"


def artifacts_of(storage_path: str) -> Path:
    """Return the folder of MLflow's files, beside the runs of a local storage path."""
    return local(storage_path, "storage_path") / "mlartifacts"


def sqlite_uri(database: Path) -> str:
    """Return the URI of a SQLite file, whatever characters its path has."""
    path = str(database.absolute())
    if not {"%", "?"} & set(path):
        return f"sqlite:///{path}"
    # If the URI names the driver, MLflow makes no folder for the file; else it makes one named as the URI is.
    return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def tracking_uri(storage_path: str) -> str:
    """Return `MLFLOW_TRACKING_URI` if set, else SQLite in the folder of the runs.

    It is the same store in every process, wherever that runs.

    Raises:
        ValueError: storage is remote and no tracking server is named, or the variable's URI is unusable.
    """
    if uri := os.environ.get(_VARIABLE):
        return _settled(uri)
    root = resolved(storage_path, "storage_path")
    if is_remote(root):
        raise ValueError(
            f"storage_path {shown(root)} is remote and {_VARIABLE} is not set: set it to "
            "your MLflow server (a SQLite file cannot be shared between nodes)"
        )
    return sqlite_uri(database_of(root))


def without_credentials(uri: str) -> str:
    """Return a tracking URI, or a message with one, without credentials.

    A database's password may have a slash or @, or be in the query.
    """
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", re.sub(r"://[^\s/]\S*@", "://", uri))


def signed_in(uri: str) -> str:
    """Return the URI that MLflow gets, without the user and password of a server.

    MLflow writes the URI into its errors, which end up in logs and in the endpoint's health. It finds the
    two in its own environment variables, which this sets.
    """
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    if not user or parts.scheme not in ("http", "https"):
        return uri
    name, _, password = user.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return urlunsplit(parts._replace(netloc=host))


def _scheme(uri: str) -> str:
    """Return the scheme of a URI, such as sqlite, without a driver's name."""
    return urlsplit(uri).scheme.partition("+")[0].lower()


def _settled(uri: str) -> str:
    scheme = _scheme(uri)
    if uri == "databricks" or scheme.startswith("databricks"):
        raise ValueError(
            f"{_VARIABLE} is {uri!r}, a Databricks workspace, where an experiment's name is a path and not "
            f"{EXPERIMENT!r}: give the http address of an MLflow server, or sqlite:////absolute/path/mlflow.db"
        )
    if scheme in ("", "file"):
        raise ValueError(
            f"{_VARIABLE} is {uri!r}, a folder of files, which MLflow no longer takes runs in: give "
            "sqlite:////absolute/path/mlflow.db or a server's http address, or unset it for a SQLite file "
            "beside the runs (`mlflow migrate-filestore` takes old runs along)"
        )
    if scheme != "sqlite":
        return uri
    url = make_url(uri)
    name = url.database or ""
    if name in ("", ":memory:") or "mode=memory" in uri:
        raise ValueError(
            f"{_VARIABLE} is {uri!r}, a database in memory, which no other process would see: give "
            "sqlite:////absolute/path/mlflow.db"
        )
    if name.startswith(("/", "file:/")):
        return uri
    if name.startswith("file:") or url.query:
        raise ValueError(
            f"{_VARIABLE} is {uri!r}, relative to wherever a process runs: give an absolute path, as in "
            "sqlite:////absolute/path/mlflow.db"
        )
    return sqlite_uri(local(name, _VARIABLE))


def check_store(storage_path: str) -> None:
    """Check that the store can record runs, without changing anything.

    Raises:
        ValueError: the store is unusable; the message names the variable, its value and the cure.
    """
    uri = tracking_uri(storage_path)
    store, scheme = f"{_VARIABLE} is {without_credentials(uri)}", _scheme(uri)
    if scheme == "sqlite":
        name = make_url(uri).database or ""
        file = Path(urlsplit(name).path if name.startswith("file:") else name)
        store = f"MLflow's store is {file}"
        _check_file(file, store)
        if not file.exists():
            return  # it will be made
    elif scheme in _PORTS:
        _check_answers(uri, scheme, store)
    # Not at the top: importing MlflowClient takes a second, and settings are refused without.
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        server = signed_in(uri)
        found = MlflowClient(server, registry_uri=server).get_experiment_by_name(EXPERIMENT)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{store}, which cannot be used ({without_credentials(why[0])}): correct it or its server"
        ) from error
    if found is not None and found.lifecycle_stage == "deleted":
        raise ValueError(
            f"{store}, in which the experiment {EXPERIMENT!r} is deleted: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or remove it for good with "
            "`mlflow gc`"
        )


def _check_file(file: Path, store: str) -> None:
    """Check that a SQLite file can be written, or made, without making it.

    MLflow itself tries for more than a minute. SQLite writes its journal beside the file.
    """
    try:
        folder = next(parent for parent in file.parents if parent.exists())  # MLflow makes those below it
        if file.exists():
            file.open("r+b").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        cure = f"make it and its folder writable, or set {_VARIABLE} to another store"
        raise ValueError(f"{store}, which cannot be written ({error.strerror}): {cure}") from error


def _check_answers(uri: str, scheme: str, store: str) -> None:
    """Check within seconds that the server answers.

    MLflow's own client tries for minutes.
    """
    try:
        if scheme in _DATABASES:
            url = make_url(uri)
            if url.host:
                address = (url.host, url.port or _PORTS[scheme])
                socket.create_connection(address, timeout=_PATIENCE_S).close()
        else:
            httpx.get(f"{uri.rstrip('/')}/health", timeout=_PATIENCE_S)  # any answer is one
    except (OSError, httpx.HTTPError, httpx.InvalidURL, SQLAlchemyError) as error:
        raise ValueError(
            f"{store}, where nothing answers ({str(error) or type(error).__name__}): start the server, or "
            "correct the address"
        ) from error
