"""Verbatim extraction of records and of identifiers: pure functions of the per-token statistics.

Feeding the true tokens and asking at each whether it is the model's first choice answers what greedy generation from
the true prefix would write, without generating: as long as all choices so far were true, both see the same context. The
same holds for drawn text: the probability of the true suffix is the product of its tokens' probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpmed.data.tasks import EncodedRecords
from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_ratio, rate_by_unit, wilson
from dpmed.memorization.statistics import TokenScores, in_blocks, record_units, text_starts

Figure = Measure | NotApplicable


def greedy_extraction(scores: TokenScores, prefix_tokens: int, suffix_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Which records greedy decoding continues exactly: given p true tokens, the next n are all the first choice.

    Args:
        scores: of a causal language model.
        prefix_tokens: p >= 1.
        suffix_tokens: n >= 1.

    Returns: eligible [r] (p + n text tokens stand in the first window) and extracted [r], which implies eligible.
    Guarantee: equals greedy generation from the true prefix (special tokens in front of the text included).
    Raises: ValueError if p or n is below 1.
    Reference: Carlini et al. 2021, 2023 ((p, n) discoverable extraction).
    """
    eligible, right = _suffix_sums(scores, lambda part: part.is_argmax, prefix_tokens, suffix_tokens)
    return eligible, eligible & (right == suffix_tokens)


def _suffix_sums(
    scores: TokenScores, values_of: Callable[[TokenScores], np.ndarray], prefix_tokens: int, suffix_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which records are long enough [r], and the sum of a value per token over their suffix [r]; 0 where too short."""
    if prefix_tokens < 1 or suffix_tokens < 1:
        raise ValueError(f"prefix {prefix_tokens} and suffix {suffix_tokens} must be 1 or more")

    def of(part: TokenScores) -> np.ndarray:
        long_enough = part.first_window >= prefix_tokens + suffix_tokens
        sums = np.concatenate([[0], np.cumsum(values_of(part))])
        start = np.where(long_enough, part.offsets[:-1] + prefix_tokens, 0)
        return np.where(long_enough, sums[np.where(long_enough, start + suffix_tokens, 0)] - sums[start], 0)

    return scores.first_window >= prefix_tokens + suffix_tokens, in_blocks(of, scores)


def suffix_log_probability(
    scores: TokenScores, prefix_tokens: int, suffix_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability that text drawn after the true prefix is exactly the true suffix, in one try.

    Args:
        scores: of a causal language model; how text is drawn was fixed when they were made (`Sampling`).
        prefix_tokens: p >= 1.
        suffix_tokens: n >= 1.

    Returns: eligible [r], as in `greedy_extraction`, and log p_z [r] float64; -inf where a token of the suffix is
    outside the top k, and where the record is not eligible.
    Raises: ValueError if p or n is below 1, or the scores hold no sampling probabilities.
    Reference: Hayes et al. 2024 (arXiv 2410.19482).
    """

    def finite(part: TokenScores) -> np.ndarray:
        return np.where(np.isfinite(part.detail("sampled")), part.detail("sampled").astype(np.float64), 0.0)

    lengths = (prefix_tokens, suffix_tokens)
    eligible, n_possible = _suffix_sums(scores, lambda part: np.isfinite(part.detail("sampled")), *lengths)
    _, log_probability = _suffix_sums(scores, finite, *lengths)
    certain = np.minimum(log_probability, 0.0)  # a sum that rounding left above 0
    return eligible, np.where(n_possible == suffix_tokens, certain, -np.inf)


def extraction_probability(log_probability: np.ndarray, tries: int) -> np.ndarray:
    """Probability that at least one of n independent tries gives the suffix: 1 - (1 - p_z)^n, without cancellation.

    Args:
        log_probability: log p_z of one try, at most 0, [r].
        tries: n >= 1.

    Edge cases: log p_z = 0 gives 1, -inf gives 0; a tiny p_z gives about n p_z, not 0.
    Raises: ValueError if n is below 1.
    Reference: Hayes et al. 2024 (arXiv 2410.19482), (n, p)-discoverable extraction.
    """
    if tries < 1:
        raise ValueError(f"the number of tries is {tries}; choose 1 or more")
    log_p = np.asarray(log_probability, dtype=np.float64)
    with np.errstate(divide="ignore"):
        # log(1 - p_z): log1p keeps a small p_z, log(-expm1) keeps a p_z that is almost 1.
        missed = np.where(log_p < -1.0, np.log1p(-np.exp(log_p)), np.log(-np.expm1(log_p)))
    return -np.expm1(tries * missed)


def probabilistic_extraction(
    scores: TokenScores,
    units: np.ndarray,
    prefix_tokens: int,
    suffix_tokens: int,
    tries: Sequence[int],
    probabilities: Sequence[float],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Share of records that n tries extract with probability p or more, for a grid of both: {"n10_p0.5": rate}.

    Args:
        scores: of a causal language model.
        units: unit of each record [r].

    Guarantee: closed form, nothing is drawn; a rate rises with n and falls with p.
    Reference: Hayes et al. 2024 (arXiv 2410.19482).
    """
    eligible, log_probability = suffix_log_probability(scores, prefix_tokens, suffix_tokens)
    rates: dict[str, Figure] = {}
    for n in tries:
        reached = extraction_probability(log_probability[eligible], n)
        for p in probabilities:
            rates[f"n{n}_p{p:g}"] = (
                rate_by_unit(reached >= p, units[eligible], "worse", bootstrap, seed)
                if eligible.any()
                else _too_short(prefix_tokens, suffix_tokens)
            )
    return rates


def extraction_strength(scores: TokenScores) -> np.ndarray:
    """1 - k / T of each record [r]: k is the shortest true prefix after which greedy decoding writes all the rest.

    T counts the text tokens of the first window, since later windows do not see these. A record whose last token is
    wrong has 0: only the whole text as prefix leaves nothing wrong. NaN for a record of which no token is scored.
    Reference: extraction strength, Carlini et al. 2021 as defined in OpenUnlearning (arXiv 2506.12618).
    """

    def of(part: TokenScores) -> np.ndarray:
        position = np.arange(len(part.record)) - part.offsets[part.record]
        wrong = ~part.is_argmax & (position < part.first_window[part.record])
        needed = np.zeros(part.n_records)
        np.maximum.at(needed, part.record[wrong], position[wrong] + 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - needed / part.first_window

    return np.where(scores.n_scored > 0, in_blocks(of, scores), np.nan)


def exact_memorization(scores: TokenScores) -> np.ndarray:
    """Share of each record's scored tokens that are the model's first choice [r]; NaN without a scored token.

    Reference: Tirumala et al. 2022 (arXiv 2205.10770).
    """
    with np.errstate(invalid="ignore"):
        return scores.per_record(scores.is_argmax) / scores.n_scored


def strength_figures(
    scores: TokenScores, units: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """`extraction_strength`, a mean over records, and `exact_memorization`, over all tokens together.

    Args:
        units: unit of each record [r].
    """
    scored = scores.n_scored
    has = scored > 0
    if not has.any():
        nothing = NotApplicable("no scored token")
        return {"extraction_strength": nothing, "exact_memorization": nothing}
    right = scores.per_record(scores.is_argmax)
    return {
        "extraction_strength": _mean(extraction_strength(scores)[has], np.ones(has.sum()), units[has], bootstrap, seed),
        "exact_memorization": _mean(right[has], scored[has], units[has], bootstrap, seed),
    }


def _mean(top: np.ndarray, bottom: np.ndarray, units: np.ndarray, bootstrap: int, seed: int) -> Measure:
    """sum(top) / sum(bottom) in [0, 1]; where resamples say nothing, Wilson's interval with as many cases as units."""
    value, n_units = float(top.sum() / bottom.sum()), len(np.unique(units))
    low, high = bootstrap_ratio(top, bottom, units, bootstrap, seed)
    if not low < high:
        low, high = wilson(value * n_units, n_units)
    return Measure(value, min(low, value), max(high, value), int(bottom.sum()), "worse")


def _too_short(prefix_tokens: int, suffix_tokens: int) -> NotApplicable:
    return NotApplicable(
        f"no record has {prefix_tokens} + {suffix_tokens} text tokens in its first window; choose less"
    )


def extraction_figures(
    scores: TokenScores,
    units: np.ndarray,
    prefixes: Sequence[int],
    suffixes: Sequence[int],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Figure], dict[str, dict[str, int]]]:
    """Extraction rate for every pair of lengths, as {"p50_n50": rate}, and how many records each rests on.

    Args:
        scores: of a causal language model.
        units: unit of each record [r].
    """
    rates: dict[str, Figure] = {}
    counts: dict[str, dict[str, int]] = {}
    for p in prefixes:
        for n in suffixes:
            eligible, extracted = greedy_extraction(scores, p, n)
            name = f"p{p}_n{n}"
            counts[name] = {"n_eligible": int(eligible.sum()), "n_too_short": int((~eligible).sum())}
            if not eligible.any():
                rates[name] = _too_short(p, n)
                continue
            rates[name] = rate_by_unit(extracted[eligible], units[eligible], "worse", bootstrap, seed)
    return rates, counts


@dataclass(frozen=True)
class IdentifierHits:
    """Which identifiers the model completes, one entry each.

    Shapes: i = identifiers.
    """

    unit: np.ndarray
    """Unit, int64 [i]."""
    record: np.ndarray
    """Record, int64 [i]."""
    type: np.ndarray
    """NAME, DATE, ...; str [i]."""
    source: np.ndarray
    """planted, known, pattern or indirect; str [i]."""
    hit: np.ndarray
    """Every token of it is the model's first choice, bool [i]."""
    n_not_evaluable: int
    """Identifiers left out because nothing stands before one of their tokens."""
    n_cut: int
    """Pieces left out because the edge of a window cuts their identifier."""


def identifier_extraction(scores: TokenScores, encoded: EncodedRecords) -> IdentifierHits:
    """Which known identifiers the model completes token by token, given the true text before (masked_lm: around) them.

    A masked identifier is masked as a whole, so that no part of it gives away the rest.
    Reference: Carlini et al. 2021 for names and numbers; arXiv 2501.02407 has it as fill-mask accuracy.
    """
    starts, _ = text_starts(encoded)
    units = record_units(encoded)
    found: list[tuple[int, str, str, bool]] = []
    not_evaluable = cut = 0
    for example, start in zip(encoded, starts, strict=True):
        for span in example.spans:
            if not span.whole:
                cut += 1
                continue
            at = slice(start + span.start - example.text_start, start + span.end - example.text_start)
            if np.isnan(scores.log_prob[at]).any():
                not_evaluable += 1
                continue
            found.append((example.record, span.type, span.source, bool(scores.is_argmax[at].all())))
    record = np.array([f[0] for f in found], dtype=np.int64)
    return IdentifierHits(
        unit=units[record],
        record=record,
        type=np.array([f[1] for f in found], dtype=str),
        source=np.array([f[2] for f in found], dtype=str),
        hit=np.array([f[3] for f in found], dtype=bool),
        n_not_evaluable=not_evaluable,
        n_cut=cut,
    )
