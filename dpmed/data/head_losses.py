"""Losses of a language model whose output layer is frozen, without ever holding its logits.

A language model's logits, their softmax and two gradients of the same size are most of the memory of a small
model's step, and a part of its time. Where the output layer is frozen (LoRA), the gradient of a token's loss with
respect to the input of that layer is known as soon as its logits are, up to a factor. So the logits are made, used and
dropped in blocks, and only for tokens that count as targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpmed.data.batches import Batch, language_targets, mean_by_record, per_record_loss
from dpmed.data.output_layer import input_of, output_layer
from dpmed.data.tasks import TaskSpec

BLOCK_ENTRIES = {"cpu": 1 << 24}
"""Logits that are held at once: on a CPU 64 MiB, so that the products stay large enough to be fast."""
_ELSEWHERE = 1 << 26
CACHE_ENTRIES = {"cpu": 1 << 18}
"""Of these, how many are worked on at once: what a core keeps near itself."""


def record_losses(model: nn.Module, batch: Batch, spec: TaskSpec, head: nn.Linear | None = None) -> Tensor:
    """Run a model on a batch: the loss of each example, a mean over its own targets only.

    Args:
        model: of the task, PEFT models included.
        batch: what `Collator` made.
        spec: the task.
        head: what `frozen_head` found. None takes the losses from the model's logits.

    Returns: [b], float32, in nats; see `per_record_loss`, to which it is equal up to rounding, gradients included.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if head is None or not _is_frozen(head):
        return per_record_loss(model(**inputs).logits, batch, spec)
    if spec.kind == "causal_lm":
        inputs["use_cache"] = False  # of keys and values, which nothing reads here
    targets, weights = language_targets(batch, spec)
    at = (weights.flatten() > 0).nonzero().squeeze(1)
    states = input_of(head, model, inputs).flatten(0, 1).index_select(0, at)  # [m, d]
    some: Any = _HeadLosses.apply(states, head.weight, head.bias, targets.flatten().index_select(0, at))
    losses = torch.zeros(weights.numel(), device=some.device).index_put((at,), some)
    return mean_by_record(losses.view_as(weights), weights)


def frozen_head(model: nn.Module, device: torch.device | str) -> nn.Linear | None:
    """The output layer, if it is a frozen linear layer whose output is exactly the model's logits; else None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if type(head) is not nn.Linear or not _is_frozen(head):
        return None
    return head if output_layer(model, device) is head else None


def _is_frozen(head: nn.Linear) -> bool:
    """Also that its weight is a plain one: a sharded weight is whole only inside the layer's own forward pass."""
    own = [head.weight, *([] if head.bias is None else [head.bias])]
    return all(type(p) is nn.Parameter and type(p.data) is Tensor and not p.requires_grad for p in own)


class _HeadLosses(torch.autograd.Function):
    """Cross-entropy of each row behind a linear layer, whose weight gets no gradient.

    Shapes: m = tokens, d = width, v = vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.dtype = states.dtype
        if torch.is_autocast_enabled(states.device.type):  # what autocast does for F.linear
            dtype = torch.get_autocast_dtype(states.device.type)
            states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(states.device.type, enabled=False):
            losses, gradient = _losses(states, weight, bias, targets, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (of_states,) = ctx.saved_tensors
        return (of_states * gradients[0][:, None]).to(ctx.dtype), None, None, None


def _losses(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [m] in float32 (float64 for float64), and the gradient of each by its own state [m, d]."""
    kind, n_words = states.device.type, max(1, len(weight))
    wide = torch.promote_types(states.dtype, torch.float32)
    losses = torch.empty(len(states), dtype=wide, device=states.device)
    of_states = torch.empty_like(states) if gradient else None
    n_blocks = max(1, -(-len(states) * n_words // BLOCK_ENTRIES.get(kind, _ELSEWHERE)))
    size = max(1, -(-len(states) // n_blocks))
    scratch = states.new_empty(min(size, len(states)), len(weight))
    near = max(1, CACHE_ENTRIES.get(kind, _ELSEWHERE) // n_words)
    for start in range(0, len(states), size):
        block = slice(start, min(start + size, len(states)))
        logits = scratch[: block.stop - start]
        torch.mm(states[block], weight.t(), out=logits)
        if bias is not None:
            logits += bias
        for first in range(0, len(logits), near):
            rows = slice(first, min(first + near, len(logits)))
            at = slice(start + rows.start, start + rows.stop)
            losses[at] = _take_losses_(logits[rows], targets[at], gradient=gradient)
        if of_states is not None:
            torch.mm(logits, weight, out=of_states[block])
    return losses, of_states


def _take_losses_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Cross-entropy of each row [k]; for a `gradient` the logits become its gradient, softmax minus one-hot."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the same tensor where it is wide enough
    log_sums, row = wide.logsumexp(dim=1), torch.arange(len(wide), device=wide.device)
    losses = log_sums - wide[row, targets]
    if gradient:
        wide.sub_(log_sums[:, None]).exp_()
        wide[row, targets] -= 1
        if wide is not logits:
            logits.copy_(wide)
    return losses
