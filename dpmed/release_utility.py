"""What sanitising cost: the checkpoint before and after, on the same held-out records, patient by patient.

Every figure is a loss, so that more is worse: relative in perplexity, a difference in accuracy and F1.

A loss that is the same in every resample of the patients has no bootstrap interval, and is not 0 for all patients
either. F1 then has the worst that patients can hide whose predictions would change (`f1_loss_bound`); accuracy has
Newcombe's interval (`paired_rate_difference`). Perplexity is not bounded, so a single patient shows nothing of it. Two
models with the same weights lose nothing at all, which needs no statistics.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.intervals import Measure, NotApplicable, clopper_pearson, dense_units, percentile_interval
from dpmed.memorization.other_words import span_tokens
from dpmed.memorization.paired import paired_mean_difference, paired_rate_difference
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import TokenScores, record_units
from dpmed.metrics import f1_from_counts, resampled_f1
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
    direct, rare = (
        span_tokens(encoded, lambda s, rare=rare: (s.source == "indirect") == rare) for rare in (False, True)
    )
    units = record_units(encoded)
    losses = {
        "perplexity": _perplexity_loss(scores[0], scores[1], units, settings.bootstrap),
        "other_words": _accuracy_loss(scores[0], scores[1], units, ~direct, settings.bootstrap),
        "rare_words": _accuracy_loss(scores[0], scores[1], units, rare & ~direct, settings.bootstrap),
        "f1": _f1_loss(before, after, tokenizer, spec, heldout, settings),
    }
    if not same_weights(before, after):
        return losses
    return {
        name: replace(loss, value=0.0, low=0.0, high=0.0) if isinstance(loss, Measure) else loss
        for name, loss in losses.items()
    }


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models are one: the same class, configuration, and every parameter and buffer bit for bit."""
    config = [getattr(model, "config", None) for model in (first, second)]
    if type(first) is not type(second) or len({c.to_json_string() if c is not None else "" for c in config}) > 1:
        return False
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def rare_words_tagged(train: Dataset, heldout: Dataset, k: int) -> Dataset:
    """The held-out records with rare words as `indirect` spans: words of fewer than k patients of both sides."""
    columns = ["text", "unit", "identifiers"]
    both = concatenate_datasets([part.select_columns(columns) for part in (train, heldout)])
    tagged = tag_identifiers(both, k=k)
    return tagged.select(range(len(train), len(tagged)), keep_in_memory=True)


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
    said = [
        predictions(prediction_scores(model, heldout, tokenizer, spec, batch_tokens=settings.batch_tokens), spec)
        for model in (before, after)
    ]
    targets, units = label_matrix(heldout, spec.labels), np.asarray(heldout["unit"])
    return f1_loss(targets, said[0], said[1], units, bootstrap=settings.bootstrap)


def f1_loss(
    targets: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    units: np.ndarray,
    *,
    bootstrap: int = 1000,
) -> Measure:
    """Macro F1 of one set of predictions minus that of another.

    Shapes: n = records, l = labels.

    Args:
        targets: bool [n, l].
        before: predictions, bool [n, l].
        after: the others, bool [n, l].
        units: patient of each record [n].
        bootstrap: resamples of patients, the same for both.

    Returns: n counts the records. The interval is the percentile bootstrap over patients; where all resamples agree,
    it is `f1_loss_bound` at the upper 95 % Clopper-Pearson limit of the share of patients one of whose predictions
    changes. Where none of u patients changes that limit is 1 - 0.025^(1/u), about 3.7 / u. The interval never excludes
    what it would hold if no prediction had changed: that the changes of two or three patients cancel is no better
    evidence than that there are none.
    """
    counts = (((targets & said).sum(0), (~targets & said).sum(0), (targets & ~said).sum(0)) for said in (before, after))
    values = [float(f1_from_counts(*of)[F1_AVERAGE]) for of in counts]
    drawn = [  # the same seed draws the same patients for both
        resampled_f1(targets, said, units, n_resamples=bootstrap, seed=SEED)[F1_AVERAGE] for said in (before, after)
    ]
    value = values[0] - values[1]
    low, high = percentile_interval(drawn[0] - drawn[1])
    agree = not low < high  # also NaN: no resample was asked for
    dense, n_units = dense_units(units)
    n_changed = len(np.unique(dense[(before != after).any(axis=1)]))
    share = clopper_pearson(n_changed if agree else 0, n_units)[1]
    most, least = f1_loss_bound(targets, before, units, share), -f1_loss_bound(targets, after, units, share)
    if not agree:
        most, least = max(high, most), min(low, least)
    low, high = max(least, values[0] - 1), min(most, values[0])  # what F1 can reach at all
    return Measure(value, min(low, value), max(high, value), len(targets), "worse")


def f1_loss_bound(targets: np.ndarray, said: np.ndarray, units: np.ndarray, share: float) -> float:
    """The most macro F1 that these predictions could lose if any predictions of a share of the patients changed.

    Those patients hold at most the share of records of the patients with most records. For each label, the worst that
    a share m of the records can do is to turn true positives into false negatives: a true positive that goes takes 2
    from the numerator of F1 = 2 tp / (true + predicted) and 1 from its denominator, a false positive that comes adds 1
    to the denominator, which is less harm, since 2 tp <= true + predicted. So a label falls to at least
    2 (tp - m) / (true + predicted - m), or to 0, and the mean of these falls over labels bounds that of macro F1.

    Args:
        targets: bool [n, l].
        said: predictions, bool [n, l].
        units: patient of each record [n].
        share: of the patients, 0 to 1.

    Guarantee: exact for these records. For all patients it stands on the counts that these records show.
    """
    dense, n_units = dense_units(units)
    sizes = np.sort(np.bincount(dense, minlength=n_units))[::-1]
    whole = int(share * n_units)
    records = sizes[:whole].sum() + (share * n_units - whole) * (sizes[whole] if whole < n_units else 0)
    right, both = (targets & said).sum(0).astype(float), (targets.sum(0) + said.sum(0)).astype(float)
    gone = np.minimum(records, right)
    left = np.divide(2 * (right - gone), both - gone, out=np.zeros_like(right), where=both > gone)
    now = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    return float((now - left).mean())
