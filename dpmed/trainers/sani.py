"""SANI: sanitise a checkpoint that is already trained. Erase neurons, then repair without ever learning an identifier.

1. erase: a random share of the feed-forward neurons of the last block is set back to a fresh initialisation;
2. repair: fine-tune for one or two epochs with a loss in which no identifier token is ever a target (causal), or with a
   mask that never falls on one (masked LM). Identifiers stay visible as context.

From the paper (arXiv 2510.21322): the two phases and their aim. Second-hand (its public reviews): half of the neurons
of the last layer, at random, one to two epochs. Ours, since it could not be found: a neuron is a hidden unit of the
feed-forward
block (its row in the up and gate projection with bias, its column in the down projection), reset to the model's own
initialisation, once. Identifiers follow arXiv 2501.02407 (see `tag_identifiers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.pytorch_utils import Conv1D

from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import EncodedRecords, Targets, TaskSpec, covers
from dpmed.errors import InputError
from dpmed.trainers.base import DpmedTrainer, TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYOUTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "bert": ("bert.encoder.layer", ("intermediate.dense",), "output.dense"),
    "roberta": ("roberta.encoder.layer", ("intermediate.dense",), "output.dense"),
    "gpt2": ("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neo": ("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "llama": ("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "mistral": ("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen2": ("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen3": ("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
}
"""Model type -> list of blocks, projections into the feed-forward block, projection out of it."""


@dataclass
class SANITrainingConfig(TrainingConfig):
    """Configuration of `SANITrainer`."""

    erase_fraction: float = field(default=0.5, metadata={"help": "share of neurons reset per block; 0 is repair only"})
    erase_layers: int = field(default=1, metadata={"help": "how many of the last blocks"})
    identifiers: Targets = field(default="all", metadata={"help": "direct, indirect or all are never a target"})
    k: int = field(default=2, metadata={"help": "a word of fewer than k patients is an indirect identifier"})


class SANITrainer(DpmedTrainer):
    """Erases when training starts, then repairs all weights.

    Args:
        model: the checkpoint to sanitise; an adapter must be merged first (`load_model(..., merge=True)`).
        train_dataset: the records that the checkpoint was trained on, with `identifiers` where they are known.
        The others: see `DpmedTrainer`.

    Attributes:
        erased: block number -> how many of its neurons were reset.

    Raises: InputError for a classification task, a layout that is not known, or records without any identifier.
    """

    args: SANITrainingConfig

    def __init__(
        self,
        model: nn.Module,
        args: SANITrainingConfig,
        train_dataset: Dataset | EncodedRecords,
        eval_dataset: Dataset | EncodedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        spec: TaskSpec | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if (spec.kind if spec else args.task) == "classification":
            raise InputError("sani repairs language models; for a classifier use full, lora or dp_lora")
        if not 0 <= args.erase_fraction <= 1:
            raise InputError(f"sani.erase_fraction is {args.erase_fraction}; choose a share between 0 and 1")
        self.never_target = args.identifiers
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, spec=spec, callbacks=callbacks)
        spans = (s for e in self.train_dataset.examples for s in e.spans)
        if not any(covers(args.identifiers, s.source) for s in spans):
            raise InputError(
                "sani found no identifier in the records: name data.identifiers, or use sani.identifiers: all"
            )
        generator = torch.Generator().manual_seed(args.seed)
        self.erased = erase_neurons(
            self.model, fraction=args.erase_fraction, n_layers=args.erase_layers, generator=generator
        )

    def prepare_records(self, records: Dataset, args: SANITrainingConfig) -> Dataset:
        """Extends the known identifiers over the text, and adds the rare words."""
        return tag_identifiers(records, k=args.k, indirect=args.identifiers != "direct")


def erase_neurons(model: nn.Module, *, fraction: float, n_layers: int, generator: torch.Generator) -> dict[int, int]:
    """Reset a random share of the feed-forward neurons of the last blocks to a fresh initialisation, in place.

    Args:
        model: a transformers language model of a known layout.
        fraction: share of neurons per block; 0 changes nothing.
        n_layers: how many of the last blocks.
        generator: chooses the neurons and draws their new weights.

    Returns: block number -> number of neurons reset.
    Raises: InputError if the layout is not known or there are fewer blocks.
    """
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise InputError(f"sani does not know where {config.model_type!r} models keep their neurons; known: {known}")
    path, into, out_of = LAYOUTS[config.model_type]
    blocks = model.get_submodule(path)
    total = len(list(blocks.children()))
    if not 1 <= n_layers <= total:
        raise InputError(f"sani.erase_layers is {n_layers}; the model has {total} blocks")
    erased: dict[int, int] = {}
    for number in range(total - n_layers, total):
        block = blocks.get_submodule(str(number))
        ups = [block.get_submodule(name) for name in into]
        width = _weight(ups[0]).shape[0]
        chosen = torch.randperm(width, generator=generator)[: math.floor(fraction * width)]
        _reset(ups, block.get_submodule(out_of), chosen, std=config.initializer_range, generator=generator)
        erased[number] = len(chosen)
    return erased


@torch.no_grad()
def _reset(
    ups: Sequence[nn.Module], down: nn.Module, neurons: Tensor, *, std: float, generator: torch.Generator
) -> None:
    """Fresh rows into the feed-forward block (bias 0), fresh columns out of it."""
    for up in ups:
        rows = _weight(up)  # [neurons, inputs]
        rows[neurons] = _normal(len(neurons), rows.shape[1], std, generator).to(rows)
        if up.bias is not None:
            up.bias[neurons] = 0.0  # pyright: ignore[reportIndexIssue]
    columns = _weight(down)  # [outputs, neurons]
    columns[:, neurons] = _normal(columns.shape[0], len(neurons), std, generator).to(columns)


def _normal(rows: int, columns: int, std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * std


def _weight(layer: nn.Module) -> Tensor:
    """The layer's weight as [outputs, inputs]; GPT-2's Conv1D keeps it transposed."""
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    return weight.data.T if isinstance(layer, Conv1D) else weight.data
