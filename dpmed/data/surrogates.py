"""Other values of the same type in place of identifiers: a text that reads on and holds nobody's identifiers.

One patient's notes stay coherent: a value has one surrogate, a word of a name one other word wherever it stands, all
dates move by one number of days, all ages by one number of years. Between patients nothing links the surrogates.
Names come from Faker's lists. What has no list is written anew sign by sign: digits for digits, letters for letters.

Dates are shifted by more than a year, so that no day, month, year or weekday stays, as in the shared hospital data sets
whose days are shifted (Johnson et al. 2016, MIMIC-III); realistic surrogates in place of identifiers, so that one that
was overlooked does not stand out, are Carrell et al. 2013's "hiding in plain sight".
"""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import cast

from datasets import Dataset

from dpmed.data.identifier_types import canonical_type
from dpmed.data.identifiers import FUNCTION_WORDS, Span
from dpmed.data.records import record_features
from dpmed.data.tasks import Targets, covers
from dpmed.data.written_dates import WrittenDate, cased, draw_shift, shift_beyond, written_dates

_RUN = re.compile(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f])*|\d+")
"""What a value is made of: words with their accents, and numbers. What stands between them stays."""
_TIME_OR_NUMBER = re.compile(r"(?P<time>\d{1,2}:\d{2}(?::\d{2})?)|\d+")

_NAMES = frozenset(("NAME", "DOCTOR"))
_AGES = frozenset(("AGE", "AGE_OVER_89"))
_PLACES = frozenset(("LOCATION", "HOSPITAL", "ADDRESS", "ORGANIZATION"))
_ADDRESSES_ONLINE = frozenset(("EMAIL", "URL"))
_CODES = frozenset(
    "PHONE FAX SSN MRN HEALTH_PLAN ACCOUNT LICENSE VEHICLE DEVICE IP BIOMETRIC PHOTO ID ZIP".split()  # noqa: SIM905
)
_TITLES = frozenset("dr mr mrs ms miss mx prof md phd rn jr sr".split())  # noqa: SIM905
_PLACE_WORDS = """
    hospital clinic infirmary hospice medical health center centre institute department ward unit floor general memorial
    community regional university college school saint st street road rd avenue ave lane ln drive court ct boulevard
    blvd place way apt apartment suite ste room po box north south east west county city inc llc ltd company group
"""
_PLACE_WORDS = frozenset(_PLACE_WORDS.split())
_ONLINE_WORDS = frozenset("http https ftp www mailto com org net edu gov html".split())  # noqa: SIM905
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

_EASY, _TRIES = 50, 1000
"""Draws in which a surrogate must be new to the patient and of the same length; draws after which it is given up."""
_SHIFTS = 60


def with_surrogates(records: Dataset, which: Targets, *, seed: int) -> Dataset:
    """The records with other values of the same type in place of their identifiers, and the spans moved along.

    Args:
        records: columns text, unit and identifiers; the spans of a record are sorted and do not overlap, as
            `tag_identifiers` gives them.
        which: the identifiers that are replaced.
        seed: equal records and seeds give equal surrogates.

    Returns: the same columns and rows. Spans keep their order, type and source.
    Guarantees: text outside the replaced spans stays as it is. The same value of one patient (case and blanks aside)
        has the same surrogate, all dates of a patient move by the same number of days, and all ages by the same number
        of years but where that would cross 0 or 90. No surrogate is what stood in its place, and none is the value of
        any identifier of the records.
    Edge cases: ages, and dates without day, month or a year of four digits, have too few values for the last one: they
        may be another patient's. A value without letter or digit stays.
    """
    texts, units, found = list(records["text"]), list(records["unit"]), list(records["identifiers"])
    values = [[text[s["start"] : s["end"]] for s in spans] for text, spans in zip(texts, found, strict=True)]
    real = {_folded(value) for each in values for value in each}
    targets = [[covers(which, span["source"]) for span in spans] for spans in found]
    dates = _dates_by_unit(units, found, values, targets)
    last = max((written.day for value in real for written in written_dates(value)), default=date.min)
    rngs = {unit: random.Random(f"{seed}/{unit}") for unit in dict.fromkeys(units)}
    patients = {unit: _Patient(rng, real, dates.get(unit, []), last) for unit, rng in rngs.items()}
    new_texts: list[str] = []
    new_spans: list[list[Span]] = []
    for row, (text, spans) in enumerate(zip(texts, found, strict=True)):
        patient = patients[units[row]]
        news = [
            patient.surrogate(value, canonical_type(span["type"])) if target else value
            for value, span, target in zip(values[row], spans, targets[row], strict=True)
        ]
        text, spans = _replaced(text, spans, news)
        new_texts.append(text)
        new_spans.append(spans)
    columns = {name: list(records[name]) for name in records.column_names}
    features = records.features.copy()
    features["identifiers"] = record_features()["identifiers"]
    return Dataset.from_dict(columns | {"text": new_texts, "identifiers": new_spans}, features=features)


def _replaced(text: str, spans: Sequence[Span], news: Sequence[str]) -> tuple[str, list[Span]]:
    """The text with each span's new value, and the spans where these stand."""
    result, moved, done = "", list[Span](), 0
    for span, new in zip(spans, news, strict=True):
        result += text[done : span["start"]]
        moved.append({**span, "start": len(result), "end": len(result) + len(new)})
        result += new
        done = span["end"]
    return result + text[done:], moved


def _dates_by_unit(
    units: Sequence[str],
    found: Sequence[Sequence[Span]],
    values: Sequence[Sequence[str]],
    targets: Sequence[list[bool]],
) -> dict[str, list[str]]:
    """Unit -> its values that are dates and targets, each once."""
    dates: dict[str, dict[str, None]] = {}
    for row, unit in enumerate(units):
        for span, value, target in zip(found[row], values[row], targets[row], strict=True):
            if target and canonical_type(span["type"]) == "DATE":
                dates.setdefault(unit, {})[value] = None
    return {unit: list(each) for unit, each in dates.items()}


def _folded(value: str) -> str:
    """The form in which values are compared: case, blanks and the spelling of accents do not matter."""
    composed = unicodedata.normalize("NFC", value)
    return " ".join(unicodedata.normalize("NFC", composed.casefold()).split())


class _Patient:
    """The surrogates of one patient, drawn in the order in which the values come: they tell nothing of the values."""

    def __init__(self, rng: random.Random, real: set[str], dates: Sequence[str], last: date) -> None:
        self._rng, self._real = rng, real
        self._years = rng.choice((-3, -2, -1, 1, 2, 3))
        self._shift = self._shift_for(dates, last)
        self._runs: dict[tuple[str, str], str] = {}
        self._used: set[str] = set()
        self._whole: dict[tuple[str, str], list[str]] = {}

    def surrogate(self, value: str, kind: str) -> str:
        """What stands in place of `value`, an identifier of the type `kind` (canonical)."""
        if kind in _AGES and any(map(str.isdecimal, value)):
            return re.sub(r"\d+", lambda match: str(self._age(int(match[0]))), value)
        if kind == "DATE" and written_dates(value):
            return self._date(value)
        return self._written_anew(value, kind)

    def _age(self, age: int) -> int:
        new = age + self._years
        return new if new > 0 and (new > 89) == (age > 89) else age - self._years

    def _date(self, value: str) -> str:
        """All dates in the value moved; other numbers of it written anew, but times of day."""
        parts, done = list[str](), 0
        for each in written_dates(value):
            parts += [self._between(value[done : each.start]), each.shifted(self._shift)]
            done = each.end
        return "".join([*parts, self._between(value[done:])])

    def _between(self, text: str) -> str:
        return _TIME_OR_NUMBER.sub(lambda m: m[0] if m["time"] else self._written_anew(m[0], "DATE"), text)

    def _shift_for(self, dates: Sequence[str], last: date) -> int:
        """Days by which no date of this patient becomes a real one, where its values are not too few for that."""
        written = {value: written_dates(value) for value in dates}
        exact_only: int | None = None
        for number in range(_SHIFTS):
            shift = draw_shift(self._rng, years=1 if number < _SHIFTS // 2 else self._rng.randrange(2, 12))
            taken = [value for value, each in written.items() if self._is_real(value, each, shift)]
            if not taken:
                return shift
            if exact_only is None and not any(each.exact for value in taken for each in written[value]):
                exact_only = shift
        if exact_only is not None:
            return exact_only
        exact = [each.day for dates_of_value in written.values() for each in dates_of_value if each.exact]
        return shift_beyond(self._rng, exact, last)

    def _is_real(self, value: str, written: Sequence[WrittenDate], shift: int) -> bool:
        """Whether a value's dates, or all of it, would become an identifier of somebody's."""
        shifted = [each.shifted(shift) for each in written]
        whole = _composed(value, [(each.start, each.end) for each in written], shifted, as_cased=False)
        return any(_folded(text) in self._real for text in (*shifted, whole))

    def _written_anew(self, value: str, kind: str) -> str:
        """The value with other words and numbers, in its own case, with the signs between them as they are."""
        runs = list(_RUN.finditer(value))
        chosen = [m for m in runs if not _stays(m[0], kind)] or runs
        if not chosen:
            return value
        group = kind if kind not in _NAMES else "NAME"
        key = (group, _folded(value))
        if key not in self._whole:
            self._whole[key] = self._drawn(value, [m.span() for m in chosen], group)
        return _composed(value, [m.span() for m in chosen], self._whole[key])

    def _drawn(self, value: str, places: Sequence[tuple[int, int]], group: str) -> list[str]:
        """A new word or number for each place: those that the patient has already, as far as the whole is nobody's."""
        olds = [_folded(value[a:b]) for a, b in places]
        known = {old: self._runs[group, old] for old in olds if (group, old) in self._runs}
        for attempt in range(_TRIES):
            new = dict(known)
            used = self._used if attempt < _EASY else ()
            for old, (a, b) in zip(olds, places, strict=True):
                if old not in new:
                    new[old] = self._run(value[a:b], group, longer=max(0, attempt - _EASY) // 50)
            drawn = [new[old] for old in olds]
            fresh = {old: word for old, word in new.items() if old not in known}
            whole = _folded(_composed(value, places, drawn))
            twice = attempt < _EASY and len(set(fresh.values())) < len(fresh)
            if (
                twice
                or whole in self._real
                or any(word in self._real or word in used or word == old for old, word in fresh.items())
            ):
                known = known if fresh else {}  # nothing is left to draw: this value gets words of its own
                continue
            for old, word in fresh.items():
                self._runs.setdefault((group, old), word)
            self._used.update(fresh.values())
            return drawn
        raise AssertionError("no surrogate was found")  # each 50 draws try longer ones, of which there are ever more

    def _run(self, old: str, group: str, *, longer: int) -> str:
        """A new word or number, in small letters."""
        rng, n = self._rng, len(old) + longer
        if old[0].isdecimal():
            return str(rng.randrange(1, 255)) if group == "IP" and not longer else _digits(rng, n, old[0] == "0")
        if group in _CODES or len(old) == 1:
            return "".join(rng.choice(string.ascii_lowercase) for _ in range(n))
        pool = () if longer else _pool(group, _folded(old), short=len(old) < 4 and old.isupper())
        return rng.choice(pool) if pool else _made_up(rng, n)


def _stays(run: str, kind: str) -> bool:
    """Whether a word of a value says what kind of thing it names, and not which one."""
    word = run.lower()
    if kind in _NAMES:
        return word in _TITLES
    if kind in _ADDRESSES_ONLINE:
        return word in _ONLINE_WORDS
    if kind in _CODES:
        return False
    return (run.islower() and word in FUNCTION_WORDS) or (kind in _PLACES and word in _PLACE_WORDS)


def _composed(value: str, places: Sequence[tuple[int, int]], new: Sequence[str], *, as_cased: bool = True) -> str:
    """The value with other parts at these places, in the case of the old ones if `as_cased`."""
    parts, done = list[str](), 0
    for (start, end), part in zip(places, new, strict=True):
        parts += [value[done:start], cased(value[start:end], part) if as_cased else part]
        done = end
    return "".join([*parts, value[done:]])


def _digits(rng: random.Random, n: int, zero: bool) -> str:
    """A number of n digits that starts with 0 where the old one does."""
    first = "0" if zero and n > 1 else str(rng.randrange(1, 10))
    return first + "".join(rng.choice(string.digits) for _ in range(n - 1))


def _made_up(rng: random.Random, n: int) -> str:
    """A word of n letters that can be spoken and means nothing."""
    turn = rng.randrange(2)
    return "".join(rng.choice((_CONSONANTS, _VOWELS)[(turn + i) % 2]) for i in range(n))


def _pool(group: str, old: str, *, short: bool) -> tuple[str, ...]:
    """Words of a type; none where they are made up."""
    first, last = _names()
    if group == "NAME":
        return first if old in first and old not in last else last
    if group in _PLACES:
        return () if short else _towns() if group == "LOCATION" else last  # "MA" becomes other letters
    return {"PROFESSION": _professions, "PLACE": _states}.get(group, tuple)()


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and last names of one word each, in small letters."""
    from faker.providers.person.en_US import Provider  # lazily: only who makes surrogates pays for it

    lists = (cast("Mapping[str, float]", Provider.first_names), cast("Mapping[str, float]", Provider.last_names))
    first, last = (_single_words(names) for names in lists)
    return first, last


@cache
def _towns() -> tuple[str, ...]:
    from faker.providers.address.en_US import Provider

    return tuple(name + suffix for name in _names()[1] for suffix in dict.fromkeys(Provider.city_suffixes))


@cache
def _states() -> tuple[str, ...]:
    from faker.providers.address.en_US import Provider

    return _single_words(Provider.states)


@cache
def _professions() -> tuple[str, ...]:
    from faker.providers.job import Provider

    return _single_words(Provider.jobs)


def _single_words(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.lower() for name in names if name.isascii() and name.isalpha()))
