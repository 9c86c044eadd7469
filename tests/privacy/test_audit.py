"""The one-run bound: published vectors, slow truths, and mechanisms whose epsilon is known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.audit import (
    GUESS_SHARES,
    AuditResult,
    Family,
    audit_epsilon,
    ceiling,
    gaussian_p_value,
    p_value,
    right_guesses,
)

DELTA = 1e-5
N_SIMULATIONS = 200
FAMILIES: tuple[Family, ...] = ("approximate", "gaussian")


def guessed(m: int, r: int, v: int, **changes: Any) -> AuditResult:
    """An audit of m canaries in which v of r guesses are right."""
    included = np.arange(m) % 2 == 0
    scores = np.where(included, 1.0, -1.0) * 1e-3
    surest = np.arange(r)  # as many in as out
    scores[surest] = np.where(included[surest], 1.0, -1.0)
    wrong = surest[: r - v]
    scores[wrong] *= -1
    found = audit_epsilon(scores, included, **{"delta": DELTA, "guesses": r, **changes})
    assert (found.n_guesses, found.n_right) == (r, v)
    return found


@pytest.mark.parametrize(
    ("m", "r", "v", "expected"),
    [
        (200, 20, 20, 1.8),
        (500, 50, 50, 2.8),
        (1000, 100, 100, 3.5),
        (200, 20, 18, 0.9),
        (500, 50, 45, 1.4),
        (1000, 100, 90, 1.6),
    ],
)
def test_vectors_of_steinke_et_al(m: int, r: int, v: int, expected: float) -> None:
    found = guessed(m, r, v)
    assert found.lower_bound == pytest.approx(expected, abs=0.1)
    assert found.ceiling == guessed(m, r, r).lower_bound == ceiling(m, delta=DELTA, guesses=r)


@given(
    r=st.integers(1, 12),
    extra=st.integers(0, 20),
    share=st.floats(0, 1),
    epsilon=st.floats(0, 6),
    delta=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
)
def test_p_value_equals_the_formula_added_up_term_by_term(
    r: int, extra: int, share: float, epsilon: float, delta: float
) -> None:
    v, m, q = round(share * r), r + extra, math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(mass[k] for k in range(r + 1) if v > k >= v - i) / i for i in range(1, v + 1)), default=0.0)
    expected = min(1.0, sum(mass[v:]) + 2 * m * delta * alpha)
    assert p_value(m, r, v, np.array([epsilon]), delta)[0] == pytest.approx(expected, rel=1e-9)


@given(m=st.integers(1, 60), data=st.data(), delta=st.sampled_from([0.0, 1e-5, 1e-3]))
def test_p_value_rises_with_epsilon_and_the_bound_with_right_guesses(m: int, data: Any, delta: float) -> None:
    r = data.draw(st.integers(1, m))
    grid = np.linspace(0, 8, 60)
    curves = [p_value(m, r, v, grid, delta) for v in range(r + 1)]
    for lower, higher in itertools.pairwise(curves):
        assert np.all(higher <= lower + 1e-12)
    for curve in curves:
        assert np.all(np.diff(curve) >= -1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_never_fall_with_more_right_guesses(family: Family) -> None:
    bounds = [guessed(100, 40, v, family=family).lower_bound for v in range(0, 41, 2)]
    assert bounds == sorted(bounds)
    assert bounds[:11] == [0.0] * 11  # half of the guesses right is what a coin gives
    assert bounds[-1] > 1


def test_more_than_delta_0_costs_and_more_canaries_at_the_same_guesses_cost_as_well() -> None:
    exact = guessed(200, 20, 20, delta=0.0).lower_bound
    assert exact == pytest.approx(math.log(0.05 ** (1 / 20) / (1 - 0.05 ** (1 / 20))), abs=1e-6)
    assert guessed(200, 20, 20, delta=1e-3).lower_bound < guessed(200, 20, 20).lower_bound < exact
    assert guessed(2000, 20, 20).lower_bound < guessed(200, 20, 20).lower_bound


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_where_the_p_value_crosses_the_level(family: Family) -> None:
    found = guessed(300, 60, 55, family=family)
    below, above = found.p_values([found.lower_bound - 1e-3, found.lower_bound + 1e-3])
    assert below < 0.05 < above


# --- Gaussian DP ------------------------------------------------------------------------------------------------------


def least_share(mu: float, m: int, r: int, masses: np.ndarray) -> bool:
    """Slow truth of the recursion's premises: whether these probabilities of 0 .. r right guesses are possible."""
    right = [sum(j * masses[j] for j in range(i, r + 1)) / m for i in range(r + 2)]
    wrong = [sum((r - j) * masses[j] for j in range(i, r + 1)) / m for i in range(r + 2)]
    return all(wrong[i] >= norm.cdf(norm.ppf(right[i + 1]) - mu) - 1e-12 for i in range(r))


@given(mu=st.floats(0.1, 3), r=st.integers(1, 8), extra=st.integers(0, 8))
def test_what_a_gaussian_mechanism_does_is_never_ruled_out(mu: float, r: int, extra: int) -> None:
    """Guessing r coins from r independent Gaussians: right guesses are binomial, and the premises hold."""
    m, accuracy = r + extra, norm.cdf(mu / 2)
    masses = binom.pmf(np.arange(r + 1), r, accuracy)
    assert least_share(mu, m, r, masses)
    for v in range(r + 1):
        chance = binom.sf(v - 1, r, accuracy)
        assert gaussian_p_value(m, r, v, mu) >= chance - 1e-9


def test_the_premises_see_guesses_that_are_too_good() -> None:
    assert not least_share(1.0, 10, 10, binom.pmf(np.arange(11), 10, norm.cdf(1.0)))
    assert gaussian_p_value(10, 10, 10, 0.5) < 0.5


@pytest.mark.parametrize(("m", "r", "v"), [(200, 100, 95), (500, 50, 50), (1000, 500, 400)])
def test_the_gaussian_bound_is_the_larger_one(m: int, r: int, v: int) -> None:
    assert guessed(m, r, v, family="gaussian").lower_bound > 1.2 * guessed(m, r, v).lower_bound


# --- Mechanisms whose epsilon is known --------------------------------------------------------------------------------


def randomised_response(epsilon: float, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each coin is told truly with probability e^epsilon / (1 + e^epsilon): the tightest case of the bound.

    Noise that does not depend on the coins makes the choice among equal answers a fair one.
    """
    included = rng.random(m) < 0.5
    true = rng.random(m) < math.exp(epsilon) / (1 + math.exp(epsilon))
    return np.where(included == true, 1.0, -1.0) + 0.1 * rng.random(m), included


def gaussian(mu: float, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    included = rng.random(m) < 0.5
    return mu * included + rng.standard_normal(m), included


def gaussian_epsilon(mu: float) -> float:
    """The epsilon of mu at DELTA, by bisection of the profile."""
    low, high = 0.0, 100.0
    for _ in range(60):
        e = (low + high) / 2
        profile = norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)
        low, high = (e, high) if profile > DELTA else (low, e)
    return high


def too_high(epsilon: float, bounds: list[float]) -> bool:
    """More bounds above epsilon than 5 % of them would give by chance (once in 1e5)."""
    above = sum(bound > epsilon for bound in bounds)
    return bool(binom.sf(above - 1, len(bounds), 0.05) < 1e-5)


@pytest.mark.parametrize("guesses", [None, 100, (20, 60, 100)])
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_the_bound_of_randomised_response_is_above_its_epsilon_in_at_most_one_run_of_20(
    epsilon: float, guesses: int | tuple[int, ...] | None
) -> None:
    rng = np.random.default_rng(1)
    bounds = [
        audit_epsilon(*randomised_response(epsilon, 200, rng), delta=DELTA, guesses=guesses).lower_bound
        for _ in range(N_SIMULATIONS)
    ]
    assert not too_high(epsilon, bounds)
    assert epsilon < 2 or np.mean(bounds) > 0.45 * epsilon  # and it is not below by being nothing


def test_guesses_chosen_by_the_scores_without_sharing_the_error_would_be_above_more_often() -> None:
    rng, epsilon = np.random.default_rng(2), 1.0
    counts = range(5, 101, 5)
    bounds = [
        max(audit_epsilon(scores, included, delta=0.0, guesses=r).lower_bound for r in counts)
        for scores, included in (randomised_response(epsilon, 100, rng) for _ in range(N_SIMULATIONS))
    ]
    assert too_high(epsilon, bounds)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mu", [0.27, 1.0, 2.0])
def test_the_bound_of_a_gaussian_mechanism_is_above_its_epsilon_in_at_most_one_run_of_20(
    mu: float, family: Family
) -> None:
    rng, epsilon = np.random.default_rng(3), gaussian_epsilon(mu)
    bounds = [
        audit_epsilon(*gaussian(mu, 200, rng), delta=DELTA, family=family).lower_bound for _ in range(N_SIMULATIONS)
    ]
    assert not too_high(epsilon, bounds)
    assert mu < 1 or np.mean(bounds) > 0.2 * epsilon


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_sees_a_mechanism_that_claims_less_than_it_spends(family: Family) -> None:
    rng = np.random.default_rng(4)
    bounds = [
        audit_epsilon(*gaussian(2.0, 200, rng), delta=DELTA, family=family).lower_bound for _ in range(N_SIMULATIONS)
    ]
    assert too_high(gaussian_epsilon(0.27), bounds)


# --- Guesses ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), m=st.integers(1, 7), share_in=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_ties_are_broken_against_the_auditor(data: Any, m: int, share_in: float) -> None:
    """Against all orders of the canaries: no order has fewer right guesses of each kind."""
    scores = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=m, max_size=m)))
    included = np.array(data.draw(st.lists(st.booleans(), min_size=m, max_size=m)))
    r = data.draw(st.integers(1, m))
    n_in = math.floor(share_in * r + 0.5)
    orders = [list(o) for o in itertools.permutations(range(m))]
    ordered = [sorted(o, key=lambda i: -scores[i]) for o in orders]
    fewest_in = min(sum(included[i] for i in o[:n_in]) for o in ordered)
    fewest_out = min(sum(not included[i] for i in o[m - (r - n_in) :]) for o in ordered)
    assert right_guesses(scores, included, r, share_in=share_in) == fewest_in + fewest_out


def test_scores_that_tell_nothing_show_nothing_whatever_the_order_of_the_canaries() -> None:
    included = np.arange(200) < 100
    assert audit_epsilon(np.zeros(200), included, delta=DELTA).lower_bound == 0.0
    assert audit_epsilon(np.zeros(200), included[::-1], delta=DELTA).lower_bound == 0.0


def test_the_default_number_of_guesses_depends_on_the_canaries_alone() -> None:
    rng = np.random.default_rng(0)
    found = audit_epsilon(*gaussian(1.0, 250, rng), delta=DELTA)
    assert [r for r, _ in found.tried] == [int(share * 250) for share in GUESS_SHARES]
    shared = [guessed(250, r, v, confidence=1 - 0.05 / 2).lower_bound for r, v in found.tried]
    assert found.lower_bound == max(shared)


# --- Beside the certificate -------------------------------------------------------------------------------------------


def test_a_bound_above_the_certificate_stops_and_names_both() -> None:
    found = guessed(200, 100, 100)
    assert found.lower_bound > 3
    found.check_against(4.0)
    found.check_against(None)
    found.check_against(math.inf)
    with pytest.raises(PrivacyError, match=r"at least 3\.\d\d where the certificate claims 1\.00.*privacy fault") as e:
        found.check_against(1.0)
    assert "\n" not in str(e.value)


def test_a_grid_of_runs_shares_the_error() -> None:
    found = guessed(200, 100, 85)
    just_below = found.lower_bound - 0.02
    assert found.contradicts(just_below)
    assert not found.contradicts(just_below, among=20)
    assert found.contradicts(found.lower_bound / 3, among=20)


def test_claims_that_the_audit_did_not_test_are_refused() -> None:
    found = guessed(200, 100, 100)
    assert found.contradicts(1.0, delta=1e-6)
    for epsilon, delta in ((1.0, 1e-3), (math.nan, None), (-1.0, None)):
        with pytest.raises(ValueError):
            found.contradicts(epsilon, delta=delta)
    with pytest.raises(ValueError):
        found.contradicts(1.0, among=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_json_with_a_curve_that_crosses_the_level(family: Family) -> None:
    found = json.loads(json.dumps(guessed(300, 60, 58, family=family).to_json(), allow_nan=False))
    curve = [(point["epsilon"], point["p_value"]) for point in found["p_value_curve"]]
    assert curve[0][0] == 0 and curve[-1][0] > found["ceiling"] > found["lower_bound"]
    assert curve[0][1] < 0.05 < curve[-1][1]


# --- Bad input --------------------------------------------------------------------------------------------------------

SCORES, COINS = np.linspace(0, 1, 10), np.arange(10) % 2 == 0
BAD: list[tuple[dict[str, Any], str]] = [
    ({"scores": SCORES[:9]}, "one score and one coin"),
    ({"scores": SCORES[:0], "included": COINS[:0]}, "one score and one coin"),
    ({"scores": np.where(SCORES > 0.5, np.nan, SCORES)}, "5 canaries have no finite score"),
    ({"included": COINS.astype(int)}, "true or false"),
    ({"scores": np.arange(40.0), "included": np.ones(40, dtype=bool)}, "fair coins do not give"),
    ({"delta": 1.0}, "delta"),
    ({"confidence": 1.0}, "confidence"),
    ({"guesses": 11}, "guesses must lie"),
    ({"guesses": ()}, "guesses must lie"),
    ({"share_in": 1.5}, "share_in"),
    ({"family": "laplace"}, "family"),
    ({"family": "gaussian", "delta": 0.0}, "delta 0"),
]


@pytest.mark.parametrize(("changes", "named"), BAD)
def test_bad_input_is_one_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as e:
        audit_epsilon(**{"scores": SCORES, "included": COINS, "delta": DELTA, **changes})
    assert "\n" not in str(e.value)


def test_a_ceiling_needs_canaries() -> None:
    with pytest.raises(InputError, match="plant_canaries"):
        ceiling(0, delta=DELTA)


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "privacy" / "audit.md").read_text(encoding="utf-8")


def rows_below(header: str) -> list[list[float]]:
    """The numbers of the table with this first line."""
    lines = PAGE[PAGE.index(header) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[float(cell) for cell in line.strip("| ").split("|")] for line in lines]


def test_the_pages_ceilings_are_those_of_the_code() -> None:
    rows = rows_below("| canaries | by default |")
    assert len(rows) > 4
    for m, default, tenth, half, gaussian_half in rows:
        n = int(m)
        found = [ceiling(n, delta=DELTA), *(ceiling(n, delta=DELTA, guesses=r) for r in (n // 10, n // 2))]
        found.append(ceiling(n, delta=DELTA, guesses=n // 2, family="gaussian"))
        assert [default, tenth, half, gaussian_half] == pytest.approx(found, abs=0.006)


def test_the_pages_bounds_with_wrong_guesses_are_those_of_the_code() -> None:
    rows = rows_below("| canaries | guesses |")
    assert len(rows) > 2
    for m, r, *bounds in rows:
        shares = (1.0, 0.9, 0.8, 0.7)
        found = [guessed(int(m), int(r), round(share * r)).lower_bound for share in shares]
        assert bounds == pytest.approx(found, abs=0.006)
