"""Exposure: how much more likely a canary's secret became than other secrets that it could have been.

A canary's loss is compared with the losses of texts of the same format that hold another secret. What the model says
of a secret that it never saw is in both, so it cancels; canaries whose coin kept them out show what is left of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from dpmed.data.canaries import Manifest
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_by_unit, bootstrap_ratio, wilson
from dpmed.memorization.scoring import Progress, kept_scores, score_classification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 100
"""Other secrets per canary by default: exposure by rank then reaches log2(101) = 6.7 bits."""
LEAST_P_VALUE = 0.1
FEWEST_TO_FIT = 40

Figure = Measure | NotApplicable


@dataclass(frozen=True)
class CanaryLosses:
    """Losses of canaries and of their candidates, in nats: minus the log-probability of all text tokens together."""

    canary: np.ndarray
    """[c]"""
    candidates: np.ndarray
    """[c, a]: of texts that differ from the canary in the secret alone."""

    def coin_scores(self) -> np.ndarray:
        """How far each canary's loss lies below its candidates' mean, in their standard deviations, [c].

        A score for `audit_epsilon`: higher means "more likely in", and no coin is looked at. A single candidate has no
        deviation; the score is then the distance itself.
        """
        spread = self.candidates.std(axis=1)
        below = self.candidates.mean(axis=1) - self.canary
        if self.candidates.shape[1] == 1:
            return below
        return np.divide(below, spread, out=np.zeros_like(below), where=spread > 0)


def canary_losses(
    model: nn.Module,
    manifest: Manifest,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_candidates: int = CANDIDATES,
    seed: int = 0,
    batch_tokens: int = 8192,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> CanaryLosses:
    """Score all canaries of a manifest, in and out, and `n_candidates` other secrets of each.

    Args:
        model: a causal or masked language model; see `score_records`.
        manifest: of the records that the model was trained on.
        spec, tokenizer: as in training.
        n_candidates: a, at least 1; the cost is (a + 1) short texts per canary.
        seed: of the candidates.
        folder, weights: where finished batches are kept; see `kept_scores`.
        batch_tokens, progress, device: see `score_records`.

    Raises: ValueError for a classifier (see `label_scores`) or n_candidates below 1; InputError if the model's output
        is not finite.
    Reference: Carlini et al. 2019 (arXiv 1802.08232), log-perplexity.
    """
    if n_candidates < 1:
        raise ValueError(f"n_candidates is {n_candidates}; a canary is ranked among at least one other secret")
    texts = [t for c in manifest.canaries for t in (c.text, *manifest.candidates(c, n_candidates, seed))]
    records = Dataset.from_dict({"text": texts, "unit": ["canaries"] * len(texts)})
    encoded = encode(records, tokenizer, spec)
    scores = kept_scores(
        *(model, encoded, spec, tokenizer, folder, "canaries"),
        batch_tokens=batch_tokens,
        weights=weights,
        progress=progress,
        device=device,
    )
    losses = -scores.per_record(scores.log_prob).reshape(len(manifest.canaries), 1 + n_candidates)
    return CanaryLosses(losses[:, 0], losses[:, 1:])


def label_scores(
    model: nn.Module,
    manifest: Manifest,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
) -> np.ndarray:
    """Score for `audit_epsilon` where the model is a classifier: minus the loss of each canary's label, [c].

    Raises: InputError if the model's output is not finite. NaN for records without labels, which the audit refuses.
    """
    encoded = encode(manifest.records, tokenizer, spec)
    _, losses = score_classification(model, encoded, spec, tokenizer, batch_tokens=batch_tokens, device=device)
    return -losses.astype(np.float64)


def exposure_by_rank(losses: CanaryLosses) -> np.ndarray:
    """log2 |R| - log2 rank of each canary among R = the canary and its candidates, in bits, [c].

    The lowest loss has rank 1, hence exposure log2 |R|; the highest has exposure 0. Candidates of the same loss count
    half: the rank is the mean of the ranks that the canary could have among its equals.

    Reference: Carlini et al. 2019 (arXiv 1802.08232), definition 3.
    """
    own = losses.canary[:, None]
    below, equal = (losses.candidates < own).sum(axis=1), (losses.candidates == own).sum(axis=1)
    return np.log2(losses.candidates.shape[1] + 1) - np.log2(1 + below + equal / 2)


def chance(n_candidates: int) -> float:
    """Mean exposure by rank, in bits, where all ranks among `n_candidates` + 1 are equally likely."""
    return float(np.mean(-np.log2(np.arange(1, n_candidates + 2) / (n_candidates + 1))))


def exposure_by_fit(losses: CanaryLosses, space_bits: np.ndarray | Sequence[float]) -> np.ndarray:
    """Exposure in the whole space of secrets, from a skew-normal fit of the candidates' losses, in bits, [c].

    Minus log2 of the fitted probability of a loss as low as the canary's, at most `space_bits`. The fit is by maximum
    likelihood, and refused where Kolmogorov's test has a p-value below 0.1. The test sees the data that were fitted, so
    it refuses what is plainly no skew-normal sample, and seldom anything else.

    Args:
        space_bits: log2 of the number of secrets, [c].

    Returns: NaN for a canary whose candidates are no skew-normal sample, or fewer than `FEWEST_TO_FIT`.
    Reference: Carlini et al. 2019 (arXiv 1802.08232), section 4.3.
    """
    rows = zip(losses.canary, losses.candidates, space_bits, strict=True)
    return np.array([_fitted_exposure(float(own), others, float(bits)) for own, others, bits in rows])


def _fitted_exposure(own: float, others: np.ndarray, bits: float) -> float:
    from scipy.stats import kstest, skewnorm

    if len(others) < FEWEST_TO_FIT or np.ptp(others) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps of the search that lead nowhere
        shape, place, scale = map(float, cast("tuple[float, float, float]", skewnorm.fit(others)))
    if not (math.isfinite(shape) and scale > 0):
        return math.nan
    if kstest(others, skewnorm(shape, place, scale).cdf).pvalue < LEAST_P_VALUE:
        return math.nan
    with np.errstate(divide="ignore"):
        found = -float(np.log2(skewnorm.cdf(own, shape, place, scale)))
    return min(max(0.0, found), bits)


def exposure_figures(
    losses: CanaryLosses, manifest: Manifest, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, object]:
    """Exposure of the canaries that were in, and beside it of those that were out.

    Args:
        losses: of the manifest's canaries, in order.
        bootstrap, seed: resamples of canaries; each is a patient of its own.

    Returns: `canary_exposure` and `canary_exposure_median` (by rank, canaries that were in), `canary_exposure_out` and
        `canary_exposure_median_out` (the floor), `canary_exposure_by_design` and `canary_exposure_by_repeats`
        {group: {"in", "out"}}, and `canary_exposure_fitted`, `canary_exposure_fitted_out` (in the whole space of
        secrets; `n_not_fitted` canaries left out, no figure where those are the majority). `most` is the largest value
        possible, `chance` the mean of a model that never saw a canary; its median is 1 bit.
    """
    ranked, coins = exposure_by_rank(losses), manifest.included
    n_candidates = losses.candidates.shape[1]
    by_rank = {"most": math.log2(n_candidates + 1), "chance": chance(n_candidates)}
    bits = np.array([manifest.space_bits(canary) for canary in manifest.canaries])
    fitted = exposure_by_fit(losses, bits)

    def sides(group: np.ndarray) -> dict[str, Figure]:
        parts = {"in": group & coins, "out": group & ~coins}
        return {side: _mean(ranked[chosen], by_rank, bootstrap, seed) for side, chosen in parts.items()}

    def groups(values: Sequence[object]) -> Mapping[str, object]:
        column = np.array([str(value) for value in values])
        return {name: sides(column == name) for name in sorted(set(column), key=lambda n: (len(n), n))}

    everyone = sides(np.ones(len(coins), dtype=bool))
    return {
        "canary_exposure": everyone["in"],
        "canary_exposure_out": everyone["out"],
        "canary_exposure_median": _median(ranked[coins], by_rank["most"], bootstrap, seed),
        "canary_exposure_median_out": _median(ranked[~coins], by_rank["most"], bootstrap, seed),
        "canary_exposure_by_design": groups([canary.design for canary in manifest.canaries]),
        "canary_exposure_by_repeats": groups([canary.repeats for canary in manifest.canaries]),
        "canary_exposure_fitted": _of_fitted(fitted[coins], bits[coins], bootstrap, seed),
        "canary_exposure_fitted_out": _of_fitted(fitted[~coins], bits[~coins], bootstrap, seed),
    }


def _of_fitted(values: np.ndarray, bits: np.ndarray, bootstrap: int, seed: int) -> Figure:
    refused = np.isnan(values)
    if 2 * refused.sum() > len(values):
        return NotApplicable(
            f"the losses of the candidates of {int(refused.sum())} of {len(values)} canaries are not skew-normal, or "
            f"there are fewer than {FEWEST_TO_FIT}"
        )
    known = {"most": float(bits.max()) if len(bits) else 0.0, "chance": math.log2(math.e)}
    return _mean(values[~refused], {**known, "n_not_fitted": int(refused.sum())}, bootstrap, seed)


def _mean(values: np.ndarray, known: Mapping[str, float], bootstrap: int, seed: int) -> Figure:
    if len(values) == 0:
        return NotApplicable("no canary of this kind")
    interval = bootstrap_ratio(values, np.ones(len(values)), np.arange(len(values)), bootstrap, seed)
    return _measure(float(values.mean()), interval, len(values), known)


def _median(values: np.ndarray, most: float, bootstrap: int, seed: int) -> Figure:
    if len(values) == 0:
        return NotApplicable("no canary of this kind")
    interval = bootstrap_by_unit(lambda at: float(np.median(values[at])), np.arange(len(values)), bootstrap, seed)
    return _measure(float(np.median(values)), interval, len(values), {"most": most})


def _measure(value: float, interval: tuple[float, float], n: int, known: Mapping[str, float]) -> Measure:
    """Where all resamples agree, as when every canary is ranked first, the interval is that of a rate, value / most."""
    low, high = interval
    if not high - low > 1e-9 * known["most"]:  # also NaN: no resample was asked for
        low, high = (known["most"] * edge for edge in wilson(min(1.0, value / known["most"]) * n, n))
    return Measure(value, min(low, value), max(high, value), n, "worse", known)
