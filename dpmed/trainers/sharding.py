"""A frozen base in shares over the ranks (FSDP2), for models that do not fit on one device.

Only what is never trained is sharded. Adapters and heads stay whole on every rank, so per-unit gradients, their norms
and the one sum over ranks are those of an unsharded model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dpmed.errors import InputError
from dpmed.privacy import ranks

if TYPE_CHECKING:
    from torch import nn


def shard_frozen_base(model: nn.Module, device: torch.device) -> None:
    """Shard the frozen weights of `model` over all ranks, in place, a transformer block at a time.

    Every rank must then run the same number of forward and backward passes: each gathers weights from all others.

    Raises: InputError where there is one process alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not ranks.several():
        raise InputError("shard_base shares the base model between processes, and this is one alone: use torchrun")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {p for p in model.parameters() if p.requires_grad}
    blocks = _block_names(model)
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)


def _block_names(model: nn.Module) -> set[str]:
    """Class names of the transformer blocks, as transformers lists them for placing models on devices."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
