"""The ledger's file: one SQLite file whose transactions survive a power cut.

Rollback journal and `synchronous=EXTRA`: when `writing` returns, the entry is on the disk, and so is the removal of the
journal. Connections are opened per transaction, so an object may be used from any thread or process.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpmed.errors import InputError, PrivacyError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x64706D6C  # "dpml" in the file's header tells a ledger from any other SQLite file
BUSY_SECONDS = 300.0  # a contended budget check may hold the lock for some seconds
UNIT_HASH_BYTES = 16

SCHEMA = """
CREATE TABLE meta (
  one INTEGER PRIMARY KEY CHECK (one = 1), salt BLOB NOT NULL, n_entries INTEGER NOT NULL, head TEXT NOT NULL);
CREATE TABLE entries (
  n INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('dataset', 'run', 'charge', 'budget')),
  dataset TEXT NOT NULL, run TEXT, n_steps INTEGER CHECK (n_steps > 0), details TEXT NOT NULL, previous TEXT NOT NULL,
  hash TEXT NOT NULL);
CREATE INDEX entries_by_kind ON entries (kind, run, dataset, n_steps);
CREATE TABLE units (
  dataset INTEGER NOT NULL REFERENCES entries (n), hash BLOB NOT NULL, PRIMARY KEY (dataset, hash)) WITHOUT ROWID;
CREATE INDEX units_by_hash ON units (hash);
""" + "".join(
    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;\n"
    for table in ("entries", "units")
    for verb in ("UPDATE", "DELETE")
)


class LedgerStore:
    """The file of one ledger. See `PrivacyLedger` for what is in it.

    Raises: InputError if the file is absent and `create` is false, cannot be read or made, is no ledger, or is of
        another schema version.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path.absolute()
        if create and not os.path.lexists(self.path):
            _create(self.path)
        _check_readable(self.path)
        try:
            with _connection(self.path) as connection:
                _check_schema(connection, self.path)
                self.salt = read_head(connection)[0]
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: not a privacy ledger ({reason(error)}): name another file with DPMED_LEDGER or"
                " privacy.ledger, or restore this one from a backup"
            ) from None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file. Raises: PrivacyError if it cannot be read any more."""
        with self._connected("read") as connection:
            connection.execute("BEGIN")  # ended by closing: a damaged file can be read in part, but not committed
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction with the write lock held from its start; any exception undoes all of it.

        Guarantee: when it ends without an exception, what was appended is on the disk.
        Raises: PrivacyError if the file cannot be written, or another process holds the lock for `BUSY_SECONDS`.
        """
        with self._connected("written") as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")  # closing without it undoes all

    @contextmanager
    def _connected(self, doing: str) -> Iterator[sqlite3.Connection]:
        try:
            with _connection(self.path) as connection:
                yield connection
        except sqlite3.Error as error:
            raise PrivacyError(
                f"{self.path}: the privacy ledger could not be {doing} ({reason(error)}), so no step may"
                " follow: see that the disk has room, the file may be written and nothing keeps it locked, then resume"
            ) from None

    def unit_hashes(self, units: Iterable[str]) -> list[bytes]:
        """The distinct units' salted hashes, sorted: HMAC-SHA256, 16 bytes kept."""
        names = {unit.encode("utf-8", "surrogatepass") for unit in units}
        return sorted(hmac.digest(self.salt, name, "sha256")[:UNIT_HASH_BYTES] for name in names)


def genesis(salt: bytes) -> str:
    """What the first entry follows: another salt, which would hide every overlap, breaks the chain at once."""
    return hashlib.sha256(canonical(["dpmed privacy ledger", SCHEMA_VERSION, salt.hex()]).encode()).hexdigest()


def read_head(connection: sqlite3.Connection) -> tuple[bytes, int, str]:
    """Salt, number of entries, last hash."""
    row = connection.execute("SELECT salt, n_entries, head FROM meta").fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise sqlite3.DatabaseError("its head is missing")
    return row


def canonical(value: Any) -> str:
    """JSON with one spelling; numbers come back bit for bit. What JSON lacks can only be there by tampering."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    connection.text_factory = lambda text: text.decode(errors="replace")  # what somebody wrote over it may be no text
    try:
        for setting in ("foreign_keys = ON", "trusted_schema = OFF", "fullfsync = ON", "synchronous = EXTRA"):
            connection.execute(f"PRAGMA {setting}")
        (mode,) = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        if mode != "delete":  # someone's tool left it on WAL and still has it open
            raise sqlite3.OperationalError(f"its journal is on {mode}")
        yield connection
    finally:
        connection.close()


def _check_readable(path: Path) -> None:
    """By the file's mode alone: closing a handle of our own would drop the locks of this process's other threads."""
    why = None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            why = "not a file"
        elif not os.access(path, os.R_OK):
            why = "no permission"
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such privacy ledger: training with privacy makes one; name another file, or set DPMED_LEDGER"
        ) from None
    except OSError as error:
        why = error.strerror
    if why:
        raise InputError(
            f"{path}: the privacy ledger cannot be read ({why}): name a file of yours with DPMED_LEDGER or"
            " privacy.ledger"
        )


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise sqlite3.DatabaseError("another kind of file")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: a privacy ledger of version {version}, this dpmed reads version {SCHEMA_VERSION}: use the dpmed"
            " that wrote it, and keep the file"
        )


def _create(path: Path) -> None:
    """Make an empty ledger beside its place and link it there: nobody ever sees half of one.

    Of two processes that create at once the second keeps the first one's file.
    """
    try:
        _make_folders(path.parent)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        os.close(descriptor)
        partial = Path(name)
        try:
            _write_schema(partial)
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
        _sync_folder(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise InputError(
            f"{path}: the privacy ledger cannot be made ({reason(error)}): name a place on a local disk with"
            " DPMED_LEDGER or privacy.ledger"
        ) from None


def _write_schema(path: Path) -> None:
    salt = secrets.token_bytes(32)
    with _connection(path) as connection:
        connection.executescript(f"BEGIN; {SCHEMA}")
        connection.execute("INSERT INTO meta VALUES (1, ?, 0, ?)", (salt, genesis(salt)))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")


def _make_folders(folder: Path) -> None:
    """`Path.mkdir(parents=True)` would give the parents the default mode."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _sync_folder(folder: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """The system's or SQLite's word for it, never a value."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return getattr(error, "sqlite_errorname", None) or str(error)
