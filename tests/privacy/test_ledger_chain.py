"""Whatever is changed, removed or moved in the file is found, though the triggers stand again afterwards."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from privacy.ledger_runs import ALICE, BOB, edit, full_ledger, make_plan, patients

from dpmed.errors import PrivacyError
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.privacy.ledger_chain import entry_hash

# The entries of `full_ledger`: 1 data set, 2 run, 3 and 4 charges, 5 data set, 6 run, 7 and 8 charges, 9 budget.
LAST = 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "ledger.sqlite"
    full_ledger(path)
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "ledger.sqlite"))


def problems(path: Path) -> list[str]:
    return PrivacyLedger(path, create=False).verify()


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_a_ledger_that_nobody_touched_is_whole(path: Path) -> None:
    assert problems(path) == [] and PrivacyLedger(path).head[0] == LAST
    kinds = [kind for (kind,) in rows(path, "SELECT kind FROM entries ORDER BY n")]
    assert kinds == ["dataset", "run", "charge", "charge", "dataset", "run", "charge", "charge", "budget"]
    edit(path)  # triggers away and back
    assert problems(path) == []


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.sqlite")
    assert ledger.verify() == [] and ledger.head[0] == 0


TAMPERING = {
    "steps": ("UPDATE entries SET n_steps = 1 WHERE n = 4", "entry 4 (charge) was changed"),
    "steps as text": ("UPDATE entries SET n_steps = x'33' WHERE n = 4", "entry 4 (charge) was changed"),
    "infinite steps": ("UPDATE entries SET n_steps = 9e999 WHERE n = 4", "entry 4 (charge) was changed"),
    "time": ("UPDATE entries SET at = '2020-01-01T00:00:00+00:00' WHERE n = 3", "entry 3 (charge) was changed"),
    "noise": ("UPDATE entries SET details = replace(details, '4.0', '40.0') WHERE n = 2", "entry 2 (run) was changed"),
    "budget": (
        "UPDATE entries SET details = replace(details, '50', '500') WHERE n = 9",
        "entry 9 (budget) was changed",
    ),
    "run": (
        "UPDATE entries SET run = (SELECT run FROM entries WHERE n = 6) WHERE n = 3",
        "entry 3 (charge) was changed",
    ),
    "data set": ("UPDATE entries SET dataset = 'ab' WHERE n = 3", "entry 3 (charge) was changed"),
    "kind": ("UPDATE entries SET kind = 'budget' WHERE n = 3", "entry 3 (budget) was changed"),
    "broken details": ("UPDATE entries SET details = '{' WHERE n = 1", "entry 1 (dataset) was changed"),
    "own hash": ("UPDATE entries SET hash = 'ab' WHERE n = 4", "entry 4 (charge) was changed"),
    "middle": ("DELETE FROM entries WHERE n = 3", "entry 3 is missing"),
    "several": ("DELETE FROM entries WHERE n IN (3, 4)", "entries 3 to 4 are missing"),
    "last": ("DELETE FROM entries WHERE n = 9", "should hold 9 entries, its last one is number 8"),
    "last, count": (
        "DELETE FROM entries WHERE n = 9; UPDATE meta SET n_entries = 8",
        "the last entry is not the one that the head names",
    ),
    "all": ("DELETE FROM entries; DELETE FROM units", "should hold 9 entries, its last one is number 0"),
    "order": (
        "UPDATE entries SET n = 99 WHERE n = 3; UPDATE entries SET n = 3 WHERE n = 4;"
        "UPDATE entries SET n = 4 WHERE n = 99",
        "entry 3 (charge) does not follow on the entry before it",
    ),
    "renumbered": (
        "DELETE FROM entries WHERE n = 8; UPDATE entries SET n = 8 WHERE n = 9",
        "entry 8 (budget) was changed",
    ),
    "added": (
        "INSERT INTO entries SELECT 10, at, kind, dataset, run, 1, details, hash, hash FROM entries WHERE n = 8",
        "entry 10 (charge) was changed",
    ),
    "unit changed": (
        "UPDATE units SET hash = zeroblob(16) WHERE hash = (SELECT min(hash) FROM units WHERE dataset = 1)",
        "the unit hashes of data set",
    ),
    "unit removed": (
        "DELETE FROM units WHERE dataset = 5 AND hash = (SELECT max(hash) FROM units WHERE dataset = 5)",
        "the unit hashes of data set",
    ),
    "unit added": ("INSERT INTO units VALUES (1, zeroblob(16))", "the unit hashes of data set"),
    "unit as text": ("UPDATE units SET hash = CAST(hash AS TEXT) WHERE dataset = 5", "the unit hashes of data set"),
    "units of nobody": (
        "PRAGMA foreign_keys = OFF; INSERT INTO units VALUES (3, zeroblob(16))",
        "belong to no data set",
    ),
    "salt": ("UPDATE meta SET salt = zeroblob(32)", "entry 1 (dataset) does not follow on the entry before it"),
    "head": ("UPDATE meta SET head = 'ab'", "the last entry is not the one that the head names"),
    "trigger added": (
        "CREATE TRIGGER less AFTER INSERT ON entries BEGIN SELECT 1; END",
        "the trigger less was changed, removed or added",
    ),
    "index gone": ("DROP INDEX units_by_hash", "the index units_by_hash was changed, removed or added"),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found(path: Path, what: str) -> None:
    statements, found = TAMPERING[what]
    edit(path, *([statements] if "TRIGGER" in statements else statements.split(";")))
    assert found in "\n".join(problems(path))


@pytest.mark.parametrize("what", ["steps", "noise", "middle", "last", "order", "salt"])
def test_nothing_is_trained_on_a_broken_chain(path: Path, what: str) -> None:
    edit(path, *TAMPERING[what][0].split(";"))
    with pytest.raises(PrivacyError, match="what was spent is not known, so nothing is trained"):
        PrivacyLedger(path).open_run(patients(50, 70), make_plan())


def test_one_change_is_one_problem(path: Path) -> None:
    edit(path, TAMPERING["steps"][0], TAMPERING["budget"][0])
    assert problems(path) == ["entry 4 (charge) was changed", "entry 9 (budget) was changed"]


def test_a_changed_entry_with_its_hash_made_to_fit_is_found_at_the_next(path: Path) -> None:
    edit(path, "UPDATE entries SET n_steps = 1 WHERE n = 7")
    (content,) = rows(path, "SELECT n, at, kind, dataset, run, n_steps, details, previous FROM entries WHERE n = 7")
    edit(path, "UPDATE entries SET hash = ? WHERE n = 7", parameters=[entry_hash(content)])
    assert problems(path) == ["entry 8 (charge) does not follow on the entry before it"]


def test_two_unit_hashes_written_as_one_are_found(path: Path) -> None:
    """The fingerprint is over the hashes one after the other, so this one keeps its bytes."""
    first, second = (hash for (hash,) in rows(path, "SELECT hash FROM units WHERE dataset = 1 ORDER BY hash LIMIT 2"))
    edit(path, "DELETE FROM units WHERE dataset = 1 AND hash = ?", parameters=[second])
    edit(
        path, f"UPDATE units SET hash = x'{(first + second).hex()}' WHERE dataset = 1 AND hash = ?", parameters=[first]
    )
    assert "the unit hashes of data set" in problems(path)[0]


def test_a_trigger_that_is_gone_is_found(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER entries_no_delete")
    assert problems(path) == ["the trigger entries_no_delete was changed, removed or added"]


def test_an_index_that_hides_a_shared_unit_is_found(path: Path) -> None:
    """Tables, hashes and definitions are all as they were; only looking up the unit by its hash would miss it."""
    (unit,) = rows(path, "SELECT hash FROM units WHERE dataset = 1 ORDER BY hash LIMIT 1")
    (index,) = rows(path, "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master WHERE name = 'units_by_hash'")
    edit(path, "DELETE FROM units WHERE dataset = 1 AND hash = ?", parameters=unit)
    edit(path, "PRAGMA writable_schema = ON", "DELETE FROM sqlite_master WHERE name = 'units_by_hash'")
    edit(path, "INSERT INTO units VALUES (1, ?)", parameters=unit)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", index)
        connection.commit()
    (problem,) = problems(path)
    assert "the file is damaged" in problem and "units_by_hash" in problem


@pytest.mark.parametrize("table", ["entries", "units"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET hash = hash"])
def test_the_tables_only_grow(path: Path, table: str, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement.format(table))


def test_a_running_run_stops_where_the_last_entry_is_gone(path: Path) -> None:
    run = PrivacyLedger(path).open_run(patients(50, 70), make_plan())
    run.charge(1)
    edit(path, "DELETE FROM entries WHERE n = (SELECT max(n) FROM entries)")
    with pytest.raises(PrivacyError, match="last entry was changed or removed"):
        run.charge(1)


def test_an_entry_that_cannot_be_read_says_where_to_look(path: Path) -> None:
    edit(path, "UPDATE entries SET details = '[]' WHERE n = 2")
    with pytest.raises(PrivacyError, match="'dpmed ledger verify' says which"):
        PrivacyLedger(path).datasets()


def test_damage_of_the_file_is_a_problem_and_no_crash(path: Path) -> None:
    content = bytearray(path.read_bytes())
    page = next(at for at in range(4096, len(content), 4096) if content[at] == 10)  # a leaf of an index
    content[page : page + 64] = b"\xff" * 64
    path.write_bytes(content)
    assert len(found := problems(path)) >= 1 and "\n" not in "".join(found)


COLUMNS = ("at", "kind", "dataset", "run", "n_steps", "details", "previous", "hash")
VALUES = st.one_of(
    st.none(), st.integers(1, 100), st.floats(0.5, 9), st.text(max_size=5), st.binary(max_size=5), st.just("charge")
)


@given(number=st.integers(1, LAST), column=st.sampled_from(COLUMNS), value=VALUES)
def test_any_changed_cell_is_found(whole: Path, number: int, column: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(whole, folder))
        query = f"SELECT {column} FROM entries WHERE n = {number}"
        before = rows(path, query)
        try:
            edit(path, f"UPDATE entries SET {column} = ? WHERE n = {number}", parameters=[value])
        except sqlite3.IntegrityError:  # the column takes no such value
            return
        assert (problems(path) == []) is (rows(path, query) == before)


@given(missing=st.sets(st.integers(1, LAST), min_size=1))
def test_any_missing_entries_are_found(whole: Path, missing: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(whole, folder))
        edit(path, f"DELETE FROM entries WHERE n IN ({', '.join(map(str, missing))})")
        assert problems(path) != []
        with pytest.raises(PrivacyError):
            PrivacyLedger(path).open_run([*patients(0, 18), ALICE, BOB], make_plan())
