"""Epsilon against published figures and closed forms; runs compose; calibration never adds too little noise."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import accounting
from dpmed.privacy.accounting import (
    EpsilonReport,
    calibrate,
    check_agreement,
    composed_curve,
    composed_epsilon,
    epsilon,
    epsilon_curve,
)
from dpmed.privacy.prv import opacus_accountant

N_UNITS, BATCH = 22_000, 256
RATE, STEPS = BATCH / N_UNITS, math.ceil(N_UNITS / BATCH) * 10


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of a Gaussian mechanism with sensitivity / sigma = mu (Balle and Wang 2018)."""

    def excess(eps: float) -> float:
        spent = stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)
        return float(spent) - delta

    return float(optimize.brentq(excess, 0.0, 100.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("noise_multiplier", "expected"), [(1.50, 1.0), (0.56, 9.9)])
def test_reference_figures(noise_multiplier, expected):
    report = epsilon(noise_multiplier=noise_multiplier, sampling_rate=RATE, n_steps=STEPS, delta=1e-5)
    assert report.epsilon_pld == pytest.approx(expected, rel=0.01)
    assert report.epsilon_prv == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("noise_multiplier", "n_steps"), [(1.0, 1), (3.0, 4), (20.0, 100)])
def test_without_subsampling_epsilon_is_that_of_the_gaussian_mechanism(noise_multiplier, n_steps):
    exact = gaussian_epsilon(math.sqrt(n_steps) / noise_multiplier, 1e-5)
    report = epsilon(noise_multiplier=noise_multiplier, sampling_rate=1.0, n_steps=n_steps, delta=1e-5)
    assert exact * 0.9999 <= report.epsilon_pld <= exact * 1.002
    assert exact <= report.epsilon <= exact * 1.02


def test_the_larger_of_the_two_accountants_is_reported(monkeypatch):
    accounting._epsilon.cache_clear()
    for factor in (0.99, 1.01):
        monkeypatch.setattr(accounting, "prv_epsilon", lambda *_, factor=factor, **__: (factor * 1.00133, None))
        report = epsilon(noise_multiplier=1.5, sampling_rate=RATE, n_steps=STEPS, delta=1e-5)
        assert report.epsilon_prv is not None
        assert report.epsilon == max(report.epsilon_pld, report.epsilon_prv)
        assert report.epsilon_pld != report.epsilon_prv
        accounting._epsilon.cache_clear()


def test_epsilon_falls_with_noise_and_grows_with_steps_and_rate():
    def spent(noise_multiplier: float = 1.0, sampling_rate: float = 0.02, n_steps: int = 200) -> float:
        return epsilon(
            noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, n_steps=n_steps, delta=1e-5
        ).epsilon

    assert spent(noise_multiplier=1.1) < spent() < spent(n_steps=201)
    assert spent() < spent(sampling_rate=0.021)


def test_no_steps_cost_nothing_even_without_noise():
    assert epsilon(noise_multiplier=0.0, sampling_rate=0.1, n_steps=0, delta=1e-5) == EpsilonReport(0.0, 0.0, 0.0)


def test_no_noise_is_infinite():
    assert epsilon(noise_multiplier=0.0, sampling_rate=0.1, n_steps=1, delta=1e-5).epsilon == math.inf


def test_a_delta_beyond_floating_point_is_infinite_not_wrong():
    report = epsilon(noise_multiplier=1.0, sampling_rate=0.01, n_steps=100, delta=1e-19)
    assert report.epsilon == math.inf
    assert report.epsilon_prv is None and report.prv_note is not None


def test_where_prv_would_need_too_much_memory_pld_stands_and_says_why():
    report = epsilon(noise_multiplier=0.02, sampling_rate=0.5, n_steps=100, delta=1e-5)
    assert report.epsilon_prv is None
    assert report.epsilon == report.epsilon_pld > 1000
    assert "mesh" in str(report.prv_note)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (RuntimeError("Cannot compute epsilon"), "Cannot compute epsilon"),
        (MemoryError(), "MemoryError"),
        (math.nan, "gave nan"),
        (math.inf, "gave inf"),
    ],
)
def test_a_fault_inside_prv_is_reported_not_raised(monkeypatch, outcome, reason):
    def fail(*args: object, **kwargs: object) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    accounting._epsilon.cache_clear()
    monkeypatch.setattr(opacus_accountant(), "get_epsilon", fail)
    report = epsilon(noise_multiplier=1.5, sampling_rate=RATE, n_steps=STEPS, delta=1e-5)
    accounting._epsilon.cache_clear()
    assert report.epsilon == report.epsilon_pld
    assert reason in str(report.prv_note)


def test_disagreeing_accountants_stop_the_run_and_both_are_named(monkeypatch):
    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "prv_epsilon", lambda *_, **__: (0.5, None))
    with pytest.raises(PrivacyError, match=r"1\.00\d\d.*0\.5000"):
        epsilon(noise_multiplier=1.5, sampling_rate=RATE, n_steps=STEPS, delta=1e-5)


def test_agreement_tolerates_two_percent_and_the_stated_error_only():
    check_agreement(epsilon_pld=1.0, epsilon_prv=1.03, eps_error=0.01)
    check_agreement(epsilon_pld=0.001, epsilon_prv=0.003, eps_error=0.001)
    for wrong in (1.05, 0.95, math.nan):
        with pytest.raises(PrivacyError, match="disagree"):
            check_agreement(epsilon_pld=1.0, epsilon_prv=wrong, eps_error=0.01)


@pytest.mark.parametrize("target", [0.5, 8.0, 50.0])
def test_calibrated_noise_meets_the_target_and_is_the_smallest_that_does(target):
    run = {"sampling_rate": 32 / 400, "n_steps": 39, "delta": 400**-1.1}
    noise_multiplier = calibrate(target_epsilon=target, **run)
    assert epsilon(noise_multiplier=noise_multiplier, **run).epsilon <= target
    assert epsilon(noise_multiplier=noise_multiplier / 1.001, **run).epsilon > target


@pytest.mark.parametrize(("target", "expected"), [(1.0, 1.50), (10.0, 0.56)])
def test_calibration_of_the_reference_run(target, expected):
    noise_multiplier = calibrate(target_epsilon=target, delta=1e-5, sampling_rate=RATE, n_steps=STEPS)
    assert noise_multiplier == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("target", [0.1, 1.0, 50.0])
@pytest.mark.parametrize(("rate", "n_steps"), [(0.001, 30), (0.03, 2_000), (1.0, 300)])
def test_calibration_far_from_the_usual(target, rate, n_steps):
    run = {"sampling_rate": rate, "n_steps": n_steps, "delta": 1e-6}
    noise_multiplier = calibrate(target_epsilon=target, **run)
    assert epsilon(noise_multiplier=noise_multiplier, **run).epsilon <= target
    assert epsilon(noise_multiplier=noise_multiplier / 1.001, **run).epsilon > target


@pytest.mark.parametrize("distance", [-0.05, 0.0, 0.05])
def test_calibration_holds_however_far_prv_stands_from_pld(monkeypatch, distance):
    def moved(history: list[tuple[float, float, int]], *, delta: float, **_: float) -> tuple[float, None]:
        return accounting._pld_epsilon(tuple(history), delta) * (1 + distance), None

    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "prv_epsilon", moved)
    monkeypatch.setattr(accounting, "DISAGREEMENT", 0.1)
    run = {"sampling_rate": 0.05, "n_steps": 100, "delta": 1e-5}
    noise_multiplier = calibrate(target_epsilon=3.0, **run)
    assert epsilon(noise_multiplier=noise_multiplier, **run).epsilon <= 3.0
    assert epsilon(noise_multiplier=noise_multiplier / 1.001, **run).epsilon > 3.0
    accounting._epsilon.cache_clear()


def test_calibration_asks_prv_at_most_twice(monkeypatch):
    asked: list[float] = []
    real = accounting.prv_epsilon

    def counted(history: list[tuple[float, float, int]], **values: float) -> tuple[float | None, str | None]:
        asked.append(history[0][0])
        return real(history, **values)

    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "prv_epsilon", counted)
    calibrate(target_epsilon=8.0, delta=1e-5, sampling_rate=RATE, n_steps=859)
    assert 1 <= len(asked) <= 2


def test_targets_out_of_reach_are_refused_with_a_remedy():
    with pytest.raises(InputError, match="raise it or delta"):
        calibrate(target_epsilon=1e-4, delta=1e-5, sampling_rate=0.1, n_steps=10)
    with pytest.raises(InputError, match="protects nobody"):
        calibrate(target_epsilon=1e6, delta=1e-5, sampling_rate=0.1, n_steps=10)


def test_the_curve_gives_epsilon_for_every_delta():
    deltas = [1e-7, 1e-5, 1e-3]
    curve = epsilon_curve(noise_multiplier=1.5, sampling_rate=RATE, n_steps=STEPS, deltas=deltas)
    assert [delta for delta, _ in curve] == deltas
    values = [value for _, value in curve]
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(1.0, rel=0.01)


def test_edges_of_the_curve():
    run = {"sampling_rate": 0.1, "deltas": [1e-5]}
    assert epsilon_curve(noise_multiplier=0.0, n_steps=5, **run) == [(1e-5, math.inf)]
    assert epsilon_curve(noise_multiplier=1.0, n_steps=0, **run) == [(1e-5, 0.0)]
    assert epsilon_curve(noise_multiplier=1.0, sampling_rate=0.1, n_steps=5, deltas=[]) == []


def spent(*history: tuple[float, float, int], delta: float = 1e-5) -> float:
    return composed_epsilon(history, delta=delta).epsilon


def test_nothing_run_costs_nothing_whatever_the_noise():
    assert composed_epsilon([], delta=1e-5) == EpsilonReport(0.0, 0.0, 0.0)
    assert composed_epsilon([(0.0, 0.1, 0), (1.0, 1.0, 0)], delta=1e-5) == EpsilonReport(0.0, 0.0, 0.0)
    assert composed_curve([(0.0, 0.1, 0)], deltas=[1e-5]) == [(1e-5, 0.0)]


def test_one_run_without_noise_makes_all_infinite():
    assert spent((2.0, 0.1, 10), (0.0, 0.001, 1)) == math.inf
    assert composed_curve([(2.0, 0.1, 10), (0.0, 0.001, 1)], deltas=[1e-5]) == [(1e-5, math.inf)]
    assert spent((2.0, 0.1, 10), (0.0, 0.1, 0)) == spent((2.0, 0.1, 10))


def test_order_and_cuts_are_without_influence():
    whole = spent((1.5, 0.02, 100), (0.9, 0.01, 50))
    assert whole == spent((0.9, 0.01, 50), (1.5, 0.02, 100))
    assert whole == spent((1.5, 0.02, 30), (0.9, 0.01, 20), (1.5, 0.02, 70), (0.9, 0.01, 30), (3.0, 0.1, 0))


noises, rates, counts = st.floats(0.6, 5.0), st.floats(0.001, 0.2), st.integers(1, 400)


@settings(max_examples=8, deadline=None)
@given(sigma=noises, rate=rates, first=counts, more=counts)
def test_two_parts_of_a_run_cost_what_the_whole_costs(sigma, rate, first, more):
    parts = spent((sigma, rate, first), (sigma, rate, more))
    assert parts == spent((sigma, rate, first + more))
    # a noise that differs in the tenth digit is not merged: the same number by real composition
    apart = composed_epsilon([(sigma, rate, first), (sigma * (1 + 1e-10), rate, more)], delta=1e-5)
    assert apart.epsilon == pytest.approx(parts, rel=2e-3, abs=1e-4)
    assert apart.epsilon_prv is not None


@settings(max_examples=8, deadline=None)
@given(one=st.tuples(noises, rates, counts), other=st.tuples(noises, rates, counts))
def test_two_mechanisms_cost_more_than_each_and_less_than_their_sum(one, other):
    both = spent(one, other)
    assert both >= max(spent(one), spent(other)) * (1 - 1e-4)
    assert both <= spent(one, delta=5e-6) + spent(other, delta=5e-6) + 1e-4
    assert composed_curve([one, other], deltas=[1e-5])[0][1] <= both * (1 + 1e-4)


@settings(max_examples=8, deadline=None)
@given(history=st.lists(st.tuples(noises, rates, counts), min_size=1, max_size=3), more=st.integers(1, 100))
def test_epsilon_never_falls_as_steps_are_added(history, more):
    (sigma, rate, n_steps), *rest = history
    longer = [(sigma, rate, n_steps + more), *rest]
    # PLD's mesh follows epsilon, so its rounding moves by some 1e-5 of it
    assert spent(*longer) >= spent(*history) * (1 - 5e-5)


def test_full_batch_gaussians_compose_in_squares():
    report = composed_epsilon([(3.0, 1.0, 4), (5.0, 1.0, 10)], delta=1e-5)
    exact = gaussian_epsilon(math.sqrt(4 / 9 + 10 / 25), 1e-5)
    assert exact * 0.9999 <= report.epsilon_pld <= exact * 1.002
    assert report.epsilon_prv is not None and exact <= report.epsilon_prv <= exact * 1.02


GOOD = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "n_steps": 10, "delta": 1e-5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -0.1),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.0001),
        ("sampling_rate", math.nan),
        ("n_steps", -1),
        ("n_steps", 1.5),
        ("n_steps", math.nan),
        ("n_steps", math.inf),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        epsilon(**{**GOOD, name: value})
    run = {**GOOD, name: value}
    mechanism = (run["noise_multiplier"], run["sampling_rate"], run["n_steps"])
    with pytest.raises(InputError, match=name):
        composed_epsilon([(1.0, 0.1, 5), mechanism], delta=run["delta"])
    curve = {key: each for key, each in run.items() if key != "delta"}
    with pytest.raises(InputError, match=name):
        epsilon_curve(**curve, deltas=[value if name == "delta" else 1e-5])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_epsilon", 0.0),
        ("target_epsilon", -1.0),
        ("target_epsilon", math.nan),
        ("target_epsilon", math.inf),
        ("delta", 1.0),
        ("sampling_rate", 1.5),
        ("n_steps", 0),
    ],
)
def test_calibration_refuses_values_out_of_range_by_name(name, value):
    good = {"target_epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.1, "n_steps": 10}
    with pytest.raises(InputError, match=name):
        calibrate(**{**good, name: value})


def test_no_warning_or_log_line_reaches_the_user(caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        epsilon(noise_multiplier=20.0, sampling_rate=1.0, n_steps=7, delta=1e-5)
        epsilon(noise_multiplier=0.945, sampling_rate=0.08, n_steps=39, delta=1e-3)
    assert not caplog.records


def test_calibrating_loads_no_torch():
    code = (
        "import sys; from dpmed.privacy.accounting import calibrate;"
        "calibrate(target_epsilon=8.0, delta=1e-3, sampling_rate=0.1, n_steps=10);"
        "print(sorted({'torch', 'opacus'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_importing_plan_and_accounting_loads_nothing_heavy():
    code = (
        "import sys, dpmed.privacy.plan, dpmed.privacy.accounting;"
        "print(sorted({'torch', 'numpy', 'scipy', 'opacus', 'dp_accounting'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
