"""What identifies a patient in a text: known spans, the words that spread from them, and rare words.

Two rules of arXiv 2501.02407 (SANI) turn the spans that a data set brings into spans that cover its text: a word that
is part of an identifier in at least half of its occurrences is one everywhere (a tie keeps it), and a word that stands
in the records of fewer than k patients points to them, whatever it means. Nothing here returns or logs a value.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset

from dpmed.data.records import SPAN_SOURCES, record_features
from dpmed.errors import InputError

Span = dict[str, Any]
"""{"start": int, "end": int, "type": str, "source": one of `SPAN_SOURCES`}."""

# A letter, digit or underscore with its combining accents: decomposed "é" must not cut a word in two.
_WORD = re.compile(r"(?:\w[\u0300-\u036f]*)+")

_GRAMMAR = """
    a about after again all also an and any are as at be because been before being below between both but by can
    could did do does during each few for from had has have having he her here hers him his how i if in into is it its
    just me more most my no nor not now of off on once only or other our out over own same she should so some such than
    that the their them then there these they this those through to too under until up upon us very was we were what
    when where which while who why will with within without would you your
"""
FUNCTION_WORDS = frozenset(_GRAMMAR.split())
"""English words that carry grammar only: never identifiers, however often a span holds them ("Hospital of the ...")."""

_CLINICAL = """
    abdomen abdominal abnormal acute admission admitted adult age aged allergies allergy anemia antibiotic
    antibiotics anxiety arm artery aspirin assessment asthma bilateral biopsy bleeding blood bone bowel brain breast
    breath cancer cardiac care chest child chronic clinic clinical complaint condition cough culture daily day days
    denies depression diabetes diagnosed diagnosis diarrhea diet discharge discharged disease distress doctor dose
    dyspnea edema elevated emergency evaluation exam examination family fatigue female fever findings follow followup
    fracture gastric glucose head headache heart hepatic history home hospital hours hypertension hypotension imaging
    impression infection injury insulin intact kidney laboratory labs left leg lesion lesions liver lower lung lungs
    male man mass medical medication medications mild milligrams moderate month months nausea neck negative neurologic
    normal note nurse nursing oral pain patient patients physical physician plan pneumonia positive presented pressure
    prior procedure pulmonary pulse radiology record renal reported reports respiratory result results right seizure
    sepsis severe shortness skin soft stable status stroke surgery surgical symptoms syndrome temperature tenderness
    therapy times tissue tolerated treated treatment tumor ultrasound unit unremarkable upper urinary urine valve
    vital vitals vomiting ward week weeks weight woman wound year years
    address birth born dob dr fax mr mrn mrs ms phone ssn
"""
PROTECTED_WORDS = frozenset(_CLINICAL.split()) | FUNCTION_WORDS
"""Common clinical words, and words that stand before identifiers, which never count as one: in a small data set "fever"
and "MRN" are rare too."""


def tag_identifiers(
    records: Dataset, *, k: int = 2, indirect: bool = True, protected: frozenset[str] = PROTECTED_WORDS
) -> Dataset:
    """Extend the `identifiers` column of `records` (see `load_records`) over the whole text.

    1. Spans that are there stay, whatever their source; those that overlap are resolved as in `resolved_spans`.
    2. Majority: a word (casefolded) that stands inside planted or known spans in at least half of its occurrences in
       `records` becomes a span of source "known" at its other occurrences too, of the type it has most often.
    3. Indirect: a word in the records of fewer than `k` units that is alphabetic with at least 3 letters, or holds a
       digit, and is in no span yet, becomes a span of type "INDIRECT" and source "indirect".

    Function words, words of one character and `protected` words take part in neither 2 nor 3. A word is a run of
    letters, digits and underscores with its accents, so "O'Neil" is two and touching spans may stay separate.

    Args:
        records: units as loaded; with placeholder units rule 3 counts records instead of patients.
        k: at least 1; k = 1 finds no indirect identifier.
        indirect: whether to apply rule 3.
        protected: words that never count, in any case.

    Guarantee: spans of a record are sorted by start and do not overlap; other columns and the row order stay.
    Raises: InputError if k < 1.
    Reference: arXiv 2501.02407 (words in fewer than k = 2 patients; majority vote in which a tie keeps).
    """
    if k < 1:
        raise InputError(f"k is {k}: the number of patients below which a word identifies must be at least 1")
    skipped = {word.casefold() for word in protected} | FUNCTION_WORDS
    texts, units = list(records["text"]), list(records["unit"])
    spans = [resolved_spans(text, found) for text, found in zip(texts, records["identifiers"], strict=True)]
    labels: dict[str, tuple[str, str]] = {}
    if indirect:
        labels = {word: ("INDIRECT", "indirect") for word in _rare_words(texts, units, k, skipped)}
    labels |= {word: (kind, "known") for word, kind in _voted_types(texts, spans, skipped).items()}
    # Words are cut anew in each pass: kept, those of a hospital's notes would need tens of gigabytes.
    spans = [_filled(_words(text, skipped), found, labels) for text, found in zip(texts, spans, strict=True)]
    return with_spans(records, spans)


def with_spans(records: Dataset, spans: Sequence[Sequence[Span]]) -> Dataset:
    """`records` with other `identifiers`: one list of spans a record, in the order of the rows."""
    columns = {name: list(records[name]) for name in records.column_names} | {"identifiers": list(spans)}
    features = records.features.copy()
    features["identifiers"] = record_features()["identifiers"]
    return Dataset.from_dict(columns, features=features)


def resolved_spans(text: str, spans: Iterable[Span]) -> list[Span]:
    """Spans of one text that do not overlap, whatever found them; each keeps its source.

    Overlapping spans of one source become one, of the longest one's type. Where spans of two sources overlap, the surer
    source (`SPAN_SOURCES`) keeps its span whole and the other what is left of it, if that holds a letter or digit.
    So no pattern or model can move an identifier out of the headline, or into it.

    Returns: sorted by start. Spans that only touch stay apart.
    """
    result: list[Span] = []
    by_source: dict[str, list[Span]] = {}
    for span in spans:
        by_source.setdefault(span["source"], []).append(span)
    for source in sorted(by_source, key=SPAN_SOURCES.index):
        left = [piece for span in _merged(by_source[source]) for piece in _left_of(span, result, text)]
        result = sorted([*result, *left], key=lambda span: span["start"])
    return result


def identifier_counts(records: Dataset) -> dict[str, dict[str, int]]:
    """Number of spans by source and type, both sorted; holds no values, so it may be shown and stored."""
    counts = Counter((span["source"], span["type"]) for spans in records["identifiers"] for span in spans)
    result: dict[str, dict[str, int]] = {}
    for (source, kind), count in sorted(counts.items()):
        result.setdefault(source, {})[kind] = count
    return result


_Word = tuple[int, int, str, bool]
"""Start, end, casefolded word, and whether it is long enough to be an indirect identifier."""


def _words(text: str, skipped: set[str]) -> list[_Word]:
    found: list[_Word] = []
    for match in _WORD.finditer(text):
        word = match.group()
        # Composing before and after casefolding makes the spellings of "é" one word, in either case.
        key = word.casefold() if word.isascii() else unicodedata.normalize("NFC", _composed(word).casefold())
        if key not in skipped and len(_composed(word)) > 1:
            found.append((match.start(), match.end(), key, _is_candidate(word)))
    return found


def _composed(word: str) -> str:
    return word if word.isascii() else unicodedata.normalize("NFC", word)


def _is_candidate(word: str) -> bool:
    letters = [character for character in word if not unicodedata.combining(character)]
    return any(map(str.isdigit, letters)) or (len(letters) >= 3 and all(map(str.isalpha, letters)))


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans of one source sorted by start, those that overlap joined into one; spans that only touch stay apart."""
    result: list[Span] = []
    longest = 0
    for span in sorted(spans, key=lambda s: (s["start"], -s["end"])):
        length = span["end"] - span["start"]
        if not result or span["start"] >= result[-1]["end"]:
            result.append(dict(span))
            longest = length
            continue
        end = max(result[-1]["end"], span["end"])
        if length > longest:
            result[-1]["type"] = span["type"]
            longest = length
        result[-1]["end"] = end
    return result


def _left_of(span: Span, taken: Sequence[Span], text: str) -> list[Span]:
    """The parts of `span` that no span of `taken` (sorted, apart) covers; of a cut one those with a letter or digit."""
    pieces: list[Span] = []
    start, end = span["start"], span["end"]
    for other in taken:
        if start < other["end"] and other["start"] < end:
            pieces.append(span | {"start": start, "end": other["start"]})
            start = other["end"]
    if start == span["start"]:
        return [span]
    pieces.append(span | {"start": start})
    return [piece for piece in pieces if any(map(str.isalnum, text[piece["start"] : piece["end"]]))]


def _place(word: _Word, spans: Sequence[Span], at: int) -> int:
    """Index of the first span at or after `at` that ends after the word starts."""
    while at < len(spans) and spans[at]["end"] <= word[0]:
        at += 1
    return at


def _voted_types(texts: list[str], spans: list[list[Span]], skipped: set[str]) -> dict[str, str]:
    """Words of which at least half of the occurrences lie inside planted or known spans -> their most common type."""
    inside: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for text, found in zip(texts, spans, strict=True):
        at = 0
        for word in _words(text, skipped):
            start, end, key, _ = word
            total[key] += 1
            at = _place(word, found, at)
            if at == len(found) or found[at]["source"] not in ("planted", "known"):
                continue
            if found[at]["start"] <= start and end <= found[at]["end"]:
                inside.setdefault(key, Counter())[found[at]["type"]] += 1
    return {
        key: min(kinds, key=lambda kind: (-kinds[kind], kind))  # a tie goes to the first in the alphabet
        for key, kinds in inside.items()
        if 2 * kinds.total() >= total[key]
    }


def _rare_words(texts: list[str], units: list[str], k: int, skipped: set[str]) -> set[str]:
    """Words in the records of fewer than `k` units."""
    seen: dict[str, set[str]] = {}
    for text, unit in zip(texts, units, strict=True):
        for _, _, key, _ in _words(text, skipped):
            holders = seen.setdefault(key, set())
            if len(holders) < k:  # no more is needed to know that the word is not rare
                holders.add(unit)
    return {key for key, holders in seen.items() if len(holders) < k}


def _filled(words: list[_Word], spans: list[Span], labels: dict[str, tuple[str, str]]) -> list[Span]:
    """`spans` and, for each word in `labels` (word -> type, source) that touches none of them, a new span."""
    added: list[Span] = []
    at = 0
    for word in words:
        start, end, key, is_candidate = word
        if key not in labels or (labels[key][1] == "indirect" and not is_candidate):
            continue
        at = _place(word, spans, at)
        if at == len(spans) or spans[at]["start"] >= end:
            kind, source = labels[key]
            added.append({"start": start, "end": end, "type": kind, "source": source})
    return sorted([*spans, *added], key=lambda span: span["start"]) if added else spans
