"""A small random PixArt pipeline's folder, and the forms in which repositories keep a part's weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_pipeline import LINEAR, make_vae
from tiny_pixart import make_transformer
from tiny_text import make_encoder, make_tokenizer

from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline  # noqa: E402

PARTS = ("transformer", "text_encoder", "vae")
Form = Callable[[Path], None]


def write_text_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """Whole, in full precision, as `PixArtSigmaPipeline.save_pretrained` leaves it."""
    torch.manual_seed(seed)
    PixArtSigmaPipeline(
        make_tokenizer(),
        make_encoder(seed=seed),
        make_vae(),
        make_transformer("sigma", seed=seed).float(),
        DPMSolverMultistepScheduler(**LINEAR),
    ).save_pretrained(folder)
    return folder


def _saved_again(folder: Path, **how: object) -> None:
    """The weights of every part in another form, in place of those that are there."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from transformers import T5EncoderModel

    kinds = {"transformer": PixArtTransformer2DModel, "text_encoder": T5EncoderModel, "vae": AutoencoderKL}
    for name, kind in kinds.items():
        if not (folder / name).is_dir():
            continue
        plain = {} if name == "text_encoder" else {"low_cpu_mem_usage": False}
        model = kind.from_pretrained(folder / name, **plain)
        for path in [*(folder / name).glob("*.safetensors*"), *(folder / name).glob("*.bin*")]:
            path.unlink()
        # Values that the variant's precision does not change, so that forms can be compared.
        model.to(torch.bfloat16).to(torch.float32).save_pretrained(folder / name, **how)


def variant(name: str, **how: object) -> Form:
    """`name` is fp16 or bf16; nothing else is there."""
    return lambda folder: _saved_again(folder, variant=name, **how)


def sharded(**how: object) -> Form:
    return lambda folder: _saved_again(folder, max_shard_size="8KB", **how)


def beside_broken(name: str) -> Form:
    """Full precision, and a variant that nobody may read."""

    def change(folder: Path) -> None:
        for part in PARTS:
            for path in (folder / part).glob("*.safetensors"):
                path.with_suffix(f".{name}.safetensors").write_bytes(b"not read")

    return change


def without(*names: str) -> Form:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change
