"""What no other test would notice, as mutants showed: charges before releases, draws and noise of a start, resuming."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faults import dp_runs
from faults.dp_runs import make_plan, make_trainer, weights, with_lora
from peft import peft_model
from tiny_runs import World, make_world
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed import pipeline
from dpmed.errors import PrivacyError
from dpmed.privacy import ranks
from dpmed.privacy.charged_run import OWN_CHARGES
from dpmed.runs import WHOLE, last_checkpoint, read_json
from dpmed.trainers import base
from dpmed.trainers.dp_lora import DPLoRATrainer


class Killed(BaseException):
    """As a signal: nothing in the package may catch it."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


def charged(folder: Path) -> int:
    """Steps that a run without a ledger was charged, read from the disk by other means than the package's."""
    with closing(sqlite3.connect(folder / OWN_CHARGES)) as connection:
        return connection.execute("SELECT coalesce(sum(n_steps), 0) FROM entries WHERE kind = 'charge'").fetchone()[0]


# --- Draws and noise --------------------------------------------------------------------------------------------------


def test_the_seed_of_the_run_does_not_fix_who_is_drawn(tmp_path: Path) -> None:
    draws = []
    for start in ("first", "second"):
        trainer = make_trainer(tmp_path / start, make_plan(expected_batch_units=3), seed=7)
        sampler: Any = trainer.get_train_dataloader().batch_sampler
        draws.append([sampler.draw() for _ in range(40)])
    assert draws[0] != draws[1]  # by chance once in 2 ** 240


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
def test_only_the_first_rank_adds_noise(secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = make_plan(secure=secure).noise()
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(ranks, "sum_over_ranks_", lambda flat: flat)
    monkeypatch.setattr(ranks, "from_first_rank_", lambda tensors: None)
    for rank, adds in ((0, True), (1, False)):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        assert bool((ranks.noised_sum_(torch.zeros(50), noise) != 0).any()) is adds


# --- Charged before it leaves -----------------------------------------------------------------------------------------


@pytest.fixture
def watch_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Calls a function each time before weights, or an optimizer's moments, are about to be written."""

    def install(look: Callable[[], None]) -> None:
        for module, name in ((peft_model, "safe_save_file"), (torch, "save")):
            write = getattr(module, name)

            def spy(*args: Any, write: Callable[..., Any] = write, **kwargs: Any) -> Any:
                look()
                return write(*args, **kwargs)

            monkeypatch.setattr(module, name, spy)

    return install


def test_steps_are_charged_before_weights_reach_a_checkpoint(
    tmp_path: Path, watch_writes: Callable[[Callable[[], None]], None]
) -> None:
    trainer = make_trainer(tmp_path, make_plan(n_steps=4), save_strategy="steps", save_steps=2)
    seen: list[tuple[int, int]] = []
    watch_writes(lambda: seen.append((trainer.state.global_step, charged(tmp_path))))
    trainer.train()
    assert {step for step, _ in seen} == {2, 4}
    assert all(n >= step for step, n in seen)


def test_a_checkpoint_is_marked_as_whole_last_and_older_ones_stay_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch_writes: Callable[[Callable[[], None]], None]
) -> None:
    marks: list[bool] = []
    plan = make_plan(n_steps=4)
    trainer = make_trainer(tmp_path, plan, save_strategy="steps", save_steps=2, save_total_limit=1)
    watch_writes(lambda: marks.append((trainer.checkpoint_folder() / WHOLE).exists()))
    mark = base.mark_whole
    monkeypatch.setattr(base, "mark_whole", lambda folder: mark(folder) if folder.name.endswith("-2") else killed())
    with pytest.raises(Killed):
        trainer.train()
    assert marks and not any(marks)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("method", ["evaluate", "predict", "save_model", "save_weights"])
def test_whatever_leaves_the_trainer_in_the_middle_of_a_run_is_charged_first(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def leave(*_: Any, **__: Any) -> Any:
        seen.append(charged(tmp_path))
        return tmp_path

    class Leaves(DPLoRATrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 2 and not seen:
                getattr(self, method)(tmp_path)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(base.DpmedTrainer if method == "save_weights" else transformers.Trainer, method, leave)
    make_trainer(tmp_path, trainer=Leaves).train()
    assert seen == [2]


class StopAt(TrainerCallback):
    """Ends training after a step, as if the run had been stopped there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
        return control


class Looks(TrainerCallback):
    """A callback of a user's, which could keep the weights that it is shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.missing.append(state.global_step - charged(self.folder))


def test_a_callback_of_the_users_sees_charged_weights_only(tmp_path: Path) -> None:
    looks = Looks(tmp_path)
    make_trainer(tmp_path, callbacks=[looks]).train()
    assert looks.missing == [0, 0, 0]


def test_after_an_error_memory_holds_the_weights_that_were_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(n_steps=4)
    trainer = make_trainer(tmp_path, plan, save_strategy="steps", save_steps=2)
    saved: list[Tensor] = []
    save, step = DPLoRATrainer._save_checkpoint, DPLoRATrainer.training_step

    def keep(self: DPLoRATrainer, *args: Any) -> None:
        saved.append(weights(self))
        save(self, *args)

    def fail(self: DPLoRATrainer, *args: Any, **kwargs: Any) -> Tensor:
        return step(self, *args, **kwargs) if self.state.global_step < 3 else killed()

    monkeypatch.setattr(DPLoRATrainer, "_save_checkpoint", keep)
    monkeypatch.setattr(DPLoRATrainer, "training_step", fail)
    with pytest.raises(Killed):
        trainer.train()
    assert trainer.state.global_step == 3
    assert charged(tmp_path) == trainer.privacy_spent()["n_steps"] == 2
    assert torch.equal(weights(trainer), saved[0])


# --- Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["records", "model"])
def test_a_run_goes_on_with_its_own_records_and_model_only(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(n_steps=2)
    make_trainer(tmp_path, plan, save_strategy="steps", save_steps=1).train()
    model = None
    if other == "records":
        changed = dp_runs.make_records().map(lambda row: {"text": row["text"] + " twice"})
        monkeypatch.setattr(dp_runs, "make_records", lambda: changed)
    else:
        model = with_lora(tiny_models.make_model("llama", seed=1), "causal_lm")
    with pytest.raises(PrivacyError, match={"records": "differs in data", "model": "differs in model"}[other]):
        make_trainer(tmp_path, plan, model=model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_steps_that_were_lost_are_not_run_again(tmp_path: Path) -> None:
    """Of 6 steps 4 were charged when the run was killed in its second checkpoint: it goes on from 2 for 2 more."""
    plan, saves = make_plan(n_steps=6), {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, plan, callbacks=[StopAt(4)], **saves).train()
    (tmp_path / "checkpoint-4" / WHOLE).unlink()
    again = make_trainer(tmp_path, plan, **saves)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert charged(tmp_path) == again.privacy_spent()["n_steps"] == 6
    assert again.privacy_spent()["n_steps_lost"] == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_that_was_killed_in_its_first_checkpoint_still_counts_those_steps(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the first steps touched the disk, and there is no checkpoint to remember them by."""
    recipe = world.recipe("dp_lora", training={"epochs": 2, "save_every": 0.6}, privacy={"expected_batch_units": 3})
    folder, mark = tmp_path / "run", base.mark_whole
    monkeypatch.setattr(pipeline, "evaluate_weights", lambda *args, **kwargs: {})
    monkeypatch.setattr(base, "mark_whole", killed)
    with pytest.raises(Killed):
        pipeline.train(recipe, folder)
    lost = charged(folder)
    assert lost > 0 and last_checkpoint(folder) is None
    monkeypatch.setattr(base, "mark_whole", mark)
    run = pipeline.train(recipe, folder, resume=True)
    certificate = read_json(folder / "privacy.json")
    assert (certificate["n_steps"], certificate["n_steps_lost"]) == (9, lost)
    assert run["n_steps"] == 9 - lost
