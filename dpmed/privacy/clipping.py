"""Pure functions of per-unit gradients: their norms, and the clipped sum whose sensitivity is the clip norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Clipping = Literal["norm", "automatic"]
STABILITY = 0.01
"""Gamma of automatic clipping, the value that Bu et al. 2023 use throughout."""
_CHUNK = 4096


def clipped_sum(unit_gradients: Tensor, *, clip_norm: float, clipping: Clipping = "norm") -> tuple[Tensor, Tensor]:
    """Sum the units' gradients, each scaled to an L2 norm of at most `clip_norm`.

    Shapes: u = units, p = trainable parameters.

    Args:
        unit_gradients: one gradient per privacy unit, [u, p], float32.
        clip_norm: C > 0.
        clipping: "norm" scales rows longer than C down to C; "automatic" scales every row to C * norm / (norm + 0.01),
            so that short gradients count as much as long ones and C only sets a learning rate.

    Returns: the sum [p], and how many units were not finite, an integer tensor [] on the same device.
    Guarantee: adding or removing one row changes the sum by at most C in L2, up to float32 rounding (about 1e-6 * C).
    Edge cases: u = 0 gives zeros; a row that holds inf or nan, or whose norm overflows, counts as zero.
    Raises: ValueError if C <= 0.
    Reference: Abadi et al. 2016, algorithm 1; Bu et al. 2023 (arXiv 2206.07136), AUTO-S.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}; it must be above 0")
    norms = unit_norms(unit_gradients)  # [u]
    finite = torch.isfinite(norms)
    if clipping == "automatic":
        scale = clip_norm / (norms + STABILITY)
    else:
        scale = torch.where(norms > clip_norm, clip_norm / norms, 1.0)  # also right for an infinite clip_norm
    scale = torch.where(finite, scale, 0.0).to(unit_gradients.dtype)
    if not bool(finite.all()):  # 0 * nan would be nan
        unit_gradients = unit_gradients.masked_fill(~finite.unsqueeze(1), 0.0)
    return torch.mv(unit_gradients.t(), scale), (~finite).sum()


def unit_norms(unit_gradients: Tensor) -> Tensor:
    """L2 norm of each row of [u, p]: [u], float32.

    Guarantee: relative error below 1e-6 for any p. PyTorch's float32 norm on a CPU adds up one long row in order and
        comes out too small, by 4e-4 at ten million weights: such a row would be clipped to more than C.
    Edge cases: a row with inf or nan, or whose squares overflow float32 within 4096 weights, is not finite.
    """
    whole = unit_gradients.shape[1] // _CHUNK * _CHUNK
    rest = unit_gradients[:, whole:].norm(dim=1, keepdim=True)
    if not whole:
        return rest.squeeze(1)
    chunks = unit_gradients[:, :whole].unflatten(1, (-1, _CHUNK)).norm(dim=2)  # [u, p / 4096]
    return torch.cat([chunks, rest], dim=1).double().norm(dim=1).float()
