"""Two models on the same records.

Two intervals that overlap do not say that two models agree: most of their width is the choice of patients, which both
models share. The difference is therefore taken record by record, and each resample draws the same patients for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dpmed.memorization.intervals import (
    HigherIs,
    Measure,
    NotApplicable,
    bootstrap_ratio,
    dense_units,
    wilson,
)

FEW_UNITS = 6
"""Of units that differ in one direction: fewer, and resampling cannot show how many more there may be."""


def paired_rate_difference(
    first: np.ndarray,
    second: np.ndarray,
    units: np.ndarray,
    higher_is: HigherIs,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Measure:
    """Rate of the first model minus rate of the second, on the same cases.

    Args:
        first: success of each case with the first model, bool [r].
        second: the same with the second model, bool [r].
        units: unit of each case, int [r].
        higher_is: whether a higher rate is better or worse.
        bootstrap: resamples of units, the same for both models.
        seed: of the resamples.

    Returns: n counts the cases. `extra` holds `p_value`, its `test`, and `n_only_first` and `n_only_second`, the cases
    where one model alone succeeds. With one case a unit the test is McNemar's exact one; else the exact sign test over
    units of which model has more successes there, which is the same for single cases but does not take the cases of
    one patient for independent. The interval is the percentile bootstrap over units; where all resamples agree, the
    one of Newcombe with as many cases as there are units. A limit is never narrower than Newcombe's in a direction in
    which fewer than `FEW_UNITS` units differ: of five units one of which differs, no resample shows the other way.
    Raises: ValueError without any case, or if the lengths differ.
    Reference: McNemar 1947; Newcombe 1998 (method 10 without its correlation term).
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    _check(first, second, units)
    dense, n_units = dense_units(units)
    only_first, only_second = first & ~second, ~first & second
    difference = only_first.astype(float) - only_second
    low, high = bootstrap_ratio(difference, np.ones(len(first)), dense, bootstrap, seed)
    up, down = float(only_first.mean()), float(only_second.mean())
    net = np.bincount(dense, weights=difference, minlength=n_units)
    won, lost = int((net > 0).sum()), int((net < 0).sum())
    (up_low, up_high), (down_low, down_high) = (wilson(rate * n_units, n_units) for rate in (up, down))
    agree = not low < high  # also NaN: no resample was asked for
    if agree or lost < FEW_UNITS:
        least = up - down - math.hypot(up - up_low, down_high - down)
        low = least if agree else min(low, least)
    if agree or won < FEW_UNITS:
        most = up - down + math.hypot(up_high - up, down - down_low)
        high = most if agree else max(high, most)
    extra = {
        "p_value": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
        "test": "exact McNemar" if n_units == len(first) else "exact sign test over units",
        "n_only_first": int(only_first.sum()),
        "n_only_second": int(only_second.sum()),
    }
    value = up - down
    return Measure(value, max(-1.0, min(low, value)), min(1.0, max(high, value)), len(first), higher_is, extra)


def paired_mean_difference(
    first: np.ndarray,
    second: np.ndarray,
    units: np.ndarray,
    higher_is: HigherIs,
    *,
    weights: np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Measure | NotApplicable:
    """Mean of the first model's values minus mean of the second's, on the same cases.

    Args:
        first: value of each case with the first model, [r]; NaN where there is none.
        second: the same with the second model, [r].
        units: unit of each case, int [r].
        higher_is: whether higher values are better or worse.
        weights: of each case, [r], for example its number of tokens; equal by default.
        bootstrap: resamples of units, the same for both models.
        seed: of the resamples.

    Returns: n counts the cases that have both values; `n_left_out` in `extra` the others. The interval is the
    percentile bootstrap over units; not finite (null in JSON) for a single unit, or where all units differ by the same.
    Raises: ValueError if the lengths differ, or a weight is negative.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    _check(first, second, units)
    weight = np.ones(len(first)) if weights is None else np.asarray(weights, dtype=float)
    if len(weight) != len(first) or (weight < 0).any():
        raise ValueError("weights must be one per case, and not negative")
    both = np.isfinite(first) & np.isfinite(second)
    if not weight[both].sum() > 0:
        return NotApplicable("no record has a value with both models")
    weight, difference, units = weight[both], (first - second)[both], np.asarray(units)[both]
    low, high = bootstrap_ratio(weight * difference, weight, units, bootstrap, seed)
    if not low < high:
        low, high = math.nan, math.nan
    value = float((weight * difference).sum() / weight.sum())
    low, high = min(low, value), max(high, value)  # a bound that is not a number stays so: it stands first
    return Measure(value, low, high, int(both.sum()), higher_is, {"n_left_out": int((~both).sum())})


@dataclass(frozen=True, slots=True)
class Cases:
    """What one model did in each case, before any rate is taken: what a figure of two models is made of."""

    values: np.ndarray
    """Success of each case, bool [r]; or a value, float [r], NaN where there is none."""
    units: np.ndarray
    """Unit of each case, int [r]."""
    higher_is: HigherIs


Outcomes = Mapping[str, "Cases | NotApplicable | Outcomes"]
"""A tree of figures with the cases that each is made of."""


def paired_differences(first: Outcomes, second: Outcomes, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Every figure of the first model minus that of the second, on the same cases.

    Args:
        first, second: trees of the same keys, from the same records and the same settings.

    Returns: a tree of the same keys: `paired_rate_difference` of successes, `paired_mean_difference` of values, and the
    reason where one of the two models has none, or there is no case.
    Raises: ValueError if keys, cases or units of the two differ.
    """
    if set(first) != set(second):
        raise ValueError("the figures of the two models are not the same ones")
    found: dict[str, Any] = {}
    for name, own in first.items():
        other = second[name]
        missing = next((each for each in (own, other) if isinstance(each, NotApplicable)), None)
        if missing is not None:
            found[name] = missing
        elif isinstance(own, Cases) and isinstance(other, Cases):
            found[name] = _difference(own, other, bootstrap, seed)
        elif isinstance(own, Mapping) and isinstance(other, Mapping):
            found[name] = paired_differences(own, other, bootstrap=bootstrap, seed=seed)
        else:
            raise ValueError(f"{name} is a figure of one model and a group of figures of the other")
    return found


def _difference(first: Cases, second: Cases, bootstrap: int, seed: int) -> Measure | NotApplicable:
    if not np.array_equal(first.units, second.units) or first.values.dtype != second.values.dtype:
        raise ValueError("the cases of the two models are not the same ones")
    if len(first.values) == 0:
        return NotApplicable("no case was tested")
    pair = (first.values, second.values, first.units, first.higher_is)
    if first.values.dtype == bool:
        return paired_rate_difference(*pair, bootstrap=bootstrap, seed=seed)
    return paired_mean_difference(*pair, bootstrap=bootstrap, seed=seed)


def _check(first: np.ndarray, second: np.ndarray, units: np.ndarray) -> None:
    if len(first) == 0 or len(first) != len(second) or len(first) != len(units):
        raise ValueError(f"no pairs of {len(first)} and {len(second)} cases with {len(units)} units")
