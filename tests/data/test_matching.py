"""Known values in text: against a slow search that shares no code with the automaton, and the folds one by one."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpmed.data.matching import KnownValues, Match


def _same(text: str) -> str:
    """What two spellings of a value have in common, worked out on the whole string."""
    text = re.sub("[\u2010-\u2015\u2212]", "-", re.sub("[\u2018\u2019]", "'", text))
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return re.sub(r"\s+", " ", folded).strip()


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _may_cut(text: str, at: int) -> bool:
    if at in (0, len(text)):
        return True
    if _is_mark(text[at]):
        return False
    return not (re.match(r"\w", text[at]) and (re.match(r"\w", text[at - 1]) or _is_mark(text[at - 1])))


def _slow(values: list[str], text: str) -> list[Match]:
    wanted: dict[str, int] = {}
    for index, value in enumerate(values):
        wanted.setdefault(_same(value), index)
    wanted.pop("", None)
    found: list[Match] = []
    start = 0
    while start < len(text):
        for end in range(len(text), start, -1):
            piece = text[start:end]
            if piece[0].isspace() or piece[-1].isspace() or not (_may_cut(text, start) and _may_cut(text, end)):
                continue
            if _same(piece) in wanted:
                found.append(Match(start, end, wanted[_same(piece)]))
                start = end - 1
                break
        start += 1
    return found


_LETTERS = st.text(alphabet="aAbsSß 1_-’'.(\u0301e\u00e9İi\u0130ŉ\n\xa0ΣςK", max_size=12)
_VALUES = st.lists(_LETTERS.filter(lambda value: not value.strip() or not _is_mark(value.strip()[0])), max_size=6)


@settings(max_examples=400, deadline=None)
@given(values=_VALUES, text=_LETTERS)
@example(values=["ann", "ann lee"], text="Ann Leeds")
@example(values=["a", "a b", "b c c"], text="a b c c")
@example(values=["e"], text="e\u0301 e")
@example(values=["e  \u00e9"], text="x E\n\n e\u0301.")
def test_finds_what_a_slow_search_finds(values: list[str], text: str) -> None:
    assert KnownValues(values, ["X"] * len(values)).find(text) == _slow(values, text)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=st.text(max_size=40))
def test_a_piece_of_any_text_is_found_in_it(data: st.DataObject, text: str) -> None:
    cuts = [at for at in range(len(text) + 1) if _may_cut(text, at)]
    start, end = sorted(data.draw(st.tuples(st.sampled_from(cuts), st.sampled_from(cuts))))
    value = text[start:end]
    if value != value.strip() or not value:
        return
    matches = KnownValues([value], ["X"]).find(text)
    assert any(match.start <= start < match.end for match in matches)
    assert all(_same(text[match.start : match.end]) == _same(value) for match in matches)


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [
        ("straße", "In der STRASSE 3", "STRASSE"),
        ("STRASSE", "die Straße.", "Straße"),
        ("İpek", "Frau İpek kam", "İpek"),
        ("José", "for Jose\u0301 today", "Jose\u0301"),
        ("Ann Lee", "Ann\n   Lee", "Ann\n   Lee"),
        ("O'Neil", "Mr O’Neil", "O’Neil"),
        ("555-0101", "call 555–0101 now", "555–0101"),
        ("(555) 010", "tel(555) 010", "(555) 010"),
    ],
)
def test_spellings_that_are_the_same_value(value: str, text: str, found: str) -> None:
    ((start, end, index),) = KnownValues(["other", value], ["A", "B"]).find(text)
    assert (text[start:end], index) == (found, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Ann", "Annex"),
        ("Ann", "Joann"),
        ("Ann", "Ann_1"),
        ("12", "123"),
        ("Jose", "Jose\u0301"),
        ("s", "ß"),
        ("Ann Lee", "AnnLee"),
        ("", "a"),
        (" \n", "a  b"),
    ],
)
def test_what_is_not_the_value(value: str, text: str) -> None:
    assert KnownValues([value], ["X"]).find(text) == []


def test_equal_values_count_once_and_the_first_names_the_type() -> None:
    known = KnownValues(["Ann", "ANN", " ", "Lee"], ["NAME", "DOCTOR", "X", "NAME"])
    assert len(known) == 2
    assert [known.types[match.index] for match in known.find("ann lee")] == ["NAME", "NAME"]


def test_as_many_types_as_values() -> None:
    with pytest.raises(ValueError, match="2 values but 1 types"):
        KnownValues(["a", "b"], ["X"])


def test_nothing_to_find() -> None:
    assert KnownValues([], []).find("text") == [] == KnownValues(["a"], ["X"]).find("")
