from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.regurgitation import (
    NEAR_VERBATIM,
    is_near_verbatim,
    longest_common_run,
    mean_by_unit,
    near_verbatim_figures,
    near_verbatim_scores,
    prefix_half_figures,
    regurgitated,
    regurgitation_figures,
)

few_tokens = st.lists(st.integers(0, 3), max_size=14)  # a small vocabulary, so that runs occur
TRUE_TOKENS = list(range(100, 140))


def slow_run(truth: list[int], output: list[int]) -> int:
    runs = (
        n
        for n in range(1, len(truth) + 1)
        for i in range(len(truth) - n + 1)
        for j in range(len(output) - n + 1)
        if truth[i : i + n] == output[j : j + n]
    )
    return max(runs, default=0)


def slow_subsequence(a: list[int], b: list[int]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def slow_distance(a: list[int], b: list[int]) -> int:
    table = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
    for i in range(len(a)):
        for j in range(len(b)):
            change = table[i, j] + (a[i] != b[j])
            table[i + 1, j + 1] = min(change, table[i, j + 1] + 1, table[i + 1, j] + 1)
    return int(table[-1, -1])


@given(few_tokens, few_tokens)
def test_longest_run_and_ngrams_equal_the_slow_truth(truth: list[int], output: list[int]):
    run = slow_run(truth, output)
    assert longest_common_run(truth, output) == run == longest_common_run(np.array(output), np.array(truth))
    for n in range(1, 16):
        assert regurgitated(truth, output, n) == (n <= run)


@given(few_tokens.filter(len), few_tokens)
def test_scores_equal_the_slow_truth_on_an_output_cut_to_the_truth(truth: list[int], output: list[int]):
    scores, cut = near_verbatim_scores(truth, output), output[: len(truth)]
    assert scores["rouge_l"] == pytest.approx(2 * slow_subsequence(truth, cut) / (len(truth) + len(cut)))
    assert scores["edit_distance"] == pytest.approx(slow_distance(truth, cut) / len(truth))
    assert scores["longest_run_share"] == pytest.approx(slow_run(truth, cut) / len(truth))
    assert all(0 <= score <= 1 for score in scores.values())


def test_bleu_is_that_of_the_papers_formula():
    truth, output = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 6]
    matches, totals = [5, 3, 2, 1], [6, 5, 4, 3]
    expected = math.exp(1 - 8 / 6) * math.prod(m / t for m, t in zip(matches, totals, strict=True)) ** 0.25
    assert near_verbatim_scores(truth, output)["bleu"] == pytest.approx(expected)
    # Token 12 is one token, not the tokens 1 and 2: ids are not cut again.
    assert near_verbatim_scores([12, 13, 14, 15], [1, 2, 1, 3])["bleu"] == 0.0


def test_identical_text_has_the_best_scores_and_an_empty_output_the_worst():
    best = {"rouge_l": 1.0, "bleu": 1.0, "edit_distance": 0.0, "longest_run_share": 1.0}
    assert near_verbatim_scores(TRUE_TOKENS, TRUE_TOKENS) == pytest.approx(best)
    assert near_verbatim_scores(TRUE_TOKENS, [*TRUE_TOKENS, 1, 2, 3]) == pytest.approx(best)
    nothing = {"rouge_l": 0.0, "bleu": 0.0, "edit_distance": 1.0, "longest_run_share": 0.0}
    assert near_verbatim_scores(TRUE_TOKENS, []) == nothing
    with pytest.raises(ValueError, match="no true continuation"):
        near_verbatim_scores([], [1])
    with pytest.raises(ValueError, match="at least one token"):
        regurgitated([1], [1], 0)


@pytest.mark.parametrize("name", NEAR_VERBATIM)
def test_the_thresholds_count_from_themselves_on(name: str):
    at = NEAR_VERBATIM[name]
    better, worse = (at + 0.01, at - 0.01) if name == "edit_distance" else (at - 0.01, at + 0.01)
    assert is_near_verbatim(name, np.array([better, at, worse])).tolist() == [False, True, True]


def test_what_stands_in_the_prompt_does_not_count():
    """A model that repeats the prompt has regurgitated nothing of the continuation."""
    prompt, continuation = list(range(50)), list(range(50, 120))
    assert not regurgitated(continuation, prompt, 30)
    assert longest_common_run(continuation, prompt) == 0
    assert regurgitated(continuation, [7, *continuation[20:50], 7], 30)
    assert not regurgitated(continuation, [7, *continuation[20:49], 7], 30)


def test_rates_count_empty_outputs_and_leave_out_only_what_is_too_short():
    long, short = TRUE_TOKENS, TRUE_TOKENS[:10]
    truths, outputs = [long, long, long, short], [long, [], long[:9], short]
    figures = regurgitation_figures(truths, outputs, np.arange(4), [10, 20, 60])
    ten, twenty = figures["n10"], figures["n20"]
    assert isinstance(ten, Measure) and isinstance(twenty, Measure)
    assert (ten.value, ten.n, ten.higher_is) == (0.5, 4, "worse")
    assert (twenty.value, twenty.n) == (pytest.approx(1 / 3), 3)
    assert (ten.low, ten.high) == wilson(2, 4)
    assert isinstance(figures["n60"], NotApplicable)


def test_intervals_are_over_patients_not_records():
    """Twenty records of two patients are two cases, not twenty."""
    truths = [TRUE_TOKENS] * 20
    outputs = [TRUE_TOKENS] * 10 + [[]] * 10
    by_patient = near_verbatim_figures(truths, outputs, np.arange(20) // 10)
    by_record = near_verbatim_figures(truths, outputs, np.arange(20))
    for name in ("rouge_l", "rouge_l_rate"):
        wide, narrow = by_patient[name], by_record[name]
        assert isinstance(wide, Measure) and isinstance(narrow, Measure)
        assert wide.value == narrow.value == 0.5
        assert (wide.low, wide.high) == (0.0, 1.0)
        assert 0.2 < narrow.low < narrow.high < 0.8


def test_means_have_an_interval_also_where_all_agree():
    nothing = mean_by_unit(np.zeros(10), np.arange(10), "worse")
    assert (nothing.low, nothing.high) == wilson(0, 10)
    unbounded = mean_by_unit(np.full(10, 7.0), np.arange(10), "worse")
    assert unbounded.value == 7 and math.isnan(unbounded.low) and unbounded.to_json()["low"] is None
    drawn = mean_by_unit(np.arange(50.0), np.arange(50), "worse")
    assert drawn.low < 24.5 < drawn.high and drawn.high - drawn.low < 12


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 4))
def test_no_interval_misses_its_own_mean(values: list[float], seed: int, per_unit: int):
    figure = mean_by_unit(np.array(values), np.arange(len(values)) // per_unit, "worse", 20, seed)
    assert not figure.low > figure.value and not figure.high < figure.value  # NaN is no bound


def test_halves_give_the_longest_ngram_and_its_share():
    truths = [TRUE_TOKENS[:8], TRUE_TOKENS[:4]]
    outputs = [[0, 1, *TRUE_TOKENS[:4], 9, 9], [9, 9, 9, 9, *TRUE_TOKENS[:4]]]  # the second is right too late
    figures = prefix_half_figures(truths, outputs, np.arange(2))
    run, share = figures["longest_ngram"], figures["longest_ngram_share"]
    assert isinstance(run, Measure) and isinstance(share, Measure)
    assert (run.value, share.value, run.n) == (2.0, 0.25, 2)


def test_nothing_to_test_is_a_reason_not_a_rate():
    for figures in (near_verbatim_figures([], [], np.array([])), prefix_half_figures([], [], np.array([]))):
        assert figures and all(isinstance(figure, NotApplicable) for figure in figures.values())
