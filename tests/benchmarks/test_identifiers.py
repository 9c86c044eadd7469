"""The scripts that measure matching and the patterns, on tiny data: what they write, never how fast."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpmed.tag_check import measured_on_asq_phi

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", BENCHMARKS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_matching_finds_all_that_was_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--n_values", "2000", "--megabytes", "0.02", "--repetitions", "2", "--output", str(tmp_path / "m.json")]
    monkeypatch.setattr(sys, "argv", ["matching.py", *argv])
    matching = script("speed/matching.py")
    matching.main()
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["found_share"] == dict.fromkeys(matching.KINDS, 1.0)
    assert all(rate["n"] == 2 and rate["min"] > 0 for rate in result["megabytes_per_cpu_second"].values())
    assert matching.made_up_values(500) == matching.made_up_values(500)
    assert len(set(matching.made_up_values(500))) == 500


def test_asq_phi_writes_figures_and_no_text(tmp_path: Path) -> None:
    query = "===QUERY===\nMs. Lee on 03/04/2021, Weiss too\n===PHI_TAGS===\n"
    tags = '{"identifier_type": "NAME", "value": "Weiss"}\n{"identifier_type": "DATE", "value": "03/04/2021"}\n'
    (tmp_path / "synthetic_dataset.txt").write_text(3 * (query + tags), encoding="utf-8")
    result = script("identifiers/asq_phi.py").measure(tmp_path)
    assert [result[half]["n_records"] for half in ("all", "even", "odd")] == [3, 2, 1]
    assert result["odd"]["recall"]["DATE"]["value"] == 1 and result["odd"]["recall"]["NAME"]["value"] == 0
    assert result["all"]["precision"]["all"]["value"] == 0.5
    assert not any(value in json.dumps(result) for value in ("Weiss", "Lee", "03/04"))


def test_the_committed_figures_are_of_the_whole_size() -> None:
    speed = json.loads((BENCHMARKS / "speed" / "results" / "matching.json").read_text())
    assert speed["settings"]["n_values"] == 1_000_000 and set(speed["found_share"].values()) == {1.0}
    assert json.loads((BENCHMARKS / "identifiers" / "results" / "asq_phi.json").read_text())["all"]["n_records"] == 1051


def test_the_page_has_the_measured_figures() -> None:
    page = (BENCHMARKS.parent / "docs" / "identifiers.md").read_text(encoding="utf-8")
    odd = json.loads((BENCHMARKS / "identifiers" / "results" / "asq_phi.json").read_text())["odd"]

    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]

    def cells(figure: dict[str, float] | None) -> list[str]:
        if figure is None:
            return ["", ""]
        return [f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})", str(figure["n"])]

    for kind in {**odd["recall"], **odd["precision"]}:
        row = [kind, *cells(odd["recall"].get(kind)), *cells(odd["precision"].get(kind))]
        assert any(row[: len(line)] == line and not any(row[len(line) :]) for line in rows), kind


def test_what_is_shipped_is_the_odd_half_of_the_committed_results() -> None:
    result = json.loads((BENCHMARKS / "identifiers" / "results" / "asq_phi.json").read_text())
    asq_phi = script("identifiers/asq_phi.py")
    assert json.loads(asq_phi.SHIPPED.read_text(encoding="utf-8")) == asq_phi.shipped(result)
    own, both = measured_on_asq_phi("true"), measured_on_asq_phi("presidio")
    for found, figures in ((own, result["odd"]), (both, result["presidio"]["with_presidio"])):
        assert found is not None and found["recall"] == figures["recall"]
        assert found["precision"] == figures["precision"] and found["n_records"] == 525
        assert found["data"]["sha256"] == result["data"]["sha256"] and "second" in found["data"]["part"]


def test_the_page_has_the_comparison_with_presidio() -> None:
    page = (BENCHMARKS.parent / "docs" / "identifiers.md").read_text(encoding="utf-8")
    result = json.loads((BENCHMARKS / "identifiers" / "results" / "asq_phi.json").read_text())
    for measured in (result["odd"], *result["presidio"].values()):
        both = (measured[name]["all"] for name in ("recall", "precision"))
        row = " | ".join(f"{all_['value']:.3f} ({all_['low']:.3f} to {all_['high']:.3f})" for all_ in both)
        assert f"| {row} |\n" in page


def test_the_page_lists_every_type() -> None:
    from dpmed.data.identifier_types import IDENTIFIER_TYPES
    from dpmed.data.patterns import PATTERNS

    page = (BENCHMARKS.parent / "docs" / "identifiers.md").read_text(encoding="utf-8")
    with_pattern = {pattern.type for pattern in PATTERNS}
    for kind in IDENTIFIER_TYPES.values():
        found = "yes" if kind.name in with_pattern else ""
        assert f"| {kind.name} | {kind.safe_harbor or 'quasi'} | {kind.meaning} | {found} |" in page
