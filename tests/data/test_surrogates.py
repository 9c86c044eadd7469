"""Surrogates: nothing outside of the spans changes, nothing inside stays, and one patient's notes stay coherent."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import date, datetime, timedelta
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmed.data.hospital import make_hospital
from dpmed.data.identifiers import tag_identifiers
from dpmed.data.records import load_records
from dpmed.data.surrogates import with_surrogates
from dpmed.data.tasks import covers

Part = tuple[str, str | None]
"""A piece of text, and its type if it is an identifier."""


def records_of(notes: list[tuple[str, list[Part]]]) -> Dataset:
    """Records of (unit, parts)."""
    rows: list[dict[str, Any]] = []
    for unit, parts in notes:
        text, spans = "", []
        for piece, kind in parts:
            if kind is not None:
                source = "indirect" if kind == "INDIRECT" else "known"
                spans.append({"start": len(text), "end": len(text) + len(piece), "type": kind, "source": source})
            text += piece
        rows.append({"text": text, "unit": unit, "identifiers": spans})
    return load_records(Dataset.from_list(rows), unit="unit", identifiers="identifiers")


def values(records: Dataset) -> list[list[str]]:
    return [
        [text[s["start"] : s["end"]] for s in spans]
        for text, spans in zip(records["text"], records["identifiers"], strict=True)
    ]


def outside(records: Dataset) -> list[list[str]]:
    """What stands between the spans."""
    found = []
    for text, spans in zip(records["text"], records["identifiers"], strict=True):
        edges = [0, *(at for s in spans for at in (s["start"], s["end"])), len(text)]
        found.append([text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)])
    return found


def same(value: str) -> str:
    return " ".join(value.casefold().split())


DAYS = st.dates(date(1930, 1, 1), date(2030, 12, 31))
VALUES: dict[str, st.SearchStrategy[str]] = {
    "NAME": st.sampled_from(
        ["Jane Doe", "DOE, JANE", "Doe", "J. Doe", "O'Neil", "Zoé", "Zoe\u0301 Doe", "van der Berg"]
    ),
    "DOCTOR": st.sampled_from(["Dr. Who", "Who", "Jane Doe"]),
    "DATE": st.one_of(
        DAYS.map(lambda d: d.strftime("%m/%d/%Y")),
        DAYS.map(lambda d: d.strftime("%B %d, %Y")),
        st.sampled_from(["March", "2019", "Monday", "3/4", "winter", "10:30", "March 3-5"]),
    ),
    "MRN": st.from_regex(r"[A-Z]{0,2}[0-9]{1,7}", fullmatch=True),
    "PHONE": st.from_regex(r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}", fullmatch=True),
    "AGE": st.integers(0, 89).map(str),
    "AGE_OVER_89": st.integers(90, 110).map(lambda n: f"{n} years"),
    "HOSPITAL": st.sampled_from(["Hospital of the Rose", "St Elm Clinic", "Hospital"]),
    "ADDRESS": st.sampled_from(["12 Elm Street", "PO Box 7", "1 Oak Ave, Apt 3"]),
    "LOCATION": st.sampled_from(["Springfield, MA", "Rome"]),
    "PROFESSION": st.sampled_from(["baker", "Retired teacher"]),
    "PLACE": st.sampled_from(["Ohio", "Utah"]),
    "EMAIL": st.sampled_from(["jane.doe@mail.org", "a@b.com"]),
    "IP": st.sampled_from(["10.0.0.1", "192.168.1.77"]),
    "INDIRECT": st.from_regex(r"[A-Za-z]{1,9}|[0-9]{1,3}", fullmatch=True),
    "SOMETHING": st.text(min_size=1, max_size=8).filter(lambda t: t.strip() != ""),
}
PIECES = st.one_of(
    st.text(min_size=1, max_size=6).map(lambda t: (t, None)),
    st.sampled_from(sorted(VALUES)).flatmap(lambda kind: VALUES[kind].map(lambda v: (v, kind))),
)
NOTES = st.lists(
    st.tuples(st.sampled_from(["p1", "p2", "p3"]), st.lists(PIECES, min_size=1, max_size=6)), min_size=1, max_size=8
).filter(lambda notes: all("".join(piece for piece, _ in parts).strip() for _, parts in notes))
FEW = {"AGE", "AGE_OVER_89", "DATE"}  # ages and parts of dates are too few


@pytest.mark.parametrize("which", ["all", "direct", "indirect"])
@settings(max_examples=50, deadline=None)
@given(notes=NOTES, seed=st.integers(0, 5))
def test_the_promises_hold_for_any_records(which: Any, notes: list[tuple[str, list[Part]]], seed: int) -> None:
    records = records_of(notes)
    new = with_surrogates(records, which, seed=seed)
    assert outside(new) == outside(records)
    assert new["unit"][:] == records["unit"][:] and new.features == records.features
    real = {same(value) for each in values(records) for value in each}
    seen: dict[tuple[str, str, str], str] = {}
    for row, (old_values, new_values) in enumerate(zip(values(records), values(new), strict=True)):
        kept = [(s["type"], s["source"]) for s in records["identifiers"][row]]
        assert [(s["type"], s["source"]) for s in new["identifiers"][row]] == kept
        for (kind, source), old, now in zip(kept, old_values, new_values, strict=True):
            if not covers(which, source):
                assert now == old
                continue
            if not any(map(str.isalnum, old)):
                continue
            assert same(now) != same(old), kind
            if kind not in FEW:
                assert same(now) not in real, kind
            key = (records["unit"][row], kind, same(old))
            assert seen.setdefault(key, same(now)) == same(now)


@settings(max_examples=60, deadline=None)
@given(days=st.lists(DAYS, min_size=2, max_size=8, unique=True))
def test_one_number_of_days_moves_all_dates_of_a_patient(days: list[Any]) -> None:
    forms = ("%m/%d/%Y", "%Y-%m-%d", "%B %d, %Y")
    notes = [("p", [("on ", None), (day.strftime(forms[i % 3]), "DATE")]) for i, day in enumerate(days)]
    records = records_of(notes)
    moved = [
        datetime.strptime(now, forms[i % 3]).date() - day
        for i, ((now,), day) in enumerate(zip(values(with_surrogates(records, "all", seed=1)), days, strict=True))
    ]
    assert len(set(moved)) == 1 and abs(moved[0].days) > 365


def test_no_surrogate_is_real_in_a_hospital_that_uses_up_the_names_and_the_days() -> None:
    """Some thousand patients: nearly all days of some years are somebody's, and surrogates of names may be too."""
    records = make_hospital(n_patients=1500, seed=0)
    new = with_surrogates(records, "all", seed=0)
    real = {same(value) for each in values(records) for value in each}
    assert outside(new) == outside(records)
    found = [same(now) for each in values(new) for now in each]
    assert len(found) > 10_000 and real.isdisjoint(found)
    shifts: dict[str, set[int]] = defaultdict(set)
    rows = zip(records["unit"], records["identifiers"], values(records), values(new), strict=True)
    for unit, spans, olds, news in rows:
        for span, old, now in zip(spans, olds, news, strict=True):
            if span["type"] == "DATE":
                day, other = (datetime.strptime(value, "%m/%d/%Y") for value in (old, now))
                shifts[unit].add((other - day).days)
    assert len(shifts) > 10 and all(len(each) == 1 for each in shifts.values())
    assert len({min(each) for each in shifts.values()}) > 10  # each patient has its own


def test_full_days_move_past_all_real_ones_where_every_near_day_is_taken() -> None:
    everyone = [(date(2000, 1, 1) + timedelta(days=i)).strftime("%m/%d/%Y") for i in range(365 * 26)]
    others: list[Part] = [(day, "ID") for day in everyone]
    mine: list[Part] = [("06/01/2012", "DATE"), (" to ", None), ("06/09/2012", "DATE")]
    records = records_of([("me", mine), ("others", others)])
    ((first, second), *_) = values(with_surrogates(records, "all", seed=0))
    assert {first, second}.isdisjoint(everyone)
    a, b = (datetime.strptime(day, "%m/%d/%Y") for day in (first, second))
    assert (b - a).days == 8


def test_words_of_a_name_keep_their_surrogates_in_any_form_and_case() -> None:
    notes: list[tuple[str, list[Part]]] = [
        ("p", [("Jane Doe", "NAME"), (" seen by ", None), ("Roe", "DOCTOR"), (". ", None), ("DOE, JANE", "PATIENT")]),
        ("p", [("Mrs Doe", "NAME"), (" and ", None), ("doe", "NAME")]),
        ("q", [("Jane Doe", "NAME")]),
    ]
    (full, doctor, turned), (titled, small), (other,) = values(with_surrogates(records_of(notes), "all", seed=0))
    first, last = full.split()
    assert turned == f"{last.upper()}, {first.upper()}"
    assert titled == f"Mrs {last}" and small == last.lower()
    assert doctor not in (first, last) and other != full
    assert all(re.fullmatch(r"[A-Z][a-z]+", word) for word in (first, last, doctor))


def test_forms_stay() -> None:
    parts: list[Part] = [
        ("(555) 123-4567", "PHONE"),
        ("AB-0012", "MRN"),
        ("St Elm Hospital of the Rose", "HOSPITAL"),
        ("12 Oak Street", "ADDRESS"),
        ("jane.doe@mail.org", "EMAIL"),
        ("64-year-old", "AGE"),
        ("zebra", "INDIRECT"),
        ("2019-03-04T10:30:00", "DATE"),
    ]
    (found,) = values(with_surrogates(records_of([("p", parts)]), "all", seed=0))
    forms = (
        r"\([1-9]\d\d\) [1-9]\d\d-[1-9]\d{3}",
        r"[A-Z]{2}-0\d{3}",
        r"St [A-Z][a-z]+ Hospital of the [A-Z][a-z]+",
        r"[1-9]\d [A-Z][a-z]+ Street",
        r"[a-z]{4}\.[a-z]{3}@[a-z]{4}\.org",
        r"6[1-7]-year-old",
        r"[a-z]{5}",
        r"20\d\d-\d\d-\d\dT10:30:00",
    )
    for form, value in zip(forms, found, strict=True):
        assert re.fullmatch(form, value), form


@pytest.mark.parametrize("age", range(110))
def test_ages_stay_on_their_side_of_90(age: int) -> None:
    for seed in range(6):
        ((now,),) = values(with_surrogates(records_of([("p", [(str(age), "AGE")])]), "all", seed=seed))
        assert 1 <= abs(int(now) - age) <= 3 and int(now) > 0
        assert (int(now) > 89) == (age > 89)


def test_the_seed_decides() -> None:
    records = make_hospital(n_patients=10, seed=0)
    one, same_one, two = (with_surrogates(records, "all", seed=seed)["text"][:] for seed in (0, 0, 1))
    assert one == same_one != two


def test_tagged_records_keep_tokens_of_other_text_apart() -> None:
    """With the rules of sani before it: what the vote and rarity found is replaced as well."""
    records = records_of(
        [
            ("a", [("Patient ", None), ("Zwiebel", "NAME"), (" has gout.", None)]),
            ("a", [("Zwiebel again, with gout.", None)]),
            ("b", [("Fever, gout and xylophone.", None)]),
        ]
    )
    tagged = tag_identifiers(records, k=2)
    new = with_surrogates(tagged, "all", seed=0)
    assert outside(new) == outside(tagged)
    text = " ".join(new["text"][:])
    assert "Zwiebel" not in text and "xylophone" not in text and "gout" in text
    names = [each[0] for each in values(new)[:2]]
    assert names[0] == names[1]
