"""How useful a model is: F1, accuracy and AUROC on held-out patients, from a head or from prompted labels.

A causal LM is asked like in training: text, prompt, and then which label's tokens it finds most likely.

Shapes: n = records, l = labels, b = sequences of a batch, k = columns of the batch that are needed, v = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dpmed.data.batches import pad_token_id
from dpmed.data.tasks import EncodedRecords, TaskSpec, encode, label_option_ids
from dpmed.errors import InputError
from dpmed.memorization.intervals import Measure, percentile_interval, rate_by_unit, wilson
from dpmed.memorization.scoring import (
    NOT_FINITE,
    PartWriter,
    Progress,
    evaluating,
    length_batches,
    score_classification,
)
from dpmed.memorization.statistics import ScoreParts, scores_fingerprint, weights_fingerprint
from dpmed.memorization.vocabulary import Columns, Sampling
from dpmed.metrics import AVERAGES, f1_from_counts, f1_values, resampled_auroc_macro, resampled_f1

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dpmed.recipe import EvaluationSection

KEYS = ("f1_weighted", "f1_macro", "f1_micro", "accuracy", "auroc_macro", "majority")
_CANDIDATES = np.arange(1, 100) / 100  # thresholds that `fit_thresholds` tries


@dataclass(frozen=True)
class _Pass:
    """What one forward pass over a prompt and the beginning of a label tells about which labels."""

    start: tuple[int, ...]
    """Label tokens appended to the prompt."""
    offsets: tuple[int, ...]
    """Positions whose next token is read; 0 is the last token of the prompt."""
    reads: tuple[tuple[int, int, int], ...]
    """(index into offsets, token, label)."""


@dataclass(frozen=True, slots=True)
class _Reads(Columns):
    """What all passes over all records read."""

    log_prob: np.ndarray
    """Of each read token, in nats, float64; NaN before its pass."""


def label_scores(
    model: nn.Module,
    encoded: EncodedRecords,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    batch_tokens: int,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Log-probability of each label after text and prompt, for a causal LM.

    A label's score is the sum over its tokens, averaged over the windows of the record. Labels share forward passes: if
    every label is one token, one pass over the prompt alone scores all of them.

    Args:
        model: a causal LM; put in evaluation mode meanwhile.
        encoded: windows from `encode` with the same tokenizer and task; their own labels are not looked at.
        tokenizer: of the model.
        spec: task causal_lm with labels.
        batch_tokens: padded tokens per forward pass, at least one sequence.
        folder: private folder for finished batches, which a pass that was killed goes on from; None keeps nothing.
        weights: the model's `weights_fingerprint`, where it was taken already.
        progress: called with (sequences done, all sequences).

    Returns: [n, l], float64, in nats, in the order of `spec.labels`.
    Raises: InputError if two labels cannot be told apart, or the model's output is not finite.
    """
    prompt = tokenizer(spec.prompt, add_special_tokens=False)["input_ids"]
    passes = _passes(_scored_options(tokenizer, spec))
    items = [(e.record, e.input_ids[: e.text_end] + prompt, p) for e in encoded for p in passes]
    lengths = [len(prompted) + len(p.start) for _, prompted, p in items]
    edges = np.cumsum([0, *(len(p.reads) for _, _, p in items)])
    kept = _Reads(np.full(edges[-1], np.nan))
    parts = None
    if folder is not None:
        weights = weights or weights_fingerprint(model)
        parts = ScoreParts(folder, "labels", scores_fingerprint(weights, encoded, spec, Sampling()))
    writer = PartWriter(parts, batch_tokens)
    finished = writer.restore(kept)
    device = next(model.parameters()).device
    done = 0
    with evaluating(model):
        for number, batch in enumerate(length_batches(lengths, batch_tokens)):
            if number not in finished:
                chosen = [items[i][1:] for i in batch]
                read = np.concatenate(_next_token_log_probs(model, chosen, pad_token_id(tokenizer), device))
                if not np.isfinite(read).all():
                    raise InputError(NOT_FINITE)
                at = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in batch])
                kept.put(at, _Reads(read))
                writer.add(number, at, kept)
            done += len(batch)
            if progress is not None:
                progress(done, len(items))
        writer.write(kept)
    scores = np.zeros((encoded.n_records, len(spec.labels)))
    for (record, _, p), read in zip(items, np.split(kept.log_prob, edges[1:-1]), strict=True):
        np.add.at(scores[record], [label for _, _, label in p.reads], read)
    windows = np.bincount([e.record for e in encoded], minlength=encoded.n_records)
    return scores / windows[:, None]


def _scored_options(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec) -> list[tuple[int, ...]]:
    """Tokens of each label; with the end token, as in training, where one label is the beginning of another.

    Without it the shorter of two such labels would score higher on every text.
    """
    options = [tuple(ids) for ids in label_option_ids(tokenizer, spec)]
    if not any(a != b and b[: len(a)] == a for a in options for b in options):
        return options
    if tokenizer.eos_token_id is None:
        raise InputError("one label is the beginning of another and the tokenizer has no end token; rename one label")
    return [(*option, int(tokenizer.eos_token_id)) for option in options]  # pyright: ignore[reportArgumentType]


def _passes(options: Sequence[tuple[int, ...]]) -> list[_Pass]:
    """The fewest forward passes that show every token of every label, each read once.

    A pass over prompt + s shows the next token after each beginning of s. So only the labels without their last token
    are needed, and of those only the ones that are not the beginning of another.
    """
    shortened = sorted({option[:-1] for option in options}, key=len, reverse=True)
    starts: list[tuple[int, ...]] = []
    for start in shortened:
        if not any(longer[: len(start)] == start for longer in starts):
            starts.append(start)
    reads: list[list[tuple[int, int, int]]] = [[] for _ in starts]
    for label, option in enumerate(options):
        for position, token in enumerate(option):
            shown = next(i for i, start in enumerate(starts) if start[:position] == option[:position])
            reads[shown].append((position, token, label))
    passes: list[_Pass] = []
    for start, read in zip(starts, reads, strict=True):
        offsets = tuple(sorted({position for position, _, _ in read}))
        passes.append(_Pass(start, offsets, tuple((offsets.index(p), token, label) for p, token, label in read)))
    return passes


def _next_token_log_probs(
    model: nn.Module, sequences: Sequence[tuple[list[int], _Pass]], pad_id: int, device: torch.device
) -> list[np.ndarray]:
    """For each (prompt, pass) the log-probabilities of its `reads`, float64; softmax at needed positions only."""
    full = [[*prompt, *p.start] for prompt, p in sequences]
    input_ids = torch.full((len(full), max(map(len, full))), pad_id)
    attention = torch.zeros_like(input_ids)
    for row, ids in enumerate(full):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
    places = [(row, len(prompt) - 1 + o) for row, (prompt, p) in enumerate(sequences) for o in p.offsets]
    rows, positions = torch.tensor(places).T
    columns, kept = positions.unique(return_inverse=True)  # `kept`: where each position stands among the columns
    logits = _logits_at(model, input_ids.to(device), attention.to(device), columns.to(device))  # [b, k, v]
    log_probs = logits[rows.to(device), kept.to(device)].float().log_softmax(-1)  # [positions, v]
    first, where, tokens = 0, [], []
    for _, p in sequences:
        where += [first + offset for offset, _, _ in p.reads]
        tokens += [token for _, token, _ in p.reads]
        first += len(p.offsets)
    values = log_probs[torch.tensor(where, device=device), torch.tensor(tokens, device=device)].double().cpu().numpy()
    return np.split(values, np.cumsum([len(p.reads) for _, p in sequences])[:-1])


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, columns: Tensor) -> Tensor:
    """Logits [b, k, v] at some columns; models that can do so compute no others (v is often 50 000 and more)."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:  # pyright: ignore[reportAttributeAccessIssue]
        return model(**inputs, logits_to_keep=columns).logits
    return model(**inputs).logits[:, columns]


def prediction_scores(
    model: nn.Module,
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    batch_tokens: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Score of each label for each record, [n, l]: logits of a head, or log-probabilities of prompted labels.

    Args: as in `label_scores`; a head's pass is short and keeps nothing in the folder.
    Raises: InputError if a record has a label that is not in `spec.labels`, or the task scores no labels.
    """
    if spec.kind == "masked_lm" or not spec.labels:
        raise InputError(f"task {spec.kind} has no labels to predict; name the label column with data.label")
    encoded = encode(records, tokenizer, spec)
    if spec.kind == "causal_lm":
        return label_scores(
            model, encoded, tokenizer, spec, batch_tokens=batch_tokens, folder=folder, progress=progress
        )
    logits, _ = score_classification(model, encoded, spec, tokenizer, batch_tokens=batch_tokens, progress=progress)
    return np.asarray(logits, dtype=np.float64)


def label_matrix(records: Dataset, labels: Sequence[str]) -> np.ndarray:
    """Which labels each record has, bool [n, l].

    Raises: InputError if a record has a label that is not among `labels`.
    """
    index = {name: i for i, name in enumerate(labels)}
    matrix = np.zeros((len(records), len(labels)), dtype=bool)
    for row, label in enumerate(records["label"]):
        for name in [label] if isinstance(label, str) else label:
            if name not in index:
                raise InputError(f"record {row}: its label is none of the {len(labels)} labels of the training records")
            matrix[row, index[name]] = True
    return matrix


def predictions(scores: np.ndarray, spec: TaskSpec) -> np.ndarray:
    """What the model says: the best label, or every label whose probability reaches its threshold (0.5 by default).

    Args:
        scores: [n, l] from `prediction_scores`.
        spec: the task.

    Returns: bool [n, l]; exactly one True per row unless the task is multi-label.
    """
    if spec.multi_label:
        return expit(scores) >= np.asarray(spec.thresholds or [0.5] * len(spec.labels))
    return np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]


def fit_thresholds(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> tuple[float, ...]:
    """Decision threshold of each label that gives the highest F1 on these records.

    Fit them on validation records, before the test set is seen.

    Args:
        logits: [n, l] of a multi-label head.
        targets: bool [n, l].
        labels: the l label names.

    Returns: one of 0.01, 0.02 ... 0.99 per label. Of equally good ones the nearest to 0.5 (of two, the lower); 0.5 for
    a label that no record has.
    Raises: ValueError if the shapes differ.
    """
    if logits.shape != targets.shape or logits.shape[1] != len(labels):
        raise ValueError(f"logits {logits.shape}, targets {targets.shape} and {len(labels)} labels do not fit together")
    targets = targets.astype(bool)
    probabilities = expit(logits)
    nearest_first = sorted(_CANDIDATES.tolist(), key=lambda t: (round(abs(t - 0.5), 9), t))
    table = np.empty((len(nearest_first), len(labels)))  # [candidates, l]
    for row, threshold in enumerate(nearest_first):
        said = probabilities >= threshold
        wrong = (said != targets).sum(0)
        right = (said & targets).sum(0)
        table[row] = 2 * right / np.maximum(1, 2 * right + wrong)
    return tuple(nearest_first[i] for i in table.argmax(0))  # the first of equals; all are 0 without a positive


def validation_thresholds(
    model: nn.Module,
    validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    batch_tokens: int,
) -> tuple[float, ...] | None:
    """`fit_thresholds` on validation records; None for tasks that decide without thresholds."""
    if spec.kind != "classification" or not spec.multi_label or "label" not in validation.column_names:
        return None
    logits = prediction_scores(model, validation, tokenizer, spec, batch_tokens=batch_tokens)
    return fit_thresholds(logits, label_matrix(validation, spec.labels), spec.labels)


def majority_baseline(train: Dataset, heldout: Dataset, spec: TaskSpec) -> dict[str, float]:
    """What a model would score that never reads the text: values of F1 and accuracy on the held-out records.

    It says the most frequent label of the training records (of equals, the first of `spec.labels`); for several labels
    per record, those that more than half of the training records have.
    """
    share = label_matrix(train, spec.labels).mean(0)
    said = share > 0.5 if spec.multi_label else np.arange(len(share)) == share.argmax()
    targets = label_matrix(heldout, spec.labels)
    predicted = np.broadcast_to(said, targets.shape)
    values = f1_from_counts(*_counts(targets, predicted))
    figures = {f"f1_{average}": float(values[average]) for average in AVERAGES}
    return {**figures, "accuracy": float((targets == predicted).all(1).mean())}


def utility(
    model: nn.Module,
    heldout_records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    *,
    settings: EvaluationSection,
    train_records: Dataset | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure what the model is good for, on patients it has not seen.

    F1 and AUROC count all of `spec.labels`, as scikit-learn does with `labels=` and `zero_division=0`; AUROC leaves out
    labels that the held-out records show with one class only, and says how many (`labels_left_out`).

    Args:
        model: a causal LM or a classification head.
        heldout_records: columns text, unit, label.
        tokenizer: of the model.
        spec: the task; thresholds already fixed on other records.
        settings: `batch_tokens` and `bootstrap`.
        train_records: gives the majority baseline.
        seed: of the bootstrap.
        folder: where a killed pass goes on from; see `label_scores`.
        progress: called with (sequences done, all sequences).

    Returns: `KEYS` as JSON-ready figures with 95 % intervals from resampled patients (`majority`: plain values), null
    where something does not apply, and key -> reason for those.
    Raises: InputError if a record has a label that is not in `spec.labels`.
    """
    reason = _no_utility(heldout_records, spec)
    if reason is not None:
        return dict.fromkeys(KEYS), dict.fromkeys(KEYS, reason)
    targets = label_matrix(heldout_records, spec.labels)
    scores = prediction_scores(
        *(model, heldout_records, tokenizer, spec),
        batch_tokens=settings.batch_tokens,
        folder=folder,
        progress=progress,
    )
    units = np.asarray(heldout_records["unit"])
    figures, reasons = score_figures(scores, targets, units, spec, n_resamples=settings.bootstrap, seed=seed)
    if train_records is None or "label" not in train_records.column_names or len(train_records) == 0:
        return {**figures, "majority": None}, {**reasons, "majority": "no labelled training records were given"}
    return {**figures, "majority": majority_baseline(train_records, heldout_records, spec)}, reasons


def score_figures(
    scores: np.ndarray, targets: np.ndarray, units: np.ndarray, spec: TaskSpec, *, n_resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of `utility` from scores [n, l], bool targets [n, l] and the unit of each record [n]; n >= 1."""
    predicted = predictions(scores, spec)
    values = f1_values(targets, predicted, multi_label=spec.multi_label)
    resampled = resampled_f1(targets, predicted, units, n_resamples=n_resamples, seed=seed)
    figures: dict[str, Any] = {
        f"f1_{average}": _measure(values[average], resampled[average], units).to_json() for average in AVERAGES
    }
    exact = (targets == predicted).all(axis=1)
    figures["accuracy"] = rate_by_unit(exact, units, "better", n_resamples, seed).to_json()
    both = targets.any(0) & ~targets.all(0)
    if not both.any():
        return {**figures, "auroc_macro": None}, {
            "auroc_macro": "the held-out records show no label with both classes, true and false"
        }
    ranks = scores if spec.multi_label else softmax(scores, axis=1)  # one label: its probability against the others'
    ranks, classes = ranks[:, both], targets[:, both]
    area = float(np.mean([roc_auc_score(classes[:, i], ranks[:, i]) for i in range(classes.shape[1])]))
    areas = resampled_auroc_macro(ranks, classes, units, n_resamples=n_resamples, seed=seed)
    extra = {"labels_scored": int(both.sum()), "labels_left_out": int((~both).sum())}
    figures["auroc_macro"] = _measure(area, areas, units, extra).to_json()
    return figures, {}


def _no_utility(records: Dataset, spec: TaskSpec) -> str | None:
    """Why nothing can be measured, or None."""
    if spec.kind == "masked_lm":
        return "a masked_lm predicts words, not labels"
    if not spec.labels or "label" not in records.column_names:
        return "the records have no label column"
    return "there are no held-out records" if len(records) == 0 else None


def _counts(targets: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, false positives and false negatives per label, [l] each."""
    return (targets & predicted).sum(0), (~targets & predicted).sum(0), (targets & ~predicted).sum(0)


def _measure(value: float, resampled: np.ndarray, units: np.ndarray, extra: dict[str, Any] | None = None) -> Measure:
    """A figure with its percentile interval, stretched to the value where resampling shifts the figure past it.

    Where all resamples agree (a perfect score, a single patient) they say nothing about other patients; the interval
    is then that of a rate over as many cases as there are patients.
    """
    low, high = percentile_interval(resampled)
    if not low < high:
        n_units = len(np.unique(units))
        low, high = wilson(value * n_units, n_units)
    return Measure(value, min(low, value), max(high, value), len(units), "better", extra or {})
