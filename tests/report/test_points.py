"""The frontier against brute force, and points made from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.made_up import make_certificate, make_evaluation

from dpmed.errors import InputError
from dpmed.report.points import lookup, non_dominated, points_from_run_folder

_VALUES = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(allow_nan=True, allow_infinity=True))


def _point(utility: float | None, leak: float | None, *, higher_is: str = "better") -> dict[str, Any]:
    return {
        "utility": {"f1_weighted": None if utility is None else {"value": utility, "higher_is": higher_is}},
        "memorization": {"identifier_extraction_rate": None if leak is None else {"value": leak, "higher_is": "worse"}},
    }


def _finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")


@given(st.lists(st.tuples(_VALUES, _VALUES), max_size=12), st.booleans())
def test_non_dominated_agrees_with_comparing_all_pairs(pairs: list[tuple[Any, Any]], lower_is_better: bool) -> None:
    sign = -1.0 if lower_is_better else 1.0
    expected = []
    for utility, leak in pairs:
        beaten = False
        for other_utility, other_leak in pairs:
            if not (_finite(other_utility) and _finite(other_leak) and _finite(utility) and _finite(leak)):
                continue
            as_good = sign * other_utility >= sign * utility and other_leak <= leak
            beaten |= as_good and (other_utility != utility or other_leak != leak)
        expected.append(_finite(utility) and _finite(leak) and not beaten)
    points = [_point(u, x, higher_is="worse" if lower_is_better else "better") for u, x in pairs]
    assert non_dominated(points) == expected


def test_a_point_with_a_null_is_never_on_the_frontier_and_hides_nobody() -> None:
    assert non_dominated([_point(0.9, None), _point(0.5, 0.5), _point(None, 0.0), {}]) == [False, True, False, False]


def test_lookup_finds_keys_that_hold_dots() -> None:
    tree = {"memorization": {"membership_tpr_at_fpr_0.01": {"value": 0.3}}}
    assert lookup(tree, "memorization.membership_tpr_at_fpr_0.01.value") == 0.3
    assert lookup(tree, "memorization.membership_tpr_at_fpr_0.1") is None


def write_run(folder: Path, *, status: str = "finished", **extra: Any) -> Path:
    folder.mkdir()
    run = {"name": "dp_lora-eps8-s3", "method": "dp_lora", "seed": 3, "status": status, "seconds": 12.5, **extra}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "evaluation.json").write_text(json.dumps(make_evaluation(0.6, 0.03, 0.52, 3)))
    return folder


def test_a_run_folder_becomes_a_point(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", peak_memory_bytes=10**9)
    (folder / "privacy.json").write_text(json.dumps(make_certificate(7.98)))
    point = points_from_run_folder(folder)
    assert (point["name"], point["setting"], point["seed"]) == ("dp_lora-eps8-s3", "dp_lora-eps8", 3)
    assert (point["epsilon"], point["delta"], point["unit"]) == (7.98, 1e-5, "patient_id")
    assert point["cost"] == {"seconds": 12.5, "peak_memory_bytes": 1e9}
    assert point["utility"]["f1_weighted"]["value"] == 0.6
    assert point["not_applicable"]["memorization.canary_exposure"] == "no canaries were planted"


@pytest.mark.parametrize("private", [False, None])
def test_a_run_without_a_guarantee_has_no_epsilon(tmp_path: Path, private: bool | None) -> None:
    folder = write_run(tmp_path / "run")
    if private is False:
        (folder / "privacy.json").write_text(json.dumps({**make_certificate(7.98), "private": False}))
    point = points_from_run_folder(folder)
    assert (point["epsilon"], point["delta"], point["unit"]) == (None, None, None)


def test_an_unfinished_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "halfway", status="running")
    with pytest.raises(InputError, match=r"halfway.*running.*--resume"):
        points_from_run_folder(folder)


@pytest.mark.parametrize(("missing", "remedy"), [("run.json", "--output_dir"), ("evaluation.json", "dpmed evaluate")])
def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path, missing: str, remedy: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"no {missing}.*{remedy}"):
        points_from_run_folder(folder)


def test_broken_json_is_named_without_quoting_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text('{"secret name": ')
    with pytest.raises(InputError, match=r"evaluation\.json: is not valid JSON") as caught:
        points_from_run_folder(folder)
    assert "secret" not in str(caught.value)
