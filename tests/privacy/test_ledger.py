"""Where the ledger is, what its file may hold, and what one run may do with it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from privacy.ledger_runs import ALICE, BOB, DELTA, edit, full_ledger, linear_epsilon, make_plan, patients

from dpmed.errors import BudgetError, DpmedError, InputError, PrivacyError
from dpmed.privacy import accounting, ledger_store
from dpmed.privacy.ledger import PrivacyLedger, ledger_path


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "ledger.sqlite")


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "composed_epsilon", linear_epsilon)


# --- Where it is ------------------------------------------------------------------------------------------------------


def test_the_users_data_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DPMED_LEDGER", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    default = ledger_path(None)
    assert default is not None and default.parts[-2:] == ("dpmed", "ledger.sqlite")
    monkeypatch.setenv("DPMED_LEDGER", "")
    assert ledger_path(None) == default


def test_the_recipe_goes_before_the_variable_and_none_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "elsewhere")
    monkeypatch.setenv("DPMED_LEDGER", "~/shared.sqlite")
    assert ledger_path(None) == Path("elsewhere/shared.sqlite")
    assert ledger_path("own.sqlite") == Path("own.sqlite")
    assert ledger_path("none") is None
    monkeypatch.setenv("DPMED_LEDGER", "none")
    assert ledger_path(None) is None
    assert ledger_path("own.sqlite") == Path("own.sqlite")


def test_file_and_new_folders_are_the_users_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "new" / "folder" / "ledger.sqlite"
    PrivacyLedger(path).register([ALICE])
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.parents[level].stat().st_mode & 0o777 for level in (0, 1, 2)] == [0o700, 0o700, 0o755]
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]


def refused(path: Path, *, create: bool = True) -> str:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError) as caught:
        PrivacyLedger(path, create=create)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    assert "no such privacy ledger" in refused(tmp_path / "absent.sqlite", create=False)
    assert "not a file" in refused(tmp_path)
    text, empty, other = (tmp_path / name for name in ("text", "empty", "other.sqlite"))
    text.write_text("patient_id,text\n" * 200, encoding="utf-8")
    empty.touch()
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE meta (salt)")
        connection.commit()
    for path in (text, empty, other):
        for create in (True, False):
            assert "not a privacy ledger" in refused(path, create=create)
    (tmp_path / "text").chmod(0o700)
    assert "cannot be made" in refused(text / "ledger.sqlite")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    PrivacyLedger(path)
    edit(path, f"PRAGMA user_version = {ledger_store.SCHEMA_VERSION + 1}")
    assert "use the dpmed that wrote it" in refused(path)


def test_every_connection_writes_through_to_the_disk(ledger: PrivacyLedger) -> None:
    edit(ledger.path, "PRAGMA journal_mode = WAL")
    settings = ("synchronous", "journal_mode", "foreign_keys")
    with ledger._store.writing() as connection:
        values = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
    assert values == [3, "delete", 1]


def test_a_ledger_that_cannot_be_written_stops_the_run(ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ledger.open_run(patients(0, 20), make_plan())
    monkeypatch.setattr(ledger_store, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(PrivacyError, match=r"could not be written \(SQLITE_BUSY\), so no step may follow"):
            run.charge(1)
        assert run.n_charged == 0  # readers do not wait for it
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match="could not be read"):
        run.charge(1)
    PrivacyLedger(ledger.path)
    with pytest.raises(PrivacyError, match="not in the privacy ledger any more"):
        run.charge(1)


# --- Data sets and runs -----------------------------------------------------------------------------------------------


def test_a_data_set_is_its_units_in_any_order(ledger: PrivacyLedger, tmp_path: Path) -> None:
    units = patients(0, 30)
    dataset = ledger.register(units)
    assert ledger.register(iter([*reversed(units), units[3]])) == dataset
    assert PrivacyLedger(ledger.path).register(units) == dataset and ledger.head[0] == 1
    assert len(dataset) == 16 and int(dataset, 16)
    assert ledger.register(units[1:]) != dataset and ledger.head[0] == 2
    assert PrivacyLedger(tmp_path / "other.sqlite").register(units) != dataset  # another salt
    with pytest.raises(InputError, match="without units"):
        ledger.register([])


@pytest.mark.usefixtures("linear")
def test_no_units_name_is_in_the_file_or_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = full_ledger(path)
    dataset = ledger.datasets()[0]["id"]
    messages: list[str] = [json.dumps(ledger.datasets()), repr(ledger)]

    def fails(units: list[str], plan: Any, **more: Any) -> None:
        with pytest.raises(DpmedError) as caught:
            run = ledger.open_run(units, plan, **more)
            messages.append(repr(run))
            run.charge(5)
        messages.append(str(caught.value))

    units = [*patients(0, 18), ALICE, BOB]
    fails(units, make_plan(19))
    fails(units, make_plan(), budget_epsilon=0.1)
    fails([*units[:-1], "Carol"], make_plan(noise_multiplier=2.0), run_id=ledger.datasets()[0]["runs"][0]["run_id"])
    ledger.set_budget(dataset, epsilon=0.1, delta=DELTA)
    fails(units, make_plan())
    edit(path, "DELETE FROM units WHERE dataset = 1")
    messages += ledger.verify()
    written = path.read_bytes() + "".join(messages).encode()
    assert len(messages) == 7 and dataset.encode() in written
    assert not any(word in written for word in (b"Alice", b"Adams", b"Bob", b"Carol", b"patient-0"))


def test_charges_are_read_from_the_disk_over_all_starts(ledger: PrivacyLedger) -> None:
    units, plan = patients(0, 20), make_plan()
    first = ledger.open_run(units, plan)
    first.charge(2)
    first.charge(1)
    again = PrivacyLedger(ledger.path).open_run(units, plan, run_id=first.run_id)
    assert (again.run_id, again.dataset, again.n_charged) == (first.run_id, first.dataset, 3)
    again.charge(4)
    assert first.n_charged == again.n_charged == 7
    other = ledger.open_run(units, plan)
    assert other.run_id != first.run_id and other.n_charged == 0
    assert ledger.head[0] == 1 + 2 + 3


CHANGES: dict[str, dict[str, Any]] = {
    "unit": {"unit": "case_id"},
    "noise_multiplier": {"noise_multiplier": 5.0},
    "sampling_rate": {"expected_batch_units": 10},
    "delta": {"delta": 2e-3},
    "private": {"noise_seed": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_only_with_its_own_mechanism(ledger: PrivacyLedger, name: str) -> None:
    units = patients(0, 20)
    run = ledger.open_run(units, make_plan())
    with pytest.raises(PrivacyError, match=f"the ledger has another {name} for it"):
        ledger.open_run(units, make_plan(**CHANGES[name]), run_id=run.run_id)
    ledger.open_run(units, make_plan(n_steps=11, clip_norm=0.1), run_id=run.run_id)  # neither is part of the cost


def test_a_run_goes_on_only_with_its_own_data(ledger: PrivacyLedger) -> None:
    run = ledger.open_run(patients(0, 20), make_plan())
    n_entries = ledger.head[0]
    with pytest.raises(PrivacyError, match="the ledger has another dataset for it"):
        ledger.open_run(patients(1, 21), make_plan(), run_id=run.run_id)
    with pytest.raises(PrivacyError, match="the data has 19 units, the privacy plan 20"):
        ledger.open_run(patients(0, 19), make_plan(), run_id=run.run_id)
    assert ledger.head[0] == n_entries


def test_a_run_that_the_ledger_does_not_know_is_taken_as_it_is(ledger: PrivacyLedger) -> None:
    run = ledger.open_run(patients(0, 20), make_plan(), run_id="from-a-lost-ledger")
    assert (run.run_id, run.n_charged) == ("from-a-lost-ledger", 0)
    run.charge(7)
    assert ledger.open_run(patients(0, 20), make_plan(), run_id=run.run_id).n_charged == 7


@pytest.mark.parametrize("n_steps", [0, -1, 1.0, True, 2**31])
def test_only_a_number_of_steps_can_be_charged(ledger: PrivacyLedger, n_steps: Any) -> None:
    run = ledger.open_run(patients(0, 20), make_plan())
    with pytest.raises(InputError, match="n_steps must be a whole number of at least 1"):
        run.charge(n_steps)
    assert run.n_charged == 0


# --- What `show` gets -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("linear")
def test_the_description_has_runs_budget_and_overlaps(tmp_path: Path) -> None:
    ledger = full_ledger(tmp_path / "ledger.sqlite")
    first, second = json.loads(json.dumps(ledger.datasets(), allow_nan=False))
    assert (first["unit"], first["n_units"], first["delta"]) == ("patient_id", 20, DELTA)
    assert first["budget"] == {"epsilon": 50.0, "delta": DELTA} and second["budget"] is None
    assert first["overlaps"] == [{"dataset": second["id"], "n_shared_units": 15}]
    assert second["overlaps"] == [{"dataset": first["id"], "n_shared_units": 15}]
    (run,) = first["runs"]
    run_id = run.pop("run_id")
    assert run == {
        "n_steps": 5,
        "n_planned_steps": 10,
        "noise_multiplier": 4.0,
        "sampling_rate": 1.0,
        "private": True,
        "epsilon": 1.25,
        "delta": DELTA,
    }
    assert run_id != second["runs"][0]["run_id"]
    assert first["epsilon"] == second["epsilon"] == 2.5  # Alice and 14 patients are in both


def test_a_data_set_without_runs_has_spent_nothing(ledger: PrivacyLedger) -> None:
    dataset = ledger.register([ALICE])
    (described,) = ledger.datasets()
    assert (described["epsilon"], described["delta"], described["unit"], described["runs"]) == (0.0, None, None, [])
    assert ledger.spent(dataset, delta=DELTA).epsilon == 0.0


@pytest.mark.parametrize("how", [{"noise_multiplier": 0.0}, {"noise_seed": 3}])
def test_a_run_that_is_not_private_leaves_no_guarantee(ledger: PrivacyLedger, how: dict[str, Any]) -> None:
    run = ledger.open_run(patients(0, 20), make_plan(**how))
    assert ledger.unprotected() == []
    run.charge(1)
    neighbour = ledger.register(patients(19, 25))
    untouched = ledger.register(patients(20, 25))
    assert ledger.unprotected() == [run.dataset, neighbour]
    assert ledger.spent(neighbour, delta=DELTA).epsilon == float("inf")
    first, second, third = json.loads(json.dumps(ledger.datasets(), allow_nan=False))
    assert first["runs"][0]["private"] is False
    for described in (first, first["runs"][0], second):
        assert described["epsilon"] is None and "nothing is guaranteed any more" in described["why"]
    assert (third["id"], third["epsilon"]) == (untouched, 0.0) and "why" not in third
    with pytest.raises(BudgetError, match="more than any epsilon"):
        ledger.open_run(patients(19, 25), make_plan(6), budget_epsilon=1e6)
    ledger.open_run(patients(20, 25), make_plan(5), budget_epsilon=1e6)
