"""Files by path or URI, opened in one way by all that read or write them.

S3 is set up as Amazon's own tools are, by environment and `~/.aws`, so that pyarrow, s3fs, boto3 and MLflow
agree; `pipelines.run_state.storage.settle_endpoint` tells those that read less than others.
"""

from pyarrow import fs

from harmonica.io.paths import is_remote, resolved, shown

__all__ = ["open_uri", "shown"]

# Waits of 50 ms, doubled each time: 10 tries outlast a store that is gone for some 25 s; by itself 6 s.
_PATIENT_TRIES = 10


def open_uri(uri: str, field: str, *, patient: bool = False) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it, without a slash at its end.

    Args:
        field: what errors call `uri`.
        patient: go on trying where an S3 store does not answer, some 50 s in all.

    Raises:
        ValueError: no such kind of URI; pyarrow's own words would quote the secrets in it.
    """
    path = resolved(uri, field)
    if not is_remote(path):
        return fs.LocalFileSystem(), path.rstrip("/")
    try:
        filesystem, root = fs.FileSystem.from_uri(path)
        if patient and isinstance(filesystem, fs.S3FileSystem):
            filesystem = _patient(filesystem)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{field} {shown(path)} cannot be opened ({type(error).__name__}): give a path or an s3:// URI"
        ) from None
    return filesystem, root.rstrip("/")


def _patient(filesystem: fs.S3FileSystem) -> fs.S3FileSystem:
    """Made again as unpickling makes it, since a URI cannot say how often to try."""
    _, (settings,) = filesystem.__reduce__()
    return fs.S3FileSystem(**settings, retry_strategy=fs.AwsDefaultS3RetryStrategy(_PATIENT_TRIES))
