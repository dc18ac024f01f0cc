"""How near an arm's images are to the full sampler's: of the same noise, which no training saw."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.builtin import CLASSIFIER
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.evaluation.classifier import Classifier, load_classifier
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance, psnr, ssim
from harmonica.samplers import Sampler
from tests.benchmarks.grid.points import FIRST_JUDGED, Drawn, Rows

_BATCH = 8
_CONVOLUTIONS = (0, 1, 3, 4)
"""Places of the classifier's convolutions."""
_TINY = 1e-10


@torch.no_grad()
def feature_distance(classifier: Classifier, images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """The distance (N,) of LPIPS (Zhang et al. 2018, eq. 1) on the classifier's convolutions, unweighted."""
    layers = list(classifier.backbone)[: _CONVOLUTIONS[-1] + 1]
    distance_N = torch.zeros(len(images_NCHW), dtype=torch.float64)
    pair = [images_NCHW.float(), reference_NCHW.float()]
    for place, layer in enumerate(layers):
        pair = [layer(each) for each in pair]
        if place in _CONVOLUTIONS:
            unit, other = (each / (each.norm(dim=1, keepdim=True) + _TINY) for each in pair)
            distance_N += (unit - other).double().square().sum(1).mean((1, 2))
    return distance_N


class Judge:
    """Compares arms with full sampling, and draws nothing twice."""

    def __init__(
        self, rows: Rows, count: int, classifier_folder: Path = CLASSIFIER, first: int = FIRST_JUDGED
    ) -> None:
        self.rows, self.count, self.first = rows, count, first
        self.classifier = load_classifier(classifier_folder)
        self._full: dict[int, Tensor] = {}
        self._judged: dict[tuple[Any, ...], dict[str, float]] = {}

    def full(self, sampler: Sampler) -> Tensor:
        """The full sampler's images (N, C, H, W); no seed and no speed changes them."""
        if sampler.num_steps not in self._full:
            self._full[sampler.num_steps] = self._images(sampler)
        return self._full[sampler.num_steps]

    def _images(self, sampler: Sampler, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        found, end = [], self.first + self.count
        for first in range(self.first, end, _BATCH):
            batch = self.rows(sampler, 0, first, min(_BATCH, end - first))
            inputs = (sampler, batch.noise_NCHW, batch.condition_N, plan)
            found.append(sample(*inputs, reuse=reuse, keys=batch.keys).clone())
        return torch.cat(found)

    def line(self, sampler: Sampler, drawn: Drawn) -> dict[str, Any]:
        """The ideal speed and the metrics of an arm, to the images of a full sampler."""
        key = (sampler.num_steps, drawn.sampler.num_steps, drawn.plan, drawn.reuse)
        if key not in self._judged:
            plan = drawn.plan
            if plan is None:
                speed, images_NCHW = sampler.num_steps / drawn.sampler.num_steps, self.full(drawn.sampler)
            else:
                speed = plan.ideal_speedup(sampler.model.macs())
                images_NCHW = self._images(drawn.sampler, plan, drawn.reuse)
            self._judged[key] = {"speed": round(speed, 3)} | self.metrics(images_NCHW, self.full(sampler))
        return self._judged[key]

    def metrics(self, images_NCHW: Tensor, full_NCHW: Tensor) -> dict[str, float]:
        """The distances between two equally long sets of images, pair by pair and as sets."""
        psnr_N = psnr(images_NCHW, full_NCHW).double()
        worst_N = psnr_N.sort().values[: max(1, len(psnr_N) // 10)]
        ours, theirs = (
            FeatureStatistics.from_features(self.classifier.features(images))
            for images in (images_NCHW.float(), full_NCHW.float())
        )
        found = {
            "psnr": psnr_N.mean(),
            "worst": worst_N.mean(),
            "ssim": ssim(images_NCHW, full_NCHW).double().mean(),
            "features": feature_distance(self.classifier, images_NCHW, full_NCHW).mean(),
            "frechet": frechet_distance(ours, theirs),
        }
        return {name: float(f"{float(value):.5g}") for name, value in found.items()}
