"""Loading of models: our own folders, public checkpoints, diffusers folders.

Our folder holds `config.json` (shape under diffusers' names, class names) and `model.safetensors`; a
public `.pt` or `.safetensors` file shows its shape itself; a diffusers folder is a whole pipeline's or
its transformer's. Results are those of the original code: see `DiTConfig.downscale_freq_shift`.
"""

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch

from harmonica.io.paths import shown
from harmonica.io.repository_files import INDEX, OWN_WEIGHTS, bare_checkpoint, own_weights
from harmonica.io.resolve import BUILTIN, BUILTIN_COLOUR, BUILTIN_TEXT, local_path
from harmonica.io.weight_files import contents, read_json
from harmonica.models.base import BranchedTransformer, Execution
from harmonica.models.compiler_check import compiler_fault
from harmonica.models.diffusers_folder import find_transformer, read_diffusers
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.public_layout import read_public
from harmonica.models.dit.stored import StoredModel, default_class_names
from harmonica.models.pixart import checkpoint as pixart_folder
from harmonica.models.sana import checkpoint as sana_folder
from harmonica.models.text_blocks import Kind
from harmonica.models.text_checkpoint import StoredTextTransformer
from harmonica.models.vae import find_vae, load_vae
from harmonica.validation.settings import Field, Natural, settings

logger = logging.getLogger(__name__)

__all__ = [
    "BUILTIN",
    "BUILTIN_COLOUR",
    "BUILTIN_TEXT",
    "LoadedModel",
    "ModelConfig",
    "load_model",
    "read_folder_config",
    "read_model",
    "write_folder_config",
]

Dtype = Literal["float32", "bfloat16", "float16"]
Compile = Literal["auto", "always", "never"]
_COMPILE = {"auto": "auto", "always": "compiled", "never": "eager"}
_TEXT_TO_IMAGE: dict[str, Callable[..., StoredTextTransformer]] = {
    pixart_folder.CLASS_NAME: pixart_folder.read_pixart,
    sana_folder.CLASS_NAME: sana_folder.read_sana,
}
"""Readers of folders, by the transformer's class in diffusers."""


@settings("model")
class ModelConfig:
    """Settings of the denoiser."""

    path: str = BUILTIN
    """`builtin:fashion-dit`, `builtin:emoji-dit` (in colour), `builtin:fashion-pixart` (text to image), a
    model folder (ours or diffusers'), a public DiT .pt file, an s3:// or gs:// URI of either, or a Hugging
    Face id such as facebook/DiT-XL-2-256."""
    revision: str = ""
    """Commit of a Hugging Face id, which has to be pinned: give it with every such id."""
    shape: DiTConfig | None = None
    """Shape of a bare checkpoint file that is none of the public family; a folder brings its own."""
    vae: str = ""
    """Decoder of the latents: like `path`, with a Hugging Face id as org/name@commit. Empty: that of the
    diffusers folder, if it has one. Give it for a bare DiT checkpoint, to see images."""
    dtype: Dtype = "float32"
    """Precision of the branches; a model's first and last layers stay in float32, and so does what runs
    between branches, unless `residual_dtype` says otherwise. Give bfloat16 on GPUs, with half the memory."""
    text_tokens: Natural = 0
    """Padded length of a prompt. 0: that of the folder's pipeline: 120 for PixArt-alpha, else 300. Touch it
    for a pipeline that was trained at another length."""
    cacheable: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("attn", "mlp")
    """Sub-layers of a text-to-image model that a router may reuse: attn, cross, mlp. Add cross to reuse
    more."""
    execution: Literal["auto", "eager", "compiled", "graphed"] = "auto"
    """How branches are run: operation by operation, each as one graph of torch.compile, or each step as a
    CUDA graph of those. `auto`: graphed on CUDA where torch.compile works, else eager. The first batch of
    each shape waits for the compiler; values move by roundings. Give `eager` to find an error, or for many
    shapes."""
    graph_memory: Annotated[float, Field(gt=0, le=1e4)] = 8.0
    """GiB that recorded steps may take where `execution` is graphed; the least recently used ones go. Lower
    it if the GPU runs out of memory."""
    compile: Compile = "auto"
    """Deprecated: `always` is execution compiled, `never` eager, `auto` says nothing."""
    residual_dtype: Literal["float32", "weights"] = "float32"
    """Precision of what runs between branches: float32, or that of the branches, which saves memory traffic
    and rounds more. Training always takes float32."""
    allow_tf32: bool = False
    """Let CUDA round float32 matrix products to TensorFloat-32; concerns the whole process. On for speed,
    where the last digits do not matter."""

    def __post_init__(self) -> None:
        if self.compile != "auto":
            meant = _COMPILE[self.compile]
            warnings.warn(
                f"model.compile is {self.compile}, which is deprecated: give model.execution {meant}",
                FutureWarning,
                stacklevel=2,
            )

    def for_training(self) -> "ModelConfig":
        """Return these settings with the residual stream in float32.

        A student a few parts in a thousand away from its teacher would drown in coarser rounding.
        """
        return self if self.residual_dtype == "float32" else replace(self, residual_dtype="float32")

    def execution_on(self, device: str | torch.device) -> Execution:
        """Return the level of execution on a device, with `auto` decided."""
        asked = _COMPILE[self.compile] if self.execution == "auto" else self.execution
        if asked == "auto":
            return "graphed" if torch.device(device).type == "cuda" else "eager"
        return cast(Execution, asked)


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model with its class names, scheduler, VAE and text encoder."""

    model: BranchedTransformer
    class_names: tuple[str, ...]
    """Empty for a model that takes prompts."""
    scheduler: dict[str, Any] | None = None
    """Scheduler configuration of a diffusers folder."""
    vae_folder: Path | None = None
    """The configured VAE, else the diffusers folder's."""
    text_folder: Path | None = None
    """Folder with the text encoder and its tokenizer, for a model that takes prompts."""

    def load_vae(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """Load the autoencoder that `decode_latents` takes; None if there is none."""
        return None if self.vae_folder is None else load_vae(self.vae_folder, device, dtype)


def read_folder_config(folder: Path) -> tuple[DiTConfig, tuple[str, ...]]:
    """Read shape and class names from a folder in our layout."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        shape = DiTConfig(**config["shape"])
        names = tuple(config.get("class_names", ()))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.path {folder} has no usable config.json ({error}); it holds {contents(folder)}: give a "
            "folder with config.json and model.safetensors, a diffusers folder, or a .pt file"
        ) from error
    return shape, names or default_class_names(shape)


def write_folder_config(
    folder: Path, shape: DiTConfig, class_names: tuple[str, ...], **extra: object
) -> None:
    """Write the `config.json` that `read_folder_config` reads."""
    config = {"shape": dataclasses.asdict(shape), "class_names": list(class_names), **extra}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_model(path: str, revision: str = "", shape: DiTConfig | None = None) -> StoredModel:
    """Open the DiT at a path: fetched if it is remote, checked, and memory-mapped.

    Raises:
        ValueError: missing, truncated, or another shape than configured.
    """
    return _read_dit(local_path(path, revision), shape)


def _read_dit(local: Path, shape: DiTConfig | None) -> StoredModel:
    if local.is_file():
        return read_public(local, shape)
    if (local / INDEX).is_file() or find_transformer(local):
        return read_diffusers(local)
    names = [path.name for path in local.iterdir() if path.is_file()]
    if "config.json" not in names and (found := bare_checkpoint(names, f"model.path {local}")):
        return read_public(local / found, shape)
    config, class_names = read_folder_config(local)
    return read_public(local / (own_weights(names) or OWN_WEIGHTS[0]), config, class_names)


def _read(config: ModelConfig) -> StoredModel | StoredTextTransformer:
    local = local_path(config.path, config.revision)
    transformer = find_transformer(local) if local.is_dir() else None
    name = read_json(transformer / "config.json").get("_class_name") if transformer else None
    if name in _TEXT_TO_IMAGE:
        return _TEXT_TO_IMAGE[name](local, cacheable=config.cacheable, text_tokens=config.text_tokens)
    return _read_dit(local, config.shape)


def load_model(config: ModelConfig, device: str | torch.device = "cpu") -> LoadedModel:
    """Load the configured denoiser, frozen, in its precision, on the device.

    Raises:
        ValueError: model or VAE is missing, truncated, or another shape than configured.
    """
    stored = _read(config)
    vae_folder = stored.vae_folder
    if config.vae:
        vae_folder = find_vae(local_path(config.vae, field="model.vae"))
        if vae_folder is None:
            raise ValueError(
                f"model.vae {shown(config.vae)} holds no AutoencoderKL: give its folder, or a pipeline's "
                "with vae/"
            )
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = stored.assemble(device, getattr(torch, config.dtype))
    model.execution = config.execution_on(device)
    is_asked_for = config.execution != "auto" or model.execution != "graphed"
    if not is_asked_for and (fault := compiler_fault(torch.device(device).type)):
        logger.warning("branches run eagerly, which is slower: torch.compile fails here: %s", fault)
        model.execution = "eager"
    model.graph_bytes = round(config.graph_memory * 2**30)
    if config.residual_dtype == "weights":
        model.residual_dtype = model.dtype
    text_folder = None if isinstance(stored, StoredModel) else stored.text_folder
    return LoadedModel(model, stored.class_names, stored.scheduler, vae_folder, text_folder)
