"""`dpmed sanitize` from a recipe to a verdict: what stands in the folder, exit status, restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import World, make_world

from dpmed import cli, pipeline, sanitizing
from dpmed.errors import GateError, InputError
from dpmed.recipe import Recipe, ReleaseSection
from dpmed.recipe_io import dump_recipe

LENIENT = {name: 1.0 for name in vars(ReleaseSection()) if name.startswith("max_")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    """A recipe to sanitise the checkpoint of a full run."""
    folder = world.folder / "full"
    pipeline.train(world.recipe("full", data={"label": None}), folder)
    model = {"path": str(folder / "model"), "base": str(world.base)}
    unlabelled = {"label": None}  # F1 of so few records is the same in all resamples, which shows nothing
    return world.recipe("lora", model=model, data=unlabelled, release={**LENIENT, "relearn_steps": 1, "quantise": [8]})


@pytest.fixture(scope="module")
def passed(recipe: Recipe, world: World) -> Path:
    folder, file = world.folder / "passed", world.folder / "sanitize.yaml"
    file.write_text(dump_recipe(recipe))
    assert cli.main(["sanitize", str(file), "--output_dir", str(folder)]) == 0
    return folder


def test_the_folder_is_a_finished_sani_run_with_evidence(passed: Path) -> None:
    run, evidence = (json.loads((passed / name).read_text()) for name in ("run.json", "evidence.json"))
    assert (run["method"], run["status"], evidence["verdict"]) == ("sani", "finished", "pass")
    assert (passed / "model").is_dir() and (passed / "evaluation.json").is_file()
    assert "Passed: all" in (passed / "evidence.html").read_text()
    assert {row["stage"] for row in evidence["tested"]} >= {"as_released", "bfloat16", "int8", "relearned", "utility"}


def test_a_restart_of_a_finished_one_trains_nothing(
    passed: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("this must not be reached")

    monkeypatch.setattr(pipeline, "make_trainer", forbidden)
    monkeypatch.setattr("dpmed.release.relearn", forbidden)
    assert cli.main(["sanitize", str(world.folder / "sanitize.yaml"), "--output_dir", str(passed), "--resume"]) == 0
    text = capsys.readouterr().out
    assert "verdict: pass" in text and "not tested: relearned_public" in text and "evidence.html" in text


def test_a_gate_that_says_no_ends_with_status_3_and_leaves_its_evidence(
    recipe: Recipe, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "strict.yaml"
    recipe.release.max_membership_auc = 0.0
    file.write_text(dump_recipe(recipe))
    assert cli.main(["sanitize", str(file), "--output_dir", str(tmp_path / "s")]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the gate says fail" in error and "do not release these weights" in error
    assert json.loads((tmp_path / "s" / "evidence.json").read_text())["verdict"] == "fail"
    page = (tmp_path / "s" / "evidence.html").read_text()
    assert f"see {tmp_path / 's' / 'evidence.html'}" in error and "Do not release these weights" in page
    assert not [mark for mark in world.marks if mark.decode() in page]
    recipe.release.max_membership_auc = 1.0


def test_without_heldout_records_nothing_starts(recipe: Recipe, tmp_path: Path) -> None:
    from dpmed.recipe_io import merge

    with pytest.raises(InputError, match=r"data\.heldout"):
        sanitizing.sanitize(merge(recipe, {"data": {"heldout": None}}), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert GateError.exit_code == 3
