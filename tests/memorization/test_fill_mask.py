from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.memorization.fill_mask import fill_mask_figures, masked_words
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.memorization.scoring import mask_groups
from dpmed.memorization.statistics import TokenScores
from dpmed.memorization.vocabulary import TokenStatistics

SPEC = TaskSpec("masked_lm", max_length=64)
TEXT = "Zacharias Quartermain has fever and Ottilie coughs on 3 March"


def span(start: int, end: int, source: str, kind: str = "NAME") -> dict:
    return {"start": start, "end": end, "type": kind, "source": source}


def records(n: int = 3) -> Dataset:
    """The name of two words is known, "Ottilie" was found by a pattern only, and "fever" is a rare word."""
    spans = [
        span(0, 21, "known"),
        span(TEXT.index("fever"), TEXT.index("fever") + 5, "indirect"),
        span(TEXT.index("Ottilie"), TEXT.index("Ottilie") + 7, "pattern"),
    ]
    units = [f"p{i}" for i in range(n)]
    return Dataset.from_dict({"text": [TEXT] * n, "unit": units, "record_id": units, "identifiers": [spans] * n})


def scores_of(encoded: EncodedRecords, ranks: np.ndarray, first: np.ndarray | None = None) -> TokenScores:
    found = TokenStatistics.empty(len(ranks))
    found.log_prob[:] = -1.0
    found.rank[:] = ranks
    found.is_argmax[:] = ranks == 0 if first is None else first
    return TokenScores.for_records(encoded, found)


def slowly(encoded: EncodedRecords, ranks: np.ndarray) -> dict[str, dict[str, tuple[int, int]]]:
    """Hits and cases, a token at a time: which span, if any, the token's masked group touches."""
    token_hits: dict[str, list[int]] = {"identifiers": [], "other_words": []}
    groups: dict[tuple[int, int], tuple[str, list[int]]] = {}
    at = 0
    for number, example in enumerate(encoded):
        of = mask_groups(example)
        for position in range(example.text_start, example.text_end):
            group = of[position - example.text_start]
            members = {p for p in range(example.text_start, example.text_end) if of[p - example.text_start] == group}
            sources = {s.source for s in example.spans if members & set(range(s.start, s.end))}
            side = "identifiers" if sources == {"known"} else "other_words" if not sources else None
            if side is not None:
                token_hits[side].append(int(ranks[at]))
                groups.setdefault((number, int(group)), (side, []))[1].append(int(ranks[at]))
            at += 1
    return {
        side: {
            "top_1": (sum(r == 0 for r in hits), len(hits)),
            "top_5": (sum(r < 5 for r in hits), len(hits)),
            "whole": (
                sum(all(r == 0 for r in of) for s, of in groups.values() if s == side),
                sum(s == side for s, _ in groups.values()),
            ),
        }
        for side, hits in token_hits.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_accuracies_equal_a_slow_count(tiny_tokenizer, seed: int):
    encoded = encode(records(), tiny_tokenizer, SPEC)
    n = sum(e.text_end - e.text_start for e in encoded)
    ranks = np.random.default_rng(seed).integers(0, 8, n) * (np.random.default_rng(seed + 50).random(n) < 0.4)
    figures = fill_mask_figures(scores_of(encoded, ranks), encoded)
    for side, expected in slowly(encoded, ranks).items():
        own = figures[side]
        assert isinstance(own, dict)
        for name, (hits, cases) in expected.items():
            figure = own[name]
            assert isinstance(figure, Measure)
            assert (figure.value, figure.n) == (pytest.approx(hits / cases), cases), (side, name)
            assert figure.low <= figure.value <= figure.high
            assert figure.higher_is == ("worse" if side == "identifiers" else "better")


def test_an_identifier_of_two_words_is_one_case_and_other_sources_count_on_neither_side(tiny_tokenizer):
    encoded = encode(records(1), tiny_tokenizer, SPEC)
    words = masked_words(encoded)
    assert len(set(words.group[words.is_identifier])) == 1
    example = encoded[0]
    of_name = [i for s in example.spans if s.source == "known" for i in range(s.start, s.end)]
    assert np.flatnonzero(words.is_identifier).tolist() == [i - example.text_start for i in of_name]
    neither = ~words.is_identifier & ~words.is_other
    text = "".join(tiny_tokenizer.convert_ids_to_tokens(np.array(example.input_ids)[neither].tolist()))
    assert text.replace("Ġ", "") == "feverOttilie"


def test_privacy_and_utility_are_of_first_choices(tiny_tokenizer):
    encoded = encode(records(), tiny_tokenizer, SPEC)
    words = masked_words(encoded)
    ranks = np.where(words.is_identifier, 3, 0)
    figures = fill_mask_figures(scores_of(encoded, ranks), encoded)
    privacy, utility, identifiers = figures["privacy"], figures["utility"], figures["identifiers"]
    assert isinstance(privacy, Measure) and isinstance(utility, Measure) and isinstance(identifiers, dict)
    assert (privacy.value, privacy.higher_is, utility.value, utility.higher_is) == (1.0, "better", 1.0, "better")
    assert privacy.low < 1.0 == privacy.high
    top_5 = identifiers["top_5"]
    assert isinstance(top_5, Measure) and top_5.value == 1.0
    leaked = fill_mask_figures(scores_of(encoded, np.zeros(len(ranks))), encoded)["privacy"]
    assert isinstance(leaked, Measure) and leaked.value == 0.0 == leaked.low


def test_without_identifiers_there_is_a_reason_and_utility_stands(tiny_tokenizer):
    plain = records().remove_columns("identifiers").add_column("identifiers", [[]] * 3, new_fingerprint="plain")
    encoded = encode(plain, tiny_tokenizer, SPEC)
    figures = fill_mask_figures(scores_of(encoded, np.zeros(sum(encoded.lengths))), encoded)
    assert isinstance(figures["privacy"], NotApplicable)
    assert isinstance(figures["utility"], Measure)


def test_a_piece_that_a_windows_edge_cut_is_on_neither_side(tiny_tokenizer):
    spec = TaskSpec("masked_lm", max_length=8)
    encoded = encode(records(1), tiny_tokenizer, spec)
    words = masked_words(encoded)
    assert not words.is_identifier.any()  # the name has more than 8 tokens
    assert words.is_other.any()
    pieces = np.concatenate(
        [[any(s.start <= i < s.end for s in e.spans) for i in range(len(e.input_ids))] for e in encoded]
    )
    assert not words.is_other[pieces].any()
