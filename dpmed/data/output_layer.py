"""A language model's output layer: which it is, and what goes into it.

Whoever has the layer's input can make logits where they are needed, some at a time, instead of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def output_layer(model: nn.Module, device: torch.device | str, **options: Any) -> nn.Module | None:
    """The layer whose output is exactly the model's logits, whatever its weights; None where there is none.

    Tried on two tokens, with made-up numbers in place of the layer's output: they must come out as the logits. Equal
    logits alone would not do, since small ones pass through a cap almost unchanged and zeros through any factor.

    Args:
        model: a language model, or a PEFT model around one. Its modes are as before afterwards.
        device: where the model is.
        options: further arguments of its forward pass.
    """
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    if layer is None:
        return None
    made_up: list[Tensor] = []

    def replace(_m: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        numbers = torch.linspace(-1000, 1000, out.numel()).view(out.shape).to(out)
        made_up.extend([numbers] * len(args))
        return numbers

    two = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    training = [m for m in model.modules() if m.training]
    hook = layer.register_forward_hook(replace)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**{name: tensor.to(device) for name, tensor in two.items()}, **options).logits
    finally:
        hook.remove()
        for module in training:
            module.training = True
    if len(made_up) != 1 or made_up[0].shape != logits.shape:
        return None
    return layer if torch.equal(made_up[0].float(), logits.float()) else None


def input_of(layer: nn.Module, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What a forward pass gives its output layer [b, t, d]; the layer itself then sees one position of each record."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0])
        return (args[0][:, :1], *args[1:])

    hook = layer.register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        hook.remove()
    (states,) = kept
    return states
