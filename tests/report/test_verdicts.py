"""The sentences of the first screen follow the stated rule."""

from __future__ import annotations

from typing import Any

from report.made_up import make_certificate, make_points, measured

from dpmed.report.certificate import Certificate, statements
from dpmed.report.settings import chosen_utility, group_settings
from dpmed.report.verdicts import decide, setting_like_heldout

Point = dict[str, Any]


def _with_leak(points: list[Point], start: str, value: float) -> list[Point]:
    for point in points:
        if point["name"].startswith(start):
            point["memorization"]["identifier_extraction_rate"] = measured(value, 1310, "worse")
    return points


def test_names_the_best_private_setting_that_is_like_heldout() -> None:
    verdict = decide(group_settings(make_points()))
    assert verdict.chosen is not None and verdict.chosen.name == "dp_lora-eps8"
    assert "not distinguishable from held-out patients" in verdict.headline


def test_a_leaking_private_setting_is_passed_over() -> None:
    verdict = decide(group_settings(_with_leak(make_points(), "dp_lora-eps8", 0.3)))
    assert verdict.chosen is not None and verdict.chosen.name == "dp_lora-eps3"


def test_says_so_when_none_qualifies() -> None:
    verdict = decide(group_settings(_with_leak(make_points(), "dp_lora", 0.3)))
    assert verdict.chosen is None
    assert "No private setting kept its identifier extraction down" in verdict.headline
    assert verdict.cards[0].answer == "None qualifies"


def test_says_so_when_nothing_is_private() -> None:
    points = [point for point in make_points() if point["epsilon"] is None]
    assert "No setting here has a privacy guarantee" in decide(group_settings(points)).headline


def test_a_missing_heldout_figure_is_not_a_pass() -> None:
    points = make_points()
    for point in points:
        point["reference"] = {}
    verdict = decide(group_settings(points))
    assert verdict.chosen is None and "was not measured" in verdict.headline


def test_one_leaking_seed_is_not_averaged_away() -> None:
    points = [p for p in make_points() if p["setting"] == "dp_lora-eps8"]
    twin = {**make_points()[0], "name": "dp_lora-eps8-s1", "setting": "dp_lora-eps8", "method": "dp_lora"}
    settings = group_settings([*points, *_with_leak([twin], "dp_lora", 0.05)])
    assert len(settings) == 1
    assert setting_like_heldout(settings[0], "identifier_extraction_rate") is False


def test_an_auc_below_one_half_is_not_called_more_private() -> None:
    points = [p for p in make_points() if p["setting"] != "dp_lora-eps8"]
    points = [p for p in points if p["setting"] != "dp_lora-eps3"]
    assert any("below 0.5 is not more private" in line for line in decide(group_settings(points)).lines)


def test_a_pass_on_identifiers_does_not_hide_extracted_records() -> None:
    points = make_points()
    for point in points:
        if point["setting"] == "dp_lora-eps8":
            point["memorization"]["extraction_rate"] = measured(0.4, 420, "worse")
    assert any(
        line.startswith("dp_lora-eps8") and line.endswith("it leaks.") for line in decide(group_settings(points)).lines
    )


def test_perplexity_is_the_utility_when_there_is_no_f1_and_lower_is_better() -> None:
    points = make_points()
    for point in points:
        point["utility"] = {"f1_weighted": None, "perplexity": point["utility"]["perplexity"]}
    settings = group_settings(points)
    assert chosen_utility(settings) == "perplexity"
    verdict = decide(settings)
    assert verdict.chosen is not None and verdict.chosen.name == "dp_lora-eps8"
    assert verdict.cards[3].answer.endswith("higher")


def test_settings_average_over_seeds_and_keep_the_range() -> None:
    full = next(s for s in group_settings(make_points()) if s.name == "full")
    figure = full.summary("utility.f1_weighted")
    values = [p["utility"]["f1_weighted"]["value"] for p in full.points]
    assert figure is not None and figure.n_seeds == 2
    assert abs(figure.value - sum(values) / 2) < 1e-12
    assert (figure.seed_low, figure.seed_high) == (min(values), max(values))


def test_certificates_warn_of_what_must_not_be_overlooked() -> None:
    sound = make_certificate(8.0)
    assert Certificate("a", sound, 2.0).warnings == []
    assert "do not release" in Certificate("a", sound, 9.0).warnings[0]
    assert "smaller delta" in Certificate("a", {**sound, "delta": 0.01}).warnings[0]
    assert "accountants differ" in Certificate("a", {**sound, "epsilon_prv": 6.0}).warnings[0]
    assert "not one patient" in Certificate("a", {**sound, "unit": "record"}).warnings[0]
    assert Certificate("a", {**sound, "unit": "medical_record_number"}).warnings == []


def test_statements_name_the_runs_only_where_they_differ() -> None:
    pair = [Certificate("a", {"engine": "x", "accountant": "y"}), Certificate("b", {"engine": "x", "accountant": "z"})]
    assert statements(pair, "engine") == ["x"]
    assert statements(pair, "accountant") == ["y (a)", "z (b)"]
