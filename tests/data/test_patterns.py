"""The checked patterns: what each finds, what it must leave alone, and that no text makes them slow."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmed.data.identifier_types import IDENTIFIER_TYPES
from dpmed.data.patterns import PATTERNS, is_day, is_iban, is_luhn, is_npi, is_vin, pattern_spans


def found(text: str) -> list[tuple[str, str]]:
    return [(span["type"], text[span["start"] : span["end"]]) for span in pattern_spans(text)]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("write to j.doe-2@mail.example.org.", "EMAIL", "j.doe-2@mail.example.org"),
        ("see https://portal.example.org/p?id=7).", "URL", "https://portal.example.org/p?id=7"),
        ("at www.example.org, today", "URL", "www.example.org"),
        ("from 192.0.2.17.", "IP", "192.0.2.17"),
        ("from 2001:db8::7 again", "IP", "2001:db8::7"),
        ("car 1M8GDM9AXKP042788 hit", "VEHICLE", "1M8GDM9AXKP042788"),
        ("paid by 4111 1111 1111 1111.", "ACCOUNT", "4111 1111 1111 1111"),
        ("to GB82WEST12345698765432", "ACCOUNT", "GB82WEST12345698765432"),
        ("Acct#: 998-877", "ACCOUNT", "998-877"),
        ("SSN 219-09-9999", "SSN", "219-09-9999"),
        ("born 1950, 219-09-9999", "SSN", "219-09-9999"),
        ("MRN: AB-00417", "MRN", "AB-00417"),
        ("MRN 004417,", "MRN", "004417"),
        ("medical record number is 771203", "MRN", "771203"),
        ("policy number H-77120", "HEALTH_PLAN", "H-77120"),
        ("insurance QX-789012 covers", "HEALTH_PLAN", "QX-789012"),
        ("License No: C1122", "LICENSE", "C1122"),
        ("license plate #8XYZ123", "VEHICLE", "8XYZ123"),
        ("provider 1234567893 signed", "LICENSE", "1234567893"),
        ("pacemaker serial no. PX-55012", "DEVICE", "PX-55012"),
        ("patient ID #90121", "ID", "90121"),
        ("Phone: 555-0142", "PHONE", "555-0142"),
        ("call her at (415) 555-0142 ext. 12", "PHONE", "(415) 555-0142"),
        ("on 415-555-0142 x12 today", "PHONE", "415-555-0142 x12"),
        ("415.555.0142", "PHONE", "415.555.0142"),
        ("from +49 30 901820 now", "PHONE", "+49 30 901820"),
        ("fax records to 415-555-0142", "FAX", "415-555-0142"),
        ("on 03/14/2021.", "DATE", "03/14/2021"),
        ("on 14.03.2021,", "DATE", "14.03.2021"),
        ("2021-03-14T10:30", "DATE", "2021-03-14T10:30"),
        ("On Mar. 3rd, 2021 he", "DATE", "Mar. 3rd, 2021"),
        ("since 5th of november 2020", "DATE", "5th of november 2020"),
        ("14-Mar-2021", "DATE", "14-Mar-2021"),
        ("Jan 9th '23", "DATE", "Jan 9th '23"),
        ("in March 2021", "DATE", "March 2021"),
        ("in 03/2021", "DATE", "03/2021"),
        ("seen on 3/14 again", "DATE", "3/14"),
        ("Boston, MA 02115", "ZIP", "02115"),
        ("Austin, Texas 78701-1234", "ZIP", "78701-1234"),
        ("lives at 12 Old Mill Rd, Apt 4", "ADDRESS", "12 Old Mill Rd, Apt 4"),
        ("P.O. Box 771", "ADDRESS", "P.O. Box 771"),
        ("a 94-year-old man", "AGE_OVER_89", "94"),
        ("aged 101", "AGE_OVER_89", "101"),
        ("seen by Dr. J. O'Neil today", "DOCTOR", "J. O'Neil"),
        ("Mrs. de la Cruz", "NAME", "de la Cruz"),
        ("from St. Example's Hospital", "HOSPITAL", "St. Example's Hospital"),
    ],
)
def test_finds(text: str, kind: str, value: str) -> None:
    assert (kind, value) in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "BP 120/80, strength 4/5, murmur 2/6, saturation 98 % on 2 L",
        "a 54-year-old man, 92 kg, 95 mg twice a day, score 10/10",
        "may 10 be enough? He may 2 days later return",
        "mar 4 in 5",
        "dates 13/14/2021, 2021-31-31 and 32.01.2021",
        "area 900-12-3456, 666-12-3456 and 000-12-3456",
        "card 4111 1111 1111 1112",
        "car 1M8GDM9A1KP042788",
        "NPI-like 1234567890",
        "address 300.1.2.3 and ratio 10:30:45",
        "enzyme EC 3.1.1.11",
        "policy of 2021; case 12; record was 100; chart shows 450 ml",
        "outpatient clinic, the Emergency Hospital, Day Clinic",
        "the doctor called 911 in 2019",
        "in 2021 we saw",
        "level was 1.2.3 and 5.6.78",
    ],
)
def test_leaves_alone(text: str) -> None:
    assert found(text) == []


def test_a_sure_form_is_not_read_as_another() -> None:
    assert found("fax 415-555-0142, phone 415-555-0143") == [("FAX", "415-555-0142"), ("PHONE", "415-555-0143")]
    assert found("contact on 2021-03-14") == [("DATE", "2021-03-14")]
    assert found("MRN 219-09-9999") == [("MRN", "219-09-9999")]
    assert found("12 Main St, Boston, MA 02115") == [("ADDRESS", "12 Main St"), ("ZIP", "02115")]


def test_offsets_count_characters_after_any_letter() -> None:
    assert found("Übelkeit – 😀 MRN 00417 – Ärztin") == [("MRN", "00417")]


@given(digits=st.text("0123456789", min_size=1, max_size=18))
def test_exactly_one_check_digit_satisfies_luhn(digits: str) -> None:
    assert sum(is_luhn(digits + str(last)) for last in range(10)) == 1


def test_check_digits_of_published_examples() -> None:
    assert is_luhn("79927398713") and is_npi("1234567893") and is_iban("GB82WEST12345698765432")
    assert is_vin("1M8GDM9AXKP042788") and is_vin("11111111111111111")
    assert not is_luhn("79927398710") and not is_npi("3234567893") and not is_iban("GB82WEST12345698765431")
    assert not is_vin("1M8GDM9AXKP04278") and not is_vin("1M8GDM9AXKP04278O") and not is_vin("1M8GDM9A0KP042788")
    assert not is_luhn("")


def test_day_and_month_in_either_order() -> None:
    assert is_day(2, 31) and is_day(31, 2) and not is_day(13, 14) and not is_day(0, 5) and not is_day(1, 32)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("MRN: 12/-.@#+(March)St'’"), st.characters()), max_size=80))
def test_spans_of_any_text_are_sorted_and_apart(text: str) -> None:
    spans = pattern_spans(text)
    assert all(one["end"] <= other["start"] for one, other in pairwise(spans))
    assert all(0 <= span["start"] < span["end"] <= len(text) and span["source"] == "pattern" for span in spans)


TOKENS = "1 1- a a. a@ a@a. A. ID# (1 http:// www. www., : f: 1/ 12/12/ A- ' é 9 é1- (((( 1.1. -1"
WORDS = ["", "1", "A", "Aa", "St", "Mar", "MRN", "id no", "phone", "+1", "1 Aa", "Dr.", "de la", "P O"]


@pytest.mark.parametrize("piece", [*TOKENS.split(), *(f"{word} " for word in WORDS)])
def test_time_is_linear_whatever_the_text(piece: str) -> None:
    text = piece * (60_000 // len(piece))
    start = time.process_time()
    pattern_spans(text)
    assert time.process_time() - start < 3  # takes a tenth; a quadratic pattern takes minutes


def test_every_pattern_is_of_a_type_of_the_taxonomy() -> None:
    assert {pattern.type for pattern in PATTERNS} <= set(IDENTIFIER_TYPES)
