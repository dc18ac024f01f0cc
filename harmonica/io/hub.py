"""Models of the Hugging Face hub, which are read at a pinned revision.

They are kept in huggingface_hub's own cache.
"""

import glob
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harmonica.io.repository_files import INDEX, RepositoryMalformed, listing, wanted

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def from_hub(repo: str, revision: str, field: str) -> Path:
    """Return the snapshot's folder, downloaded unless cached.

    HF_HUB_OFFLINE uses the cache alone.

    Raises:
        ValueError: there is no revision, or the snapshot is not cached and cannot be downloaded.
    """
    if not revision:
        where = "model.revision" if field == "model.path" else f"{field}={repo}@commit"
        raise ValueError(
            f"{field} {repo} is no local path, so a Hugging Face id, and its revision is '': give the commit "
            f"of {repo} to pin, as {where}"
        )
    if not _COMMIT.fullmatch(revision):
        logger.warning("%s %s: revision %s is no commit and may move", field, repo, revision)
    try:
        return _snapshot(repo, revision, f"{field} {repo}")
    except RepositoryMalformed:
        raise
    except Exception as error:  # OSError, ValueError and httpx's own: to the user all are one
        from huggingface_hub import constants

        offline = ", and HF_HUB_OFFLINE forbids to fetch it" if constants.HF_HUB_OFFLINE else ""
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{field} {repo} at {revision} is not in {constants.HF_HUB_CACHE}{offline} ({said}): check id, "
            "revision, access and network, or give a local folder"
        ) from error


def _snapshot(repo: str, revision: str, source: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    def download(names: Iterable[str], **how: Any) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **how))

    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # out of reach, or unknown, and maybe in the cache
        try:
            return download([INDEX], local_files_only=True)
        except OSError:
            raise error from None
    found = wanted(names, lambda name: (download([name]) / name).read_bytes(), source)
    if not found:
        raise RepositoryMalformed(
            f"{source} holds no model, but {listing(names)}: give the id of a diffusers pipeline, or of its "
            "transformer or VAE"
        )
    return download(found)
