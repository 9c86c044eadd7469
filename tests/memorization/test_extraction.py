from __future__ import annotations

import functools
from dataclasses import replace
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.extraction import (
    exact_memorization,
    extraction_figures,
    extraction_probability,
    extraction_strength,
    greedy_extraction,
    identifier_extraction,
    probabilistic_extraction,
    strength_figures,
    suffix_log_probability,
)
from dpmed.memorization.intervals import Measure, NotApplicable, clopper_pearson, wilson
from dpmed.memorization.leakage import identifier_counts, identifier_figures
from dpmed.memorization.scoring import pad, score_records
from dpmed.memorization.statistics import TokenScores
from dpmed.memorization.vocabulary import Sampling

SPEC = TaskSpec(max_length=64)
WORDS = ("heart", "lungs", "fever", "cough", "normal", "clear", "acute", "pain", "blood", "mild", "old", "new", "left")


def records(n: int, seed: int) -> Dataset:
    """Sentences of random words, so that a continuation is known only to who has seen it; a name of two words each."""
    rng = np.random.default_rng(seed)
    texts, spans = [], []
    for _ in range(n):
        words = [WORDS[i] for i in rng.integers(len(WORDS), size=10)]
        text = " ".join(words)
        start = len(" ".join(words[:4])) + 1
        spans.append([{"start": start, "end": start + len(words[4]), "type": "NAME", "source": "known"}])
        texts.append(text)
    units = [f"p{i // 2}" for i in range(n)]
    return Dataset.from_dict({"text": texts, "unit": units, "record_id": units, "identifiers": spans})


@functools.cache
def trained(kind: tiny_models.Kind, steps: int = 90) -> Any:
    """A tiny model that has learnt its first 8 records by heart, more or less; less after fewer steps."""
    tokenizer = tiny_models.make_tokenizer()
    encoded = encode(records(12, seed=0).select(range(8)), tokenizer, SPEC)
    input_ids, attention = map(torch.from_numpy, pad([e for e in encoded if e.window == 0], 0))
    labels = input_ids.masked_fill(attention == 0, -100)
    model = tiny_models.make_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=input_ids, attention_mask=attention, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_extraction_equals_greedy_generation(tiny_tokenizer, kind: tiny_models.Kind):
    model, p, n = trained(kind), 4, 4
    data = concatenate_datasets([records(12, 0), records(12, 1)])
    encoded = encode(data, tiny_tokenizer, SPEC)
    eligible, extracted = greedy_extraction(score_records(model, encoded, SPEC, tiny_tokenizer), p, n)
    assert eligible.all()
    assert 0 < extracted.sum() < len(extracted)  # both outcomes occur, so that agreement means something
    windows = [e for e in encoded if e.window == 0]
    for record, example in enumerate(windows):
        ids = torch.tensor([example.input_ids])
        out = model.generate(
            input_ids=ids[:, : example.text_start + p],
            attention_mask=torch.ones(1, example.text_start + p, dtype=torch.long),
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
            pad_token_id=tiny_tokenizer.pad_token_id,
            eos_token_id=None,
        )
        suffix = slice(example.text_start + p, example.text_start + p + n)
        assert torch.equal(out[0, suffix], ids[0, suffix]) == extracted[record]


def scores_of(firsts: list[list[int]], first_window: list[int] | None = None) -> TokenScores:
    """Hand-made statistics: 1 for a right first choice, 0 for a wrong one; the first token is not predicted."""
    lengths = [len(f) for f in firsts]
    log_prob = np.concatenate([[np.nan] + [-1.0] * (n - 1) for n in lengths]).astype(np.float32)
    return TokenScores(
        record=np.repeat(np.arange(len(firsts), dtype=np.int32), lengths),
        log_prob=log_prob,
        is_argmax=np.concatenate(firsts).astype(bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_window=np.array(first_window or lengths, dtype=np.int32),
    )


def drawn(model: Any, ids: torch.Tensor, n: int, tries: int, sampling: Sampling) -> np.ndarray:
    """Continuations that transformers draws, [tries, n]."""
    torch.manual_seed(1)
    out = model.generate(
        input_ids=ids[None].expand(tries, -1),
        attention_mask=torch.ones(tries, len(ids), dtype=torch.long),
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=1.0,
        min_new_tokens=n,
        max_new_tokens=n,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, len(ids) :].numpy()


@pytest.mark.parametrize("sampling", [Sampling(1.0, 40), Sampling(0.6, 3), Sampling(1.4, 100)])
def test_the_probability_of_extraction_is_how_often_drawing_gives_the_suffix(tiny_tokenizer, sampling: Sampling):
    model, p, n, tries = trained("llama", 45), 4, 2, 2000
    encoded = encode(concatenate_datasets([records(4, 0), records(2, 1)]), tiny_tokenizer, SPEC)
    scores = score_records(model, encoded, SPEC, tiny_tokenizer, sampling=sampling)
    eligible, log_probability = suffix_log_probability(scores, p, n)
    assert eligible.all()
    windows = [e for e in encoded if e.window == 0]
    for record, example in enumerate(windows):
        ids = torch.tensor(example.input_ids)
        start = example.text_start + p
        found = drawn(model, ids[:start], n, tries, sampling)
        hits = int((found == ids[start : start + n].numpy()).all(axis=1).sum())
        low, high = clopper_pearson(hits, tries, level=0.9999)
        assert low <= np.exp(log_probability[record]) <= high
    middle = np.exp(log_probability)
    assert ((middle > 0.02) & (middle < 0.98)).any()  # not only the easy ends


def test_the_chance_of_any_of_n_tries_is_their_complement(tiny_tokenizer):
    """Blocks of 10 draws: the share of blocks with a hit, where the closed form says 1 - (1 - p)^10."""
    model, p, n, blocks = trained("llama", 45), 4, 2, 200
    encoded = encode(records(6, 0), tiny_tokenizer, SPEC)
    _, log_probability = suffix_log_probability(score_records(model, encoded, SPEC, tiny_tokenizer), p, n)
    record = int(np.argmin(np.abs(np.exp(log_probability) - 0.1)))
    example = encoded[record]
    ids, start = torch.tensor(example.input_ids), example.text_start + p
    found = drawn(model, ids[:start], n, 10 * blocks, Sampling())
    hit = (found == ids[start : start + n].numpy()).all(axis=1).reshape(blocks, 10).any(axis=1)
    low, high = clopper_pearson(int(hit.sum()), blocks, level=0.9999)
    assert low <= extraction_probability(log_probability, 10)[record] <= high
    assert 0.01 < np.exp(log_probability[record]) < 0.6


@given(log_p=st.floats(-700, 0), tries=st.sampled_from([1, 2, 10, 1000, 10**6]))
def test_the_chance_of_extraction_is_exact_at_both_ends(log_p: float, tries: int):
    getcontext().prec = 400
    exact = 1 - (1 - Decimal(log_p).exp()) ** tries
    assert extraction_probability(np.array([log_p]), tries)[0] == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def test_certain_and_impossible_suffixes():
    assert extraction_probability(np.array([0.0, -np.inf, -2000.0]), 10**6).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="tries"):
        extraction_probability(np.zeros(1), 0)


def test_probabilistic_extraction_by_hand():
    """Suffixes of two tokens: 1/2 * 1/2, 1/10 * 1/10, one outside the top k, and one too short."""
    scores = scores_of([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1]])
    each = [np.nan, -9, np.log(0.5), np.log(0.5), np.nan, -9, np.log(0.1), np.log(0.1)]
    scores = replace(scores, sampled=np.array([*each, np.nan, -9, -np.inf, -0.1, np.nan, -0.1], np.float32))
    eligible, log_probability = suffix_log_probability(scores, 2, 2)
    assert eligible.tolist() == [True, True, True, False]
    np.testing.assert_allclose(np.exp(log_probability), [0.25, 0.01, 0.0, 0.0], rtol=1e-6)
    rates = probabilistic_extraction(scores, np.arange(4), 2, 2, [1, 2, 100], [0.2, 0.5, 0.9])
    values = {name: rate.value * 3 for name, rate in rates.items() if isinstance(rate, Measure)}
    # 1 try: 0.25, 0.01. 2 tries: 1 - 0.75^2 = 0.4375, 0.0199. 100 tries: 1, 1 - 0.99^100 = 0.634.
    expected = {"n1_p0.2": 1, "n1_p0.5": 0, "n1_p0.9": 0, "n2_p0.2": 1, "n2_p0.5": 0, "n2_p0.9": 0}
    assert values == pytest.approx(expected | {"n100_p0.2": 2, "n100_p0.5": 2, "n100_p0.9": 1})
    assert {rate.n for rate in rates.values() if isinstance(rate, Measure)} == {3}
    none = probabilistic_extraction(scores, np.arange(4), 9, 9, [1], [0.5])["n1_p0.5"]
    assert isinstance(none, NotApplicable) and "9 + 9" in none.reason
    with pytest.raises(ValueError, match="no sampled"):
        suffix_log_probability(scores_of([[0, 1, 1]]), 1, 1)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(0, 3))
def test_strength_and_exact_memorisation_equal_a_slow_count(firsts: list[list[int]], cut: int):
    firsts = [[0, *f] for f in firsts]
    windows = [max(1, len(f) - cut) for f in firsts]
    scores = scores_of(firsts, windows)
    strengths, shares = [], []
    for first, size in zip(firsts, windows, strict=True):
        k = next(k for k in range(size + 1) if all(first[k:size]))
        strengths.append(1 - k / size)
        shares.append(sum(first) / (len(first) - 1))
    np.testing.assert_allclose(extraction_strength(scores), strengths)
    np.testing.assert_allclose(exact_memorization(scores), shares)
    units = np.arange(len(firsts)) // 2
    figures = strength_figures(scores, units, bootstrap=50)
    strength, exact = figures["extraction_strength"], figures["exact_memorization"]
    assert isinstance(strength, Measure) and isinstance(exact, Measure)
    assert strength.value == pytest.approx(np.mean(strengths))
    total = sum(len(f) - 1 for f in firsts)
    assert (exact.value, exact.n) == (pytest.approx(sum(map(sum, firsts)) / total), total)
    for figure in (strength, exact):
        assert 0 <= figure.low <= figure.value <= figure.high <= 1
        assert figure.low < figure.high


def test_a_text_that_is_known_from_its_first_token_has_full_strength():
    scores = replace(scores_of([[1, 1, 1], [0]]), log_prob=np.array([-1, -1, -1, np.nan], np.float32))
    assert extraction_strength(scores)[0] == exact_memorization(scores)[0] == 1.0
    assert np.isnan(extraction_strength(scores)[1]) and np.isnan(exact_memorization(scores)[1])
    assert isinstance(strength_figures(scores_of([[0]]), np.zeros(1))["extraction_strength"], NotApplicable)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_strength_is_the_shortest_prefix_from_which_generate_writes_the_rest(tiny_tokenizer, kind: tiny_models.Kind):
    model = trained(kind)
    encoded = encode(records(3, 0), tiny_tokenizer, SPEC)
    strength = extraction_strength(score_records(model, encoded, SPEC, tiny_tokenizer))
    for record, example in enumerate(e for e in encoded if e.window == 0):
        ids, size = torch.tensor([example.input_ids]), example.text_end - example.text_start
        k = round((1 - strength[record]) * size)
        for prefix, expected in ((k, True), (k - 1, False)):
            if not 1 <= prefix < size:
                continue
            start = example.text_start + prefix
            out = model.generate(
                input_ids=ids[:, :start],
                attention_mask=torch.ones(1, start, dtype=torch.long),
                do_sample=False,
                min_new_tokens=size - prefix,
                max_new_tokens=size - prefix,
                pad_token_id=tiny_tokenizer.pad_token_id,
                eos_token_id=None,
            )
            assert torch.equal(out[0], ids[0, : example.text_end]) == expected
    assert strength.max() > 0.2


def test_extraction_by_hand():
    scores = scores_of([[0, 0, 1, 1, 0], [0, 1, 1, 0, 1], [0, 1, 1], [0, 0, 1, 1, 1]], [5, 5, 3, 3])
    eligible, extracted = greedy_extraction(scores, 2, 2)
    assert eligible.tolist() == [True, True, False, False]  # too short; cut by its window
    assert extracted.tolist() == [True, False, False, False]
    assert greedy_extraction(scores, 1, 2)[1].tolist() == [False, True, True, False]


def test_the_last_token_counts():
    assert greedy_extraction(scores_of([[0, 1, 1, 0]]), 1, 3)[1].tolist() == [False]
    assert greedy_extraction(scores_of([[0, 1, 1, 1]]), 1, 3)[1].tolist() == [True]


@pytest.mark.parametrize(("p", "n"), [(0, 5), (5, 0), (-1, 1)])
def test_lengths_below_one_are_refused(p: int, n: int):
    with pytest.raises(ValueError, match="1 or more"):
        greedy_extraction(scores_of([[0, 1, 1]]), p, n)


def test_rates_of_all_pairs_with_counts_and_reasons():
    scores = scores_of([[0, 1, 1, 1], [0, 1, 0, 1], [0, 1]])
    rates, counts = extraction_figures(scores, np.array([4, 5, 6]), [1, 3], [1, 9])
    assert list(rates) == ["p1_n1", "p1_n9", "p3_n1", "p3_n9"]
    assert counts["p1_n1"] == {"n_eligible": 3, "n_too_short": 0}
    assert counts["p3_n1"] == {"n_eligible": 2, "n_too_short": 1}
    assert rates["p1_n1"] == Measure(1.0, *wilson(3, 3), 3, "worse")
    assert isinstance(rates["p3_n9"], NotApplicable)
    assert "3 + 9" in rates["p3_n9"].reason


def span(start: int, end: int, kind: str = "NAME", source: str = "known") -> dict:
    return {"start": start, "end": end, "type": kind, "source": source}


def test_identifiers_are_hits_when_every_token_is_right(tiny_tokenizer):
    data = Dataset.from_dict(
        {
            "text": ["x heart lungs", "fever cough", "x heart lungs"],
            "unit": ["a", "b", "a"],
            "record_id": list("012"),
            "identifiers": [
                [span(2, 7), span(8, 13, "MRN", "planted")],
                [span(0, 5)],
                [span(2, 13), span(8, 13, "DATE", "pattern"), span(8, 13, "INDIRECT", "indirect")],
            ],
        }
    )
    encoded = encode(data, tiny_tokenizer, SPEC)
    lengths = [e.text_end - e.text_start for e in encoded]
    firsts = [[0] + [1] * (n - 1) for n in lengths]
    firsts[2][-1] = 0
    hits = identifier_extraction(scores_of(firsts), encoded)
    assert hits.record.tolist() == [0, 0, 2, 2, 2]
    assert hits.unit.tolist() == [0, 0, 0, 0, 0]
    assert hits.type.tolist() == ["NAME", "MRN", "NAME", "DATE", "INDIRECT"]
    assert hits.hit.tolist() == [True, True, False, False, False]
    assert identifier_counts(hits) == {
        "n_identifiers": 5,
        "n_identifiers_not_evaluable": 1,  # "fever" begins its text
        "n_identifier_pieces_cut": 0,
    }
    figures = identifier_figures(hits)
    rate = figures["identifier_extraction_rate"]
    assert isinstance(rate, Measure)
    assert (rate.value, rate.n, rate.higher_is) == (pytest.approx(2 / 3), 3, "worse")  # planted and known only
    by_type = figures["identifier_extraction"]
    assert isinstance(by_type, dict)
    assert {name: rate.value for name, rate in by_type.items()} == {"MRN": 1.0, "NAME": 0.5}
    for name in ("identifier_extraction_pattern", "identifier_extraction_indirect"):
        figure = figures[name]
        assert isinstance(figure, Measure)
        assert (figure.value, figure.n) == (0.0, 1)


def test_an_identifier_cut_by_a_window_is_counted_apart(tiny_tokenizer):
    text = "one heart " * 6
    data = Dataset.from_dict({"text": [text], "unit": ["a"], "record_id": ["0"], "identifiers": [[span(4, len(text))]]})
    encoded = encode(data, tiny_tokenizer, TaskSpec(max_length=12))
    lengths = [e.text_end - e.text_start for e in encoded]
    hits = identifier_extraction(scores_of([[0] + [1] * (sum(lengths) - 1)], lengths[:1]), encoded)
    assert len(hits.hit) == 0
    assert hits.n_cut == len(encoded) > 1


def test_no_identifier_is_a_reason_not_a_rate(tiny_tokenizer):
    data = Dataset.from_dict({"text": ["a b c"], "unit": ["a"], "record_id": ["0"], "identifiers": [[]]})
    encoded = encode(data, tiny_tokenizer, SPEC)
    figures = identifier_figures(identifier_extraction(scores_of([[0] * 5]), encoded))
    assert isinstance(figures["identifier_extraction_rate"], NotApplicable)
    assert figures["identifier_extraction"] == {}


def test_a_trained_model_completes_more_names_of_its_own_records(tiny_tokenizer):
    model = trained("llama")
    rates = []
    for seed in (0, 1):
        encoded = encode(records(12, seed), tiny_tokenizer, SPEC)
        rates.append(identifier_extraction(score_records(model, encoded, SPEC, tiny_tokenizer), encoded).hit.mean())
    assert rates[0] > rates[1] + 0.25
