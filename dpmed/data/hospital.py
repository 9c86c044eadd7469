"""The synthetic hospital behind `dpmed demo`: notes about patients who do not exist.

A private half, whose notes repeat each patient's identifiers, and a public half from another hospital: same language,
same templates, but every note carries surrogate values that occur nowhere else. What a model trained on the public half
can say about a private patient is therefore chance, and what it says after private training is memory.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from string import Formatter
from typing import TYPE_CHECKING, Any, cast

from dpmed.data.hospital_text import (
    BODIES,
    COMMON,
    DISEASES,
    FINDINGS,
    FORBIDDEN_WORDS,
    HEADERS,
    HOBBIES,
    IDENTIFIER_FIELDS,
    IMPRESSION,
    IMPRESSIONS,
    OCCUPATIONS,
    SLOTS,
    STREETS,
)
from dpmed.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

HOSPITAL_LABELS: tuple[str, ...] = tuple(DISEASES)

# How often a finding points to the patient's own group, to another group, or (the rest) to none. Set so that a linear
# classifier reaches a weighted F1 of about 0.9 on patients it has not seen: learnable, and not perfect.
OWN_FINDING, OTHER_FINDING = 0.65, 0.2

_KINDS = ("admission", "progress", "discharge", "letter")
_FIRST_VISIT, _VISIT_DAYS = date(2019, 1, 1), 1800
_PATIENTS_PER_DOCTOR = 4
_N_FIRST_NAMES, _N_LAST_NAMES = 120, 250
_MOST_PATIENTS = 5000  # of the 15,000 names that a half has


@dataclass(frozen=True)
class Patient:
    """One row of the hospital's patient table: every value that may stand in this patient's notes."""

    unit: str
    label: str
    name: str
    mrn: str
    birth: date
    phone: str
    address: str
    doctor: str
    occupation: str
    hobby: str
    first_visit: date


class _Values:
    """Draws identifier values. The halves of the hospital never share one: a checksum of the value says whose it is."""

    def __init__(self, seed: int, *, public: bool) -> None:
        from faker.providers.person.en_US import Provider  # lazily: only who makes a hospital pays for it

        self.rng = random.Random(2 * seed + public)
        self._first_names = _most_common(cast("Mapping[str, float]", Provider.first_names), _N_FIRST_NAMES)
        self._last_names = _most_common(cast("Mapping[str, float]", Provider.last_names), _N_LAST_NAMES)
        self._public = public
        self._seen: set[str] = set()

    def fresh(self, draw: Callable[[], str], *, unique: bool = True) -> str:
        """The first drawn value that belongs to this half, names no disease and (if `unique`) was not drawn before."""
        while True:
            value = draw()
            ours = zlib.crc32(value.encode()) % 2 == self._public
            taken = unique and value in self._seen
            if ours and not taken and FORBIDDEN_WORDS.isdisjoint(value.lower().split()):
                if not self._public:  # the public half draws so many that uniqueness would exhaust the names
                    self._seen.add(value)
                return value

    def name(self) -> str:
        return self.fresh(lambda: f"{self.rng.choice(self._first_names)} {self.rng.choice(self._last_names)}")

    def mrn(self) -> str:
        return self.fresh(lambda: f"{self.rng.randrange(10**6):06d}")

    def phone(self) -> str:
        # The 555 exchange is kept free of subscribers in North America.
        return self.fresh(lambda: f"555-{self.rng.randrange(10**4):04d}", unique=False)

    def address(self) -> str:
        draw = lambda: f"{self.rng.randrange(1, 100)} {self.rng.choice(self._last_names)} {self.rng.choice(STREETS)}"  # noqa: E731
        return self.fresh(draw, unique=False)

    def day(self, first: date, n_days: int) -> date:
        """A day of this half; days are few, so that several patients may share one."""
        draw = lambda: _written(first + timedelta(days=self.rng.randrange(n_days)))  # noqa: E731
        month, day, year = map(int, self.fresh(draw, unique=False).split("/"))
        return date(year, month, day)


def make_hospital(
    *, n_patients: int, seed: int, notes_per_patient: tuple[int, int] = (2, 4), public: bool = False
) -> Dataset:
    """Make the notes of a synthetic hospital: the columns of `load_records`, one row a note, patient after patient.

    Args:
        n_patients: how many patients (privacy units).
        seed: the same seed gives the same notes, on every machine with the same Faker.
        notes_per_patient: the least and the most notes of a patient.
        public: the other hospital: surrogate values drawn anew for each note, no identifiers, and a last line,
            the impression, that names the disease group.

    Returns: a Dataset in memory with text, label (one of `HOSPITAL_LABELS`), unit, record_id, identifiers.
    Guarantee: `text[start:end]` is the planted value for each identifier, which stands once in its note; no private
        note names a disease or a label; no identifier value of a private hospital is used by a public one, whatever
        the seeds.
    Raises: InputError if the numbers make no hospital.
    """
    from datasets import Dataset

    least, most = notes_per_patient
    if not 1 <= n_patients <= _MOST_PATIENTS or not 1 <= least <= most:
        raise InputError(
            f"make_hospital: n_patients={n_patients}, notes_per_patient={notes_per_patient} is no hospital; "
            f"give n_patients from 1 to {_MOST_PATIENTS} and 1 <= least <= most."
        )
    values = _Values(seed, public=public)
    rows: list[dict[str, Any]] = []
    for patient in _patient_table(values, n_patients=n_patients, prefix=f"{'public' if public else 'patient'}{seed}"):
        kinds = _note_kinds(values.rng, values.rng.randint(least, most))
        for number, kind in enumerate(kinds):
            # As a release with surrogates: nothing links a public patient's notes, so nothing can be memorised twice.
            shown = _with_new_identity(patient, values) if public else patient
            text, spans = _note(shown, kind, values)
            if public:
                text += f"{IMPRESSION} {values.rng.choice(IMPRESSIONS[patient.label])}."
            record = {"text": text, "label": patient.label, "unit": patient.unit}
            rows.append(record | {"record_id": f"{patient.unit}-{number}", "identifiers": [] if public else spans})
    return Dataset.from_list(rows, features=_features())


def _features() -> Any:
    from datasets import Features, List, Value

    text = Value("string")
    span = {"start": Value("int64"), "end": Value("int64"), "type": text, "source": text}
    # Said here and not inferred: the public half has no span to infer a type from.
    return Features({"text": text, "label": text, "unit": text, "record_id": text, "identifiers": List(span)})


def _patient_table(values: _Values, *, n_patients: int, prefix: str) -> list[Patient]:
    """All patients of the hospital, their labels balanced to within one patient."""
    rng = values.rng
    labels = [HOSPITAL_LABELS[i % len(HOSPITAL_LABELS)] for i in range(n_patients)]
    rng.shuffle(labels)
    doctors = [values.name() for _ in range(1 + n_patients // _PATIENTS_PER_DOCTOR)]
    nobody = Patient("", "", "", "", _FIRST_VISIT, "", "", "", "", "", _FIRST_VISIT)
    table = []
    for i, label in enumerate(labels):
        patient = _with_new_identity(nobody, values)
        table.append(replace(patient, unit=f"{prefix}-{i:05d}", label=label, doctor=rng.choice(doctors)))
    return table


def _with_new_identity(patient: Patient, values: _Values) -> Patient:
    """The same disease in somebody else."""
    rng = values.rng
    first_visit = values.day(_FIRST_VISIT, _VISIT_DAYS)
    return replace(
        patient,
        name=values.name(),
        mrn=values.mrn(),
        birth=values.day(date(1930, 1, 1), 365 * 70),
        phone=values.phone(),
        address=values.address(),
        doctor=values.name(),
        occupation=rng.choice(OCCUPATIONS),
        hobby=rng.choice(HOBBIES),
        first_visit=first_visit,
    )


def _note_kinds(rng: random.Random, n_notes: int) -> list[str]:
    """The kinds of a patient's notes in the order of a hospital stay; what is beyond four are more progress notes."""
    kinds = rng.sample(_KINDS, min(n_notes, len(_KINDS))) + ["progress"] * max(0, n_notes - len(_KINDS))
    return sorted(kinds, key=_KINDS.index)


def _note(patient: Patient, kind: str, values: _Values) -> tuple[str, list[dict[str, Any]]]:
    """One note and its planted spans."""
    rng = values.rng
    visit = values.day(patient.first_visit, 60)
    fields = {
        "name": patient.name,
        "mrn": patient.mrn,
        "birth_date": _written(patient.birth),
        "visit_date": _written(visit),
        "phone": patient.phone,
        "address": patient.address,
        "doctor": patient.doctor,
        "age": str(_age(patient.birth, visit)),
        "occupation": patient.occupation.capitalize(),
        "hobby": patient.hobby,
        **_findings(patient.label, rng),
    }
    return _filled(f"{rng.choice(HEADERS[kind])} {rng.choice(BODIES[kind])}", fields)


def _filled(template: str, fields: dict[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """Put the note together piece by piece, so that a span's offsets are those of the piece just added."""
    text, spans = "", []
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is None:
            continue
        if field in IDENTIFIER_FIELDS:
            span = {"start": len(text), "end": len(text) + len(fields[field])}
            spans.append(span | {"type": IDENTIFIER_FIELDS[field], "source": "planted"})
        text += fields[field]
    return text, spans


def _findings(label: str, rng: random.Random) -> dict[str, str]:
    """Two different findings per slot, each from the patient's group, another group, or none."""
    found: dict[str, str] = {}
    for slot in SLOTS:
        while found.get(f"{slot}1") == found.get(f"{slot}2"):
            for number in (1, 2):
                found[f"{slot}{number}"] = rng.choice(_pool(label, slot, rng))
    return found


def _pool(label: str, slot: str, rng: random.Random) -> tuple[str, ...]:
    draw = rng.random()
    if draw < OWN_FINDING:
        return FINDINGS[label][slot]
    if draw < OWN_FINDING + OTHER_FINDING:
        return FINDINGS[rng.choice([other for other in HOSPITAL_LABELS if other != label])][slot]
    return COMMON[slot]


def _most_common(weights: Mapping[str, float], n: int) -> list[str]:
    """The n most common names, the heaviest first; ties in alphabetical order."""
    return sorted(weights, key=lambda name: (-weights[name], name))[:n]


def _written(day: date) -> str:
    return f"{day:%m/%d/%Y}"


def _age(birth: date, on: date) -> int:
    return on.year - birth.year - ((on.month, on.day) < (birth.month, birth.day))


_PARTS = {"train": 0.7, "heldout": 0.3}


def hospital_records(source: str) -> Dataset:
    """The private hospital's records of one part, made in memory, so that the demo writes no record text to disk.

    Args:
        source: "hospital:PART?n_patients=N&seed=S" with PART train or heldout (70 and 30 % of the patients).

    Raises: InputError if the source does not read so.
    """
    from dpmed.data.records import split_by_unit
    from dpmed.data.sources import HOSPITAL

    part, _, query = source.removeprefix(HOSPITAL).partition("?")
    try:
        options = {key: int(value) for key, value in (pair.split("=") for pair in query.split("&"))}
        records = make_hospital(n_patients=options.pop("n_patients"), seed=options.pop("seed"))
    except (KeyError, ValueError):
        raise InputError(f"{source}: expected hospital:PART?n_patients=N&seed=S") from None
    parts = split_by_unit(records, fractions=_PARTS, seed=0)
    if part not in parts or options:
        raise InputError(f"{source}: PART is one of {', '.join(parts)}, and n_patients and seed are all its settings")
    return parts[part]
