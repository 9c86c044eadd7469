from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from dpmed.memorization import vocabulary
from dpmed.memorization.vocabulary import RANK_LIMIT, Sampling, TokenStatistics, token_statistics


def slowly(logits: Tensor, targets: Tensor, sampling: Sampling) -> list[tuple[float, ...]]:
    """The definitions, a row and an entry at a time, in float64; transformers says how text is drawn."""
    found = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        log_p = [float(v) for v in row.log_softmax(0)]
        p = np.exp(log_p)
        possible = [i for i in range(len(p)) if p[i] > 0]
        mean = sum(p[i] * log_p[i] for i in possible)
        variance = sum(p[i] * (log_p[i] - mean) ** 2 for i in possible)
        rank = sum(float(v) > float(row[target]) for v in row)
        ids: Any = torch.zeros(1, 1, dtype=torch.int64)  # the warpers ask for a LongTensor
        drawn: Any = TemperatureLogitsWarper(sampling.temperature)(ids, cast(Any, row[None]))
        if sampling.top_k is not None:
            drawn = TopKLogitsWarper(sampling.top_k)(ids, drawn)
        sampled = float(drawn[0].log_softmax(0)[target])
        found.append((log_p[target], float(row.argmax()) == target, rank, mean, variance**0.5, sampled))
    return found


def assert_same(found: TokenStatistics, expected: list[tuple[float, ...]]) -> None:
    log_prob, first, rank, mean, deviation, sampled = (np.array(column) for column in zip(*expected, strict=True))
    np.testing.assert_allclose(found.log_prob, log_prob, atol=1e-4)
    np.testing.assert_array_equal(found.is_argmax, first)
    np.testing.assert_array_equal(found.rank, rank)
    np.testing.assert_allclose(found.mean, mean, atol=1e-4)
    np.testing.assert_allclose(found.deviation, deviation, atol=2e-3)
    np.testing.assert_allclose(found.sampled, sampled, atol=1e-4)


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([3, 63, 64, 65, 700]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    sampling=st.builds(Sampling, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([1, 2, 7, 40, 1000, None])),
    ties=st.booleans(),
)
def test_statistics_equal_their_definitions(seed: int, size: int, spread: float, sampling: Sampling, ties: bool):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, size, generator=generator) * spread
    if ties:  # as bfloat16 has them: several first choices, several k-th ones
        logits = logits.round()
    targets = torch.randint(size, (5,), generator=generator)
    targets[:2] = logits[:2].argmax(dim=1)
    if sampling.top_k is not None:
        sampling = Sampling(sampling.temperature, min(sampling.top_k, size))
    assert_same(token_statistics(logits, targets, sampling), slowly(logits, targets, sampling))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_slices_give_what_the_whole_gives(rows: int, monkeypatch):
    logits, targets = torch.randn(7, 200) * 4, torch.arange(7)
    monkeypatch.setattr(vocabulary, "_SLICE", rows * 200)
    assert_same(token_statistics(logits, targets, Sampling(0.7, 5)), slowly(logits, targets, Sampling(0.7, 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_and_summed_in_float32(dtype: torch.dtype):
    logits = (torch.randn(6, 3000) * 5).to(dtype)
    before, targets = logits.clone(), logits.argmax(dim=1)
    assert_same(token_statistics(logits, targets, Sampling()), slowly(logits.float(), targets, Sampling()))
    assert torch.equal(logits, before)


def test_three_tokens_by_hand():
    # p = (1/2, 1/4, 1/4): log p = -(1, 2, 2) log 2; mean = -(1/2 + 1/2 + 1/2) log 2 = -1.5 log 2;
    # variance = (1/2 (0.5)^2 + 1/4 (0.5)^2 + 1/4 (0.5)^2) log^2 2 = (0.5 log 2)^2.
    # Top 1 keeps token 0 alone; tokens 1 and 2 are equal, so that top 2 keeps all three.
    logits = torch.tensor([[2.0, 1.0, 1.0]]).mul(np.log(2)).expand(3, 3)
    targets, log_2 = torch.arange(3), np.log(2)
    found = token_statistics(logits, targets, Sampling(1.0, 1))
    np.testing.assert_allclose(found.log_prob, [-log_2, -2 * log_2, -2 * log_2], rtol=1e-6)
    np.testing.assert_allclose(found.mean, [-1.5 * log_2] * 3, rtol=1e-6)
    np.testing.assert_allclose(found.deviation, [0.5 * log_2] * 3, rtol=1e-5)
    assert found.rank.tolist() == [0, 1, 1]
    assert found.is_argmax.tolist() == [True, False, False]
    assert found.sampled.tolist() == [0.0, -np.inf, -np.inf]
    np.testing.assert_allclose(token_statistics(logits, targets, Sampling(1.0, 2)).sampled, found.log_prob, rtol=1e-6)
    # Temperature 1/2 squares: (4, 1, 1) / 6.
    cold = token_statistics(logits, targets, Sampling(0.5, None)).sampled
    np.testing.assert_allclose(cold, np.log([4 / 6, 1 / 6, 1 / 6]), rtol=1e-6)


def test_equal_logits_have_one_first_choice_and_no_deviation():
    found = token_statistics(torch.zeros(4, 4), torch.arange(4), Sampling(1.0, 2))
    assert found.is_argmax.tolist() == [True, False, False, False]  # as argmax, and so as generate
    assert found.rank.tolist() == [0, 0, 0, 0]
    assert found.deviation.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(found.sampled, [-np.log(4)] * 4, rtol=1e-6)


def test_impossible_tokens_and_certain_models():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [200.0, 0.0, 0.0]])
    found = token_statistics(logits, torch.tensor([0, 0]), Sampling(1.0, None))
    expected = slowly(logits, torch.tensor([0, 0]), Sampling(1.0, None))
    assert_same(found, expected)
    assert token_statistics(logits[:1], torch.tensor([1]), Sampling()).log_prob[0] == -np.inf


def test_a_rank_beyond_the_limit_is_kept_as_the_limit():
    logits = torch.arange(70_000.0)[None] / 1e4
    found = token_statistics(logits.expand(2, -1), torch.tensor([0, 70_000 - 1 - RANK_LIMIT + 1]), Sampling())
    assert found.rank.tolist() == [RANK_LIMIT, RANK_LIMIT - 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_nan(bad: float):
    logits = torch.zeros(2, 100)
    logits[1, 3] = bad
    found = token_statistics(logits, torch.zeros(2, dtype=torch.int64), Sampling())
    assert np.isnan(found.log_prob).tolist() == [False, True]


def test_tokens_that_were_not_scored_are_marked():
    found = TokenStatistics.empty(2)
    assert np.isnan([found.log_prob, found.mean, found.deviation, found.sampled]).all()
    assert not found.is_argmax.any()
    assert found.rank.tolist() == [RANK_LIMIT] * 2
    assert found.mean is not found.deviation
