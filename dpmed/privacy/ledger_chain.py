"""One chain of hashes over all entries of the ledger, and what `verify` looks for.

Every entry (a data set, a run, a charge, a budget) has the next number and holds the hash of the entry before it; its
own hash is over its number, its content and that hash. The head (how many entries, the last hash) is kept besides, so
that a missing last entry is found too. The first hash is over the schema version and the salt. The entry of a data set
holds a fingerprint of its unit hashes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from dpmed.errors import PrivacyError
from dpmed.privacy.ledger_store import SCHEMA, UNIT_HASH_BYTES, canonical, genesis, read_head, reason

_COLUMNS = "n, at, kind, dataset, run, n_steps, details, previous"  # what an entry's hash is over, in this order


def append(
    connection: sqlite3.Connection,
    kind: str,
    dataset: str,
    *,
    run: str | None = None,
    n_steps: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> int:
    """Append one entry to the chain, inside a `writing` transaction; returns its number.

    Raises: PrivacyError if the last entry is not the one that the head names: the chain was cut.
    """
    salt, count, head = read_head(connection)
    last = connection.execute("SELECT n, hash FROM entries ORDER BY n DESC LIMIT 1").fetchone()
    if (last or (0, genesis(salt))) != (count, head):
        raise PrivacyError("the privacy ledger's last entry was changed or removed: see 'dpmed ledger verify'")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = (count + 1, now, kind, dataset, run, n_steps, canonical(details or {}), head)
    new = entry_hash(content)
    connection.execute(f"INSERT INTO entries ({_COLUMNS}, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*content, new))
    connection.execute("UPDATE meta SET n_entries = ?, head = ?", (count + 1, new))
    return count + 1


def add_units(connection: sqlite3.Connection, dataset: int, hashes: Iterable[bytes]) -> None:
    """Store a data set's unit hashes; `dataset` is the number of its entry."""
    connection.executemany("INSERT INTO units (dataset, hash) VALUES (?, ?)", ((dataset, one) for one in hashes))


def fingerprint(sorted_hashes: Iterable[bytes]) -> str:
    """What identifies a data set: SHA-256 over its units' sorted salted hashes."""
    digest = hashlib.sha256()
    for one in sorted_hashes:
        digest.update(one)
    return digest.hexdigest()


def entry_hash(content: Iterable[Any]) -> str:
    """Hash of an entry's columns, in the order of `_COLUMNS`."""
    return hashlib.sha256(canonical(list(content)).encode()).hexdigest()


def all_problems(connection: sqlite3.Connection) -> list[str]:
    """`chain_problems`, `unit_problems` and `file_problems`, as far as SQLite can read the file."""
    problems: list[str] = []
    try:
        for part in (chain_problems, unit_problems, file_problems):
            problems += part(connection)
    except sqlite3.DatabaseError as error:
        problems.append(f"SQLite cannot read all of the file ({reason(error)})")
    return problems


def chain_problems(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the chain of entries, one line per place; [] if it is whole. Unit hashes: `unit_problems`."""
    salt, count, head = read_head(connection)
    problems: list[str] = []
    number, before = 0, genesis(salt)
    for *content, stored in connection.execute(f"SELECT {_COLUMNS}, hash FROM entries ORDER BY n"):
        number += 1
        if content[0] > number:
            missing = f"entry {number} is" if content[0] == number + 1 else f"entries {number} to {content[0] - 1} are"
            problems.append(f"{missing} missing")
        elif content[-1] != before:
            problems.append(f"entry {content[0]} ({content[2]}) does not follow on the entry before it")
        if entry_hash(content) != stored:
            problems.append(f"entry {content[0]} ({content[2]}) was changed")
        number, before = content[0], stored  # go on from what is stored: one change is one problem
    if number != count:
        problems.append(f"the ledger should hold {count} entries, its last one is number {number}")
    elif before != head:
        problems.append("the last entry is not the one that the head names")
    return problems


def unit_problems(connection: sqlite3.Connection) -> list[str]:
    """Data sets whose stored unit hashes are not those that their entry was made with; [] if there is none."""
    problems: list[str] = []
    datasets = "SELECT n, dataset, details FROM entries WHERE kind = 'dataset' ORDER BY n"
    for number, dataset, details in connection.execute(datasets).fetchall():
        rows = connection.execute("SELECT hash FROM units WHERE dataset = ? ORDER BY hash", (number,))
        # text, or two hashes written as one, would keep the fingerprint and hide what is shared: it counts as nothing
        whole = (one if isinstance(one, bytes) and len(one) == UNIT_HASH_BYTES else b"" for (one,) in rows)
        if fingerprint(whole) != _stored_fingerprint(details):
            problems.append(f"the unit hashes of data set {dataset} were changed")
    strays = "SELECT 1 FROM units WHERE dataset NOT IN (SELECT n FROM entries WHERE kind = 'dataset') LIMIT 1"
    if connection.execute(strays).fetchone():
        problems.append("there are unit hashes that belong to no data set")
    return problems


def file_problems(connection: sqlite3.Connection) -> list[str]:
    """Whether tables, indexes and append-only triggers are the ones made, and agree with each other."""
    query = "SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL"
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(SCHEMA)
        made, found = set(fresh.execute(query)), set(connection.execute(query))
    problems = [f"the {name} was changed, removed or added" for name in sorted({name for name, _ in made ^ found})]
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    return problems if answer == "ok" else [*problems, f"the file is damaged: {' '.join(str(answer).split())}"]


def _stored_fingerprint(details: str | bytes) -> Any:
    try:
        return json.loads(details)["fingerprint"]
    except (ValueError, TypeError, KeyError):
        return None
