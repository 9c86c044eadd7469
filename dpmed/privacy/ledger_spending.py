"""What the ledger's charges come to for the worst-off unit, and whether a budget admits more. Pure: no file, no SQL.

A unit may be in several data sets: an extract made again next month shares most patients with the last one. What one
unit was charged is every run on every data set that it is in, composed. So a data set's units fall into cells, one per
distinct set of data sets that a unit is in, and the largest epsilon over its cells is the data set's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dpmed.errors import BudgetError
from dpmed.privacy import accounting
from dpmed.privacy.accounting import EpsilonReport

Cells = frozenset[frozenset[str]]
"""Distinct sets of data sets that a unit of one data set is in; that data set is in all of them."""
Mechanism = tuple[float, float]
"""(noise_multiplier, sampling_rate); noise 0 stands for no guarantee, whatever the reason."""
History = dict[Mechanism, int]
"""Steps by mechanism."""


@dataclass(frozen=True)
class RunRecord:
    """One run as the ledger holds it."""

    run_id: str
    dataset: str
    unit: str
    noise_multiplier: float
    sampling_rate: float
    delta: float
    private: bool
    n_planned: int
    n_charged: int = 0

    @property
    def mechanism(self) -> Mechanism:
        """Whose steps add up; a run that is not private costs the same as one without noise."""
        return (self.noise_multiplier if self.private else 0.0, self.sampling_rate)


@dataclass(frozen=True)
class Budget:
    """Epsilon at a delta that no unit of `dataset` may exceed; `dataset` None is the limit of one run's recipe."""

    dataset: str | None
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spending:
    """The part of the ledger that one data set's spending depends on, at one moment."""

    cells: Cells
    runs: Mapping[str, RunRecord]
    """By run id; of all data sets in the cells, at least."""
    budgets: tuple[Budget, ...] = ()
    """The newest of each data set that has one."""

    def after(self, run: RunRecord, n_steps: int) -> Spending:
        """The spending if `run` is charged for `n_steps` more."""
        charged = replace(run, n_charged=run.n_charged + n_steps)
        return replace(self, runs={**self.runs, run.run_id: charged})

    def as_planned(self) -> Spending:
        """The spending if every run goes on to its planned end."""
        runs = {key: replace(run, n_charged=max(run.n_charged, run.n_planned)) for key, run in self.runs.items()}
        return replace(self, runs=runs)


def histories(cells: Iterable[frozenset[str]], runs: Iterable[RunRecord]) -> list[History]:
    """What the units of the cells were charged, without what another one covers: only these can be the worst-off.

    Edge cases: [] if nothing was charged.
    """
    charged: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.n_charged > 0:
            charged.setdefault(run.dataset, []).append(run)
    kept: list[History] = []
    # a history can only be covered by one of at least as many steps, so the longest come first
    found = [_merged(charged, cell) for cell in {cell.intersection(charged) for cell in cells} if cell]
    for history in sorted(found, key=lambda history: -sum(history.values())):
        if not any(covers(other, history) for other in kept):
            kept.append(history)
    return kept


def covers(larger: History, smaller: History) -> bool:
    """Whether `larger` has at least the steps of `smaller` under each mechanism, so that its epsilon is no smaller."""
    return all(larger.get(mechanism, 0) >= n_steps for mechanism, n_steps in smaller.items())


def composed(history: History, *, delta: float) -> EpsilonReport:
    """Epsilon of a history as a whole; infinite if a run in it was not private."""
    return accounting.composed_epsilon([(*key, n_steps) for key, n_steps in sorted(history.items())], delta=delta)


def worst_off(spending: Spending, *, delta: float) -> EpsilonReport:
    """Epsilon of the unit that was charged most, over all data sets that it is in."""
    reports = [composed(history, delta=delta) for history in histories(spending.cells, spending.runs.values())]
    return max(reports, key=lambda report: report.epsilon, default=EpsilonReport(0.0, 0.0, 0.0))


class BudgetGate:
    """Says no before a budget is exceeded; remembers what it found to fit, so that most charges compute nothing.

    What a history costs, every history that it covers costs at most. So one look at the planned end of all runs answers
    for each charge on the way there.
    """

    def __init__(self) -> None:
        self._fitting: dict[tuple[float, float], list[History]] = {}

    def check(self, spending: Spending, run: RunRecord, n_steps: int, *, own: Budget | None = None) -> None:
        """Refuse `n_steps` more of `run` if some unit of its data set would then exceed a budget that it is under.

        Those are the run's own, and that of each data set that the unit is in.
        Args:
            spending: of the run's data set, without the new steps.
            run: its `n_charged` included.
            n_steps: 0 asks for nothing and is always admitted.
            own: the limit of the run's own recipe.

        Raises: BudgetError that names the budget and what would be spent.
        """
        if n_steps == 0:
            return
        after = spending.after(run, n_steps)
        planned = after.as_planned()
        for budget in (*spending.budgets, *([own] if own else [])):
            under = [cell for cell in spending.cells if budget.dataset is None or budget.dataset in cell]
            if not under or self._fits(under, planned, budget):
                continue
            if not self._fits(under, after, budget):
                raise BudgetError(_refusal(replace(after, cells=frozenset(under)), budget, run, n_steps))

    def _fits(self, cells: Iterable[frozenset[str]], spending: Spending, budget: Budget) -> bool:
        known = self._fitting.setdefault((budget.epsilon, budget.delta), [])
        for history in histories(cells, spending.runs.values()):
            if any(covers(other, history) for other in known):
                continue
            if not composed(history, delta=budget.delta).epsilon <= budget.epsilon:
                return False
            known[:] = [*(other for other in known if not covers(history, other)), history]
        return True


def _merged(charged: Mapping[str, Iterable[RunRecord]], cell: Iterable[str]) -> History:
    history: History = {}
    for run in (run for dataset in cell for run in charged[dataset]):
        history[run.mechanism] = history.get(run.mechanism, 0) + run.n_charged
    return history


def _refusal(after: Spending, budget: Budget, run: RunRecord, n_steps: int) -> str:
    epsilon = worst_off(after, delta=budget.delta).epsilon
    spent = f"epsilon {epsilon:.4g}" if math.isfinite(epsilon) else "more than any epsilon (a run without a guarantee)"
    whose = "the run's own budget" if budget.dataset is None else f"the budget of data set {budget.dataset}"
    remedy = "train fewer steps, with more noise, or on other patients" + (
        "; raise the recipe's budget"
        if budget.dataset is None
        else "; see 'dpmed ledger show' and 'dpmed ledger budget'"
    )
    return (
        f"{n_steps} more steps on data set {run.dataset} would bring a unit to {spent} at delta {budget.delta:g},"
        f" {whose} is {budget.epsilon:g}: {remedy}"
    )
