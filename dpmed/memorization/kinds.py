"""What kind of text a model memorised, and how much: harmful, uninformative, beneficial, or other content.

A memorised span is a run of at least n tokens of one window that are all the model's first choice given the true text
before. That is our definition, and so are the four kinds (arXiv 2509.08604 names three of them without a rule): see
`span_kinds`. Everything here is a function of one forward pass and of the records' token ids; no result holds text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dpmed.data.tasks import EncodedRecords
from dpmed.memorization.intervals import (
    HigherIs,
    Measure,
    NotApplicable,
    bootstrap_ratio,
    dense_units,
    rate_by_unit,
    wilson,
)
from dpmed.memorization.leakage import DIRECT
from dpmed.memorization.statistics import TokenScores, record_units, text_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("harmful", "uninformative", "beneficial", "content")
"""In order of precedence: a span is of the first kind whose rule it meets."""
HARMFUL, UNINFORMATIVE, BENEFICIAL, CONTENT = range(4)
BETTER: dict[str, HigherIs] = {"beneficial": "better"}
"""Kinds of which more is better; of all others less is."""
NO_REFERENCE = "no reference text was named (evaluation.reference_text)"
NO_BASE = "no base model was asked what it yields"
_TOKENS_AT_ONCE = 2**18


@dataclass(frozen=True)
class TokenTexts:
    """Texts as token ids, one after the other.

    Shapes: t = tokens of all texts, r = texts.
    """

    tokens: np.ndarray
    """Token ids, int64 [t]."""
    offsets: np.ndarray
    """Tokens of text i are offsets[i]:offsets[i + 1], int64 [r + 1]."""
    units: np.ndarray
    """Dense unit index of each text, int64 [r]."""


@dataclass(frozen=True)
class MemorizedSpans:
    """Memorised spans in reading order.

    Shapes: s = spans. Positions count the text tokens of all records, as in `TokenScores`.
    """

    start: np.ndarray
    """First token, int64 [s]."""
    end: np.ndarray
    """One behind the last token, int64 [s]."""
    record: np.ndarray
    """Record, int64 [s]."""
    min_tokens: int
    """n: the fewest tokens of a span."""

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start


@dataclass(frozen=True)
class SpanKinds:
    """The kind of each memorised span, and why.

    Shapes: s = spans.
    """

    kind: np.ndarray
    """Index into `KINDS`, int8 [s]."""
    repeated: np.ndarray
    """Every n-gram of it stands in the records of at least k other patients, bool [s]."""
    known_to_base: np.ndarray
    """All of its tokens are the base model's first choice too, bool [s]; False without a base model."""
    n_identifier_tokens: np.ndarray
    """How many of its tokens belong to an identifier or canary, int64 [s]."""
    n_repeated_tokens: np.ndarray
    """How many of its tokens stand in an n-gram of at least k other patients, int64 [s]."""


def memorized_spans(scores: TokenScores, encoded: EncodedRecords, *, min_tokens: int = 30) -> MemorizedSpans:
    """Maximal runs of at least n text tokens that are all the first choice; a window's edge ends a run.

    Args:
        scores: of a causal language model.
        encoded: the records that were scored.
        min_tokens: n >= 1.

    Guarantee: greedy decoding from the true text before a span writes the span. Spans do not overlap or touch, save at
    the edge of a window.
    Raises: ValueError if n is below 1 or the records are not those of `scores`.
    """
    starts, total = text_starts(encoded)
    _check(scores, total, min_tokens)
    right = np.asarray(scores.is_argmax, dtype=bool)
    first = np.zeros(total + 1, dtype=bool)  # whether a window begins here
    first[starts] = True
    first[total] = True
    start = np.flatnonzero(right & (first[:-1] | ~np.concatenate([[False], right[:-1]])))
    end = np.flatnonzero(right & (first[1:] | ~np.concatenate([right[1:], [False]]))) + 1
    long = end - start >= min_tokens
    start, end = start[long], end[long]
    return MemorizedSpans(start, end, np.asarray(scores.record)[start].astype(np.int64), min_tokens)


def span_kinds(
    spans: MemorizedSpans,
    encoded: EncodedRecords,
    *,
    base: TokenScores | None = None,
    reference: TokenTexts | None = None,
    k: int = 3,
) -> SpanKinds:
    """Give each memorised span one kind, as a whole; the first rule that holds decides.

    1. harmful: it overlaps an identifier of source planted (canaries too) or known, by at least one token.
    2. uninformative: every n-gram of token ids in it stands in the records of at least k other patients (not all need
       stand with the same k), or the base model has all of its tokens as first choice as well. One n-gram that is
       rarer makes the whole span something else.
    3. beneficial: every n-gram of it stands in a reference text.
    4. content: the rest.

    Args:
        spans: what `memorized_spans` found in these records.
        encoded: the records; the other patients are those in it.
        base: statistics of the model before fine-tuning on the same records.
        reference: what `reference_texts` made, with the same tokenizer.
        k: other patients, k >= 1.

    Memory: at most 8 bytes for each n-gram of a span and each of up to k + 1 patients, besides the token ids.
    Raises: ValueError if k is below 1, or `base` is of other records.
    """
    if k < 1:
        raise ValueError(f"k is {k}: a text of another patient needs k of 1 or more")
    corpus, n = token_texts(encoded), spans.min_tokens
    if base is not None and len(base.is_argmax) != len(corpus.tokens):
        raise ValueError("the base model's statistics are of other records")
    n_windows = spans.lengths - n + 1
    first = np.cumsum(n_windows) - n_windows  # of each span among all windows
    at = np.repeat(spans.start - first, n_windows) + np.arange(n_windows.sum())

    def all_windows(found: np.ndarray) -> np.ndarray:
        return np.logical_and.reduceat(found, first) if len(first) else np.zeros(0, dtype=bool)

    common = units_with_ngram(corpus, at, n, corpus, at_most=k + 1) > k  # its own patient is one of them
    repeated = all_windows(common)
    known = np.zeros(len(first), dtype=bool)
    if base is not None:
        known = _count(np.asarray(base.is_argmax, dtype=bool), spans) == spans.lengths
    cited = np.zeros(len(first), dtype=bool)
    if reference is not None:
        cited = all_windows(units_with_ngram(corpus, at, n, reference, at_most=1) > 0)
    n_identifier_tokens = _count(_identifier_tokens(encoded, len(corpus.tokens)), spans)
    kind = np.select(
        [n_identifier_tokens > 0, repeated | known, cited], [HARMFUL, UNINFORMATIVE, BENEFICIAL], CONTENT
    ).astype(np.int8)
    covered = np.zeros(len(corpus.tokens) + 1, dtype=np.int64)
    np.add.at(covered, at[common], 1)
    np.add.at(covered, at[common] + n, -1)
    return SpanKinds(kind, repeated, known, n_identifier_tokens, _count(np.cumsum(covered[:-1]) > 0, spans))


def kind_figures(
    scores: TokenScores,
    encoded: EncodedRecords,
    spans: MemorizedSpans,
    kinds: SpanKinds,
    *,
    has_base: bool,
    has_reference: bool,
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Volume of what was memorised, for all spans and per kind, and what it rests on.

    Args:
        scores: of the model on these records.
        encoded: the records.
        spans: what `memorized_spans` found.
        kinds: what `span_kinds` said of them.
        has_base: whether it was asked what the base model yields.
        has_reference: whether it was asked what stands in a reference text; beneficial does not apply otherwise.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: figures {"all" | kind: {"token_share", "record_rate", "n_spans", "n_tokens", "longest_run",
    "n_repeated_tokens"}} and counts.
    `token_share` is of all scored tokens (n counts these), `record_rate` the share of records with at least one such
    span among those that have a window of n scored tokens.
    """
    units, eligible = record_units(encoded), _eligible(scores, encoded, spans.min_tokens)
    n_scored = scores.per_record(np.ones(len(scores.record)))

    def volume(name: str, chosen: np.ndarray) -> dict[str, Any]:
        lengths, record = spans.lengths[chosen], spans.record[chosen]
        hit = np.isin(np.arange(encoded.n_records), record)
        tokens = np.bincount(record, weights=lengths, minlength=encoded.n_records)
        better = BETTER.get(name, "worse")
        return {
            "token_share": _share(tokens, n_scored, units, better, bootstrap, seed),
            "record_rate": rate_by_unit(hit[eligible], units[eligible], better, bootstrap, seed)
            if eligible.any()
            else NotApplicable(f"no record has {spans.min_tokens} scored tokens in a window; choose less"),
            "n_spans": len(lengths),
            "n_tokens": int(lengths.sum()),
            "longest_run": int(lengths.max(initial=0)),
            "n_repeated_tokens": int(kinds.n_repeated_tokens[chosen].sum()),
        }

    figures: dict[str, Any] = {"all": volume("all", np.ones(len(spans.start), dtype=bool))}
    for code, name in enumerate(KINDS):
        if code == BENEFICIAL and not has_reference:
            figures[name] = NotApplicable(NO_REFERENCE)
            continue
        figures[name] = volume(name, kinds.kind == code)
    figures["harmful"]["n_identifier_tokens"] = int(kinds.n_identifier_tokens.sum())
    dull = kinds.kind == UNINFORMATIVE
    figures["uninformative"] |= {
        "n_spans_repeated": int((dull & kinds.repeated).sum()),
        "n_spans_known_to_base": int((dull & kinds.known_to_base).sum()) if has_base else NotApplicable(NO_BASE),
    }
    counts = {
        "min_tokens": spans.min_tokens,
        "n_scored_tokens": int(n_scored.sum()),
        "n_eligible": int(eligible.sum()),
        "n_too_short": int((~eligible).sum()),
        "base_model_asked": has_base,
        "reference_text_asked": has_reference,
    }
    return figures, counts


# --- Token ids --------------------------------------------------------------------------------------------------------


def token_texts(encoded: EncodedRecords) -> TokenTexts:
    """The text tokens of the records, windows joined, in the order of `TokenScores`."""
    starts, total = text_starts(encoded)
    tokens = np.empty(total, dtype=np.int64)
    per_record = np.zeros(encoded.n_records, dtype=np.int64)
    for example, start in zip(encoded, starts, strict=True):
        length = example.text_end - example.text_start
        tokens[start : start + length] = example.input_ids[example.text_start : example.text_end]
        per_record[example.record] += length
    return TokenTexts(tokens, np.concatenate([[0], np.cumsum(per_record)]), record_units(encoded))


def reference_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
    """Reference texts (guidelines, for example), tokenised as the records are; n-grams do not cross texts."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if len(texts) else []
    lengths = [len(one) for one in ids]  # pyright: ignore[reportArgumentType]
    tokens = np.array([token for one in ids for token in one], dtype=np.int64)  # pyright: ignore[reportGeneralTypeIssues]
    return TokenTexts(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.arange(len(lengths)))


def units_with_ngram(queries: TokenTexts, at: np.ndarray, n: int, corpus: TokenTexts, *, at_most: int) -> np.ndarray:
    """In the texts of how many units each n-gram of token ids stands.

    Hashes find the candidates, the token ids decide: the answer is exact. The corpus is read in pieces, and of an
    n-gram no more than `at_most` units are kept.

    Args:
        queries: texts that hold the n-grams.
        at: position in `queries.tokens` where each n-gram begins, [q].
        n: tokens of an n-gram, n >= 1.
        corpus: texts to look in; n-grams do not cross texts.
        at_most: where counting stops.

    Returns: [q], 0 ... at_most.
    Reference: Karp and Rabin 1987 (rolling hashes).
    """
    if len(at) == 0:
        return np.zeros(0, dtype=np.int64)
    hashed, known, example, query = _query_hashes(queries.tokens, np.asarray(at), n)
    n_units = int(corpus.units.max(initial=0)) + 1
    kept = np.zeros(0, dtype=np.int64)  # query * n_units + unit, sorted
    for piece, positions, units in _pieces(corpus, n):
        values = hashed(piece)[positions]
        place = np.minimum(np.searchsorted(known, values), len(known) - 1)
        hit = np.flatnonzero(known[place] == values)
        hit = hit[_same(piece, positions[hit], queries.tokens, example[place[hit]], n)]
        kept = _capped(np.concatenate([kept, place[hit] * n_units + units[hit]]), n_units, at_most)
    return np.bincount(kept // n_units, minlength=len(known))[query]


def _query_hashes(tokens: np.ndarray, at: np.ndarray, n: int) -> tuple[_Hash, np.ndarray, np.ndarray, np.ndarray]:
    """A hash that tells all n-grams asked for apart; its sorted values, the position of one n-gram of each value, and
    which value each n-gram has."""
    wanted = np.unique(at)
    for seed in range(100):
        hashed = _Hash(n, seed)
        values = np.empty(len(wanted), dtype=np.uint64)
        for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
            low, high = np.searchsorted(wanted, [begin, begin + _TOKENS_AT_ONCE])
            if low < high:
                values[low:high] = hashed(tokens[begin : begin + _TOKENS_AT_ONCE + n - 1])[wanted[low:high] - begin]
        known, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        if _same(tokens, wanted, tokens, wanted[first][inverse], n).all():
            return hashed, known, wanted[first], inverse[np.searchsorted(wanted, at)]
    raise RuntimeError("no hash tells the n-grams apart")  # each try fails with a chance below 1e-6


class _Hash:
    """Polynomial hash of every n-gram of a piece, modulo 2**64, over token ids that were mixed first."""

    def __init__(self, n: int, seed: int) -> None:
        drawn = np.random.default_rng(seed).integers(2**63, size=2, dtype=np.uint64)
        self.n, self.key = n, drawn[:1]
        self.factor = int(drawn[1]) | 1  # odd, so that it has an inverse
        self.inverse = pow(self.factor, -1, 2**64)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """[t] to [t - n + 1], uint64."""
        if len(tokens) < self.n:
            return np.zeros(0, dtype=np.uint64)
        mixed = _mixed(tokens.astype(np.uint64) + self.key)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * _powers(self.factor, len(mixed)))])
        return (sums[self.n :] - sums[: -self.n]) * _powers(self.inverse, len(mixed) - self.n + 1)


def _powers(factor: int, count: int) -> np.ndarray:
    """factor**0, factor**1, ... modulo 2**64."""
    powers = np.full(count, factor, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Neighbouring numbers made far apart (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _pieces(corpus: TokenTexts, n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of the corpus that overlap by n - 1 tokens: token ids, where n-grams begin in them, and whose they are."""
    for begin in range(0, len(corpus.tokens), _TOKENS_AT_ONCE):
        piece = corpus.tokens[begin : begin + _TOKENS_AT_ONCE + n - 1]
        positions = np.arange(max(0, len(piece) - n + 1))
        text = np.searchsorted(corpus.offsets, begin + positions, side="right") - 1
        inside = begin + positions + n <= corpus.offsets[text + 1]
        yield piece, positions[inside], corpus.units[text[inside]]


def _same(a: np.ndarray, at_a: np.ndarray, b: np.ndarray, at_b: np.ndarray, n: int) -> np.ndarray:
    """Whether the n tokens at each pair of positions are the same, bool [q]."""
    same = np.zeros(len(at_a), dtype=bool)
    rows = max(1, 16 * _TOKENS_AT_ONCE // n)
    for first in range(0, len(at_a), rows):
        chosen = slice(first, first + rows)
        left, right = sliding_window_view(a, n)[at_a[chosen]], sliding_window_view(b, n)[at_b[chosen]]
        same[chosen] = (left == right).all(axis=1)
    return same


def _capped(pairs: np.ndarray, n_units: int, at_most: int) -> np.ndarray:
    """Distinct pairs, sorted, with at most so many units of each n-gram."""
    pairs = np.unique(pairs)
    group = pairs // n_units
    rank = np.arange(len(pairs)) - np.searchsorted(group, group)
    return pairs[rank < at_most]


# --- Sums -------------------------------------------------------------------------------------------------------------


def _check(scores: TokenScores, total: int, min_tokens: int) -> None:
    if min_tokens < 1:
        raise ValueError(f"a memorised span of {min_tokens} tokens: choose 1 or more")
    if len(scores.is_argmax) != total:
        raise ValueError("the statistics are of other records")


def _count(flags: np.ndarray, spans: MemorizedSpans) -> np.ndarray:
    """How many tokens of each span have the flag, [s]."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    return sums[spans.end] - sums[spans.start]


def _eligible(scores: TokenScores, encoded: EncodedRecords, n: int) -> np.ndarray:
    """Records that have a window of at least n scored tokens, bool [r]."""
    found = np.zeros(encoded.n_records, dtype=bool)
    per_window = _window_sums(np.asarray(scores.scored), encoded)
    found[[e.record for e, tokens in zip(encoded, per_window, strict=True) if tokens >= n]] = True
    return found


def _window_sums(flags: np.ndarray, encoded: EncodedRecords) -> np.ndarray:
    """How many text tokens of each window have the flag, [w]."""
    starts, total = text_starts(encoded)
    sums = np.concatenate([[0], np.cumsum(flags)])
    return sums[np.append(starts[1:], total)] - sums[starts]


def _identifier_tokens(encoded: EncodedRecords, total: int) -> np.ndarray:
    """Text tokens of identifiers that are surely ones, bool [t]; pieces that a window's edge cut count too."""
    flags = np.zeros(total, dtype=bool)
    for example, start in zip(encoded, text_starts(encoded)[0], strict=True):
        for span in example.spans:
            if span.source in DIRECT:
                flags[start + span.start - example.text_start : start + span.end - example.text_start] = True
    return flags


def _share(
    part: np.ndarray, whole: np.ndarray, units: np.ndarray, higher_is: HigherIs, bootstrap: int, seed: int
) -> Measure | NotApplicable:
    """Sum of one count over the records by the sum of another; Wilson over units where all resamples agree."""
    if not whole.sum() > 0:
        return NotApplicable("no scored token")
    value = float(part.sum() / whole.sum())
    low, high = bootstrap_ratio(part, whole, units, bootstrap, seed)
    if not low < high:
        n_units = dense_units(units)[1]
        low, high = wilson(value * n_units, n_units)
    return Measure(value, min(low, value), max(high, value), int(whole.sum()), higher_is)
