"""SANI's erasure in a LoRA adapter: the base stays as it is, and the adapter has no more say in the chosen neurons.

An adapter adds B A to a layer's weight. A row of B belongs to one neuron where the layer leads into the feed-forward
block, a column of A where it leads out of it. With these at 0 the neurons are the base model's, whose weights have
never seen the records; the repair trains them anew. Ours, as all that is known of the paper is of whole models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from dpmed.errors import InputError
from dpmed.trainers.erasure import LAYOUTS, Layers, Scores, chosen_blocks, chosen_neurons, feed_forwards

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to the feed-forward layers of one block."""

    rows: tuple[Tensor, ...]
    """B of each adapted layer that leads into the block [neurons, rank], and its bias [neurons] if it has one."""
    columns: Tensor | None
    """A of the layer that leads out of it [rank, neurons]; None if that layer is not adapted."""
    width: int


def feed_forward_factors(model: nn.Module, layers: Layers) -> dict[int, Factors]:
    """The active adapter's factors on the feed-forward layers of the chosen blocks, by block number.

    Raises: InputError if the model is no plain LoRA adapter, or has no factors on the feed-forward layers of a block.
    """
    if not isinstance(model, PeftModel):
        raise InputError(
            "sani.erase_in: adapter needs a checkpoint that is a LoRA adapter, and this one is a whole model: set it to"
            " weights"
        )
    name = str(model.active_adapter)
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig) or config.bias != "none":
        raise InputError(
            "sani.erase_in: adapter knows LoRA adapters without trained biases of the base alone: set it to weights"
        )
    widths = [block.width for block in feed_forwards(model)]  # refuses layouts that are not known
    base: Any = model.get_base_model()
    path, into, out_of = LAYOUTS[base.config.model_type]
    blocks = list(base.get_submodule(path).children())
    found: dict[int, Factors] = {}
    for number in chosen_blocks(layers, len(blocks)):
        ups = [_lora(blocks[number].get_submodule(layer), name) for layer in into]
        down = _lora(blocks[number].get_submodule(out_of), name)
        if down is None and all(up is None for up in ups):
            raise InputError(
                f"sani.erase_in: the adapter has no factors on the feed-forward layers of block {number}: choose other"
                " erase_layers, or set it to weights"
            )
        rows = tuple(part for up in ups if up is not None for part in _rows(up, name))
        columns: Tensor | None = None if down is None else down.lora_A[name].weight.data  # pyright: ignore
        found[number] = Factors(rows, columns, widths[number])
    return found


@torch.no_grad()
def erase_adapter_neurons(
    model: nn.Module, *, fraction: float, layers: Layers, generator: torch.Generator, scores: Scores | None = None
) -> dict[int, int]:
    """Take away what an adapter adds to a share of the feed-forward neurons of some blocks, in place.

    Args: as `erasure.erase_neurons`, with a PEFT model.

    Returns: block number -> number of neurons reset.
    Guarantee: the weights that the adapter makes of the base, at the chosen neurons, are the base's; all other weights
        stay as they are, and so does the base.
    Raises: InputError, see `feed_forward_factors`.
    """
    erased: dict[int, int] = {}
    for number, factors in feed_forward_factors(model, layers).items():
        chosen = chosen_neurons(factors.width, fraction, generator, None if scores is None else scores[number])
        for rows in factors.rows:
            rows[chosen.to(rows.device)] = 0.0
        if factors.columns is not None:
            factors.columns[:, chosen.to(factors.columns.device)] = 0.0
        erased[number] = len(chosen)
    return erased


def _lora(layer: Any, name: str) -> LoraLayer | None:
    """The layer with its factors; None if the adapter has none there."""
    if isinstance(layer, LoraLayer) and name in layer.lora_A:
        if name in layer.lora_variant:
            raise InputError("sani.erase_in: adapter knows plain LoRA, not its variants (DoRA, ...): set it to weights")
        return layer
    if hasattr(layer, "modules_to_save"):
        raise InputError(
            "sani.erase_in: the adapter holds whole feed-forward layers (modules_to_save), not factors: set it to"
            " weights"
        )
    return None


def _rows(layer: LoraLayer, name: str) -> list[Tensor]:
    b: Any = layer.lora_B[name]
    return [b.weight.data, *([] if b.bias is None else [b.bias.data])]
