"""SANI: sanitise a checkpoint that is already trained. Erase neurons, then repair without ever learning an identifier.

1. erase: a share of the feed-forward neurons of some blocks is reset (see `erasure`), when the trainer is made, or
   also before every further epoch; or what a LoRA checkpoint adds to them (see `adapter_erasure`);
2. repair: fine-tune for one or two epochs with a loss in which no target token ever counts (causal), or with a mask
   that never falls on one (masked LM). Targets stay visible as context, or surrogates stand in their place.

From the paper (arXiv 2510.21322): the two phases, their aim, and that targets are identifiers or a list of confidential
terms. Second-hand (its public reviews): half of the neurons of the last layer, at random, one to two epochs. Ours: all
else, see docs/methods/sani.md. Identifiers follow arXiv 2501.02407 (see `tag_identifiers`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dpmed.data.batches import Batch, language_targets, mean_by_record, per_record_loss
from dpmed.data.identifiers import Span, tag_identifiers, with_spans
from dpmed.data.matching import KnownValues
from dpmed.data.sources import read_texts
from dpmed.data.surrogates import with_surrogates
from dpmed.data.tasks import EncodedRecords, Example, Targets, TaskSpec, covers, encode
from dpmed.errors import InputError
from dpmed.trainers.adapter_erasure import erase_adapter_neurons, feed_forward_factors
from dpmed.trainers.base import DpmedTrainer, TrainingConfig
from dpmed.trainers.erasure import (
    LAYOUTS,
    ResetTo,
    Select,
    chosen_blocks,
    erase_neurons,
    feed_forwards,
    neuron_scores,
    score_batches,
)
from dpmed.trainers.lora import with_adapters

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["LAYOUTS", "SANITrainer", "SANITrainingConfig", "divergence_by_record", "erase_neurons", "read_terms"]


@dataclass
class SANITrainingConfig(TrainingConfig):
    """Configuration of `SANITrainer`."""

    erase_fraction: float = field(default=0.5, metadata={"help": "share of neurons reset per block; 0 is repair only"})
    erase_layers: Any = field(default=1, metadata={"help": "a number of last blocks, all, or block numbers from 0"})
    select: Select = field(default="random", metadata={"help": "random, gradient or activation"})
    score_windows: int = field(default=256, metadata={"help": "windows by which neurons are scored"})
    reset_to: ResetTo = field(default="init", metadata={"help": "init, base or zero"})
    erase_in: Literal["weights", "adapter"] = field(
        default="weights", metadata={"help": "the model's weights, or the factors of a checkpoint that is an adapter"}
    )
    when: Literal["once", "every_epoch"] = field(default="once", metadata={"help": "once or every_epoch"})
    identifiers: Targets = field(default="all", metadata={"help": "direct, indirect or all are never a target"})
    k: int = field(default=2, metadata={"help": "a word of fewer than k patients is an indirect identifier"})
    terms: str | None = field(default=None, metadata={"help": "file of terms that are targets instead of identifiers"})
    surrogates: bool = field(default=False, metadata={"help": "targets are replaced in the context of the repair too"})
    repair: Literal["full", "lora", "dp_lora"] = field(
        default="full", metadata={"help": "all weights, or adapters; dp_lora needs DPSANITrainer"}
    )
    kl: float = field(default=0.0, metadata={"help": "weight of the divergence from the checkpoint"})


class SANITrainer(DpmedTrainer):
    """Erases when it is made, then repairs.

    Args:
        model: the checkpoint to sanitise; an adapter must be merged first (`load_model(..., merge=True)`), or with
            `erase_in` adapter a PEFT model whose adapter is trainable.
        train_dataset: the records that the checkpoint was trained on, with `identifiers` where they are known.
        base_model: the model before fine-tuning, for `reset_to` base.
        peft_config: adapters that learn the repair, for `repair` lora. `save_weights` merges them, but where `erase_in`
            is adapter: then the checkpoint's own adapter learns the repair, and is saved as one.
        The others: see `DpmedTrainer`.

    Attributes:
        erased: block number -> how many of its neurons were reset (each time).

    Guarantee: resumed from a checkpoint, it ends as if it had never stopped: a full repair takes all weights from the
    checkpoint, and a LoRA repair erases the same neurons in the same way, below the checkpoint's adapters.
    Raises: InputError for a classification task, a layout that is not known, records without any target, or options
    that do not go together.
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
        base_model: nn.Module | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        if (spec.kind if spec else args.task) == "classification":
            raise InputError("sani repairs language models; for a classifier use full, lora or dp_lora")
        self.check_options(args, model, train_dataset)
        self.never_target = "direct" if args.terms else args.identifiers
        reference = copy.deepcopy(model) if args.kl else None  # before anything is erased
        if args.repair != "full":
            model = with_adapters(model, peft_config)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, spec=spec, callbacks=callbacks)
        spans = (s for e in self.train_dataset.examples for s in e.spans)
        if not any(covers(self.never_target, s.source) for s in spans):
            raise InputError(
                "sani found no term of sani.terms in the records: name terms that stand in them"
                if args.terms
                else "sani found no identifier in the records: name data.identifiers, or use sani.identifiers: all"
            )
        self.reference = None if reference is None else reference.eval().requires_grad_(False).to(args.device)
        self.erased = self.erase(epoch=0, base=base_model)
        if args.when == "every_epoch":
            self.add_callback(_EraseEachEpoch(self, base_model))

    def check_options(self, args: Any, model: nn.Module, records: Dataset | EncodedRecords) -> None:
        """Refuse what cannot work before records are encoded or weights copied. Raises: InputError."""
        _check(args, model, records)

    def prepare_records(self, records: Dataset, args: SANITrainingConfig) -> Dataset:
        """Finds the terms; or extends the known identifiers over the text, and adds the rare words. With `surrogates`,
        what the repair reads holds none of them any more."""
        if args.terms:
            found = with_terms(records, args.terms)
        else:
            found = tag_identifiers(records, k=args.k, indirect=args.identifiers != "direct")
        if not args.surrogates:
            return found
        self._unchanged = found
        return with_surrogates(found, self.never_target or "all", seed=args.seed)

    @cached_property
    def checkpoint_examples(self) -> Sequence[Example]:
        """Windows of the records as the checkpoint learned them: with the real targets, for scores of neurons."""
        if not self.args.surrogates:
            return self.train_dataset.examples
        return encode(self._unchanged, self.processing_class, self.spec).examples

    def erase(self, *, epoch: int, base: nn.Module | None = None) -> dict[int, int]:
        """Choose and reset neurons; which ones follows from seed, epoch, records and weights.

        Returns: block number -> number of neurons reset.
        """
        args = self.args
        generator = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)  # torch reads 32 bits of it
        scores = None
        if args.select != "random" and args.erase_fraction > 0:
            batches = score_batches(
                self.checkpoint_examples,
                self.processing_class,
                self.spec,
                which=self.never_target or "all",
                n_windows=args.score_windows,
                batch_size=args.train_batch_size,
                generator=generator,
            )
            scores = neuron_scores(self.model, batches, self.spec, layers=args.erase_layers, by=args.select)
        common: dict[str, Any] = {"fraction": args.erase_fraction, "layers": args.erase_layers}
        common |= {"generator": generator, "scores": scores}
        if args.erase_in == "adapter":
            return erase_adapter_neurons(self.model, **common)
        return erase_neurons(self.model, **common, reset_to=args.reset_to, base=base)

    def record_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each example [b]; in training, and with `kl`, the divergence from the checkpoint is added."""
        if self.reference is None or not model.training:
            return super().record_losses(model, batch)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = model(**inputs).logits
        with torch.no_grad():
            original = self.reference(**inputs).logits
        far = divergence_by_record(logits, original, batch, self.spec)
        return per_record_loss(logits, batch, self.spec) + self.args.kl * far

    def save_weights(self, folder: str | Path) -> Path:
        """As the base class does; adapters of a LoRA repair are merged, since they belong to the erased model alone.
        A checkpoint that was erased in its adapter is saved as an adapter, since its base is as it was."""
        repaired = self.model
        if not isinstance(repaired, PeftModel) or self.args.erase_in == "adapter":
            return super().save_weights(folder)
        try:
            self.model = copy.deepcopy(repaired).merge_and_unload()  # pyright: ignore[reportCallIssue]
            return super().save_weights(folder)
        finally:
            self.model = repaired


class _EraseEachEpoch(TrainerCallback):
    """Erases anew before each epoch but the first, which the trainer's own erasure precedes."""

    def __init__(self, trainer: SANITrainer, base: nn.Module | None) -> None:
        self.trainer, self.base = trainer, base

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = round(state.epoch or 0)
        if epoch > 0 and state.epoch == epoch:  # a run that is resumed within an epoch has erased before it
            self.trainer.erase(epoch=epoch, base=self.base)


def divergence_by_record(logits: Tensor, original: Tensor, batch: Batch, spec: TaskSpec) -> Tensor:
    """Kullback-Leibler divergence KL(original || repaired) of each example, a mean over its counted tokens.

    Shapes: b = examples, t = tokens, v = vocabulary.

    Args:
        logits: of the model in repair, [b, t, v].
        original: of the checkpoint before erasure, [b, t, v].
        batch: what `Collator` made; where its weights are 0, as at targets of sanitising, nothing counts.
        spec: the task.

    Returns: [b], float32, in nats. An example without any counted token has 0.
    """
    _, weights = language_targets(batch, spec)
    counted = weights > 0
    old = original[counted].float().log_softmax(dim=1)
    new = logits[counted].float().log_softmax(dim=1)
    far = F.kl_div(new, old, reduction="none", log_target=True).sum(dim=1)
    at = counted.flatten().nonzero().squeeze(1)
    return mean_by_record(torch.zeros_like(weights).flatten().index_put((at,), far).view_as(weights), weights)


def read_terms(path: str | Path) -> list[str]:
    """The terms of a UTF-8 text file, one a line; blank lines are left out.

    Raises: InputError if the file cannot be read or holds no term.
    """
    empty = "holds no term; name a file with one term a line, or null"
    return read_texts(path, key="sani.terms", separator="\n", empty=empty)


def term_spans(texts: Sequence[str], terms: Sequence[str]) -> list[list[Span]]:
    """Where the terms stand in each text, as whole words, whatever their case: spans of type TERM, source known."""
    known = KnownValues(terms, ["TERM"] * len(terms))
    return [
        [{"start": m.start, "end": m.end, "type": "TERM", "source": "known"} for m in known.find(text)]
        for text in texts
    ]


def with_terms(records: Dataset, path: str | Path) -> Dataset:
    """The records with the terms of a file as their only identifiers."""
    return with_spans(records, term_spans(list(records["text"]), read_terms(path)))


def _check(args: SANITrainingConfig, model: nn.Module, records: Dataset | EncodedRecords) -> None:
    """Refuse what cannot work before records are encoded or weights copied."""
    if not 0 <= args.erase_fraction <= 1:
        raise InputError(f"sani.erase_fraction is {args.erase_fraction}; choose a share between 0 and 1")
    choices = {
        "select": ("random", "gradient", "activation"),
        "reset_to": ("init", "base", "zero"),
        "erase_in": ("weights", "adapter"),
        "when": ("once", "every_epoch"),
        "repair": ("full", "lora", "dp_lora"),
    }
    for name, known in choices.items():
        if getattr(args, name) not in known:
            raise InputError(f"sani.{name} is {getattr(args, name)!r}; choose one of {', '.join(known)}")
    if args.repair == "dp_lora" and not hasattr(args, "target_epsilon"):
        raise InputError("sani.repair: dp_lora needs the settings of a private run: use DPSANITrainer and its config")
    if not 0 <= args.kl < float("inf"):
        raise InputError(f"sani.kl is {args.kl}; choose a number of 0 or more")
    if args.score_windows < 1:
        raise InputError(f"sani.score_windows is {args.score_windows}; choose a whole number of at least 1")
    if args.erase_in == "adapter":
        feed_forward_factors(model, args.erase_layers)
        if args.repair == "full":
            raise InputError("sani.erase_in: adapter leaves the base as it is: set sani.repair to lora")
        if args.reset_to == "zero":
            raise InputError("sani.reset_to: zero would prune the base; an adapter's neurons are reset to the base's")
    elif args.repair != "full" and args.when == "every_epoch":
        raise InputError(
            "sani.when: every_epoch would erase below adapters that have learned: set sani.repair to full, or "
            "sani.when to once"
        )
    if args.terms and isinstance(records, EncodedRecords):
        raise InputError("sani.terms are looked for in text: pass records that are not encoded yet")
    if args.surrogates and isinstance(records, EncodedRecords):
        raise InputError("sani.surrogates are put into text: pass records that are not encoded yet")
    chosen_blocks(args.erase_layers, len(feed_forwards(model)))
