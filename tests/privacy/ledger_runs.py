"""Small plans and ledgers for the tests of the ledger, and an epsilon that costs nothing to compute."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from dpmed.privacy.accounting import EpsilonReport, History
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.privacy.plan import PrivacyPlan

DELTA = 1e-3
ALICE, BOB = "Alice-Adams-1950", "Bob-Brown-1961"


def patients(first: int, last: int) -> list[str]:
    return [f"patient-{number:04d}" for number in range(first, last)]


def make_plan(n_units: int = 20, **changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "unit": "patient_id",
        "n_units": n_units,
        "expected_batch_units": n_units,  # rate 1, so that `linear_epsilon` is exact
        "max_records_per_unit": 4,
        "clip_norm": 1.0,
        "noise_multiplier": 4.0,
        "n_steps": 10,
        "delta": DELTA,
    }
    return PrivacyPlan(**{**values, **changes})


def linear_epsilon(history: History, *, delta: float) -> EpsilonReport:
    """Stands in for `accounting.composed_epsilon`: steps * rate / noise, added up."""
    value = sum(math.inf if sigma == 0 else n * rate / sigma for sigma, rate, n in history if n)
    return EpsilonReport(value, value, value)


def full_ledger(path: Path) -> PrivacyLedger:
    """Two overlapping data sets, a run with two charges on each, a budget: entries 1 to 9 of all kinds."""
    ledger = PrivacyLedger(path)
    for first in (0, 5):
        run = ledger.open_run([*patients(first, first + 18), ALICE, BOB], make_plan())
        run.charge(2)
        run.charge(3)
    ledger.set_budget(ledger.datasets()[0]["id"], epsilon=50.0, delta=DELTA)
    return ledger


def edit(path: Path, *statements: str, parameters: Iterable[Any] = ()) -> None:
    """Change the file as someone would who takes the triggers away for it and puts them back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement, tuple(parameters))
        for _, sql in triggers:
            connection.execute(sql)
