"""SANI's first phase, erasure: where a model keeps its neurons, which of them are reset, and to what.

A neuron is one hidden unit of a feed-forward block: its row in the up (and gate) projection with its bias, and its
column in the down projection. The bias of the down projection belongs to no neuron.

That certain neurons of the last layers are reset is from the paper (arXiv 2510.21322); half of those of the last one,
at random, is second-hand. What a neuron is, the scores, and what it is reset to are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dpmed.data.batches import Batch, Collator, language_targets
from dpmed.data.tasks import Example, Targets, TaskSpec, covers
from dpmed.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Layers = int | str | Sequence[int]
"""The last n blocks, "all" of them, or block numbers from 0."""
Select = Literal["random", "gradient", "activation"]
ResetTo = Literal["init", "base", "zero"]
Scores = dict[int, Tensor]
"""Block number -> score of each of its neurons; the highest are erased first."""

_LLAMA = ("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
LAYOUTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "bert": ("bert.encoder.layer", ("intermediate.dense",), "output.dense"),
    "roberta": ("roberta.encoder.layer", ("intermediate.dense",), "output.dense"),
    "gpt2": ("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neo": ("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""Model type -> list of blocks, projections into the feed-forward block, projection out of it."""


@dataclass(frozen=True)
class FeedForward:
    """One block's feed-forward layers, without any adapter on them.

    `std` is the standard deviation of a fresh weight, into the block and out of it.
    """

    ups: tuple[nn.Module, ...]
    down: nn.Module
    std: tuple[float, float]

    @property
    def width(self) -> int:
        """How many neurons there are."""
        return _weight(self.ups[0]).shape[0]


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The feed-forward block of each transformer block, from the first to the last.

    Args:
        model: a transformers language model, or a PEFT model around one.

    Raises: InputError if the layout is not known.
    """
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    config = plain.config
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise InputError(f"sani does not know where {config.model_type!r} models keep their neurons; known: {known}")
    path, into, out_of = LAYOUTS[config.model_type]
    std = float(config.initializer_range)
    # GPT-2 starts what adds to its residual stream smaller, by the number of such layers (Radford et al. 2019).
    out_std = std / math.sqrt(2 * config.n_layer) if config.model_type == "gpt2" else std
    return [
        FeedForward(tuple(_plain(block, name) for name in into), _plain(block, out_of), (std, out_std))
        for block in plain.get_submodule(path).children()
    ]


def _plain(block: nn.Module, name: str) -> nn.Module:
    """A layer of a block; where peft has put an adapter around it, the layer inside."""
    layer = block.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def chosen_blocks(layers: Layers, n_blocks: int) -> list[int]:
    """Block numbers, sorted. Raises: InputError for a block that the model does not have, or one named twice."""
    has = f"the model has {n_blocks} blocks, 0 to {n_blocks - 1}"
    if isinstance(layers, str):
        if layers != "all":
            raise InputError(f"sani.erase_layers is {layers!r}; name a number of last blocks, all, or block numbers")
        return list(range(n_blocks))
    if isinstance(layers, int):
        if not 1 <= layers <= n_blocks:
            raise InputError(f"sani.erase_layers is {layers}; {has}")
        return list(range(n_blocks - layers, n_blocks))
    if not layers or len(set(layers)) < len(layers) or not all(0 <= number < n_blocks for number in layers):
        raise InputError(f"sani.erase_layers is {list(layers)}; name each block once: {has}")
    return sorted(layers)


# --- Which neurons ----------------------------------------------------------------------------------------------------


def neuron_scores(
    model: nn.Module, batches: Iterable[tuple[Batch, Batch]], spec: TaskSpec, *, layers: Layers, by: Select
) -> Scores:
    """How much more each neuron does for targets than for other tokens.

    Shapes: b = examples, t = tokens.

    1. activation: the mean of |a| where a token is predicted, a being the neuron's value before the down projection.
       gradient: the sum over all positions of |a times the gradient of the loss by a|, for a loss summed over tokens,
       per token. Both on targets alone, and on other tokens alone.
    2. Each as a share of the block's total; the score is the share on targets minus that on other tokens.

    Args:
        model: of a known layout. Its weights, gradients and modes stay as they are.
        batches: what `score_batches` makes.
        spec: causal_lm or masked_lm.
        layers: blocks to score.
        by: gradient or activation.

    Returns: float64, on the CPU; the scores of a block sum to 0.
    Raises: InputError if the batches hold no target that has anything before it.
    """
    blocks = feed_forwards(model)
    numbers = chosen_blocks(layers, len(blocks))
    totals = [{n: torch.zeros(blocks[n].width, dtype=torch.float64) for n in numbers} for _ in range(2)]
    n_targets = 0
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make the scores depend on chance
    try:
        for pair in batches:
            n_targets += int((language_targets(pair[0], spec)[1] > 0).sum())
            for total, batch in zip(totals, pair, strict=True):
                for number, values in _sums(model, batch, spec, {n: blocks[n] for n in numbers}, by).items():
                    total[number] += values
    finally:
        for module in training:
            module.training = True
    if n_targets == 0:
        raise InputError(f"sani.select: {by} found no target to score in the records; set it to random")
    on_targets, on_others = totals
    return {n: _share(on_targets[n]) - _share(on_others[n]) for n in numbers}


def _share(values: Tensor) -> Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _sums(model: nn.Module, batch: Batch, spec: TaskSpec, blocks: Mapping[int, FeedForward], by: Select) -> Scores:
    """The sums of one batch over its counted tokens, by block."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    targets, weights = language_targets(batch, spec)
    counted = weights > 0  # [b, t]
    if not bool(counted.any()):
        return {}
    with torch.set_grad_enabled(by == "gradient"), _activations(blocks) as kept:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if by == "activation":
            return {n: a[counted].abs().double().sum(dim=0).cpu() for n, a in kept.items()}
        loss = F.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")
        gradients = torch.autograd.grad(loss, list(kept.values()))
    products = zip(kept.items(), gradients, strict=True)
    # Products in float32: of two bfloat16 numbers they are exact, and half of their digits would be lost otherwise.
    return {n: (a.detach().float() * g.float()).abs().double().sum(dim=(0, 1)).cpu() for (n, a), g in products}


@contextmanager
def _activations(blocks: Mapping[int, FeedForward]) -> Iterator[dict[int, Tensor]]:
    """Keeps the neurons' values [b, t, neurons] of a forward pass, by block."""
    kept: dict[int, Tensor] = {}

    def keeps(number: int) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled() and not args[0].requires_grad:
                args[0].requires_grad_()  # nothing before it is trained, as under an adapter
            kept[number] = args[0]

        return keep

    hooks = [block.down.register_forward_pre_hook(keeps(number)) for number, block in blocks.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def score_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    which: Targets,
    n_windows: int,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[tuple[Batch, Batch]]:
    """The same windows twice: once with the loss on targets alone, once on other tokens alone.

    Causal: targets are predicted from what stands before them. Masked LM: all targets of a window are masked at once;
    on the other side words are masked as in the repair.

    Args:
        examples: windows; those without a target are left out.
        tokenizer: of the model.
        spec: the task.
        which: the targets.
        n_windows: at most so many, drawn at random.
        batch_size: windows per batch.
        generator: draws windows and masks; the same one gives the same batches.
    """
    with_targets = [e for e in examples if any(covers(which, span.source) for span in e.spans)]
    order = torch.randperm(len(with_targets), generator=generator)[:n_windows].tolist()
    collate = Collator(tokenizer, spec, never_target=which, masks=lambda n: torch.rand(n, generator=generator).numpy())
    for start in range(0, len(order), batch_size):
        some = [with_targets[i] for i in order[start : start + batch_size]]
        others = collate(some)
        yield _on_targets(others, some, which, spec, collate.mask_id), others


def _on_targets(batch: Batch, examples: Sequence[Example], which: Targets, spec: TaskSpec, mask_id: Any) -> Batch:
    weights = torch.zeros_like(batch["weights"])
    for row, example in enumerate(examples):
        for span in example.spans:
            if covers(which, span.source):
                weights[row, span.start : span.end] = 1.0
    if spec.kind == "causal_lm":
        weights[:, 0] = 0.0  # nothing stands before it
        return {**batch, "weights": weights}
    return {**batch, "weights": weights, "input_ids": batch["targets"].masked_fill(weights > 0, mask_id)}


# --- Reset ------------------------------------------------------------------------------------------------------------


def erase_neurons(
    model: nn.Module,
    *,
    fraction: float,
    layers: Layers,
    generator: torch.Generator,
    scores: Scores | None = None,
    reset_to: ResetTo = "init",
    base: nn.Module | None = None,
) -> dict[int, int]:
    """Reset a share of the feed-forward neurons of some blocks, in place.

    Args:
        model: a transformers language model of a known layout, or a PEFT model around one.
        fraction: share of neurons per block, rounded down to whole neurons; 0 changes nothing.
        layers: which blocks.
        generator: chooses the neurons where there are no scores, and draws fresh weights.
        scores: what `neuron_scores` gave for these blocks: the highest are reset. None chooses at random.
        reset_to: init draws fresh weights as the model's own initialisation does, with biases of 0. base takes the
            weights of the same neurons of `base`. zero prunes them: no gradient ever reaches them again.
        base: the model before fine-tuning, for `reset_to` base.

    Returns: block number -> number of neurons reset.
    Guarantee: rows, biases and columns of the chosen neurons change and nothing else; but where all neurons of a block
    are reset to base, the bias of its down projection is too, so that the block's feed-forward layers are the base's.
    Raises: InputError if the layout or a block is not known, or the base is missing or of another shape.
    """
    blocks = feed_forwards(model)
    numbers = chosen_blocks(layers, len(blocks))
    bases = _base_blocks(base, blocks) if reset_to == "base" else [None] * len(blocks)
    erased: dict[int, int] = {}
    for number in numbers:
        block, width = blocks[number], blocks[number].width
        chosen = chosen_neurons(width, fraction, generator, None if scores is None else scores[number])
        _reset(block, chosen, reset_to, bases[number], generator)
        erased[number] = len(chosen)
    return erased


def chosen_neurons(width: int, fraction: float, generator: torch.Generator, scores: Tensor | None) -> Tensor:
    """The neurons of one block that are reset: those of the highest scores, or random ones without scores."""
    if scores is None:
        order = torch.randperm(width, generator=generator)
    else:
        order = scores.argsort(descending=True, stable=True)
    return order[: math.floor(fraction * width)]


def _base_blocks(base: nn.Module | None, blocks: list[FeedForward]) -> list[FeedForward]:
    if base is None:
        raise InputError("sani.reset_to: base needs the model before fine-tuning: set model.base")
    found = feed_forwards(base)
    if list(map(_shapes, found)) != list(map(_shapes, blocks)):
        raise InputError(
            "sani.reset_to: base: the feed-forward blocks of model.base have other shapes than the model's"
        )
    return found


def _shapes(block: FeedForward) -> list[tuple[torch.Size, bool]]:
    return [(_weight(layer).shape, layer.bias is not None) for layer in (*block.ups, block.down)]


@torch.no_grad()
def _reset(
    block: FeedForward, neurons: Tensor, reset_to: ResetTo, base: FeedForward | None, generator: torch.Generator
) -> None:
    into, out_of = block.std
    for place, up in enumerate(block.ups):
        old = None if base is None else base.ups[place]
        rows, bias = _weight(up), _bias(up)  # [neurons, inputs], [neurons]
        fresh = (len(neurons), rows.shape[1])
        rows[neurons] = (_fresh(fresh, into, reset_to, generator) if old is None else _weight(old)[neurons]).to(rows)
        if bias is not None:
            old_bias = None if old is None else _bias(old)
            bias[neurons] = torch.zeros(len(neurons)).to(bias) if old_bias is None else old_bias[neurons].to(bias)
    columns, bias = _weight(block.down), _bias(block.down)  # [outputs, neurons], [outputs]
    if base is None:
        columns[:, neurons] = _fresh((len(columns), len(neurons)), out_of, reset_to, generator).to(columns)
        return
    columns[:, neurons] = _weight(base.down)[:, neurons].to(columns)
    base_bias = _bias(base.down)
    if bias is not None and base_bias is not None and len(neurons) == block.width:
        bias.copy_(base_bias)


def _fresh(shape: tuple[int, int], std: float, reset_to: ResetTo, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape) if reset_to == "zero" else torch.randn(shape, generator=generator) * std


def _weight(layer: nn.Module) -> Tensor:
    """The layer's weight as [outputs, inputs]; GPT-2's Conv1D keeps it transposed."""
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    return weight.data.T if isinstance(layer, Conv1D) else weight.data


def _bias(layer: nn.Module) -> Tensor | None:
    bias: Any = layer.bias
    return None if bias is None else bias.data
