"""Compute metrics and features of images on the worker that sampled them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harmonica.builtin import CLASSIFIER, EMOJI_CLASSIFIER
from harmonica.evaluation.accumulators import LOGITS, POOLED, SPATIAL
from harmonica.evaluation.feature_extractors import ClassifierFeatures, FeatureExtractor, InceptionFeatures
from harmonica.evaluation.image_metrics import psnr, ssim
from harmonica.evaluation.perceptual import ClipScore, Lpips
from harmonica.evaluation.reference_sets import ReferenceSet, builtin_reference, read_adm_reference
from harmonica.io.paths import shown
from harmonica.models.loading import BUILTIN, BUILTIN_COLOUR, BUILTIN_TEXT, LoadedModel, ModelConfig
from harmonica.models.vae import check_vae, decode_latents, draws_pixels

from ..config.evaluate import EvaluateConfig, FeatureKind
from ..config.workflow import WorkflowConfig
from .evaluated_model import EvaluatedModel

_CLASSIFIERS = {BUILTIN: CLASSIFIER, BUILTIN_TEXT: CLASSIFIER, BUILTIN_COLOUR: EMOJI_CLASSIFIER}
_CLASSIFIER_SHAPE = (1, 28)  # of images of the first
_PSNR_OF_EQUALS = 100.0  # dB, for a mean that stays finite


def feature_kind(settings: EvaluateConfig, model: ModelConfig) -> FeatureKind | None:
    """Return which network extracts features.

    A shipped classifier fits the built-in models of its data alone.
    """
    if settings.features != "auto":
        return settings.features
    return "classifier" if model.path in _CLASSIFIERS else None


def classifier_folder(model: ModelConfig) -> Path:
    """Return the classifier of the model's data.

    It is that of clothes for a model that is not built in.
    """
    return _CLASSIFIERS.get(model.path, CLASSIFIER)


def _extractor(
    config: WorkflowConfig, device: torch.device | str
) -> ClassifierFeatures | InceptionFeatures | None:
    kind = feature_kind(config.evaluate, config.model)
    if kind == "inception":
        return InceptionFeatures(config.evaluate.inception_path, device)
    return ClassifierFeatures(classifier_folder(config.model)) if kind else None


class MetricSuite:
    """The metric networks, which each actor loads once."""

    def __init__(self, config: WorkflowConfig, model: EvaluatedModel, device: torch.device) -> None:
        settings = config.evaluate
        self.extractor: FeatureExtractor | None = _extractor(config, device)
        self.is_classifier = isinstance(self.extractor, ClassifierFeatures)
        self.clip = ClipScore(settings.clip_path, device) if settings.clip_path else None
        self.lpips = Lpips(settings.lpips_path, device) if settings.lpips_path else None
        self.shows_pixels = model.draws_pixels
        self.vae = None
        if not self.shows_pixels and _wants_pixels(config):
            self.vae = model.load_vae()
            self.shows_pixels = True

    def decode(self, samples_NCHW: Tensor) -> Tensor:
        """Return samples as images on the CPU.

        Latents are decoded only if a metric needs pixels.
        """
        return (decode_latents(self.vae, samples_NCHW) if self.vae else samples_NCHW).cpu()

    def compare(self, images_NCHW: Tensor, reference_NCHW: Tensor) -> dict[str, np.ndarray]:
        """Return metrics (N,) of each image against its reference."""
        columns = {"psnr": psnr(images_NCHW, reference_NCHW).clamp(max=_PSNR_OF_EQUALS)}
        if self.shows_pixels:  # windows over latents would say nothing about structure
            columns["ssim"] = ssim(images_NCHW, reference_NCHW)
        if self.lpips is not None:
            columns["lpips"] = self.lpips(images_NCHW, reference_NCHW)
        return {name: values.numpy() for name, values in columns.items()}

    def features(self, images_NCHW: Tensor) -> dict[str, np.ndarray]:
        """Return the features that distances between sets use.

        Their shapes are (N, F), (N, S) and (N, K).
        """
        if self.extractor is None:
            return {}
        seen = self.extractor(images_NCHW)
        columns = {POOLED: seen.pooled_NF, SPATIAL: seen.spatial_NS, LOGITS: seen.logits_NK}
        if self.is_classifier:
            columns["class"] = seen.logits_NK.argmax(1)
        return {name: values.numpy() for name, values in columns.items()}

    def prompt_scores(self, images_NCHW: Tensor, prompts: Sequence[str] | None) -> dict[str, np.ndarray]:
        """Return the CLIP score (N,) if there are prompts and a CLIP model."""
        if self.clip is None or prompts is None:
            return {}
        return {"clip_score": self.clip(images_NCHW, prompts).numpy()}


def _wants_pixels(config: WorkflowConfig) -> bool:
    settings = config.evaluate
    kind = feature_kind(settings, config.model)
    return bool(kind or settings.clip_path or settings.lpips_path)


def read_reference(config: WorkflowConfig, device: torch.device) -> ReferenceSet | None:
    """Return the real images that the extractor's features are compared with.

    It is None if there are none.
    """
    kind, path = feature_kind(config.evaluate, config.model), config.evaluate.reference_statistics
    if kind == "classifier":
        return builtin_reference(classifier_folder(config.model))
    if kind is None or not path:
        return None
    return read_adm_reference(path, InceptionFeatures(config.evaluate.inception_path, device))


def check_metric_settings(config: WorkflowConfig, loaded: LoadedModel) -> None:
    """Check that the files which metrics need exist and fit the model.

    Raises:
        ValueError: names field, value and cure.
    """
    settings, model = config.evaluate, loaded.model
    shape = (model.in_channels, model.sample_size)
    is_other = config.model.path not in _CLASSIFIERS and shape != _CLASSIFIER_SHAPE
    if settings.features == "classifier" and is_other:
        raise ValueError(
            f"evaluate.features is 'classifier', which knows grey images of 28 x 28, and the model makes "
            f"{shape[0]} channels of {shape[1]} x {shape[1]}: give inception, or auto"
        )
    if _wants_pixels(config) and not draws_pixels(model):
        if loaded.vae_folder is None:
            raise ValueError(
                f"model.vae is '' and {shown(config.model.path)} makes latents: give its decoder, or leave "
                "out evaluate.features, clip_path and lpips_path, which look at pictures"
            )
        check_vae(loaded.vae_folder)
    if settings.clip_path and model.num_classes:
        raise ValueError(
            f"evaluate.clip_path is {settings.clip_path!r} and the model takes labels: leave it out"
        )
    check_metric_files(config)


def check_metric_files(config: WorkflowConfig) -> None:
    """Check that the files of the metric networks can be read.

    Raises:
        ValueError: names field, value and cure.
    """
    settings = config.evaluate
    if settings.reference_statistics:
        read_adm_reference(settings.reference_statistics)
    _extractor(config, "cpu")
    if settings.lpips_path:
        Lpips(settings.lpips_path)
    if settings.clip_path:
        ClipScore(settings.clip_path)
