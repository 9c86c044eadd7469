"""What a Poisson-sampled Gaussian run costs: epsilon and noise calibration, from two independent accountants.

The mechanism: in each of `n_steps` steps every unit is drawn independently with probability `sampling_rate`; the sum of
the drawn units' contributions (each at most C in L2) gets Gaussian noise of standard deviation `noise_multiplier * C`.
The relation is "add or remove one unit". Nothing here holds for shuffled fixed-size batches.

- PLD: dp-accounting's privacy loss distributions, both directions of the relation, rounded up: an upper bound.
- PRV: Opacus' `PRVAccountant` (Gopi et al. 2021). Its `get_epsilon` does not return its estimate but the upper end of
  its error interval: estimate at `delta - delta_error`, plus `eps_error`. So it stands about `eps_error` above PLD.

The larger of the two is reported: one accountant's fault can only raise the epsilon a user sees, or stop the run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dpmed.errors import InputError, PrivacyError

DISAGREEMENT = 0.02  # relative difference of the accountants, beyond their stated errors, that stops the run
CALIBRATION_STEP = 5e-4  # relative; two steps stay within the promised 1e-3
# Opacus then takes about 1 GB and 10 s; unbounded, some settings ask for a thousand times that: the process is killed.
MAX_PRV_POINTS = 2**23
SMALLEST_SIGMA, LARGEST_SIGMA = 0.02, 1e5


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
    """Privacy spent by `n_steps` Poisson-sampled Gaussian steps.

    Args:
        noise_multiplier: noise standard deviation / clip norm, >= 0.
        sampling_rate: probability with which each unit is drawn in each step, in (0, 1].
        n_steps: steps run, >= 0; empty draws count.
        delta: in (0, 1).

    Guarantee: the run is (epsilon, delta)-DP under adding or removing one unit, as far as either accountant is right.
    Edge cases: `n_steps` 0 gives 0; `noise_multiplier` 0 gives inf; a delta too small for floating point gives inf.
    Raises: InputError for values outside those ranges; PrivacyError if the accountants disagree.
    """
    _check_run(sampling_rate=sampling_rate, n_steps=n_steps)
    _check_delta(delta)
    _check_noise(noise_multiplier)
    if n_steps == 0:
        return EpsilonReport(0.0, 0.0, 0.0)
    if noise_multiplier == 0:
        return EpsilonReport(math.inf, math.inf, math.inf)
    return _epsilon(float(noise_multiplier), float(sampling_rate), int(n_steps), float(delta))


def calibrate(*, target_epsilon: float, delta: float, sampling_rate: float, n_steps: int) -> float:
    """Smallest noise multiplier whose epsilon, by both accountants, is at most `target_epsilon`.

    Guarantee: `epsilon(noise_multiplier=result, ...).epsilon <= target_epsilon`; a multiplier 0.1 % smaller exceeds it.
    Cost: some 10 evaluations of both accountants, typically 1-4 s on one core.
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

    def spent(sigma: float) -> float:
        return _epsilon(sigma, float(sampling_rate), int(n_steps), float(delta)).epsilon

    low, high = _bracket(spent, target_epsilon, upper=_rdp_sigma(target_epsilon, delta, sampling_rate, n_steps))
    return _smallest_sufficient(spent, target_epsilon, low, high)


def epsilon_curve(
    *, noise_multiplier: float, sampling_rate: float, n_steps: int, deltas: Sequence[float]
) -> list[tuple[float, float]]:
    """(delta, epsilon) pairs of one run, by PLD: the whole trade-off, not one point of it. Edge cases as `epsilon`."""
    _check_run(sampling_rate=sampling_rate, n_steps=n_steps)
    for delta in deltas:
        _check_delta(delta)
    _check_noise(noise_multiplier)
    if n_steps == 0 or noise_multiplier == 0:
        return [(delta, 0.0 if n_steps == 0 else math.inf) for delta in deltas]
    if not deltas:
        return []
    accountant = _pld_accountant(noise_multiplier, sampling_rate, n_steps, min(deltas))
    return [(delta, float(accountant.get_epsilon(delta))) for delta in deltas]


@lru_cache(maxsize=512)
def _epsilon(sigma: float, rate: float, n_steps: int, delta: float) -> EpsilonReport:
    """`epsilon` without checks: a pure function, kept because certificates ask again for what calibration computed."""
    pld = float(_pld_accountant(sigma, rate, n_steps, delta).get_epsilon(delta))
    if not math.isfinite(pld):
        return EpsilonReport(math.inf, math.inf, None, "not asked: PLD finds no finite epsilon at this delta")
    eps_error = prv_eps_error(pld)
    prv, note = _prv(sigma, rate, n_steps, delta, eps_error)
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


def _pld_accountant(sigma: float, rate: float, n_steps: int, delta: float) -> Any:
    """dp-accounting's accountant after the run. The mesh follows epsilon's size: time and memory stay bounded."""
    import dp_accounting
    from dp_accounting import pld

    scale = _rdp_epsilon(sigma, rate, n_steps, delta)  # an upper bound in milliseconds; here it only sets the mesh
    interval = max(min(1e-4 * scale, 1e-3), 1e-5 * scale)
    interval = max(1e-5, min(interval, 0.02 * scale / math.sqrt(n_steps)))  # rounding up adds up over many small steps
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), n_steps)
    return accountant


def _prv(sigma: float, rate: float, n_steps: int, delta: float, eps_error: float) -> tuple[float | None, str | None]:
    """Opacus' upper bound, or None and the reason."""
    from opacus.accountants import PRVAccountant

    delta_error = delta / 1000  # Opacus' own default
    # Opacus sizes its mesh like this too (opacus/accountants/prv.py), but from a Renyi bound that takes it a second
    half_width = max(_rdp_epsilon(sigma, rate, n_steps, delta_error / 4), eps_error) + 3
    points = 2 * half_width * math.sqrt(n_steps * math.log(12 / delta_error) / 2) / eps_error
    if not points <= MAX_PRV_POINTS:
        return None, f"Opacus' PRV would need a mesh of {points:.1e} points, more than {MAX_PRV_POINTS:.1e}"
    # Opacus warns of RDP orders (they only size its mesh) and of log(0) at sampling_rate 1 (the right limit).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            accountant = PRVAccountant()
            accountant.history = [(sigma, rate, n_steps)]
            value = float(accountant.get_epsilon(delta, eps_error=eps_error, delta_error=delta_error))
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
            return None, f"Opacus' PRV failed: {type(error).__name__}: {error}"
    return (value, None) if math.isfinite(value) else (None, f"Opacus' PRV gave {value}")


def _rdp_epsilon(sigma: float, rate: float, n_steps: int, delta: float) -> float:
    """A loose upper bound in about 10 ms (Renyi DP): sizes meshes and starts the search, is never reported."""
    import dp_accounting
    from dp_accounting import rdp

    # whole orders only: the series for fractional ones is slow and fails to converge for large sampling rates
    accountant = rdp.RdpAccountant([*range(2, 33), 48, 64, 128, 256, 512, 1024])
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), n_steps)
    return float(accountant.get_epsilon(delta))


def _rdp_sigma(target: float, delta: float, rate: float, n_steps: int) -> float:
    """A multiplier within 5 % of what Renyi DP asks for: slightly too much noise, so a good upper end to start from."""
    low, high = SMALLEST_SIGMA, LARGEST_SIGMA
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _rdp_epsilon(middle, rate, n_steps, delta) <= target else (middle, high)
    return high


def _bracket(spent: Callable[[float], float], target: float, *, upper: float) -> tuple[float, float]:
    """(low, high) with spent(low) > target >= spent(high); both accountants fall as sigma grows."""
    high = upper
    while spent(high) > target:
        if high >= LARGEST_SIGMA:
            raise InputError(
                f"no noise multiplier up to {LARGEST_SIGMA:g} reaches target_epsilon {target}: raise it or delta"
            )
        high *= 1.3
    low = high / 1.3
    while spent(low) <= target:
        if low <= SMALLEST_SIGMA:
            raise InputError(
                f"target_epsilon {target} needs less noise than {SMALLEST_SIGMA}, which protects nobody: lower it"
            )
        low, high = low / 1.3, low
    return low, high


def _smallest_sufficient(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Root of spent(sigma) = target on a log-log scale, then stepped up until it holds: never below."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        return math.log(min(spent(math.exp(log_sigma)), 1e300) / target)

    root: Any = brentq(excess, math.log(low), math.log(high), xtol=CALIBRATION_STEP / 2)
    sigma = math.exp(root)
    while spent(sigma) > target:
        sigma *= 1 + CALIBRATION_STEP
    return sigma


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
