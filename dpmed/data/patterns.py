"""Identifiers that their form gives away: numbers with check digits, dates, numbers behind a key word, titled names.

A pattern is a regular expression and, where the form has rules (check digits, months, number ranges), a check of them.
Every repetition is bounded, so that the time is linear in the text, whatever the text. What patterns cannot see: names
without a title, places without a form, anything that is written as prose. Measured: docs/identifiers.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from dpmed.data.identifiers import Span


@dataclass(frozen=True, slots=True)
class Pattern:
    """A form of identifiers. Where `regex` has a group "value", that is the identifier, else the whole match is."""

    type: str
    regex: re.Pattern[str]
    check: Callable[[re.Match[str]], bool] = bool


def pattern_spans(text: str) -> list[Span]:
    """The identifiers in `text` that a pattern finds, as spans of source "pattern".

    Returns: sorted by start, none overlapping: of those that do, the one whose pattern stands first in `PATTERNS`.
    """
    taken = bytearray(len(text))
    spans: list[Span] = []
    for pattern in PATTERNS:
        group = "value" if "value" in pattern.regex.groupindex else 0
        for match in pattern.regex.finditer(text):
            start, end = match.span(group)
            if not any(taken[start:end]) and pattern.check(match):
                taken[start:end] = b"\1" * (end - start)
                spans.append({"start": start, "end": end, "type": pattern.type, "source": "pattern"})
    return sorted(spans, key=lambda span: span["start"])


# --- Rules ------------------------------------------------------------------------------------------------------------


def is_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of cards and provider numbers (ISO/IEC 7812-1)."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return bool(digits) and sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def is_npi(digits: str) -> bool:
    """Whether these are a US provider number: ten digits from 1 or 2, with a check digit over the prefix 80840."""
    return len(digits) == 10 and digits[0] in "12" and is_luhn("80840" + digits)


def is_vin(code: str) -> bool:
    """Whether the ninth of 17 characters is a vehicle's check digit (49 CFR 565.15)."""
    letters = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", (*range(1, 9), *range(1, 6), 7, 9, *range(2, 10)), strict=True))
    weights = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
    values = [int(sign) if sign.isdigit() else letters.get(sign, -1) for sign in code.upper()]
    if len(values) != len(weights) or -1 in values:
        return False
    rest = sum(value * weight for value, weight in zip(values, weights, strict=True)) % 11
    return code[8].upper() == ("X" if rest == 10 else str(rest))


def is_iban(code: str) -> bool:
    """Whether the check digits of an international bank account number hold (ISO 13616)."""
    return int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1


def is_day(first: int, second: int) -> bool:
    """Whether two numbers are a month and a day, in either order."""
    low, high = sorted((first, second))
    return 1 <= low <= 12 and high <= 31


def _digits(text: str) -> str:
    return "".join(sign for sign in text if sign.isdigit())


def _numeric_day(match: re.Match[str]) -> bool:
    return is_day(int(match["a"]), int(match["b"]))


_DATE_LIKE = re.compile(r"(?:\d{1,2}[-. ]\d{1,2}[-. ](?:19|20)?\d{2}|(?:19|20)\d{2}[-. ]\d{1,2}[-. ]\d{1,2})")

_YEAR_OR_AMOUNT = re.compile(r"(?:19|20)\d{2}|\d+(?:m|c|k)?(?:g|l|m|h|iu|units?)", re.IGNORECASE)


def _dialled(match: re.Match[str]) -> bool:
    return not _DATE_LIKE.fullmatch(match["value"])


def _card(match: re.Match[str]) -> bool:
    digits = _digits(match[0])
    return digits[0] in "3456" and is_luhn(digits)


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text.count(":") != 2 or "::" not in text  # "::" and "a::b" stand in code and ratios too


def _code(match: re.Match[str]) -> bool:
    """Whether what stands behind a key word is a number or code, and no year, date or amount."""
    value = match["value"]
    n_digits = len(_digits(value))
    if n_digits < 3 or _DATE_LIKE.fullmatch(value) or _YEAR_OR_AMOUNT.fullmatch(value):
        return False
    return bool(match["marked"]) or match["key"].upper() in _SURE_KEYS or (n_digits < len(value) and n_digits > 3)


def _written_month(match: re.Match[str]) -> bool:
    """ "may" and "mar" are months only with a capital or a year."""
    return match["month"] not in ("may", "mar") or bool(match["year"])


def _named(match: re.Match[str]) -> bool:
    """Whether a hospital has a name of its own: not "Outpatient Clinic"."""
    return any(word.strip(".").lower() not in _NO_NAME for word in match["value"].split()[:-1])


# --- Parts of expressions ---------------------------------------------------------------------------------------------

_MONTH = (
    "(?P<month>Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|"
    r"Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_YEAR = r"(?:(?:19|20)\d{2}|['’]\d{2})"
_DAY = r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
_BEFORE = r"(?<![\w/.-])"
_AFTER = r"(?![\w/-]|\.\d)"

_UPPER = "[A-ZÀ-ÖØ-Þ]"
_NAME = (
    rf"(?:(?:de|la|van|von|der|den|del|di|al|el|bin)\s){{0,3}}{_UPPER}(?:\.|[\w'’-]{{1,30}})"
    rf"(?:\s(?:{_UPPER}\.|{_UPPER}[\w'’-]{{0,30}})){{0,2}}"
)
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr(?!\\.?\\s[A-Z])|Court|Ct|Place|Pl|Terrace|Way|Circle|"
    "Cir|Highway|Hwy|Parkway|Pkwy|Square|Trail"
)
_STATES = (
    "A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY]"
    "|Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|"
    "Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|Montana|"
    "Nebraska|Nevada|Hampshire|Jersey|Mexico|York|Carolina|Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|Island|Tennessee|"
    "Texas|Utah|Vermont|Virginia|Washington|Wisconsin|Wyoming"
)
_GENERIC = """
    a an the this that our my his her their at in from to of and for on by local community general regional emergency
    outpatient inpatient pain diabetes cancer heart eye children's children’s day city county state memorial medical med
    health mental rehabilitation surgical primary urgent specialty sleep wound anticoagulation coumadin university
    teaching private public veterans oncology cardiology neurology renal dialysis walk-in free follow-up memory medicine
    academic pulmonary fertility
"""
_NO_NAME = frozenset(_GENERIC.split())

# --- Numbers behind a key word ----------------------------------------------------------------------------------------

_KEYS = {
    "SSN": "SSN|SS|social security",
    "MRN": "MRN|EMR|medical record|med ?rec|MR|chart|hospital",
    "HEALTH_PLAN": r"policy|insurance|insur|ins|health plan|medicare|medicaid|member|subscriber|beneficiary|HICN|MBI",
    "ACCOUNT": "account|acct|a/c",
    "LICENSE": r"licen[cs]e|certificate|DEA|NPI",
    "VEHICLE": "VIN|licen[cs]e plate|plate",
    "DEVICE": "serial|device|implant|UDI",
    "ID": r"ID|identifier|case|accession|specimen|passport|encounter|claim|reference|ref|requisition|record|study|code",
}
_SURE_KEYS = frozenset(("MRN", "SSN", "HICN", "MBI", "NPI", "VIN", "DEA", "UDI"))
_MARK = r"(?:ID|identifier|number|num|nr|no|code|card|plan|policy|record|beneficiary|serial)\b\.?|[#:=]"


def _keyed(kind: str) -> Pattern:
    """A code of at least three digits behind a key word of its type, marked as a number unless the word is sure."""
    key = rf"\b(?P<key>{_KEYS[kind]})\b\.?\s{{0,2}}"
    marked = rf"(?P<marked>(?:(?:{_MARK})\s{{0,2}}){{0,6}})(?:(?:is|was)\s[#:]?)?"
    value = r"(?P<value>[A-Z0-9]{1,20}(?:-[A-Z0-9]{1,20}){0,5})\b"
    return Pattern(kind, re.compile(key + marked + value, re.IGNORECASE), _code)


def _dialled_after(kind: str, keys: str) -> Pattern:
    number = r"[+(]{0,2}\d(?:[ ().-]{0,2}\d){6,14}(?![\d/])"
    return Pattern(kind, re.compile(rf"\b(?:{keys})\b[^\d\n(+]{{0,20}}(?P<value>{number})", re.IGNORECASE), _dialled)


def _date(expression: str, check: Callable[[re.Match[str]], bool]) -> Pattern:
    return Pattern("DATE", re.compile(_BEFORE + expression + _AFTER, re.IGNORECASE), check)


PATTERNS: tuple[Pattern, ...] = (
    Pattern("EMAIL", re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")),
    Pattern("URL", re.compile(r"\b(?:(?:https?|ftp)://|www\.)[^\s<>\"]{1,2000}[^\s<>\".,;:!?)\]'’]", re.IGNORECASE)),
    Pattern(
        "IP", re.compile(r"(?<!EC )(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"), lambda match: _address(match[0])
    ),
    Pattern(
        "IP",
        re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{5,39}(?![\w:])"),
        lambda match: _address(match[0]),
    ),
    Pattern("VEHICLE", re.compile(r"\b[A-HJ-NPR-Z0-9]{17}\b"), lambda match: is_vin(match[0])),
    Pattern("ACCOUNT", re.compile(r"\b[A-Z]{2}\d{2}[A-Z0-9]{11,30}\b"), lambda match: is_iban(match[0])),
    Pattern("ACCOUNT", re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])"), _card),
    *map(_keyed, _KEYS),
    _dialled_after("FAX", "fax|facsimile"),
    _dialled_after("PHONE", "phone|telephone|tel|cell|mobile|pager|beeper|contact|call|reach|reached"),
    Pattern("SSN", re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")),
    Pattern(
        "PHONE",
        re.compile(
            r"(?<![\w+.-])(?:\+?1[-. ])?"
            r"(?:(?:\([2-9]\d{2}\) ?|[2-9]\d{2}-)\d{3}-\d{4}|[2-9]\d{2}([. ])[2-9]\d{2}\1\d{4})"
            r"(?:\s?(?:x|ext\.?)\s?\d{1,6})?(?![\w-])"
        ),
    ),
    Pattern("PHONE", re.compile(r"(?<![\w+])\+\d{1,3}(?:[ ().-]{0,2}\d){6,13}(?!\d)")),
    Pattern("LICENSE", re.compile(r"(?<![\w-])\d{10}(?![\w-])"), lambda match: is_npi(match[0])),
    _date(r"(?P<a>\d{1,2})([/-])(?P<b>\d{1,2})\2(?:\d{4}|\d{2})", _numeric_day),
    _date(r"(?P<a>\d{1,2})\.(?P<b>\d{1,2})\.(?:19|20)\d{2}", _numeric_day),
    _date(r"(?:19|20)\d{2}([/.-])(?P<a>\d{1,2})\1(?P<b>\d{1,2})(?:T\d{2}:\d{2}(?::\d{2})?Z?)?", _numeric_day),
    _date(rf"{_MONTH}[\s-]{{0,2}}{_DAY}(?:\s?[–-]\s?{_DAY})?(?:,?[\s-]{{0,2}}(?P<year>{_YEAR}))?", _written_month),
    _date(rf"{_DAY}[\s-]{{1,2}}(?:of\s)?{_MONTH}(?:,?[\s-]{{0,2}}(?P<year>{_YEAR}))?", _written_month),
    _date(rf"{_MONTH},?(?:\sof)?[\s-]{{0,2}}(?P<year>{_YEAR})", _written_month),
    _date(r"(?P<a>\d{1,2})/(?P<b>(?:19|20)\d{2})", lambda match: 1 <= int(match["a"]) <= 12),
    Pattern(
        "DATE",
        re.compile(
            r"\b(?:on|since|until|dated|from)\s(?P<value>(?P<a>\d{1,2})/(?P<b>\d{1,2}))(?![\w/]|\.\d)", re.IGNORECASE
        ),
        _numeric_day,
    ),
    Pattern("ZIP", re.compile(rf"\b(?:{_STATES})[,.]?\s{{1,2}}(?P<value>\d{{5}}(?:-\d{{4}})?)(?![\w-])")),
    Pattern(
        "ADDRESS",
        re.compile(
            rf"(?<![\w.-])\d{{1,6}}[A-Z]?\s(?:[NSEW]{{1,2}}\.?\s)?(?:{_UPPER}[\w'’-]{{0,30}}\.?\s){{1,4}}(?:{_STREETS})\b\.?"
            r"(?:,?\s(?:Apt|Apartment|Suite|Ste|Unit|Room|#)\.?\s?\w{1,6})?"
        ),
    ),
    Pattern("ADDRESS", re.compile(r"\bP\.?\s?O\.?\sBox\s\d{1,8}\b", re.IGNORECASE)),
    Pattern(
        "AGE_OVER_89", re.compile(r"(?<![\w.-])(?:9\d|1[0-2]\d)(?=[\s-]{0,2}(?:years?|yrs?|y/?o|y\.o\.|y)\b)", re.I)
    ),
    Pattern(
        "AGE_OVER_89",
        re.compile(r"\bage[sd]?:?\s(?:of\s)?(?P<value>9\d|1[0-2]\d)(?![\w%]|\s?(?:day|week|month))", re.I),
    ),
    Pattern("DOCTOR", re.compile(rf"\b(?:Dr|Prof)\b\.?\s{{1,2}}(?P<value>{_NAME})")),
    Pattern("NAME", re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Mx)\b\.?\s{{1,2}}(?P<value>{_NAME})")),
    Pattern(
        "HOSPITAL",
        re.compile(
            rf"\b(?P<value>(?:{_UPPER}[\w'’-]{{0,30}}\.?\s){{1,4}}(?:Hospital|Clinic|Infirmary|Hospice|"
            r"(?:Medical|Med|Health|Cancer)\s[Cc]ent(?:er|re)))\b"
        ),
        _named,
    ),
)
"""All patterns, in the order in which they claim text."""
