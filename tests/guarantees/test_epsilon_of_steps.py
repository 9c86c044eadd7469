"""Epsilon grows with the steps and never falls: not over a stop, a crash or a resumption; steps count when begun."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from faults.dp_runs import make_plan, make_trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerCallback

from dpmed.privacy.charged_run import ChargedRun
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer

N_STEPS = 4


@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(
    noise_multiplier=st.floats(0.4, 4.0),
    expected_batch_units=st.integers(1, 6),
    steps=st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True).map(sorted),
)
def test_epsilon_grows_with_the_steps(noise_multiplier: float, expected_batch_units: int, steps: list[int]) -> None:
    plan = make_plan(noise_multiplier=noise_multiplier, expected_batch_units=expected_batch_units, n_steps=60)
    found = [plan.epsilon_after(n) for n in steps]
    assert all(a is not None and b is not None and 0 < a < b for a, b in itertools.pairwise(found))


def test_the_certificates_epsilon_grows_with_the_steps_and_holds_nothing_before_the_first() -> None:
    plan = make_plan(expected_batch_units=2)
    found = [plan.spent(n)["epsilon"] for n in (0, 1, 2, 5)]
    assert found[0] == 0
    assert found == sorted(set(found))


class Watches(TrainerCallback):
    """Takes a certificate after each step, and stops or breaks where it is told to."""

    def __init__(self, stop_at: int | None = None, break_at: int | None = None) -> None:
        self.stop_at, self.break_at = stop_at, break_at
        self.trainer: DPLoRATrainer | None = None
        self.certificates: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        assert self.trainer is not None
        self.certificates.append(self.trainer.privacy_spent())
        if state.global_step == self.break_at:
            raise RuntimeError("the machine broke")
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_at
        return control


def watched(folder: Path, watches: Watches, plan: PrivacyPlan | None = None, **changes: Any) -> DPLoRATrainer:
    values = {"save_strategy": "steps", "save_steps": 2, **changes}
    trainer = make_trainer(folder, plan or make_plan(n_steps=N_STEPS), callbacks=[watches], **values)
    watches.trainer = trainer
    return trainer


def counts(certificates: list[dict[str, Any]]) -> list[int]:
    return [certificate["n_steps"] for certificate in certificates]


def never_falls(certificates: list[dict[str, Any]]) -> bool:
    epsilons = [certificate["epsilon"] for certificate in certificates]
    return all(a <= b for a, b in itertools.pairwise(epsilons))


def test_epsilon_goes_on_where_a_stopped_run_had_come_to(tmp_path: Path) -> None:
    first, second = Watches(stop_at=2), Watches()
    watched(tmp_path, first).train()
    trainer = watched(tmp_path, second)
    trainer.train(resume_from_checkpoint=True)
    whole = [*first.certificates, *second.certificates, trainer.privacy_spent()]
    assert counts(whole) == [1, 2, 3, 4, 4]
    assert never_falls(whole)
    assert whole[-1]["epsilon"] == make_plan(n_steps=N_STEPS).spent(N_STEPS)["epsilon"]


def test_epsilon_counts_the_steps_that_a_crash_lost(tmp_path: Path) -> None:
    """Somebody looked on at step 3; its weights are gone, what was seen of them is not."""
    first, second = Watches(break_at=3), Watches()
    with pytest.raises(RuntimeError, match="broke"):
        watched(tmp_path, first).train()
    trainer = watched(tmp_path, second)
    trainer.train(resume_from_checkpoint=True)
    whole = [*first.certificates, *second.certificates, trainer.privacy_spent()]
    assert counts(whole) == [1, 2, 3, 4, 4]
    assert never_falls(whole)
    assert (trainer.state.global_step, whole[-1]["n_steps_lost"]) == (3, 1)


def test_the_check_sees_a_resumption_that_counts_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Watches(stop_at=2), Watches()
    watched(tmp_path, first).train()
    made = ChargedRun.__init__

    def forgetful(self: ChargedRun, state: Any, charges: Any, **values: Any) -> None:
        made(self, state, charges, **{**values, "n_charged": 0})

    monkeypatch.setattr(ChargedRun, "__init__", forgetful)
    watched(tmp_path, second).train(resume_from_checkpoint=True)
    assert not never_falls(first.certificates + second.certificates)


def breaks_at_noise(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """In the middle of a step, after the clipped sum and before the noise."""
    add, calls = GaussianNoise.add_, itertools.count(1)

    def faulty(self: GaussianNoise, flat: Tensor) -> Tensor:
        if next(calls) == number:
            raise error
        return add(self, flat)

    monkeypatch.setattr(GaussianNoise, "add_", faulty)


def test_a_step_counts_when_it_begins_even_if_it_is_interrupted_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_at_noise(monkeypatch, 2, KeyboardInterrupt())
    trainer = make_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    spent = trainer.privacy_spent()
    assert trainer.state.global_step == 1
    assert (spent["n_steps"], spent["n_steps_lost"]) == (2, 1)
    assert spent["epsilon"] == trainer.plan.spent(2)["epsilon"]


def test_steps_that_an_error_took_back_cost_nothing_since_no_weight_is_left_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_at_noise(monkeypatch, 3, RuntimeError("out of memory"))
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.privacy_spent()["n_steps"] == 0
    assert bool((weights(trainer) == before).all())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_run_never_takes_more_steps_than_its_plan_over_all_of_its_starts(tmp_path: Path) -> None:
    """Started three times from one checkpoint, watched: what the plan allows is gone after the second."""
    watched(tmp_path, Watches(stop_at=2)).train()
    taken = []
    for _ in range(3):
        trainer = watched(tmp_path, watches := Watches(stop_at=3), save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        taken.append((len(watches.certificates), trainer.privacy_spent()["n_steps"]))
    assert taken == [(1, 3), (1, 4), (0, 4)]
