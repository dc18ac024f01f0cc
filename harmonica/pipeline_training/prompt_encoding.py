"""Encode prompts by a pipeline's own `encode_prompt`, under its arguments' names.

A pipeline's `encode_prompt` returns a tuple; what its members are called is read from the pipeline's own
`__call__`, which assigns them and takes them again as arguments: `prompt_embeds`, `pooled_prompt_embeds`.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmonica.data.embedding_store import Embedding

_MASK = "_mask"


@dataclass(frozen=True, slots=True)
class _Encoding:
    """One call of `encode_prompt` in a pipeline's `__call__`."""

    targets: tuple[str, ...]
    """What its results are assigned to."""
    is_negative: bool
    """Whether it is given the negative prompt for its prompt."""


def _encodings(pipeline_class: Any) -> list[_Encoding]:
    try:
        source = inspect.getsource(inspect.unwrap(pipeline_class.__call__))
    except (OSError, TypeError):  # no source is at hand
        return []
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.value.func) != "self.encode_prompt":
            continue
        (target,) = node.targets
        names = [ast.unparse(one) for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
        given = {each.arg: ast.unparse(each.value) for each in node.value.keywords}
        first = given.get("prompt", ast.unparse(node.value.args[0]) if node.value.args else "")
        if first in ("prompt", "negative_prompt"):
            found.append(_Encoding(tuple(names), first == "negative_prompt"))
    return found


def embedding_names(pipeline_class: Any) -> tuple[str, ...]:
    """Return the arguments of a pipeline that its `encode_prompt` gives, in order.

    There are none where the pipeline has no such method, takes its results under no name, or encodes a
    prompt twice in different ways: then a call needs the prompt itself.
    """
    taken = inspect.signature(pipeline_class.__call__).parameters
    encodings = _encodings(pipeline_class)
    if [one.is_negative for one in encodings].count(False) != 1:
        return ()
    names = dict.fromkeys(name for one in encodings for name in one.targets if name in taken)
    return tuple(names) if any(name in names for name in encodings[0].targets) else ()


class PipelinePromptEncoder:
    """Encodes prompts one by one, so that none depends on the others of a batch."""

    def __init__(self, pipe: Any, *, negative_prompt: str = "", max_sequence_length: int = 0) -> None:
        """Encode by a pipeline that has its encoders; its transformer may be missing.

        Args:
            negative_prompt: encoded beside each prompt, where the pipeline takes its embeddings.
            max_sequence_length: tokens at most; 0 for the pipeline's own.
        """
        self.pipe, self.negative_prompt = pipe, negative_prompt
        self.max_sequence_length = max_sequence_length
        self.names = embedding_names(type(pipe))
        self._encodings = _encodings(type(pipe))
        self._taken = inspect.signature(type(pipe).encode_prompt).parameters if self.names else {}
        self._negative: Embedding | None = None

    @torch.no_grad()
    def encode(self, prompt: str) -> Embedding:
        """Return what the pipeline's call would be given in place of a prompt.

        Raises:
            ValueError: the pipeline's `encode_prompt` cannot be called without the rest of the pipeline.
        """
        found: Embedding = {}
        for one in self._encodings if self.names else ():
            if one.is_negative and self._negative is not None:
                found |= self._negative
                continue
            named = self._named(one, self._encoded(self.negative_prompt if one.is_negative else prompt))
            if one.is_negative:
                self._negative = named
            found |= named
        return found

    def _encoded(self, prompt: str) -> tuple[Any, ...]:
        offered = {
            "prompt": [prompt],
            "device": getattr(self.pipe, "_execution_device", torch.device("cpu")),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "negative_prompt": [self.negative_prompt],
        }
        if self.max_sequence_length:
            offered["max_sequence_length"] = self.max_sequence_length
        unset = {
            name: None
            for name, parameter in self._taken.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name != "self"
        }
        arguments = unset | {name: value for name, value in offered.items() if name in self._taken}
        try:
            given = self.pipe.encode_prompt(**arguments)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"model.path: {type(self.pipe).__name__}.encode_prompt cannot encode a prompt alone "
                f"({type(error).__name__}: {error}): train by harmonica.train_pipeline with embeddings"
            ) from error
        return given if isinstance(given, tuple) else (given,)

    def _named(self, encoding: _Encoding, values: tuple[Any, ...]) -> Embedding:
        given = dict(zip(encoding.targets, values, strict=True))
        found = {name: value for name, value in given.items() if name in self.names and value is not None}
        for name, value in given.items():
            whole = found.get(name.removesuffix(_MASK))
            # Without padding some pipelines give no mask; beside prompts of other lengths it is needed.
            if value is None and name in self.names and name.endswith(_MASK) and isinstance(whole, Tensor):
                found[name] = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
        return found
