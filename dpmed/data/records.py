"""Records in: csv, tsv, json, jsonl, parquet, a saved folder or the Hub become one `datasets.Dataset` in memory.

Columns of the result: `text`, `label` (absent, str, or list[str]), `unit` (the patient), `record_id`, `date` (absent,
or a day as "2021-03-14") and `identifiers` (character spans). Nothing is written to disk, and no message holds text,
labels, units, dates or identifier values: messages name columns, counts and rows (counted from 0, as in `records[0]`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date as Day
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from dpmed.data.sources import Table, read_table, shown_columns
from dpmed.errors import InputError

PLACEHOLDER_UNIT = "record-"
"""Units that start so were made here, because no unit column was named: such a unit is one record, not a patient."""

SPAN_SOURCES = ("planted", "known", "pattern", "ner", "indirect")
"""How a span came about, the surest first: put there by us; brought by the user; found by a pattern, by a model, by a
word's rarity."""
_SPLIT_TRIALS = 20
_DAY = re.compile(r"(?P<year>\d{4})(?:-?(?P<month>\d\d)(?:-?(?P<day>\d\d))?)?(?:[T ].*)?")


def load_records(
    source: str | Path | Dataset,
    *,
    text: str = "text",
    label: str | None = None,
    unit: str | None = None,
    record_id: str | None = None,
    date: str | None = None,
    identifiers: str | None = None,
    multi_label: bool = False,
    split: str = "train",
    require_unit: bool = False,
    label_separator: str = "|",
) -> Dataset:
    """Load records of any supported format into the columns that all of dpmed reads.

    Args:
        source: a csv, tsv, json (list of objects, or one a line), jsonl or parquet file; a folder made by
            `save_to_disk`; a loaded Dataset; or, when no such path exists, a Hub name `owner/name`. The name
            "hospital:PART?n_patients=N&seed=S" makes the synthetic hospital's records in memory.
        text: the column of the notes. Labels, units and ids are stripped of outer blanks; texts are kept as they are.
        label: the label column. Numbers and booleans become str: 3 and 3.0 -> "3", True -> "true".
        unit: the column that names the patient. Without it each record is its own unit, "record-<row>".
        record_id: the column that names the record. Without it the row number.
        date: the column with the record's day: 2021-03-14, 20210314, with a time behind it or not; of a month (2021-03)
            or year (2021) the first day.
        identifiers: the column of known spans: list of {"start", "end", "type"[, "source"]}, or that as a JSON string.
            Offsets count characters (code points) of `text`, end exclusive.
        multi_label: the label is a list, or a string of labels joined by `label_separator`; "" is no label at all.
        split: which split of a saved DatasetDict or of the Hub data set; files have none.
        require_unit: refuse to fall back to records as units. DP training sets it.
        label_separator: see `multi_label`.

    Guarantee: the order of the rows is kept, none is dropped, and the same rows give the same Dataset in every format.
    Raises: InputError, in one line, when anything is missing, blank, malformed or not UTF-8.
    """
    table = read_table(source, split)
    if require_unit and (unit is None or unit not in table.names):
        found = "no unit column is named" if unit is None else f"there is no column '{unit}'"
        raise InputError(
            f"{table.where}: {found}; differential privacy protects patients, so it needs the column that names the "
            f"patient of each record: set the recipe key data.unit{shown_columns(table.names, unit)}"
        )
    texts = _texts(table, text)
    columns: dict[str, list[Any]] = {"text": texts}
    if label is not None:
        columns["label"] = _labels(table, label, multi_label, label_separator)
    columns["unit"] = _names(table, unit) if unit else [f"{PLACEHOLDER_UNIT}{row}" for row in range(table.n_rows)]
    columns["record_id"] = _names(table, record_id) if record_id else [str(row) for row in range(table.n_rows)]
    if date is not None:
        columns["date"] = _scalars(table, date, _day, "a date such as 2021-03-14")
    columns["identifiers"] = _spans(table, identifiers, texts) if identifiers else [[] for _ in texts]
    kind = "none" if label is None else "multi" if multi_label else "single"
    return Dataset.from_dict(columns, features=record_features(label=kind, date=date is not None))


def record_features(*, label: str = "none", date: bool = False) -> Features:
    """The exact columns and types of records; `label` is "none", "single" or "multi"."""
    string = Value("string")
    span = {"start": Value("int64"), "end": Value("int64"), "type": string, "source": string}
    kinds: dict[str, dict[str, Any]] = {"none": {}, "single": {"label": string}, "multi": {"label": List(string)}}
    ids = {"unit": string, "record_id": string} | ({"date": string} if date else {})
    return Features({"text": string, **kinds[label], **ids, "identifiers": List(span)})


# --- Columns ----------------------------------------------------------------------------------------------------------


def _storable(value: str) -> bool:
    """False for half a surrogate pair (JSON allows the escape), which Arrow refuses with the content in its message."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(table: Table, name: str) -> list[str]:
    values = table.values(name)
    blank = [row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())]
    table.reject(blank, f"the text ('{name}') is blank", "drop them, or name the column of the notes (data.text)")
    other = [row for row, value in enumerate(values) if not isinstance(value, str)]
    table.reject(other, f"'{name}' is not text", "name the column of the notes (data.text)")
    broken = [row for row, value in enumerate(values) if not _storable(value)]
    table.reject(broken, f"the text ('{name}') is not valid Unicode (lone surrogates)", "save the data as UTF-8")
    return values


def single_value(value: object) -> str | None:
    """One cell as str, stripped; None for a missing or blank one. Raises TypeError for lists and objects."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, dict, tuple, set, bytes)) or (isinstance(value, str) and not _storable(value)):
        raise TypeError
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def _scalars(table: Table, name: str, convert: Callable[[object], Any], wanted: str) -> list[Any]:
    """Convert a column, with one message for the rows that cannot be converted and one for the missing ones."""
    converted: list[Any] = []
    bad: list[int] = []
    for row, value in enumerate(table.values(name)):
        try:
            converted.append(convert(value))
        except TypeError:
            bad.append(row)
    table.reject(bad, f"'{name}' is not {wanted}", "store it so, or name another column")
    missing = [row for row, value in enumerate(converted) if value is None]
    table.reject(missing, f"'{name}' is missing", "fill it in, or drop these records")
    return converted


def _names(table: Table, name: str) -> list[str]:
    return _scalars(table, name, single_value, "a single value")


def _day(value: object) -> str | None:
    """A day as "2021-03-14"; None for a missing one. Raises TypeError for anything else."""
    found = value.isoformat() if isinstance(value, Day) else single_value(value)  # a datetime is a date too
    if found is None:
        return None
    match = _DAY.fullmatch(found)
    if match is None:
        raise TypeError
    try:
        return Day(int(match["year"]), int(match["month"] or 1), int(match["day"] or 1)).isoformat()
    except ValueError:
        raise TypeError from None


def _label(value: object) -> str | None:
    found = single_value(value)
    # csv writers spell booleans True, true or TRUE: one class, whatever the format.
    return found.lower() if found is not None and found.lower() in ("true", "false") else found


def _labels(table: Table, name: str, multi_label: bool, separator: str) -> list[Any]:
    def many(value: object) -> list[str] | None:
        if isinstance(value, str):
            parts: list[Any] = [part for part in value.split(separator) if part.strip()]
        elif isinstance(value, (list, tuple)):
            parts = list(value)
        else:
            parts = [value]
            if single_value(value) is None:
                return None
        found = [_label(part) for part in parts]
        if None in found:
            raise TypeError
        return list(dict.fromkeys(part for part in found if part is not None))

    if not multi_label:
        return _scalars(table, name, _label, "a single label (for lists set multi_label)")
    return _scalars(table, name, many, "a list of labels without gaps")


def _spans(table: Table, name: str, texts: list[str]) -> list[list[dict[str, Any]]]:
    result: list[list[dict[str, Any]]] = []
    bad: list[int] = []
    for row, (value, text) in enumerate(zip(table.values(name), texts, strict=True)):
        try:
            result.append(sorted((_span(span, len(text)) for span in _span_list(value)), key=lambda s: s["start"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            bad.append(row)
    remedy = 'give a list of {"start", "end", "type"} with 0 <= start < end <= characters of the text'
    table.reject(bad, f"'{name}' does not hold valid spans", f"{remedy}; source is one of {', '.join(SPAN_SOURCES)}")
    return result


def _span_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if isinstance(value, dict):  # older versions of datasets store a list of dicts as a dict of lists
        columns = list(value)
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, type(None))):
        raise TypeError
    return value or []


def _span(span: Any, n_characters: int) -> dict[str, Any]:
    start, end, kind, source = span["start"], span["end"], span["type"], span.get("source") or "known"
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not isinstance(source, str):
        raise TypeError
    if not 0 <= start < end <= n_characters or not kind.strip() or source not in SPAN_SOURCES or not _storable(kind):
        raise ValueError
    return {"start": start, "end": end, "type": kind.strip().upper(), "source": source}


# --- Units, texts, splits ---------------------------------------------------------------------------------------------


def normalised_text(text: str) -> str:
    """NFKC, casefolded, runs of white space as one blank: what counts as the same text when splits are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def unit_hash(unit: str, salt: str = "") -> str:
    """12 hex characters that name a unit in messages.

    Guarantee: hides the value only as far as the salt is secret, since short record numbers can be enumerated. Messages
    use `unit_salt` of the records: `unit_hash(unit, unit_salt(train))` tells their holder which unit is meant.
    """
    return _digest(salt, unit)[:12]


def unit_salt(records: Dataset) -> str:
    """A salt for `unit_hash` that only a holder of the records can compute.

    Not `data_fingerprint`, which stands in run.json and in certificates; neither can be computed from the other.
    """
    return _digest("unit_salt", *_row_digests(records))


def data_fingerprint(records: Dataset) -> str:
    """SHA-256 of the records' (unit, record_id, text), independent of their order; repeated records count."""
    return _digest(*_row_digests(records))


def _row_digests(records: Dataset) -> list[str]:
    rows = zip(records["unit"], records["record_id"], records["text"], strict=True)
    return sorted(_digest(*row) for row in rows)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)  # lengths keep ("a", "bc") and ("ab", "c") apart
    return digest.hexdigest()


def _groups(units: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Rows that must stay together: connected over shared units and shared (normalised) texts."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for unit, text in zip(units, texts, strict=True):
        parent[root(("text", text))] = root(("unit", unit))
    groups: dict[tuple[str, str], list[int]] = {}
    for row, unit in enumerate(units):
        groups.setdefault(root(("unit", unit)), []).append(row)
    return list(groups.values())


def _assigned(groups: Iterable[list[int]], targets: dict[str, float]) -> dict[str, list[int]]:
    """Give each group in turn to the part that lacks most records."""
    parts: dict[str, list[int]] = {name: [] for name in targets}
    for group in groups:
        parts[max(targets, key=lambda name: targets[name] - len(parts[name]))].extend(group)
    return parts


def split_by_unit(records: Dataset, *, fractions: dict[str, float], seed: int) -> dict[str, Dataset]:
    """Split records so that no patient, and no text, stands in two parts.

    Args:
        fractions: name of each part -> its share of the records, for example
            {"train": 0.7, "validation": 0.1, "heldout": 0.2}; they sum to 1.
        seed: decides which patients go where. The order of the rows does not, as long as a unit column was loaded.

    Guarantee: neither a unit nor a normalised text is in two parts; every record is in exactly one, in its old order.
        Sizes come as near to the fractions as the best of 20 seeded orders; within one record when groups are single.
    Raises: InputError if the fractions do not sum to 1, or if a part would stay empty.
    """
    shares = list(fractions.values())
    if not shares or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise InputError("the fractions of a split must be above 0 and sum to 1: for example train 0.8, heldout 0.2")
    units, texts = list(records["unit"]), [normalised_text(text) for text in records["text"]]
    keyed = [(min(_digest(units[r], texts[r]) for r in group), group) for group in _groups(units, texts)]
    targets = {name: share * len(records) for name, share in fractions.items()}
    best: tuple[tuple[int, float], dict[str, list[int]]] | None = None
    for trial in range(_SPLIT_TRIALS):
        ordered = sorted(keyed, key=lambda item: _digest(str(seed), str(trial), item[0]))
        parts = _assigned((group for _, group in ordered), targets)
        off = [abs(len(rows) - targets[name]) for name, rows in parts.items()]
        score = (sum(not rows for rows in parts.values()), sum(off))
        best = (score, parts) if best is None or score < best[0] else best
        if score[0] == 0 and max(off) < 1:
            break
    assert best is not None
    empty = [name for name, rows in best[1].items() if not rows]
    if empty:
        largest = max((len(group) for _, group in keyed), default=0)
        raise InputError(
            f"the part '{empty[0]}' would be empty: {len(records)} records form {len(keyed)} groups that share a unit "
            f"or a text, the largest of {largest}: raise its fraction, ask for fewer parts, or drop repeated texts"
        )
    return {name: records.select(sorted(rows), keep_in_memory=True) for name, rows in best[1].items()}


def _overlap(train: Dataset, heldout: Dataset) -> tuple[list[str | None], list[bool]]:
    """Per heldout record: its unit if that is a real unit of `train` too, else None; whether its text is in `train`."""
    units = {unit for unit in train["unit"] if not unit.startswith(PLACEHOLDER_UNIT)}
    texts = {normalised_text(text) for text in train["text"]}
    shared = [unit if unit in units else None for unit in heldout["unit"]]
    return shared, [normalised_text(text) in texts for text in heldout["text"]]


def check_disjoint(train: Dataset, heldout: Dataset, *, names: tuple[str, str] = ("train", "heldout")) -> None:
    """Raise InputError if a unit or a normalised text stands in both: every membership figure would be wrong.

    Placeholder units ("record-<row>") are not compared: the same row number of two files is not the same patient.
    The message names up to three units by hash; `unit_hash(unit, unit_salt(train))` of each unit finds them again.
    """
    shared_units, shared_texts = _overlap(train, heldout)
    units = Counter(unit for unit in shared_units if unit is not None)
    if not units and not any(shared_texts):
        return
    salt = unit_salt(train)
    first = ", ".join(unit_hash(unit, salt) for unit in list(units)[:3])
    raise InputError(
        f"{names[0]} and {names[1]} share {len(units)} units{f' (hashes {first})' if first else ''} and "
        f"{sum(shared_texts)} records of {names[1]} have a text of {names[0]}: set the recipe key data.on_overlap to "
        "drop them, or split anew with split_by_unit"
    )


def drop_overlap(train: Dataset, heldout: Dataset) -> tuple[Dataset, int]:
    """`heldout` without the records whose unit or normalised text is in `train`, and how many those were.

    Raises: InputError if none would be left.
    """
    flags = zip(*_overlap(train, heldout), strict=True)
    kept = [row for row, (unit, text) in enumerate(flags) if unit is None and not text]
    if not kept:
        raise InputError("every heldout record shares its patient or its text with train: split with split_by_unit")
    return heldout.select(kept, keep_in_memory=True), len(heldout) - len(kept)


def apart(kept: Dataset, other: Dataset, names: tuple[str, str], drop: bool) -> tuple[Dataset, int]:
    """`other` without what it shares with `kept`, and how many records that were.

    Raises: InputError as `check_disjoint` if not `drop`; as `drop_overlap` if nothing would be left.
    """
    if drop:
        return drop_overlap(kept, other)
    check_disjoint(kept, other, names=names)
    return other, 0


def check_labels(records: Dataset | None, known: Sequence[str], *, name: str) -> None:
    """Raise InputError if a label of these records is in no training record: a model could never say it."""
    if records is None or "label" not in records.column_names:
        return
    labels = {one for label in records["label"] for one in ([label] if isinstance(label, str) else label)}
    unknown = labels - set(known)
    if unknown:
        raise InputError(
            f"{name}: {len(unknown)} of its labels are in no training record; drop those records, or split anew with "
            "split_by_unit"
        )
