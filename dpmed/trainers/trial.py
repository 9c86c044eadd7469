"""Examples of random tokens, which hold nothing of anybody: for the trial before the first private step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpmed.data.batches import Batch
from dpmed.data.head_losses import record_losses
from dpmed.data.tasks import Example, TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


def public_examples(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[int]]:
    """Four examples of random tokens for a trial run, and the unit of each: they hold nothing of anybody's records."""
    rng = random.Random(0)
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special] or [0]
    units = [0, 1, 0, 2]
    examples: list[Example] = []
    for record, (unit, wanted) in enumerate(zip(units, (11, 5, 7, 14), strict=True)):
        n = min(wanted, spec.max_length)
        labels = range(len(spec.labels))
        label = tuple(rng.sample(labels, k=1)) if spec.multi_label else rng.choice(labels) if labels else None
        examples.append(
            Example(
                record=record,
                unit=unit,
                window=0,
                input_ids=rng.choices(ordinary, k=n),
                text_start=0,
                text_end=n if spec.kind != "causal_lm" or label is None else n - 2,
                prompt_end=n - 1 if label is not None else n,
                spans=(),
                words=tuple(range(n)) if spec.kind == "masked_lm" else (),
                label=label,
            )
        )
    return examples, units


def trial_losses(
    model: nn.Module, batch: Batch, lengths: Sequence[int], spec: TaskSpec, head: nn.Linear | None
) -> Callable[[Sequence[int]], Tensor]:
    """Losses of any of a batch's examples, padded together as in training.

    Args:
        model: of the task.
        batch: all examples, collated once, since masked words are drawn at random.
        lengths: tokens of each example.
        spec: the task.
        head: see `record_losses`.

    Returns: a function of the examples' indices that gives their losses, [their number].
    """
    by_token = {"input_ids", "attention_mask", "weights"} | ({"targets"} if "weights" in batch else set())

    def losses(examples: Sequence[int]) -> Tensor:
        rows, longest = list(examples), max(lengths[i] for i in examples)
        part = {k: v[rows][:, :longest] if k in by_token else v[rows] for k, v in batch.items()}
        return record_losses(model, part, spec, head)

    return losses
