"""Verdicts on intervals; the strongest of several attacks and no verdict by chance; prompts above decoys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmed.evidence import overall
from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.prompt_probes import PROBES
from dpmed.release_rows import (
    NO_ATTACK,
    NO_FLOOR,
    NO_INTERVAL,
    decide,
    leak_rows,
    membership_row,
    prompt_rows,
    unpaired_difference,
)


@given(low=st.floats(-1, 1), width=st.floats(0, 1), threshold=st.floats(-1, 1))
def test_a_verdict_is_decided_on_the_interval(low: float, width: float, threshold: float) -> None:
    high = low + width
    verdict = decide("s", "c", Measure((low + high) / 2, low, high, 9, "worse"), threshold)["verdict"]
    assert (verdict == "pass") == (high <= threshold)
    assert (verdict == "fail") == (low > threshold)
    assert verdict in ("pass", "fail", "not_shown")


def test_a_bound_that_is_missing_shows_nothing_and_a_reason_is_kept() -> None:
    row = decide("s", "c", Measure(0.0, math.nan, math.nan, 3, "worse"), 0.5)
    assert (row["verdict"], row["reason"]) == ("not_shown", NO_INTERVAL)
    row = decide("s", "c", NotApplicable("no labels"), 0.5)
    assert (row["verdict"], row["reason"], row["value"]) == ("not_tested", "no labels", None)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "not_tested"], "pass"),
        (["pass", "not_shown", "fail"], "fail"),
        (["pass", "not_shown"], "not_shown"),
        (["not_tested"], "not_shown"),
        ([], "not_shown"),
    ],
)
def test_all_verdicts_together(verdicts: list[str], expected: str) -> None:
    assert overall([{"verdict": verdict} for verdict in verdicts]) == expected


def json_of(value: float, low: float | None, high: float | None, n: int = 80) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def test_the_unpaired_difference_is_newcombes() -> None:
    first, second = json_of(0.7, 0.6, 0.8), json_of(0.2, 0.1, 0.4, 50)
    found = unpaired_difference(first, second)
    assert found is not None
    assert found["value"] == pytest.approx(0.5) and found["n"] == 50
    assert found["low"] == pytest.approx(0.5 - math.sqrt(0.1**2 + 0.2**2))
    assert found["high"] == pytest.approx(0.5 + math.sqrt(0.1**2 + 0.1**2))
    assert unpaired_difference(None, second) is None


@pytest.mark.parametrize(("n", "verdict"), [(20, "not_shown"), (400, "pass")])
def test_nothing_of_n_against_nothing_has_the_upper_limit_of_n(n: int, verdict: str) -> None:
    none = json_of(0.0, *wilson(0, n), n)
    found = unpaired_difference(none, none)
    assert found is not None and found["high"] == pytest.approx(wilson(0, n)[1])
    assert decide("s", "c", found, 0.01)["verdict"] == verdict


# --- Several attacks --------------------------------------------------------------------------------------------------


def attack(value: float, half: float = 0.05) -> dict[str, Any]:
    return json_of(value, value - half, value + half)


def test_every_attack_must_pass_also_one_that_is_not_the_strongest_by_its_value() -> None:
    areas = {"loss": attack(0.53, 0.01), "zlib": attack(0.5, 0.1), "ez": None}
    row = membership_row("s", areas, 0.55)
    assert (row["attack"], row["n_attacks"], row["value"], row["verdict"]) == ("loss", 2, 0.53, "not_shown")
    assert row["high"] == pytest.approx(0.6)
    assert membership_row("s", areas | {"zlib": attack(0.5, 0.02)}, 0.55)["verdict"] == "pass"


def test_one_attack_keeps_its_interval_and_none_is_not_tested() -> None:
    row = membership_row("s", {"loss": attack(0.62)}, 0.55)
    assert (row["low"], row["high"], row["verdict"]) == (pytest.approx(0.57), pytest.approx(0.67), "fail")
    row = membership_row("s", {"loss": attack(0.62)} | {f"a{i}": attack(0.5) for i in range(5)}, 0.55)
    assert row["low"] == pytest.approx(0.62 - 0.05 * 2.638 / 1.96, abs=1e-4) and row["verdict"] == "fail"
    nothing = membership_row("s", {"ez": None}, 0.55)
    assert (nothing["verdict"], nothing["reason"]) == ("not_tested", NO_ATTACK)
    assert membership_row("s", {"loss": json_of(0.5, None, None)}, 0.55)["verdict"] == "not_shown"


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_six_attacks_that_are_as_good_as_allowed_seldom_fail_by_chance(correlation: float) -> None:
    rng, spread, failed, alone, above = np.random.default_rng(0), 0.02, 0, 0, 0
    for _ in range(2000):
        common = rng.normal() * math.sqrt(correlation)
        values = 0.55 + spread * (common + rng.normal(size=6) * math.sqrt(1 - correlation))
        areas = {str(i): attack(float(value), 1.96 * spread) for i, value in enumerate(values)}
        row = membership_row("s", areas, 0.55)
        failed += row["verdict"] == "fail"
        above += row["high"] < 0.55
        alone += max(area["low"] for area in areas.values()) > 0.55
    assert failed <= 0.035 * 2000  # 2.5 % at most in theory
    assert above <= 0.035 * 2000  # the interval holds from above too
    assert alone > 0.05 * 2000  # the largest 95 % limit by itself does not


# --- Prompts ----------------------------------------------------------------------------------------------------------


def figures_of(own: float, decoys: Any) -> dict[str, Any]:
    rate = Measure(own, own / 2, min(1.0, own * 1.5), 50, "worse")
    return {side: {probe: {"rate": r} for probe in PROBES} for side, r in (("memorization", rate), ("heldout", decoys))}


def test_prompts_have_a_row_each_and_paraphrases_their_counts() -> None:
    none = Measure(0.0, 0.0, 0.05, 60, "worse")
    rows = prompt_rows("as_released", figures_of(0.4, none), {"train": {"n_unchanged": 3}}, 0.01)
    assert [row["check"] for row in rows] == [
        "context_prompts_above_decoys",
        "paraphrased_prompts_above_decoys",
        "templates_prompts_above_decoys",
        "paraphrased_templates_prompts_above_decoys",
    ]
    assert [row["verdict"] for row in rows] == ["fail"] * 4
    assert [row.get("counts") for row in rows] == [None, {"train": {"n_unchanged": 3}}, None, None]


def test_prompts_that_were_not_asked_say_why() -> None:
    for figures in (NotApplicable("not asked"), figures_of(0.4, NotApplicable("not asked"))):
        rows = prompt_rows("s", figures, {}, 0.01)
        assert len(rows) == 4
        assert {(row["verdict"], row["reason"]) for row in rows} == {("not_tested", "not asked")}


def evaluation(auc: float, floor: float | None) -> dict[str, Any]:
    def side(area: float | None) -> dict[str, Any]:
        return {"loss": None if area is None else {"auc": json_of(area, area - 0.02, area + 0.02)}, "ez": None}

    rate = json_of(0.0, 0.0, 0.001)
    return {
        "memorization": {
            "minus_base": None,
            "membership": side(auc) | {"reference": {"auc": json_of(0.99, 0.98, 1.0)}},
            **dict.fromkeys(("extraction_rate", "identifier_extraction_rate"), rate),
        },
        "reference": {
            "heldout": dict.fromkeys(("extraction_rate", "identifier_extraction_rate"), rate),
            "base_model": None if floor is None else {"memorization": {"membership": side(floor)}},
        },
        "not_applicable": {"memorization.minus_base": "no base"},
    }


TRIES = ("n1_p0.1", "n1000_p0.9", "n1000_p0.1", "n100_p0.1")


def with_tries(found: dict[str, Any], own: float, floor: float) -> dict[str, Any]:
    """The same with records found in tries: many in the strictest, none in the others."""
    for side, rate in ((found["memorization"], own), (found["reference"]["base_model"]["memorization"], floor)):
        side["probabilistic_extraction"] = {
            name: json_of(rate, rate - 0.01, rate + 0.01) if name == "n1000_p0.1" else json_of(0.0, 0.0, 0.01)
            for name in TRIES
        }
    return found


@pytest.mark.parametrize(("own", "floor", "verdict"), [(0.3, 0.01, "fail"), (0.02, 0.02, "pass")])
def test_what_greedy_text_does_not_show_is_looked_for_in_many_tries(own: float, floor: float, verdict: str) -> None:
    found = with_tries(evaluation(0.5, 0.5), own, floor)
    rows = {row["check"]: row for row in leak_rows("s", found, (0.01, 0.01), 0.55, 0.05, 0.02)}
    row = rows["probabilistic_extraction_above_floor"]
    assert (row["verdict"], row["tries"]) == (verdict, "n1000_p0.1")
    assert row["value"] == pytest.approx(own - floor)


def test_without_a_floor_or_tries_a_reason_stands() -> None:
    rows = [leak_rows("s", evaluation(0.5, floor), (0.01, 0.01), 0.55, 0.05, 0.02) for floor in (0.5, None)]
    found = [row for side in rows for row in side if row["check"] == "probabilistic_extraction_above_floor"]
    assert [row["verdict"] for row in found] == ["not_tested"] * 2 and all(row["reason"] for row in found)


@pytest.mark.parametrize(
    ("auc", "floor", "verdict"), [(0.8, 0.81, "pass"), (0.8, 0.6, "fail"), (0.8, None, "not_tested")]
)
def test_membership_stands_above_what_the_floor_shows_too(auc: float, floor: float | None, verdict: str) -> None:
    """A clean retrain learned from the same records, so its membership is no leak of the checkpoint's own."""
    rows = {row["check"]: row for row in leak_rows("s", evaluation(auc, floor), (0.01, 0.01), 0.55, 0.05, 0.02)}
    row = rows["membership_auc_above_floor"]
    assert row["verdict"] == verdict and rows["membership_auc"]["verdict"] == "fail"
    if floor is None:
        assert row["reason"] == NO_FLOOR
    else:
        assert row["attack"] == "loss" and row["value"] == pytest.approx(auc - floor)  # not reference


def test_an_auc_without_a_limit_is_not_tested() -> None:
    rows = {row["check"]: row for row in leak_rows("s", evaluation(0.8, 0.8), (0.01, 0.01), None, 0.05, 0.02)}
    assert rows["membership_auc"]["verdict"] == "not_tested" and "null" in rows["membership_auc"]["reason"]
