"""`dpmed tag`: sources kept apart, counts that add up and hold no value, records that train and evaluate can read."""

from __future__ import annotations

import json
import stat
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpmed import environment
from dpmed.cli import main
from dpmed.data.hospital import make_hospital
from dpmed.data.records import SPAN_SOURCES, load_records, record_features
from dpmed.errors import InputError
from dpmed.tag_check import labelled_records, measured_on_asq_phi, pattern_figures
from dpmed.tagging import STRATA, TagSources, tag_records

Captured = pytest.CaptureFixture[str]
VALUES = ("Weiss", "Anna", "00417", "1950", "Rose", "beekeeper", "9/12/2020")
ROWS = [
    {"pid": "a1", "text": "Anna Weiss, MRN 00417, beekeeper.", "spans": [{"start": 0, "end": 10, "type": "PATIENT"}]},
    {"pid": "a1", "text": "Mrs Weiss, born March 4, 1950, seen 9/12/2020.", "spans": []},
    {"pid": "b2", "text": "Ben Rose, seen 9/12/2020. Fever.", "spans": []},
]
TABLE = "pid,name,dob,mrn,sex\na1,Anna Weiss,1950-03-04,00417,F\nb2,Ben Rose,,,M\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**environment.OFFLINE, **environment.QUIET}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "table.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path


def tag(capsys: Captured, files: Path, *options: str, name: str = "out") -> tuple[str, dict[str, Any], Dataset]:
    """Run the verb; what it printed, what it wrote as counts, and the records read as train and evaluate read them."""
    argv = ["tag", str(files / "notes.jsonl"), "--output_dir", str(files / name), "--data.unit", "pid"]
    assert main([*argv, "--data.identifiers", "spans", *options]) == 0
    counts = json.loads((files / name / "identifiers.json").read_text(encoding="utf-8"))
    records = load_records(
        files / name / "records.parquet", unit="unit", record_id="record_id", identifiers="identifiers"
    )
    return capsys.readouterr().out, counts, records


def shown(records: Dataset) -> list[list[tuple[str, str, str]]]:
    rows = zip(records["text"], records["identifiers"], strict=True)
    return [[(text[s["start"] : s["end"]], s["type"], s["source"]) for s in spans] for text, spans in rows]


# --- The verb ---------------------------------------------------------------------------------------------------------


def test_sources_stay_apart_and_records_come_back(capsys: Captured, files: Path) -> None:
    text, counts, records = tag(capsys, files, "--table", str(files / "table.csv"))
    assert shown(records) == [
        [("Anna Weiss", "NAME", "known"), ("00417", "MRN", "known"), ("beekeeper", "INDIRECT", "indirect")],
        [
            ("Weiss", "NAME", "known"),
            ("March 4, 1950", "DATE", "known"),
            ("9/12/2020", "DATE", "pattern"),
        ],
        [("Ben Rose", "NAME", "known"), ("9/12/2020", "DATE", "pattern")],
    ]
    assert records["unit"][:] == ["a1", "a1", "b2"]
    assert counts["identifiers"] == {
        "indirect": {"INDIRECT": 1},
        "known": {"DATE": 1, "MRN": 1, "NAME": 3},
        "pattern": {"DATE": 2},
    }
    assert counts["by_patients"]["pattern"]["DATE"]["2-4"] == {"values": 1, "spans": 2}
    assert counts["by_patients"]["known"]["NAME"]["1"] == {"values": 3, "spans": 3}
    assert counts["touched"]["any"] == {"n_records": 3, "n_units": 2}
    assert counts["touched"]["indirect"] == {"n_records": 1, "n_units": 1}
    assert counts["overlaps"] == {
        # The own span and the table's are one source; the title behind which a pattern sees a name is "Mrs".
        "known": {"n_spans": 6, "pattern": 3},
        "pattern": {"n_spans": 5, "known": 3},
    }
    assert counts["table"]["ignored"] == ["sex"] and counts["table"]["n_values_found"] == 4
    assert "columns without a type of identifier: sex" in text and "4 of 4 values found" in text
    assert not any(value in text + json.dumps(counts) for value in VALUES)


def test_what_is_written_is_private(capsys: Captured, files: Path) -> None:
    tag(capsys, files)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (files / "out").iterdir()}
    assert modes == {"identifiers.json": 0o600, "records.parquet": 0o600}
    assert stat.S_IMODE((files / "out").stat().st_mode) == 0o700


def test_without_patterns_and_table(capsys: Captured, files: Path) -> None:
    _, counts, _ = tag(capsys, files, "--patterns", "false", "--k", "1")
    assert counts["identifiers"] == {"known": {"NAME": 2}}  # "Weiss" of the second note by the vote
    assert counts["types"] == {"NAME": {"direct": True, "safe_harbor": "A"}} and "table" not in counts


def test_labels_and_placeholder_units(capsys: Captured, files: Path) -> None:
    assert main(["tag", str(files / "notes.jsonl"), "--output_dir", str(files / "o"), "--data.label", "pid"]) == 0
    assert "--data.unit unit" not in capsys.readouterr().out
    frame = load_records(files / "o" / "records.parquet", label="label", identifiers="identifiers")
    assert frame["label"][:] == ["a1", "a1", "b2"]
    with pytest.raises(InputError, match="there is no column 'unit'"):  # placeholder units must not pass for patients
        load_records(files / "o" / "records.parquet", unit="unit")


def test_dates_are_kept(capsys: Captured, files: Path) -> None:
    rows = [row | {"seen": f"2021-0{i}-01"} for i, row in enumerate(ROWS, start=1)]
    (files / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tag(capsys, files, "--data.date", "seen")
    found = load_records(files / "out" / "records.parquet", date="date")
    assert found["date"][:] == ["2021-01-01", "2021-02-01", "2021-03-01"]


def test_an_entity_model_is_a_source_of_its_own(capsys: Captured, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Names:
        def __init__(self, folder: str) -> None:
            assert folder == "a-model"

        def spans(self, texts: list[str]) -> list[list[dict[str, Any]]]:
            at = [text.find("Ben Rose") for text in texts]
            return [[{"start": a, "end": a + 8, "type": "NAME", "source": "ner"}] if a >= 0 else [] for a in at]

    monkeypatch.setattr("dpmed.data.ner.EntityTagger", Names)
    _, counts, records = tag(capsys, files, "--ner", "a-model")
    assert counts["identifiers"]["ner"] == {"NAME": 1} and shown(records)[2][0] == ("Ben Rose", "NAME", "ner")


def test_presidios_spans_are_pattern_spans(capsys: Captured, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fevers:
        def spans(self, text: str) -> list[dict[str, Any]]:
            at = text.find("Fever")
            return [{"start": at, "end": at + 5, "type": "TATTOO", "source": "pattern"}] if at >= 0 else []

    monkeypatch.setattr("dpmed.data.presidio.PresidioPatterns", Fevers)
    _, counts, _ = tag(capsys, files, "--patterns", "presidio", "--check", str(files / "notes.jsonl"))
    assert counts["identifiers"]["pattern"]["TATTOO"] == 1 and counts["identifiers"]["pattern"]["DATE"] == 3
    assert counts["check"]["precision"]["TATTOO"]["value"] == 0


def test_check_prints_what_the_patterns_are_worth(capsys: Captured, files: Path) -> None:
    spans = [{"start": 15, "end": 24, "type": "DATE"}, {"start": 0, "end": 8, "type": "NAME"}]
    (files / "labelled.jsonl").write_text(json.dumps({**ROWS[2], "spans": spans}) + "\n", encoding="utf-8")
    text, counts, _ = tag(capsys, files, "--check", str(files / "labelled.jsonl"))
    assert counts["check"]["recall"]["DATE"]["value"] == 1 and counts["check"]["recall"]["NAME"]["value"] == 0
    assert counts["check"]["precision"]["all"] == counts["check"]["precision"]["DATE"]
    assert "patterns on 1 labelled records" in text and "0.5" in text
    text, counts, _ = tag(capsys, files, name="unchecked")
    assert counts["check"] is None and "was not measured on this data (--check)" in text


@pytest.mark.parametrize("patterns", ["true", "presidio"])
def test_what_was_measured_on_asq_phi_is_printed_as_such(
    capsys: Captured, files: Path, monkeypatch: pytest.MonkeyPatch, patterns: Literal["true", "presidio"]
) -> None:
    monkeypatch.setattr("dpmed.data.presidio.PresidioPatterns", lambda: SimpleNamespace(spans=lambda text: []))
    text, counts, _ = tag(capsys, files, "--patterns", patterns)
    measured = counts["asq_phi"]
    assert measured == measured_on_asq_phi(patterns)
    assert f"patterns on ASQ-PHI: {measured['n_records']} made-up queries, not your notes" in text
    shown = {tuple(line.split()[:4]) for line in text.splitlines()}
    for measure in ("recall", "precision"):
        for kind, figure in measured[measure].items():
            assert (measure, kind, str(figure["n"]), f"{figure['value']:.4g}") in shown
    assert len(measured["recall"]) > 10 and measured["recall"]["all"]["low"] < measured["recall"]["all"]["value"] < 1


def test_without_patterns_nothing_is_said_of_their_worth(capsys: Captured, files: Path) -> None:
    text, counts, _ = tag(capsys, files, "--patterns", "false")
    assert counts["asq_phi"] is None and "ASQ-PHI" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "none.csv"], "none.csv: file not found"),
        (["--table", "TABLE", "--table_types", "nmae=NAME"], "there is no column 'nmae' (did you mean 'name'?)"),
        (["--table", "TABLE", "--table_types", "name"], "expected COLUMN=TYPE"),
        (["--table", "TABLE", "--table_unit", "id"], "there is no column 'id'"),
        (["--ner", "dslim/bert-base-NER"], "no model folder"),
        (["--check", "NOTES", "--data.identifiers", "pid"], "'pid' does not hold valid spans"),
        (["--patterns", "yes"], "invalid choice: 'yes'"),
        (["--patterns", "presidio"], "pip install 'dpmed[presidio]'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    capsys: Captured, files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "presidio_analyzer", missing)
    paths = {"TABLE": str(files / "table.csv"), "NOTES": str(files / "notes.jsonl")}
    argv = ["tag", str(files / "notes.jsonl"), "--output_dir", str(files / "o"), "--data.unit", "pid"]
    assert main([*argv, *(paths.get(option, option) for option in options)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (files / "o").exists() and not any(value in errors[0] for value in VALUES)


def test_a_table_needs_the_patients(capsys: Captured, files: Path) -> None:
    argv = ["tag", str(files / "notes.jsonl"), "--output_dir", str(files / "o"), "--table", str(files / "table.csv")]
    assert main(argv) == 2 and "set --data.unit" in capsys.readouterr().err


# --- Counts add up ----------------------------------------------------------------------------------------------------


def test_strata_are_those_of_the_leakage_figures() -> None:
    from dpmed.memorization import leak_probes

    assert list(STRATA) == list(leak_probes.STRATA)


def test_counts_of_the_hospital_add_up() -> None:
    records = make_hospital(n_patients=20, seed=2)
    tagged, counts = tag_records(records, TagSources(), unit="unit")
    rows = zip(tagged["unit"], tagged["text"], tagged["identifiers"], strict=True)
    spans = [(unit, text, span) for unit, text, row in rows for span in row]
    assert list(counts["types"]) == sorted({span["type"] for _, _, span in spans})
    for source, kinds in counts["by_patients"].items():
        for kind, strata in kinds.items():
            assert list(strata) == list(STRATA)
            assert sum(cell["spans"] for cell in strata.values()) == counts["identifiers"][source][kind]
    holders: dict[str, set[str]] = {}
    for unit, text, span in spans:
        holders.setdefault(text[span["start"] : span["end"]].lower(), set()).add(unit)
    doctors = {
        text[s["start"] : s["end"]].lower() for _, text, s in spans if (s["type"], s["source"]) == ("DOCTOR", "planted")
    }
    several = sum(2 <= len(holders[value]) <= 4 for value in doctors)
    assert counts["by_patients"]["planted"]["DOCTOR"]["2-4"]["values"] == several > 0
    assert set(counts["touched"]) <= {"any", *SPAN_SOURCES} and counts["touched"]["planted"]["n_units"] == 20


# --- Recall and precision ---------------------------------------------------------------------------------------------

PIECES = ["MRN 00417", "03/04/2021", "Anna", "came", "Dr. Weiss", "555-0142", "SSN 219-09-9999"]


@given(st.data())
def test_recall_and_precision_against_a_count_by_hand(data: st.DataObject) -> None:
    from dpmed.data.patterns import pattern_spans

    rows = data.draw(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), min_size=1, max_size=4))
    columns: dict[str, list[Any]] = {"text": [], "unit": [], "record_id": [], "identifiers": []}
    found: Counter[str] = Counter()
    total: Counter[str] = Counter()
    right = n_patterns = 0
    for row, words in enumerate(rows):
        text = " | ".join(words)
        labels, at = [], 0
        for word in words:
            if data.draw(st.booleans()):
                kind = data.draw(st.sampled_from(["PATIENT", "tattoo"]))
                labels.append({"start": at, "end": at + len(word), "type": kind, "source": "known"})
            at += len(word) + 3
        ours = pattern_spans(text)
        covered = {place for span in ours for place in range(span["start"], span["end"])}
        for label in labels:
            kind = "NAME" if label["type"] == "PATIENT" else "TATTOO"
            total[kind] += 1
            found[kind] += all(p in covered for p in range(label["start"], label["end"]) if text[p].isalnum())
        n_patterns += len(ours)
        right += sum(any(s["start"] < b["end"] and b["start"] < s["end"] for b in labels) for s in ours)
        for name, value in zip(columns, (text, str(row), str(row), labels), strict=True):
            columns[name].append(value)
    figures = pattern_figures(Dataset.from_dict(columns, features=record_features()), bootstrap=20)
    for kind in total:
        assert figures["recall"][kind]["value"] == pytest.approx(found[kind] / total[kind])
        assert figures["recall"][kind]["n"] == total[kind]
    if n_patterns:
        assert figures["precision"]["all"]["value"] == pytest.approx(right / n_patterns)
    else:
        assert figures["precision"]["all"] is None and "precision.all" in figures["not_applicable"]


def test_the_form_of_asq_phi(tmp_path: Path) -> None:
    query = "===QUERY===\nMs. Lee, Lee again, on 03/04/2021?\n===PHI_TAGS===\n"
    tags = '{"identifier_type": "NAME", "value": "Lee"}\n{"identifier_type": "DATE", "value": "03/04/2021"}\n'
    file = tmp_path / "synthetic_dataset.txt"
    file.write_text(f"{query}{tags}\n===QUERY===\nNothing here.\n===PHI_TAGS===\n", encoding="utf-8")
    for source in (tmp_path, file):
        records = labelled_records(str(source), text="text", unit=None, identifiers=None)
        assert [len(spans) for spans in records["identifiers"]] == [3, 0]
        figures = pattern_figures(records)
        assert (figures["recall"]["NAME"]["value"], figures["recall"]["DATE"]["value"]) == (0.5, 1)
    file.write_text(f"{query}Lee\n", encoding="utf-8")
    with pytest.raises(InputError, match="not in ASQ-PHI's form") as error:
        labelled_records(str(tmp_path), text="text", unit=None, identifiers=None)
    assert "Lee" not in str(error.value)


def test_records_without_labels_cannot_be_checked(files: Path) -> None:
    (files / "none.jsonl").write_text(json.dumps({"text": "x", "identifiers": []}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="labels no identifier"):
        labelled_records(str(files / "none.jsonl"), text="text", unit=None, identifiers=None)
