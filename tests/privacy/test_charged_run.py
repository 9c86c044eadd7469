"""A run counts its steps when they begin, charges them before they are kept, and never exceeds its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpmed.errors import BudgetError, PrivacyError
from dpmed.privacy.charged_run import OWN_CHARGES, ChargedRun
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.run_state import STATE_FILE, RunState

UNITS = [f"p{i}" for i in range(6)]
PLAN = PrivacyPlan(
    unit="patient",
    n_units=6,
    expected_batch_units=3,
    max_records_per_unit=2,
    clip_norm=1.0,
    noise_multiplier=2.0,
    n_steps=5,
    delta=1e-3,
)


def opened(folder: Path, run_id: str | None = "a1", **changes: Any) -> ChargedRun:
    state = RunState.of(PLAN, data=[b"x"], units=UNITS, model=torch.nn.Linear(1, 1), run_id=run_id)
    values: dict[str, Any] = {
        "folder": folder,
        "started_in": folder,
        "units": UNITS,
        "n_seen": 0,
        "ledger": str(folder / "ledger.sqlite"),
        "budget_epsilon": None,
        "rank": 0,
        "device": torch.device("cpu"),
    }
    return ChargedRun.open(state, **{**values, **changes})


def on_disk(folder: Path) -> int:
    """Steps that another process finds charged to run a1."""
    (dataset,) = PrivacyLedger(folder / "ledger.sqlite").datasets()
    return sum(run["n_steps"] for run in dataset["runs"] if run["run_id"] == "a1")


def test_steps_are_counted_when_they_begin_and_are_on_the_disk_when_charged(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.begin_step()
    run.begin_step()
    assert (run.n_steps, run.n_left, on_disk(tmp_path)) == (2, 3, 0)
    assert run.charge() is True
    assert (run.n_steps, on_disk(tmp_path)) == (2, 2)
    assert run.charge() is False  # nothing new, so nothing is written twice
    assert on_disk(tmp_path) == 2


def test_no_step_beyond_the_plan_begins(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for _ in range(5):
        run.begin_step()
    with pytest.raises(PrivacyError, match="further one would exceed epsilon"):
        run.begin_step()
    run.charge()
    assert on_disk(tmp_path) == 5


def test_a_run_that_goes_on_has_what_its_earlier_starts_left(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for _ in range(3):
        first.begin_step()
    first.charge()
    first.begin_step()  # killed here: never charged, so nothing of it was kept
    second = opened(tmp_path)
    assert (second.n_steps, second.n_left) == (3, 2)
    assert second.certificate()["epsilon"] == PLAN.spent(3)["epsilon"]


def test_steps_taken_back_cost_nothing_and_can_be_run_again(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.begin_step()
    run.take_back()
    assert (run.n_steps, run.n_left) == (0, 5)
    assert run.charge() is False


def test_a_new_run_on_the_same_units_is_charged_beside_the_first(tmp_path: Path) -> None:
    for run_id in ("a1", None):
        run = opened(tmp_path, run_id)
        for _ in range(5):
            run.begin_step()
        run.charge()
    certificate = run.certificate()
    assert certificate["epsilon"] == PLAN.spent(5)["epsilon"]
    assert certificate["ledger"]["epsilon_of_all_runs"] > certificate["epsilon"] * 1.2
    assert certificate["ledger"]["epsilon_of_all_runs"] == pytest.approx(PLAN.spent(10)["epsilon"], rel=1e-3)


def test_a_budget_refuses_the_run_before_its_first_step(tmp_path: Path) -> None:
    enough = PLAN.spent(5)["epsilon"] * 1.01
    opened(tmp_path, budget_epsilon=enough)
    with pytest.raises(BudgetError, match="budget"):
        opened(tmp_path, None, budget_epsilon=enough / 2)
    assert on_disk(tmp_path) == 0


def test_without_a_ledger_the_run_keeps_its_own_charges_and_says_so(tmp_path: Path) -> None:
    run = opened(tmp_path, ledger="none")
    run.begin_step()
    run.charge()
    assert opened(tmp_path, ledger="none").n_steps == 1
    assert (tmp_path / OWN_CHARGES).is_file() and not (tmp_path / "ledger.sqlite").exists()
    certificate = run.certificate()
    assert certificate["ledger"] is None
    assert any("no ledger" in gap for gap in certificate["not_covered"])


def test_a_ledger_that_the_checkpoint_was_not_charged_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="not the ledger that the run was charged to"):
        opened(tmp_path, n_seen=2)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path, rank=1)
    run.begin_step()
    assert run.charge() is True and run.n_steps == 1
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_says_which_run_it_is(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert RunState.read(tmp_path) == run.state
    assert (tmp_path / STATE_FILE).stat().st_mode & 0o777 == 0o600


def test_a_run_without_steps_and_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    error = opened(tmp_path).nothing_left()
    assert isinstance(error, BudgetError) and "start a new run" in str(error)
