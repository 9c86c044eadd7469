"""Membership inference: scores that should be higher for records the model was trained on, and how well they separate.

All scores are functions of per-token statistics. Intervals draw patients, members and non-members each on their own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from dpmed.memorization.intervals import (
    Measure,
    dense_units,
    percentile_interval,
    unit_multiplicities,
    wilson,
)
from dpmed.memorization.statistics import TokenScores, in_blocks

ROC_POINTS = 60
"""At most so many points of a curve go into the JSON."""
SMALLEST_DEVIATION = 1e-4
"""Of a vocabulary's log-probabilities, in nats: what float32 sums can tell from none."""
_WEIGHTS_AT_ONCE = 2**18  # cells of a block of resamples; about ten arrays have them


@dataclass(frozen=True)
class Sides:
    """A score of members and of non-members, higher meaning "more likely a member", and their units. No NaN."""

    members: np.ndarray
    """[m]"""
    others: np.ndarray
    """[n]"""
    member_units: np.ndarray
    """[m]"""
    other_units: np.ndarray
    """[n]"""


def matched_records(
    members: Sequence[np.ndarray], others: Sequence[np.ndarray], *, bins: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Which members and which non-members to compare, so that length or date does not tell the two sides apart.

    Both sides are cut at the same quantiles of each property of all records together; in each piece (of several
    properties: in each combination of pieces) the side with more records gives away as many, chosen at random.

    Args:
        members: properties of the members, for example their lengths, each [m].
        others: the same properties of the non-members, each [n].
        bins: pieces of each property, at most.
        seed: of the choice.

    Returns: bool [m] and bool [n], with equally many True in each piece.
    """
    pieces = [np.zeros(len(side[0]), dtype=np.int64) for side in (members, others)]
    for both in zip(members, others, strict=True):
        edges = np.unique(np.quantile(np.concatenate(both), np.linspace(0, 1, bins + 1)[1:-1]))
        for at, values in enumerate(both):
            pieces[at] = pieces[at] * (len(edges) + 1) + np.searchsorted(edges, values, side="right")
    rng = np.random.default_rng(seed)
    kept = [np.zeros(len(piece), dtype=bool) for piece in pieces]
    for piece in np.intersect1d(pieces[0], pieces[1]):
        rows = [np.flatnonzero(of == piece) for of in pieces]
        n = min(map(len, rows))
        for keep, own in zip(kept, rows, strict=True):
            keep[rng.permutation(own)[:n]] = True
    return kept[0], kept[1]


def loss_score(scores: TokenScores) -> np.ndarray:
    """Mean log-probability of each record's text tokens [r]; NaN for a record without a scored token.

    Reference: Yeom et al. 2018 (LOSS).
    """
    with np.errstate(invalid="ignore"):
        return scores.per_record(scores.log_prob) / scores.n_scored


def reference_score(scores: TokenScores, base: TokenScores) -> np.ndarray:
    """How much more likely the record became by fine-tuning: l_R - l_M per token [r].

    Raises: ValueError if the two do not score the same tokens.
    Reference: Carlini et al. 2021; a difference of mean log-likelihoods, the logarithm of a likelihood ratio per token.
    """
    _check_same_records(scores, base)
    return loss_score(scores) - loss_score(base)


def _check_same_records(scores: TokenScores, base: TokenScores) -> None:
    if not np.array_equal(scores.offsets, base.offsets):
        raise ValueError("the scores are of different records")


def min_k_score(scores: TokenScores, share: float) -> np.ndarray:
    """Mean of the lowest log-probabilities of each record, `share` of its tokens, at least one [r].

    Raises: ValueError if share is not in (0, 1].
    Reference: Shi et al. 2024 (Min-K%).
    """
    return in_blocks(lambda part: _mean_of_lowest(part, part.log_prob, share), scores)


def min_k_plus_plus_score(scores: TokenScores, share: float) -> np.ndarray:
    """Mean of the lowest `share` of (log p - mu) / sigma of each record, at least one [r].

    mu and sigma are mean and standard deviation of the vocabulary's log-probabilities under the model's own
    distribution at that position: a token counts as unlikely where the model had a better idea.

    Edge cases: where sigma is below `SMALLEST_DEVIATION` (a model that is certain), that value stands for it.
    Raises: ValueError if share is not in (0, 1], or the scores hold no mean and deviation.
    Reference: Zhang et al. 2024 (Min-K%++, arXiv 2404.02936).
    """

    def of(part: TokenScores) -> np.ndarray:
        deviation = np.maximum(part.detail("deviation").astype(np.float64), SMALLEST_DEVIATION)
        return _mean_of_lowest(part, (part.log_prob - part.detail("mean").astype(np.float64)) / deviation, share)

    return in_blocks(of, scores)


def _mean_of_lowest(scores: TokenScores, values: np.ndarray, share: float) -> np.ndarray:
    """Mean of the lowest `share` of each record's scored values, at least one [r]; NaN without a scored token."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; choose a number in (0, 1]")
    keep = scores.scored
    record, value = scores.record[keep], values[keep].astype(np.float64)
    order = np.lexsort((value, record))
    record, value = record[order], value[order]
    sizes = np.bincount(record, minlength=scores.n_records)
    rank = np.arange(len(record)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    taken = rank < np.maximum(1, np.floor(share * sizes + 1e-9))[record]
    with np.errstate(invalid="ignore"):
        return np.bincount(record, np.where(taken, value, 0), scores.n_records) / np.bincount(
            record, taken, scores.n_records
        )


def ez_score(scores: TokenScores, base: TokenScores) -> np.ndarray:
    """How one-sidedly fine-tuning moved the tokens that the model still gets wrong [r].

    Over the positions where the model's first choice is wrong, P sums the positive log p_M - log p_R and N the sizes of
    the negative ones. The score is P / (P + N), which orders records as P / N does and stays finite.

    Edge cases: a record with fewer than two wrong positions scores 2, above all others: the model knows it by heart.
    Where nothing moved (P = N = 0) it is 0.5. NaN for a record with fewer than two scored tokens, which says nothing.
    Raises: ValueError if the two do not score the same tokens.
    Reference: Ilic et al. 2026 (error-zone score, arXiv 2601.12104).
    """
    _check_same_records(scores, base)
    return in_blocks(_ez_score, scores, base)


def _ez_score(scores: TokenScores, base: TokenScores) -> np.ndarray:
    wrong = scores.scored & ~scores.is_argmax
    moved = np.where(wrong, scores.log_prob.astype(np.float64) - base.log_prob.astype(np.float64), 0.0)
    up, down = (scores.per_record(np.maximum(sign * moved, 0.0)) for sign in (1, -1))
    with np.errstate(invalid="ignore"):
        score = np.where(up + down > 0, up / (up + down), 0.5)
    score = np.where(scores.per_record(wrong) < 2, 2.0, score)
    return np.where(scores.n_scored < 2, np.nan, score)


def margin_score(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By how much a classifier's logits prefer the truth [r]; NaN for a record without a label.

    Shapes: r = records, l = labels.

    Args:
        logits: [r, l].
        labels: class of each record, int [r], -1 for none: the true logit minus the largest other one. Or 0 and 1 for
            each label, float [r, l], NaN for none: the mean over labels of the logit, sign turned where the label is 0.

    Reference: the hinge confidence of Carlini et al. 2022 (arXiv 2112.03570), after the confidence attack of Yeom et
    al. 2018 and Song and Mittal 2021.
    """
    logits = logits.astype(np.float64)
    if labels.ndim == 2:
        return np.mean(np.where(labels > 0.5, logits, -logits) + 0 * labels, axis=1)
    rows = np.arange(len(logits))
    true = logits[rows, labels]
    others = logits.copy()
    others[rows, labels] = -np.inf
    return np.where(labels < 0, np.nan, true - others.max(axis=1))


def modified_entropy_score(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the modified entropy of a classifier's answer [r]: 0 when it is certain of the truth, falling without end.

    Mentr = -(1 - p_y) log p_y - sum over the other classes i of p_i log(1 - p_i). With several labels each is a
    question of two classes, and the mean is taken.

    Args: as in `margin_score`.
    Reference: Song and Mittal 2021 (arXiv 2003.10595).
    """
    logits = logits.astype(np.float64)
    if labels.ndim == 2:  # -(1 - q) log q twice, q = sigmoid(signed logit)
        signed = np.where(labels > 0.5, logits, -logits) + 0 * labels
        loss = np.maximum(-signed, 0) + np.log1p(np.exp(-np.abs(signed)))  # -log q, without a warning about NaN
        return np.mean(-2 * expit(-signed) * loss, axis=1)
    total = np.logaddexp.reduce(logits, axis=1)[:, None]
    log_p = logits - total
    p = np.exp(log_p)
    rows = np.arange(len(logits))
    top = logits.argmax(axis=1)
    others = logits.copy()
    others[rows, top] = -np.inf
    with np.errstate(divide="ignore"):
        log_rest = np.log1p(-p)  # log(1 - p_i), [r, l]; exact where p_i is at most a half
    log_rest[rows, top] = np.logaddexp.reduce(others, axis=1) - total[:, 0]  # for the largest, which may be almost 1
    entropy = -p * log_rest
    entropy[rows, labels] = -np.exp(log_rest[rows, labels]) * log_p[rows, labels]
    return np.where(labels < 0, np.nan, -entropy.sum(axis=1))


def zlib_lengths(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each text after compression [r]."""
    return np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.int64)


def zlib_score(scores: TokenScores, compressed_bytes: np.ndarray) -> np.ndarray:
    """Log-likelihood of each record per compressed byte [r]: a text that is simply repetitive is not held for a member.

    Reference: Carlini et al. 2021 (zlib entropy), sign turned so that higher means member.
    """
    score = scores.per_record(scores.log_prob) / compressed_bytes
    return np.where(scores.n_scored > 0, score, np.nan)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a member scores above a non-member, ties counting half."""
    ranks = rankdata(np.concatenate([members, others]))
    m, n = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rate at every threshold "score >= s", from (0, 0) to (1, 1); ties move together."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    fpr = 1 - np.searchsorted(np.sort(others), thresholds, side="left") / len(others)
    tpr = 1 - np.searchsorted(np.sort(members), thresholds, side="left") / len(members)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float) -> float:
    """The largest true-positive rate of a threshold whose false-positive rate is at most `fpr`."""
    allowed = math.floor(fpr * len(others) + 1e-9)
    if allowed >= len(others):
        return 1.0
    threshold = np.sort(others)[::-1][allowed]  # this non-member, and what ties with it, must stay out
    return float(np.mean(members > threshold))


def bootstrap_attack(
    sides: Sides, fprs: Sequence[float], n_resamples: int, seed: int
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """Percentile intervals of the AUC and of the TPR at each FPR, drawing whole units of both sides; vectorised.

    Shapes: b = resamples in a block, m = members, n = non-members.
    """
    unit_m, n_unit_m = dense_units(sides.member_units)
    unit_n, n_unit_n = dense_units(sides.other_units)
    order_m, order_n = np.argsort(-sides.members, kind="stable"), np.argsort(-sides.others, kind="stable")
    members, others, unit_m, unit_n = sides.members[order_m], sides.others[order_n], unit_m[order_m], unit_n[order_n]
    beaten_by = np.searchsorted(-members, -others, side="left")  # members above each non-member [n]
    not_below = np.searchsorted(-members, -others, side="right")  # members above or equal
    areas: list[np.ndarray] = []
    rates: list[list[np.ndarray]] = [[] for _ in fprs]
    # Blocks are cut by the larger side, so that a block of weights stays small; equal cuts keep the two in step.
    rows = max(1, _WEIGHTS_AT_ONCE // max(len(members), len(others), 1))
    draws = (unit_multiplicities(n, n_resamples, s, rows) for n, s in ((n_unit_m, seed), (n_unit_n, seed + 1)))
    for drawn_m, drawn_n in zip(*draws, strict=True):
        b = len(drawn_m)
        weight_n = drawn_n[:, unit_n]  # [b, n]
        above = np.concatenate([np.zeros((b, 1)), np.cumsum(drawn_m[:, unit_m], axis=1)], axis=1)  # [b, m + 1]
        total_m, passed = above[:, -1], np.cumsum(weight_n, axis=1)
        total_n = passed[:, -1]
        areas.append(((above[:, beaten_by] + above[:, not_below]) * weight_n).sum(axis=1) / (2 * total_m * total_n))
        for found, fpr in zip(rates, fprs, strict=True):
            over = passed > np.floor(fpr * total_n + 1e-9)[:, None]
            first = over.argmax(axis=1)  # the best non-member that must stay out
            rate = above[np.arange(b), beaten_by[first]] / total_m
            found.append(np.where(over.any(axis=1), rate, 1.0))
    if not areas:
        return (math.nan, math.nan), [(math.nan, math.nan)] * len(fprs)
    return percentile_interval(np.concatenate(areas)), [percentile_interval(np.concatenate(r)) for r in rates]


def attack_figures(sides: Sides, fprs: Sequence[float], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, object]:
    """AUC, TPR at each FPR and a thinned ROC of one attack.

    Returns: {"auc": Measure, "tpr_at_fpr_0.01": Measure, ..., "roc": {"fpr": [...], "tpr": [...]}}. n counts records of
    both sides. A `resolution` beside a TPR says that one non-member is more than the FPR asked for, so that the value
    is the TPR above all non-members. Where all resamples agree, the interval is Wilson's with as many cases as the
    smaller side (AUC) or the members (TPR) have units.
    """
    area, rates = bootstrap_attack(sides, fprs, bootstrap, seed)
    n = len(sides.members) + len(sides.others)
    n_units, n_other_units = len(np.unique(sides.member_units)), len(np.unique(sides.other_units))
    figures: dict[str, object] = {
        "auc": _measure(auc(sides.members, sides.others), area, n, min(n_units, n_other_units), {})
    }
    for fpr, interval in zip(fprs, rates, strict=True):
        resolution = 1 / len(sides.others)
        extra = {"resolution": resolution} if resolution > fpr else {}
        value = tpr_at_fpr(sides.members, sides.others, fpr)
        figures[f"tpr_at_fpr_{fpr:g}"] = _measure(value, interval, n, n_units, extra)
    fpr, tpr = _thinned(*roc(sides.members, sides.others))
    return figures | {"roc": {"fpr": fpr, "tpr": tpr}}


def _measure(value: float, interval: tuple[float, float], n: int, n_cases: int, extra: dict[str, float]) -> Measure:
    low, high = interval if interval[0] < interval[1] else wilson(value * n_cases, n_cases)
    return Measure(value, min(low, value), max(high, value), n, "worse", extra)


def _thinned(fpr: np.ndarray, tpr: np.ndarray) -> tuple[list[float], list[float]]:
    """At most `ROC_POINTS` vertices of the curve, dense where the FPR is small: that end tells who is exposed."""
    lowest = fpr[fpr > 0].min()
    half = ROC_POINTS // 2
    wanted = np.concatenate([np.linspace(0, 1, half), np.geomspace(lowest, 1, half)])
    vertices = np.unique(np.searchsorted(fpr, wanted + 1e-12, side="right") - 1)
    return np.round(fpr[vertices], 6).tolist(), np.round(tpr[vertices], 6).tolist()
