"""Error bars: Wilson and Clopper-Pearson for rates, the bootstrap over patients where a patient has several records.

Records of one patient resemble each other, so an interval that takes them for independent is too narrow. Everything
here draws whole patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import beta

HigherIs = Literal["better", "worse"]
Z_95 = 1.959963984540054
_DRAWS_AT_ONCE = 2**18  # cells of a block of resamples: 2 MiB, and as much again for each step of arithmetic


@dataclass(frozen=True, slots=True)
class Measure:
    """A measured figure, its 95 % interval, how many cases it rests on, and which direction is better."""

    value: float
    low: float
    high: float
    n: int
    higher_is: HigherIs
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON keys, for instance `resolution`."""

    def to_json(self) -> dict[str, Any]:
        """The figure as JSON. A bound that is not finite becomes null, since JSON has no NaN.

        Raises: ValueError if the value itself is not finite: such a figure belongs under `not_applicable`.
        """
        if not math.isfinite(self.value):
            raise ValueError("a measured value is not finite; report it under not_applicable")
        bounds = {"low": float(self.low), "high": float(self.high)}
        return {
            "value": float(self.value),
            **{name: bound if math.isfinite(bound) else None for name, bound in bounds.items()},
            "n": int(self.n),
            "higher_is": self.higher_is,
            **self.extra,
        }


def wilson(hits: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a rate.

    Args:
        hits: successes, 0 <= hits <= n; may be a fraction (an effective count).
        n: cases, n >= 1.
        z: normal quantile; the default gives 95 %.

    Raises: ValueError outside these ranges.
    Reference: Wilson 1927.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"no rate from {hits} hits of {n} cases")
    rate = hits / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if hits == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if hits == n else min(1.0, (centre + half) / scale)
    return low, high


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate: covers at least `level` for every true rate.

    Raises: ValueError if n < 1 or hits is outside [0, n].
    Reference: Clopper and Pearson 1934.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"no rate from {hits} hits of {n} cases")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def dense_units(units: np.ndarray) -> tuple[np.ndarray, int]:
    """Units renumbered 0 .. u-1, [r], and u."""
    names, dense = np.unique(units, return_inverse=True)
    return dense, len(names)


def unit_multiplicities(n_units: int, n_resamples: int, seed: int, at_once: int | None = None) -> Iterator[np.ndarray]:
    """Blocks [b, u] of how often each unit is drawn when n_units units are drawn with replacement.

    The blocks together have n_resamples rows; each row sums to n_units. Any statistic that takes weights can be
    bootstrapped with them without copying a record.

    Args:
        at_once: rows of a block, for the sake of memory: the draws are the same however they are cut.
    """
    rng = np.random.default_rng(seed)
    at_once = at_once or max(1, _DRAWS_AT_ONCE // max(1, n_units))
    for start in range(0, n_resamples, at_once):
        rows = min(at_once, n_resamples - start)
        drawn = rng.integers(n_units, size=(rows, n_units)) + np.arange(rows)[:, None] * n_units
        yield np.bincount(drawn.ravel(), minlength=rows * n_units).reshape(rows, n_units)


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values; (nan, nan) when none is finite."""
    finite = resampled[np.isfinite(resampled)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_by_unit(
    statistic: Callable[[np.ndarray], float], units: np.ndarray, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of any statistic of the records, drawing whole units with replacement.

    Args:
        statistic: takes indices into the records (a record may occur several times) and gives a number; NaN where a
            resample does not allow it (only one class drawn, for instance): such resamples are left out.
        units: unit of each record, [r].
        n_resamples: number of resamples.
        seed: fixes the draws.
    """
    dense, n_units = dense_units(units)
    if n_units == 0 or n_resamples == 0:
        return math.nan, math.nan
    order = np.argsort(dense, kind="stable")
    sizes = np.bincount(dense, minlength=n_units)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rng = np.random.default_rng(seed)
    values = np.empty(n_resamples)
    for i in range(n_resamples):
        drawn = rng.integers(n_units, size=n_units)
        lengths = sizes[drawn]
        first = np.cumsum(lengths) - lengths  # where each drawn unit's records begin in the resample
        index = np.repeat(starts[drawn] - first, lengths) + np.arange(lengths.sum())
        values[i] = statistic(order[index])
    return percentile_interval(values)


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, units: np.ndarray, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator) over records, drawing whole units; vectorised."""
    dense, n_units = dense_units(units)
    if n_units == 0 or n_resamples == 0:
        return math.nan, math.nan
    top = np.bincount(dense, weights=numerator, minlength=n_units)
    bottom = np.bincount(dense, weights=denominator, minlength=n_units)
    ratios: list[np.ndarray] = []
    for drawn in unit_multiplicities(n_units, n_resamples, seed):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((drawn @ top) / (drawn @ bottom))
    return percentile_interval(np.concatenate(ratios))


def independent_difference(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """(value, low, high) of the first minus the second of two independent figures, from theirs.

    Reference: Zou and Donner 2008; with Wilson's intervals it is Newcombe's (1998, method 10). Two rates of 0 give an
    interval as wide as theirs, never 0.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    return a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def rate_by_unit(
    hits: np.ndarray, units: np.ndarray, higher_is: HigherIs, bootstrap: int = 1000, seed: int = 0
) -> Measure:
    """A rate over records with its 95 % interval.

    Args:
        hits: success of each case, bool [r].
        units: unit of each case, int [r].
        higher_is: which direction is better.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: n counts the cases. The interval is Wilson's where every unit has one case, else the bootstrap over units;
    where that says nothing (all resamples agree), Wilson's with as many cases as there are units.
    Raises: ValueError without any case.
    """
    hits = np.asarray(hits, dtype=bool)
    if len(hits) == 0:
        raise ValueError("no rate from 0 cases")
    dense, n_units = dense_units(units)
    rate = float(hits.mean())
    if n_units == len(hits):
        low, high = wilson(int(hits.sum()), n_units)
        return Measure(rate, low, high, len(hits), higher_is)
    low, high = math.nan, math.nan
    if 0 < rate < 1:
        low, high = bootstrap_ratio(hits.astype(float), np.ones(len(hits)), dense, bootstrap, seed)
    if not low < high:  # also NaN: no resample was asked for
        low, high = wilson(rate * n_units, n_units)
    return Measure(rate, low, high, len(hits), higher_is)


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Stands where a figure would, with the reason why there is none."""

    reason: str


def figures_json(figures: Mapping[str, Any], at: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """A tree of figures as JSON, and why the missing ones are missing.

    Args:
        figures: nested mappings whose leaves are `Measure`, `NotApplicable` or plain JSON values.
        at: dotted path of this tree in the whole document.

    Returns: the tree with null for what does not apply, and {dotted key: reason}.
    """
    tree: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, figure in figures.items():
        key = f"{at}.{name}" if at else name
        if isinstance(figure, Measure):
            tree[name] = figure.to_json()
        elif isinstance(figure, NotApplicable):
            tree[name] = None
            reasons[key] = figure.reason
        elif isinstance(figure, Mapping):
            tree[name], inner = figures_json(figure, key)
            reasons.update(inner)
        else:
            tree[name] = figure
    return tree, reasons
