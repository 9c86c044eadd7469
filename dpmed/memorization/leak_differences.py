"""Leak rates of generated text minus what the base model leaks, and minus what leaks of decoys.

A rate says little by itself: some values can be guessed. The base model was asked the same prompts for the same values,
so that difference is taken value by value. Decoys are values of other patients: there both rates vary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpmed.memorization.intervals import Measure, NotApplicable, independent_difference, rate_by_unit
from dpmed.memorization.leak_probes import STRATA, IdentifierValues
from dpmed.memorization.paired import paired_rate_difference

NO_VALUE = "no known identifier that this probe could find; name data.identifiers"
NO_DECOY = "no decoy to compare with: no known identifier of held-out patients alone that this probe could find"
OTHER_RECORDS = "the base model was not asked the same"


@dataclass(frozen=True, repr=False)  # holds text
class Leaked:
    """What one model leaked of one side's values by one probe.

    Shapes: v = values.
    """

    values: IdentifierValues
    leaked: np.ndarray
    """bool [v]."""
    tested: np.ndarray
    """Which values the probe could have found, bool [v]."""

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """Tested values of all kinds, by type and by stratum, bool [v] each; groups without a value are left out."""
        types = {str(name): self.tested & (self.values.type == name) for name in np.unique(self.values.type)}
        strata = {name: self.tested & self.values.stratum(name) for name in STRATA}
        return {
            "rate": {"rate": self.tested},
            "types": {name: chosen for name, chosen in types.items() if chosen.any()},
            "strata": {name: chosen for name, chosen in strata.items() if chosen.any()},
        }


Leaks = Mapping[str, Leaked]
"""By probe; a probe that was not tried, or had no value to find, is not there."""


def minus_base(tuned: Leaks, base: Leaks, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Share of one side's values that leaked, minus the base model's: {probe: {"rate", "types": {}, "strata": {}}}.

    Paired: the same values and prompts, and each resample draws the same patients for both.

    Args:
        tuned: of the model.
        base: of the model before fine-tuning, on the same records.
        bootstrap: resamples of units.
        seed: of the resamples.
    """

    def difference(probe: str, chosen: np.ndarray) -> Measure | NotApplicable:
        if not chosen.any():
            return NotApplicable(NO_VALUE)
        own = tuned[probe]
        return paired_rate_difference(
            own.leaked[chosen],
            base[probe].leaked[chosen],
            own.values.unit[chosen],
            "worse",
            bootstrap=bootstrap,
            seed=seed,
        )

    found: dict[str, Any] = {}
    for probe, own in tuned.items():
        if probe not in base or not np.array_equal(own.tested, base[probe].tested):
            found[probe] = NotApplicable(OTHER_RECORDS)
        else:
            found[probe] = _tree({p: {n: difference(probe, c) for n, c in g.items()} for p, g in own.groups().items()})
    return found


def minus_decoys(tuned: Leaks, decoys: Leaks, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Share of training values that leaked, minus that of decoys, in the form of `minus_base`.

    n counts the training values, `n_decoys` in `extra` the decoys. The interval is made of those of the two rates.

    Args:
        tuned: of the training side.
        decoys: of the same model and the held-out side.
        bootstrap: resamples of units of each side.
        seed: of the resamples.
    """

    def rate(side: Leaked, chosen: np.ndarray) -> Measure:
        return rate_by_unit(side.leaked[chosen], side.values.unit[chosen], "worse", bootstrap, seed)

    def difference(probe: str, part: str, name: str, chosen: np.ndarray) -> Measure | NotApplicable:
        if not chosen.any():
            return NotApplicable(NO_VALUE)
        others = decoys[probe].groups()[part].get(name) if probe in decoys else None
        if others is None or not others.any():
            return NotApplicable(NO_DECOY)
        floor = rate(decoys[probe], others)
        return unpaired_difference(rate(tuned[probe], chosen), floor, {"n_decoys": floor.n})

    return {
        probe: _tree({p: {n: difference(probe, p, n, c) for n, c in g.items()} for p, g in own.groups().items()})
        for probe, own in tuned.items()
    }


def minus_base_and_decoys(own: Mapping[str, Any], decoys: Mapping[str, Any]) -> dict[str, Any]:
    """What fine-tuning added to the leak rate of training values, minus what it added to that of decoys: {probe: ...}.

    Args:
        own: `minus_base` of the training side.
        decoys: `minus_base` of the decoys.
    """
    found: dict[str, Any] = {}
    for probe, tree in own.items():
        first, second = (_rate_of(one) for one in (tree, decoys.get(probe, NotApplicable(NO_DECOY))))
        if isinstance(first, NotApplicable) or isinstance(second, NotApplicable):
            found[probe] = first if isinstance(first, NotApplicable) else NotApplicable(NO_DECOY)
        else:
            found[probe] = unpaired_difference(first, second, {"n_decoys": second.n})
    return found


def unpaired_difference(first: Measure, second: Measure, extra: Mapping[str, Any]) -> Measure:
    """First minus second of two independent figures, with an interval made of theirs.

    Returns: n is that of the first. See `independent_difference`.
    """
    value, low, high = independent_difference(
        (first.value, first.low, first.high), (second.value, second.low, second.high)
    )
    return Measure(value, low, high, first.n, first.higher_is, extra)


def _rate_of(tree: Mapping[str, Any] | NotApplicable) -> Measure | NotApplicable:
    return tree if isinstance(tree, NotApplicable) else tree["rate"]


def _tree(groups: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {"rate": groups["rate"]["rate"], "types": groups["types"], "strata": groups["strata"]}
