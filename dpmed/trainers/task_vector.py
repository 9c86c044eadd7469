"""Task vectors: what training added to the weights, taken away again (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpmed.errors import InputError


@torch.no_grad()
def negated_task_vector(
    checkpoint: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float = 1.0
) -> dict[str, Tensor]:
    """Weights on the other side of `base`: base - alpha * (checkpoint - base).

    `checkpoint - base` is the task vector: what training from base to checkpoint added. alpha -1 gives the checkpoint
    back, 0 the base; above 0 the model is moved away from what was learned. All that the training taught goes, so the
    checkpoint should be trained on what is to be forgotten, and on nothing else.

    Args:
        checkpoint: state dict of the trained model, an adapter merged.
        base: state dict of the model that training started from.
        alpha: how far; the paper chooses it on validation data.

    Returns: a state dict with the checkpoint's keys, shapes and types. It shares no memory with the inputs; weights
        that are tied in the checkpoint are computed once and tied again. Buffers of whole numbers are the checkpoint's.
    Raises: InputError if keys or shapes differ, weights are tied in one model only, or alpha is not finite.
    """
    if not math.isfinite(alpha):
        raise InputError(f"unlearn.alpha is {alpha}; choose a finite number")
    lone = sorted(set(checkpoint) ^ set(base))
    if lone:
        raise InputError(f"task vector: weight {lone[0]!r} is in one model only; both must be of one architecture")
    made: dict[str, Tensor] = {}
    first_of: dict[tuple[object, ...], str] = {}
    for name, trained in checkpoint.items():
        if trained.shape != base[name].shape:
            raise InputError(f"task vector: weight {name!r} has another shape in the base; is it the same model?")
        first = first_of.setdefault(_memory(trained), name)
        if first != name:
            if not torch.equal(base[name], base[first]):
                raise InputError(f"task vector: weight {name!r} is tied to {first!r} in the checkpoint only")
            made[name] = made[first]
        elif trained.is_floating_point():
            made[name] = _negated(trained, base[name], alpha)
        else:
            made[name] = trained.clone()
    return made


def _negated(trained: Tensor, start: Tensor, alpha: float) -> Tensor:
    wide = torch.promote_types(trained.dtype, torch.float32)
    origin = start.to(trained.device, wide)
    return (origin - alpha * (trained.to(wide) - origin)).to(trained.dtype)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's numbers stand; tied weights share it. An empty tensor has no place, so it is its own."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    return tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype
