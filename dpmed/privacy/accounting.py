"""What Poisson-sampled Gaussian runs cost: epsilon and noise calibration, from two independent accountants.

The mechanism: in each step every unit is drawn independently with probability `sampling_rate`; the sum of the drawn
units' contributions (each at most C in L2) gets Gaussian noise of standard deviation `noise_multiplier * C`. A history
is a sequence of (noise_multiplier, sampling_rate, n_steps): runs on the same units, one after the other. The relation
is "add or remove one unit". Nothing here holds for shuffled fixed-size batches.

- PLD: dp-accounting's privacy loss distributions, both directions of the relation, rounded up: an upper bound.
- PRV: Opacus' `PRVAccountant` (Gopi et al. 2021). Its `get_epsilon` does not return its estimate but the upper end of
  its error interval: estimate at `delta - delta_error`, plus `eps_error`. So it stands about `eps_error` above PLD.

The larger of the two is reported: one accountant's fault can only raise the epsilon a user sees, or stop the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.prv import DELTA_ERROR, prv_epsilon

DISAGREEMENT = 0.02  # relative difference of the accountants, beyond their stated errors, that stops the run
CALIBRATION_STEP = 1e-3  # relative: a multiplier smaller by this exceeds the target
SMALLEST_SIGMA, LARGEST_SIGMA = 0.02, 1e5

History = Sequence[tuple[float, float, int]]
"""(noise_multiplier, sampling_rate, n_steps) of each run, in any order."""
Runs = tuple[tuple[float, float, int], ...]  # what `merged_history` makes of a history


@dataclass(frozen=True)
class EpsilonReport:
    """Epsilon of a run: `epsilon` is the larger of the two accountants' values.

    `epsilon_prv` is None where Opacus' accountant could not answer; `prv_note` says why, and `epsilon` is PLD's alone.
    """

    epsilon: float
    epsilon_pld: float
    epsilon_prv: float | None
    prv_note: str | None = None


def epsilon(*, noise_multiplier: float, sampling_rate: float, n_steps: int, delta: float) -> EpsilonReport:
    """Privacy spent by `n_steps` Poisson-sampled Gaussian steps: `composed_epsilon` of one run.

    Args:
        noise_multiplier: noise standard deviation / clip norm, >= 0.
        sampling_rate: probability with which each unit is drawn in each step, in (0, 1].
        n_steps: steps run, >= 0; empty draws count.
        delta: in (0, 1).

    Guarantee, edge cases, raises: as `composed_epsilon`.
    """
    return composed_epsilon([(noise_multiplier, sampling_rate, n_steps)], delta=delta)


def composed_epsilon(history: History, *, delta: float) -> EpsilonReport:
    """Privacy spent by several runs on the same units together; less than the sum of their epsilons.

    Args:
        history: (noise_multiplier, sampling_rate, n_steps) of each run; ranges as in `epsilon`.
        delta: in (0, 1), for all runs together.

    Guarantee: the runs together are (epsilon, delta)-DP under adding or removing one unit, as far as either accountant
        is right. A run may start from the results of earlier ones (adaptive composition); its noise, rate and number of
        steps may not be chosen by them, that is the case of privacy filters (Rogers et al. 2016).
    Edge cases: no run, or only runs of 0 steps, gives 0; a `noise_multiplier` of 0 with steps gives inf; a delta too
        small for floating point gives inf. Runs with the same noise and rate count as one: order and cuts are without
        influence.
    Raises: InputError for values outside those ranges; PrivacyError if the accountants disagree.
    """
    runs = merged_history(history)
    _check_delta(delta)
    if not runs:
        return EpsilonReport(0.0, 0.0, 0.0)
    if any(sigma == 0 for sigma, _, _ in runs):
        return EpsilonReport(math.inf, math.inf, math.inf)
    return _epsilon(runs, float(delta))


def calibrate(*, target_epsilon: float, delta: float, sampling_rate: float, n_steps: int) -> float:
    """Smallest noise multiplier whose epsilon, by both accountants, is at most `target_epsilon`; in 0.2 to 4 s.

    Guarantee: `epsilon(noise_multiplier=result, ...).epsilon <= target_epsilon`; a multiplier 0.1 % smaller exceeds it.
    Edge cases: for targets below 0.002, where PRV's least error of 0.001 is most of epsilon, it may add more noise.
    Raises: InputError for values out of range, or a target that no multiplier in [0.02, 1e5] meets or needs.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise InputError(
            f"target_epsilon must be a finite number > 0, got {target_epsilon}: set privacy.target_epsilon, e.g. 8"
        )
    _check_run(sampling_rate=sampling_rate, n_steps=n_steps)
    _check_delta(delta)
    if n_steps == 0:
        raise InputError("n_steps must be at least 1 to calibrate noise: raise training.epochs")

    def by_pld(sigma: float) -> float:
        return _pld_epsilon(((sigma, float(sampling_rate), int(n_steps)),), float(delta))

    def by_both(sigma: float) -> float:
        return _epsilon(((sigma, float(sampling_rate), int(n_steps)),), float(delta)).epsilon

    aim = target_epsilon - prv_eps_error(target_epsilon)  # PRV stands this much above PLD
    low, high = _bracket(by_pld, aim, upper=_rdp_sigma(target_epsilon, delta, sampling_rate, n_steps))
    return _smallest_sufficient(by_both, by_pld, target_epsilon, _root(by_pld, aim, low, high))


def epsilon_curve(
    *, noise_multiplier: float, sampling_rate: float, n_steps: int, deltas: Sequence[float]
) -> list[tuple[float, float]]:
    """`composed_curve` of one run."""
    return composed_curve([(noise_multiplier, sampling_rate, n_steps)], deltas=deltas)


def composed_curve(history: History, *, deltas: Sequence[float]) -> list[tuple[float, float]]:
    """(delta, epsilon) pairs, by PLD: the whole trade-off, not one point of it. Edge cases as `composed_epsilon`."""
    runs = merged_history(history)
    for delta in deltas:
        _check_delta(delta)
    if not deltas or not runs or any(sigma == 0 for sigma, _, _ in runs):
        return [(delta, math.inf if runs else 0.0) for delta in deltas]
    accountant = pld_accountant(runs, delta=min(deltas))
    return [(delta, float(accountant.get_epsilon(delta))) for delta in deltas]


@lru_cache(maxsize=4)
def pld_accountant(history: Runs, *, delta: float) -> Any:
    """dp-accounting's `PLDAccountant` after the history, for its `get_epsilon` and `get_delta`: upper bounds.

    Takes a history that is not empty, with noise in each run. The mesh follows the size of epsilon at `delta`, so time
    and memory stay bounded. The last few are kept: only ask them, charge nothing more.
    """
    import dp_accounting
    from dp_accounting import pld

    scale = _rdp_epsilon(history, delta)  # an upper bound in milliseconds; here it only sets the mesh
    interval = max(min(1e-4 * scale, 1e-3), 1e-5 * scale)
    n_steps = sum(n_steps for _, _, n_steps in history)
    interval = max(1e-5, min(interval, 0.02 * scale / math.sqrt(n_steps)))  # rounding up adds up over many small steps
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    return _charged(accountant, history)


def _charged(accountant: Any, history: History) -> Any:
    """The accountant of dp-accounting, after it was told of all runs."""
    import dp_accounting

    for sigma, rate, n_steps in history:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, n_steps)
    return accountant


@lru_cache(maxsize=512)
def _pld_epsilon(runs: Runs, delta: float) -> float:
    return float(pld_accountant(runs, delta=delta).get_epsilon(delta))


@lru_cache(maxsize=512)
def _epsilon(runs: Runs, delta: float) -> EpsilonReport:
    """`composed_epsilon` of a checked history. Kept: certificates ask again for what calibration computed."""
    pld = _pld_epsilon(runs, delta)
    if not math.isfinite(pld):
        return EpsilonReport(math.inf, math.inf, None, "not asked: PLD finds no finite epsilon at this delta")
    eps_error = prv_eps_error(pld)
    size = _rdp_epsilon(runs, DELTA_ERROR * delta / 4)
    prv, note = prv_epsilon(runs, delta=delta, eps_error=eps_error, largest_loss=size)
    if prv is None:
        return EpsilonReport(pld, pld, None, note)
    check_agreement(epsilon_pld=pld, epsilon_prv=prv, eps_error=eps_error)
    return EpsilonReport(max(pld, prv), pld, prv)


def prv_eps_error(epsilon_pld: float) -> float:
    """Numerical error that Opacus' PRV is asked for: 1 % of epsilon.

    Opacus' default, 0.01 whatever epsilon is, would cost 10 % at epsilon 0.1, and gigabytes of mesh at epsilon 500.
    """
    return min(max(0.01 * epsilon_pld, 1e-3), 0.5)


def check_agreement(*, epsilon_pld: float, epsilon_prv: float, eps_error: float) -> None:
    """Refuse two accountants that differ by more than 2 % plus PRV's interval (2 * `eps_error`).

    Raises: PrivacyError that names both values; also for NaN, which agrees with nothing.
    """
    tolerance = DISAGREEMENT * max(epsilon_pld, epsilon_prv) + 2 * eps_error
    if not abs(epsilon_pld - epsilon_prv) <= tolerance:
        raise PrivacyError(
            f"the accountants disagree: PLD (dp-accounting) {epsilon_pld:.4f}, PRV (Opacus) {epsilon_prv:.4f};"
            f" tolerance {tolerance:.4f}: trust neither, check noise_multiplier, sampling_rate, n_steps and delta"
        )


def _rdp_epsilon(history: History, delta: float) -> float:
    """A loose upper bound in about 10 ms (Renyi DP): sizes meshes and starts the search, is never reported."""
    from dp_accounting import rdp

    # whole orders only: the series for fractional ones is slow and fails to converge for large sampling rates
    accountant = rdp.RdpAccountant([*range(2, 33), 48, 64, 128, 256, 512, 1024])
    return float(_charged(accountant, history).get_epsilon(delta))


def _rdp_sigma(target: float, delta: float, rate: float, n_steps: int) -> float:
    """A multiplier within 5 % of what Renyi DP asks for: slightly too much noise, so a good upper end to start from."""
    low, high = SMALLEST_SIGMA, LARGEST_SIGMA
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _rdp_epsilon([(middle, rate, n_steps)], delta) <= target else (middle, high)
    return high


def _bracket(spent: Callable[[float], float], target: float, *, upper: float) -> tuple[float, float]:
    """(low, high) with spent(low) > target >= spent(high); epsilon falls as sigma grows."""
    high = upper
    while target <= 0 or spent(high) > target:
        if target <= 0 or high >= LARGEST_SIGMA:
            raise InputError(f"no noise multiplier up to {LARGEST_SIGMA:g} reaches target_epsilon: raise it or delta")
        high *= 1.3
    low = high
    while (reached := spent(low)) <= target:
        if low <= SMALLEST_SIGMA:
            raise InputError(f"target_epsilon needs less noise than {SMALLEST_SIGMA}, which protects nobody: lower it")
        # epsilon falls at least like 1 / sigma, so this is far enough, unless it would be very far
        low, high = low * max(0.98 * reached / target, 0.4), low
    return low, high


def _root(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where spent(sigma) = target, on a log-log scale."""
    from scipy import optimize

    def excess(log_sigma: float) -> float:
        return math.log(min(max(spent(math.exp(log_sigma)), 1e-300), 1e300) / target)

    solve: Any = optimize.brentq
    return math.exp(solve(excess, math.log(low), math.log(high), xtol=CALIBRATION_STEP / 4))


def _smallest_sufficient(
    by_both: Callable[[float], float], by_pld: Callable[[float], float], target: float, sigma: float
) -> float:
    """From a sigma close by to one that meets the target, while one smaller by CALIBRATION_STEP does not.

    PRV can be slow, so it sees only candidates; PLD tells the slope. Their distance hardly moves within a Newton step.
    """
    for _ in range(8):
        spent = by_both(sigma)
        gain = by_pld(sigma / (1 + CALIBRATION_STEP)) - by_pld(sigma)
        if spent <= target < spent + gain:
            return sigma
        steps = (spent - target) / gain + 0.4 if gain > 0 else 1.0
        sigma *= (1 + CALIBRATION_STEP) ** max(-50.0, min(steps, 50.0))
    growth = CALIBRATION_STEP
    while by_both(sigma) > target:  # the accountants' rounding hides the slope: rather too much noise
        sigma, growth = sigma * (1 + growth), 2 * growth
    return sigma


def merged_history(history: History) -> Runs:
    """The history checked, without empty runs, runs of the same noise and rate as one, in one fixed order.

    Raises: InputError for values out of range.
    """
    total: dict[tuple[float, float], int] = {}
    for noise_multiplier, sampling_rate, n_steps in history:
        _check_run(sampling_rate=sampling_rate, n_steps=n_steps)
        _check_noise(noise_multiplier)
        mechanism = (float(noise_multiplier), float(sampling_rate))
        total[mechanism] = total.get(mechanism, 0) + int(n_steps)
    return tuple((sigma, rate, n_steps) for (sigma, rate), n_steps in sorted(total.items()) if n_steps)


def _check_run(*, sampling_rate: float, n_steps: int) -> None:
    if not 0 < sampling_rate <= 1:
        raise InputError(
            f"sampling_rate must lie in (0, 1], got {sampling_rate}: lower expected_batch_units or use more units"
        )
    if not (0 <= n_steps < math.inf and n_steps == int(n_steps)):
        raise InputError(
            f"n_steps must be a whole number >= 0, got {n_steps}: count the optimizer steps, empty draws included"
        )


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"noise_multiplier must be a finite number >= 0, got {noise_multiplier}: 0 means no privacy")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InputError(
            f"delta must lie in (0, 1), got {delta}: set privacy.delta well below 1 / number of units, e.g. 1e-5"
        )
