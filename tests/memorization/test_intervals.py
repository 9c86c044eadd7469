from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest

from dpmed.memorization.intervals import (
    Measure,
    bootstrap_by_unit,
    bootstrap_ratio,
    clopper_pearson,
    rate_by_unit,
    unit_multiplicities,
    wilson,
)


def test_a_measure_is_plain_json_with_the_contracts_keys():
    measure = Measure(np.float64(0.5), 0.1, math.nan, 4, "worse", {"resolution": 0.25})
    assert json.loads(json.dumps(measure.to_json())) == {
        "value": 0.5,
        "low": 0.1,
        "high": None,
        "n": 4,
        "higher_is": "worse",
        "resolution": 0.25,
    }


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not_applicable"):
        Measure(math.nan, 0.0, 1.0, 3, "worse").to_json()


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (81, 263, 0.25529, 0.36622)],
)
def test_wilson_against_published_values(hits: int, n: int, low: float, high: float):
    assert wilson(hits, n) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.30850), (5, 10, 0.18709, 0.81291), (10, 10, 0.69150, 1.0)]
)
def test_clopper_pearson_against_published_values(hits: int, n: int, low: float, high: float):
    assert clopper_pearson(hits, n) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize("function", [wilson, clopper_pearson])
@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(function, hits: int, n: int):
    with pytest.raises(ValueError, match="no rate"):
        function(hits, n)


def test_one_record_per_patient_gives_wilson():
    measure = rate_by_unit(np.array([True, False, False, True]), np.array([7, 3, 9, 1]), "worse")
    assert (measure.value, measure.n) == (0.5, 4)
    assert (measure.low, measure.high) == wilson(2, 4)


def test_records_that_repeat_their_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    of_patient = rng.random(50) < 0.4
    hits, units = np.repeat(of_patient, 8), np.repeat(np.arange(50), 8)
    clustered = rate_by_unit(hits, units, "worse", bootstrap=2000)
    as_if_independent = wilson(int(hits.sum()), len(hits))
    one_each = wilson(int(of_patient.sum()), 50)
    assert clustered.high - clustered.low > 2 * (as_if_independent[1] - as_if_independent[0])
    assert clustered.high - clustered.low == pytest.approx(one_each[1] - one_each[0], rel=0.15)


@pytest.mark.parametrize(("hit", "expected"), [(False, wilson(0, 5)), (True, wilson(5, 5))])
def test_when_all_agree_the_interval_counts_patients_not_records(hit: bool, expected: tuple[float, float]):
    measure = rate_by_unit(np.full(40, hit), np.repeat(np.arange(5), 8), "worse")
    assert (measure.low, measure.high) == expected
    assert measure.n == 40


def test_patients_of_equal_rates_still_have_an_interval():
    measure = rate_by_unit(np.array([True, False] * 6), np.repeat(np.arange(6), 2), "worse")
    assert (measure.low, measure.high) == wilson(3, 6)


def test_no_case_is_no_rate():
    with pytest.raises(ValueError, match="0 cases"):
        rate_by_unit(np.array([], dtype=bool), np.array([], dtype=int), "worse")


def test_multiplicities_are_draws_of_whole_patients():
    blocks = np.concatenate(list(unit_multiplicities(5, 4000, seed=1)))
    assert blocks.shape == (4000, 5)
    assert np.all(blocks.sum(axis=1) == 5)
    assert blocks.mean() == 1.0
    assert blocks.var() == pytest.approx(5 * 0.2 * 0.8, rel=0.05)  # multinomial


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_draws_are_the_same_however_the_blocks_are_cut(at_once: int):
    one = np.concatenate(list(unit_multiplicities(37, 100, seed=5)))
    np.testing.assert_array_equal(np.concatenate(list(unit_multiplicities(37, 100, 5, at_once))), one)


def test_the_bootstraps_memory_does_not_grow_with_the_records():
    def peak(n: int) -> int:
        values, units = np.ones(n), np.arange(n) // 2
        tracemalloc.start()
        bootstrap_ratio(values, values, units, 300, seed=0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(40_000) < peak(4_000) + 36_000 * 64  # a few numbers per record, not one per record and resample


def test_the_vectorised_bootstrap_agrees_with_the_plain_one():
    rng = np.random.default_rng(3)
    units = rng.integers(40, size=200)
    top, bottom = rng.random(200), 1 + rng.random(200)
    fast = bootstrap_ratio(top, bottom, units, 4000, seed=0)
    plain = bootstrap_by_unit(lambda i: float(top[i].sum() / bottom[i].sum()), units, 4000, seed=1)
    assert fast == pytest.approx(plain, abs=0.006)
    assert fast[0] < top.sum() / bottom.sum() < fast[1]


def test_a_resample_takes_all_records_of_a_drawn_patient():
    units = np.array([2, 0, 2, 1, 2, 0])
    seen: list[np.ndarray] = []
    bootstrap_by_unit(lambda i: seen.append(np.bincount(i, minlength=6)) or 0.0, units, 50, seed=0)
    for counts in seen:
        for unit in range(3):
            assert len(set(counts[units == unit])) == 1
    assert len({tuple(c) for c in seen}) > 5


def test_the_interval_of_a_mean_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        patient = rng.normal(size=60)
        values = np.repeat(patient, 3) + 0.1 * rng.normal(size=180)
        low, high = bootstrap_ratio(values, np.ones(180), np.repeat(np.arange(60), 3), 300, seed=trial)
        covered += low < 0 < high
    assert 0.88 <= covered / 200 <= 0.99
