"""Written dates: read as a slow loop over strptime reads them, and no written part survives a shift."""

from __future__ import annotations

import random
from datetime import date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmed.data.written_dates import draw_shift, shift_beyond, written_dates

FORMS = ("%m/%d/%Y", "%Y-%m-%d", "%d.%m.%Y", "%B %d, %Y", "%d %b %Y", "%d-%B-%Y", "%Y%m%d", "%d%b%Y", "%m/%d/%y")
DAYS = st.dates(date(1900, 1, 1), date(2099, 12, 31))


@pytest.mark.parametrize("form", FORMS)
@given(day=DAYS, days=st.integers(-20_000, 20_000))
def test_a_day_is_written_again_in_its_own_form(form: str, day: date, days: int) -> None:
    if form == "%d.%m.%Y" and day.day <= 12:
        day = day.replace(day=13)  # month first, unless only day first makes a date
    if form == "%m/%d/%y":
        day = day.replace(year=1970 + day.year % 70, day=min(day.day, 28))
        days %= 300  # two digits of a year
    if "%b" in form and day.month == 5:
        day = day.replace(month=4, day=min(day.day, 30))  # "May" is the whole name too
    if "%b" in form and (day + timedelta(days=days)).month == 5:
        days += 31
    text = f"seen {day.strftime(form)}, again"
    (found,) = written_dates(text)
    assert text[found.start : found.end] == day.strftime(form)
    assert found.day == day and found.exact is (form != "%m/%d/%y")
    assert datetime.strptime(found.shifted(days), form).date() == day + timedelta(days=days)


CASES = [
    ("March 3, 2019", 1, "March 4, 2019"),
    ("3rd of March 2019", -1, "2nd of March 2019"),
    ("MARCH 3rd", 8, "MARCH 11th"),
    ("Sept. 1st, 2020", 30, "Oct. 1st, 2020"),
    ("may 1", 20, "may 21"),
    ("Mar '19", 31, "Apr '19"),
    ("03/2019", 31, "04/2019"),
    ("3/4", 7, "3/11"),
    ("03/04", 7, "03/11"),
    ("2019-03-04T10:30:00Z", 1, "2019-03-05"),
    ("2019", 365, "2020"),
    ("Mon", 1, "Tue"),
    ("THURSDAY", 3, "SUNDAY"),
    ("Feb 29", 1, "Mar 01"),
    ("31/12/2020", 1, "01/01/2021"),
]


@pytest.mark.parametrize(("text", "days", "wanted"), CASES)
def test_forms_that_strptime_does_not_know(text: str, days: int, wanted: str) -> None:
    (found,) = written_dates(text)
    assert found.shifted(days) == wanted


@pytest.mark.parametrize(
    "text", ["winter", "12/31/9999", "31/31/2020", "02/30/2019", "10:30", "maybe", "marching", "5"]
)
def test_what_is_no_day_is_not_read(text: str) -> None:
    assert written_dates(text) == []


def test_a_range_is_two_dates() -> None:
    assert [d.day for d in written_dates("3/4/2019 - 3/8/2019")] == [date(2019, 3, 4), date(2019, 3, 8)]


PARTS = ("%m/%d/%Y", "%B %Y", "%B", "%Y", "%A", "%m/%d", "%B %d", "%b '%y", "%m/%Y")


@given(day=DAYS, seed=st.integers(0, 10**6), years=st.integers(1, 30))
def test_no_written_part_survives_a_drawn_shift(day: date, seed: int, years: int) -> None:
    shift = draw_shift(random.Random(seed), years=years)
    assert abs(shift) > 365
    for form in PARTS:
        text = day.strftime(form)
        (found,) = written_dates(text)
        assert found.shifted(shift) != text, form


@given(days=st.lists(DAYS, min_size=1, max_size=5), last=DAYS, seed=st.integers(0, 10**6))
def test_a_shift_beyond_leaves_the_last_day_behind(days: list[date], last: date, seed: int) -> None:
    shift = shift_beyond(random.Random(seed), days, last)
    assert all(day + timedelta(days=shift) > last for day in days)
