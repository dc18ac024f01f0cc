"""Inception, AlexNet and CLIP with random weights, in the files that the public ones come in."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.torchvision_ops import ensure_torchvision_imports

WORDS = ("a", "dark", "boot", "pale", "bag", "<|startoftext|>", "<|endoftext|>")


def write_inception(path: Path) -> Path:
    """In torch-fidelity's layout; 95 MB."""
    ensure_torchvision_imports()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    load: Any = Inception.load_state_dict
    saved: dict[str, Tensor] = {}

    def keep(self: nn.Module, state: dict[str, Tensor]) -> None:
        saved.update(self.state_dict())

    try:  # its constructor wants weights; the ones that it starts with will do
        Inception.load_state_dict = keep
        empty = path.with_suffix(".empty")
        torch.save({}, empty)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Inception("inception", ["2048"], str(empty))
    finally:
        Inception.load_state_dict = load
    torch.save(saved, path)
    return path


def write_alexnet(path: Path) -> Path:
    ensure_torchvision_imports()
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torchvision.models.alexnet(weights=None).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("features.")}, path)
    return path


def write_clip(folder: Path) -> Path:
    """A CLIP of two layers that knows a few words."""
    ensure_torchvision_imports()
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir()
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*WORDS[-2:], *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {
        "vocab_size": len(tokens),
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 12
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
