"""The levels of execution, and which one a device has.

`eager` runs operation by operation; `compiled` runs each branch as one graph of torch.compile; `graphed`
replays each step from a CUDA graph of compiled branches.
"""

import torch

from harmonica.execution.compiled import CompiledRunner
from harmonica.execution.eager import EagerRunner
from harmonica.models.base import BranchedTransformer

_EAGER, _COMPILED = EagerRunner(), CompiledRunner()


def warm_ups(model: BranchedTransformer) -> int:
    """Return the number of runs of a batch after which run times are constant.

    A graphed trajectory is compiled in its first run and recorded in its second.
    """
    return 2 if model.execution == "graphed" else 1


def runner_of(model: BranchedTransformer) -> EagerRunner:
    """Return what runs the model's branches at its level of execution.

    Inside torch.compile, of a pipeline's transformer say, branches are part of that graph.
    """
    is_eager = model.execution == "eager" or torch.compiler.is_compiling()
    return _EAGER if is_eager else _COMPILED
