"""What a guarantee means for an attacker who asks whether a unit was in the training data: upper bounds on success.

All from one privacy loss distribution, whose delta at every epsilon is an upper bound; so no attack on any model that
these runs may train, with any knowledge beside the unit's membership, does better. A measured attack above one of these
bounds shows that the run was not what its history says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpmed.errors import InputError
from dpmed.privacy.accounting import History, merged_history, pld_accountant

DELTA_FLOOR = 1e-9  # below, what dp-accounting cuts off the tails (1e-15 per composition) would begin to count
GRID_POINTS = 2_000
LARGEST_EPSILON = 700.0  # exp of more is infinite in float64; no bound is below 1 there anyway


@dataclass(frozen=True)
class AttackBounds:
    """Upper bounds on any membership attack; see `attack_bounds`."""

    advantage: float
    """TPR - FPR of the best attack, at whatever FPR suits it; 0 = a coin, 1 = certainty."""
    tpr_at_fpr: dict[float, float]
    """FPR -> TPR of the best attack at that FPR."""
    gdp_mu: float
    """mu of Gaussian DP; inf where no Gaussian mechanism is as bad."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the FPRs are text, an infinite mu is None."""
        return {
            "advantage": self.advantage,
            "tpr_at_fpr": {str(fpr): tpr for fpr, tpr in self.tpr_at_fpr.items()},
            "gdp_mu": self.gdp_mu if math.isfinite(self.gdp_mu) else None,
        }


def attack_bounds(history: History, *, fprs: Sequence[float] = (0.01,)) -> AttackBounds:
    """Bound every membership attack on the results of these runs together.

    - advantage: delta at epsilon 0, the total variation distance of the results with and without the unit.
    - tpr_at_fpr: the least, over epsilon >= 0, of e^epsilon * fpr + delta and 1 - e^-epsilon * (1 - delta - fpr): the
      two hypothesis-testing forms of (epsilon, delta)-DP (Wasserman and Zhou 2010; Kairouz, Oh and Viswanath 2015).
    - gdp_mu: telling membership apart is at least as hard as telling N(0, 1) from N(mu, 1) (Dong, Roth and Su 2022):
      the smallest mu whose Gaussian profile is at least the runs' delta at every epsilon of a grid with delta >= 1e-9.
      One number that gives every (epsilon, delta) and every point of the ROC curve, hence the one to compare runs by
      (Gomez et al. 2025). It is not a proof of mu-GDP: below that delta nothing is said, between grid points it is
      interpolation, and it is no asymptotic (central limit) mu either, which may be too small.

    Args:
        history: (noise_multiplier, sampling_rate, n_steps) of each run, as for `composed_epsilon`.
        fprs: false positive rates to bound the TPR at, in [0, 1].

    Guarantee: all but `gdp_mu` hold for whatever the runs release, and by whatever attack, up to rounding of float64.
    Edge cases: no steps give 0, TPR = FPR and mu 0; steps without noise give 1, TPR 1 and mu inf.
    Raises: InputError for an FPR or a history out of range.
    """
    for fpr in fprs:
        if not 0 <= fpr <= 1:
            raise InputError(f"a false positive rate must lie in [0, 1], got {fpr}: use e.g. 0.01")
    runs = merged_history(history)
    if not runs:
        return AttackBounds(0.0, {fpr: fpr for fpr in fprs}, 0.0)
    if any(sigma == 0 for sigma, _, _ in runs):
        return AttackBounds(1.0, dict.fromkeys(fprs, 1.0), math.inf)
    epsilons, deltas = _privacy_profile(pld_accountant(runs, delta=DELTA_FLOOR))
    tprs = {fpr: _largest_tpr(fpr, epsilons, deltas) for fpr in fprs}
    return AttackBounds(float(deltas[0]), tprs, _gaussian_mu(epsilons, deltas))


def _privacy_profile(accountant: Any) -> tuple[np.ndarray, np.ndarray]:
    """(epsilon, delta), from epsilon 0 to where delta is at the floor; upper bounds on delta."""
    last = min(float(accountant.get_epsilon(DELTA_FLOOR)), LARGEST_EPSILON)
    epsilons = np.linspace(0.0, last, GRID_POINTS)
    return epsilons, np.clip(accountant.get_delta(epsilons), 0.0, 1.0)


def _largest_tpr(fpr: float, epsilons: np.ndarray, deltas: np.ndarray) -> float:
    """Each epsilon gives a bound, so the least over any grid is one; a finer grid only makes it tighter."""
    steep = np.exp(epsilons) * fpr + deltas
    flat = 1 - np.exp(-epsilons) * (1 - deltas - fpr)
    return float(np.clip(np.minimum(steep, flat).min(), fpr, 1.0))


def _gaussian_mu(epsilons: np.ndarray, deltas: np.ndarray) -> float:
    """The largest over the grid of the mu whose Gaussian mechanism has just this delta at this epsilon: bisection."""
    if deltas[0] >= 1:
        return math.inf
    kept = deltas >= DELTA_FLOOR
    kept[0] = True  # also where already the advantage is below the floor
    epsilons, deltas = epsilons[kept], deltas[kept]
    low, high = np.zeros_like(epsilons), np.full_like(epsilons, 2.0)
    while (short := _gaussian_delta(epsilons, high) < deltas).any():
        high[short] *= 2
    for _ in range(40):
        middle = (low + high) / 2
        enough = _gaussian_delta(epsilons, middle) >= deltas
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return float(high.max())


def _gaussian_delta(epsilons: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """delta of N(0, 1) against N(mu, 1) at each epsilon (Balle and Wang 2018, theorem 8)."""
    from scipy.special import log_ndtr, ndtr

    return ndtr(mu / 2 - epsilons / mu) - np.exp(epsilons + log_ndtr(-mu / 2 - epsilons / mu))
