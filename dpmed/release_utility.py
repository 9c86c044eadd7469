"""What sanitising cost: the checkpoint before and after, on the same held-out records, patient by patient.

Every figure is a loss, so that more is worse: relative in perplexity, a difference in accuracy and F1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch import nn

from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.memorization.intervals import Measure, NotApplicable, percentile_interval
from dpmed.memorization.paired import paired_mean_difference, paired_rate_difference
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import TokenScores, record_units, text_starts
from dpmed.metrics import f1_values, resampled_f1
from dpmed.utility import label_matrix, prediction_scores, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpmed.recipe import EvaluationSection

SEED = 0
F1_AVERAGE = "macro"
NO_LABELS = "the records have no label column"
Loss = Measure | NotApplicable


def utility_losses(
    before: nn.Module,
    after: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    train: Dataset,
    heldout: Dataset,
    *,
    settings: EvaluationSection,
    rare_k: int,
) -> dict[str, Loss]:
    """What the second model lost against the first, on held-out records.

    Args:
        before: the checkpoint that was sanitised.
        after: the sanitised one, with the same tokenizer.
        tokenizer: of both.
        spec: the task, a language model's.
        train: tells, with `heldout`, which words are rare.
        heldout: records that neither model was trained on.
        settings: `batch_tokens` and `bootstrap`.
        rare_k: a word of fewer patients than this, on both sides together, is rare.

    Returns: `perplexity` (ratio minus 1), `other_words` (accuracy on tokens in no direct identifier), `rare_words`
    (accuracy on tokens of rare words in no direct identifier), `f1` (macro F1 of the labels).
    """
    tagged = rare_words_tagged(train, heldout, rare_k)
    encoded = encode(tagged, tokenizer, replace(spec, labels=(), loss_on="all"))
    unlabelled = replace(spec, labels=(), loss_on="all")
    scores = [
        score_records(model, encoded, unlabelled, tokenizer, batch_tokens=settings.batch_tokens)
        for model in (before, after)
    ]
    direct, rare = span_tokens(encoded, indirect=False), span_tokens(encoded, indirect=True)
    units = record_units(encoded)
    return {
        "perplexity": _perplexity_loss(scores[0], scores[1], units, settings.bootstrap),
        "other_words": _accuracy_loss(scores[0], scores[1], units, ~direct, settings.bootstrap),
        "rare_words": _accuracy_loss(scores[0], scores[1], units, rare & ~direct, settings.bootstrap),
        "f1": _f1_loss(before, after, tokenizer, spec, heldout, settings),
    }


def rare_words_tagged(train: Dataset, heldout: Dataset, k: int) -> Dataset:
    """The held-out records with rare words as `indirect` spans: words of fewer than k patients of both sides."""
    columns = ["text", "unit", "identifiers"]
    both = concatenate_datasets([part.select_columns(columns) for part in (train, heldout)])
    tagged = tag_identifiers(both, k=k)
    return tagged.select(range(len(train), len(tagged)), keep_in_memory=True)


def span_tokens(encoded: EncodedRecords, *, indirect: bool) -> np.ndarray:
    """Which text tokens are in an identifier that is indirect, or that is direct, bool [t]."""
    starts, total = text_starts(encoded)
    found = np.zeros(total, dtype=bool)
    for example, start in zip(encoded, starts, strict=True):
        for span in example.spans:
            if (span.source == "indirect") == indirect:
                found[start + span.start - example.text_start : start + span.end - example.text_start] = True
    return found


def _perplexity_loss(before: TokenScores, after: TokenScores, units: np.ndarray, bootstrap: int) -> Loss:
    tokens = before.per_record(np.ones(len(before.record)))
    with np.errstate(invalid="ignore"):
        first, second = (-scores.per_record(scores.log_prob) / tokens for scores in (after, before))
    found = paired_mean_difference(first, second, units, "worse", weights=tokens, bootstrap=bootstrap, seed=SEED)
    if isinstance(found, NotApplicable):
        return found
    value, low, high = (math.expm1(min(bound, 700.0)) for bound in (found.value, found.low, found.high))
    return replace(found, value=value, low=low, high=high, n=int(tokens.sum()))


def _accuracy_loss(
    before: TokenScores, after: TokenScores, units: np.ndarray, which: np.ndarray, bootstrap: int
) -> Loss:
    which = which & before.scored
    if not which.any():
        return NotApplicable("no held-out token of this kind")
    of_tokens = units[before.record[which]]
    return paired_rate_difference(
        before.is_argmax[which], after.is_argmax[which], of_tokens, "worse", bootstrap=bootstrap, seed=SEED
    )


def _f1_loss(
    before: nn.Module,
    after: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    heldout: Dataset,
    settings: EvaluationSection,
) -> Loss:
    if spec.kind == "masked_lm":
        return NotApplicable("a masked_lm predicts words, not labels")
    if not spec.labels or "label" not in heldout.column_names:
        return NotApplicable(NO_LABELS)
    targets, units = label_matrix(heldout, spec.labels), np.asarray(heldout["unit"])
    found: list[tuple[Mapping[str, float], Mapping[str, np.ndarray]]] = []
    for model in (before, after):  # the same seed draws the same patients for both
        said = predictions(prediction_scores(model, heldout, tokenizer, spec, batch_tokens=settings.batch_tokens), spec)
        resampled = resampled_f1(targets, said, units, n_resamples=settings.bootstrap, seed=SEED)
        found.append((f1_values(targets, said, multi_label=spec.multi_label), resampled))
    value = found[0][0][F1_AVERAGE] - found[1][0][F1_AVERAGE]
    low, high = percentile_interval(found[0][1][F1_AVERAGE] - found[1][1][F1_AVERAGE])
    if not low < high:
        low, high = math.nan, math.nan  # all resamples agree: they say nothing about other patients
    return Measure(value, min(low, value), max(high, value), len(heldout), "worse")
