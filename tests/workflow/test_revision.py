"""A run records the revision of the package's own clone, wherever its user stands."""

import os
import subprocess
from pathlib import Path

import pytest

import harmonica
from pipelines.report.summary import git_revision, versions


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True, env=own
    )
    return done.stdout.strip()


def clone(folder: Path) -> Path:
    """A file that is tracked in a repository of its own."""
    file = folder / "package" / "summary.py"
    file.parent.mkdir(parents=True)
    file.write_text("first")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", folder.name)
    return file


def test_the_revision_is_that_of_the_file_and_says_what_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = clone(tmp_path / "ours"), clone(tmp_path / "theirs")
    monkeypatch.chdir(other.parent)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))  # as in a hook
    head = git(file.parent, "rev-parse", "HEAD")
    assert git_revision(file) == head != git(other.parent, "rev-parse", "HEAD")
    (tmp_path / "ours" / "notes.txt").write_text("of no revision")
    assert git_revision(file) == head
    file.write_text("second")
    assert git_revision(file) == f"{head}-dirty"


def test_a_file_that_no_clone_has_is_of_no_known_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = clone(tmp_path / "ours")
    monkeypatch.chdir(file.parent)
    installed = tmp_path / "ours" / ".venv" / "summary.py"  # a package in the folder of another project
    installed.parent.mkdir()
    installed.touch()
    outside = tmp_path / "summary.py"
    outside.touch()
    assert git_revision(installed) == git_revision(outside) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(file) == "unknown", "without git"


def test_the_project_s_own_version_is_among_the_versions() -> None:
    assert versions()["harmonica-ray"] == harmonica.__version__
    assert {"ray", "torch"} < versions().keys()
