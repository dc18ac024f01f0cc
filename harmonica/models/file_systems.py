"""Files by path or URI, opened in one way by all that read or write them.

S3 is set up as Amazon's own tools are, by environment and `~/.aws`, so that pyarrow, s3fs, boto3 and MLflow
agree; `pipelines.storage.settle_endpoint` tells those that read less than others.
"""

from pathlib import Path

from pyarrow import fs

from harmonica.models.object_store import without_secrets

# Waits of 50 ms, doubled each time: 10 tries outlast a store that is gone for some 25 s; by itself 6 s.
_PATIENT_TRIES = 10


def shown(uri: str) -> str:
    """A path or URI as messages show it."""
    return without_secrets(uri) if "://" in uri else uri


def open_uri(uri: str, field: str, *, patient: bool = False) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or URI, and the path in it, without a slash at its end.

    Args:
        field: what errors call `uri`.
        patient: go on trying where an S3 store does not answer, some 50 s in all.

    Raises:
        ValueError: no such kind of URI; pyarrow's own words would quote the secrets in it.
    """
    path = uri if "://" in uri else str(Path(uri).expanduser().resolve())
    try:
        filesystem, root = fs.FileSystem.from_uri(path)
        if patient and isinstance(filesystem, fs.S3FileSystem):
            filesystem = _patient(filesystem)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{field} {shown(uri)} cannot be opened ({type(error).__name__}): give a path or an s3:// URI"
        ) from None
    return filesystem, root.rstrip("/")


def _patient(filesystem: fs.S3FileSystem) -> fs.S3FileSystem:
    """Made again as unpickling makes it, since a URI cannot say how often to try."""
    _, (settings,) = filesystem.__reduce__()
    return fs.S3FileSystem(**settings, retry_strategy=fs.AwsDefaultS3RetryStrategy(_PATIENT_TRIES))
