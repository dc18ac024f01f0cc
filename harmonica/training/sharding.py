"""Spread the frozen model over processes (FSDP2).

This is for weights that one GPU cannot hold.

Each process keeps a share of every layer's weights and gathers a layer while it runs. The router, a few
thousand numbers, stays whole everywhere. Rows are split as ever, so all processes run the same layers in
the same order, which gathering needs.
"""

import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from harmonica.models.base import BranchedTransformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sharded_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that `shard_weights` spreads: nearly all weights."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def shard_weights(model: BranchedTransformer, mesh: "DeviceMesh | None" = None) -> None:
    """Spread a frozen model's linear and convolutional layers over the processes.

    Layers and not blocks: branches call sub-layers where they lie, and FSDP gathers a module's weights when
    that module is called. All other parameters, tables and norms, stay whole. A model on the CPU gets to
    the GPUs layer by layer, so that none of them ever holds it all.

    Args:
        mesh: one dimension of processes; by default all of them, on the device their backend serves.

    Raises:
        ValueError: a single process, or a model that is not frozen.
    """
    # Not at the top, since FSDP takes as long to import as half of torch, and few trainings use it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        raise ValueError(
            "train.shard_model is True and there is one process to hold the weights: start several, as with "
            "torchrun --nproc-per-node 2 or train.num_workers 2, or give False"
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "train.shard_model is True and the model is not frozen: call harmonica.models.base.freeze first"
        )
    if mesh is None:
        mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world_size,))
    # It warns of every layer's output, a view; nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.recorded_fingerprint = model.fingerprint()  # while this process still has all weights
    for layer in sharded_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter.data, DTensor)}
    fully_shard(model, mesh=mesh, ignored_params=whole)  # moves the buffers
    for parameter in whole:
        parameter.data = parameter.data.to(_device(mesh))
    # The first module to run becomes FSDP's root, through which layers share streams and buffers: that has
    # to be the model, which the passes never call.
    vars(model)["forward"] = lambda: None
    model()
    del vars(model)["forward"]


def _device(mesh: "DeviceMesh") -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
