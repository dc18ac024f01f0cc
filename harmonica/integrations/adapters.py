"""Adapters of the transformers in diffusers' pipelines.

An adapter has all that `harmonica.apply` needs to know of an architecture: another one is one more class.
Shapes: N batch, C channels, H W image.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.models.base import BranchedTransformer
from harmonica.models.dit.diffusers_view import DiffusersDiT, base_parameters
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.pixart.model import PixArt
from harmonica.models.sana.model import Sana
from harmonica.models.text_blocks import ProjectedText
from harmonica.models.text_condition import TextCondition

# They differ in speed alone, so it does not matter that PixArt's cross-attention is computed without them.
_EQUAL_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "SanaAttnProcessor2_0",
    "XFormersAttnProcessor",
)
# They move or convert a layer's weights just before it runs, and leave what it computes as it is.
_HARMLESS_HOOKS = (
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a transformer's forward."""

    sample_NCHW: Tensor
    timestep_N: Tensor
    arguments: dict[str, Any]
    """All of them, by diffusers' names."""


class PipelineTransformer(ABC):
    """A diffusers module, its view as branches and its calling convention."""

    view: BranchedTransformer
    processor_arguments = "cross_attention_kwargs"
    """The forward's argument that is passed on to attention processors."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer: Any = transformer
        blocks: Any = transformer.transformer_blocks
        self._blocks = list(blocks)

    def read(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of a forward.

        Raises:
            ValueError: an argument that the branches do not take.
        """
        signature = inspect.signature(type(self.transformer).forward)
        given = signature.bind(self.transformer, *args, **kwargs)
        given.apply_defaults()
        sample, name = given.arguments["hidden_states"], self.processor_arguments
        for_processors = given.arguments[name]
        # diffusers ignores `scale` too: adapters have their own.
        if set(for_processors or ()) - {"scale"}:
            raise ValueError(
                f"{name} has {', '.join(for_processors)}: under a plan attention processors "
                "are given nothing, leave it out or harmonica.remove first"
            )
        timestep = torch.as_tensor(given.arguments["timestep"], device=sample.device)
        return Call(sample, timestep.reshape(-1).expand(len(sample)), given.arguments)

    @abstractmethod
    def forget(self) -> None:
        """Drop what is cached of the condition, at the end of a trajectory."""

    def check(self) -> None:
        """Refuse other caches, and hooks on modules that a plan does not call.

        Raises:
            ValueError: names the module, what it has, and the cure.
        """
        blocks = list(self.transformer.transformer_blocks)
        if len(blocks) != len(self._blocks) or any(one is not new for one, new in zip(self._blocks, blocks)):
            raise ValueError(
                "transformer.transformer_blocks are not those that the plan was put on: something, such as "
                "another cache (cache-dit), has replaced them. Take that off, or harmonica.remove first"
            )
        refuse_other_caches(self.transformer)
        for name, module in self.bypassed():
            hooks = [type(module._hf_hook).__name__] if hasattr(module, "_hf_hook") else []
            hooks += _diffusers_hooks(module)
            plain = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            hooks += [getattr(hook, "__name__", type(hook).__name__) for hook in plain]
            if hooks:
                raise ValueError(
                    f"transformer.{name} has the hook {', '.join(hooks)}, and a plan does not call that "
                    "module: take it off (to save memory, use pipe.enable_model_cpu_offload), or "
                    "harmonica.remove first"
                )

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the weights without adapters."""

    @abstractmethod
    def condition(self, arguments: dict[str, Any]) -> Any:
        """Return the condition for the view's `embed` from a forward's arguments.

        Raises:
            ValueError: an argument that the branches do not take.
        """

    @abstractmethod
    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield modules that diffusers calls and the view does not, with their names."""


def refuse_other_caches(transformer: nn.Module) -> None:
    """Refuse diffusers' hooks that change what is computed.

    Raises:
        ValueError: names the module, its hook, and the cure.
    """
    for name, module in transformer.named_modules():
        hooks = [hook for hook in _diffusers_hooks(module) if hook not in _HARMLESS_HOOKS]
        if hooks:
            raise ValueError(
                f"{f'transformer.{name}'.rstrip('.')} has the hook {', '.join(hooks)}, which changes "
                "what is computed, as diffusers' own caches do: use that or a plan, not both. Take it "
                "off, or harmonica.remove first"
            )


def _diffusers_hooks(module: nn.Module) -> list[str]:
    """Return the names of a module's hooks in diffusers' registry."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks)


class _PipelineDiT(PipelineTransformer):
    view: DiffusersDiT

    def __init__(self, transformer: Any, identity: dict[str, Any]) -> None:
        super().__init__(transformer)
        self.view = DiffusersDiT(transformer)

    def condition(self, arguments: dict[str, Any]) -> Tensor:
        labels_N: Tensor = arguments["class_labels"]
        return labels_N

    def forget(self) -> None:
        pass

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for i, block in enumerate(self.transformer.transformer_blocks):
            yield f"transformer_blocks.{i}", block
            yield f"transformer_blocks.{i}.norm1", block.norm1
            if i:
                yield f"transformer_blocks.{i}.norm1.emb", block.norm1.emb

    def check(self) -> None:
        super().check()
        for i, block in enumerate(self.transformer.transformer_blocks):
            for name, module in block.norm1.emb.named_modules():
                if hasattr(module, "base_layer"):
                    raise ValueError(
                        f"transformer.transformer_blocks.{i}.norm1.emb.{name} has an adapter: timestep and "
                        "label are embedded once for all blocks, give adapters of other layers"
                    )

    def fingerprint(self) -> Fingerprint:
        return self.view.fingerprint()


class _PipelinePixArt(PipelineTransformer):
    """Projects the text at the first step of a trajectory and caches the result."""

    view: PixArt | Sana
    view_class: type[PixArt | Sana] = PixArt

    def __init__(self, transformer: Any, identity: dict[str, Any]) -> None:
        super().__init__(transformer)
        # A router says what is a branch; another architecture's is refused by the check that follows.
        kinds, tokens = identity.get("cacheable", ("attn", "mlp")), identity.get("text_tokens", 1)
        self.view = self.view_class(transformer, text_tokens=tokens, cacheable=tuple(kinds))
        self._kept: tuple[list[tuple[Any, int | None]], ProjectedText] | None = None

    def condition(self, arguments: dict[str, Any]) -> ProjectedText:
        if arguments["attention_mask"] is not None:
            raise ValueError("attention_mask is given: under a plan all image tokens see all, leave it out")
        sizes = arguments.get("added_cond_kwargs") or {}
        text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
        sources = [
            (value, None if value is None or value.is_inference() else value._version)
            for value in (text, mask, sizes.get("resolution"), sizes.get("aspect_ratio"))
        ]
        if self._kept is None or not all(
            one is other and version == other_version
            for (one, version), (other, other_version) in zip(sources, self._kept[0])
        ):
            if mask is not None and mask.ndim != 2:
                raise ValueError(
                    f"encoder_attention_mask has shape {tuple(mask.shape)}: under a plan give the mask "
                    "itself (N, S), 1 at words and 0 at padding"
                )
            condition = TextCondition(
                embeddings=text,
                mask=text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool(),
                resolution=sizes.get("resolution"),
                aspect_ratio=sizes.get("aspect_ratio"),
            )
            self._kept = sources, self.view.project(condition)
        return self._kept[1]

    def forget(self) -> None:
        self._kept = None

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(base_parameters(self.transformer))

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for i, block in enumerate(self.transformer.transformer_blocks):
            yield f"transformer_blocks.{i}", block
            yield f"transformer_blocks.{i}.attn2", block.attn2

    def check(self) -> None:
        super().check()
        for i, block in enumerate(self.transformer.transformer_blocks):
            name = type(block.attn2.processor).__name__
            if name not in _EQUAL_PROCESSORS:
                raise ValueError(
                    f"transformer.transformer_blocks.{i}.attn2 has the attention processor {name}, which a "
                    "plan does not call: transformer.set_default_attn_processor(), or harmonica.remove first"
                )


class _PipelineSana(_PipelinePixArt):
    view_class = Sana
    processor_arguments = "attention_kwargs"

    def read(self, *args: Any, **kwargs: Any) -> Call:
        call = super().read(*args, **kwargs)  # whose timestep the pipeline has scaled
        return replace(call, timestep_N=call.timestep_N / self.transformer.config.timestep_scale)

    def condition(self, arguments: dict[str, Any]) -> ProjectedText:
        # The scale of adapters is set by the very forward that a plan replaces.
        for name in ("guidance", "controlnet_block_samples", "attention_kwargs"):
            if arguments[name] is not None:
                raise ValueError(f"{name} is given: the branches do not take it, leave it out")
        return super().condition(arguments)

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().bypassed()
        yield "norm_out", self.transformer.norm_out


_KNOWN: dict[str, Callable[[Any, dict[str, Any]], PipelineTransformer]] = {
    "DiTTransformer2DModel": _PipelineDiT,
    "PixArtTransformer2DModel": _PipelinePixArt,
    "SanaTransformer2DModel": _PipelineSana,
}


def pipeline_transformer(transformer: nn.Module, identity: dict[str, Any]) -> PipelineTransformer:
    """Return the adapter of `transformer`.

    Args:
        identity: of the model that the router was made for; it says what is a branch.

    Raises:
        ValueError: another class, or one whose configuration has no branch view.
    """
    name = type(transformer).__name__
    if name not in _KNOWN:
        raise ValueError(
            f"transformer is a {name}: give pipe.transformer, a {' or '.join(_KNOWN)} (of a PeftModel, its "
            "get_base_model())"
        )
    return _KNOWN[name](transformer, identity)
