"""The embedded default: its recipe, its two sides, and that nothing it writes holds a planted identifier."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_runs import files

from dpmed import demo
from dpmed.data.records import check_disjoint, load_records
from dpmed.demo import demo_recipe, run_demo
from dpmed.demo_model import demo_base_model
from dpmed.errors import InputError
from dpmed.grid import grid
from dpmed.recipe import Recipe
from dpmed.recipe_io import check_recipe, merge

SHORTEST = 5
"""Shorter values stand in numbers and words by chance."""


def side(source: str) -> Dataset:
    return load_records(source, label="label", unit="unit", record_id="record_id", identifiers="identifiers")


def planted(records: Dataset) -> set[str]:
    """The identifier values of these records."""
    rows = zip(records["text"], records["identifiers"], strict=True)
    return {text[span["start"] : span["end"]] for text, spans in rows for span in spans}


def grep(folder: Path, values: set[str]) -> list[tuple[str, str]]:
    """Which file holds which value as a whole word, as `grep -aw` would find it: (file, value)."""
    found = []
    for path in files(folder):
        content = path.read_bytes()
        for value in values:
            word = value.encode()
            if word in content and re.search(rb"(?<!\w)" + re.escape(word) + rb"(?!\w)", content):
                found.append((path.name, value))
    return found


# --- The recipe and its records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "n_seeds"), [("quick", 2), ("full", 5)])
def test_the_demo_has_at_least_eight_settings(preset: demo.Preset, n_seeds: int, tmp_path: Path) -> None:
    recipe = demo_recipe(tmp_path / "base", preset=preset)
    check_recipe(recipe, frontier=True)
    jobs = grid(recipe, tmp_path)
    settings = {job.setting for job in jobs}
    assert len(settings) >= 8
    assert {job.method for job in jobs} == {"base", "full", "lora", "dp_lora", "sani", "repair_only"}
    assert len({job.setting for job in jobs if job.method == "dp_lora"}) >= 3
    assert {job.recipe.training.seed for job in jobs if job.method != "base"} == set(range(n_seeds))
    assert recipe.model.path == str(tmp_path / "base")


def test_the_two_sides_share_no_patient_and_no_identifier_of_one(tmp_path: Path) -> None:
    """Doctors treat patients of both sides, and a day or four digits of a telephone number may be anybody's."""
    data = demo_recipe(tmp_path, preset="quick").data
    assert data.heldout is not None
    train, heldout = side(data.train), side(data.heldout)
    check_disjoint(train, heldout)
    n_train, n_heldout = len(set(train["unit"])), len(set(heldout["unit"]))
    asked = re.search(r"n_patients=(\d+)", data.train)
    assert asked is not None and n_train + n_heldout == int(asked[1]) >= 200
    assert 0.65 < n_train / (n_train + n_heldout) < 0.75
    for kind in ("NAME", "MRN"):
        own, others = of_type(train, kind), of_type(heldout, kind)
        assert (len(own), len(others)) == (n_train, n_heldout), "a value names one patient"
        assert not own & others


def of_type(records: Dataset, kind: str) -> set[str]:
    rows = zip(records["text"], records["identifiers"], strict=True)
    return {text[s["start"] : s["end"]] for text, spans in rows for s in spans if s["type"] == kind}


@pytest.mark.parametrize("source", ["hospital:test?n_patients=9&seed=1", "hospital:train", "hospital:train?seed=1"])
def test_a_source_that_does_not_read_so_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="hospital:"):
        load_records(source)


# --- A small demo, end to end -----------------------------------------------------------------------------------------

PATIENTS = "n_patients=40&seed=7"


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run the demo on few patients and a tiny model. Returns (all that it wrote, the frontier's folder)."""
    written = tmp_path_factory.mktemp("demo")

    def base_model() -> Path:
        return demo_base_model(written / "cache", n_public_patients=80, vocab_size=500, hidden_size=32)

    def recipe(base: Path, *, preset: demo.Preset) -> Recipe:
        small = {
            "data": {"train": f"hospital:train?{PATIENTS}", "heldout": f"hospital:heldout?{PATIENTS}"},
            "privacy": {"delta": 1e-2, "expected_batch_units": 8},
            "training": {"epochs": 1, "save_every": 1.0},
            "evaluation": {"prefix_tokens": [10], "suffix_tokens": [5], "bootstrap": 20},
            "frontier": {"methods": ["full", "lora", "dp_lora", "sani"], "epsilons": [8.0], "seeds": [0]},
        }
        return merge(demo_recipe(base, preset=preset), small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_base_model", base_model)
        patch.setattr(demo, "demo_recipe", recipe)
        run_demo(written / "out", preset="quick", jobs=2)
    return written, written / "out"


def test_a_small_demo_runs_end_to_end(small_demo: tuple[Path, Path]) -> None:
    frontier = json.loads((small_demo[1] / "frontier.json").read_text())
    names = {point["name"] for point in frontier["points"]}
    assert names == {"base", "full-s0", "lora-s0", "dp_lora-eps8-s0", "sani-s0"}
    assert frontier["meta"]["failed"] == []
    assert (small_demo[1] / "report.html").stat().st_size > 10_000
    for point in frontier["points"]:
        assert point["memorization"]["identifier_extraction"].keys() >= {"NAME", "MRN"}


def test_no_file_of_the_demo_holds_a_planted_identifier(small_demo: tuple[Path, Path]) -> None:
    values = {
        value
        for part in ("train", "heldout")
        for value in planted(side(f"hospital:{part}?{PATIENTS}"))
        if len(value) >= SHORTEST
    }
    assert len(values) > 200
    kinds = {path.suffix for path in files(small_demo[0])}
    assert {".json", ".jsonl", ".html", ".csv", ".log", ".yaml", ".svg", ".png", ".safetensors"} <= kinds
    assert grep(small_demo[0], values) == []


def test_the_grep_finds_a_planted_value(tmp_path: Path) -> None:
    values = planted(side(f"hospital:train?{PATIENTS}"))
    name = sorted(value for value in values if " " in value)[0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".weights").write_bytes(b"\x00\xff" + name.encode() + b"\x00")
    (tmp_path / "page.html").write_text(f"<td>{name}</td>")
    (tmp_path / "harmless.log").write_text(f"x{name} {name}x {name.lower()}")
    assert grep(tmp_path, values) == [(".weights", name), ("page.html", name)]
