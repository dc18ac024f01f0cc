"""Load Fashion-MNIST (Zalando Research, MIT licence).

The built-in models were trained on its images.
"""

import gzip
from pathlib import Path
from typing import Literal

import numpy as np

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train", "test": "t10k"}


def load_fashion_mnist(
    split: Literal["train", "test"], folder: Path = DEFAULT_FOLDER
) -> tuple[np.ndarray, np.ndarray]:
    """Return images (rows, 1, 28, 28) uint8 and labels (rows,) int64.

    Raises:
        FileNotFoundError: the folder does not hold the four IDX files.
    """
    images_path = folder / f"{_FILES[split]}-images-idx3-ubyte.gz"
    labels_path = folder / f"{_FILES[split]}-labels-idx1-ubyte.gz"
    if not images_path.exists() or not labels_path.exists():
        raise FileNotFoundError(
            f"data folder {folder} has no Fashion-MNIST: install Debian's package "
            "dataset-fashion-mnist, or give the folder that holds the four .gz files"
        )
    images = np.frombuffer(gzip.decompress(images_path.read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(labels_path.read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, 1, 28, 28), labels.astype(np.int64)
