"""Verbatim extraction of records and of identifiers: pure functions of the per-token statistics.

Feeding the true tokens and asking at each whether it is the model's first choice answers what greedy generation from
the true prefix would write, without generating: as long as all choices so far were true, both see the same context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpmed.data.tasks import EncodedRecords
from dpmed.memorization.intervals import Measure, NotApplicable, rate_by_unit
from dpmed.memorization.statistics import TokenScores, record_units, text_starts

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
    if prefix_tokens < 1 or suffix_tokens < 1:
        raise ValueError(f"prefix {prefix_tokens} and suffix {suffix_tokens} must be 1 or more")
    eligible = scores.first_window >= prefix_tokens + suffix_tokens
    right = np.concatenate([[0], np.cumsum(scores.is_argmax)])
    start = np.where(eligible, scores.offsets[:-1] + prefix_tokens, 0)
    extracted = eligible & (right[np.where(eligible, start + suffix_tokens, 0)] - right[start] == suffix_tokens)
    return eligible, extracted


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
                rates[name] = NotApplicable(f"no record has {p} + {n} text tokens in its first window; choose less")
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
