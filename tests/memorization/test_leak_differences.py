"""Leak rates minus those of the base model and of decoys: value by value, over patients, and told apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import binomtest

from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_ratio, wilson
from dpmed.memorization.leak_differences import (
    Leaked,
    minus_base,
    minus_base_and_decoys,
    minus_decoys,
    unpaired_difference,
)
from dpmed.memorization.leak_probes import IdentifierValues, identifier_values

RNG = np.random.default_rng(4)


def values(n_patients: int, *, per_patient: int, start: int) -> IdentifierValues:
    """So many names and record numbers of each patient, each in one note."""
    rows = []
    for p in range(n_patients):
        pieces = [f"N{start + p}abc{j}" if j % 2 else f"{start + p:04d}{j:03d}" for j in range(per_patient)]
        text, spans = "", []
        for j, piece in enumerate(pieces):
            kind = "NAME" if j % 2 else "MRN"
            spans.append({"start": len(text), "end": len(text) + len(piece), "type": kind, "source": "known"})
            text += piece + " "
        rows.append({"text": text, "unit": f"u{start + p}", "record_id": str(p), "identifiers": spans})
    return identifier_values(Dataset.from_list(rows))


def leaked(of: IdentifierValues, share: float, *, tested: float = 1.0) -> Leaked:
    asked = RNG.random(len(of)) < tested
    return Leaked(of, asked & (RNG.random(len(of)) < share), asked)


OWN, DECOYS = values(40, per_patient=4, start=1000), values(30, per_patient=4, start=5000)


def test_the_difference_from_the_base_is_paired_by_value_and_drawn_by_patient() -> None:
    tuned = leaked(OWN, 0.5, tested=0.8)
    base = Leaked(OWN, tuned.leaked & (np.arange(len(OWN)) % 3 == 0), tuned.tested)
    tree = minus_base({"context": tuned}, {"context": base}, bootstrap=400, seed=1)["context"]
    at = tuned.tested
    difference = tuned.leaked[at].astype(float) - base.leaked[at]
    found = tree["rate"]
    assert found.value == pytest.approx(difference.mean()) and found.n == at.sum() and found.higher_is == "worse"
    low, high = bootstrap_ratio(difference, np.ones(at.sum()), OWN.unit[at], 400, 1)
    assert found.low <= low and found.high >= high  # at least as wide as the bootstrap over patients
    assert 0 < found.low < found.value < found.high
    won = len({u for u, d in zip(OWN.unit[at], difference, strict=True) if d > 0})  # no value leaked less than before
    assert found.extra["p_value"] == pytest.approx(binomtest(won, won).pvalue)
    for kind in ("NAME", "MRN"):
        own = at & (OWN.type == kind)
        assert tree["types"][kind].value == pytest.approx((tuned.leaked[own].astype(float) - base.leaked[own]).mean())
    assert set(tree["types"]) == {"NAME", "MRN"} and set(tree["strata"]) == {"1"}
    assert tree["strata"]["1"].value == found.value


def test_the_difference_from_decoys_is_of_two_groups_of_patients() -> None:
    tuned, decoys = leaked(OWN, 0.5), leaked(DECOYS, 0.1)
    tree = minus_decoys({"free": tuned}, {"free": decoys}, bootstrap=400)["free"]
    found = tree["rate"]
    assert found.value == pytest.approx(tuned.leaked.mean() - decoys.leaked.mean())
    assert (found.n, found.extra["n_decoys"]) == (160, 120) and found.low > 0
    own, other = tuned.leaked[OWN.type == "MRN"], decoys.leaked[DECOYS.type == "MRN"]
    assert tree["types"]["MRN"].value == pytest.approx(own.mean() - other.mean())


def test_the_interval_of_two_groups_covers_as_often_as_it_says() -> None:
    """Patients with four values that leak together: an interval over values would be too narrow."""
    truth, hits = 0.3, 0
    for _ in range(300):
        pairs = []
        for side, rate in ((OWN, 0.5), (DECOYS, 0.2)):
            by_patient = RNG.random(side.unit.max() + 1) < rate
            pairs.append(Leaked(side, by_patient[side.unit], np.ones(len(side), bool)))
        found = minus_decoys({"free": pairs[0]}, {"free": pairs[1]}, bootstrap=200)["free"]["rate"]
        hits += found.low <= truth <= found.high
    assert hits / 300 > 0.9


def test_newcombe_1998_of_two_wilson_intervals() -> None:
    """Example (a) of the paper: 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    first, second = (Measure(k / n, *wilson(k, n), n, "worse") for k, n in ((56, 70), (48, 80)))
    found = unpaired_difference(first, second, {})
    assert (found.value, found.low, found.high) == (
        pytest.approx(0.2),
        pytest.approx(0.0524, abs=1e-4),
        pytest.approx(0.3339, abs=1e-4),
    )


def test_what_training_added_beyond_decoys() -> None:
    """A model that writes more identifiers of anybody, also of decoys, has learnt the form and not the patients."""
    everyone = [Leaked(s, np.arange(len(s)) % 5 < 2, np.ones(len(s), bool)) for s in (OWN, DECOYS)]
    nothing = [Leaked(side, np.zeros(len(side), bool), np.ones(len(side), bool)) for side in (OWN, DECOYS)]
    added = [minus_base({"free": a}, {"free": b}, bootstrap=300) for a, b in zip(everyone, nothing, strict=True)]
    assert added[0]["free"]["rate"].low > 0
    found = minus_base_and_decoys(added[0], added[1])["free"]
    assert found.low < 0 < found.high
    assert found.value == pytest.approx(added[0]["free"]["rate"].value - added[1]["free"]["rate"].value)


def test_what_cannot_be_compared_has_a_reason() -> None:
    own, none = leaked(OWN, 0.5), OWN.without(set(range(len(OWN))))
    untested = Leaked(OWN, np.zeros(len(OWN), bool), np.zeros(len(OWN), bool))
    trees: list[Any] = [
        minus_base({"free": own}, {}),
        minus_base({"free": own}, {"free": untested}),
        minus_base_and_decoys(minus_base({"free": own}, {}), {}),
        minus_base_and_decoys(minus_base({"free": own}, {"free": own}), {}),
    ]
    assert all(isinstance(tree["free"], NotApplicable) for tree in trees)
    assert isinstance(minus_decoys({"free": own}, {})["free"]["rate"], NotApplicable)
    assert isinstance(minus_decoys({"free": untested}, {"free": own})["free"]["rate"], NotApplicable)
    empty = Leaked(none, np.zeros(0, bool), np.zeros(0, bool))
    assert isinstance(minus_decoys({"free": own}, {"free": empty})["free"]["rate"], NotApplicable)
    assert "abc" not in repr(own)  # no value in a representation


def test_equal_models_differ_by_nothing() -> None:
    own = leaked(OWN, 0.5)
    found = minus_base({"free": own}, {"free": own})["free"]["rate"]
    assert found.value == 0 and found.low < 0 < found.high and math.isfinite(found.low)
