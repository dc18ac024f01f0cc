"""Exchange the plans of several routers between calls of one pipeline.

`harmonica.remove` and `harmonica.apply` would read the weights and record the forward anew each time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.forward_holders import own_forward
from harmonica.integrations.forward_slots import (
    check_own_forward,
    put_on,
    take_off,
    unwrapped,
)
from harmonica.integrations.recorded.compiled_units import compile_blocks
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.even_trajectory import even_calls
from harmonica.integrations.recorded.pipelines import (
    calls_of,
    check_router,
    is_recorded,
    transformers_of,
)
from harmonica.integrations.recorded.trajectory import TransformerCall
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import views_of
from harmonica.integrations.recorded.weights import fingerprint_of
from harmonica.models.fingerprint import Fingerprint

PipelinePlan = Sequence[TransformerCall]
"""What takes the place of the forward of each transformer of a pipeline."""


class ExchangedPlans:
    """The plans of one pipeline, of which one is on at a time, or none.

    They share what was recorded.
    """

    def __init__(self, pipe: Any, *, is_compiled: bool = False) -> None:
        """Find the transformers of a pipeline, whose weights must not change from now on.

        Args:
            is_compiled: run each of their recorded branches as a graph of torch.compile.

        Raises:
            ValueError: there is none, or something wraps its forward.
        """
        self._is_compiled = is_compiled
        self._modules = [unwrapped(each) for each in transformers_of(pipe)]
        for module in self._modules:
            check_own_forward(module)
        self._fingerprint: Fingerprint | None = None
        self._views: dict[tuple[str, ...], list[RecordedTransformer]] = {}

    def make(self, artifact: RouterArtifact) -> PipelinePlan:
        """Make the plan of a router, for `under`.

        Raises:
            ValueError: the router was made for another class or for other weights, or in no pipeline.
        """
        if not is_recorded(artifact):
            raise ValueError(
                f"the router was made for a {artifact.model.get('architecture')} outside of any pipeline: "
                "train one by harmonica.train_pipeline"
            )
        check_router(self._modules, artifact, self._read_weights, check_weights=True)
        cacheable = tuple(artifact.model["cacheable"])
        if cacheable not in self._views:
            forwards = [own_forward(module) for module in self._modules]
            self._views[cacheable] = views_of(
                self._modules, forwards, cacheable=cacheable, is_compiled=self._is_compiled
            )
        return list(calls_of(self._views[cacheable], artifact, allow_other_sampler=False))

    def make_even(self, even: EvenSteps) -> PipelinePlan:
        """Make the plan of evenly spread steps, for `under`.

        Raises:
            ValueError: another cache is on.
        """
        forwards = [own_forward(module) for module in self._modules]
        return list(even_calls(self._modules, forwards, even, is_compiled=self._is_compiled))

    def compile_blocks(self) -> None:
        """Compile the transformers' blocks, if that was asked for.

        Where there is a plan, it compiles its own branches.
        """
        for module in self._modules if self._is_compiled and not self._views else ():
            compile_blocks(module)

    def _read_weights(self) -> Fingerprint:
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self._modules)
        return self._fingerprint

    @contextmanager
    def under(self, plan: PipelinePlan | None) -> Iterator[None]:
        """Let calls of the pipeline follow a plan, or compute everything."""
        put: list[Any] = []
        try:
            for module, planned in zip(self._modules, plan or ()):
                put_on(module, planned)
                put.append(module)
            yield
        finally:
            for module, planned in zip(put, plan or ()):
                planned.reset()
                take_off(module, planned)
