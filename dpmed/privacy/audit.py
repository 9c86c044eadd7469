"""A lower bound on epsilon from one run: how well canaries that were in are told from canaries that were not.

A run that is (epsilon, delta)-DP for patients cannot let anybody guess many fair coins right. Each canary is a patient
who was in the training data by the toss of a coin; who guesses r of m coins and has v right shows that epsilon is at
least so much. The bound holds for any attack: a weak one gives a small bound and says nothing in favour of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from dpmed.errors import InputError, RefutedError

GUESS_SHARES = (0.1, 0.5)
"""Guesses by default, as shares of the canaries: few sure ones for a weak attack, half of all for a strong one. Both
are tried, each at half the error."""
CURVE_POINTS = 25
_STEP = 0.05  # of the search for the first epsilon that is not rejected
_LARGEST = 40.0  # beyond, e^-epsilon is lost beside 1 in float64
_NOT_FAIR = 1e-6
_SEARCH_STEPS = 40

Family = Literal["approximate", "gaussian"]


@dataclass(frozen=True)
class AuditResult:
    """What an audit of one run shows; see `audit_epsilon`."""

    lower_bound: float
    """The run is not (e, delta)-DP for any e below this, at the given confidence; 0 where nothing is shown."""
    ceiling: float
    """The bound if all guesses had been right: more canaries are needed to show more."""
    n_canaries: int
    """m: canary patients, in and out."""
    n_guesses: int
    """r: coins guessed, of the choice that gives the bound."""
    n_right: int
    """v: of these."""
    delta: float
    confidence: float
    tried: tuple[tuple[int, int], ...]
    """(r, v) of every number of guesses tried; the error is shared among them."""
    family: Family
    """approximate: holds for any mechanism. gaussian: for Gaussian mechanisms without sampling only."""

    def p_values(self, epsilons: Sequence[float] | np.ndarray) -> np.ndarray:
        """P-value of "the run is (epsilon, delta)-DP" for each epsilon, corrected for the numbers of guesses tried."""
        epsilons = np.asarray(epsilons, dtype=np.float64)
        found = [_p_values(self.family, self.n_canaries, r, v, epsilons, self.delta) for r, v in self.tried]
        return np.minimum(1.0, len(self.tried) * np.min(found, axis=0))

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(epsilon, p-value) from 0 to just above the ceiling."""
        epsilons = np.linspace(0.0, max(1.0, 1.1 * self.ceiling), CURVE_POINTS)
        return [(float(e), float(p)) for e, p in zip(epsilons, self.p_values(epsilons), strict=True)]

    def contradicts(self, upper_epsilon: float | None, *, delta: float | None = None, among: int = 1) -> bool:
        """Whether the canaries refute the claim that the run is (upper_epsilon, delta)-DP.

        Args:
            upper_epsilon: of the certificate; None or inf where there is no claim.
            delta: of the certificate; at most the audit's, which else tested a weaker claim. None: the audit's.
            among: how many runs are audited together; the error is shared among them, so that a grid of honest runs is
                stopped as rarely as one.

        Raises: ValueError if upper_epsilon is negative or NaN, delta larger than the audit's, or among below 1.
        """
        if delta is not None and delta > self.delta:
            raise ValueError(f"the claim is for delta {delta}, the audit for {self.delta}; audit with the claim's")
        if among < 1:
            raise ValueError(f"among is {among}; at least this run is audited")
        if upper_epsilon is None or upper_epsilon == math.inf:
            return False
        if not upper_epsilon >= 0:
            raise ValueError(f"epsilon is {upper_epsilon}; it must be at least 0")
        # The bound ends where the p-value first reaches the level; a shared error asks for a smaller one at the claim.
        level = (1 - self.confidence) / among
        return self.lower_bound > upper_epsilon and bool(self.p_values([upper_epsilon])[0] < level)

    def check_against(self, upper_epsilon: float | None, *, delta: float | None = None, among: int = 1) -> None:
        """Stop if the lower bound is above the upper one. Arguments: see `contradicts`.

        Raises: RefutedError.
        """
        if upper_epsilon is not None and self.contradicts(upper_epsilon, delta=delta, among=among):
            raise refutation(self.lower_bound, upper_epsilon, self.delta)

    def to_json(self) -> dict[str, Any]:
        """All figures and the p-value curve, JSON-ready; no canary can be told from it."""
        return {
            "lower_bound": self.lower_bound,
            "ceiling": self.ceiling,
            "n_canaries": self.n_canaries,
            "n_guesses": self.n_guesses,
            "n_right": self.n_right,
            "delta": self.delta,
            "confidence": self.confidence,
            "tried": [{"n_guesses": r, "n_right": v} for r, v in self.tried],
            "family": self.family,
            "p_value_curve": [{"epsilon": e, "p_value": p} for e, p in self.curve],
        }


def refutation(lower_bound: float, upper_epsilon: float, delta: float) -> RefutedError:
    """The error of a lower bound above a certificate's epsilon."""
    return RefutedError(
        f"the canaries show an epsilon of at least {lower_bound:.2f} where the certificate claims {upper_epsilon:.2f} "
        f"(delta {delta:g}): a privacy fault, or canaries that were not one patient each, in by fair coins; do not "
        "release these weights, and find out which it is"
    )


def audit_epsilon(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: int | Sequence[int] | None = None,
    share_in: float = 0.5,
    family: Family = "approximate",
) -> AuditResult:
    """Lower bound on the epsilon of one run, from its canaries.

    The r guesses are the canaries with the highest scores ("in") and those with the lowest ("out"); the rest is not
    guessed. Ties are broken against the auditor. A bound may only choose r after seeing the scores if the error is
    shared among all r that were tried, so every number in `guesses` is tested at (1 - confidence) / len(guesses).

    Shapes: m = canaries, in and out.

    Args:
        scores: higher means "more likely in", [m], finite. Any function of the trained weights and of the canaries, but
            not of `included`.
        included: whether each canary was in the training data, by an independent fair coin, bool [m].
        delta: of the claim that is tested, in [0, 1).
        confidence: of the bound; a run with epsilon below the bound is seen with probability 1 - confidence at most.
        guesses: r, or several to try, fixed before the scores are seen. None: `GUESS_SHARES` of m.
        share_in: which part of the guesses says "in".
        family: "gaussian" gives more, and holds only if the run is Gaussian DP: Gaussian noise on a sum in which every
            patient is in every step (a sampling rate of 1), any number of steps.

    Guarantee: each canary one privacy unit, and all else about the run fixed: with probability at least `confidence`
        over the coins and the run, the run is not (e, delta)-DP under adding or removing one unit for any e below the
        bound.
    Edge cases: a bound of 0 says nothing. The ceiling is what r right guesses of r would give.
    Raises: InputError for arrays of different length, scores that are not finite, coins that cannot have been fair, or
        numbers out of range.
    Reference: Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2; Mahloujifar, Melis and Chaudhuri 2024
        (arXiv 2410.22235) for "gaussian".
    """
    scores, included = _checked(scores, included)
    m = len(scores)
    counts = _guess_counts(guesses, m)
    _check_numbers(delta, confidence, share_in, family)
    level = (1 - confidence) / len(counts)
    tried = tuple((r, right_guesses(scores, included, r, share_in=share_in)) for r in counts)
    bounds = [_lower_bound(family, m, r, v, delta, level) for r, v in tried]
    best = int(np.argmax(bounds))
    return AuditResult(
        lower_bound=bounds[best],
        ceiling=max(_lower_bound(family, m, r, r, delta, level) for r in counts),
        n_canaries=m,
        n_guesses=tried[best][0],
        n_right=tried[best][1],
        delta=float(delta),
        confidence=float(confidence),
        tried=tried,
        family=family,
    )


def ceiling(
    n_canaries: int,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: int | Sequence[int] | None = None,
    family: Family = "approximate",
) -> float:
    """The most that an audit with so many canaries can show: the bound when all guesses are right.

    Before planting, it tells whether there are enough canaries. Arguments and errors: see `audit_epsilon`.
    """
    if n_canaries < 1:
        raise InputError(f"an audit needs canaries, got {n_canaries}: plant some with plant_canaries")
    counts = _guess_counts(guesses, n_canaries)
    _check_numbers(delta, confidence, 0.5, family)
    level = (1 - confidence) / len(counts)
    return max(_lower_bound(family, n_canaries, r, r, delta, level) for r in counts)


def right_guesses(scores: np.ndarray, included: np.ndarray, n_guesses: int, *, share_in: float = 0.5) -> int:
    """How many of the `n_guesses` surest guesses are right: the highest scores guessed in, the lowest out.

    Among equal scores the wrong guesses come first, so the order of the canaries never helps.

    Args:
        scores, included: as in `audit_epsilon`.
        n_guesses: r <= m.
        share_in: share of the guesses that says "in", rounded half up.
    """
    n_in = math.floor(share_in * n_guesses + 0.5)
    highest = np.lexsort((included, -scores))[:n_in]
    lowest = np.lexsort((~included, scores))[: n_guesses - n_in]
    return int(included[highest].sum() + (~included[lowest]).sum())


def p_value(n_canaries: int, n_guesses: int, n_right: int, epsilons: np.ndarray, delta: float) -> np.ndarray:
    """P-values of "the run is (epsilon, delta)-DP" when `n_right` of `n_guesses` guessed coins are right.

    beta + 2 m delta alpha, with q = e^epsilon / (1 + e^epsilon), beta = P[Bin(r, q) >= v] and alpha = the largest, over
    i from 1 to v, of P[v > Bin(r, q) >= v - i] / i.

    Args:
        epsilons: [e], at least 0.

    Returns: [e], in [0, 1].
    Reference: Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2.
    """
    from scipy.special import expit
    from scipy.stats import binom

    q = expit(np.asarray(epsilons, dtype=np.float64))
    beta = binom.sf(n_right - 1, n_guesses, q)
    alpha = np.zeros_like(q)
    if n_right > 0 and delta > 0:
        masses = binom.pmf(np.arange(n_right - 1, -1, -1), n_guesses, q[:, None])  # [e, v], downwards from v - 1
        alpha = (np.cumsum(masses, axis=1) / np.arange(1, n_right + 1)).max(axis=1)
    return np.minimum(1.0, beta + 2 * n_canaries * delta * alpha)


def gaussian_p_value(n_canaries: int, n_guesses: int, n_right: int, mu: float) -> float:
    """P-value of "the run is mu-Gaussian-DP": the smallest chance t of `n_right` right guesses that mu does not rule
    out.

    Let p_i be the probability of just i right guesses, R_i = sum of j p_j / m and W_i = sum of (r - j) p_j / m over
    j >= i: a canary drawn at random is guessed right (wrong) while at least i are right. The guess of a canary's coin
    with i others right is one event under both sides of the coin, so W_i >= G(R_{i + 1}), where G(x) =
    Phi(Phi^-1(x) - mu). From p_v = t downwards these give the least R_0 + W_0, which must be r / m.

    Reference: Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235), algorithm 3, with two choices (in, out).
    """
    if not _ruled_out(n_canaries, n_guesses, n_right, mu, 1.0):
        return 1.0
    low, high = -700.0, 0.0  # of log t
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if _ruled_out(n_canaries, n_guesses, n_right, mu, math.exp(middle)) else (middle, high)
        )
    return math.exp(high)


def _ruled_out(m: int, r: int, v: int, mu: float, chance: float) -> bool:
    """Whether no mu-Gaussian-DP run has v of r guesses right with this probability."""
    from scipy.special import ndtr, ndtri

    right, wrong = chance * v / m, chance * (r - v) / m
    for i in range(v - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(right) - mu)))
        if least == wrong:
            break  # then nothing changes any more
        right, wrong = right + i / (r - i) * (least - wrong), least
        if right + wrong > r / m:
            return True
    return right + wrong > r / m


def _p_values(family: Family, m: int, r: int, v: int, epsilons: np.ndarray, delta: float) -> np.ndarray:
    if family == "approximate":
        return p_value(m, r, v, epsilons, delta)
    return np.array([gaussian_p_value(m, r, v, _mu_of(float(e), delta)) for e in epsilons])


@lru_cache(maxsize=4096)
def _lower_bound(family: Family, m: int, r: int, v: int, delta: float, level: float) -> float:
    """The first epsilon that is not rejected at this level; 0 if none is."""
    if family == "gaussian":
        return _first_not_rejected_mu(m, r, v, delta, level)

    def rejected(epsilons: np.ndarray) -> np.ndarray:
        return p_value(m, r, v, epsilons, delta) < level

    grid = np.arange(0.0, _LARGEST, _STEP)
    for block in np.array_split(grid, 16):  # most bounds are small
        if not (kept := rejected(block)).all():
            first = float(block[int(np.argmin(kept))])
            return _bisected(lambda e: bool(rejected(np.array([e]))[0]), first - _STEP, first) if first > 0 else 0.0
    return float(grid[-1])


def _first_not_rejected_mu(m: int, r: int, v: int, delta: float, level: float) -> float:
    """The epsilon at delta of the smallest mu that v right guesses do not rule out."""

    def rejected(mu: float) -> bool:
        return _ruled_out(m, r, v, mu, level)

    if not rejected(0.0):
        return 0.0
    high = 1.0
    while rejected(high):
        high *= 2
    return _epsilon_of(_bisected(rejected, 0.0, high), delta)


def _bisected(rejected: Callable[[float], bool], low: float, high: float) -> float:
    """The edge between `low`, which is rejected, and `high`, which is not, from below."""
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _epsilon_of(mu: float, delta: float) -> float:
    """Epsilon at delta of mu-Gaussian DP."""
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def _mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian mechanism is (epsilon, delta)-DP."""
    from dp_accounting import get_sigma_gaussian

    return 1 / float(get_sigma_gaussian(epsilon, delta))


def _guess_counts(guesses: int | Sequence[int] | None, m: int) -> tuple[int, ...]:
    if guesses is None:
        counts = [max(1, math.floor(share * m)) for share in GUESS_SHARES]
    else:
        counts = [guesses] if isinstance(guesses, int) else list(guesses)
    counts = sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > m:
        raise InputError(f"guesses must lie between 1 and the {m} canaries: fix them before the scores are seen")
    return tuple(counts)


def _checked(scores: np.ndarray, included: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import binomtest

    scores, included = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if scores.ndim != 1 or scores.shape != included.shape or len(scores) == 0:
        raise InputError(f"an audit needs one score and one coin per canary, got {scores.shape} and {included.shape}")
    if included.dtype != np.bool_:
        raise InputError(f"included must be true or false per canary, got {included.dtype}: take it from the manifest")
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} canaries have no finite score: score them again")
    n_in = int(included.sum())
    if binomtest(n_in, len(included)).pvalue < _NOT_FAIR:
        raise InputError(
            f"{n_in} of {len(included)} canaries were in, which fair coins do not give: pass all canaries of the "
            "manifest, in and out"
        )
    return scores, included


def _check_numbers(delta: float, confidence: float, share_in: float, family: str) -> None:
    if not 0 <= delta < 1:
        raise InputError(f"delta must lie in [0, 1), got {delta}: take the one of the certificate")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}: use e.g. 0.95")
    if not 0 <= share_in <= 1:
        raise InputError(f"share_in must lie in [0, 1], got {share_in}: 0.5 guesses as many in as out")
    if family not in ("approximate", "gaussian"):
        raise InputError(f"family {family!r} is not known: choose approximate or gaussian")
    if family == "gaussian" and delta == 0:
        raise InputError("Gaussian noise has no epsilon at delta 0: give the delta of the certificate")
