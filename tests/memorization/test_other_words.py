from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.memorization.other_words import other_tokens, other_word_figures
from dpmed.memorization.statistics import TokenScores
from dpmed.memorization.vocabulary import TokenStatistics

TEXT = "Zacharias Quartermain has fever and Ottilie coughs on 3 March"
SPANS = [(0, 21, "known"), (TEXT.index("fever"), TEXT.index("fever") + 5, "indirect")]


def records(n: int, spans: list[tuple[int, int, str]]) -> Dataset:
    found = [{"start": a, "end": b, "type": "NAME", "source": source} for a, b, source in spans]
    units = [f"p{i}" for i in range(n)]
    return Dataset.from_dict({"text": [TEXT] * n, "unit": units, "record_id": units, "identifiers": [found] * n})


def scored(encoded: EncodedRecords, first: np.ndarray, log_prob: np.ndarray) -> TokenScores:
    found = TokenStatistics.empty(len(first))
    found.log_prob[:], found.is_argmax[:] = log_prob, first
    return TokenScores.for_records(encoded, found)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_tokens_of_any_identifier_are_left_out(kind, tiny_tokenizer):
    """Against the slow truth: each token's characters looked up in the spans."""
    spec = TaskSpec(kind, max_length=64)
    encoded = encode(records(2, SPANS), tiny_tokenizer, spec)
    offsets = tiny_tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [any(a < end and b > start for start, end, _ in SPANS) for a, b in offsets]
    assert other_tokens(encoded, spec).tolist() == [not each for each in inside] * 2
    assert 0 < sum(inside) < len(inside)


def test_accuracy_and_perplexity_read_those_tokens_alone(tiny_tokenizer):
    spec = TaskSpec("masked_lm", max_length=64)
    encoded = encode(records(3, SPANS), tiny_tokenizer, spec)
    others = other_tokens(encoded, spec)
    rng = np.random.default_rng(0)
    log_prob = np.where(others, -rng.uniform(0, 3, len(others)), -50.0)
    first = np.where(others, rng.random(len(others)) < 0.5, True)
    found = other_word_figures(scored(encoded, first, log_prob), encoded, spec, bootstrap=50)
    accuracy, perplexity = found["other_words_accuracy"], found["other_words_perplexity"]
    assert isinstance(accuracy, Measure) and isinstance(perplexity, Measure)
    assert accuracy.value == pytest.approx(first[others].mean()) and accuracy.n == perplexity.n == others.sum()
    assert perplexity.value == pytest.approx(np.exp(-log_prob[others].astype(np.float32).mean()), rel=1e-5)
    assert (accuracy.higher_is, perplexity.higher_is) == ("better", "worse")
    assert perplexity.low < perplexity.value < perplexity.high


def test_a_text_that_is_all_identifier_has_a_reason(tiny_tokenizer):
    spec = TaskSpec("causal_lm", max_length=64)
    encoded = encode(records(2, [(0, len(TEXT), "known")]), tiny_tokenizer, spec)
    n = int(other_tokens(encoded, spec).size)
    found = other_word_figures(scored(encoded, np.ones(n, bool), np.zeros(n)), encoded, spec)
    assert all(isinstance(figure, NotApplicable) for figure in found.values())
