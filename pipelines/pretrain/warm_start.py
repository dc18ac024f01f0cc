"""Start a text-conditional PixArt from a class-conditional DiT.

PixArt-alpha itself began from a DiT (arXiv 2310.00426, section 2.3).

Shapes: T timesteps, G blocks, D width.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.models.dit.model import DiT, DiTBlock
from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel


@torch.no_grad()
def warm_start(transformer: "PixArtTransformer2DModel", dit: DiT) -> set[str]:
    """Start a PixArt from the parameters of a DiT.

    Parameters that both have are copied, those that PixArt shares between blocks are fitted, and
    cross-attention is set to zero.

    Returns:
        Names of the parameters that keep their random values, which are those that read the text.

    Raises:
        ValueError: the two differ in width, depth, patch or channels.
    """
    config: Any = transformer.config
    names = ("num_layers", "hidden_size", "num_attention_heads", "patch_size", "in_channels", "out_channels")
    own: dict[str, int] = {**config, "hidden_size": transformer.inner_dim}
    for name in names:
        if own[name] != (wanted := getattr(dit.config, name)):
            raise ValueError(f"model.{name} is {own[name]} and the DiT's {wanted}: give the same")
    state = _copied(dit) | _fitted_modulation(dit)
    for i in range(config.num_layers):
        for name in ("weight", "bias"):
            key = f"transformer_blocks.{i}.attn2.to_out.0.{name}"
            state[key] = torch.zeros_like(transformer.get_parameter(key))
    missing, unexpected = transformer.load_state_dict(state, strict=False)
    assert not unexpected
    return set(missing)


def _blocks(dit: DiT) -> Iterable[DiTBlock]:
    return cast(Iterable[DiTBlock], dit.blocks)


def _copied(dit: DiT) -> dict[str, Tensor]:
    """Return the parameters that are the same in both, by diffusers' names."""
    layers: dict[str, nn.Module] = {
        "pos_embed.proj": dit.x_embedder.proj,
        "adaln_single.emb.timestep_embedder.linear_1": dit.t_embedder.mlp[0],
        "adaln_single.emb.timestep_embedder.linear_2": dit.t_embedder.mlp[2],
        "proj_out": dit.final_layer.linear,
    }
    for i, block in enumerate(_blocks(dit)):
        prefix = f"transformer_blocks.{i}"
        layers[f"{prefix}.attn1.to_out.0"] = block.attn.proj
        layers[f"{prefix}.ff.net.0.proj"] = block.mlp.fc1
        layers[f"{prefix}.ff.net.2"] = block.mlp.fc2
    tensors: dict[str, Tensor] = {
        f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()
    }
    for i, block in enumerate(_blocks(dit)):
        for key, p in block.attn.qkv.named_parameters():
            for name, part in zip(("to_q", "to_k", "to_v"), p.chunk(3)):
                tensors[f"transformer_blocks.{i}.attn1.{name}.{key}"] = part
    return tensors


def _fitted_modulation(dit: DiT, ridge: float = 1e-3) -> dict[str, Tensor]:
    """Fit adaLN-single to the DiT's modulations.

    adaLN-single is one linear map of the timestep for all blocks, and a table for each.

    The DiT's modulations, with classes averaged, are taken at every timestep. A block's table is its
    mean over time; the shared map is the least-squares fit of what is left, averaged over blocks.
    """
    timestep_T = torch.arange(0, NUM_TRAIN_TIMESTEPS, 5)
    embedded_TD = dit.t_embedder(timestep_T)
    classes = dit.y_embedder.embedding_table.weight[: dit.num_classes]
    blocks, final = [], []
    for label_D in classes:
        c_TD = F.silu(embedded_TD + label_D)
        blocks.append(torch.stack([torch.cat(block.modulations(c_TD), dim=1) for block in _blocks(dit)]))
        final.append(torch.stack(dit.final_layer.modulations(c_TD)))
    modulation_GTM = torch.stack(blocks).mean(dim=0).double()
    final_2TD = torch.stack(final).mean(dim=0)
    varying_TM = modulation_GTM.mean(dim=0)
    input_TD = F.silu(embedded_TD).double()
    mean_D, target_M = input_TD.mean(dim=0), varying_TM.mean(dim=0)
    centred = input_TD - mean_D
    gram = centred.T @ centred + ridge * torch.eye(len(mean_D), dtype=torch.float64)
    weight_DM = torch.linalg.solve(gram, centred.T @ (varying_TM - target_M))
    fitted_TM = centred @ weight_DM
    state = {
        "adaln_single.linear.weight": weight_DM.T.float(),
        "adaln_single.linear.bias": (-mean_D @ weight_DM).float(),
        # The output adds the embedded timestep itself to its table, for shift and scale alike.
        "scale_shift_table": (final_2TD - embedded_TD).mean(dim=1),
    }
    for i, table_M in enumerate((modulation_GTM - fitted_TM).mean(dim=1)):
        state[f"transformer_blocks.{i}.scale_shift_table"] = table_M.view(6, -1).float()
    return state
