"""Unlearning by gradients: the methods that sanitising is compared with, on the same targets.

What is to be forgotten are spans (identifiers) inside documents whose medicine must stay, as in `sani`, not whole
documents as in the papers. All losses are per record; forget and retain terms come from one and the same document.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dpmed.data.batches import Batch, language_targets, mean_by_record, token_losses
from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import EncodedRecords, Targets, TaskSpec, covers
from dpmed.errors import InputError
from dpmed.recipe import Objective
from dpmed.trainers.base import DpmedTrainer, TrainingConfig
from dpmed.trainers.task_vector import negated_task_vector

if TYPE_CHECKING:
    from torch import Tensor, nn

# Shapes of the losses: b = records, t = tokens, s = target spans of the record that has most.
# losses [b, t]: -log p of each token, in nats, where it is a target or kept, else 0.
# spans [b, t]: number of the token's target span within its record, from 1; 0 is not a target.


def gradient_ascent(losses: Tensor, spans: Tensor) -> Tensor:
    """GA = -CE(targets): the mean log-likelihood of a record's target tokens, [b] (Jang et al. 2023, arXiv 2210.01504).

    It has no lower bound: long training destroys the model. A record without targets has loss 0.
    """
    return -mean_by_record(losses, (spans > 0).to(losses.dtype))


def gradient_difference(losses: Tensor, spans: Tensor, kept: Tensor, *, retain_weight: float) -> Tensor:
    """GradDiff = -CE(targets) + retain_weight * CE(kept), [b] (Liu et al. 2022; Maini et al. 2024, arXiv 2401.06121).

    Args: kept: weight of each token that is to stay known, [b, t].
    """
    return gradient_ascent(losses, spans) + retain_weight * mean_by_record(losses, kept)


def negative_preference(losses: Tensor, reference: Tensor, spans: Tensor, *, beta: float) -> Tensor:
    """NPO = mean over target spans of -(2 / beta) * log sigmoid(-beta * (log p(span) - log p_ref(span))), [b].

    Zhang et al. 2024, arXiv 2404.05868, equation 3, with a span where the paper has an answer: log p(span) is the sum
    over its tokens. It is bounded below by 0, and a span that is already unlikely is pushed no further. For beta -> 0
    its gradient is that of gradient ascent on log p(span); at the reference it is so for every beta.

    Args: reference: `losses` of the frozen checkpoint.
    """
    ratios = span_sums(reference - losses, spans)
    present = span_sums(torch.ones_like(losses), spans) > 0
    return mean_by_record(-2 / beta * F.logsigmoid(-beta * ratios), present.to(losses.dtype))


def span_sums(values: Tensor, spans: Tensor) -> Tensor:
    """Sum of the values of each target span, [b, t] to [b, s]; 0 where a record has fewer spans."""
    sums = values.new_zeros(len(values), int(spans.max()) + 1)
    return sums.scatter_add(1, spans, values)[:, 1:]


@dataclass
class UnlearnTrainingConfig(TrainingConfig):
    """Configuration of `UnlearnTrainer`."""

    objective: Objective = field(default="npo", metadata={"help": f"one of {', '.join(get_args(Objective))}"})
    beta: float = field(default=0.1, metadata={"help": "npo: the larger, the sooner a span counts as forgotten"})
    retain_weight: float = field(default=1.0, metadata={"help": "gradient_difference, npo: weight of the other tokens"})
    alpha: float = field(default=1.0, metadata={"help": "task_vector: how much of what was learned is taken away"})
    identifiers: Targets = field(default="all", metadata={"help": "direct, indirect or all are to be forgotten"})
    k: int = field(default=2, metadata={"help": "a word of fewer than k patients is an indirect identifier"})


class UnlearnTrainer(DpmedTrainer):
    """Trains all weights of a checkpoint away from the identifiers of its records.

    Args:
        model: the checkpoint; an adapter must be merged first (`load_model(..., merge=True)`).
        train_dataset: the records that the checkpoint was trained on, with `identifiers` where they are known.
        The others: see `DpmedTrainer`.

    Attributes:
        reference: frozen copy of the checkpoint as it came (npo and task_vector), else None.

    Raises: InputError for a classification task, an objective that is not known, or records without any identifier.
    """

    args: UnlearnTrainingConfig

    def __init__(
        self,
        model: nn.Module,
        args: UnlearnTrainingConfig,
        train_dataset: Dataset | EncodedRecords,
        eval_dataset: Dataset | EncodedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        spec: TaskSpec | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if (spec.kind if spec else args.task) == "classification":
            raise InputError("unlearn works on language models; for a classifier use full, lora or dp_lora")
        _check(args)
        self.never_target = self.forget = args.identifiers
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, spec=spec, callbacks=callbacks)
        spans = (s for e in self.train_dataset.examples for s in e.spans)
        if not any(covers(args.identifiers, s.source) for s in spans):
            raise InputError(
                "unlearn found no identifier in the records: name data.identifiers, or use unlearn.identifiers: all"
            )
        self.reference: nn.Module | None = None
        if args.objective in ("npo", "task_vector"):
            self.reference = deepcopy(self.model).requires_grad_(False).eval()

    def prepare_records(self, records: Dataset, args: UnlearnTrainingConfig) -> Dataset:
        """Extends the known identifiers over the text, and adds the rare words; the same targets as `sani`'s."""
        return tag_identifiers(records, k=args.k, indirect=args.identifiers != "direct")

    def record_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective of each record, [b], float32."""
        args = self.args
        _, kept = language_targets(batch, self.spec)
        _, spans = language_targets({**batch, "weights": batch["forget"]}, self.spec)
        losses = self._token_losses(model, batch, (spans > 0) | (kept > 0))
        if args.objective == "gradient_ascent":
            return gradient_ascent(losses, spans)
        if args.objective == "gradient_difference":
            return gradient_difference(losses, spans, kept, retain_weight=args.retain_weight)
        if args.objective == "task_vector" or self.reference is None:  # learn the targets; `train` negates that
            return -gradient_ascent(losses, spans)
        with torch.no_grad(), self.accelerator.autocast():
            reference = self._token_losses(self.reference, batch, spans > 0)
        forget = negative_preference(losses, reference, spans, beta=args.beta)
        return forget + args.retain_weight * mean_by_record(losses, kept)

    def _token_losses(self, model: nn.Module, batch: Batch, counted: Tensor) -> Tensor:
        targets, _ = language_targets(batch, self.spec)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return token_losses(logits, targets, counted)

    def train(self, *args: Any, **options: Any) -> Any:
        """As `transformers.Trainer.train`. task_vector: then start - alpha * (trained - start).

        The vector holds what training on the targets alone adds, so the medicine stays (Ilharco et al. 2023, arXiv
        2212.04089; from the checkpoint itself as in Shi et al. 2024, arXiv 2407.06460).
        """
        result = super().train(*args, **options)
        if self.args.objective == "task_vector" and self.reference is not None:
            trained = self.accelerator.unwrap_model(self.model)
            start = self.reference.state_dict()
            trained.load_state_dict(negated_task_vector(trained.state_dict(), start, self.args.alpha))
        return result


def _check(args: UnlearnTrainingConfig) -> None:
    if args.objective not in get_args(Objective):
        raise InputError(f"unlearn.objective: choose one of {', '.join(get_args(Objective))}")
    if args.retain_weight < 0:
        raise InputError(f"unlearn.retain_weight is {args.retain_weight}; choose 0 or more")
    for name, value in (("beta", args.beta), ("alpha", args.alpha)):
        if value <= 0:
            raise InputError(f"unlearn.{name} is {value}; choose a number above 0")
