"""Examples to padded tensors, and the loss of each single record.

No loss here couples two records: each is the mean over that record's own targets. DP training needs that (one record's
gradient must not depend on who else is in the batch), and every trainer uses the same one so that methods compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from dpmed.data.tasks import Example, Targets, TaskSpec, covers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


class Collator:
    """Pads examples to one batch and marks what each token counts in the loss.

    Shapes: b = examples, t = longest example in tokens, l = labels.

    Args:
        tokenizer: gives padding, mask and vocabulary.
        spec: the task.
        never_target: identifiers whose tokens are never the target of a loss (SANI's repair); they stay visible as
            context. None trains on everything.
        forget: identifiers whose tokens are marked, for losses that unlearn them; masked LM then masks words of theirs
            as well as other words. None marks nothing.
        masks: numbers in [0, 1) that choose masked words; the default is torch's global generator, which the run's seed
            sets and a checkpoint restores.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        *,
        never_target: Targets | None = None,
        forget: Targets | None = None,
        masks: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.spec = spec
        self.never_target: Targets | None = never_target
        self.forget: Targets | None = forget
        self.pad_id = pad_token_id(tokenizer)
        self.mask_id = tokenizer.mask_token_id
        self.vocabulary = len(tokenizer)
        self._masks = masks or (lambda n: torch.rand(n).numpy())

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate examples.

        Returns: input_ids, attention_mask [b, t], unit [b]; `targets` (token ids) and `weights` [b, t] for language
        models, where a weight of 0 means "not a target"; `targets` [b] or [b, l] for classification. With `forget`,
        also `forget` [b, t] for language models: the number of a token's identifier in its example, from 1; 0 elsewhere
        and (masked LM) where the token is not to be predicted.
        """
        longest = max(len(e.input_ids) for e in examples)
        input_ids = np.full((len(examples), longest), self.pad_id, dtype=np.int64)
        attention = np.zeros((len(examples), longest), dtype=np.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = example.input_ids
            attention[row, : len(example.input_ids)] = 1
        batch = {"unit": torch.tensor([e.unit for e in examples])}
        if self.spec.kind == "classification":
            batch["targets"] = self._label_targets(examples)
        else:
            batch["targets"] = torch.from_numpy(input_ids.copy())
            weights = np.stack([self._weights(e, longest) for e in examples])
            if self.forget is not None:
                marks = np.stack([self._marks(e, longest, self.forget) for e in examples])
                if self.spec.kind == "masked_lm":
                    for row, example in enumerate(examples):
                        drawn = (marks[row] > 0).astype(np.float32)
                        self._mask(example, input_ids[row], drawn)
                        marks[row][drawn == 0] = 0
                batch["forget"] = torch.from_numpy(marks)
            if self.spec.kind == "masked_lm":
                for row, example in enumerate(examples):
                    self._mask(example, input_ids[row], weights[row])
            batch["weights"] = torch.from_numpy(weights)
        batch["input_ids"] = torch.from_numpy(input_ids)
        batch["attention_mask"] = torch.from_numpy(attention)
        return batch

    def _weights(self, example: Example, longest: int) -> np.ndarray:
        """Loss weight of each token of one example as a target, float32 [t]."""
        weights = np.zeros(longest, dtype=np.float32)
        if self.spec.loss_on == "all":
            weights[example.text_start : example.text_end] = 1.0
        if self.spec.kind == "causal_lm":
            weights[0] = 0.0  # nothing stands before it to predict it from
            tail = self.spec.completion_weight if example.label is not None else 1.0
            weights[example.prompt_end : len(example.input_ids)] = tail
        if self.never_target is not None:
            for span in example.spans:
                if covers(self.never_target, span.source):
                    weights[span.start : span.end] = 0.0
        return weights

    def _marks(self, example: Example, longest: int, which: Targets) -> np.ndarray:
        """Which identifier each token belongs to, int64 [t], from 1."""
        marks = np.zeros(longest, dtype=np.int64)
        for number, span in enumerate((s for s in example.spans if covers(which, s.source)), start=1):
            marks[span.start : span.end] = number
        return marks

    def _mask(self, example: Example, input_ids: np.ndarray, weights: np.ndarray) -> None:
        """Draw whole words as targets, in place: 80 % become the mask token, 10 % a random one, 10 % stay."""
        start = example.text_start
        words = np.asarray(example.words)
        allowed = [w for w in np.unique(words[words >= 0]) if np.all(weights[start + np.flatnonzero(words == w)] > 0)]
        weights[:] = 0.0
        if not allowed:
            return
        drawn = self._masks(len(allowed))
        chosen = [w for w, u in zip(allowed, drawn, strict=True) if u < self.spec.mask_probability]
        chosen = chosen or [allowed[int(np.argmin(drawn))]]
        how = self._masks(len(chosen))
        for word, u in zip(chosen, how, strict=True):
            positions = start + np.flatnonzero(words == word)
            weights[positions] = 1.0
            if u < 0.8:
                input_ids[positions] = self.mask_id
            elif u < 0.9:
                input_ids[positions] = (self._masks(len(positions)) * self.vocabulary).astype(np.int64)

    def _label_targets(self, examples: Sequence[Example]) -> Tensor:
        if not self.spec.multi_label:
            return torch.tensor([e.label for e in examples])
        targets = torch.zeros(len(examples), len(self.spec.labels))
        for row, example in enumerate(examples):
            if isinstance(example.label, tuple):
                targets[row, list(example.label)] = 1.0
        return targets


class SimilarLengths(Sampler[int]):
    """Records in a random order of batches whose records are of similar length: little padding, no curriculum.

    transformers' own length-grouped sampler runs through each group from long to short. Where length tells something
    about the label (short radiology reports are normal ones) the model then forgets one kind while it sees the other.

    Args:
        lengths: tokens of each record.
        batch_size: records per batch.

    Guarantee: each pass yields every record once; the order comes from torch's global generator.
    """

    GROUP = 50
    """Batches per group that is sorted by length; more would save little padding."""

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths)).tolist()
        size = self.GROUP * self.batch_size
        batches: list[list[int]] = []
        rest: list[int] = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=self.lengths.__getitem__)
            whole = len(group) - len(group) % self.batch_size
            batches += [group[i : i + self.batch_size] for i in range(0, whole, self.batch_size)]
            rest += group[whole:]
        for i in torch.randperm(len(batches)).tolist():
            yield from batches[i]
        yield from rest  # fewer than a batch, so it comes last


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token where the model has none; padding is masked, so its value never counts."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
    return int(tokenizer.eos_token_id or 0)  # pyright: ignore[reportArgumentType]


def per_record_loss(logits: Tensor, batch: Batch, spec: TaskSpec) -> Tensor:
    """Loss of each example, a mean over its own targets only.

    Shapes: b = examples, t = tokens, v = vocabulary, l = labels.

    Args:
        logits: [b, t, v] for language models, [b, l] for classification.
        batch: what `Collator` made.
        spec: the task.

    Returns: [b], float32, in nats. An example without any target has loss 0.
    Guarantee: row i depends on row i of logits and batch alone.
    """
    if spec.kind == "classification":
        targets = batch["targets"]
        if spec.multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)
        return F.cross_entropy(logits.float(), targets, reduction="none")
    targets, weights = language_targets(batch, spec)
    return mean_by_record(token_losses(logits, targets, weights > 0), weights)


def language_targets(batch: Batch, spec: TaskSpec) -> tuple[Tensor, Tensor]:
    """What each position of a language model is to predict [b, t], and how much that counts [b, t]."""
    targets, weights = batch["targets"], batch["weights"]
    if spec.kind == "causal_lm":  # the target of a position is the next token; shifting them copies no logits
        return F.pad(targets[:, 1:], (0, 1)), F.pad(weights[:, 1:], (0, 1))
    return targets, weights


def mean_by_record(losses: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each record's token losses, [b, t] to [b]; 0 for a record whose weights are all 0."""
    return (losses * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(torch.finfo(weights.dtype).tiny)


def token_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy [b, t] where `counted`, else 0; in the cheaper of two ways that give the same.

    Picking out the counted logits copies them, which is dearer than a softmax that most positions need anyway.
    """
    flat, where = logits.flatten(0, 1), counted.flatten()
    if int(where.sum()) * 2 >= len(where):
        wanted = targets.flatten().masked_fill(~where, -100)
        return F.cross_entropy(flat.float(), wanted, ignore_index=-100, reduction="none").view_as(targets)
    at = where.nonzero().squeeze(1)
    some = F.cross_entropy(flat.index_select(0, at).float(), targets.flatten()[at], reduction="none")
    return torch.zeros(len(where), device=logits.device).index_put((at,), some).view_as(targets)
