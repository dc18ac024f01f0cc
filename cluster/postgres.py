"""A PostgreSQL server on this machine for `mlflow_server.py`, behind a Unix socket that only its user opens.

PostgreSQL refuses to run as root; started by root it runs as the user `postgres`, or else `nobody`.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from processes import Session, as_user

_DEBIAN_BINARIES = Path("/usr/lib/postgresql")  # one folder a major version, none of them on PATH
_START_S, _STOP_S = 60.0, 10.0
_DATABASE = "mlflow"
_SOCKET_PATH_LIMIT = 107 - len("/.s.PGSQL.5432")


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs, None where it is not installed."""
    versions = sorted(_DEBIAN_BINARIES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def _unprivileged() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


class Postgres:
    """A context manager; its data outlive it in the folder, and a second one goes on with them."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: for data, socket and log, with a short path that any user may reach; None is a
                temporary one, gone at the end.

        Raises:
            RuntimeError: PostgreSQL is not installed.
            ValueError: the folder's path is too long for a Unix socket.
        """
        found = binaries()
        if found is None:
            raise RuntimeError("PostgreSQL is not installed: on Debian, apt-get install postgresql")
        self._binaries, self._is_temporary = found, folder is None
        self.folder = folder.resolve() if folder else Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if len(str(self.folder)) > _SOCKET_PATH_LIMIT:
            raise ValueError(
                f"folder is {self.folder}: its path has to have {_SOCKET_PATH_LIMIT} characters or fewer"
            )
        self._user = _unprivileged()
        self._role = (self._user or pwd.getpwuid(os.geteuid())).pw_name

    @property
    def uri(self) -> str:
        """For `mlflow server --backend-store-uri`; without a password, since the socket is private."""
        host = quote(str(self.folder), safe="")
        return f"postgresql+psycopg://{self._role}@/{_DATABASE}?host={host}"

    def __enter__(self) -> "Postgres":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        data = self.folder / "data"
        if not (data / "PG_VERSION").exists():
            self._run(
                "initdb",
                f"--username={self._role}",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-sync",
                f"--pgdata={data}",
            )
        command = [str(self._binaries / "postgres"), "-D", str(data), "-k", str(self.folder)]
        command += ["-c", "listen_addresses="]
        self._session = Session(command, self._environment, self.folder / "postgres.log", self._user)
        try:
            self._session.wait_until(self._is_ready, _START_S, "postgres")
            if self.query("postgres", f"select 1 from pg_database where datname = '{_DATABASE}'") != "1":
                self.query("postgres", f"create database {_DATABASE}")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def query(self, database: str, sql: str) -> str:
        """What psql says, a row a line, columns separated by `|`."""
        return self._run(
            "psql", "-h", str(self.folder), "-U", self._role, "-d", database, "-Atc", sql
        ).strip()

    def stop(self) -> None:
        """Its clients lose their connections; what they have committed is on disk."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its own processes leave its session, and only it ends them in order.
            self._session.process.send_signal(signal.SIGINT)
            self._session.process.wait(timeout=_STOP_S)
        self._session.stop()
        if self._is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _is_ready(self) -> bool:
        command = [str(self._binaries / "pg_isready"), "-q", "-h", str(self.folder)]
        return subprocess.run(command, env=self._environment, check=False).returncode == 0

    @property
    def _environment(self) -> Mapping[str, str]:
        return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "HOME": str(self.folder)}

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self._binaries / program), *arguments],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **as_user(self._user),
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip()[-2000:]}")
        return done.stdout
