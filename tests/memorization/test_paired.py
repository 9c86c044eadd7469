from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.paired import (
    Cases,
    Outcomes,
    paired_differences,
    paired_mean_difference,
    paired_rate_difference,
)

CASES = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p: the chance, at a fair coin, of all splits that are no likelier than this one."""
    n = only_first + only_second
    chances = np.asarray(binom.pmf(np.arange(n + 1), n, 0.5))
    return float(chances[chances <= chances[only_first] * (1 + 1e-9)].sum())


@given(CASES)
def test_difference_counts_and_symmetry(cases: list[tuple[bool, bool, int]]) -> None:
    first, second, units = (np.array(column) for column in zip(*cases, strict=True))
    found = paired_rate_difference(first, second, units, "worse", bootstrap=50)
    swapped = paired_rate_difference(second, first, units, "worse", bootstrap=50)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert -1 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1
    assert (found.value, found.low, found.high) == pytest.approx((-swapped.value, -swapped.high, -swapped.low))
    assert found.extra["p_value"] == pytest.approx(swapped.extra["p_value"])
    assert found.extra["n_only_first"] == sum(a and not b for a, b, _ in cases)
    assert found.extra["n_only_second"] == sum(b and not a for a, b, _ in cases)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_one_case_a_unit_is_mcnemar(cases: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(column) for column in zip(*cases, strict=True))
    found = paired_rate_difference(first, second, np.arange(len(cases)), "better", bootstrap=10)
    assert found.extra["test"] == "exact McNemar"
    assert found.extra["p_value"] == pytest.approx(mcnemar((first & ~second).sum(), (second & ~first).sum()))


@given(CASES, st.integers(2, 4))
def test_copies_of_a_patients_records_prove_nothing(cases: list[tuple[bool, bool, int]], copies: int) -> None:
    first, second, units = (np.array(column) for column in zip(*cases, strict=True))
    once = paired_rate_difference(first, second, units, "worse", bootstrap=50)
    first, second, units = (np.tile(column, copies) for column in (first, second, units))
    more = paired_rate_difference(first, second, units, "worse", bootstrap=50)
    assert more.extra["p_value"] == once.extra["p_value"]
    assert (more.value, more.low, more.high) == pytest.approx((once.value, once.low, once.high))


def test_p_by_hand() -> None:
    first, second = np.array([1, 1, 1, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 0, 1, 1])
    found = paired_rate_difference(first, second, np.arange(7), "worse")
    assert found.extra["p_value"] == pytest.approx(14 / 64)  # 1 + 6 + 6 + 1 of 2**6


def test_models_that_agree_on_everything_keep_an_interval() -> None:
    flags = np.array([True] * 10 + [False] * 20)
    found = paired_rate_difference(flags, flags, np.arange(30), "worse")
    low, high = wilson(0, 30)
    assert low == 0
    assert (found.value, found.low, found.high) == pytest.approx((0, -high, high))
    assert found.extra["p_value"] == 1.0


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    second = rng.random(300) < 0.5
    first = second | (rng.random(300) < 0.05)  # the same records are easy for both
    found = paired_rate_difference(first, second, np.arange(300), "worse")
    assert 0 < found.low < found.value < found.high
    single = wilson(float(first.sum()), 300)
    assert found.high - found.low < 0.6 * (single[1] - single[0])


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    ease = (np.arange(10_000) + 0.5) / 10_000
    truth = float((norm.cdf((ease - 0.5) / 0.3) - norm.cdf((ease - 0.7) / 0.3)).mean())
    for trial in range(200):
        easy = np.repeat(rng.random(60), 2)  # records of one patient are alike
        first, second = easy + rng.normal(0, 0.3, 120) > 0.5, easy + rng.normal(0, 0.3, 120) > 0.7
        found = paired_rate_difference(first, second, np.arange(120) // 2, "worse", bootstrap=200, seed=trial)
        covered += found.low <= truth <= found.high
    assert 180 <= covered < 200  # 190 expected; an interval that is always right is too wide


def test_few_patients_that_differ_one_way_do_not_rule_out_the_other() -> None:
    second = np.array([True, False, False, False, False])  # of five patients one is a success of the second model alone
    found = paired_rate_difference(np.zeros(5, bool), second, np.arange(5), "worse")
    assert found.value == pytest.approx(-0.2)
    assert found.high > 0.2  # resamples alone say 0: no patient of these differs the other way
    none = paired_rate_difference(np.zeros(300, bool), np.zeros(300, bool), np.arange(300), "worse")
    one = paired_rate_difference(np.arange(300) == 0, np.zeros(300, bool), np.arange(300), "worse")
    assert one.high > none.high  # one leak is no better evidence than none


def test_the_upper_limit_holds_where_few_differ() -> None:
    rng, missed, share = np.random.default_rng(2), 0, 0.035
    for _ in range(300):
        first = rng.random(100) < share
        missed += (
            paired_rate_difference(first, np.zeros(100, bool), np.arange(100), "worse", bootstrap=200).high < share
        )
    assert missed <= 0.06 * 300  # 7 or 8 expected; resamples alone miss it in more than 10 of 100


def test_mean_difference_by_hand_with_weights_and_gaps() -> None:
    first, second = np.array([3.0, 1.0, np.nan, 5.0]), np.array([1.0, 2.0, 9.0, np.inf])
    found = paired_mean_difference(first, second, np.arange(4), "worse", weights=np.array([1.0, 3.0, 9.0, 9.0]))
    assert isinstance(found, Measure)
    assert (found.value, found.n, found.extra["n_left_out"]) == (pytest.approx(-0.25), 2, 2)
    assert found.low == pytest.approx(-1.0) and found.high == pytest.approx(2.0)


def test_mean_difference_without_anything_to_compare() -> None:
    nothing = paired_mean_difference(np.array([np.nan]), np.array([1.0]), np.array([0]), "worse")
    assert isinstance(nothing, NotApplicable)
    one = paired_mean_difference(np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.array([0, 0]), "worse")
    assert isinstance(one, Measure)
    assert one.value == 1.5 and math.isnan(one.low)
    assert one.to_json()["low"] is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=30))
def test_mean_difference_is_one_mean_of_differences(cases: list[tuple[float, float, int]]) -> None:
    first, second, units = (np.array(column) for column in zip(*cases, strict=True))
    found = paired_mean_difference(first, second, units, "better", bootstrap=50)
    assert isinstance(found, Measure)
    assert found.value == pytest.approx(sum(a - b for a, b, _ in cases) / len(cases), abs=1e-9)
    shifted = paired_mean_difference(first + 7, second + 7, units, "better", bootstrap=50)
    assert isinstance(shifted, Measure)
    assert shifted.value == pytest.approx(found.value, abs=1e-9)


@pytest.mark.parametrize(("first", "second", "units"), [([], [], []), ([1], [1, 0], [0]), ([1], [1], [0, 1])])
def test_cases_that_do_not_pair_are_refused(first: list[int], second: list[int], units: list[int]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_rate_difference(np.array(first), np.array(second), np.array(units), "worse")


def test_weights_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="weights"):
        paired_mean_difference(np.ones(2), np.zeros(2), np.arange(2), "worse", weights=np.array([1.0, -1.0]))


def test_a_tree_of_figures_is_compared_leaf_by_leaf() -> None:
    """Leaks of the same values: of one patient with two values and of three with one; and leaks per 1,000 samples."""
    units = np.array([0, 0, 1, 2, 3])
    leaked, before = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 1, 0, 0], bool)
    counts = np.array([2.0, 0.0, 1.0])

    def tree(hits: np.ndarray, counts: np.ndarray) -> Outcomes:
        nothing = Cases(np.empty(0, bool), np.empty(0, np.int64), "worse")
        per_1000 = Cases(1000 * counts, np.arange(3), "worse")
        context = {"rate": Cases(hits, units, "worse"), "per_1000_samples": per_1000, "5+": nothing}
        return {"context": context, "free": NotApplicable("no budget")}

    found = paired_differences(tree(leaked, counts), tree(before, 0 * counts), bootstrap=200)
    rate = found["context"]["rate"]
    assert rate == paired_rate_difference(leaked, before, units, "worse", bootstrap=200)
    assert rate.value == pytest.approx(0.4) and rate.n == 5
    assert found["context"]["per_1000_samples"].value == pytest.approx(1000)
    assert found["context"]["per_1000_samples"].low < 1000 < found["context"]["per_1000_samples"].high
    assert found["context"]["5+"] == NotApplicable("no case was tested")
    assert found["free"] == NotApplicable("no budget")


def test_figures_of_other_cases_are_not_compared() -> None:
    def tree(name: str, units: list[int], dtype: type = bool) -> Outcomes:
        return {name: Cases(np.zeros(len(units), dtype), np.array(units), "worse")}

    for other in (tree("b", [0, 1]), tree("a", [0, 2]), tree("a", [0]), tree("a", [0, 1], float)):
        with pytest.raises(ValueError, match="not the same ones"):
            paired_differences(tree("a", [0, 1]), other)
    with pytest.raises(ValueError, match="a is a figure of one model"):
        paired_differences(tree("a", [0, 1]), {"a": {}})
