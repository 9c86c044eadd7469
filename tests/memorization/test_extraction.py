from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

import tiny_models
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.extraction import extraction_figures, greedy_extraction, identifier_extraction
from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.leakage import identifier_counts, identifier_figures
from dpmed.memorization.scoring import pad, score_records
from dpmed.memorization.statistics import TokenScores

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
def trained(kind: tiny_models.Kind) -> Any:
    """A tiny model that has learnt its first 8 records by heart, more or less."""
    tokenizer = tiny_models.make_tokenizer()
    encoded = encode(records(12, seed=0).select(range(8)), tokenizer, SPEC)
    input_ids, attention = map(torch.from_numpy, pad([e for e in encoded if e.window == 0], 0))
    labels = input_ids.masked_fill(attention == 0, -100)
    model = tiny_models.make_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
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
