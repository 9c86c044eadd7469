"""The whole report from a made-up study: one small page that loads nothing, a flat table, figures."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report.made_up import HOSTILE_NAME, make_certificate, make_evaluation, make_meta, make_points, write_frontier
from report.pages import Page

from dpmed.errors import InputError
from dpmed.report.build import build_report

FIGURES = ("f1_against_epsilon", "f1_against_extraction", "extraction_by_prefix", "membership_roc")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    return build_report([write_frontier(root / "frontier", make_points(), make_meta())], root / "out")


def test_the_page_is_one_small_file_that_loads_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert report.name == "report.html" and len(text.encode()) < 1_000_000
    page = Page(text)
    loads = [value for key, value in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    assert loads and all(value.startswith("#") for value in loads)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "http" not in text and "@import" not in text


def test_ids_are_unique_and_links_lead_somewhere(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    wanted = [value[1:] for key, value in page.attributes if key == "href"]
    wanted += [value for key, value in page.attributes if key == "aria-labelledby"]
    wanted += re.findall(r"url\(#([^)]+)\)", " ".join(value for _, value in page.attributes))
    assert wanted and set(wanted) <= set(ids)


def test_the_first_screen_answers_the_officer(report: Path) -> None:
    text = Page(report.read_text(encoding="utf-8")).text
    start = text[: text.index("All settings")]
    answers = ("Which method?", "DP-LoRA", "Which epsilon?", "What leaks?", "held-out patients:", "base model:")
    limits = ("What does it cost?", "What this cannot show", "The hospital is synthetic.", "pre-training")
    for expected in answers + limits:
        assert expected in start


def test_the_rest_names_certificates_reasons_failures_and_versions(report: Path) -> None:
    text = Page(report.read_text(encoding="utf-8")).text
    for expected in ("dp_lora-eps3-s0", "add or remove one unit", "no canaries were planted", "out of memory",
                     "torch 2.13.0", "11.52", "13.8 %",
                     "An AUC below 0.5 is not “more private”", "seeds 0."):  # fmt: skip
        assert expected in text


def test_the_table_has_a_row_a_point_and_flat_columns(report: Path) -> None:
    with (report.parent / "frontier.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [point["name"] for point in make_points()]
    first = make_points()[0]["utility"]["f1_weighted"]
    for key, column in (("value", ""), ("low", ".low"), ("high", ".high"), ("n", ".n")):
        assert float(rows[0][f"utility.f1_weighted{column}"]) == first[key]
    assert "reference.heldout.identifier_extraction_rate.low" in rows[0]
    assert not any("roc" in key for key in rows[0])
    assert {row["on_frontier"] for row in rows} == {"True", "False"}


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_there_as_svg_and_png(report: Path, name: str) -> None:
    folder = report.parent / "figures"
    assert (folder / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
    png = (folder / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert 1200 <= int.from_bytes(png[16:20], "big") <= 1600


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    points = make_points()
    for point in points:
        if point["setting"] == "sani":
            point["setting"] = HOSTILE_NAME
    points[-1]["not_applicable"] = {HOSTILE_NAME: HOSTILE_NAME}
    meta = {**make_meta(), "failed": [{"name": HOSTILE_NAME, "reason": HOSTILE_NAME}], "model": HOSTILE_NAME}
    target = build_report([write_frontier(tmp_path / "f", points, meta)], tmp_path / "out")
    page = Page(target.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert HOSTILE_NAME in page.text
    assert "<script" not in (tmp_path / "out/figures/f1_against_extraction.svg").read_text(encoding="utf-8")


def test_nulls_and_missing_keys_show_na_with_the_reason(tmp_path: Path) -> None:
    points = make_points()
    points[1]["memorization"]["membership_auc"] = None
    points[2]["memorization"]["membership_auc"] = None
    for point in points[1:3]:
        point["not_applicable"]["memorization.membership_auc"] = "no held-out patients were given"
    points += [{"name": "bare", "method": "new_method"}]
    target = build_report([write_frontier(tmp_path / "f", points, {})], tmp_path / "out")
    text = Page(target.read_text(encoding="utf-8")).text
    assert "Membership AUC: no held-out patients were given" in text
    assert "n/a" in text and "bare" in text


def test_a_study_without_any_measurement_still_makes_a_page(tmp_path: Path) -> None:
    folder = write_frontier(tmp_path / "f", [{"name": "only"}], {})
    target = build_report([folder], tmp_path / "out")
    text = Page(target.read_text(encoding="utf-8")).text
    assert "Not drawn, because nothing was measured" in text
    assert "No setting here has a privacy guarantee" in text


def test_curves_come_from_the_runs_where_the_frontier_leaves_them_out(tmp_path: Path) -> None:
    points = make_points()[:1]
    whole = make_evaluation(0.3, 0.02, 0.5, 0)
    del points[0]["memorization"]["membership"]
    folder = write_frontier(tmp_path / "f", points, {})
    (folder / "runs" / "base-s0").mkdir()
    (folder / "runs" / "base-s0" / "evaluation.json").write_text(json.dumps(whole))
    build_report([folder], tmp_path / "out")
    assert (tmp_path / "out/figures/membership_roc.svg").exists()


def test_the_base_model_is_taken_from_the_meta_data_if_no_point_has_it(tmp_path: Path) -> None:
    points = [point for point in make_points() if point["method"] == "full"]
    meta = {**make_meta(), "base_model": make_evaluation(0.3, 0.02, 0.5, 0)}
    target = build_report([write_frontier(tmp_path / "f", points, meta)], tmp_path / "out")
    assert "Base model, not fine-tuned" in Page(target.read_text(encoding="utf-8")).text


def _run_folder(folder: Path, name: str, **privacy: Any) -> Path:
    folder.mkdir(parents=True)
    run = {"name": name, "method": "dp_lora", "status": "finished", "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "evaluation.json").write_text(json.dumps(make_evaluation(0.6, 0.02, 0.5, 0)))
    (folder / "privacy.json").write_text(json.dumps({**make_certificate(4.0), **privacy}))
    return folder


def test_run_folders_are_taken_too_and_same_names_stay_apart(tmp_path: Path) -> None:
    first, second = _run_folder(tmp_path / "a", "dp-s0"), _run_folder(tmp_path / "b", "dp-s0", unit="record")
    target = build_report([first, second, first], tmp_path / "out")
    with (tmp_path / "out/frontier.csv").open(newline="", encoding="utf-8") as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["dp", "dp (b)"]
    text = Page(target.read_text(encoding="utf-8")).text
    assert "dp-s0 (b): the guarantee covers one record, not one patient." in text


def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "frontier.json").write_text('{"points": 3}')
    for folder, message in (("none", "no such folder"), ("empty", "no run.json"), ("odd", "no list of points")):
        with pytest.raises(InputError, match=message):
            build_report([tmp_path / folder], tmp_path / "out")
    with pytest.raises(InputError, match="no finished run"):
        build_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_imports_no_torch() -> None:
    code = "import sys, dpmed.report.build; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
