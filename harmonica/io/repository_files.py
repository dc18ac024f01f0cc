"""The choice of the files that are read of a model's folder.

The folder is local, in a store or on the hub, and may hold its weights several times. Those in full
precision are loaded, else the variant `bf16`, else `fp16` (diffusers' `variant=`); of each, safetensors
before `.bin`, one file before shards. The configured precision does not matter, so that every machine has
the same weights and hence the same identity.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

INDEX = "model_index.json"
"""The file that makes a folder a pipeline's; it lists the parts."""
MODEL_STEMS = ("diffusion_pytorch_model",)
ENCODER_STEMS = ("model", "pytorch_model")
"""Names of weight files, as diffusers and transformers give them; the last for `.bin`."""
OWN_WEIGHTS = ("model.safetensors", "model.pt")
"""The weight files of a folder in our own layout, beside `config.json`; the first one there is read."""

_PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
"""The parts of the pipelines whose transformers have branch files."""
_LOADED = re.compile(
    r"scheduler|text_encoder(_\d)?|tokenizer(_\d)?|transformer(_\d)?|unconditional_transformer|vae"
    r"|image_encoder|feature_extractor|image_processor|processor"
)
"""Names of the parts of any pipeline that are read; others that it lists, as a safety checker, are not."""
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor", "processor")
_OF_WORDS = ("tokenizer", "processor")
_WORDS = (".json", ".model", ".txt", ".jinja")  # a tokenizer's own, sentencepiece's and a chat's template
_VARIANTS = ("", "bf16", "fp16")
_FORMATS = ("safetensors", "bin")
_WEIGHTS = re.compile(
    r"(?P<stem>[a-z_]+)(?:\.(?P<one>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<two>\w+))?\.(?P<format>safetensors|bin)"
)
_SHARDS = re.compile(
    r"(?P<stem>[a-z_]+)\.(?P<format>safetensors|bin)(?:\.(?P<one>\w+))?\.index(?:\.(?P<two>\w+))?\.json"
)
_BARE = (".safetensors", ".pt", ".pth", ".ckpt")
_NAMED = 12  # files that an error names


class RepositoryMalformed(ValueError):
    """A repository can be reached, but its content is invalid."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of one folder that are loaded, by name."""

    files: tuple[str, ...]
    """The name of the one file, or those of the shards in order."""
    index: str = ""
    """The index that maps tensors to shards; "" for one file."""
    variant: str = ""
    """The variant: `bf16`, `fp16`, or "" for full precision."""

    @property
    def is_safe(self) -> bool:
        """Return whether the files are safetensors."""
        return self.files[0].endswith(".safetensors")


def choose_weights(names: Iterable[str], stems: tuple[str, ...]) -> Weights | None:
    """Return the weight files to load of one folder's files; None if there are none.

    Args:
        stems: the names of weight files, `MODEL_STEMS` or `ENCODER_STEMS`.
    """
    whole: dict[tuple[str, str], str] = {}
    shards: dict[tuple[str, str], list[str]] = {}
    indices: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        found = _WEIGHTS.fullmatch(name) or _SHARDS.fullmatch(name)
        if found is None or found["stem"] not in stems:
            continue
        kind = found["one"] or found["two"] or "", found["format"]
        if name.endswith(".json"):
            indices[kind] = name
        elif found["shard"]:
            shards.setdefault(kind, []).append(name)
        else:
            whole[kind] = name
    for kind in ((variant, form) for variant in _VARIANTS for form in _FORMATS):
        if kind in whole:
            return Weights((whole[kind],), variant=kind[0])
        if kind in indices and kind in shards:
            return Weights(tuple(shards[kind]), indices[kind], kind[0])
    return None


def bare_checkpoint(names: Iterable[str], source: str) -> str:
    """Return the one checkpoint of a folder that has no configuration.

    Of files of one name it is the safetensors; "" if there is none.

    Raises:
        ValueError: there are several.
    """
    by_stem: dict[str, str] = {}
    names = sorted(names)
    for suffix in _BARE:
        for name in names:
            if name.endswith(suffix) and "/" not in name:
                by_stem.setdefault(name.removesuffix(suffix), name)
    if len(by_stem) > 1:
        raise RepositoryMalformed(
            f"{source} has no config.json and several checkpoints, {listing(by_stem.values())}: give the "
            "path of one of them"
        )
    return next(iter(by_stem.values()), "")


def listing(names: Iterable[str]) -> str:
    """Return some of the names, for an error."""
    names = sorted(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more or "nothing"


def own_weights(names: Collection[str]) -> str:
    """Return the weight file of a folder in our own layout; "" if there is none."""
    return next((name for name in OWN_WEIGHTS if name in names), "")


def wanted(names: Iterable[str], read: Callable[[str], bytes], source: str) -> list[str]:
    """Return the files of a repository that loading may need, sorted.

    A pipeline's are its index and, of the parts that this lists and that are read here, the configurations,
    the chosen weights and a tokenizer's words. Without an index, the same of a part or of several.

    Args:
        names: paths of all files, relative and with slashes.
        read: the contents of one of them, asked for the index alone.
        source: the name of the repository in errors.

    Raises:
        ValueError: the index is no JSON object, or nothing says which of several checkpoints is meant.
    """
    inside: dict[str, list[str]] = {}
    for name in names:
        part, _, own = name.rpartition("/")
        inside.setdefault(part, []).append(own)
    root = inside.get("", [])
    if INDEX in root:
        listed = listed_parts(read(INDEX), f"{source}: {INDEX}")
        return sorted([INDEX, *(file for part in listed for file in _of_part(part, inside.get(part, [])))])
    found = [file for part in _PARTS for file in _of_part(part, inside.get(part, []))]
    if "config.json" in root:
        own = own_weights(root)
        found += ["config.json", *_weight_names(root, MODEL_STEMS), *filter(None, [own])]
    elif not found:
        found = list(filter(None, [bare_checkpoint(root, source)]))
    return sorted(found)


def listed_parts(index: bytes, source: str) -> list[str]:
    """Return the parts that a `model_index.json` lists and that are read here.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        described = json.loads(index)
    except ValueError as error:
        raise RepositoryMalformed(f"{source} cannot be read ({error}): fetch it again") from error
    if not isinstance(described, dict):
        raise RepositoryMalformed(f"{source} holds no JSON object: fetch it again")
    # [library, class]; a part that was left out when the pipeline was saved is [null, null].
    return sorted(
        name
        for name, value in described.items()
        if _LOADED.fullmatch(name) and isinstance(value, list) and all(value)
    )


def _of_part(part: str, own: list[str]) -> list[str]:
    """Return the paths of one part's files that are read."""
    if part.startswith(_OF_WORDS):
        kept = [name for name in own if name.endswith(_WORDS)]
    else:
        kept = [name for name in own if name.endswith(".json") and not _SHARDS.fullmatch(name)]
    if not part.startswith(_WITHOUT_WEIGHTS):
        kept += _weight_names(own, ENCODER_STEMS if "encoder" in part else MODEL_STEMS)
    return [f"{part}/{name}" for name in kept]


def _weight_names(names: list[str], stems: tuple[str, ...]) -> list[str]:
    chosen = choose_weights(names, stems)
    return [*chosen.files, *filter(None, [chosen.index])] if chosen else []
