"""The synthetic hospital: exact spans, no shared values, labels that can be learned but not read off."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from dpmed.data import hospital
from dpmed.data.hospital import HOSPITAL_LABELS, make_hospital
from dpmed.data.hospital_text import DISEASES, FINDINGS, FORBIDDEN_WORDS, IMPRESSION
from dpmed.errors import InputError


@pytest.fixture(scope="module")
def private() -> Dataset:
    return make_hospital(n_patients=200, seed=3)


@pytest.fixture(scope="module")
def public() -> Dataset:
    return make_hospital(n_patients=200, seed=3, public=True)


def patient_table(n_patients: int, seed: int) -> dict[str, hospital.Patient]:
    values = hospital._Values(seed, public=False)
    table = hospital._patient_table(values, n_patients=n_patients, prefix=f"patient{seed}")
    return {patient.unit: patient for patient in table}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def rows(records: Dataset) -> list[dict[str, Any]]:
    return records.to_list()


def planted(records: Dataset) -> set[str]:
    return {row["text"][s["start"] : s["end"]] for row in rows(records) for s in row["identifiers"]}


def test_each_span_is_the_patients_value(private: Dataset) -> None:
    table = patient_table(200, 3)
    seen = Counter()
    for row in rows(private):
        patient = table[row["unit"]]
        assert row["label"] == patient.label
        expected = {
            "NAME": {patient.name},
            "MRN": {patient.mrn},
            "PHONE": {patient.phone},
            "ADDRESS": {patient.address},
            "DOCTOR": {patient.doctor},
        }
        for span in row["identifiers"]:
            value = row["text"][span["start"] : span["end"]]
            seen[span["type"]] += 1
            assert span["source"] == "planted"
            if span["type"] == "DATE":
                assert re.fullmatch(r"\d\d/\d\d/\d{4}", value)
            else:
                assert value in expected[span["type"]]
    assert set(seen) == {"NAME", "MRN", "DATE", "PHONE", "ADDRESS", "DOCTOR"}
    assert seen["NAME"] == seen["MRN"] == len(private)


def test_each_value_stands_once_in_its_note(private: Dataset) -> None:
    for row in rows(private):
        for span in row["identifiers"]:
            assert row["text"].count(row["text"][span["start"] : span["end"]]) == 1


def test_patients_differ_in_what_identifies_them() -> None:
    patients = patient_table(200, 3).values()
    assert len({p.name for p in patients}) == len({p.mrn for p in patients}) == 200


def test_records_have_the_canonical_columns(private: Dataset, public: Dataset) -> None:
    for records in (private, public):
        assert records.column_names == ["text", "label", "unit", "record_id", "identifiers"]
        assert len(set(records["record_id"])) == len(set(records["text"])) == len(records)
    assert private.features == public.features


def test_notes_per_patient_stay_in_the_range() -> None:
    per_patient = Counter(make_hospital(n_patients=60, seed=0, notes_per_patient=(3, 5))["unit"])
    assert set(per_patient.values()) == {3, 4, 5}


def test_labels_are_balanced(private: Dataset) -> None:
    label_of = dict(zip(private["unit"], private["label"], strict=True))
    assert Counter(label_of.values()) == dict.fromkeys(HOSPITAL_LABELS, 40)


def test_a_seed_gives_the_same_notes_and_another_gives_others() -> None:
    first, again, other = (make_hospital(n_patients=20, seed=seed) for seed in (5, 5, 6))
    assert first.to_list() == again.to_list()
    assert not set(first["text"]) & set(other["text"])
    assert not set(first["unit"]) & set(other["unit"])


def test_no_note_names_a_disease_or_label(private: Dataset, public: Dataset) -> None:
    assert words(" ".join([*DISEASES, *DISEASES.values()])) == FORBIDDEN_WORDS
    findings = [text.partition(IMPRESSION)[0] for text in public["text"]]
    for texts in (private["text"], findings):
        assert not any(words(text) & FORBIDDEN_WORDS for text in texts)


def test_the_public_impression_names_the_group(public: Dataset) -> None:
    for text, label in zip(public["text"], public["label"], strict=True):
        assert words(text.partition(IMPRESSION)[2]) & set(HOSPITAL_LABELS) == {label}


def test_the_public_half_has_no_identifier_and_no_private_value(private: Dataset, public: Dataset) -> None:
    assert not any(public["identifiers"])
    assert all("\nImpression: " in text for text in public["text"])
    assert not any("Impression" in text for text in private["text"])
    assert not set(private["unit"]) & set(public["unit"])
    text = "\n".join(public["text"])
    values = planted(private)
    assert len(values) > 800
    assert not [value for value in values if value in text and re.search(rf"\b{re.escape(value)}\b", text)]


def test_public_notes_of_one_patient_share_no_name(public: Dataset) -> None:
    names = Counter(re.findall(r"Name (\w+ \w+), MRN (\d+)", "\n".join(public["text"])))
    assert len(names) == len(public)


def test_findings_of_two_groups_never_coincide() -> None:
    found = [finding for group in FINDINGS.values() for slot in group.values() for finding in slot]
    assert len(found) == len(set(found))


def test_a_linear_classifier_reads_the_label_from_unseen_patients_but_not_perfectly() -> None:
    records = make_hospital(n_patients=400, seed=1)
    text, label, unit = (list(records[name]) for name in ("text", "label", "unit"))
    train = [name < "patient1-00300" for name in unit]
    fit = [i for i, ours in enumerate(train) if ours]
    test = [i for i, ours in enumerate(train) if not ours]
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    features = vectorizer.fit_transform([text[i] for i in fit])
    classifier = LogisticRegression(C=3.0, max_iter=500).fit(features, [label[i] for i in fit])
    predicted = classifier.predict(vectorizer.transform([text[i] for i in test]))
    truth = [label[i] for i in test]
    majority = Counter(truth).most_common(1)[0][1] / len(truth)
    score = f1_score(truth, predicted, average="weighted")
    assert majority < 0.35
    assert 0.85 <= score <= 0.96


@pytest.mark.parametrize(("n_patients", "notes"), [(0, (2, 4)), (10, (0, 2)), (10, (3, 2)), (10**6, (2, 4))])
def test_impossible_hospitals_are_refused(n_patients: int, notes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="n_patients"):
        make_hospital(n_patients=n_patients, seed=0, notes_per_patient=notes)
