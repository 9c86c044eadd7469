"""What no other test would notice, as mutants showed: charges before releases, whole checkpoints, draws of a start."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faults.dp_runs import make_plan, make_trainer
from peft import peft_model
from tiny_runs import World, make_world
from torch import Tensor

from dpmed import pipeline
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


# --- Going on ---------------------------------------------------------------------------------------------------------


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
