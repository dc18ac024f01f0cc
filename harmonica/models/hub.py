"""Models on the Hugging Face hub, at a pinned revision, through huggingface_hub's own cache."""

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = "diffusion_pytorch_model*"
# A pipeline's repository holds more than a model needs; safetensors first, see `from_hub`.
_FOLDERS = ("", "transformer/", "vae/")
_PATTERNS = [
    "model_index.json",
    "model.safetensors",
    "scheduler/scheduler_config.json",
    *(f"{folder}config.json" for folder in _FOLDERS),
    *(f"{folder}{_WEIGHTS}.{end}" for folder in _FOLDERS for end in ("safetensors", "index.json")),
]
_UNWANTED = ["*.fp16.*", "*.bf16.*", "*non_ema*"]


def from_hub(repo: str, revision: str, field: str) -> Path:
    """The snapshot's folder, downloaded unless it is cached; HF_HUB_OFFLINE keeps to the cache.

    Raises:
        ValueError: no revision, or not there and not to be had.
    """
    if not revision:
        where = "model.revision" if field == "model.path" else f"{field}={repo}@commit"
        raise ValueError(
            f"{field} {repo} is no local path, so a Hugging Face id, and its revision is '': give the commit "
            f"of {repo} to pin, as {where}"
        )
    if not _COMMIT.fullmatch(revision):
        logger.warning("%s %s: revision %s is no commit and may move", field, repo, revision)
    from huggingface_hub import constants, snapshot_download

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED)
        )

    try:
        root = download(_PATTERNS)
        pickled = [f"{folder}{_WEIGHTS}.bin" for folder in _FOLDERS if _bare(root / folder)]
        return download(_PATTERNS + pickled) if pickled else root
    except Exception as error:  # OSError, ValueError and httpx's own: to the user all are one
        offline = ", and HF_HUB_OFFLINE forbids to fetch it" if constants.HF_HUB_OFFLINE else ""
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{field} {repo} at {revision} is not in {constants.HF_HUB_CACHE}{offline} ({said}): check id, "
            "revision, access and network, or give a local folder"
        ) from error


def _bare(folder: Path) -> bool:
    """A model's folder without safetensors: its weights are `.bin`, which is read tensors only."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))
