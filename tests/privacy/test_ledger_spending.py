"""What several runs cost together, for the unit that is in most of them, and what a budget lets through."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from privacy.ledger_runs import DELTA, linear_epsilon, make_plan, patients

from dpmed.errors import BudgetError, InputError
from dpmed.privacy import accounting
from dpmed.privacy.accounting import EpsilonReport, History
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.privacy.ledger_spending import RunRecord, covers, histories


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "ledger.sqlite")


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> list[History]:
    """Epsilon is steps / noise, added up; the fixture is the list of histories that were asked for."""
    asked: list[History] = []

    def counted(history: History, *, delta: float) -> EpsilonReport:
        asked.append(history)
        return linear_epsilon(history, delta=delta)

    monkeypatch.setattr(accounting, "composed_epsilon", counted)
    return asked


# --- Composition ------------------------------------------------------------------------------------------------------


def test_two_runs_compose_and_do_not_just_add_up(ledger: PrivacyLedger) -> None:
    units = patients(0, 40)
    mechanisms = [(2.0, 10, 5), (3.0, 20, 8)]
    for sigma, batch, n_steps in mechanisms:
        run = ledger.open_run(units, make_plan(40, noise_multiplier=sigma, expected_batch_units=batch))
        run.charge(2)
        run.charge(n_steps - 2)
    history = [(sigma, batch / 40, n_steps) for sigma, batch, n_steps in mechanisms]
    spent = ledger.spent(ledger.register(units), delta=DELTA)
    assert spent == accounting.composed_epsilon(history, delta=DELTA)
    alone = [accounting.composed_epsilon([one], delta=DELTA).epsilon for one in history]
    assert max(alone) < spent.epsilon < sum(alone)
    (described,) = ledger.datasets()
    assert described["epsilon"] == spent.epsilon and [run["epsilon"] for run in described["runs"]] == alone


@pytest.mark.usefixtures("linear")
def test_shared_units_carry_their_charges_over(ledger: PrivacyLedger) -> None:
    first = ledger.open_run(patients(0, 20), make_plan())
    first.charge(8)
    second = ledger.open_run(patients(15, 35), make_plan())
    second.charge(4)
    third = ledger.register(patients(30, 50))
    assert ledger.spent(first.dataset, delta=DELTA).epsilon == (8 + 4) / 4  # patients 15 to 19
    assert ledger.spent(second.dataset, delta=DELTA).epsilon == (8 + 4) / 4
    assert ledger.spent(third, delta=DELTA).epsilon == 4 / 4  # none of it was in the first
    shared = [described["overlaps"] for described in ledger.datasets()]
    assert shared == [
        [{"dataset": second.dataset, "n_shared_units": 5}],
        [{"dataset": first.dataset, "n_shared_units": 5}, {"dataset": third, "n_shared_units": 5}],
        [{"dataset": second.dataset, "n_shared_units": 5}],
    ]


def test_only_histories_that_nothing_covers_are_composed(ledger: PrivacyLedger, linear: list[History]) -> None:
    for last in (20, 15, 10):  # nested: the innermost units were in all three
        ledger.open_run(patients(0, last), make_plan(last, noise_multiplier=float(last))).charge(3)
    outermost = ledger.register(patients(0, 20))
    linear.clear()
    assert ledger.spent(outermost, delta=DELTA).epsilon == pytest.approx(3 / 20 + 3 / 15 + 3 / 10)
    assert len(linear) == 1 and len(linear[0]) == 3


SETS = st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=3)
CHARGES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1.0, 2.0, 4.0]), st.integers(1, 5)), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def fast() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "composed_epsilon", linear_epsilon)
        yield


def spent_by_unit(sets: list[set[int]], charged: list[tuple[int, float, int]]) -> dict[int, float]:
    """The truth, unit by unit."""
    units = {unit for one in sets for unit in one}
    return {unit: sum(n / sigma for index, sigma, n in charged if unit in sets[index]) for unit in units}


@pytest.mark.usefixtures("fast")
@given(sets=SETS, charges=CHARGES)
def test_the_worst_off_unit_is_found(sets: list[set[int]], charges: list[tuple[int, float, int]]) -> None:
    charges = [(index % len(sets), sigma, n) for index, sigma, n in charges]
    with tempfile.TemporaryDirectory() as folder:
        ledger = PrivacyLedger(Path(folder) / "ledger.sqlite")
        names = [ledger.register(map(str, one)) for one in sets]
        for index, sigma, n_steps in charges:
            plan = make_plan(len(sets[index]), noise_multiplier=sigma)
            ledger.open_run(map(str, sets[index]), plan).charge(n_steps)
        truth = spent_by_unit(sets, charges)
        for name, units in zip(names, sets, strict=True):
            assert ledger.spent(name, delta=DELTA).epsilon == max(truth[unit] for unit in units)
        assert ledger.verify() == []


def test_a_history_covers_what_has_no_step_more() -> None:
    small = {(1.0, 0.1): 3}
    assert covers({(1.0, 0.1): 3, (2.0, 0.1): 1}, small) and covers(small, {})
    assert not covers({(1.0, 0.1): 2, (2.0, 0.1): 9}, small) and not covers({(1.0, 0.2): 3}, small)


def test_runs_of_one_mechanism_count_as_one() -> None:
    cells = frozenset([frozenset(["a", "b"]), frozenset(["a"])])
    runs = [RunRecord(str(i), name, "p", 2.0, 0.5, DELTA, True, 9, n_charged=i) for i, name in enumerate("aabc")]
    assert histories(cells, runs) == [{(2.0, 0.5): 1 + 2}]
    assert histories(cells, runs[:1]) == []


# --- Budgets ----------------------------------------------------------------------------------------------------------


def entries_after(ledger: PrivacyLedger, refused: Callable[[], Any], match: str) -> int:
    before = ledger.head[0]
    with pytest.raises(BudgetError, match=match):
        refused()
    return ledger.head[0] - before


@pytest.mark.usefixtures("linear")
def test_the_recipes_budget_stops_a_run_before_it_starts(ledger: PrivacyLedger) -> None:
    units = patients(0, 20)
    ledger.open_run(units, make_plan(), budget_epsilon=2.5).charge(10)
    refused = lambda: ledger.open_run(units, make_plan(n_steps=1), budget_epsilon=2.5)  # noqa: E731
    assert (
        entries_after(ledger, refused, match="bring a unit to epsilon 2.75 at delta 0.001, the run's own budget") == 0
    )
    run = ledger.open_run(units, make_plan(n_steps=1), budget_epsilon=2.75)
    run.charge(1)
    assert entries_after(ledger, lambda: run.charge(1), match="raise the recipe's budget") == 0
    assert run.n_charged == 1


@pytest.mark.usefixtures("linear")
def test_only_the_steps_that_are_left_count_when_a_run_goes_on(ledger: PrivacyLedger) -> None:
    units = patients(0, 20)
    run = ledger.open_run(units, make_plan(), budget_epsilon=2.5)
    run.charge(6)
    again = ledger.open_run(units, make_plan(), run_id=run.run_id, budget_epsilon=2.5)
    again.charge(4)
    done = ledger.open_run(units, make_plan(), run_id=run.run_id, budget_epsilon=0.1)  # it asks for nothing more
    assert (again.n_charged, done.n_charged) == (10, 10)


@pytest.mark.usefixtures("linear")
def test_a_data_sets_budget_holds_for_charges_elsewhere(ledger: PrivacyLedger) -> None:
    first = ledger.open_run(patients(0, 20), make_plan())
    first.charge(10)
    ledger.set_budget(first.dataset[:6], epsilon=3.0, delta=DELTA)
    again = patients(0, 19) + patients(90, 91)  # the same extract, one patient gone and one new
    refused = lambda: ledger.open_run(again, make_plan(n_steps=3))  # noqa: E731
    assert entries_after(ledger, refused, match=f"the budget of data set {first.dataset} is 3") == 1  # its data set
    run = ledger.open_run(again, make_plan(n_steps=2))
    run.charge(2)
    assert entries_after(ledger, lambda: run.charge(1), match="see 'dpmed ledger show'") == 0
    others = ledger.open_run(patients(20, 40), make_plan())  # shares no unit: not under that budget
    others.charge(10)
    mixed = ledger.register(patients(19, 40))
    ledger.set_budget(mixed, epsilon=0.5, delta=DELTA)
    assert entries_after(ledger, lambda: others.charge(1), match=f"the budget of data set {mixed}") == 0
    ledger.set_budget(mixed, epsilon=9.0, delta=DELTA)  # the newest counts
    others.charge(1)


@pytest.mark.usefixtures("fast")
@given(sets=SETS, limits=st.lists(st.sampled_from([None, 1.0, 2.5, 4.0]), min_size=3, max_size=3), charges=CHARGES)
def test_a_charge_goes_through_exactly_if_no_budget_of_its_units_is_exceeded(
    sets: list[set[int]], limits: list[float | None], charges: list[tuple[int, float, int]]
) -> None:
    sets = [one for number, one in enumerate(sets) if one not in sets[:number]]
    budgets = [(one, limit) for one, limit in zip(sets, limits, strict=False) if limit is not None]
    done: list[tuple[int, float, int]] = []

    def admissible(index: int, sigma: float, n_steps: int) -> bool:
        after = spent_by_unit(sets, [*done, (index, sigma, n_steps)])
        return all(after[unit] <= limit for one, limit in budgets for unit in sets[index] & one)

    with tempfile.TemporaryDirectory() as folder:
        ledger = PrivacyLedger(Path(folder) / "ledger.sqlite")
        for one, limit in budgets:
            ledger.set_budget(ledger.register(map(str, one)), epsilon=limit, delta=DELTA)
        for index, sigma, n_steps in charges:
            index %= len(sets)
            plan = make_plan(len(sets[index]), noise_multiplier=sigma, n_steps=1)
            try:
                run = ledger.open_run(map(str, sets[index]), plan)
            except BudgetError:
                assert not admissible(index, sigma, 1)
                continue
            assert admissible(index, sigma, 1)
            try:
                run.charge(n_steps)
            except BudgetError:
                assert not admissible(index, sigma, n_steps) and run.n_charged == 0
                continue
            assert admissible(index, sigma, n_steps)
            done.append((index, sigma, n_steps))


def test_charges_within_checked_plans_compute_nothing(ledger: PrivacyLedger, linear: list[History]) -> None:
    run = ledger.open_run(patients(0, 20), make_plan(n_steps=50), budget_epsilon=100.0)
    assert len(linear) == 1  # its planned end
    for _ in range(5):
        run.charge(5)
    assert len(linear) == 1
    other = ledger.open_run(patients(10, 30), make_plan(n_steps=50))
    for _ in range(5):
        other.charge(10)
        run.charge(5)
    assert len(linear) == 2  # the planned end of both
    run.charge(1)
    assert len(linear) == 3 and linear[-1] == [(4.0, 1.0, 50 + 50 + 1)]


def test_a_budget_is_for_the_units_of_its_data_set_alone(ledger: PrivacyLedger, linear: list[History]) -> None:
    """A run on patients 0 to 19 is under the budget of 0 to 9; what 10 to 19 were charged elsewhere is not."""
    ledger.open_run(patients(10, 20), make_plan(10)).charge(10)
    limited = ledger.register(patients(0, 10))
    ledger.set_budget(limited, epsilon=1.0, delta=DELTA)
    run = ledger.open_run(patients(0, 20), make_plan(n_steps=4))
    run.charge(4)
    with pytest.raises(BudgetError, match=f"the budget of data set {limited} is 1"):
        run.charge(1)


def test_epsilon_is_computed_without_keeping_others_from_charging(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[History] = []

    def computed(history: History, *, delta: float) -> EpsilonReport:
        with closing(sqlite3.connect(ledger.path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")  # fails if a reader or a writer is at it
        asked.append(history)
        return linear_epsilon(history, delta=delta)

    monkeypatch.setattr(accounting, "composed_epsilon", computed)
    run = ledger.open_run(patients(0, 20), make_plan(n_steps=2), budget_epsilon=9.0)
    run.charge(3)
    ledger.spent(run.dataset, delta=DELTA)
    ledger.datasets()
    assert len(asked) == 5


@pytest.mark.parametrize("when", ["open", "charge"])
def test_what_others_charge_between_the_first_look_and_the_entry_counts(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    units = patients(0, 20)
    other = PrivacyLedger(ledger.path).open_run(units, make_plan())
    meanwhile: list[int] = []

    def computed(history: History, *, delta: float) -> EpsilonReport:
        report = linear_epsilon(history, delta=delta)
        if meanwhile:
            other.charge(meanwhile.pop())
        return report

    monkeypatch.setattr(accounting, "composed_epsilon", computed)
    run = ledger.open_run(units, make_plan(n_steps=1), budget_epsilon=5.0)
    n_entries = ledger.head[0]
    meanwhile.append(19)
    with pytest.raises(BudgetError):
        if when == "open":
            ledger.open_run(units, make_plan(n_steps=2), budget_epsilon=5.0)
        else:
            run.charge(2)
    assert meanwhile == [] and ledger.head[0] == n_entries + 1 and other.n_charged == 19


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_number_above_zero(ledger: PrivacyLedger, epsilon: float) -> None:
    dataset = ledger.register(patients(0, 20))
    with pytest.raises(InputError, match="epsilon must be a finite number > 0"):
        ledger.set_budget(dataset, epsilon=epsilon, delta=DELTA)
    with pytest.raises(InputError, match="the budget must be a finite number > 0"):
        ledger.open_run(patients(0, 20), make_plan(), budget_epsilon=epsilon)
    assert ledger.head[0] == 1


@pytest.mark.parametrize("delta", [0.0, 0.05, 1.0, float("nan")])
def test_a_budgets_delta_is_below_one_over_the_units(ledger: PrivacyLedger, delta: float) -> None:
    dataset = ledger.register(patients(0, 20))
    with pytest.raises(InputError, match=r"delta must lie in \(0, 1/n_units = 0.05\)"):
        ledger.set_budget(dataset, epsilon=1.0, delta=delta)


def test_a_data_set_is_named_by_a_beginning_that_no_other_has(ledger: PrivacyLedger) -> None:
    names = [ledger.register(patients(0, last)) for last in range(1, 18)]  # 17 ids: two begin with the same character
    twice = next(name[0] for name in names if sum(other[0] == name[0] for other in names) > 1)
    for beginning, problem in (
        (twice, "data sets of the ledger begin so"),
        ("", "no data set"),
        ("xyz", "no data set"),
    ):
        with pytest.raises(InputError, match=problem):
            ledger.set_budget(beginning, epsilon=1.0, delta=DELTA)
        with pytest.raises(InputError, match=problem):
            ledger.spent(beginning, delta=DELTA)
    ledger.set_budget(names[3].upper()[:12], epsilon=1.0, delta=DELTA)
    assert [described["id"] for described in ledger.datasets() if described["budget"]] == [names[3]]
