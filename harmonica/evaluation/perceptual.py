"""Compute network metrics of single images: LPIPS, and the CLIP score.

LPIPS compares an image with another one, the CLIP score with a prompt.

Shapes: N batch, C channels, H W image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.io.paths import local
from harmonica.io.safe_load import read_tensors
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

_LPIPS_SIDE = 64  # AlexNet's layers leave nothing of much smaller images


class Lpips:
    """Computes LPIPS (Zhang et al. 2018) with AlexNet, by torchmetrics."""

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        """Load AlexNet's weights and LPIPS's own layers.

        Args:
            weights: torchvision's `alexnet-owt-7be5be79.pth`; LPIPS's own layers come with torchmetrics.

        Raises:
            ValueError: the file cannot be read, or holds another network.
        """
        ensure_torchvision_imports()
        need("torchmetrics", extra="evaluate")
        from torchmetrics.functional.image.lpips import _NoTrainLpips  # the form that downloads nothing

        network: Any = _NoTrainLpips(net="alex", pnet_rand=True)
        state = {
            name: tensor for name, tensor in read_tensors(weights).items() if name.startswith("features.")
        }
        layers = {
            name.split(".", 1)[1]: part for name, part in network.net.named_modules() if name.count(".") == 1
        }
        try:
            for index, layer in layers.items():
                own = {n.split(".")[-1]: t for n, t in state.items() if n.split(".")[1] == index}
                layer.load_state_dict(own)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"evaluate.lpips_path {weights} holds another network: give torchvision's AlexNet "
                f"({str(error).splitlines()[0]})"
            ) from error
        self.device = torch.device(device)
        self.network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
        """Return the distance (N,) of images in [-1, 1], grey or RGB.

        Images under 64 pixels are enlarged.
        """
        pair = [self._prepared(images) for images in (images_NCHW, reference_NCHW)]
        distance_N: Tensor = self.network(*pair).flatten().cpu()
        return distance_N

    def _prepared(self, images_NCHW: Tensor) -> Tensor:
        images = images_NCHW.to(self.device).float().clamp(-1, 1).expand(-1, 3, -1, -1)
        if min(images.shape[2:]) < _LPIPS_SIDE:
            images = torch.nn.functional.interpolate(images, size=(_LPIPS_SIDE, _LPIPS_SIDE), mode="bilinear")
        return images


class ClipScore:
    """Computes the CLIP score of images to their prompts (Hessel et al. 2021).

    It is 100 max(cos, 0) of the two CLIP embeddings, without the paper's factor 2.5.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        """Load a CLIP model.

        Args:
            folder: a CLIP model's as transformers saves it, with its tokenizer and its image processor.

        Raises:
            ValueError: no such folder, or it is not a CLIP's.
        """
        folder = local(folder, "evaluate.clip_path")
        if not (folder / "config.json").is_file():  # else transformers takes it for a hub's name
            raise ValueError(f"evaluate.clip_path {folder} has no config.json: give a folder of a CLIP model")
        ensure_torchvision_imports()
        need("transformers", extra="evaluate")
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"evaluate.clip_path {folder} cannot be loaded: give a folder of a CLIP model "
                f"({str(error).splitlines()[0]})"
            ) from error
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score (N,) of images in [-1, 1]; prompts are cut to 77 tokens."""
        pixels = ((images_NCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
        given = self.processor(
            text=list(prompts),
            images=list(pixels.permute(0, 2, 3, 1).cpu().numpy()),
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.device)
        seen = self.model(**given)
        cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
        return 100 * cosine.clamp(min=0).float().cpu()
