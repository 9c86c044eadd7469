"""The one forward pass: what a model says about every text token of every record, streamed.

Records go through the model once, long ones first, in batches of about equal size; of each batch only a few numbers
per token are kept (`vocabulary.TokenStatistics`), never logits. All attacks are functions of these. Nothing here holds
text or token ids. With a folder, finished batches are kept in it, so that a killed pass goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpmed.data.batches import pad_token_id, per_record_loss
from dpmed.data.output_layer import input_of, output_layer
from dpmed.data.tasks import EncodedRecords, Example, TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.statistics import ScoreParts, TokenScores, scores_fingerprint, text_starts, weights_fingerprint
from dpmed.memorization.vocabulary import Columns, Sampling, TokenStatistics, measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

MASK_ROUNDS = 7
"""masked_lm: passes over each window; every round masks about one word in seven, close to the usual 15 %."""
PART_SECONDS = 60.0
"""A part is written about so often; a killed pass loses no more than that."""
_LOGITS_KEPT = 2**25
"""Logits of one pass where whole logits must be kept: 128 MiB in float32."""
_LOGITS_AT_ONCE = 2**27
"""Logits of one block on a GPU: 256 MiB in bfloat16; smaller ones cost more in calls."""
_LOGITS_AT_ONCE_CPU = 2**23
"""The same on a CPU: a block of 32 MiB is memory used again, where a larger one is asked of the system each time."""
NOT_FINITE = "the model's output is not finite: its weights hold NaN or infinity; train it again"


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of one window through the model."""

    example: int
    scored: range | np.ndarray
    """Positions in the window whose tokens this pass scores, int32 where it is no range."""


def score_records(
    model: nn.Module,
    encoded: EncodedRecords,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: Sampling | None = None,
    batch_tokens: int = 8192,
    parts: ScoreParts | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> TokenScores:
    """Score every text token of every record with a language model.

    causal_lm: the token at t is predicted from the tokens before it in its window. masked_lm: whole words (an
    identifier counts as one word) are masked in turn, each exactly once, in `MASK_ROUNDS` passes that leave the other
    words visible; the log-probabilities then add up to a pseudo-log-likelihood (Salazar et al. 2020).

    Args:
        model: causal or masked language model, or a PEFT model around one, in any precision; statistics are computed in
            float32. Put in evaluation mode meanwhile.
        encoded: what `encode` made with the same tokenizer and spec.
        sampling: how text would be drawn, for the probability of extraction; the default is `Sampling()`.
        batch_tokens: padded tokens per forward pass; memory only.
        parts: where finished batches are kept until the caller has kept the result; those that are there already are
            not computed again. Their fingerprint must cover the model, the records and the sampling.
        progress: called after each batch.
        device: where the model is, if its parameters do not tell.

    Guarantee: a pass that was killed and restarted with the same arguments gives the same numbers as one that was not.
    Raises: InputError if the model's output is not finite, or masked_lm meets a tokenizer without a mask token.
    """
    if spec.kind == "classification":
        raise ValueError("a classifier gives no token probabilities; use score_classification")
    if spec.kind == "masked_lm" and tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token; choose task: causal_lm, or a masked language model")
    starts, total = text_starts(encoded)
    kept = TokenStatistics.empty(total)
    passes = _causal_passes(encoded) if spec.kind == "causal_lm" else _masked_passes(encoded)
    shift = 1 if spec.kind == "causal_lm" else 0  # logits at t - shift predict the token at t
    mask_id = tokenizer.mask_token_id if spec.kind == "masked_lm" else None
    where = torch.device(device) if device is not None else next(model.parameters()).device
    with evaluating(model):
        states_of = _StatesOf(model, where, causal=spec.kind == "causal_lm")
        budget = states_of.affordable(batch_tokens)
        writer = PartWriter(parts, budget)
        finished = writer.restore(kept)
        done = 0
        for number, chosen in enumerate(length_batches([len(encoded[p.example].input_ids) for p in passes], budget)):
            done += len(chosen)
            if number not in finished:
                batch = [passes[i] for i in chosen]
                examples = [encoded[p.example] for p in batch]
                input_ids, attention = pad(examples, pad_token_id(tokenizer))
                rows = np.repeat(np.arange(len(batch)), [len(p.scored) for p in batch])
                columns = np.concatenate([np.asarray(p.scored, dtype=np.int64) for p in batch])
                targets = input_ids[rows, columns]
                if mask_id is not None:
                    input_ids[rows, columns] = mask_id
                places = on_device(rows * input_ids.shape[1] + columns - shift, where)
                states = states_of(input_ids, attention).flatten(0, 1).index_select(0, places)  # [scored, d]
                first = np.array([starts[p.example] - e.text_start for p, e in zip(batch, examples, strict=True)])
                at = first[rows] + columns
                kept.put(at, _true_token_statistics(states, targets, states_of, sampling or Sampling()))
                if np.isnan(kept.log_prob[at]).any():
                    raise InputError(NOT_FINITE)
                writer.add(number, at, kept)
            if progress is not None:
                progress(done, len(passes))
        writer.write(kept)
    return TokenScores.for_records(encoded, kept)


def kept_scores(
    model: nn.Module,
    encoded: EncodedRecords,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    name: str,
    *,
    sampling: Sampling | None = None,
    batch_tokens: int = 8192,
    weights: str | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> TokenScores:
    """`score_records`, or what an earlier call kept in `folder` of the same weights, token ids, task and sampling.

    Args:
        folder: private; made with mode 0700 and files with 0600. Holds no text. None keeps nothing.
        name: first words of the files' names.
        weights: the model's `weights_fingerprint`, where it was taken already.

    Raises: as `score_records`; InputError if a kept file is damaged.
    """
    score = partial(
        score_records,
        *(model, encoded, spec, tokenizer),
        sampling=sampling,
        batch_tokens=batch_tokens,
        progress=progress,
        device=device,
    )
    if folder is None:
        return score()
    fingerprint = scores_fingerprint(weights or weights_fingerprint(model), encoded, spec, sampling or Sampling())
    path = folder / f"{name}-{fingerprint[:16]}.safetensors"
    parts = ScoreParts(folder, name, fingerprint)
    if path.is_file():
        parts.remove()  # of a pass that was killed between the two last lines below
        return TokenScores.load(path, fingerprint)
    scores = score(parts=parts)
    scores.save(path, fingerprint)
    parts.remove()
    return scores


def score_classification(
    model: nn.Module,
    encoded: EncodedRecords,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and loss of a classifier for every record.

    Args: as in `score_records`.

    Returns: logits [r, l] float32, the mean over a record's windows, and the loss of those logits [r] float32, in nats;
    NaN for a record without a label.
    Raises: InputError if the model's output is not finite.
    """
    logits = torch.zeros(encoded.n_records, len(spec.labels))
    windows = torch.zeros(encoded.n_records)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    done = 0
    with evaluating(model):
        for chosen in length_batches(encoded.lengths, batch_tokens):
            examples = [encoded[i] for i in chosen]
            input_ids, attention = pad(examples, pad_token_id(tokenizer))
            output = model(
                input_ids=torch.from_numpy(input_ids).to(where), attention_mask=torch.from_numpy(attention).to(where)
            )
            records = torch.tensor([e.record for e in examples])
            logits.index_add_(0, records, output.logits.float().cpu())
            windows.index_add_(0, records, torch.ones(len(examples)))
            done += len(chosen)
            if progress is not None:
                progress(done, len(encoded))
    logits /= windows.clamp_min(1)[:, None]
    if not torch.isfinite(logits).all():
        raise InputError(NOT_FINITE)
    return logits.numpy(), _classification_loss(logits, encoded, spec)


def _classification_loss(logits: Tensor, encoded: EncodedRecords, spec: TaskSpec) -> np.ndarray:
    """Loss of each record's mean logits [r]; NaN without a label."""
    labels = {e.record: e.label for e in encoded}
    losses = np.full(len(logits), np.nan, dtype=np.float32)
    known = [r for r in range(len(logits)) if labels.get(r) is not None]
    if not known:
        return losses
    if spec.multi_label:
        targets = torch.zeros(len(known), logits.shape[1])
        for row, record in enumerate(known):
            label = labels[record]
            targets[row, list(label) if isinstance(label, tuple) else [label]] = 1.0
    else:
        targets = torch.tensor([labels[r] for r in known])
    losses[known] = per_record_loss(logits[known], {"targets": targets}, spec).numpy()
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the longest first, cut into batches of at most `batch_tokens` padded tokens (at least one index)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(examples: Sequence[Example], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and attention_mask [b, t], int64, padded on the right."""
    longest = max(len(e.input_ids) for e in examples)
    input_ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    attention = np.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = example.input_ids
        attention[row, : len(example.input_ids)] = 1
    return input_ids, attention


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device; a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # a copy of pageable memory would wait for all work before it
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _causal_passes(encoded: EncodedRecords) -> list[_Pass]:
    """One pass a window; a token with nothing before it is not scored."""
    passes = [_Pass(i, range(max(1, e.text_start), e.text_end)) for i, e in enumerate(encoded)]
    return [p for p in passes if len(p.scored)]


def _masked_passes(encoded: EncodedRecords) -> list[_Pass]:
    """Up to `MASK_ROUNDS` passes a window, which together mask every text token once."""
    passes: list[_Pass] = []
    for i, example in enumerate(encoded):
        rounds = mask_groups(example) % MASK_ROUNDS
        at = (example.text_start + np.arange(len(rounds))).astype(np.int32)
        passes += [_Pass(i, at[rounds == r]) for r in np.unique(rounds)]
    return passes


def mask_groups(example: Example) -> np.ndarray:
    """Number of the group in which each text token is masked, [t]: a word, or all words that one identifier touches.

    Groups are numbered 0, 1, ... in reading order, so that neighbours are masked in different rounds.
    """
    words = np.asarray(example.words, dtype=np.int64)
    if len(words) == 0:
        return words
    new = np.concatenate([[True], (words[1:] != words[:-1]) | (words[1:] < 0)])
    group = np.cumsum(new) - 1
    for span in sorted(example.spans, key=lambda s: s.start):
        touched = np.unique(group[span.start - example.text_start : span.end - example.text_start])
        group[np.isin(group, touched)] = touched[0]
    return np.unique(group, return_inverse=True)[1]


class PartWriter:
    """Collects finished batches and writes a part every `PART_SECONDS`; without parts it does nothing.

    Args:
        parts: where.
        budget: padded tokens per batch, which a batch's number depends on.
    """

    def __init__(self, parts: ScoreParts | None, budget: int) -> None:
        self.parts = parts and replace(parts, batch_tokens=budget)
        self.batches: list[int] = []
        self.at: list[np.ndarray] = []
        self.since = time.monotonic()

    def restore(self, kept: Columns) -> set[int]:
        """Numbers of the batches that are done already; their entries are filled in."""
        return set() if self.parts is None else self.parts.restore(kept)

    def add(self, number: int, at: np.ndarray, kept: Columns) -> None:
        if self.parts is None:
            return
        self.batches.append(number)
        self.at.append(at)
        if time.monotonic() - self.since >= PART_SECONDS:
            self.write(kept)

    def write(self, kept: Columns) -> None:
        """Write what was collected."""
        if self.parts is not None and self.batches:
            at = np.concatenate(self.at)
            self.parts.save(self.batches, at, kept.take(at))
        self.batches, self.at, self.since = [], [], time.monotonic()


class _StatesOf:
    """Runs a language model up to its output layer, so that the vocabulary is paid for only where a token is scored.

    Where the model changes its logits after the output layer (scaling, capping), or has no such layer, the states are
    the finished logits and `head` is None: correct, at a higher price.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, causal: bool) -> None:
        self.model = model
        self.device = device
        self.options = {"use_cache": False} if causal else {}
        self.head = output_layer(model, device, **self.options)
        self.vocabulary = self._vocabulary()

    def __call__(self, input_ids: np.ndarray, attention: np.ndarray) -> Tensor:
        """Input of the output layer [b, t, d], or logits [b, t, v] without one."""
        inputs = self._inputs(input_ids, attention)
        return self.model(**inputs).logits if self.head is None else input_of(self.head, self.model, inputs)

    def affordable(self, batch_tokens: int) -> int:
        """Fewer tokens per pass where whole logits must be kept."""
        return batch_tokens if self.head is not None else min(batch_tokens, max(1, _LOGITS_KEPT // self.vocabulary))

    def _vocabulary(self) -> int:
        weight = getattr(self.head, "weight", None)
        if isinstance(weight, Tensor):
            return len(weight)
        two = self._inputs(np.zeros((1, 2), dtype=np.int64), np.ones((1, 2), dtype=np.int64))
        return int(self.model(**two).logits.shape[-1])

    def _inputs(self, input_ids: np.ndarray, attention: np.ndarray) -> dict[str, Any]:
        arrays = {"input_ids": input_ids, "attention_mask": attention}
        return {**{name: on_device(array, self.device) for name, array in arrays.items()}, **self.options}


def _true_token_statistics(
    states: Tensor, targets: np.ndarray, states_of: _StatesOf, sampling: Sampling
) -> TokenStatistics:
    """Statistics of the true tokens [m], of one block of logits at a time; a GPU is waited for once, at the end."""
    at_once = _LOGITS_AT_ONCE if states.device.type != "cpu" else _LOGITS_AT_ONCE_CPU
    rows = max(1, at_once // states_of.vocabulary)
    true = on_device(targets, states.device)
    found = []
    for start in range(0, len(targets), rows):
        cut = slice(start, start + rows)
        logits = states[cut] if states_of.head is None else states_of.head(states[cut])  # [block, v]
        found.append(measured(logits, true[cut], sampling))
    return TokenStatistics.of(torch.cat(found, dim=1))
