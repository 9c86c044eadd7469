"""What the ledger's entries say: runs, budgets, shared units, and the description that `dpmed ledger show` prints."""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Any

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.ledger_spending import Budget, Cells, RunRecord, Spending, composed, worst_off

NOT_PRIVATE = "a run without noise, or with a known noise seed, was charged: nothing is guaranteed any more"
BEYOND = "the accountants find no finite epsilon at this delta"

# Pairs of a unit of one data set and a data set that it is in; CROSS JOIN keeps SQLite to the two indexes.
_MEMBERSHIPS = """
SELECT other.hash AS hash, other.dataset AS dataset
FROM units AS own CROSS JOIN units AS other ON other.hash = own.hash
WHERE own.dataset = (SELECT n FROM entries WHERE kind = 'dataset' AND dataset = ?)
"""


def read_counts(connection: sqlite3.Connection) -> dict[str, int]:
    """Units of each data set, in the order in which the data sets came."""
    rows = connection.execute("SELECT dataset, details FROM entries WHERE kind = 'dataset' ORDER BY n")
    return {dataset: int(_details(text)["n_units"]) for dataset, text in rows}


def read_runs(connection: sqlite3.Connection) -> dict[str, RunRecord]:
    """All runs by their id, in order, with the steps charged to them."""
    charged = dict(connection.execute("SELECT run, sum(n_steps) FROM entries WHERE kind = 'charge' GROUP BY run"))
    rows = connection.execute("SELECT run, dataset, details FROM entries WHERE kind = 'run' ORDER BY n")
    try:
        return {
            run: RunRecord(run_id=run, dataset=dataset, n_charged=charged.get(run, 0), **_details(text))
            for run, dataset, text in rows
        }
    except TypeError:
        raise _unreadable() from None


def read_budgets(connection: sqlite3.Connection) -> dict[str, Budget]:
    """The newest budget of each data set that has one."""
    rows = connection.execute("SELECT dataset, details FROM entries WHERE kind = 'budget' ORDER BY n")
    return {dataset: Budget(dataset, **_details(text)) for dataset, text in rows}


def read_cells(connection: sqlite3.Connection, dataset: str) -> Cells:
    """The distinct sets of data sets that the units of `dataset` are in. About half a second for 100,000 units."""
    names = dict(connection.execute("SELECT n, dataset FROM entries WHERE kind = 'dataset'"))
    query = f"SELECT DISTINCT cell FROM (SELECT group_concat(dataset) AS cell FROM ({_MEMBERSHIPS}) GROUP BY hash)"
    rows = connection.execute(query, (dataset,))
    return frozenset(frozenset(names[int(number)] for number in cell.split(",")) for (cell,) in rows)


def read_shared(connection: sqlite3.Connection, dataset: str) -> dict[str, int]:
    """How many units of `dataset` each other data set holds too, where it is at least one."""
    query = (
        "SELECT entries.dataset, count(*) FROM entries JOIN ("
        + _MEMBERSHIPS
        + ") AS member ON member.dataset = entries.n"
        " GROUP BY entries.n ORDER BY entries.n"
    )
    return {other: count for other, count in connection.execute(query, (dataset,)) if other != dataset}


def resolve(connection: sqlite3.Connection, beginning: str) -> str:
    """The one data set whose id begins so. Raises: InputError if there is none, or more than one."""
    known = list(read_counts(connection))
    found = [dataset for dataset in known if beginning and dataset.startswith(beginning.strip().lower())]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} data sets of the ledger begin so" if found else "no data set of the ledger begins so"
    raise InputError(f"data set '{beginning}': {problem}: take an id from 'dpmed ledger show'")


def is_unprotected(spending: Spending) -> bool:
    """Whether a unit of the data set was in a run that had no guarantee, so that nothing is guaranteed any more."""
    near = {name for cell in spending.cells for name in cell}
    return any(run.dataset in near and _breaks_guarantee(run) for run in spending.runs.values())


def described(dataset: str, n_units: int, spending: Spending, shared: dict[str, int]) -> dict[str, Any]:
    """One data set as `PrivacyLedger.datasets` gives it, JSON-ready."""
    own = [run for run in spending.runs.values() if run.dataset == dataset]
    budget = next((budget for budget in spending.budgets if budget.dataset == dataset), None)
    near = {name for cell in spending.cells for name in cell}
    deltas = [run.delta for run in spending.runs.values() if run.dataset in near]
    delta = budget.delta if budget else min(deltas, default=None)
    return {
        "id": dataset,
        "unit": own[-1].unit if own else None,
        "n_units": n_units,
        "runs": [_described_run(run) for run in own],
        **_epsilon(
            0.0 if delta is None else worst_off(spending, delta=delta).epsilon, unguarded=is_unprotected(spending)
        ),
        "delta": delta,
        "budget": {"epsilon": budget.epsilon, "delta": budget.delta} if budget else None,
        "overlaps": [{"dataset": other, "n_shared_units": count} for other, count in shared.items()],
    }


def _described_run(run: RunRecord) -> dict[str, Any]:
    spent = composed({run.mechanism: run.n_charged}, delta=run.delta).epsilon
    return {
        "run_id": run.run_id,
        "n_steps": run.n_charged,
        "n_planned_steps": run.n_planned,
        "noise_multiplier": run.noise_multiplier,
        "sampling_rate": run.sampling_rate,
        "private": run.private,
        **_epsilon(spent, unguarded=_breaks_guarantee(run)),
        "delta": run.delta,
    }


def _epsilon(value: float, *, unguarded: bool) -> dict[str, Any]:
    """JSON has no infinity: None, and why."""
    if math.isfinite(value):
        return {"epsilon": value}
    return {"epsilon": None, "why": NOT_PRIVATE if unguarded else BEYOND}


def _breaks_guarantee(run: RunRecord) -> bool:
    return run.n_charged > 0 and run.mechanism[0] == 0


def _details(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        raise _unreadable() from None


def _unreadable() -> PrivacyError:
    return PrivacyError("an entry of the privacy ledger cannot be read: 'dpmed ledger verify' says which was changed")
