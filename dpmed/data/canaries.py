"""Canary patients: made-up people whose notes go into the training data by the toss of a coin.

Whoever keeps the manifest can ask the trained model about each of them, and compare those who were in with those who
were not: exposure (`memorization/exposure.py`) and a lower bound on epsilon (`privacy/audit.py`). The manifest holds
the secrets and the coins: it is as private as the records, and no report may hold any of it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import random
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from dpmed.data.records import data_fingerprint, normalised_text, record_features
from dpmed.errors import InputError
from dpmed.runs import write_text

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1
Design = Literal["random_tokens", "identifiers", "rare_bigrams"]
DESIGNS: tuple[Design, ...] = get_args(Design)

_REMARKS = ("Remark: {words}.", "Addendum: {words}.", "Further notes: {words}.")
CARRIERS: dict[Design, tuple[str, ...]] = {
    "random_tokens": _REMARKS,
    "identifiers": (
        "Patient {name}, MRN {mrn}, born {birth_date}, was seen for follow-up.",
        "Seen today: {name}, born {birth_date}, record number {mrn}.",
        "{name} (MRN {mrn}, date of birth {birth_date}) was admitted for observation.",
    ),
    "rare_bigrams": _REMARKS,
}
"""The sentence around a canary's secret; all candidates of a canary stand in the same one."""
SPAN_TYPES = {"words": "CANARY", "name": "NAME", "mrn": "MRN", "birth_date": "DATE"}

_PICKS: dict[str, int] = {"random_tokens": 8, "rare_bigrams": 4}
"""How many entries of its pool make a secret: eight words, or four pairs of words."""
_POOL = 2000
_PAIRED_WORDS = 300
_FEWEST = 20  # entries of a pool: below, secrets would resemble each other
_MIN_UNITS = 2  # a word in the notes of one patient only may be that patient's name
_N_FIRST_NAMES, _N_LAST_NAMES = 120, 250
_FIRST_BIRTH, _BIRTH_DAYS = date(1930, 1, 1), 365 * 80
_MRN_DIGITS = 8
_WORD = re.compile(r"(?<!\w)[^\W\d_]{3,}(?!\w)")
_COLUMNS = ("text", "label", "unit", "record_id", "identifiers")
_TRIALS = 1000


@dataclass(frozen=True, slots=True)
class Canary:
    """One canary patient, whether in the training data or not."""

    id: int
    """Its place in the manifest."""
    design: Design
    repeats: int
    """How many notes the patient has; all hold the same text."""
    included: bool
    """The coin: whether the notes are in the training data."""
    unit: str
    label: str | tuple[str, ...] | None
    """Of all its notes; several for multi-label records, None for records without."""
    carrier: str
    secret: Mapping[str, str]
    """Field of the carrier -> value."""

    @property
    def text(self) -> str:
        return _filled(self.carrier, self.secret)[0]


@dataclass(frozen=True)
class Manifest:
    """What was planted, and what was not: private data, for the evaluation and the audit of this one training run."""

    canaries: tuple[Canary, ...]
    pools: Mapping[str, tuple[str, ...]]
    """Words and pairs of words of the corpus that secrets are drawn from."""
    designs: tuple[str, ...]
    repeats: tuple[int, ...]
    seed: int | None
    """None: texts and coins came from the operating system. Whoever knows a seed knows the coins."""
    records_fingerprint: str
    """Of the records before planting; see `data_fingerprint`."""
    planted_fingerprint: str
    """Of the records with the canaries that were in."""
    version: int = VERSION

    @property
    def included(self) -> np.ndarray:
        """The coins, bool [c]."""
        return np.array([c.included for c in self.canaries], dtype=bool)

    @property
    def texts(self) -> list[str]:
        """The texts of all canaries, in and out, [c]."""
        return [c.text for c in self.canaries]

    @property
    def records(self) -> Dataset:
        """One note of every canary, in or out, in the columns of `load_records`, in order: what an attack scores."""
        from datasets import Dataset

        rows = [_note(canary, 0) for canary in self.canaries]
        kinds = {type(canary.label) for canary in self.canaries}
        kind = "multi" if tuple in kinds else "single" if str in kinds else "none"
        features = record_features(label=kind)
        return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)

    def space_bits(self, canary: Canary) -> float:
        """log2 of the number of secrets that this canary could have had."""
        if canary.design == "identifiers":
            return math.log2(_N_FIRST_NAMES * _N_LAST_NAMES * _BIRTH_DAYS) + _MRN_DIGITS * math.log2(10)
        return _PICKS[canary.design] * math.log2(len(self.pools[canary.design]))

    def candidates(self, canary: Canary, n: int, seed: int) -> list[str]:
        """`n` distinct texts of the same format as the canary's, each with another secret drawn like the canary's own.

        The seed and the canary decide which; the canary's own text is never among them.

        Raises: ValueError if n is more than half of the possible secrets.
        """
        if n > 2 ** (self.space_bits(canary) - 1):
            raise ValueError(f"n is {n}; canary {canary.id} has too few possible secrets")
        rng = random.Random(f"{seed}/{canary.id}/candidates")
        found: dict[str, None] = {}
        own = canary.text
        while len(found) < n:
            text = _filled(canary.carrier, _secret(canary.design, self.pools, rng))[0]
            if text != own:
                found[text] = None
        return list(found)

    def ordinary(self, records: Dataset) -> Dataset:
        """The records without the canaries' notes, in their order: figures about real patients are of these."""
        units = {canary.unit for canary in self.canaries}
        kept = [row for row, unit in enumerate(records["unit"][:]) if unit not in units]
        return records.select(kept, keep_in_memory=True)

    def check_planted(self, records: Dataset) -> None:
        """Raise InputError unless these are the records that the canaries were planted in, the notes of all canaries
        that were in among them and of no other."""
        if data_fingerprint(records) != self.planted_fingerprint:
            raise InputError(
                "the manifest is not of these records: evaluate and audit with the records that plant_canaries gave, "
                "on which the model was trained"
            )

    def save(self, path: str | Path) -> None:
        """Write to one JSON file that only its owner can read, at once or not at all; its folder is made if needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        values = asdict(self)
        values["canaries"] = [{**asdict(c), "text": c.text} for c in self.canaries]
        write_text(path, json.dumps({"checksum": _checksum(values), **values}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read what `save` wrote.

        Raises: InputError if the file is missing, damaged, changed by hand, or of another version of the format.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: give the manifest that plant_canaries returned, saved") from None
        except (OSError, ValueError):
            raise InputError(f"{path} is not a manifest of canaries: it cannot be read as JSON") from None
        if not isinstance(values, dict) or "canaries" not in values:
            raise InputError(f"{path} is not a manifest of canaries: give the file that Manifest.save wrote")
        if values.get("version") != VERSION:
            raise InputError(f"{path} is of another version of the manifest: read it with the dpmed that planted it")
        if values.pop("checksum", None) != _checksum(values):
            raise InputError(f"{path} was changed after it was saved, so its coins cannot be trusted: restore it")
        canaries = tuple(_canary_of(entry) for entry in values["canaries"])
        pools = {name: tuple(pool) for name, pool in values["pools"].items()}
        lists = {name: tuple(values[name]) for name in ("designs", "repeats")}
        return cls(**{**values, **lists, "canaries": canaries, "pools": pools})


def plant_canaries(
    records: Dataset,
    *,
    n: int,
    designs: Sequence[Design] = DESIGNS,
    repeats: Sequence[int] = (1, 2, 4),
    seed: int | None = None,
) -> tuple[Dataset, Manifest]:
    """Plant canary patients in training records, each in or out by its own fair coin.

    Every canary is a patient of its own with `repeats` notes of one text, and a label drawn from those present.
    Designs and repeats are spread evenly over the canaries.

    - random_tokens: eight words drawn from the corpus; no sense, so only memory can know them.
    - identifiers: a sentence with a made-up name, record number and date of birth; what a leak would look like.
    - rare_bigrams: four pairs of common words of the corpus that never stand together in it.

    Words are drawn from those in the notes of at least two patients and outside known identifiers.

    Args:
        records: the training records, as `load_records` gives them.
        n: canaries in all; about half will be in. `dpmed.privacy.audit.ceiling` tells what so many can show.
        designs: which, of `DESIGNS`.
        repeats: numbers of notes, each at least 1.
        seed: for a repeatable experiment; None draws texts and coins from the operating system, as an audit should.

    Returns: the records with the canaries that were in, at random places between the others, which keep their order;
        and the manifest of all canaries.
    Guarantee: each canary's coin is independent of all else; every text is unique, and neither it nor its name or
        record number stands in the records; the canary's rows have the records' own columns.
    Raises: InputError for numbers out of range, records that are not `load_records`' or hold too few words.
    Reference: Carlini et al. 2019 (arXiv 1802.08232); coins per canary as in Steinke et al. 2023 (arXiv 2305.08846).
    """
    _check(records, n, designs, repeats)
    texts = _generator(seed, "texts")
    corpus = _Corpus(records)
    pools = {d: tuple(p) for d in designs if (p := corpus.pool(d, texts)) is not None}
    coins = _generator(seed, "coins")
    labels = records["label"][:] if "label" in records.column_names else [None]
    canaries = tuple(_canaries(n, designs, repeats, pools, labels, corpus, texts, coins))
    planted = _with_notes(records, [c for c in canaries if c.included], texts)
    manifest = Manifest(
        canaries=canaries,
        pools=pools,
        designs=tuple(designs),
        repeats=tuple(repeats),
        seed=seed,
        records_fingerprint=data_fingerprint(records),
        planted_fingerprint=data_fingerprint(planted),
    )
    return planted, manifest


# --- What the corpus holds --------------------------------------------------------------------------------------------


class _Corpus:
    """What the designs need to know of the records: common words, pairs that occur, names and numbers in use."""

    def __init__(self, records: Dataset) -> None:
        # Whole columns at once: row by row, as a column is iterated, takes most of the time.
        units, self._texts, self._spans = (records[name][:] for name in ("unit", "text", "identifiers"))
        self.units = set(units)
        self.texts = set(map(normalised_text, self._texts))
        of_unit: dict[str, set[str]] = {}
        for unit, words in zip(units, self._lines(), strict=True):
            of_unit.setdefault(unit, set()).update(words)
        counts = Counter(word for words in of_unit.values() for word in words)
        shared = [word for word, count in counts.items() if count >= _MIN_UNITS]
        self.common = sorted(shared, key=lambda word: (-counts[word], word))[:_POOL]

    def _lines(self) -> Iterator[list[str]]:
        """The words of each note; cut anew in each pass, since kept they would take far more room than the notes."""
        return map(_words, self._texts, self._spans)

    def pool(self, design: Design, rng: random.Random) -> list[str] | None:
        """What secrets of this design are drawn from; None for made-up identifiers."""
        if design == "identifiers":
            return None
        entries = self.common if design == "random_tokens" else self._unseen_pairs(rng)
        if len(entries) < _FEWEST:
            raise InputError(
                f"the records hold {len(entries)} {'words' if design == 'random_tokens' else 'pairs of words'} for "
                f"canaries of the design {design}, {_FEWEST} are needed: plant in more records, or choose identifiers"
            )
        return entries

    def _unseen_pairs(self, rng: random.Random) -> list[str]:
        """Pairs of the most common words that no note has side by side, in this order."""
        words = self.common[:_PAIRED_WORDS]
        known = set(words)
        seen = {(a, b) for line in self._lines() for a, b in itertools.pairwise(line) if {a, b} <= known}
        pairs = [f"{a} {b}" for a in words for b in words if a != b and (a, b) not in seen]
        return sorted(rng.sample(pairs, min(_POOL, len(pairs))))

    def values(self) -> set[str]:
        """Names and record numbers that a made-up identifier must not be: of all such in the records."""
        first, last = (set(map(str.casefold, names)) for names in _names())
        found: set[str] = set()
        for text in self._texts:
            words = re.findall(r"[^\W_]+", text)
            found.update(word for word in words if len(word) == _MRN_DIGITS and word.isdigit())
            folded = [word.casefold() for word in words]
            found.update(f"{a} {b}" for a, b in itertools.pairwise(folded) if a in first and b in last)
        return found


def _words(text: str, spans: Sequence[Mapping[str, Any]]) -> list[str]:
    """Words of three letters and more, casefolded, in reading order; those that touch an identifier left out."""
    for span in spans:  # a digit makes no word, nor does what touches one
        text = f"{text[: span['start']]}{'0' * (span['end'] - span['start'])}{text[span['end'] :]}"
    return _WORD.findall(text.casefold())


# --- Canaries ---------------------------------------------------------------------------------------------------------


def _generator(seed: int | None, purpose: str) -> random.Random:
    return secrets.SystemRandom() if seed is None else random.Random(f"{seed}/{purpose}")


def _canaries(
    n: int,
    designs: Sequence[Design],
    repeats: Sequence[int],
    pools: Mapping[str, tuple[str, ...]],
    labels: Sequence[str | list[str] | None],
    corpus: _Corpus,
    texts: random.Random,
    coins: random.Random,
) -> list[Canary]:
    found: list[Canary] = []
    used, units = set(corpus.texts), set(corpus.units)
    values = corpus.values() if "identifiers" in designs else set()
    for i in range(n):
        design = designs[i % len(designs)]
        carrier, secret = _fresh(design, pools, used, values, texts)
        unit = next(u for _ in range(_TRIALS) if (u := f"p{texts.getrandbits(48):012x}") not in units)
        units.add(unit)
        count = repeats[i // len(designs) % len(repeats)]
        label = _label(texts.choice(labels))
        found.append(Canary(i, design, count, bool(coins.getrandbits(1)), unit, label, carrier, secret))
    return found


def _fresh(
    design: Design, pools: Mapping[str, tuple[str, ...]], used: set[str], values: set[str], rng: random.Random
) -> tuple[str, dict[str, str]]:
    """A carrier and a secret that nothing in the records or among the canaries equals; they are added to these."""
    for _ in range(_TRIALS):
        carrier, secret = rng.choice(CARRIERS[design]), _secret(design, pools, rng)
        text = normalised_text(_filled(carrier, secret)[0])
        own = {secret[field].casefold() for field in ("name", "mrn") if field in secret}
        if text not in used and values.isdisjoint(own):
            used.add(text)
            values.update(own)
            return carrier, secret
    raise InputError(f"no more canaries of the design {design} can be made that differ: ask for fewer (n)")


def _secret(design: Design, pools: Mapping[str, tuple[str, ...]], rng: random.Random) -> dict[str, str]:
    if design != "identifiers":
        return {"words": " ".join(rng.choice(pools[design]) for _ in range(_PICKS[design]))}
    first, last = _names()
    birth = _FIRST_BIRTH + timedelta(days=rng.randrange(_BIRTH_DAYS))
    return {
        "name": f"{rng.choice(first)} {rng.choice(last)}",
        "mrn": f"{rng.randrange(10**_MRN_DIGITS):0{_MRN_DIGITS}d}",
        "birth_date": f"{birth:%m/%d/%Y}",
    }


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The most common first and last names that faker knows, of one word each."""
    from faker.providers.person.en_US import Provider  # lazily: only who plants canaries pays for it

    def most_common(weights: Mapping[str, float], n: int) -> tuple[str, ...]:
        return tuple(heapq.nsmallest(n, (w for w in weights if w.isalpha()), key=lambda name: (-weights[name], name)))

    first, last = (cast("Mapping[str, float]", names) for names in (Provider.first_names, Provider.last_names))
    return most_common(first, _N_FIRST_NAMES), most_common(last, _N_LAST_NAMES)


def _filled(carrier: str, secret: Mapping[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """The text, and the spans of its secret values."""
    text, spans = "", []
    for literal, field, _, _ in Formatter().parse(carrier):
        text += literal
        if field is not None:
            span = {"start": len(text), "end": len(text) + len(secret[field])}
            spans.append(span | {"type": SPAN_TYPES[field], "source": "planted"})
            text += secret[field]
    return text, spans


def _note(canary: Canary, number: int) -> dict[str, Any]:
    """One row of records."""
    text, spans = _filled(canary.carrier, canary.secret)
    label = list(canary.label) if isinstance(canary.label, tuple) else canary.label
    record_id = f"{canary.unit}-{number}"
    return {"text": text, "label": label, "unit": canary.unit, "record_id": record_id, "identifiers": spans}


def _label(found: Any) -> str | tuple[str, ...] | None:
    return tuple(found) if isinstance(found, list) else found


def _canary_of(entry: Mapping[str, Any]) -> Canary:
    """The canary that stands in a manifest's file."""
    return Canary(**{k: v for k, v in entry.items() if k not in ("text", "label")}, label=_label(entry["label"]))


def _with_notes(records: Dataset, canaries: Sequence[Canary], rng: random.Random) -> Dataset:
    """The records with the notes of these canaries at random places."""
    from datasets import Dataset

    notes = [_note(canary, number) for canary in canaries for number in range(canary.repeats)]
    total = len(records) + len(notes)
    at = dict(zip(sorted(rng.sample(range(total), len(notes))), rng.sample(notes, len(notes)), strict=True))
    if "date" in records.column_names:
        days = list(records["date"])
        at = {row: note | {"date": rng.choice(days)} for row, note in at.items()}
    columns: dict[str, list[Any]] = {}
    for name in records.column_names:
        old = iter(records[name][:])
        columns[name] = [at[row][name] if row in at else next(old) for row in range(total)]
    return Dataset.from_dict(columns, features=records.features)


def _check(records: Dataset, n: int, designs: Sequence[str], repeats: Sequence[int]) -> None:
    names = set(records.column_names)
    if not set(_COLUMNS) - {"label"} <= names or not names <= {*_COLUMNS, "date"}:
        raise InputError(f"canaries need records with the columns {', '.join(_COLUMNS)} (label optional): load_records")
    if n < 1:
        raise InputError(f"n is {n}: plant at least 1 canary; an audit needs a few hundred")
    if not designs or not set(designs) <= set(DESIGNS) or len(set(designs)) < len(designs):
        raise InputError(f"designs must be some of {', '.join(DESIGNS)}, each once")
    if not repeats or min(repeats) < 1:
        raise InputError("repeats must be numbers of notes of at least 1, for example (1, 2, 4)")


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
