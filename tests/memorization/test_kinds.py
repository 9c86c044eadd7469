from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpmed.memorization.kinds as kinds_module
from dpmed.data.tasks import EncodedRecords, Example, TokenSpan
from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.kinds import (
    BENEFICIAL,
    CONTENT,
    HARMFUL,
    KINDS,
    UNINFORMATIVE,
    MemorizedSpans,
    SpanKinds,
    TokenTexts,
    kind_figures,
    memorized_spans,
    reference_texts,
    span_kinds,
    token_texts,
    units_with_ngram,
)
from dpmed.memorization.statistics import TokenScores

BEFORE, AFTER = 900, 901  # a special token before the text, and label tokens behind it


def encoded_of(
    texts: Sequence[Sequence[int]],
    units: Sequence[int] | None = None,
    *,
    spans: dict[int, list[tuple[int, int, str]]] | None = None,
    window: int = 1000,
) -> EncodedRecords:
    """Records of given token ids, in windows; `spans` of a record as (start, end, source) in its text tokens."""
    examples = []
    for record, text in enumerate(texts):
        for number, begin in enumerate(range(0, max(1, len(text)), window)):
            ids = list(text[begin : begin + window])
            found = tuple(
                TokenSpan(max(a - begin, 0) + 1, min(b - begin, len(ids)) + 1, "NAME", source, True)
                for a, b, source in (spans or {}).get(record, [])
                if a < begin + len(ids) and b > begin
            )
            unit = record if units is None else units[record]
            end = len(ids) + 1
            examples.append(Example(record, unit, number, [BEFORE, *ids, AFTER], 1, end, end, found, (), None))
    return EncodedRecords(examples, [str(u) for u in range(max(e.unit for e in examples) + 1)], len(texts))


def scores_of(encoded: EncodedRecords, right: Sequence[Sequence[int]]) -> TokenScores:
    """Hand-made statistics: 1 for a right first choice. Every token is scored, since a special one stands before."""
    flags = np.array([flag for record in right for flag in record], dtype=bool)
    lengths = [len(record) for record in right]
    return TokenScores(
        record=np.repeat(np.arange(len(right), dtype=np.int32), lengths),
        log_prob=np.full(len(flags), -1.0, dtype=np.float32),
        is_argmax=flags,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first_window=np.array([e.text_end - e.text_start for e in encoded if e.window == 0], dtype=np.int32),
    )


def slow_spans(right: Sequence[Sequence[int]], n: int, window: int) -> list[tuple[int, int, int]]:
    found, base = [], 0
    for record, flags in enumerate(right):
        run = 0
        for position in range(len(flags) + 1):
            ends = position == len(flags) or position % window == 0 or not flags[position]
            if ends and run:
                if run >= n:
                    found.append((base + position - run, base + position, record))
                run = 0
            if position < len(flags) and flags[position]:
                run += 1
        base += len(flags)
    return found


FLAGS = st.lists(st.lists(st.sampled_from([1, 1, 1, 0]), max_size=20), min_size=1, max_size=5)


@given(FLAGS, st.integers(1, 5), st.integers(2, 9))
def test_spans_are_the_maximal_runs_of_a_window(right: list[list[int]], n: int, window: int) -> None:
    encoded = encoded_of(right, window=window)
    spans = memorized_spans(scores_of(encoded, right), encoded, min_tokens=n)
    found = list(zip(spans.start.tolist(), spans.end.tolist(), spans.record.tolist(), strict=True))
    assert found == slow_spans(right, n, window)
    assert spans.lengths.tolist() == [b - a for a, b, _ in found]


TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=6)


@given(TEXTS, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(1, 4), st.integers(1, 4), st.data())
def test_units_of_an_ngram_equal_a_slow_count(
    texts: list[list[int]], units: list[int], n: int, at_most: int, data: st.DataObject
) -> None:
    corpus = token_texts(encoded_of(texts, units[: len(texts)]))
    last = len(corpus.tokens) - n
    at = np.array(data.draw(st.lists(st.integers(0, last), max_size=8)) if last >= 0 else [], dtype=np.int64)
    flat = corpus.tokens.tolist()

    def slow(gram: list[int]) -> int:
        having = {u for t, u in zip(texts, units, strict=False) for i in range(len(t)) if t[i : i + n] == gram}
        return min(at_most, len(having))

    found = units_with_ngram(corpus, at, n, corpus, at_most=at_most)
    assert found.tolist() == [slow(flat[p : p + n]) for p in at]


def test_pieces_of_the_corpus_lose_no_ngram_and_count_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, size=length).tolist() for length in (40, 3, 0, 55, 21)]
    corpus = token_texts(encoded_of(texts))
    at = np.array([p for p in range(len(corpus.tokens) - 4)])
    whole = units_with_ngram(corpus, at, 4, corpus, at_most=9)
    monkeypatch.setattr(kinds_module, "_TOKENS_AT_ONCE", 7)
    np.testing.assert_array_equal(units_with_ngram(corpus, at, 4, corpus, at_most=9), whole)
    assert len(set(whole.tolist())) > 2


def test_hashes_that_collide_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak(kinds_module._Hash):
        """Nearly all n-grams have the same hash, unless the seed is high."""

        def __call__(self, tokens: np.ndarray) -> np.ndarray:
            return super().__call__(tokens) >> np.uint64(62 if self.weak else 0)

        def __init__(self, n: int, seed: int) -> None:
            super().__init__(n, seed)
            self.weak = seed < 3

    rng = np.random.default_rng(0)
    texts = [rng.integers(4, size=30).tolist() for _ in range(5)]
    corpus = token_texts(encoded_of(texts))
    at = np.arange(26)
    truth = units_with_ngram(corpus, at, 3, corpus, at_most=9)
    monkeypatch.setattr(kinds_module, "_Hash", Weak)
    np.testing.assert_array_equal(units_with_ngram(corpus, at, 3, corpus, at_most=9), truth)
    one = np.zeros(1, dtype=np.int64)  # a single n-gram never collides with another query, only with the corpus
    assert units_with_ngram(corpus, one, 3, corpus, at_most=9)[0] == truth[0]


TEMPLATE = list(range(10, 20))


def kinds_of(
    texts: list[list[int]],
    *,
    units: list[int] | None = None,
    spans: dict[int, list[tuple[int, int, str]]] | None = None,
    base: list[list[int]] | None = None,
    reference: list[list[int]] | None = None,
    n: int = 4,
    k: int = 3,
) -> SpanKinds:
    """Kind of the one span of each record: the model knows every token."""
    encoded = encoded_of(texts, units, spans=spans)
    found = memorized_spans(scores_of(encoded, [[1] * len(t) for t in texts]), encoded, min_tokens=n)
    cited = None
    if reference is not None:
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in reference])])
        cited = TokenTexts(np.array(list(chain(*reference))), offsets, np.arange(len(reference)))
    return span_kinds(found, encoded, base=scores_of(encoded, base) if base else None, reference=cited, k=k)


def test_a_text_of_k_other_patients_is_uninformative() -> None:
    four = [TEMPLATE] * 4
    assert kinds_of(four, k=3).kind.tolist() == [UNINFORMATIVE] * 4  # each has three others
    assert kinds_of(four, k=4).kind.tolist() == [CONTENT] * 4
    assert kinds_of(four, units=[0, 0, 1, 2], k=3).kind.tolist() == [CONTENT] * 4  # two notes are of one patient
    assert kinds_of(four, units=[0, 0, 1, 2], k=2).kind.tolist() == [UNINFORMATIVE] * 4


def test_one_rare_ngram_makes_a_whole_span_informative() -> None:
    longer = [*TEMPLATE, 77]
    found = kinds_of([TEMPLATE] * 4 + [longer])
    assert found.kind.tolist() == [UNINFORMATIVE] * 4 + [CONTENT]
    assert found.repeated.tolist() == [True] * 4 + [False]
    assert found.n_repeated_tokens.tolist() == [10] * 5  # all but the rare one
    assert kinds_of([TEMPLATE] * 4 + [[*TEMPLATE[:3], 77, *TEMPLATE[3:]]]).n_repeated_tokens[-1] == 7  # 3 are too few


def test_ngrams_may_stand_with_different_patients() -> None:
    texts = [TEMPLATE[:7]] * 3 + [TEMPLATE[3:]] * 3 + [TEMPLATE]  # 4-grams 0-3 in the first, 3-6 in the last
    assert kinds_of(texts).kind[-1] == UNINFORMATIVE
    assert kinds_of(texts, n=6).kind[-1] == CONTENT  # the 6-gram that crosses the seam is its own


def test_what_the_base_model_yields_is_uninformative() -> None:
    texts = [list(range(8)), list(range(20, 28))]
    found = kinds_of(texts, base=[[1] * 8, [1] * 7 + [0]])
    assert found.kind.tolist() == [UNINFORMATIVE, CONTENT]
    assert found.known_to_base.tolist() == [True, False]
    assert found.repeated.tolist() == [False, False]


def test_reference_texts_and_the_order_of_the_rules() -> None:
    guideline = list(range(30, 42))
    texts = [guideline[2:8], guideline[:3] + guideline[4:8], guideline[:6]]
    assert kinds_of(texts, reference=[guideline]).kind.tolist() == [BENEFICIAL, CONTENT, BENEFICIAL]
    assert kinds_of(texts, reference=[guideline[:5], guideline[5:]]).kind.tolist() == [CONTENT] * 3  # no text has it
    assert kinds_of(texts, reference=[]).kind.tolist() == [CONTENT] * 3
    known = [[1] * 6, [1] * 7, [0] * 6]
    assert kinds_of(texts, reference=[guideline], base=known).kind.tolist() == [
        UNINFORMATIVE,
        UNINFORMATIVE,
        BENEFICIAL,
    ]
    name = {0: [(5, 6, "known")]}
    assert kinds_of(texts, reference=[guideline], base=known, spans=name).kind[0] == HARMFUL


@pytest.mark.parametrize(
    ("source", "kind"), [("known", HARMFUL), ("planted", HARMFUL), ("pattern", CONTENT), ("indirect", CONTENT)]
)
def test_only_sure_identifiers_make_a_span_harmful(source: str, kind: int) -> None:
    found = kinds_of([list(range(9))], spans={0: [(2, 4, source)]})
    assert found.kind.tolist() == [kind]
    assert found.n_identifier_tokens.tolist() == [2 if kind == HARMFUL else 0]


def test_an_identifier_beside_a_span_does_not_count() -> None:
    encoded = encoded_of([list(range(12))], spans={0: [(0, 4, "known"), (8, 12, "known")]})
    right = [[0] * 4 + [1] * 4 + [0] * 4]
    spans = memorized_spans(scores_of(encoded, right), encoded, min_tokens=4)
    assert span_kinds(spans, encoded).kind.tolist() == [CONTENT]
    wider = memorized_spans(scores_of(encoded, [[0] * 4 + [1] * 5 + [0] * 3]), encoded, min_tokens=4)
    assert span_kinds(wider, encoded).kind.tolist() == [HARMFUL]


def test_windows_hide_no_repetition() -> None:
    """A text that a window's edge cuts in another record still counts as that record's."""
    encoded = encoded_of([[5, *TEMPLATE], TEMPLATE, [1, 2, 3, *TEMPLATE], [9, 9, *TEMPLATE]], window=6)
    right = [[0] * 11, [1] * 10, [0] * 13, [0] * 12]
    spans = memorized_spans(scores_of(encoded, right), encoded, min_tokens=4)
    assert spans.lengths.tolist() == [6, 4]
    assert span_kinds(spans, encoded, k=3).repeated.tolist() == [True, True]


def test_volume_by_hand() -> None:
    texts = [list(range(20)), TEMPLATE, TEMPLATE, TEMPLATE, TEMPLATE, [1, 2, 3]]
    right = [[1] * 8 + [0] * 2 + [1] * 5 + [0] * 5, [1] * 10, [1] * 9 + [0], [0] * 10, [0] * 10, [1] * 3]
    encoded = encoded_of(texts, spans={0: [(10, 12, "planted")]})
    scores = scores_of(encoded, right)
    spans = memorized_spans(scores, encoded, min_tokens=5)
    figures, counts = kind_figures(
        scores, encoded, spans, span_kinds(spans, encoded, k=3), has_base=False, has_reference=False
    )
    sizes = {
        name: (f["n_spans"], f["n_tokens"], f["longest_run"])
        for name, f in figures.items()
        if not isinstance(f, NotApplicable)
    }
    assert sizes == {"all": (4, 32, 10), "harmful": (1, 5, 5), "uninformative": (2, 19, 10), "content": (1, 8, 8)}
    assert figures["harmful"]["n_identifier_tokens"] == 2
    assert [figures[name]["n_repeated_tokens"] for name in ("all", "harmful", "uninformative")] == [19 + 5, 5, 19]
    assert figures["uninformative"]["n_spans_repeated"] == 2
    assert isinstance(figures["uninformative"]["n_spans_known_to_base"], NotApplicable)
    assert isinstance(figures["beneficial"], NotApplicable)
    assert counts["n_scored_tokens"] == 63
    assert (counts["n_eligible"], counts["n_too_short"]) == (5, 1)
    share, rate = figures["uninformative"]["token_share"], figures["uninformative"]["record_rate"]
    assert (share.value, share.n, share.higher_is) == (pytest.approx(19 / 63), 63, "worse")
    assert share.low < share.value < share.high
    assert (rate.value, rate.low, rate.high, rate.n) == (0.4, *wilson(2, 5), 5)


@given(FLAGS, st.integers(1, 4))
def test_kinds_share_out_all_spans(right: list[list[int]], n: int) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, size=len(flags)).tolist() for flags in right]
    encoded = encoded_of(texts, spans={0: [(0, 2, "known")]} if len(texts[0]) > 2 else None)
    scores = scores_of(encoded, right)
    spans = memorized_spans(scores, encoded, min_tokens=n)
    kinds = span_kinds(spans, encoded, base=scores_of(encoded, [[1] * len(t) for t in texts]), k=1)
    figures, _ = kind_figures(scores, encoded, spans, kinds, has_base=True, has_reference=True, bootstrap=20)
    for key in ("n_spans", "n_tokens"):
        assert sum(figures[name][key] for name in KINDS) == figures["all"][key]
    assert max(figures[name]["longest_run"] for name in KINDS) == figures["all"]["longest_run"]
    assert figures["all"]["n_tokens"] == sum(b - a for a, b, _ in slow_spans(right, n, 1000))
    assert figures["content"]["n_spans"] == 0  # the base model yields everything
    for name in KINDS:
        for key in ("token_share", "record_rate"):
            figure = figures[name][key]
            assert isinstance(figure, NotApplicable) or 0 <= figure.low <= figure.value <= figure.high <= 1


def test_no_span_is_a_rate_of_zero_and_no_long_record_a_reason() -> None:
    encoded = encoded_of([[1, 2, 3, 4], [5, 6]])
    scores = scores_of(encoded, [[1, 1, 0, 1], [0, 0]])
    for n, applies in ((3, True), (9, False)):
        spans = memorized_spans(scores, encoded, min_tokens=n)
        figures, counts = kind_figures(
            scores, encoded, spans, span_kinds(spans, encoded), has_base=False, has_reference=True
        )
        rate, share = figures["beneficial"]["record_rate"], figures["all"]["token_share"]
        assert isinstance(rate, Measure) == applies
        assert counts["n_too_short"] == (1 if applies else 2)
        assert (share.value, share.low) == (0.0, 0.0) and share.high == wilson(0, 2)[1]
    assert figures["beneficial"]["longest_run"] == 0


def test_reference_texts_are_tokenised_like_the_records(tiny_tokenizer) -> None:
    texts = ["no acute abnormality.", "", "the lungs are clear"]
    found = reference_texts(texts, tiny_tokenizer)
    ids = [tiny_tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert found.tokens.tolist() == list(chain(*ids))
    assert found.offsets.tolist() == np.cumsum([0, *map(len, ids)]).tolist()
    assert reference_texts([], tiny_tokenizer).offsets.tolist() == [0]


def test_what_does_not_fit_together_is_refused() -> None:
    encoded, other = encoded_of([[1, 2, 3]]), encoded_of([[1, 2]])
    scores = scores_of(encoded, [[1, 1, 1]])
    with pytest.raises(ValueError, match="1 or more"):
        memorized_spans(scores, encoded, min_tokens=0)
    with pytest.raises(ValueError, match="other records"):
        memorized_spans(scores, other)
    spans = memorized_spans(scores, encoded, min_tokens=2)
    with pytest.raises(ValueError, match="k is 0"):
        span_kinds(spans, encoded, k=0)
    with pytest.raises(ValueError, match="other records"):
        span_kinds(spans, encoded, base=scores_of(other, [[1, 1]]))


def test_a_large_corpus_is_read_in_bounded_memory_and_time() -> None:
    rng = np.random.default_rng(0)
    lengths = np.full(4000, 250)
    tokens = rng.integers(20, 30_000, size=lengths.sum())
    tokens.reshape(4000, 250)[:, 100:140] = np.arange(40)  # a template in every record
    corpus = TokenTexts(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.arange(4000))
    at = np.concatenate([np.arange(c * 250, c * 250 + 221) for c in range(4000)])
    tracemalloc.start()
    began = time.perf_counter()
    found = units_with_ngram(corpus, at, 30, corpus, at_most=4)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found, own = found.reshape(4000, 221), np.r_[:96, 115:221]  # those between may share a few random tokens
    assert (found[:, 100:111] == 4).all() and (found[:, own] == 1).all()
    assert peak < 500e6
    assert seconds < 60


def test_spans_of_no_record_at_all() -> None:
    none = MemorizedSpans(*(np.zeros(0, dtype=np.int64) for _ in range(3)), min_tokens=5)
    assert len(span_kinds(none, encoded_of([[1, 2]]), k=1).kind) == 0
