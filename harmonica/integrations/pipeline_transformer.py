"""Define the base of the adapters of diffusers' transformers.

Shapes: N batch, C channels, H W image.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.integrations.timestep_reader import on_host
from harmonica.models.base import BranchedTransformer
from harmonica.models.fingerprint import Fingerprint

# They move or convert a layer's weights just before it runs, and leave what it computes as it is.
_MOVING_HOOKS = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")
_HARMLESS_HOOKS = (*_MOVING_HOOKS, "layer_execution_tracker", "peft_autocast_disable")


@dataclass(frozen=True, slots=True)
class Call:
    """Holds one call of a transformer's forward."""

    sample_NCHW: Tensor
    timestep_N: Tensor
    given_timestep_N: Tensor
    """The same values where they were given, which may be the host."""
    arguments: dict[str, Any]
    """All arguments of the call, by diffusers' names."""


class KeptValue:
    """Keeps a value while the tensors that it was made from stay as they are."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Make the value anew when it is asked for next."""
        self._sources: list[tuple[Tensor | None, int | None]] | None = None
        self._value: Any = None
        self.times_made = 0

    def get(self, sources: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
        """Return the value, made anew where a source is another tensor or has changed."""
        # A tensor of inference mode does not count its changes.
        found = [(each, None if each is None or each.is_inference() else each._version) for each in sources]
        if self._sources is None or not all(
            one is other and version == other_version
            for (one, version), (other, other_version) in zip(found, self._sources)
        ):
            self._value = make()
            self._sources, self.times_made = found, self.times_made + 1
        return self._value


class PipelineTransformer(ABC):
    """Joins a diffusers module, its view as branches and its calling convention."""

    view: BranchedTransformer
    processor_arguments = "cross_attention_kwargs"
    """The forward's argument that is passed on to attention processors."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer: Any = transformer
        self._condition = KeptValue()
        blocks: Any = transformer.transformer_blocks
        self.blocks: list[nn.Module] = list(blocks)

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
        timestep = torch.as_tensor(given.arguments["timestep"]).reshape(-1)
        placed = timestep
        if timestep.device != sample.device and len(timestep) == 1 and on_host(timestep):
            # A fill by the device itself: to copy a number from the host would wait for the device.
            placed = torch.full((1,), timestep.item(), dtype=timestep.dtype, device=sample.device)
        rows = len(sample)
        placed = placed.to(sample.device)
        return Call(sample, placed.expand(rows), timestep.expand(rows), given.arguments)

    def condition(self, arguments: dict[str, Any]) -> Any:
        """Return the condition for the view's `embed` from a forward's arguments.

        Computed at the first step of a trajectory, and kept as long as the arguments stay the same.

        Raises:
            ValueError: an argument that the branches do not take.
        """
        sources = self.sources(arguments)
        return self._condition.get(sources, lambda: self.project(self.raw_condition(arguments)))

    def forget(self) -> None:
        """Drop the condition, at the end of a trajectory."""
        self._condition.forget()

    def check(self) -> None:
        """Refuse other caches, and hooks on modules that a plan does not call.

        Raises:
            ValueError: names the module, what it has, and the cure.
        """
        blocks = list(self.transformer.transformer_blocks)
        if len(blocks) != len(self.blocks) or any(one is not new for one, new in zip(self.blocks, blocks)):
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

    def moving_hook(self) -> str | None:
        """Return a hook that moves or converts weights while the model runs, if any."""
        for name, module in self.transformer.named_modules():
            if found := [each for each in _diffusers_hooks(module) if each in _MOVING_HOOKS]:
                return found[0]
            if name and hasattr(module, "_hf_hook"):
                return type(module._hf_hook).__name__
        return None

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the weights without adapters."""

    @abstractmethod
    def sources(self, arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """Return the arguments of a forward that its condition is made from.

        Raises:
            ValueError: an argument that the branches do not take.
        """

    @abstractmethod
    def raw_condition(self, arguments: dict[str, Any]) -> Any:
        """Return the condition before it is projected.

        It is what `BranchedTransformer.prepare` takes.

        Raises:
            ValueError: an argument that the branches do not take.
        """

    def project(self, raw_N: Any) -> Any:
        """Return the condition for the view's `embed`."""
        return raw_N

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
