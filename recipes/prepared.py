"""What every `prepare` command shares: private output files, refusal to overwrite, and the summary `prepare.json`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from dpmed.errors import DpmedError, InputError

SPLITS = ("train", "validation", "heldout")
SUMMARY = "prepare.json"


class Row(TypedDict):
    """One line of a prepared file; the columns that `dpmed.load_records` reads."""

    text: str
    label: str | list[str]
    unit: str
    record_id: str


def limited_units(rows: Sequence[Row], *, limit: int | None, seed: int) -> list[Row]:
    """Return whole units, drawn without replacement by `seed`, until they hold at least `limit` records.

    Guarantee: a unit is taken with all its records or not at all; the order of `rows` is kept.
    Edge cases: `limit` None or above the number of rows gives all rows.
    Raises: InputError if `limit` < 1.
    """
    if limit is None:
        return list(rows)
    if limit < 1:
        raise InputError(f"limit {limit}: expected at least 1 record; drop the flag to keep all records")
    size = Counter(row["unit"] for row in rows)
    units = sorted(size)
    random.Random(seed).shuffle(units)
    kept: set[str] = set()
    records = 0
    for unit in units:
        if records >= limit:
            break
        kept.add(unit)
        records += size[unit]
    return [row for row in rows if row["unit"] in kept]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def source_files(folder: Path, names: Sequence[str], *, remedy: str) -> dict[str, Path]:
    """Return the path of each named file in `folder`.

    Raises: InputError naming all that are missing, followed by `remedy`.
    """
    if not folder.is_dir():
        raise InputError(f"--source {folder}: no such folder; {remedy}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"--source {folder}: missing {', '.join(missing)}; {remedy}")
    return {name: folder / name for name in names}


def check_output(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that already holds prepared files, before any work is done.

    Raises: InputError.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: is a file; name a folder")
    names = [f"{split}.jsonl" for split in SPLITS] + [SUMMARY]
    present = [name for name in names if (output_dir / name).exists()]
    if present and not overwrite:
        raise InputError(
            f"--output_dir {output_dir}: already holds {', '.join(present)}; "
            "pass --overwrite to replace them, or name another folder"
        )


def write_prepared(output_dir: Path, splits: Mapping[str, Sequence[Row]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write train, validation and held-out files (mode 0600, folder 0700), then `prepare.json`.

    Guarantee: no unit stands in two splits, or nothing is written; each file is complete or absent.
    Returns: the summary, with counts, digests and versions added. It holds no record text.
    Raises: InputError if a unit stands in two splits, or a split is empty.
    """
    check_disjoint(splits)
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    output_dir.chmod(0o700)
    # An older summary must not stand beside newer records if this command is interrupted.
    (output_dir / SUMMARY).unlink(missing_ok=True)
    counts: dict[str, Any] = {}
    for split, rows in splits.items():
        path = output_dir / f"{split}.jsonl"
        write_private(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        counts[split] = {**split_counts(rows), "sha256": file_sha256(path)}
    complete = {**summary, "splits": counts, "versions": versions()}
    write_private(output_dir / SUMMARY, json.dumps(complete, indent=2) + "\n")
    return complete


def check_disjoint(splits: Mapping[str, Sequence[Row]]) -> None:
    """Raise InputError if a split is empty or two splits share a unit (the message holds a count, no names)."""
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"{split}: no records; check that --source holds the whole data set")
        shared = {row["unit"] for row in rows if seen.setdefault(row["unit"], split) != split}
        if shared:
            raise InputError(f"{split}: {len(shared)} units also stand in another split; use the original split files")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; it appears under its name only when complete."""
    partial = path.with_name(f".{path.name}.partial")
    # A left-over of an interrupted run may carry another mode, which os.open would keep.
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def split_counts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return counts of records, units, distinct texts and labels (a multi-label record counts once per label)."""
    labels: Counter[str] = Counter()
    for row in rows:
        labels.update([row["label"]] if isinstance(row["label"], str) else row["label"])
    return {
        "records": len(rows),
        "units": len({row["unit"] for row in rows}),
        "distinct_texts": len({row["text"] for row in rows}),
        "unlabelled": sum(not row["label"] for row in rows),
        "labels": dict(sorted(labels.items())),
    }


def versions() -> dict[str, str]:
    """Return the versions that shaped the files."""
    try:
        dpmed = metadata.version("dpmed")
    except metadata.PackageNotFoundError:
        dpmed = "not installed"
    return {"python": platform.python_version(), "dpmed": dpmed}


def run_prepare(prepare: Callable[[], dict[str, Any]]) -> int:
    """Run one prepare command: counts as JSON on stdout, a DpmedError as one line on stderr.

    Returns: the exit status.
    """
    try:
        summary = prepare()
    except DpmedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(summary["splits"], indent=2))
    return 0
