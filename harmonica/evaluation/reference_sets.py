"""Read statistics of the real images that samples are compared with.

They are the shipped test images, or ADM's reference batches.

Shapes: M reference images, F pooled features, S spatial ones, H W image.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors.torch import load_file
from torch import Tensor

from harmonica.builtin import CLASSIFIER
from harmonica.evaluation.classifier import STATISTICS_FILE
from harmonica.evaluation.feature_extractors import InceptionFeatures
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.io.paths import local

MAX_IMAGES = 10_000
"""Number of reference images whose features are kept, for KID, precision and recall."""
FEATURES_FILE, SPATIAL_FILE = "reference_features.safetensors", "spatial_statistics.safetensors"
_BATCH = 50
_LARGEST_SIDE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSet:
    """Holds statistics of real images; metrics that need a missing one are left out."""

    pooled: FeatureStatistics | None = None
    spatial: FeatureStatistics | None = None
    features_MF: Tensor | None = None
    """Pooled features of single images."""


def builtin_reference(folder: Path = CLASSIFIER) -> ReferenceSet:
    """Return a shipped classifier's statistics of real images.

    With them are the features of at most 2,000.
    """
    return ReferenceSet(
        FeatureStatistics.load(folder / STATISTICS_FILE),
        FeatureStatistics.load(folder / SPATIAL_FILE),
        load_file(folder / FEATURES_FILE)["features"].float(),
    )


def read_adm_reference(path: str | Path, extractor: InceptionFeatures | None = None) -> ReferenceSet:
    """Read an `.npz` of ADM's suite, such as VIRTUAL_imagenet256_labeled.npz.

    It may hold `mu` and `sigma` of pooled features, `mu_s` and `sigma_s` of spatial ones, and the images
    as `arr_0` (M, H, W, 3) uint8. Nothing is unpickled, and images are read some at a time.

    Args:
        extractor: turns up to `MAX_IMAGES` of the images into features; None leaves them alone.

    Raises:
        ValueError: unreadable, or none of these arrays, or of other types or shapes.
    """
    try:
        with zipfile.ZipFile(local(path, "evaluate.reference_statistics")) as archive:
            names = {Path(name).stem for name in archive.namelist()}
            pooled, spatial = (_read_gaussian(archive, names, end) for end in ("", "_s"))
            features = None
            if extractor is not None and "arr_0" in names:
                features = _features(archive, extractor)
    except (OSError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise _refusal(path, f"cannot be read ({error})") from error
    except ValueError as error:
        raise _refusal(path, str(error)) from error
    if pooled is None and "arr_0" not in names:
        raise _refusal(path, f"holds {', '.join(sorted(names)) or 'nothing'}")
    return ReferenceSet(pooled, spatial, features)


def _refusal(path: str | Path, words: str) -> ValueError:
    return ValueError(
        f"evaluate.reference_statistics {path} {words}: give an .npz with mu and sigma, or arr_0, as ADM's"
    )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type of an array before its data is read."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, column_major, dtype = read(file)
    if column_major or dtype.hasobject:
        raise ValueError(f"holds an array of type {dtype}{', by columns' if column_major else ''}")
    return shape, dtype


def _take(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    data = file.read(size)
    if len(data) < size:
        raise EOFError("it ends early")
    return np.frombuffer(data, dtype).reshape(shape)


_SIZES = {"": 2048, "_s": 2023}


def _read_gaussian(archive: zipfile.ZipFile, names: set[str], end: str) -> FeatureStatistics | None:
    if not {f"mu{end}", f"sigma{end}"} <= names:
        return None
    size = _SIZES[end]
    mean = _numbers(archive, f"mu{end}", (size,))
    return FeatureStatistics(mean, _numbers(archive, f"sigma{end}", (size, size)), count=0)


def _numbers(archive: zipfile.ZipFile, name: str, expected: tuple[int, ...]) -> Tensor:
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file)
        if shape != expected or dtype.kind != "f":
            raise ValueError(f"has {name} of shape {shape} and type {dtype}, not {expected} numbers")
        return torch.from_numpy(_take(file, shape, dtype).astype(np.float64))


def _image_batches(archive: zipfile.ZipFile) -> Iterator[np.ndarray]:
    with archive.open("arr_0.npy") as file:
        shape, dtype = _header(file)
        is_image = len(shape) == 4 and shape[3] == 3 and max(shape[1:3]) <= _LARGEST_SIDE
        if not is_image or dtype != np.uint8:
            raise ValueError(f"has arr_0 of shape {shape} and type {dtype}, not (M, H, W, 3) uint8")
        count = min(shape[0], MAX_IMAGES)
        for start in range(0, count, _BATCH):
            yield _take(file, (min(_BATCH, count - start), *shape[1:]), dtype)


def _features(archive: zipfile.ZipFile, extractor: InceptionFeatures) -> Tensor:
    batches = _image_batches(archive)
    return torch.cat(
        [extractor.of_pixels(torch.tensor(pixels).permute(0, 3, 1, 2)).pooled_NF for pixels in batches]
    )
