"""Noise and draws are fresh at every start, and a resumed run keeps the plan and the count of the one that stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from faults import dp_runs
from faults.dp_runs import make_plan, make_trainer, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed.errors import BudgetError, InputError, PrivacyError
from dpmed.privacy.ledger import PrivacyLedger, RunCharges
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.run_state import STATE_FILE
from dpmed.privacy.sampling import PoissonUnitSampler
from dpmed.runs import mark_whole
from dpmed.trainers.base import MetricsFile
from dpmed.trainers.dp_lora import DPLoRATrainer


def trained_weights(folder: Path, plan: PrivacyPlan, **changes: Any) -> Tensor:
    trainer = make_trainer(folder, plan, **changes)
    trainer.train()
    return weights(trainer)


def test_the_seed_of_the_run_does_not_fix_the_noise(tmp_path: Path) -> None:
    first, second = (trained_weights(tmp_path / str(i), make_plan(), seed=7) for i in range(2))
    assert share_of_differences(first, second) > 0.9


def test_all_else_is_the_same_so_the_difference_is_the_noise(tmp_path: Path) -> None:
    plan = make_plan(noise_seed=3)
    first, second = (trained_weights(tmp_path / str(i), plan, seed=7) for i in range(2))
    assert torch.equal(first, second)


def test_a_fixed_noise_seed_marks_the_run_as_not_private(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_plan(noise_seed=3), save_strategy="steps", save_steps=2)
    trainer.add_callback(MetricsFile(tmp_path / "metrics.jsonl"))
    trainer.train()
    spent = trainer.privacy_spent()
    assert (spent["private"], spent["epsilon"]) == (False, None)
    assert "noise_seed" in spent["why"]
    trainer.save_weights(tmp_path / "adapter")
    marked = [
        path for path in sorted(tmp_path.rglob("*")) if path.is_file() and b'"private": false' in path.read_bytes()
    ]
    names = {path.relative_to(tmp_path).as_posix() for path in marked}
    checkpoint = {f"checkpoint-2/{name}" for name in ("privacy_run.json", "trainer_state.json")}
    assert names >= {"privacy_run.json", "metrics.jsonl", "adapter/privacy.json", *checkpoint}
    (dataset,) = PrivacyLedger(tmp_path / "charges.sqlite").datasets()
    assert [run["private"] for run in dataset["runs"]] == [False]


def share_of_differences(a: Tensor, b: Tensor) -> float:
    """Two equal weights are a coincidence of rounding among thousands; nearly all differ where the noise is fresh."""
    return float((a != b).float().mean())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
        return control


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A checkpoint at step 2 of 4, in a folder of the test's own: what resumes from it is charged there."""
    return shutil.copytree(stopped_run.parent, tmp_path / "stopped") / stopped_run.name


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    trainer = make_trainer(folder, make_plan(n_steps=4), save_strategy="steps", save_steps=2, callbacks=[StopAt(2)])
    trainer.train()
    assert trainer.privacy_spent()["n_steps"] == 2
    return folder / "checkpoint-2"


def resumed(folder: Path, checkpoint: str | Path | bool, plan: PrivacyPlan | None = None) -> DPLoRATrainer:
    trainer = make_trainer(folder, plan or make_plan(n_steps=4))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_a_resumed_run_goes_on_counting_and_draws_fresh_noise(stopped_run: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(stopped_run.parent, tmp_path / str(i)) for i in range(2)]
    first, second = (resumed(copy, copy / stopped_run.name) for copy in copies)
    assert first.state.global_step == second.state.global_step == 4
    assert first.privacy_spent()["n_steps"] == 4
    # torch's own random state was restored, the noise was not
    assert share_of_differences(weights(first), weights(second)) > 0.9


def test_a_checkpoint_that_is_resumed_twice_is_charged_twice(stopped: Path, tmp_path: Path) -> None:
    """Both ends of the fork are releases: the second has no step left, and both certificates say so."""
    first = resumed(tmp_path / "first", stopped)
    second = resumed(tmp_path / "second", stopped)
    assert (first.state.global_step, second.state.global_step) == (4, 2)
    assert first.privacy_spent()["n_steps"] == second.privacy_spent()["n_steps"] == 4
    assert second.privacy_spent()["n_steps_lost"] == 2


def test_a_resumed_run_draws_patients_anew(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the first run's draws is skipped or replayed: the plan's sampler is made anew, read from its start."""
    read: list[int] = []
    draw = PoissonUnitSampler.draw
    monkeypatch.setattr(PoissonUnitSampler, "draw", lambda self: read.append(id(self)) or draw(self))
    resumed(tmp_path, stopped)
    assert 2 <= len(read) <= 3


CHANGES: list[dict[str, Any]] = [
    {"noise_multiplier": 0.9},
    {"clip_norm": 0.6},
    {"expected_batch_units": 5},
    {"n_steps": 5},
    {"max_records_per_unit": 3},
    {"unit": "hospital"},
    {"delta": 2e-3},
    {"noise_seed": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_plan_cannot_resume(change: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=next(iter(change))):
        resumed(tmp_path, str(stopped), replace(make_plan(n_steps=4), **change))


def other_text(records: Dataset) -> Dataset:
    return records.map(lambda row: {"text": row["text"].replace("Patient 3", "Patient 4")})


def other_units(records: Dataset) -> Dataset:
    return records.map(lambda row: {"unit": row["unit"].replace("p3", "p9")})


@pytest.mark.parametrize(("change", "named"), [(other_text, "data"), (other_units, "units")])
def test_other_records_or_units_cannot_resume(
    change: Any, named: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = change(dp_runs.make_records())
    monkeypatch.setattr(dp_runs, "make_records", lambda: changed)
    with pytest.raises(PrivacyError, match=rf"cannot resume checkpoint-2: this run differs in .*\b{named}$"):
        resumed(tmp_path, stopped)


def test_another_base_model_cannot_resume(stopped: Path, tmp_path: Path) -> None:
    other = dp_runs.with_lora(tiny_models.make_model("llama", seed=1), "causal_lm")
    trainer = make_trainer(tmp_path, make_plan(n_steps=4), model=other)
    with pytest.raises(PrivacyError, match=r"this run differs in model$"):
        trainer.train(resume_from_checkpoint=str(stopped))


def test_an_exception_leaves_no_uncharged_step_in_memory(tmp_path: Path) -> None:
    """A crash costs nothing, and nothing of the steps since the last charge can be looked at."""

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError

    Fails.__module__ = "dpmed.tests"  # one of our own: a callback of the user's is charged for each step
    changes = {"save_strategy": "steps", "save_steps": 2, "callbacks": [Fails()]}
    trainer = make_trainer(tmp_path, make_plan(n_steps=4), **changes)
    with pytest.raises(RuntimeError):
        trainer.train()
    assert trainer.privacy_spent()["n_steps"] == 2
    saved = load_file(str(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    flat = torch.cat([saved[name].reshape(-1) for name in sorted(saved)])
    assert float(weights(trainer).double().sum()) == pytest.approx(float(flat.double().sum()), abs=1e-6)
    assert trainer.optimizer is None


def test_steps_that_a_budget_refuses_at_the_end_do_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another run spent the rest meanwhile, and no checkpoint asked before."""
    trainer = make_trainer(tmp_path, make_plan())
    before = weights(trainer)

    def refuse(self: RunCharges, n_steps: int) -> None:
        raise BudgetError("spent by another run")

    monkeypatch.setattr(RunCharges, "charge", refuse)
    with pytest.raises(BudgetError):
        trainer.train()
    assert torch.equal(weights(trainer), before)
    spent = trainer.privacy_spent()
    assert (spent["n_steps"], spent["n_steps_lost"], trainer.optimizer) == (0, 0, None)


def test_a_callback_of_the_user_is_charged_for_before_it_looks(tmp_path: Path) -> None:
    seen: list[int] = []

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (dataset,) = PrivacyLedger(tmp_path / "charges.sqlite").datasets()
            seen.append(dataset["runs"][0]["n_steps"])

    make_trainer(tmp_path, callbacks=[Looks()]).train()
    assert seen == [1, 2, 3]


def test_an_interrupted_run_is_charged_and_saves_what_was_charged(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    Stops.__module__ = "dpmed.tests"
    trainer = make_trainer(tmp_path, make_plan(n_steps=4), save_strategy="steps", save_steps=2, callbacks=[Stops()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.privacy_spent()["n_steps"] == 3
    again = resumed(tmp_path, True)
    assert (again.state.global_step, again.privacy_spent()["n_steps"]) == (4, 4)


@pytest.mark.parametrize("how", [True, "path"])
def test_the_plan_is_checked_however_the_checkpoint_is_named(how: bool | str, stopped: Path) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        resumed(stopped.parent, True if how is True else stopped, make_plan(n_steps=4, noise_multiplier=0.5))


def test_resuming_where_there_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        resumed(tmp_path, True)


def test_a_checkpoint_of_a_run_without_a_plan_is_refused(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text((stopped / "trainer_state.json").read_text())
    mark_whole(folder)
    with pytest.raises(PrivacyError, match=STATE_FILE):
        resumed(tmp_path, folder)
