"""The user's table of patients: a row a patient, columns that identify; its values become spans of source "known".

A hospital knows its patients' names, numbers and dates, so that it need not guess them. Values are looked for in the
records of their own patient, in the spellings that notes use: a birth date also as "March 4, 1950", a name also by its
last word. With `everywhere` what is long enough to be nobody else's is looked for in all records too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from datasets import Dataset

from dpmed.data.identifier_types import canonical_type, is_direct, is_known_type
from dpmed.data.identifiers import PROTECTED_WORDS, Span
from dpmed.data.matching import KnownValues
from dpmed.data.records import single_value
from dpmed.data.sources import Table, read_table, shown_columns
from dpmed.errors import InputError

_YEAR = "January February March April May June July August September October November December"
_MONTHS = tuple(_YEAR.split())
_PERSONS = ("NAME", "DOCTOR")
_NEVER_ALONE = PROTECTED_WORDS | {month.casefold() for month in _MONTHS}


@dataclass(frozen=True)
class PatientTable:
    """What is known of each patient. `values` is kept out of the representation, since it holds identifiers."""

    columns: Mapping[str, str]
    """Column -> type of identifier."""
    ignored: tuple[str, ...]
    """Columns that name no type of identifier."""
    day_first: bool
    values: Mapping[str, tuple[tuple[str, str], ...]] = field(repr=False)
    """Unit -> its values and their types."""


def load_patient_table(
    source: str | Path | Dataset, *, unit: str, types: Mapping[str, str] | None = None, day_first: bool = False
) -> PatientTable:
    """Read a table of patients.

    Args:
        source: csv, tsv, json, jsonl, parquet or a saved datasets folder; several rows of one patient add up.
        unit: the column that names the patient, as the records' unit column does.
        types: column -> type of identifier, beside the columns whose names say it ("dob", "Last Name", "MRN"). By
            name only direct identifiers are taken: a column "sex" would make every "F" a known identifier.
        day_first: whether 03/04/1950 in the table and in the records is the third of April.

    Raises: InputError, in one line, if a column is missing, no column identifies, or a cell is no single value.
    """
    table = read_table(source, "train")
    given = dict(types or {})
    for name in given:
        if name not in table.names:
            raise InputError(f"{table.where}: there is no column '{name}'{shown_columns(table.names, name)}")
    by_name = {name: name for name in table.names if is_known_type(name) and is_direct(name)}
    columns = {name: canonical_type(kind) for name, kind in {**by_name, **given}.items() if name != unit}
    units = _cells(table, unit)
    table.reject([row for row, value in enumerate(units) if value is None], f"'{unit}' is missing", "fill it in")
    if not columns:
        raise InputError(
            f"{table.where}: no column is named after a type of identifier: say which are, for example "
            f"name=NAME,born=DATE{shown_columns(table.names, None)}"
        )
    values: dict[str, dict[tuple[str, str], None]] = {name: {} for name in units if name is not None}
    for name, kind in columns.items():
        for patient, value in zip(units, _cells(table, name), strict=True):
            if patient is not None and value is not None:
                values[patient][value, kind] = None
    ignored = tuple(name for name in table.names if name not in columns and name != unit)
    return PatientTable(columns, ignored, day_first, {name: tuple(pairs) for name, pairs in values.items()})


def _cells(table: Table, name: str) -> list[str | None]:
    result: list[str | None] = []
    bad: list[int] = []
    for row, value in enumerate(table.values(name)):
        try:
            result.append(single_value(value))
        except TypeError:
            bad.append(row)
    table.reject(bad, f"'{name}' is not a single value", "store it so, or leave the column out")
    return result


@dataclass(frozen=True)
class TableSpans:
    """The spans that a table gives to records, and how far the two fit each other."""

    spans: list[list[Span]]
    """One list a record, sorted, none overlapping, source "known"."""
    counts: dict[str, int]
    """Patients in the table; units of the records without a row there; values looked for, and those that were found in
    a record of their own patient."""


def table_spans(records: Dataset, table: PatientTable, *, everywhere: bool = False) -> TableSpans:
    """Find the table's values in records.

    A value of fewer than three digits, or of one letter, is not looked for. A single word of a name counts only where
    the text writes it with a capital (in scripts that have them), and never if it is a function word, a common clinical
    one or a month ("Day", "May").

    Args:
        records: their units name the same patients as the table's.
        everywhere: also look for values of several words, or with at least four digits, in the records of others.

    Raises: InputError if no unit of the records has a row in the table.
    """
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(records["unit"]):
        rows.setdefault(unit, []).append(row)
    known = [unit for unit in rows if unit in table.values]
    if not known:
        raise InputError(
            "no patient of the records has a row in the patient table: check that both name patients alike, and that "
            "the records' patient column is named (data.unit)"
        )
    texts = list(records["text"])
    spans: list[list[Span]] = [[] for _ in texts]
    n_found = 0
    for unit in known:
        looked_for = _Spellings(table.values[unit], table.day_first, parts=True)
        for row in rows[unit]:
            spans[row] = looked_for.find(texts[row])
        pieces = [texts[row][span["start"] : span["end"]] for row in rows[unit] for span in spans[row]]
        n_found += _n_found(table.values[unit], table.day_first, pieces)
    if everywhere:
        looked_for = _Spellings(
            [pair for pairs in table.values.values() for pair in pairs if _is_telling(pair[0])], table.day_first
        )
        for row, text in enumerate(texts):
            own = spans[row]
            others = (span for span in looked_for.find(text) if not any(_overlap(span, one) for one in own))
            spans[row] = sorted([*own, *others], key=lambda span: span["start"])
    counts = {
        "n_units_in_table": len(table.values),
        "n_units_without_row": len(rows) - len(known),
        "n_values": sum(len(table.values[unit]) for unit in known),
        "n_values_found": n_found,
    }
    return TableSpans(spans, counts)


class _Spellings:
    """The spellings of some values, ready to be looked for."""

    def __init__(self, values: Sequence[tuple[str, str]], day_first: bool, parts: bool = False):
        found = [(spelling, kind) for value, kind in values for spelling in spellings(value, kind, day_first)]
        if parts:  # after the whole values, whose type goes first
            found += [(part, kind) for value, kind in values for part in _parts(value, kind)]
        self._found = [item for item in found if _is_long_enough(item[0])]
        self._values = KnownValues([item[0] for item in self._found], [item[1] for item in self._found])

    def find(self, text: str) -> list[Span]:
        """Spans in a text, sorted, none overlapping."""
        spans: list[Span] = []
        for match in self._values.find(text):
            spelling, kind = self._found[match.index]
            if kind in _PERSONS and " " not in spelling and text[match.start].islower():
                continue
            spans.append({"start": match.start, "end": match.end, "type": kind, "source": "known"})
        return spans


def _n_found(values: Sequence[tuple[str, str]], day_first: bool, pieces: list[str]) -> int:
    """How many of a patient's values stand in what was found, also inside a longer one ("Anna" in "Anna Weiss")."""
    text = " | ".join(dict.fromkeys(pieces))
    return sum(bool(_Spellings([value], day_first, parts=True).find(text)) for value in values) if text else 0


def spellings(value: str, kind: str, day_first: bool = False) -> list[str]:
    """How notes write a value: dates, telephone and social security numbers in their usual forms, names both ways."""
    if kind == "DATE":
        day = _day(value, day_first)
        return [value, *(_dates(day, day_first) if day else ())]
    digits = re.sub(r"\D", "", value)
    if kind == "SSN" and len(digits) == 9:
        return [value, digits, f"{digits[:3]}-{digits[3:5]}-{digits[5:]}"]
    if kind in ("PHONE", "FAX"):
        return [value, *_telephones(digits)]
    if kind in _PERSONS:
        last, comma, first = (part.strip() for part in value.partition(","))
        words = value.split()
        if comma:
            return [value, f"{first} {last}", f"{last} {first}"]
        return [value, f"{words[-1]}, {' '.join(words[:-1])}"] if len(words) > 1 else [value]
    return [value]


def _parts(value: str, kind: str) -> Iterator[str]:
    """What stands for a value in its own patient's notes: a word of a name, the street of an address."""
    if kind in _PERSONS:
        words = re.split(r"[\s,]+", value)
        yield from (
            word for word in words if len(words) > 1 and word.casefold() not in _NEVER_ALONE and "." not in word
        )
    elif kind == "ADDRESS" and "," in value:
        yield from (part.strip() for part in value.split(",") if any(map(str.isdigit, part)))


def _is_long_enough(spelling: str) -> bool:
    letters = sum(map(str.isalpha, spelling))
    return spelling.casefold() not in _NEVER_ALONE and (letters > 1 or sum(map(str.isdigit, spelling)) > 2)


def _is_telling(value: str) -> bool:
    return len(value.split()) > 1 or sum(map(str.isdigit, value)) > 3


def _overlap(one: Span, other: Span) -> bool:
    return one["start"] < other["end"] and other["start"] < one["end"]


def _telephones(digits: str) -> Iterator[str]:
    local = digits[1:] if len(digits) == 11 and digits[0] == "1" else digits
    if len(local) == 10:
        area, exchange, line = local[:3], local[3:6], local[6:]
        yield from (f"({area}) {exchange}-{line}", f"({area}){exchange}-{line}", local)
        yield from (sign.join((area, exchange, line)) for sign in "-. ")
    elif len(local) == 7:
        yield from (f"{local[:3]}-{local[3:]}", f"{local[:3]} {local[3:]}", local)


def _day(value: str, day_first: bool) -> date | None:
    """The day that a cell names, with or without a time behind it; None if it is written another way."""
    if match := re.match(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:[T ].*)?$", value):
        year, month, day = map(int, match.groups())
    elif match := re.match(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(?:[T ].*)?$", value):
        month, day, year = int(match[1]), int(match[3]), int(match[4])
        if day_first or match[2] == "." or month > 12:
            month, day = day, month
    else:
        return None
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _dates(day: date, day_first: bool) -> Iterator[str]:
    year, short = f"{day.year:04d}", f"{day.year % 100:02d}"
    yield from (day.isoformat(), day.isoformat().replace("-", "/"), day.isoformat().replace("-", ""))
    for sign in "/-.":
        order = (day.day, day.month) if day_first or sign == "." else (day.month, day.day)
        for written in {tuple(f"{number:02d}" for number in order), tuple(map(str, order))}:
            yield from (sign.join((*written, ending)) for ending in (year, short))
    nth = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    full = _MONTHS[day.month - 1]
    for month in (full, full[:3], f"{full[:3]}."):
        for number in {str(day.day), f"{day.day:02d}", f"{day.day}{nth}"}:
            yield from (f"{month} {number}, {year}", f"{month} {number} {year}")
            yield from (f"{number} {month} {year}", f"{number} of {month} {year}", f"{number}-{month}-{year}")
