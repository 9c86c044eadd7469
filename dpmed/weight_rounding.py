"""Weight rounding: what weight-only quantisation and half precision do to a model's weights, on a plain float model.

A released model is often run in 8 or 4 bits or in bfloat16, and rounding can bring back what fine-tuning hid
(arXiv 2410.16454). Here each weight matrix is rounded to the grid of symmetric round-to-nearest quantisation and
written back as floats. It simulates weight-only quantisation, which is what int8 and int4 inference do to weights; it
simulates no rounding of activations, no calibration (GPTQ, AWQ) and no other grid (NF4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Bits = Literal[4, 8]
GROUP = 64
"""4 bits: so many neighbouring inputs of one output share a scale, as in the usual int4 formats."""


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> int:
    """Round the weights of all linear layers but the output layer to 8 or 4 bits, in place.

    8 bits: one scale per output channel. 4 bits: one scale per `GROUP` inputs of an output channel (the last group may
    be shorter). Biases, norms, embeddings and the output layer stay as they are, as int8 and int4 inference leave them.

    Args:
        model: a plain model; merge adapters first, since it is their sum with the base that is rounded.
        bits: 8 or 4.

    Returns: how many matrices were rounded.
    Raises: ValueError for other bits, or if the model has no linear layer to round.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; weights are rounded to 8 or 4")
    count = 0
    for layer in _linear_layers(model):
        transposed = isinstance(layer, Conv1D)  # GPT-2 keeps its matrices as [inputs, outputs]
        weight: Tensor = layer.weight.data  # pyright: ignore[reportAssignmentType]
        rows = weight.T if transposed else weight
        rounded = symmetric_grid(rows, bits, None if bits == 8 else GROUP)
        weight.copy_(rounded.T if transposed else rounded)
        count += 1
    if count == 0:
        raise ValueError("the model has no linear layer to round")
    return count


def symmetric_grid(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """The nearest point of a symmetric grid for each weight.

    Args:
        weight: [outputs, inputs].
        bits: b; the grid is scale * {-(2^(b-1) - 1) .. 2^(b-1) - 1}.
        group: inputs that share a scale; None takes the whole row.

    Returns: [outputs, inputs], same type. The scale is the group's largest magnitude over 2^(b-1) - 1, so no weight is
    clipped and none moves by more than half a scale; a group of zeros stays zero.
    """
    top = 2 ** (bits - 1) - 1
    pieces = weight.float().split(group or weight.shape[1], dim=1)
    found: list[Tensor] = []
    for piece in pieces:
        scale = piece.abs().amax(dim=1, keepdim=True) / top
        steps = torch.where(scale > 0, piece / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        found.append(steps.round().clamp(-top, top) * scale)
    return torch.cat(found, dim=1).to(weight.dtype)


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> int:
    """Round every floating-point parameter and buffer to bfloat16 and keep it in its own type, in place.

    Returns: how many tensors were rounded.
    """
    count = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.data.to(torch.bfloat16))
            count += 1
    return count


def _linear_layers(model: nn.Module) -> Iterator[nn.Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not output:
            yield layer
