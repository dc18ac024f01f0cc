"""The output folder of a training without Ray, from which it also resumes."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from harmonica.core.artifact import RouterArtifact
from harmonica.io.paths import local
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.validation.changed_settings import changed_settings

# Settings of how the model is run change values by rounding alone.
_FREE_TO_CHANGE = ("output", "device", "model.compile", "model.execution", "model.graph_memory")
_METRICS = "metrics"


def _replace(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader sees the old content or the new."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


class TrainingFolder:
    """The output folder of a run, from which it resumes; only rank 0 writes.

    The state also holds the lines of metrics since the state before, and the byte of the file where they
    begin. If a process ends between writing the state and writing the file, the next one completes the file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = local(path, "output"), settings
        self._state, self._metrics = self.path / "state.pt", self.path / "metrics.jsonl"
        self._pending: list[str] = []

    def check(self, defaults: dict[str, Any]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Args:
            defaults: the settings of a run that changes nothing.

        Raises:
            ValueError: a setting differs that may not.
        """
        path = self.path / "settings.json"
        if not self._state.is_file() or not path.is_file():
            return
        before = json.loads(path.read_text())
        if others := changed_settings(before, self.settings, _FREE_TO_CHANGE, defaults):
            raise ValueError(
                f"{others}: resume the run in {self.path} with its own settings, or give another output"
            )

    def load(self, run: MultiTargetTrainer) -> None:
        """Go on from the last state, if there is one; all ranks call it."""
        if self._state.is_file():
            run.load_state(self._read_state(run.device))

    def mend(self, device: torch.device) -> None:
        """Restore the file of metrics as the last state says.

        Without a state, metrics begin anew.
        """
        if not self._state.is_file():
            self._metrics.unlink(missing_ok=True)
        elif metrics := self._read_state(device).get(_METRICS):
            self._write(**metrics)

    def _read_state(self, device: torch.device | str) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self._state, weights_only=True, map_location=device)
        return state

    def log(self, trajectory: int, metrics: dict[str, float]) -> None:
        """Keep a line until the next state, so that a replayed trajectory is logged once."""
        self._pending.append(json.dumps({"trajectory": trajectory} | metrics) + "\n")

    def save(self, run: MultiTargetTrainer) -> None:
        """Write the state, and then the metrics.

        The state comes first, since it says what the file of metrics is to hold.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        _replace(self.path / "settings.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        start = self._metrics.stat().st_size if self._metrics.exists() else 0
        metrics: dict[str, Any] = {"start": start, "text": "".join(self._pending)}
        buffer = io.BytesIO()
        torch.save(run.state() | {_METRICS: metrics}, buffer)
        _replace(self._state, buffer.getvalue())
        self._write(**metrics)
        self._pending.clear()

    def _write(self, start: int, text: str) -> None:
        """Make the file of metrics end with the text, which begins at byte `start`."""
        with self._metrics.open("ab") as file:
            file.truncate(min(start, file.tell()))
            file.write(text.encode())

    def finish(self, run: MultiTargetTrainer) -> RouterArtifact:
        """Write the routers and a picture of the first one, and return that one."""
        from harmonica.evaluation.plots import router_heat_map

        artifact = run.artifact(**self.settings["train"])
        artifact.save(self.path / "router")
        for name, other in run.extra_artifacts(**self.settings["train"]).items():
            other.save(self.path / "family" / name)
        names = [branch.name for branch in run.sampler.model.branches]
        scores_TB = artifact.logits_TB.sigmoid()
        router_heat_map(scores_TB, artifact.plan.to_tensor(), names, self.path / "router.png")
        return artifact
