"""Identifiers: the vote, rare words against a slow brute force, spans that never overlap."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpmed.data.identifiers import (
    FUNCTION_WORDS,
    PROTECTED_WORDS,
    identifier_counts,
    resolved_spans,
    tag_identifiers,
)
from dpmed.data.records import SPAN_SOURCES, record_features
from dpmed.errors import InputError

Found = list[tuple[str, str, str]]


def records(*rows: tuple[str, str, list[tuple[str, str]]], source: str = "planted") -> Dataset:
    """Rows of (unit, text, [(value, type), ...]); each value is a span at its first place in the text."""
    columns: dict[str, list[Any]] = {"text": [], "unit": [], "record_id": [], "identifiers": []}
    for row, (unit, text, values) in enumerate(rows):
        spans = [
            {"start": text.index(value), "end": text.index(value) + len(value), "type": kind, "source": source}
            for value, kind in values
        ]
        for name, value in zip(columns, (text, unit, str(row), spans), strict=True):
            columns[name].append(value)
    return Dataset.from_dict(columns, features=record_features())


def found(tagged: Dataset) -> list[Found]:
    """Per record: (slice of the text, type, source) of each span."""
    rows = zip(tagged["text"], tagged["identifiers"], strict=True)
    return [[(text[s["start"] : s["end"]], s["type"], s["source"]) for s in spans] for text, spans in rows]


# --- The vote ---------------------------------------------------------------------------------------------------------


def test_a_word_that_is_mostly_an_identifier_is_one_everywhere() -> None:
    data = records(("p1", "Anna Weiss came.", [("Anna Weiss", "NAME")]), ("p2", "We saw ANNA and weiss, then.", []))
    assert found(tag_identifiers(data, indirect=False)) == [
        [("Anna Weiss", "NAME", "planted")],
        [("ANNA", "NAME", "known"), ("weiss", "NAME", "known")],  # one of two occurrences: a tie keeps it
    ]


def test_a_word_below_half_does_not_spread_but_planted_spans_stay() -> None:
    data = records(("p1", "Rose, a rose, the rose.", [("Rose", "NAME")]))
    assert found(tag_identifiers(data, indirect=False)) == [[("Rose", "NAME", "planted")]]


def test_the_most_frequent_type_wins_and_a_tie_is_alphabetical() -> None:
    data = records(
        ("p1", "Jordan 4471", [("Jordan", "PLACE"), ("4471", "PHONE")]),
        ("p2", "Jordan 4471", [("Jordan", "NAME"), ("4471", "MRN")]),
        ("p3", "Jordan", [("Jordan", "NAME")]),
        ("p4", "Jordan 4471", []),
    )
    assert found(tag_identifiers(data, indirect=False))[3] == [("Jordan", "NAME", "known"), ("4471", "MRN", "known")]


def test_small_common_and_protected_words_do_not_vote() -> None:
    data = records(
        ("p1", "Hospital of J 7 Kew", [("Hospital of J 7 Kew", "PLACE")]), ("p2", "The hospital of 7 J Kew", [])
    )
    assert found(tag_identifiers(data, indirect=False))[1] == [("Kew", "PLACE", "known")]
    spread = found(tag_identifiers(data, indirect=False, protected=frozenset({"KEW"})))[1]
    assert spread == [("hospital", "PLACE", "known")]


def test_pattern_spans_stay_and_do_not_vote() -> None:
    data = records(("p1", "Call 555-0142", [("555-0142", "PHONE")]), ("p2", "555 times", []), source="pattern")
    assert found(tag_identifiers(data, indirect=False)) == [[("555-0142", "PHONE", "pattern")], []]


def test_a_word_that_only_touches_a_span_is_not_inside_it() -> None:
    data = records(("p1", "Annabel", [("Anna", "NAME")]), ("p2", "annabel", []))
    assert found(tag_identifiers(data, indirect=False)) == [[("Anna", "NAME", "planted")], []]


def test_overlapping_spans_become_one_of_the_longest_type() -> None:
    data = records(("p1", "Anna Weiss Smith", [("Weiss Smith", "PLACE"), ("Anna Weiss", "NAME"), ("Weiss", "DATE")]))
    assert found(tag_identifiers(data)) == [[("Anna Weiss Smith", "PLACE", "planted")]]
    touching = records(("p1", "12March", [("12", "DAY"), ("March", "MONTH")]))
    assert found(tag_identifiers(touching)) == [[("12", "DAY", "planted"), ("March", "MONTH", "planted")]]


def test_a_surer_source_keeps_its_span_and_the_other_what_is_left() -> None:
    text = "at 12 Main St, Boston, MA."
    spans = [
        {"start": 3, "end": 25, "type": "ADDRESS", "source": "pattern"},
        {"start": 15, "end": 21, "type": "LOCATION", "source": "known"},
        {"start": 3, "end": 5, "type": "AGE", "source": "planted"},
        {"start": 13, "end": 16, "type": "X", "source": "ner"},
    ]
    left = [(text[s["start"] : s["end"]], s["type"], s["source"]) for s in resolved_spans(text, spans)]
    assert left == [
        ("12", "AGE", "planted"),
        (" Main St, ", "ADDRESS", "pattern"),
        ("Boston", "LOCATION", "known"),
        (", MA", "ADDRESS", "pattern"),
    ]
    inside = [
        {"start": 3, "end": 13, "type": "ADDRESS", "source": "known"},
        {"start": 2, "end": 14, "type": "ADDRESS", "source": "pattern"},
    ]
    assert resolved_spans(text, inside) == inside[:1]  # a blank and a comma are no identifier


@given(st.data())
def test_no_source_takes_or_moves_what_a_surer_one_found(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab ,", min_size=1, max_size=12))
    spans = data.draw(st.lists(any_span(len(text)), max_size=6))
    resolved = resolved_spans(text, spans)
    assert all(one["end"] <= other["start"] for one, other in pairwise(resolved))
    owner: dict[int, str] = {}  # of letters: a comma that is left over belongs to nobody
    for source in SPAN_SOURCES:
        for span in (span for span in spans if span["source"] == source):
            for at in range(span["start"], span["end"]):
                if text[at].isalnum():
                    owner.setdefault(at, source)
    found = {at: span["source"] for span in resolved for at in range(span["start"], span["end"])}
    assert {at: source for at, source in found.items() if text[at].isalnum()} == owner


def any_span(length: int) -> st.SearchStrategy[dict[str, Any]]:
    ends = st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(
        lambda at, source: {"start": at[0], "end": at[1], "type": "X", "source": source},
        ends,
        st.sampled_from(SPAN_SOURCES),
    )


# --- Rare words -------------------------------------------------------------------------------------------------------


def test_words_of_fewer_than_k_patients_are_indirect() -> None:
    data = records(
        ("p1", "A beekeeper on 40mg, ox", []),
        ("p1", "The beekeeper again with Fever", []),
        ("p2", "On 40MG, a pilot", []),
    )
    indirect = "INDIRECT", "indirect"
    assert found(tag_identifiers(data)) == [
        [("beekeeper", *indirect)],
        [("beekeeper", *indirect)],
        [("pilot", *indirect)],
    ]
    assert found(tag_identifiers(data, k=3))[0] == [("beekeeper", *indirect), ("40mg", *indirect)]
    assert found(tag_identifiers(data, k=1)) == [[], [], []]
    assert found(tag_identifiers(data, indirect=False)) == [[], [], []]


def test_a_word_in_a_span_still_counts_as_occurring() -> None:
    data = records(("p1", "Lima", [("Lima", "NAME")]), ("p2", "lima, lima and LIMA", []))
    assert found(tag_identifiers(data)) == [[("Lima", "NAME", "planted")], []]  # 1 of 4 inside, 2 patients


def test_unicode_spans_lie_on_their_words() -> None:
    decomposed = "e\u0301"
    text = f"\U0001f600 Jos{decomposed} lives in Łódź, STRASSE 9b \u2028 Zoë"
    data = records(("p1", text, [("Zoë", "NAME")]), ("p2", "josé in straße; ZOË, ZOE\u0308", []))
    indirect = "INDIRECT", "indirect"
    assert found(tag_identifiers(data, protected=frozenset())) == [
        [("lives", *indirect), ("Łódź", *indirect), ("9b", *indirect), ("Zoë", "NAME", "planted")],
        [],  # 1 of 3 occurrences of the name: below half, in two patients
    ]
    assert found(tag_identifiers(data, protected=frozenset(), k=3))[1] == [
        ("josé", *indirect),
        ("straße", *indirect),
        ("ZOË", *indirect),
        ("ZOE\u0308", *indirect),
    ]


WORDS = ["Anna", "anna", "ox", "7", "42", "x1", "fever", "the", "Łódź", "rose", "Rose", "kew"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@st.composite
def corpora(draw: st.DrawFn) -> Dataset:
    columns: dict[str, list[Any]] = {"text": [], "unit": [], "record_id": [], "identifiers": []}
    for row in range(draw(st.integers(1, 6))):
        text = draw(TEXT)
        starts = draw(st.lists(st.integers(0, len(text) - 1), max_size=3))
        spans = [
            {
                "start": start,
                "end": draw(st.integers(start + 1, len(text))),
                "type": draw(st.sampled_from(["NAME", "DATE"])),
                "source": draw(st.sampled_from(["planted", "known", "pattern"])),
            }
            for start in starts
        ]
        values = (text, f"p{draw(st.integers(0, 3))}", str(row), spans)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return Dataset.from_dict(columns, features=record_features())


def slow_indirect(data: Dataset, row: int, k: int, taken: set[int]) -> set[tuple[int, int]]:
    """Rule 3, word by word: `taken` are the characters of the record that lie in other spans."""
    result = set()
    for match in re.finditer(r"\w+", data["text"][row]):
        word = match.group().lower()
        patients = {
            unit
            for unit, text in zip(data["unit"], data["text"], strict=True)
            if word in re.findall(r"\w+", text.lower())
        }
        candidate = (word.isalpha() and len(word) >= 3) or (len(word) > 1 and any(c.isdigit() for c in word))
        free = not taken & set(range(*match.span()))
        if candidate and free and word not in PROTECTED_WORDS and len(patients) < k:
            result.add(match.span())
    return result


def slow_known(data: Dataset, row: int) -> set[tuple[int, int]]:
    """Rule 2, word by word, given spans that do not overlap."""

    def places(word: str) -> list[tuple[int, int, int]]:
        texts = enumerate(data["text"])
        return [(at, *m.span()) for at, text in texts for m in re.finditer(r"\w+", text) if m.group().lower() == word]

    def inside(at: int, start: int, end: int) -> bool:
        spans = [s for s in data["identifiers"][at] if s["source"] in ("planted", "known")]
        return any(s["start"] <= start and end <= s["end"] for s in spans)

    result = set()
    for match in re.finditer(r"\w+", data["text"][row]):
        word = match.group().lower()
        all_places = places(word)
        votes = sum(inside(*place) for place in all_places)
        free = all(s["end"] <= match.start() or match.end() <= s["start"] for s in data["identifiers"][row])
        if free and votes and votes >= len(all_places) / 2 and len(word) > 1 and word not in PROTECTED_WORDS:
            result.add(match.span())
    return result


@given(corpora(), st.integers(1, 3))
def test_tagging_agrees_with_brute_force(raw: Dataset, k: int) -> None:
    data = tag_identifiers(raw.select([]), k=k)  # an empty data set passes through
    assert len(data) == 0 and data.features == raw.features
    # Without any vote or rare word only the overlaps are resolved: the base of the brute force.
    data = tag_identifiers(raw, indirect=False, protected=frozenset(map(str.casefold, WORDS)))
    tagged = tag_identifiers(raw, k=k)
    for row, spans in enumerate(tagged["identifiers"]):
        assert all(one["end"] <= other["start"] for one, other in pairwise(spans))
        direct = [s for s in spans if s["source"] != "indirect"]
        before = {(s["start"], s["end"]) for s in data["identifiers"][row]}
        covered = {at for s in raw["identifiers"][row] for at in range(s["start"], s["end"])}
        lost = covered - {at for span in before for at in range(*span)}
        assert not any(data["text"][row][at].isalnum() for at in lost)
        assert {at for span in before for at in range(*span)} <= covered
        assert {(s["start"], s["end"]) for s in direct} == before | slow_known(data, row)
        taken = {at for s in direct for at in range(s["start"], s["end"])}
        indirect = {(s["start"], s["end"]) for s in spans if s["source"] == "indirect"}
        assert indirect == slow_indirect(raw, row, k, taken)
    for name in ("text", "unit", "record_id"):
        assert tagged[name][:] == raw[name][:]


# --- Counts -----------------------------------------------------------------------------------------------------------


def test_counts_hold_no_values() -> None:
    data = records(("p1", "Anna Weiss 12", [("Anna Weiss", "NAME"), ("12", "DATE")]), ("p2", "Weiss, beekeeper", []))
    assert identifier_counts(tag_identifiers(data)) == {
        "indirect": {"INDIRECT": 1},
        "known": {"NAME": 1},
        "planted": {"DATE": 1, "NAME": 1},
    }


def test_k_must_be_positive() -> None:
    with pytest.raises(InputError, match="k is 0"):
        tag_identifiers(records(("p1", "text", [])), k=0)


def test_word_lists_are_casefolded_and_of_moderate_size() -> None:
    assert all(word == word.casefold() for word in PROTECTED_WORDS)
    assert FUNCTION_WORDS < PROTECTED_WORDS and 120 < len(PROTECTED_WORDS - FUNCTION_WORDS) < 250
