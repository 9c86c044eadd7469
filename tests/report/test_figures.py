"""What the figures draw: the right marks at the right places."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from report.made_up import make_points

from dpmed.report.attack_figures import extraction_by_prefix, membership_roc
from dpmed.report.frontier_figures import f1_against_epsilon, f1_against_extraction
from dpmed.report.labels import place_labels
from dpmed.report.settings import group_settings


def _rows(chart: Any) -> list[dict[str, Any]]:
    """All data rows of a chart, wherever altair put them."""

    def walk(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = node["values"] if isinstance(node.get("values"), list) else []
            inside = [row for value in node.values() for row in walk(value)]
            return [row for row in own if isinstance(row, dict)] + inside
        return [row for item in node for row in walk(item)] if isinstance(node, list) else []

    return walk(chart.to_dict())


def test_epsilon_figure_holds_private_means_and_levels_of_the_rest() -> None:
    rows = _rows(f1_against_epsilon(group_settings(make_points()), utility="f1_weighted"))
    assert {row["x"] for row in rows if row.get("family")} == {0.993, 2.991, 7.982}
    levels = {row["method"] for row in rows if "x" not in row}
    assert levels == {"base", "full", "lora", "sani", "repair_only"}


def test_exchange_figure_marks_the_non_dominated_settings() -> None:
    points = make_points()
    for point in points:
        if point["setting"] == "repair_only":
            point["utility"]["f1_weighted"]["value"] = 0.4
    rows = _rows(
        f1_against_extraction(group_settings(points), utility="f1_weighted", leak="identifier_extraction_rate")
    )
    flags = {row["label"]: row["frontier"] for row in rows if "frontier" in row}
    assert flags["full"] and flags["dp_lora-eps8"] and not flags["repair_only"]
    assert {row["level"] for row in rows if "level" in row} == {
        "Held-out patients, highest of all settings",
        "Base model, not fine-tuned",
    }


def test_prefix_figure_sets_heldout_beside_training() -> None:
    rows = _rows(extraction_by_prefix(group_settings(make_points())))
    assert {row["p"] for row in rows} == {10, 20, 50, 100}
    assert {row["source"] for row in rows} == {"training records", "held-out records"}
    assert len(rows) == 8 * 4 * 2


def test_roc_averages_over_seeds_at_equal_false_positive_rates() -> None:
    points = [p for p in make_points() if p["setting"] == "full"]
    for point, tpr in zip(points, (0.2, 0.6), strict=True):
        point["memorization"]["membership"]["reference"]["roc"] = {"fpr": [0, 0.01, 1], "tpr": [0, tpr, 1]}
    means = [r for r in _rows(membership_roc(group_settings(points))) if r.get("run") == "full"]
    assert {row["fpr"]: row["tpr"] for row in means} == {0.01: pytest.approx(0.4), 1: pytest.approx(1.0)}


def test_a_chart_without_data_is_none() -> None:
    settings = group_settings([{"name": "bare", "method": "full"}])
    assert f1_against_epsilon(settings, utility="f1_weighted") is None
    assert f1_against_extraction(settings, utility="f1_weighted", leak="extraction_rate") is None
    assert extraction_by_prefix(settings) is None
    assert membership_roc(settings) is None


def test_labels_of_a_cluster_do_not_cover_each_other() -> None:
    marks = [(100.0, 100.0 + 9 * k, f"setting {k}") for k in range(6)]
    places = place_labels(marks, width=620, height=380)
    width = 6.6 * len("setting 0")
    for (x, y), (other_x, other_y) in itertools.combinations(places, 2):
        assert abs(x - other_x) >= width or abs(y - other_y) >= 16
    assert all(0 <= x <= 620 - width and 8 <= y <= 372 for x, y in places)
