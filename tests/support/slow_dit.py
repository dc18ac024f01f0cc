"""The Diffusion Transformer once more, slow and obvious, from its paper's formulas.

Nothing of `harmonica` and no layer of torch: heads and patches are looped over, softmax, norm and
activations written out. float64 from the tensors of a public-layout state dict; what agrees with this
may be fast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Use = Callable[[int, Tensor], Tensor]
"""What branch b adds, before its gate, given what it computes."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`model` of a case.json."""

    input_size: int = 8
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 16
    depth: int = 1
    num_heads: int = 2
    num_classes: int = 5


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, then adaLN: one shift and scale an image."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def attention(w: Weights, name: str, x: Tensor, num_heads: int) -> Tensor:
    """One head after the other; qkv holds all queries, then all keys, then all values."""
    width = x.shape[-1]
    size = width // num_heads
    qkv = linear(w, f"{name}.qkv", x)
    heads = []
    for h in range(num_heads):
        q, k, v = (qkv[..., part * width + h * size : part * width + (h + 1) * size] for part in range(3))
        weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(size))
        heads.append((weights / weights.sum(-1, keepdim=True)) @ v)
    return linear(w, f"{name}.proj", torch.cat(heads, dim=-1))


def positions(width: int, grid: int) -> Tensor:
    """Fixed positions (1, L, D) float32: sines then cosines of x, then of y."""
    rows = []
    for y in range(grid):
        for x in range(grid):
            angles = [[p / 10000 ** (k / (width // 4)) for k in range(width // 4)] for p in (x, y)]
            rows.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def patch_slices(side: int, patch: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each token, in reading order."""
    starts = range(0, side, patch)
    return [(slice(y, y + patch), slice(x, x + patch)) for y in starts for x in starts]


def network(w: Weights, shape: Shape, x: Tensor, t: Tensor, labels: Tensor, use: Use) -> Tensor:
    """DiT (n, 2C, S, S), or C where the weights predict no variance. `use`: what a branch adds."""
    patch, width, n = shape.patch_size, shape.hidden_size, len(x)
    slices = patch_slices(shape.input_size, patch)
    kernel = w["x_embedder.proj.weight"].reshape(width, -1)
    tokens = [x[:, :, rows, columns].reshape(n, -1) @ kernel.T for rows, columns in slices]
    hidden = torch.stack(tokens, dim=1) + w["x_embedder.proj.bias"] + w["pos_embed"]

    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angle = t.float()[:, None] * frequency
    features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).double()
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", features)))
    c = silu(time + w["y_embedder.embedding_table.weight"][labels])

    for i in range(shape.depth):
        block = f"blocks.{i}"
        modulation = linear(w, f"{block}.adaLN_modulation.1", c).split(width, dim=1)
        shift, scale, gate = modulation[:3]
        y = attention(w, f"{block}.attn", modulated_norm(hidden, shift, scale), shape.num_heads)
        hidden = hidden + gate[:, None] * use(2 * i, y)
        shift, scale, gate = modulation[3:]
        y = gelu_tanh(linear(w, f"{block}.mlp.fc1", modulated_norm(hidden, shift, scale)))
        hidden = hidden + gate[:, None] * use(2 * i + 1, linear(w, f"{block}.mlp.fc2", y))

    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).split(width, dim=1)
    patches = linear(w, "final_layer.linear", modulated_norm(hidden, shift, scale))
    channels = patches.shape[-1] // patch**2
    image = torch.zeros(n, channels, shape.input_size, shape.input_size, dtype=torch.float64)
    for token, (rows, columns) in enumerate(slices):  # a patch is rows, columns, channels
        image[:, :, rows, columns] = patches[:, token].reshape(n, patch, patch, -1).permute(0, 3, 1, 2)
    return image


def random_weights(shape: Shape, generator: torch.Generator) -> Weights:
    """float32 in the public layout. No gate is small: a silent branch would make any caching right.

    The patches enter weakly, as an untrained model's latents grow a hundredfold and would drown the
    branches.
    """
    width, patch = shape.hidden_size, shape.patch_size
    kernel = (width, shape.in_channels, patch, patch)
    layers = {
        "x_embedder.proj": kernel,
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 2 * shape.in_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(shape.depth):
        layers[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        layers[f"blocks.{i}.attn.proj"] = (width, width)
        layers[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        layers[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        layers[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    w = {"pos_embed": positions(width, shape.input_size // patch)}
    w["y_embedder.embedding_table.weight"] = torch.randn(shape.num_classes + 1, width, generator=generator)
    for name, size in layers.items():
        fan_in = math.prod(size[1:])
        w[f"{name}.weight"] = torch.randn(size, generator=generator) / fan_in**0.5
        w[f"{name}.bias"] = 0.5 * torch.randn(size[0], generator=generator)
    w["x_embedder.proj.weight"] *= 0.05
    return w
