"""Convert a DiT between the public checkpoint layout and a diffusers folder.

    python -m harmonica.cli.convert DiT-XL-2-256x256.pt dit-xl-2-256 --to diffusers --vae sd-vae-ft-ema
    python -m harmonica.cli.convert dit-xl-2-256 DiT-XL-2-256x256.pt --to public

Weights and their precision are kept to the bit. The function is not: each layout has its own convention
for the timestep frequencies, and the command says by how much the outputs move.
"""

import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from harmonica.cli.common import fail, parse_settings, say
from harmonica.io.paths import local, shown
from harmonica.io.resolve import local_path
from harmonica.models.diffusers_folder import find_transformer, write_diffusers
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.public_layout import write_public
from harmonica.models.dit.stored import StoredModel, skeleton
from harmonica.models.loading import read_model
from harmonica.models.vae import find_vae
from harmonica.validation.settings import settings

_SPACING = {0: "half (the public code)", 1: "half - 1 (diffusers)"}
_PIPELINE_NULL_CLASS = 1000  # written into DiTPipeline


@settings()
class ConvertCommand:
    """Settings of one conversion."""

    source: Annotated[str, tyro.conf.Positional]
    """Like `model.path` everywhere: a file or folder, an s3:// URI or a Hugging Face id."""
    out: Annotated[Path, tyro.conf.Positional]
    """File (.pt or .safetensors) or folder to write."""
    to: Literal["public", "diffusers"]
    """Layout to write."""
    revision: str = ""
    """Commit of a Hugging Face id."""
    shape: DiTConfig | None = None
    """Shape of a bare checkpoint file that is none of the public family."""
    vae: str = ""
    """AutoencoderKL to put into the diffusers folder, like `source`; DiTPipeline needs one. Empty: the
    source's own, if it has one."""
    labels: Path | None = None
    """Class names for the diffusers folder: JSON (a list, or an object by number), or one name a line."""
    overwrite: bool = False
    """Replace `out`."""


def read_labels(path: Path, count: int) -> tuple[str, ...]:
    """Return class names in label order.

    Raises:
        ValueError: unreadable, or not one name for each of `count` classes.
    """
    try:
        text = local(path, "labels").read_text()
        named = json.loads(text) if path.suffix == ".json" else text.splitlines()
        names = tuple(str(named[str(i)] if isinstance(named, dict) else named[i]) for i in range(len(named)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"labels {path} cannot be used ({error}): give a JSON list, an object by number, or lines"
        ) from error
    if len(names) != count:
        raise ValueError(f"labels {path} has {len(names)} names: give one for each of {count} classes")
    return names


def convention_of(to: str, config: DiTConfig) -> DiTConfig:
    """Return the configuration that the code of the layout `to` assumes.

    With these weights, that code computes this configuration's function.
    """
    if to == "diffusers":
        return replace(config, downscale_freq_shift=1)  # its config.json carries norm_eps
    return replace(config, downscale_freq_shift=0, norm_eps=1e-6)


@torch.inference_mode()
def outputs_move_by(stored: StoredModel, target: DiTConfig) -> float:
    """Return by how much outputs change under the target's convention.

    The change is ||difference|| / ||output|| of one forward under the source's and the target's convention.
    """
    model, other = stored.assemble(), skeleton(target)
    other.load_state_dict(model.state_dict(), assign=True)
    shape = (1, target.in_channels, target.sample_size, target.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = noise, torch.tensor([500]), torch.tensor([0])
    output = model(*inputs)
    return float((other(*inputs) - output).norm() / output.norm())


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path beside `out` to write to, which then replaces `out`.

    If writing fails, `out` stays as it was.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"out {out} exists: give another path, or --overwrite")
    if out.is_dir() and not find_transformer(out):
        raise ValueError(f"out {out} is a folder without a transformer: give another path, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{secrets.token_hex(4)}-{out.name}")
    try:
        yield new
        if out.is_dir():
            old = out.with_name(f".{secrets.token_hex(4)}-{out.name}")
            out.rename(old)
            new.rename(out)
            shutil.rmtree(old)
        else:
            new.replace(out)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)


def _write_folder(command: ConvertCommand, stored: StoredModel, folder: Path) -> bool:
    """Write the pipeline's folder, and return whether it has a VAE."""
    vae = find_vae(local_path(command.vae, field="vae")) if command.vae else stored.vae_folder
    if command.vae and vae is None:
        raise ValueError(f"vae {shown(command.vae)} holds no AutoencoderKL: give its folder")
    write_diffusers(folder, stored)
    if vae is None:
        return False
    (folder / "vae").mkdir()
    for path in (vae / "config.json", *vae.glob("diffusion_pytorch_model*")):
        shutil.copy(path, folder / "vae")
    return True


def run(command: ConvertCommand) -> None:
    """Convert and say what was written and what it computes.

    Raises:
        ValueError: unusable source or destination; nothing is left behind.
    """
    command = replace(command, out=local(command.out, "out"))
    if command.to == "public" and command.out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"out {command.out} is no checkpoint file: give a name in .pt or .safetensors")
    for name in ("vae", "labels"):
        if command.to == "public" and getattr(command, name):
            raise ValueError(f"{name} {getattr(command, name)} has no place in a public checkpoint: drop it")
    if command.out.is_file() if command.to == "diffusers" else command.out.is_dir():
        raise ValueError(f"out {command.out} exists and is of another kind: give another path")
    stored = read_model(command.source, command.revision, command.shape)
    config = stored.config
    if command.labels:
        stored = replace(stored, class_names=read_labels(command.labels, config.num_embeds_ada_norm))
    has_vae = True
    with _replacing(command.out, command.overwrite) as new:
        if command.to == "public":
            write_public(new, stored)
        else:
            has_vae = _write_folder(command, stored, new)
    model = skeleton(config)
    count = sum(value.numel() for value in model.parameters())
    size = f"{config.num_layers} layers of width {config.hidden_size}, {count:,} parameters"
    say(f"wrote {command.out}: {size}")
    _say_convention(stored, convention_of(command.to, config))
    if not has_vae:
        say("no VAE: give --vae here, or vae= to DiTPipeline.from_pretrained")
    if command.to == "diffusers" and config.num_embeds_ada_norm != _PIPELINE_NULL_CLASS:
        say(
            f"DiTPipeline guides by class {_PIPELINE_NULL_CLASS}, the null class here is "
            f"{config.num_embeds_ada_norm}: call it with guidance_scale=1"
        )


def _say_convention(stored: StoredModel, target: DiTConfig) -> None:
    config = stored.config
    spacing = _SPACING[config.downscale_freq_shift]
    if config == target:
        say(f"convention: timestep frequencies spaced by {spacing}, epsilon {config.norm_eps:g}, as before")
        return
    changes = []
    if config.downscale_freq_shift != target.downscale_freq_shift:
        changes.append(f"timestep frequencies {spacing} -> {_SPACING[target.downscale_freq_shift]}")
    if config.norm_eps != target.norm_eps:
        changes.append(f"epsilon of the MLP norms {config.norm_eps:g} -> {target.norm_eps:g}")
    say(
        f"convention: the same weights are another function there ({'; '.join(changes)}): outputs move by "
        f"{outputs_move_by(stored, target):.2%} (one random input, t = 500)"
    )


def main(arguments: list[str]) -> int:
    """Run the command; return 0 if it wrote, and 2 for unusable input."""
    try:
        run(parse_settings(ConvertCommand, arguments, "python -m harmonica.cli.convert"))
    except ValueError as error:
        return fail(error, code=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
