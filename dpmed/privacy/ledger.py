"""The privacy ledger: what the units of each data set were charged, over all runs, on disk before any weight is.

1. A data set is known by its units: a salted hash of each is stored, no name.
2. A run on it is charged step by step; a charge is on the disk (fsync) before `charge` returns.
3. Runs that share a unit compose, on the same data set or on overlapping ones; the worst-off unit counts.
4. A budget is checked in the transaction that would write the charge, so that no two processes overspend it together.
5. All entries form one chain of hashes: `verify` finds what was changed, removed or put elsewhere.

What a ledger cannot show: runs that used another ledger or none, a unit under another name, and a file that somebody
rewrote as a whole.
"""

from __future__ import annotations

import math
import os
import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import ledger_chain as chain
from dpmed.privacy import ledger_view as view
from dpmed.privacy.accounting import EpsilonReport
from dpmed.privacy.ledger_spending import Budget, BudgetGate, Cells, RunRecord, Spending, worst_off
from dpmed.privacy.ledger_store import LedgerStore, read_head

if TYPE_CHECKING:
    from dpmed.privacy.plan import PrivacyPlan

ENVIRONMENT_VARIABLE = "DPMED_LEDGER"
OFF = "none"
ID_CHARACTERS = 16
_FIXED = ("dataset", "unit", "noise_multiplier", "sampling_rate", "delta", "private")  # of a run, over all its starts


def ledger_path(setting: str | None) -> Path | None:
    """Where the ledger is, by the recipe's `privacy.ledger`; None if there is to be none.

    Edge cases: None means the environment variable DPMED_LEDGER, and without it the user's data folder; "none", in
        either place, means no ledger; an empty variable counts as not set.
    """
    given = setting if setting is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    if given is None:
        from platformdirs import user_data_path

        return user_data_path("dpmed", appauthor=False) / "ledger.sqlite"
    return None if given.strip().lower() == OFF else Path(given).expanduser()


class PrivacyLedger:
    """The ledger in one file, which is made (0600, in folders of 0700) if it is not there.

    Any number of processes may use the same file at once. Names of units neither reach the file nor a message.

    Args:
        path: the file; on a disk where SQLite's locks work, so rather not a network share.
        create: whether an absent file is made; a file that is there is never made anew.

    Raises: InputError if the file is absent and not to be made, cannot be read, is no ledger, or is of another version.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self._store = LedgerStore(path, create=create)
        self._gate = BudgetGate()
        self._cells: dict[str, tuple[int, Cells]] = {}

    @property
    def path(self) -> Path:
        """The file, as an absolute path."""
        return self._store.path

    @property
    def head(self) -> tuple[int, str]:
        """How many entries there are and the hash of the last: kept elsewhere, it shows that a file was rewritten."""
        with self._store.reading() as connection:
            return read_head(connection)[1:]

    def register(self, units: Iterable[str]) -> str:
        """Make a data set known by its units; returns its id, the same for the same units in any order.

        Raises: InputError if there is no unit.
        """
        hashes = self._store.unit_hashes(units)
        if not hashes:
            raise InputError("a data set without units cannot be charged: check the records and data.unit")
        return self._register(hashes)

    def open_run(
        self,
        units: Iterable[str],
        plan: PrivacyPlan,
        *,
        run_id: str | None = None,
        budget_epsilon: float | None = None,
    ) -> RunCharges:
        """Register a run, or go on with one, before its training starts.

        Args:
            units: the training data's units; repetitions count once.
            plan: the run's mechanism and planned steps.
            run_id: of the run that goes on; None for a new one. One that this ledger does not know is taken as it is,
                with no step charged: its ledger may have been lost.
            budget_epsilon: what no unit may exceed at `plan.delta`, this run and all before it included.

        Raises: BudgetError if the remaining planned steps would exceed a budget; PrivacyError if the data set or the
            mechanism is not the one that the run was started with, if the plan is for another number of units, or if
            the ledger's chain is broken; InputError if the budget is no number above 0.
        """
        record, hashes = self._record_of(units, plan, run_id)
        own = _own_budget(plan, budget_epsilon)
        with self._store.reading() as connection:
            _refuse_other(view.read_runs(connection).get(record.run_id), record)  # before anything is written
        self._register(hashes)
        self._admit_run(record, own)
        return RunCharges(self, record.run_id, record.dataset, own)

    def check_new_run(self, units: Iterable[str], plan: PrivacyPlan, *, budget_epsilon: float | None = None) -> None:
        """Refuse what `open_run` would refuse of a new run, before models are loaded; no run is registered.

        Raises: as `open_run`.
        """
        record, hashes = self._record_of(units, plan, None)
        self._register(hashes)
        with self._store.reading() as connection:
            spending = self._spending(connection, record.dataset)
        self._check_rest(spending, record, _own_budget(plan, budget_epsilon))

    def set_budget(self, dataset: str, *, epsilon: float, delta: float) -> None:
        """Limit what any unit of a data set may be charged, over all its runs; the newest budget of a data set counts.

        Args:
            dataset: its id, or a beginning of it that no other one has.
            epsilon: > 0; may be below what is spent already, which then stops every further charge.
            delta: at which epsilon is meant, in (0, 1 / units).

        Raises: InputError for an unknown or ambiguous data set, or a value out of range.
        """
        epsilon = _above_zero(epsilon, "epsilon")
        with self._store.writing() as connection:
            found = view.resolve(connection, dataset)
            n_units = view.read_counts(connection)[found]
            if not 0 < delta < 1 / n_units:
                raise InputError(
                    f"delta must lie in (0, 1/n_units = {1 / n_units:.2g}), got {delta}: a larger one lets a run"
                    f" publish a whole unit; take {float(n_units) ** -1.1:.1e} or less"
                )
            chain.append(connection, "budget", found, details={"epsilon": epsilon, "delta": float(delta)})

    def spent(self, dataset: str, *, delta: float) -> EpsilonReport:
        """Epsilon of the data set's worst-off unit, over all runs on all data sets that the unit is in.

        Edge cases: 0 before any charge; infinite if a run without noise, or with a known noise seed, was charged.
        Raises: InputError for an unknown or ambiguous data set, or delta not in (0, 1).
        """
        with self._store.reading() as connection:
            spending = self._spending(connection, view.resolve(connection, dataset))
        return worst_off(spending, delta=delta)

    def datasets(self) -> list[dict[str, Any]]:
        """All data sets in the order in which they came, JSON-ready; an epsilon that is infinite is None, with "why".

        Epsilon of a data set is at the delta of its budget, or else at the smallest delta of the runs on it and on
        those that it overlaps.
        """
        with self._store.reading() as connection:
            counts = view.read_counts(connection)
            spending = {dataset: self._spending(connection, dataset) for dataset in counts}
            shared = {dataset: view.read_shared(connection, dataset) for dataset in counts}
        return [view.described(dataset, n, spending[dataset], shared[dataset]) for dataset, n in counts.items()]

    def unprotected(self) -> list[str]:
        """Ids of the data sets with a unit for which nothing is guaranteed any more."""
        with self._store.reading() as connection:
            spending = {dataset: self._spending(connection, dataset) for dataset in view.read_counts(connection)}
        return [dataset for dataset, one in spending.items() if view.is_unprotected(one)]

    def verify(self) -> list[str]:
        """What is wrong with the file, one line each; [] if every entry and unit hash is as it was written.

        Finds changed, missing and reordered entries, the last one too, changed unit hashes, missing triggers, damage.
        """
        with self._store.reading() as connection:
            return chain.all_problems(connection)

    def _record_of(self, units: Iterable[str], plan: PrivacyPlan, run_id: str | None) -> tuple[RunRecord, list[bytes]]:
        """The run as the ledger knows it, and its units' hashes; refuses a broken ledger."""
        hashes = self._store.unit_hashes(units)
        if len(hashes) != plan.n_units:
            raise PrivacyError(
                f"the data has {len(hashes)} units, the privacy plan {plan.n_units}: make the plan from this data"
            )
        self._refuse_broken()
        record = RunRecord(
            run_id=run_id or secrets.token_hex(8),
            dataset=_dataset_id(hashes),
            unit=plan.unit,
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            delta=plan.delta,
            private=plan.private,
            n_planned=plan.n_steps,
        )
        return record, hashes

    def _register(self, hashes: list[bytes]) -> str:
        dataset = _dataset_id(hashes)
        with self._store.writing() as connection:
            if dataset not in view.read_counts(connection):
                details = {"fingerprint": chain.fingerprint(hashes), "n_units": len(hashes)}
                number = chain.append(connection, "dataset", dataset, details=details)
                chain.add_units(connection, number, hashes)
        return dataset

    def _admit_run(self, record: RunRecord, own: Budget | None) -> None:
        """Check a run against the budgets and, if it is new, append it."""
        with self._store.reading() as connection:
            before = self._spending(connection, record.dataset)
        self._check_rest(before, record, own)  # once without the lock: it may take seconds, and is remembered
        with self._store.writing() as connection:
            spending = self._spending(connection, record.dataset)
            self._check_rest(spending, record, own)
            if record.run_id not in spending.runs:
                details = asdict(record)
                for name in ("run_id", "dataset", "n_charged"):
                    del details[name]
                chain.append(connection, "run", record.dataset, run=record.run_id, details=details)

    def _check_rest(self, spending: Spending, record: RunRecord, own: Budget | None) -> None:
        known = spending.runs.get(record.run_id)
        _refuse_other(known, record)
        run = known or record
        self._gate.check(spending, run, max(record.n_planned - run.n_charged, 0), own=own)

    def _charge(self, run_id: str, dataset: str, n_steps: int, own: Budget | None) -> None:
        with self._store.reading() as connection:
            before = self._spending(connection, dataset)
        self._gate.check(before, _known(before.runs, run_id), n_steps, own=own)  # without the lock, as in `_admit_run`
        with self._store.writing() as connection:
            spending = self._spending(connection, dataset)
            self._gate.check(spending, _known(spending.runs, run_id), n_steps, own=own)
            chain.append(connection, "charge", dataset, run=run_id, n_steps=n_steps)

    def _refuse_broken(self) -> None:
        with self._store.reading() as connection:
            problems = chain.chain_problems(connection)
        if problems:
            raise PrivacyError(
                f"{self.path}: {problems[0]}: what was spent is not known, so nothing is trained; see 'dpmed ledger"
                " verify' and restore the ledger from a backup"
            )

    def _spending(self, connection: sqlite3.Connection, dataset: str) -> Spending:
        """What counts for a data set now. Which units it shares changes only when a data set is added."""
        newest = connection.execute("SELECT max(n) FROM entries WHERE kind = 'dataset'").fetchone()[0]
        known = self._cells.get(dataset)
        if known is None or known[0] != newest:
            known = self._cells[dataset] = (newest, view.read_cells(connection, dataset))
        near = {name for cell in known[1] for name in cell}
        budgets = tuple(budget for budget in view.read_budgets(connection).values() if budget.dataset in near)
        # all runs, so that one that goes on with another data set is seen
        return Spending(known[1], view.read_runs(connection), budgets)


@dataclass(frozen=True)
class RunCharges:
    """One start of one run: what it charges. Made by `PrivacyLedger.open_run`."""

    ledger: PrivacyLedger
    run_id: str
    dataset: str
    own_budget: Budget | None = None

    def charge(self, n_steps: int) -> None:
        """Charge the run's next steps. Call it before a weight that they change can leave the process.

        Guarantee: when it returns, the charge is on the disk, whatever happens to the process or the machine next.
        Edge cases: steps that are charged and never run stay charged.
        Raises: BudgetError, with nothing written, if a unit would exceed a budget; PrivacyError if the charge cannot be
            written; InputError if `n_steps` is no whole number of at least 1.
        """
        if not isinstance(n_steps, int) or isinstance(n_steps, bool) or not 1 <= n_steps < 2**31:
            raise InputError(
                f"n_steps must be a whole number of at least 1, got {n_steps}: charge steps before they run"
            )
        self.ledger._charge(self.run_id, self.dataset, n_steps, self.own_budget)

    @property
    def n_charged(self) -> int:
        """All steps ever charged to this run, over all its starts, read from the disk."""
        with self.ledger._store.reading() as connection:
            return _known(view.read_runs(connection), self.run_id).n_charged


def _dataset_id(sorted_hashes: list[bytes]) -> str:
    return chain.fingerprint(sorted_hashes)[:ID_CHARACTERS]


def _known(runs: Mapping[str, RunRecord], run_id: str) -> RunRecord:
    if run_id not in runs:
        raise PrivacyError(
            f"run {run_id} is not in the privacy ledger any more: the file was replaced while it trained; put the old"
            " one back, then resume"
        )
    return runs[run_id]


def _refuse_other(known: RunRecord | None, record: RunRecord) -> None:
    """A run that goes on must have the data set and the mechanism that it was started with."""
    different = [name for name in _FIXED if known and getattr(known, name) != getattr(record, name)]
    if different:
        raise PrivacyError(
            f"run {record.run_id} cannot go on, the ledger has another {', '.join(different)} for it: resume with the"
            " data and the plan that it was started with, or start a new run"
        )


def _own_budget(plan: PrivacyPlan, epsilon: float | None) -> Budget | None:
    return None if epsilon is None else Budget(None, _above_zero(epsilon, "the budget"), plan.delta)


def _above_zero(epsilon: float, what: str) -> float:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"{what} must be a finite number > 0, got {epsilon}: e.g. 8")
    return float(epsilon)
