"""The user's patient table: which columns are taken, which spellings are found, in whose records."""

from __future__ import annotations

import json
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpmed.data.hospital import make_hospital
from dpmed.data.patient_table import PatientTable, load_patient_table, spellings, table_spans
from dpmed.data.records import record_features
from dpmed.errors import InputError

ROWS = [
    {"patient_id": 1, "name": "Anna Weiss", "DOB": "1950-03-04", "mrn": "00417", "sex": "F", "note": None},
    {"patient_id": 2, "name": "Rose, Ben", "DOB": "12/31/1949", "mrn": "00918", "sex": "M", "note": None},
]


def records(*rows: tuple[str, str]) -> Dataset:
    """Rows of (unit, text)."""
    columns: dict[str, list[Any]] = {"text": [text for _, text in rows], "unit": [unit for unit, _ in rows]}
    columns |= {"record_id": [str(row) for row in range(len(rows))], "identifiers": [[] for _ in rows]}
    return Dataset.from_dict(columns, features=record_features())


def table(rows: list[dict[str, Any]] = ROWS, **options: Any) -> PatientTable:
    return load_patient_table(Dataset.from_list(rows), unit="patient_id", **options)


def found(data: Dataset, known: PatientTable, *, everywhere: bool = False) -> list[list[tuple[str, str]]]:
    spans = table_spans(data, known, everywhere=everywhere).spans
    assert all(span["source"] == "known" for row in spans for span in row)
    return [
        [(s["type"], text[s["start"] : s["end"]]) for s in row] for text, row in zip(data["text"], spans, strict=True)
    ]


def test_columns_are_taken_by_name_or_as_told() -> None:
    known = table()
    assert known.columns == {"name": "NAME", "DOB": "DATE", "mrn": "MRN"} and known.ignored == ("sex", "note")
    told = table(types={"sex": "gender", "mrn": "id"})
    assert told.columns == {"name": "NAME", "DOB": "DATE", "mrn": "ID", "sex": "SEX"}


def test_values_are_found_in_their_own_patients_records() -> None:
    text = "ANNA  WEISS (Weiss, Anna), born March 4th, 1950; Mrs Weiss, MRN 00417. Not 00918."
    data = records(("1", text), ("2", "Weiss 00417, Ben Rose and a rose, 31-Dec-1949"), ("3", "Anna Weiss"))
    assert found(data, table()) == [
        [
            ("NAME", "ANNA  WEISS"),
            ("NAME", "Weiss, Anna"),
            ("DATE", "March 4th, 1950"),
            ("NAME", "Weiss"),
            ("MRN", "00417"),
        ],
        [("NAME", "Ben Rose"), ("DATE", "31-Dec-1949")],
        [],
    ]


def test_everywhere_looks_for_telling_values_in_all_records() -> None:
    data = records(("1", "with Ben Rose, 00918"), ("2", "Weiss 00417"), ("3", "Anna Weiss, Ben"))
    assert found(data, table(), everywhere=True) == [
        [("NAME", "Ben Rose"), ("MRN", "00918")],
        [("MRN", "00417")],
        [("NAME", "Anna Weiss")],  # a first name alone is anybody's
    ]


def test_counts_say_how_far_table_and_records_fit() -> None:
    data = records(("1", "Anna Weiss, 00417"), ("1", "Anna Weiss"), ("3", "nobody"))
    assert table_spans(data, table()).counts == {
        "n_units_in_table": 2,
        "n_units_without_row": 1,
        "n_values": 3,
        "n_values_found": 2,
    }


def test_a_value_inside_a_longer_one_is_found_too() -> None:
    """Columns for the whole name and its parts are common: four of these values stand in the note, and not two."""
    columns = {
        "unit": ["a"],
        "name": ["Anna Weiss"],
        "first_name": ["Anna"],
        "last_name": ["Weiss"],
        "dob": ["1950-03-04"],
    }
    table = load_patient_table(Dataset.from_dict(columns | {"mrn": ["00417"]}), unit="unit")
    notes = Dataset.from_dict({"text": ["Anna Weiss, born 3/4/1950"], "unit": ["a"]})
    assert table_spans(notes, table).counts["n_values_found"] == 4


def test_short_and_common_values_are_not_looked_for() -> None:
    known = table([{"patient_id": 1, "name": "May Will", "mrn": "12", "city": "X"}])
    data = records(("1", "In May we will see 12 of X. May Will was here."))
    assert found(data, known) == [[("NAME", "May Will")]]


@given(st.dates(date(1900, 1, 1), date(2030, 12, 31)), st.booleans())
def test_every_spelling_of_a_day_is_that_day(day: date, day_first: bool) -> None:
    written = spellings(day.isoformat(), "DATE", day_first)
    assert len(written) >= 20
    slash = f"{day.day}/{day.month}/{day.year}" if day_first else f"{day.month}/{day.day}/{day.year}"
    assert {slash, f"{day.day:02d}.{day.month:02d}.{day.year}", f"{day:%Y%m%d}"} <= set(written)
    for text in written:
        numbers = "".join(sign if sign.isdigit() else " " for sign in text).split()
        assert len(numbers) == 1 or {str(day.year), f"{day.year % 100:02d}"} & set(numbers)
    # What one table writes so, another one reads back: the forms agree on what is day and what is month.
    assert set(spellings(slash, "DATE", day_first)) == set(written) | {slash}


@pytest.mark.parametrize(
    ("value", "kind", "written"),
    [
        ("(415) 555-0142", "PHONE", "415.555.0142"),
        ("+1 415 555 0142", "PHONE", "415-555-0142"),
        ("5550142", "PHONE", "555-0142"),
        ("219099999", "SSN", "219-09-9999"),
        ("219-09-9999", "SSN", "219099999"),
        ("Anna B. Weiss", "NAME", "Weiss, Anna B."),
        ("Weiss, Anna", "DOCTOR", "Anna Weiss"),
        ("1950-03-04 00:00:00", "DATE", "4 March 1950"),
        ("31.12.1949", "DATE", "12/31/1949"),
        ("13/02/1949", "DATE", "Feb 13, 1949"),
    ],
)
def test_spellings(value: str, kind: str, written: str) -> None:
    assert written in spellings(value, kind)


def test_what_is_no_day_stays_as_it_is() -> None:
    assert spellings("1950-02-31", "DATE") == ["1950-02-31"] and spellings("spring 1950", "DATE") == ["spring 1950"]


def test_the_hospitals_own_table_finds_all_its_planted_values() -> None:
    notes = make_hospital(n_patients=12, seed=3)
    rows: dict[str, dict[str, str]] = {}
    for unit, text, spans in zip(notes["unit"], notes["text"], notes["identifiers"], strict=True):
        for span in spans:
            name = f"{span['type'].lower()} {len(rows.setdefault(unit, {'patient_id': unit}))}"
            rows[unit][name] = text[span["start"] : span["end"]]
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    full = [{name: row.get(name) for name in names} for row in rows.values()]
    known = table(full, types={name: name.split()[0] for name in names if name != "patient_id"})
    result = table_spans(notes, known)
    for planted, ours in zip(notes["identifiers"], result.spans, strict=True):
        covered = {at for span in ours for at in range(span["start"], span["end"])}
        assert all(set(range(span["start"], span["end"])) <= covered for span in planted)
        assert all(one["end"] <= other["start"] for one, other in pairwise(ours))
    assert result.counts["n_values"] == result.counts["n_values_found"]


def test_formats_and_repeated_rows(tmp_path: Path) -> None:
    data = records(("1", "Anna Weiss, 00417, 4 Mar 1950"))
    polars.DataFrame(ROWS).with_columns(
        polars.col("DOB").replace("12/31/1949", "1949-12-31").str.to_date()
    ).write_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in [*ROWS, ROWS[0]]))
    (tmp_path / "t.csv").write_text("patient_id,name,DOB,mrn\n1,Anna Weiss,1950-03-04,\n1,,,00417\n")
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        known = load_patient_table(tmp_path / name, unit="patient_id")
        assert found(data, known) == [[("NAME", "Anna Weiss"), ("MRN", "00417"), ("DATE", "4 Mar 1950")]], name


def test_a_table_does_not_show_its_values() -> None:
    assert "Weiss" not in repr(table()) and "00417" not in repr(table())


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"unit": "patient"}, "there is no column 'patient' \\(did you mean 'patient_id'"),
        (ROWS, {"types": {"nam": "NAME"}}, "there is no column 'nam'"),
        ([{"patient_id": 1, "sex": "F"}], {}, "no column is named after a type of identifier"),
        ([{"patient_id": None, "name": "Anna"}, {"patient_id": 1, "name": "Anna"}], {}, "'patient_id' is missing in 1"),
        ([{"patient_id": 1, "name": ["Anna"]}], {}, "'name' is not a single value in 1 of 1"),
    ],
)
def test_bad_tables(rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_patient_table(Dataset.from_list(rows), **{"unit": "patient_id", **options})
    assert "Anna" not in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_other_patients() -> None:
    with pytest.raises(InputError, match="no patient of the records has a row"):
        table_spans(records(("p1", "Anna Weiss")), table())
