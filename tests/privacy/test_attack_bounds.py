"""Bounds on attacks against closed forms of the Gaussian mechanism, and against attacks that are really run."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dpmed.errors import InputError
from dpmed.privacy import attack_bounds as module
from dpmed.privacy.accounting import composed_epsilon
from dpmed.privacy.attack_bounds import AttackBounds, attack_bounds

FPRS = (1e-4, 0.001, 0.01, 0.1, 0.5, 0.9)
REFERENCE = [(1.5, 256 / 22_000, 860)]


def assert_those_of_a_gaussian(bounds: AttackBounds, mu: float) -> None:
    truth = {"mu": mu, "advantage": 2 * norm.cdf(mu / 2) - 1}
    truth |= {str(fpr): norm.cdf(norm.ppf(fpr) + mu) for fpr in bounds.tpr_at_fpr}
    found = {"mu": bounds.gdp_mu, "advantage": bounds.advantage}
    found |= {str(fpr): tpr for fpr, tpr in bounds.tpr_at_fpr.items()}
    for name, true in truth.items():
        assert true - 1e-6 <= found[name] <= true * 1.01 + 1e-6, name


@pytest.mark.parametrize(
    ("noise_multiplier", "n_steps"), [(0.3, 1), (1.0, 1), (5.0, 1), (50.0, 1), (3.0, 9), (10.0, 100), (100.0, 10_000)]
)
def test_full_batches_are_the_gaussian_mechanism(noise_multiplier, n_steps):
    bounds = attack_bounds([(noise_multiplier, 1.0, n_steps)], fprs=FPRS)
    assert_those_of_a_gaussian(bounds, math.sqrt(n_steps) / noise_multiplier)


def test_several_full_batch_runs_add_up_in_squares():
    bounds = attack_bounds([(2.0, 1.0, 1), (5.0, 1.0, 4), (2.0, 1.0, 2)], fprs=FPRS)
    assert_those_of_a_gaussian(bounds, math.sqrt(3 / 4 + 4 / 25))


@pytest.mark.parametrize("fault", ["optimistic", "coarse"])
def test_a_profile_that_is_wrong_is_seen(monkeypatch, fault):
    right = module._privacy_profile

    def wrong(accountant: object) -> tuple[np.ndarray, np.ndarray]:
        epsilons, deltas = right(accountant)
        return (epsilons, deltas * 0.99) if fault == "optimistic" else (epsilons[::500], deltas[::500])

    monkeypatch.setattr(module, "_privacy_profile", wrong)
    with pytest.raises(AssertionError):
        assert_those_of_a_gaussian(attack_bounds([(1.0, 1.0, 1)], fprs=FPRS), 1.0)


def test_no_attack_on_a_poisson_sampled_run_beats_the_bounds():
    # One unit with a gradient of norm C against none, the worst case; the attacker sees every noised sum and holds the
    # exact likelihood ratio, which no attack can better (Neyman and Pearson).
    sigma, rate, n_steps, n_runs = 0.8, 0.1, 50, 100_000
    rng = np.random.default_rng(0)
    scores = []
    for member in (False, True):
        score = np.zeros(n_runs)
        for _ in range(n_steps):
            drawn = (rng.random(n_runs) < rate) if member else np.zeros(n_runs, dtype=bool)
            seen = drawn + sigma * rng.standard_normal(n_runs)
            score += np.log1p(rate * np.expm1((seen - 0.5) / sigma**2))
        scores.append(score)
    bounds = attack_bounds([(sigma, rate, n_steps)], fprs=(0.01, 0.1))
    for fpr, bound in bounds.tpr_at_fpr.items():
        hits = int((scores[1] > np.quantile(scores[0], 1 - fpr)).sum())
        assert hits <= binom.ppf(1 - 1e-9, n_runs, bound) * 1.02  # 2 %: the threshold is an estimate too
        assert hits >= 0.9 * bound * n_runs  # and the bound is not loose
    advantage = max((scores[1] > t).mean() - (scores[0] > t).mean() for t in np.linspace(-2, 4, 61))
    assert 0.95 * bounds.advantage < advantage < bounds.advantage + 0.01


def test_the_profile_of_mu_is_never_below_the_run_s():
    mu = attack_bounds(REFERENCE).gdp_mu
    for delta in (1e-8, 1e-6, 1e-4, 1e-2):
        spent = composed_epsilon(REFERENCE, delta=delta).epsilon_pld
        gaussian = float(module._gaussian_delta(np.array([spent]), np.array([mu]))[0])
        assert gaussian >= delta * (1 - 1e-3)


histories = st.lists(
    st.tuples(st.floats(0.5, 10.0), st.floats(0.001, 1.0), st.integers(1, 200)), min_size=1, max_size=2
)


@settings(max_examples=6, deadline=None)
@given(history=histories, more=st.integers(1, 100), quieter=st.floats(1.05, 3.0))
def test_bounds_grow_with_steps_and_shrink_with_noise(history, more, quieter):
    (sigma, rate, n_steps), *rest = history
    fewer, longer, calmer = (
        numbers(attack_bounds([run, *rest]))
        for run in ((sigma, rate, n_steps), (sigma, rate, n_steps + more), (sigma * quieter, rate, n_steps))
    )
    assert (longer >= fewer * (1 - 1e-4)).all()
    assert (calmer <= fewer * (1 + 1e-4)).all()


def numbers(bounds: AttackBounds) -> np.ndarray:
    return np.array([bounds.advantage, *bounds.tpr_at_fpr.values(), bounds.gdp_mu])


def test_bounds_lie_between_a_coin_and_certainty_and_rise_with_the_fpr():
    bounds = attack_bounds(REFERENCE, fprs=(0.0, 1e-5, 0.01, 0.3, 1.0))
    tprs = list(bounds.tpr_at_fpr.values())
    assert tprs == sorted(tprs) and tprs[-1] == 1.0
    assert all(fpr <= tpr <= min(1.0, fpr + bounds.advantage) for fpr, tpr in bounds.tpr_at_fpr.items())


@pytest.mark.parametrize("history", [[], [(0.0, 0.5, 0)]])
def test_nothing_run_leaves_a_coin(history):
    assert attack_bounds(history, fprs=(0.01, 0.5)) == AttackBounds(0.0, {0.01: 0.01, 0.5: 0.5}, 0.0)


def test_without_noise_nothing_is_bounded():
    bounds = attack_bounds([(1.0, 0.1, 5), (0.0, 0.001, 1)])
    assert bounds == AttackBounds(1.0, {0.01: 1.0}, math.inf)
    assert json.loads(json.dumps(bounds.to_dict(), allow_nan=False))["gdp_mu"] is None


@pytest.mark.parametrize("history", [[(0.02, 1.0, 100)], [(0.02, 0.5, 100)], [(0.05, 0.01, 10)]])
def test_hardly_any_noise_gives_bounds_and_no_fault(history):
    bounds = attack_bounds(history)
    assert 0 < bounds.advantage <= 1 and 0.01 < bounds.tpr_at_fpr[0.01] <= 1 and bounds.gdp_mu > 1


def test_an_advantage_below_the_floor_still_has_a_mu():
    bounds = attack_bounds([(1e5, 1e-4, 1)])
    assert 0 <= bounds.advantage < 1e-8 and 0 <= bounds.gdp_mu < 1e-7


def test_the_result_is_json():
    content = json.loads(json.dumps(attack_bounds(REFERENCE, fprs=(0.001, 0.01)).to_dict(), allow_nan=False))
    assert set(content) == {"advantage", "tpr_at_fpr", "gdp_mu"}
    assert list(content["tpr_at_fpr"]) == ["0.001", "0.01"]


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_false_positive_rates_out_of_range_are_refused(fpr):
    with pytest.raises(InputError, match="false positive rate"):
        attack_bounds(REFERENCE, fprs=(0.01, fpr))


def test_histories_out_of_range_are_refused():
    with pytest.raises(InputError, match="sampling_rate"):
        attack_bounds([(1.0, 1.5, 10)])


def test_a_typical_run_takes_less_than_a_second():
    attack_bounds(REFERENCE)  # loads dp-accounting
    start = time.process_time()
    attack_bounds([(1.2, 0.0116, 860)], fprs=FPRS)
    assert time.process_time() - start < 1.0
