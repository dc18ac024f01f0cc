"""The search for the state dict in any trainer's checkpoint, with plain names."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from harmonica.io.weight_values import first_fault

logger = logging.getLogger(__name__)

_AVERAGES = ("ema", "ema_state_dict", "model_ema", "ema_model", "shadow")
_MODELS = ("model", "state_dict", "model_state_dict", "module", "net", "checkpoint")
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and activation checkpointing add to wrapped modules."""
_BEFORE = ("module.", "model.")
"""Prefixes of all names by DistributedDataParallel, `AveragedModel`, and trainers that hold a model."""
_COUNTERS = ("n_averaged",)  # of `AveragedModel`
_NAMED = 6  # keys that an error names


def find_state(contents: Any, source: str) -> dict[str, Any]:
    """Return the weights of a checkpoint by plain names.

    Averaged weights (`ema` and the like) come before the others, if they are there and neither zero nor
    broken; what is passed over for that is logged.

    Args:
        contents: the content of the file.

    Raises:
        ValueError: there are no named tensors, or two of one plain name.
    """
    found = list(_states(contents))
    if not found:
        raise ValueError(f"{source} holds no named tensors{_described(contents)}: give a state dict")
    passed_over = []
    # One state dict alone needs no choice; all its values are checked when the model is assembled.
    for place, state in found if len(found) > 1 else ():
        if not (fault := first_fault(state)):
            break
        passed_over.append((place, fault))
    else:
        place, state = found[0]
        passed_over = []
    for other, fault in passed_over:
        logger.warning("%s: %r is passed over since its %s, %r is taken", source, other, fault, place)
    return _plain(state, source)


def _states(contents: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return all state dicts in a checkpoint with their places, best first."""
    if not isinstance(contents, Mapping):
        return
    is_wrapper = False
    for key in (*_AVERAGES, *_MODELS):
        if isinstance(inner := contents.get(key), Mapping):
            for one in _states(inner, f"{place}.{key}".lstrip(".")):
                is_wrapper = True
                yield one
    if not is_wrapper and any(isinstance(value, Tensor) for value in contents.values()):
        yield place, contents


def _plain(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    names = {
        name: ".".join(part for part in str(name).split(".") if part not in _INSIDE)
        for name in state
        if name not in _COUNTERS
    }
    while prefix := next((p for p in _BEFORE if all(name.startswith(p) for name in names.values())), ""):
        names = {name: plain.removeprefix(prefix) for name, plain in names.items()}
    plain: dict[str, Any] = {}
    for name, short in names.items():
        if short in plain:
            raise ValueError(f"{source} has {short} twice, once as {name}: save one model's state dict alone")
        plain[short] = state[name]
    return plain


def _described(contents: Any) -> str:
    if not isinstance(contents, Mapping):
        return f" but a {type(contents).__name__}"
    keys = [f"{key} ({type(value).__name__})" for key, value in list(contents.items())[:_NAMED]]
    return f", it has {', '.join(keys) or 'no keys'}"
