"""Tiny random instances of diffusers' transformer classes, and inputs for one forward of each.

Configurations and inputs follow from the names in the signatures; `OVERRIDES` has what does not. A class that
a newer diffusers adds is tried by the same rules.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

import diffusers.models.transformers as transformers_folder  # noqa: E402
from diffusers import ModelMixin  # noqa: E402
from tiny_transformer_overrides import OVERRIDES  # noqa: E402

ROWS, TEXT, WIDTH, HEADS, HEAD = 2, 5, 32, 2, 16
CHANNELS, SIZE, FRAMES = 4, 8, 3

_CONFIG_RULES: list[tuple[str, Any]] = [
    ("num_refiner_layers", 1),
    ("n_refiner_layers", 1),
    ("num_key_value_heads", 2),
    ("num_kv_heads", 2),
    ("n_kv_heads", 2),
    ("layers", 2),
    ("depth", 2),
    ("blocks", 2),
    ("heads", HEADS),
    ("head_dim", HEAD),
    ("dim_head", HEAD),
    ("in_channels", CHANNELS),
    ("out_channels", CHANNELS),
    ("visual_dim", CHANNELS),
    ("sample_size", SIZE),
    ("sample_width", SIZE),
    ("sample_height", SIZE),
    ("sample_frames", 9),
    ("ffn_hidden_size", 2 * WIDTH),
    ("intermediate_size", 2 * WIDTH),
    ("ff_inner_dim", 2 * WIDTH),
    ("ffn_dim", 2 * WIDTH),
    ("ff_dim", 2 * WIDTH),
    ("freq_dim", WIDTH),
    ("_dim", WIDTH),
    ("dim", WIDTH),
    ("hidden_size", WIDTH),
    ("caption_channels", WIDTH),
    ("caption_projection_dim", WIDTH),
    ("approximator_num_channels", WIDTH),
    ("timestep_channels", WIDTH),
    ("timestep_guidance_channels", WIDTH),
    ("text_embed_2_dim", WIDTH),
    ("in_text_dim2", WIDTH),
    ("max_resolution", (32, 32)),
]
_AXES = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}


def transformer_classes() -> dict[str, type[nn.Module]]:
    """Return every transformer class of the installed diffusers, by name."""
    found: dict[str, type[nn.Module]] = {}
    for module_info in pkgutil.iter_modules(transformers_folder.__path__):
        module = importlib.import_module(f"{transformers_folder.__name__}.{module_info.name}")
        for name, each in vars(module).items():
            is_own = inspect.isclass(each) and each.__module__ == module.__name__
            if is_own and issubclass(each, ModelMixin):
                found[name] = each
    return dict(sorted(found.items()))


def _shrunk(name: str, default: Any) -> Any:
    """Return a small value for a setting, or its default."""
    if isinstance(default, bool | str):
        return default
    if isinstance(default, tuple | list):
        is_axes = "axes" in name and "lens" not in name
        return _AXES[len(default)] if is_axes and len(default) in _AXES else default
    if not (isinstance(default, int) or default is inspect.Parameter.empty):
        return default
    return next((value for suffix, value in _CONFIG_RULES if name.endswith(suffix)), default)


def make_transformer(name: str, seed: int = 0) -> Any:
    """Return a frozen instance whose modules are not silent."""
    cls = transformer_classes()[name]
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    config = {p.name: _shrunk(p.name, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD}
    config = {key: value for key, value in config.items() if value is not inspect.Parameter.empty}
    config |= OVERRIDES.get(name, {}).get("config", {})
    torch.manual_seed(seed)
    module = cls(**config).eval().requires_grad_(False)
    for parameter_name, parameter in module.named_parameters():
        # Gates and last layers start at zero, and branches would change nothing.
        if parameter.is_floating_point() and not parameter.any():
            scale = 0.02 if parameter_name.endswith("bias") else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return module


def _grid_ids(axes: int) -> Tensor:
    ids = torch.zeros(SIZE * SIZE // 4, axes)
    side = SIZE // 2
    ids[:, -2] = torch.arange(side).repeat_interleave(side)
    ids[:, -1] = torch.arange(side).repeat(side)
    return ids


def _guess(name: str, module: Any, cls_name: str, arguments: set[str], time: float) -> Any:
    """Return a value for a forward's argument by its name."""
    config = module.config
    channels = getattr(config, "in_channels", None) or CHANNELS
    axes = next((len(v) for k, v in config.items() if "axes_dim" in k and isinstance(v, tuple | list)), 3)
    if name in ("hidden_states", "x"):
        if {"img_ids", "img_shapes"} & arguments:
            return torch.randn(ROWS, SIZE * SIZE // 4, channels)
        if "3D" in cls_name:
            return torch.randn(ROWS, channels, FRAMES, SIZE, SIZE)
        if "1D" in cls_name:
            return torch.randn(ROWS, SIZE, channels)
        return torch.randn(ROWS, channels, SIZE, SIZE)
    if name == "encoder_hidden_states":
        return torch.randn(ROWS, TEXT, WIDTH)
    if name in ("timestep", "timesteps", "t"):
        return torch.full((ROWS,), time)
    if name.startswith(("pooled", "proj_embedding")):
        return torch.randn(ROWS, WIDTH)
    if name == "img_ids":
        return _grid_ids(axes)
    if name == "txt_ids":
        return torch.zeros(TEXT, axes)
    if name == "img_shapes":
        return [[(1, SIZE // 2, SIZE // 2)]] * ROWS
    if name == "guidance" and getattr(config, "guidance_embeds", False):
        return torch.full((ROWS,), 3.0)
    if name in ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask"):
        return torch.ones(ROWS, TEXT, dtype=torch.bool)
    if name in ("original_size", "target_size", "crop_coords"):
        return torch.full((ROWS, 2), 16.0)
    if name in ("num_frames", "height", "width"):
        return None
    raise KeyError(name)


def make_inputs(name: str, module: Any, time: float = 500.0, seed: int = 1) -> dict[str, Any]:
    """Return the arguments of one forward, the same for a seed but for the timestep."""
    torch.manual_seed(seed)
    override = OVERRIDES.get(name, {})
    time = time * override.get("time_scale", 1.0)
    own = override.get("inputs", lambda module, time: {})(module, time)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = {p.name for p in parameters}
    given: dict[str, Any] = dict(own)
    for each in parameters:
        if each.name in given or each.name == "return_dict":
            continue
        try:
            value = _guess(each.name, module, name, names, time)
        except KeyError:
            if each.default is inspect.Parameter.empty:
                raise
            continue
        if value is not None:
            given[each.name] = value
    if "return_dict" in names:
        given["return_dict"] = False
    return {key: value for key, value in given.items() if key in names}


def step_inputs(name: str, module: Any, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a trajectory's forwards, noisiest first."""
    for i in reversed(range(steps)):
        yield make_inputs(name, module, time=1000.0 * (i + 1) / (steps + 1))
