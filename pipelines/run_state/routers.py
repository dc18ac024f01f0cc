"""Load routers from a run's storage."""

from harmonica.core.artifact import RouterArtifact

from .storage import RunStorage


def load_router(storage: RunStorage, name: str) -> RouterArtifact:
    """Load the router artifact in a folder of the run.

    Raises:
        ValueError: files are missing or damaged.
    """
    with storage.local_folder(name) as folder:
        return RouterArtifact.load(folder)
