"""Find known values in text: a million identifiers at once, whatever their case, accents' spelling or white space.

One Aho-Corasick automaton (pyahocorasick) runs over a folded copy of the text; what it finds is mapped back to offsets
of the text as given, because folding changes lengths ("ß" becomes "ss", a decomposed "é" one character).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import ahocorasick

# A run of white space, or what case folding and composition may change: a run of other characters than ASCII, with the
# character before it, which a first combining accent may belong to.
_IRREGULAR = re.compile(r"\s\s+|[\x00-\x7f]?[^\x00-\x7f\s]+")

_BLANKS = re.compile("  +")

# Signs that differ in print and not in meaning, one character each: offsets do not move.
_ALIKE = (
    {ord(space): " " for space in "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"}
    | {code: " " for code in range(0x2000, 0x200B)}
    | {code: "-" for code in (*range(0x2010, 0x2016), 0x2212)}
    | {0x2018: "'", 0x2019: "'"}
)
_ASCII = bytes(ord(_ALIKE.get(code, chr(code)).lower()) for code in range(128)) + bytes(range(128, 256))


class Match(NamedTuple):
    """Where a value stands: `start` and `end` (exclusive) count characters of the text as given."""

    start: int
    end: int
    index: int
    """Which of the values; of those that are the same once folded, the first."""


class KnownValues:
    """Values to look for, made once and used on many texts.

    Two spellings are the same value if they differ only in case, in how accents are composed, in typographic quotes and
    dashes, or in the length and kind of white space. Blank values are never found.

    Args:
        values: what to look for; kept only in folded form.
        types: the type of each value, as many as there are values; `types[match.index]` is a match's.

    Raises: ValueError if `types` is not as long as `values`.
    """

    def __init__(self, values: Sequence[str], types: Sequence[str]) -> None:
        if len(values) != len(types):
            raise ValueError(f"{len(values)} values but {len(types)} types")
        self.types = list(types)
        self._lengths: list[int] = []
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for index, value in enumerate(values):
            folded = _folded(value)[0].strip()
            self._lengths.append(len(folded))
            if folded and folded not in self._automaton:
                self._automaton.add_word(folded, index)
        self._n_values = len(self._automaton)
        if self._n_values:
            self._automaton.make_automaton()

    def __len__(self) -> int:
        """How many different values there are."""
        return self._n_values

    def find(self, text: str) -> list[Match]:
        """All values in `text`, sorted by start, none overlapping: of those that do, the first, then the longest.

        A value is found only as whole words: no letter, digit, underscore or combining accent of the text may go on
        where a word of the value begins or ends.

        Cost: linear in the text; 1 million values: benchmarks/speed/results/matching.json.
        """
        if not self._n_values:
            return []
        folded, breaks, shifts = _folded(text)
        lengths = self._lengths
        found: list[tuple[int, int, int]] = []
        for last, index in self._automaton.iter(folded):
            start = last + 1 - lengths[index]
            if not (_goes_on(folded, start) or _goes_on(folded, last + 1)):
                found.append((start, -last - 1, index))
        found.sort()
        result: list[Match] = []
        free_from = 0
        for start, minus_end, index in found:
            if start >= free_from:
                free_from = -minus_end
                result.append(Match(start, free_from, index))
        if len(breaks) == 1:
            return result
        return [Match(_original(m.start, breaks, shifts), _original(m.end, breaks, shifts), m.index) for m in result]


def _folded(text: str) -> tuple[str, list[int], list[int]]:
    """The text in the form in which values are compared, and how to go back.

    Returns: the folded text; the folded offsets, increasing from 0, from which on a shift holds; and those shifts,
    which added to a folded offset give the text's.
    """
    if text.isascii():
        return _with_single_blanks(text.encode("ascii").translate(_ASCII).decode("ascii"))
    plain = text.casefold().translate(_ALIKE)
    if len(plain) == len(text) and _composed(text) and _composed(plain):
        return _with_single_blanks(plain)
    breaks, shifts = [0], [0]
    parts: list[str] = []
    done = n_folded = 0

    def add(part: str, n_original: int) -> None:
        nonlocal done, n_folded
        parts.append(part)
        done += n_original
        n_folded += len(part)
        if done - n_folded != shifts[-1]:
            breaks.append(n_folded)
            shifts.append(done - n_folded)

    for irregular in _IRREGULAR.finditer(text):
        start, end = irregular.span()
        add(_simple(text[done:start]), start - done)
        if text[start].isspace() and text[end - 1].isspace():
            add(" ", end - start)
            continue
        for cluster in _clusters(irregular.group()):
            composed = unicodedata.normalize("NFC", cluster).casefold()
            add(_simple(unicodedata.normalize("NFC", composed)), len(cluster))
    add(_simple(text[done:]), len(text) - done)
    return "".join(parts), breaks, shifts


def _with_single_blanks(plain: str) -> tuple[str, list[int], list[int]]:
    """As `_folded`, where nothing but runs of blanks changes a length."""
    breaks, shifts = [0], [0]
    if "  " not in plain:
        return plain, breaks, shifts
    parts: list[str] = []
    done = shift = 0
    for run in _BLANKS.finditer(plain):
        start, end = run.span()
        parts.append(plain[done : start + 1])
        breaks.append(start + 1 - shift)
        shift += end - start - 1
        shifts.append(shift)
        done = end
    parts.append(plain[done:])
    return "".join(parts), breaks, shifts


def _simple(part: str) -> str:
    """Fold what keeps its length."""
    return part.lower().translate(_ALIKE) if part.isascii() else part.translate(_ALIKE)


def _clusters(part: str) -> list[str]:
    """Cut where composing cannot reach across; a part whose folding changes no length is one cluster."""
    folded = part.casefold()
    if len(folded) == len(part) and _composed(part) and _composed(folded):
        return [part]
    result: list[str] = []
    for character in part:
        if result and _continues(character):
            result[-1] += character
        else:
            result.append(character)
    return result


def _composed(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it: an accent or mark, or a Hangul vowel or final."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


def _goes_on(folded: str, offset: int) -> bool:
    """Whether a word, or a character with its accents, goes on across this offset."""
    if not 0 < offset < len(folded):
        return False
    after = folded[offset]
    if after > "\x7f" and _continues(after):
        return True
    before = folded[offset - 1]
    return _is_of_word(after) and (_is_of_word(before) or (before > "\x7f" and _continues(before)))


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _original(offset: int, breaks: list[int], shifts: list[int]) -> int:
    return offset + shifts[bisect_right(breaks, offset) - 1]
