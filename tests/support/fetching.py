"""A bucket and a repository that models are fetched from, and `local_path` in another process."""

import os
import subprocess
import sys
from pathlib import Path

BUCKET, REPO = "models", "org/tiny-dit"
SECRET = "hush+hush/hush"


def upload(s3, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FETCH = "import sys; from harmonica.io.resolve import local_path; print(local_path(*sys.argv[1:]))"


def fetch(cache: Path, endpoint: str, *arguments: str, offline: bool = False):
    """`local_path` in a new process, as huggingface_hub reads its environment once."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], env=environment, capture_output=True, text=True
    )
    return result.stdout.strip(), result.stderr
