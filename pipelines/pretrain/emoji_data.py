"""Load emoji pictures, on which a small colour model is trained.

They come in two npm packages, Noto Emoji (Google, Apache 2.0) and Twemoji (Twitter and others, CC BY 4.0),
whose data of names and categories is under the MIT licence:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0

leaves the two archives that `load_emoji` reads. Shapes: N pictures, C channels, H W image.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES: dict[str, tuple[str, ...]] = {
    "smiling face": ("face-smiling", "face-affection", "face-tongue"),
    "unhappy face": ("face-neutral-skeptical", "face-concerned", "face-sleepy", "face-unwell"),
    "animal face": ("cat-face", "animal-mammal"),
    "heart": ("heart",),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed"),
    "person": ("person",),
    "profession": ("person-role",),
    "bird": ("animal-bird",),
    "sea animal": ("animal-marine",),
    "flower": ("plant-flower",),
    "plant": ("plant-other",),
    "fruit": ("food-fruit",),
    "clock": ("time",),
    "weather": ("sky & weather",),
    "sign": ("arrow", "av-symbol", "religion", "transport-sign", "zodiac"),
    "flag": ("country-flag",),
}
"""Classes of the model, and the subcategories of Unicode that each is made of."""
_NAME_PART = {"animal-mammal": " FACE", "time": "CLOCK FACE"}
"""Of these subcategories only the pictures with such names: heads of mammals, not mammals in all poses."""
CLASS_NAMES = tuple(CLASSES)
SIDE = 32
VENDORS = ("google", "twitter")
DATA = (
    "emoji pictures of the npm packages emoji-datasource-google 16.0.0 (Noto Emoji, Apache 2.0) and "
    "emoji-datasource-twitter 16.0.0 (Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0)"
)
_LARGEST_FILE = 2**24  # bytes; the pictures have a few thousand, the list of emoji 1.5 million


def load_emoji(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (N, 3, SIDE, SIDE) uint8 on white, and labels (N,) int64.

    Raises:
        FileNotFoundError: the folder does not hold both archives.
        ValueError: an archive holds none of the pictures.
    """
    pictures, labels = [], []
    for vendor in VENDORS:
        found = sorted(folder.glob(f"emoji-datasource-{vendor}-*.tgz"))
        if not found:
            raise FileNotFoundError(
                f"data folder {folder} has no emoji-datasource-{vendor}-*.tgz: run "
                f"`npm pack emoji-datasource-{vendor}@16.0.0` there, or give the folder that holds it"
            )
        of_vendor = _read(found[-1], vendor)
        if not of_vendor:
            raise ValueError(f"{found[-1]} has none of the pictures in img/{vendor}/64: fetch version 16.0.0")
        pictures += [picture for picture, _ in of_vendor]
        labels += [label for _, label in of_vendor]
    return np.stack(pictures), np.array(labels, np.int64)


def row_weights(label_N: np.ndarray) -> np.ndarray:
    """Return weights (N,) by which rows are drawn so that each class is as likely.

    A third of the pictures are professions.
    """
    weight_N: np.ndarray = 1 / np.bincount(label_N)[label_N]
    return weight_N


def _read(archive: Path, vendor: str) -> list[tuple[np.ndarray, int]]:
    label_of = {each: i for i, parts in enumerate(CLASSES.values()) for each in parts}
    folder = f"package/img/{vendor}/64/"
    files: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            is_wanted = member.name == "package/emoji.json" or member.name.startswith(folder)
            if is_wanted and member.isfile() and member.size < _LARGEST_FILE:
                content = tar.extractfile(member)
                assert content is not None
                files[Path(member.name).name] = content.read()
    entries = json.loads(files.get("emoji.json", b"[]"))
    return [
        (_picture(files[image]), label_of[entry["subcategory"]])
        for entry in sorted(entries, key=lambda entry: str(entry["image"]))
        if entry["subcategory"] in label_of and _NAME_PART.get(entry["subcategory"], "") in entry["name"]
        for image in (entry["image"], *(each["image"] for each in entry.get("skin_variations", {}).values()))
        if image in files
    ]


def _picture(content: bytes) -> np.ndarray:
    """Decode a picture (3, SIDE, SIDE), its transparent parts white."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(white, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small).transpose(2, 0, 1)
