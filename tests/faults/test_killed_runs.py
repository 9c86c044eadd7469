"""A run that was killed goes on from where it stood, and never passes for a finished one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import N_TRAIN, World, files, make_world, write_rows

from dpmed import pipeline
from dpmed.errors import InputError
from dpmed.recipe_io import merge


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class Killed(BaseException):
    """As a signal: nothing in the package may catch it."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("method", ["full", "dp_lora"])
def test_a_killed_run_goes_on_from_its_checkpoint(
    method: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(method, training={"epochs": 2, "save_every": 0.6}, privacy={"expected_batch_units": 3})
    folder, steps = tmp_path / "run", []
    show = pipeline._ShowSteps.on_step_end

    def step(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps.append(state.global_step)
        if state.global_step == 5 and len(steps) == 5:
            raise Killed
        show(self, args, state, control)

    monkeypatch.setattr(pipeline._ShowSteps, "on_step_end", step)
    with pytest.raises(Killed):
        pipeline.train(recipe, folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert (
        not (folder / ("adapter" if method == "dp_lora" else "model")).exists()
        and not (folder / "evaluation.json").exists()
    )
    last = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert 0 < last < 5
    with pytest.raises(InputError, match=r"first training\.epochs"):
        pipeline.train(merge(recipe, {"training": {"epochs": 3}}), folder, resume=True)

    run = pipeline.train(recipe, folder, resume=True)
    assert run["status"] == "finished"
    assert steps[5:] == list(range(last + 1, run["n_steps"] + 1))
    assert list(folder.glob("checkpoint-*")) == []
    if method == "dp_lora":
        assert json.loads((folder / "privacy.json").read_text())["n_steps"] == run["n_steps"] == 9


def test_a_run_killed_in_its_evaluation_is_not_trained_twice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, evaluate = tmp_path / "run", pipeline.evaluate_weights
    monkeypatch.setattr(pipeline, "evaluate_weights", killed)
    with pytest.raises(Killed):
        pipeline.train(world.recipe(), folder)
    before = json.loads((folder / "run.json").read_text())
    assert before["status"] == "running" and (folder / "adapter").is_dir()
    monkeypatch.setattr(pipeline, "evaluate_weights", evaluate)
    monkeypatch.setattr(pipeline, "make_trainer", killed)
    run = pipeline.train(world.recipe(), folder, resume=True)
    assert run == before | {"status": "finished"}
    assert run["n_steps"] == 5 and run["seconds"] > 0


def test_a_half_written_model_is_trained_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, card = tmp_path / "run", pipeline.write_task_card
    monkeypatch.setattr(pipeline, "write_task_card", killed)
    with pytest.raises(Killed):
        pipeline.train(world.recipe(), folder)
    assert (folder / ".adapter.partial").is_dir() and not (folder / "adapter").exists()
    monkeypatch.setattr(pipeline, "write_task_card", card)
    assert pipeline.train(world.recipe(), folder, resume=True)["n_steps"] == 5
    assert not (folder / ".adapter.partial").exists()


def test_a_finished_run_returns_at_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    pipeline.train(world.recipe(), folder)
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    monkeypatch.setattr(pipeline, "load_splits", killed)
    run = pipeline.train(world.recipe(), folder, resume=True)
    assert run == json.loads((folder / "run.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in files(folder)} == before
    with pytest.raises(InputError, match=r"the recipe changed since this run was started, first training\.seed"):
        pipeline.train(world.recipe(training={"seed": 1}), folder, resume=True)


def test_a_folder_in_use_is_refused_untouched(world: World, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("kept")
    with pytest.raises(InputError, match="add --resume"):
        pipeline.train(world.recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_records_cannot_resume(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_fit", killed)
    with pytest.raises(Killed):
        pipeline.train(world.recipe(), tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    fewer = write_rows(tmp_path / "fewer.jsonl", range(N_TRAIN - 1))
    with pytest.raises(InputError, match="the records changed since this run was started"):
        pipeline.train(world.recipe(data={"train": str(fewer)}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
