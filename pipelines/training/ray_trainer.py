"""Ray Train's trainer without what a training here has no use for.

This is a module of its own, since the process of Ray Train's controller imports it: beside the stage itself,
it would import models and MLflow for it.
"""

from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from ..runtime.log_filters import drop_remarks
from ..runtime.ray_runtime import is_private


class QuietController(ray.train.UserCallback):
    """Keep Ray's remarks away in the process of Ray Train's controller.

    It is made anew there.
    """

    def __init__(self) -> None:
        drop_remarks()

    def __reduce__(self) -> tuple[type["QuietController"], tuple[()]]:
        return QuietController, ()


class Trainer(TorchTrainer):
    """Start fewer actors, and leave Ctrl-C as it is.

    With Ray Train's own handler this process would end with exit code 0.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray's callbacks without those whose actors would have nothing to do.

        Each actor is a process, which takes seconds of a core to start. One hands out data sets, of which
        this trainer has none: workers open their own streams. The other frees the workers' place if the
        controller dies, and a private cluster ends with this process anyway.
        """
        # By name, so that a release of Ray that has moved or renamed them just starts them.
        idle = {"DatasetsCallback"}
        if is_private():
            idle.add("PlacementGroupCleanerCallback")
        made = super()._create_default_callbacks()  # type: ignore[misc]  # of V2, which Ray's types leave out
        return [one for one in made if type(one).__name__ not in idle]
