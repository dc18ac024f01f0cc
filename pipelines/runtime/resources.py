"""Check what the stages of a run ask Ray for against what there is of it."""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from harmonica.cli.common import say
from harmonica.validation.settings import SettingError

from ..config.serve import ServeConfig
from ..config.workflow import Stage, WorkflowConfig
from .private_cluster import logical_cpus
from .ray_runtime import is_private

_API_CPUS = 0.1  # of a replica that answers HTTP


@dataclass(frozen=True)
class Need:
    """CPUs or GPUs that have to be there at the same time."""

    settings: Mapping[str, object]
    """The settings that it follows from, by name, those first that count for GPUs alone."""
    kind: str
    """GPU or CPU."""
    amount: float

    def is_met_by(self, have: Mapping[str, float]) -> bool:
        """Return whether so much is there."""
        return self.amount <= have.get(self.kind, 0) + 1e-6

    def shortage(self, place: str, have: Mapping[str, float]) -> str:
        """Return in words what was asked for, and how much there is."""
        asked = " and ".join(f"{name} is {value!r}" for name, value in self.settings.items())
        number = have.get(self.kind, 0)
        there = f"{number:g} {self.kind}{'' if number == 1 else 's'}" if number else f"no {self.kind}"
        wants = "" if self.amount == 1 else f", which takes {self.amount:g} {self.kind}s,"
        return f"{asked}{wants} and {place} has {there}"

    def cure(self, have: Mapping[str, float]) -> str:
        """Return what to give where there is less."""
        first, *numbers = self.settings
        if self.kind == "GPU" and not have.get("GPU"):
            return f"give --{first.replace('use_gpu', 'no-use-gpu')}"
        return f"give less for {' or '.join(numbers or [first])}"


def needs_of(config: WorkflowConfig, stages: Collection[Stage]) -> Iterator[Need]:
    """Yield what these stages cannot do without, in their order.

    Ray Data's actors, the trials of a sweep and the workers of a comparison come one after another where
    there is no room for all of them, so that a single GPU suffices. Ray Train's workers start together, and
    an endpoint is ready once all of its replicas are.
    """
    train, evaluate = config.train, config.evaluate
    gpu_of: dict[Stage, tuple[str, bool]] = {
        "prompts": ("prompts.use_gpu", config.prompts.use_gpu),
        "evaluate": ("evaluate.use_gpu", evaluate.use_gpu),
        "sweep": ("train.use_gpu", train.use_gpu),
        "register": ("evaluate.use_gpu", evaluate.use_gpu),
        "compare": ("evaluate.use_gpu", evaluate.use_gpu),
    }
    for stage in (one for one in config.stages if one in stages):
        if stage == "train":
            name = "min_workers" if train.min_workers else "num_workers"
            workers = {f"train.{name}": train.counts[0]}
            if train.use_gpu:
                yield Need({"train.use_gpu": True, **workers}, "GPU", train.counts[0])
            else:
                yield Need(workers, "CPU", train.counts[0])
        elif stage == "serve":
            yield from needs_of_endpoint(config.serve)
        elif gpu_of[stage][1]:
            yield Need({gpu_of[stage][0]: True}, "GPU", 1)


def needs_of_endpoint(serve: ServeConfig) -> Iterator[Need]:
    """Yield what an endpoint cannot do without."""
    replicas = {"serve.min_replicas": serve.min_replicas}
    if serve.use_gpu:
        yield Need({"serve.use_gpu": True, **replicas}, "GPU", serve.min_replicas)
    cpus = serve.min_replicas * serve.num_cpus + _API_CPUS * serve.api_replicas
    yield Need({**replicas, "serve.num_cpus": serve.num_cpus}, "CPU", cpus)


@functools.cache
def _this_machine() -> Mapping[str, float]:
    """Return what a private cluster on this machine has, as Ray itself counts it."""
    spec = ResourceAndLabelSpec(num_cpus=logical_cpus(), object_store_memory=1)
    found: Mapping[str, float] = spec.resolve(is_head=True, node_ip_address="127.0.0.1").to_resource_dict()
    return found


def check_resources(config: WorkflowConfig, stages: Collection[Stage]) -> None:
    """Refuse what a private cluster could never place.

    Ray would wait for it without limit. A cluster that is joined may get more nodes, so nothing is refused
    there.

    Raises:
        SettingError: names the settings, their values, what the machine has, and the cure.
    """
    train = config.train
    spread = "train" in stages and train.placement_strategy == "STRICT_SPREAD"
    if is_private() and spread and train.num_workers > 1:
        raise SettingError(
            f"train.placement_strategy is 'STRICT_SPREAD' and train.num_workers is {train.num_workers}, each "
            "on a node of its own, and this machine is one: give PACK, or RAY_ADDRESS of a cluster that has "
            "more"
        )
    refuse_unmet(needs_of(config, stages))


def refuse_unmet(needs: Iterable[Need]) -> None:
    """Refuse what this machine has not, where the cluster is a private one.

    Raises:
        SettingError: names the settings, their values, what the machine has, and the cure.
    """
    have = _this_machine() if is_private() else {}
    for need in needs if is_private() else ():
        if not need.is_met_by(have):
            more = "has one" if need.kind == "GPU" and not have.get("GPU") else "has more"
            cure = f"{need.cure(have)}, or RAY_ADDRESS of a cluster that {more}"
            raise SettingError(f"{need.shortage('this machine', have)}: {cure}")


def say_shortage(config: WorkflowConfig, stages: Collection[Stage]) -> None:
    """Say what the cluster that was joined lacks.

    Stages wait until it has that.
    """
    if is_private():
        return
    have = ray.cluster_resources()
    for need in needs_of(config, stages):
        if not need.is_met_by(have):
            say(f"{need.shortage('the cluster', have)}: it waits until nodes are added, or {need.cure(have)}")
