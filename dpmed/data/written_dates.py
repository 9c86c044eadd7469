"""Dates as notes write them, each to be written again in the same form a number of days later or earlier.

Read are days, months, years and weekdays in the forms of `patterns.py`, in English. Numbers of a day and a month are
month first, unless only day first makes a date.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

MONTHS = tuple(
    "january february march april may june july august september october november december".split()  # noqa: SIM905
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

_YEAR = 365.2425
_LEAST, _MOST = 40, 326
"""Days by which a shift differs from whole years: every month, year and day of a year that is written then changes."""

_Y4 = r"(?P<year>(?:1[89]|2[0-2])\d\d)"
_Y = r"(?:(?P<year>(?:1[89]|2[0-2])\d\d)|['’]?(?P<short>\d\d))"
_MONTH = (
    r"(?<![^\W\d])(?P<name>" + "|".join(rf"{m[:3]}(?:{m[3:]})?" if len(m) > 3 else m for m in MONTHS) + r"|sept)"
    r"(?![^\W\d])\.?"
)
_DAY = r"(?P<day>3[01]|[12]\d|0?[1-9])(?P<nth>st|nd|rd|th)?"
_BEFORE, _AFTER = r"(?<!\d)(?<!\d[/.])", r"(?!\d)(?![/.]\d)"
_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"{_BEFORE}{_Y4}(?P<sep>[-/.])(?P<month>\d{{1,2}})(?P=sep)(?P<day>\d{{1,2}}){_AFTER}",
        rf"{_BEFORE}{_Y4}(?P<month>\d\d)(?P<day>\d\d){_AFTER}",
        rf"{_BEFORE}(?P<first>\d{{1,2}})(?P<sep>[-/.])(?P<second>\d{{1,2}})(?P=sep){_Y}{_AFTER}",
        rf"{_MONTH}[\s-]{{0,2}}{_DAY}(?:(?:,[\s-]{{0,2}}|[\s-]{{1,2}}){_Y})?{_AFTER}",
        rf"{_BEFORE}{_DAY}[\s-]{{0,2}}(?:of\s)?{_MONTH}(?:,?[\s-]{{0,2}}{_Y})?{_AFTER}",
        rf"{_MONTH},?[\s-]{{0,2}}(?:of\s)?(?:{_Y4}|['’](?P<short>\d\d)){_AFTER}",
        rf"{_BEFORE}(?P<month>\d{{1,2}})[-/.]{_Y4}{_AFTER}",
        rf"{_BEFORE}(?P<first>\d{{1,2}})[-/](?P<second>\d{{1,2}})(?!\d)(?![/.-]\d)",
        _MONTH,
        rf"{_BEFORE}{_Y4}{_AFTER}",
        r"\b(?P<weekday>" + "|".join(rf"{d[:3]}(?:{d[3:]})?" for d in WEEKDAYS) + r"|tues|thurs)\b",
    )
)


@dataclass(frozen=True)
class WrittenDate:
    """A date, or a part of one, at `text[start:end]`."""

    start: int
    end: int
    day: date
    """What is not written is taken as the middle of it: "March 2019" is the 15th, "2019" the first of July."""
    fields: tuple[tuple[int, int, str, str], ...]
    """Start, end, what it is, and its text, of each part that a shift may change, in order."""
    text: str

    @property
    def exact(self) -> bool:
        """Whether day, month and a year of four digits are written."""
        kinds = {kind for _, _, kind, _ in self.fields}
        return {"day", "year"} <= kinds and bool(kinds & {"month", "name"})

    def shifted(self, days: int) -> str:
        """The same form, so many days later. Raises: OverflowError beyond the years 1 to 9999."""
        new = self.day + timedelta(days=days)
        padded = all(len(text) == 2 for _, _, kind, text in self.fields if kind in ("day", "month"))
        parts: list[str] = []
        done = self.start
        for start, end, kind, old in self.fields:
            parts += [self.text[done:start], _field(kind, old, new, padded)]
            done = end
        return "".join([*parts, self.text[done : self.end]])


def written_dates(text: str) -> list[WrittenDate]:
    """All dates in `text`, sorted, none overlapping: of those that do, the one of the fuller form."""
    taken = bytearray(len(text))
    found: list[WrittenDate] = []
    for form in _FORMS:
        for match in form.finditer(text):
            start, end = match.span()
            if any(taken[start:end]):
                continue
            read = _read(match)
            if read is not None:
                taken[start:end] = b"\1" * (end - start)
                found.append(WrittenDate(start, end, *read, text))
    return sorted(found, key=lambda each: each.start)


def draw_shift(rng: random.Random, *, years: int = 1) -> int:
    """A number of days, later or earlier, of `years` years and a part of one, by which no written part can stay."""
    days = round(years * _YEAR) + rng.randrange(_LEAST, _MOST)
    days += days % 7 == 0  # a weekday changes too
    return days if rng.random() < 0.5 else -days


def shift_beyond(rng: random.Random, days: Iterable[date], last: date) -> int:
    """A shift, of the kind that `draw_shift` draws, that takes each of `days` past `last`."""
    shift = max(0, (last - min(days)).days) + 1
    years = int(shift // _YEAR) + 1
    return abs(draw_shift(rng, years=years))


def cased(like: str, word: str) -> str:
    """`word` in capitals, small letters, or with a first capital, as `like` is."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:].lower() if like[:1].isupper() else word.lower()


def _read(match: re.Match[str]) -> tuple[date, tuple[tuple[int, int, str, str], ...]] | None:
    """The day and its parts; None if there is no such day."""
    parts = [(*match.span(kind), kind, text) for kind, text in match.groupdict().items() if text and kind != "sep"]
    by_kind = {kind: text for _, _, kind, text in parts}
    orders = ({"first": "month", "second": "day"}, {"first": "day", "second": "month"})
    for names in orders if "first" in by_kind else orders[:1]:
        day = _day({names.get(kind, kind): text for kind, text in by_kind.items()})
        if day is not None:
            return day, tuple(sorted((a, b, names.get(kind, kind), text) for a, b, kind, text in parts))
    return None


def _day(parts: dict[str, str]) -> date | None:
    if "weekday" in parts:
        at = [day[:3] for day in WEEKDAYS].index(parts["weekday"][:3].lower())
        return date(2001, 1, 1) + timedelta(days=at)  # a Monday
    month, day = int(parts.get("month", 7)), int(parts.get("day", 15))
    if "name" in parts:
        month = [name[:3] for name in MONTHS].index(parts["name"][:3].lower()) + 1
    elif "month" not in parts:
        day = 1
    years = [2001, 2000]  # without a year: one that has the day
    if "year" in parts:
        years = [int(parts["year"])]
    elif "short" in parts:
        years = [1900 + int(parts["short"]) + (100 if int(parts["short"]) < 50 else 0)]
    for year in years:
        try:
            return date(year, month, day)
        except ValueError:
            continue
    return None


def _field(kind: str, old: str, new: date, padded: bool) -> str:
    if kind == "year":
        return f"{new.year:04d}"
    if kind == "short":
        return f"{new.year % 100:02d}"
    if kind == "name":
        name = MONTHS[new.month - 1]
        return cased(old, name if old.lower() in MONTHS else name[:3])
    if kind == "weekday":
        name = WEEKDAYS[new.weekday()]
        return cased(old, name if old.lower() in WEEKDAYS else name[:3])
    if kind == "nth":
        return {1: "st", 2: "nd", 3: "rd"}.get(new.day % 10 if new.day not in (11, 12, 13) else 0, "th")
    number = new.month if kind == "month" else new.day
    return f"{number:02d}" if padded else str(number)
