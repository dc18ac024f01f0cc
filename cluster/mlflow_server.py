"""A real MLflow server on this machine: runs and registry in a database, artifacts in a folder or on S3.

    python cluster/mlflow_server.py --database postgresql --artifacts s3://bucket/mlflow

Says how to reach it and stays until Ctrl-C. `--database postgresql` brings up a PostgreSQL of its own
(Debian's package `postgresql`); one that exists goes there by its address. Both want `pip install
"psycopg[binary]"`. Without it is SQLite, which one server may use and several may not.
"""

import argparse
import contextlib
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from postgres import Postgres
from processes import Session, free_port

OWN = "postgresql"
_START_S = 240.0  # beside much other work; alone it takes seconds


class MlflowServer:
    """A context manager; killed and started again it is the same server, with the same address."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        database: str = "",
        artifacts: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            folder: for its log, and for what it is not told another place for.
            database: URI, such as `Postgres.uri`; empty is SQLite in `folder`.
            artifacts: folder or s3:// URI; empty is in `folder`.
            environment: beside this process's own: S3's, for one.
        """
        self.folder, self.port = folder.resolve(), port or free_port()
        self.database = database or f"sqlite:///{self.folder / 'mlflow.db'}"
        self.artifacts = artifacts or str(self.folder / "mlartifacts")
        self._environment = {**os.environ, **(environment or {})} | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # or seven more processes, for nothing of ours
        }

    @property
    def uri(self) -> str:
        """For MLFLOW_TRACKING_URI."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}"]
        command += [f"--backend-store-uri={self.database}", f"--artifacts-destination={self.artifacts}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._session = Session(
            [*command, "--workers=1"], self._environment, self.folder / "mlflow-server.log"
        )
        self._session.wait_until(self.answers, _START_S, "mlflow server")

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9 of all its processes."""
        self._session.kill()

    def __enter__(self) -> "MlflowServer":
        try:
            self.start()
        except BaseException:
            self._session.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("mlflow"), help="log, SQLite and local artifacts")
    parser.add_argument("--database", default="", help=f"{OWN}, or postgresql+psycopg://user@host/mlflow")
    parser.add_argument("--artifacts", default="", help="folder, or s3://bucket/prefix")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        database = given.database
        if database == OWN:
            database = stack.enter_context(Postgres(given.folder / OWN)).uri
        server = stack.enter_context(
            MlflowServer(given.folder, port=given.port, database=database, artifacts=given.artifacts)
        )
        print(f"export MLFLOW_TRACKING_URI={server.uri}\n# up until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
