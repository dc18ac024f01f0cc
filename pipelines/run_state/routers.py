"""A router from a run's storage."""

from harmonica.core.artifact import RouterArtifact

from .storage import RunStorage


def load_router(storage: RunStorage, name: str) -> RouterArtifact:
    """The artifact in that folder of the run.

    Raises:
        ValueError: files missing or damaged.
    """
    with storage.local_folder(name) as folder:
        return RouterArtifact.load(folder)
