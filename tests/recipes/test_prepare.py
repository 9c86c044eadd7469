"""The two prepare commands on made-up source files of the same format; on the real ones when DPMED_DATA names them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpmed.errors import InputError
from recipes import prepared
from recipes.iu_xray import prepare as iu_xray
from recipes.phee import prepare as phee

NAMES = [f"Label {letter}" for letter in "ABCDEFGHIJKLM"] + ["No Finding"]
ADVERSE, THERAPEUTIC = "Adverse_event", "Potential_therapeutic_event"
real_data = pytest.mark.skipif(not os.environ.get("DPMED_DATA"), reason="DPMED_DATA names no folder")


def sentence(identifier: str, *types: str) -> dict[str, Any]:
    """Return one made-up PHEE sentence, an event per type."""
    events = [{"event_id": f"E{i}", "event_type": kind} for i, kind in enumerate(types)]
    return {"id": identifier, "context": f" Sentence {identifier}. ", "annotations": [{"events": events}]}


def phee_folder(folder: Path, **splits: Sequence[Mapping[str, Any]]) -> Path:
    """Write train, dev and test files; a split that is not given gets one sentence of its own article."""
    default = {
        "train": [sentence("1_1", ADVERSE)],
        "dev": [sentence("2_1", ADVERSE)],
        "test": [sentence("3_1", ADVERSE)],
    }
    folder.mkdir(exist_ok=True)
    for name, rows in {**default, **splits}.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report_xml(findings: str | None, impression: str | None) -> bytes:
    parts = {"INDICATION": "Not part of the text.", "FINDINGS": findings, "IMPRESSION": impression}
    body = "".join(f'<AbstractText Label="{k}">{v or ""}</AbstractText>' for k, v in parts.items())
    return f'<?xml version="1.0" encoding="utf-8"?><eCitation><Abstract>{body}</Abstract></eCitation>'.encode()


def iu_folder(folder: Path, reports: Mapping[str, bytes], labels: Mapping[str, Sequence[int]] | None = None) -> Path:
    """Write an archive of the reports (by number), their labels (default: No Finding) and the readme."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / iu_xray.ARCHIVE, "w:gz") as archive:
        for number, xml in reports.items():
            member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
            member.size = len(xml)
            archive.addfile(member, io.BytesIO(xml))
    chosen = labels if labels is not None else {number: [0] * 13 + [1] for number in reports}
    vectors = {f"ecgen-radiology/{number}.xml": list(vector) for number, vector in chosen.items()}
    (folder / iu_xray.LABEL_FILE).write_text(json.dumps(vectors))
    (folder / iu_xray.LABEL_README).write_text(f"There are 14 labels:\n[{', '.join(map(repr, NAMES))}]\n")
    return folder


def made_up_reports(n: int = 200) -> dict[str, bytes]:
    """Return reports that fill all three splits; each text stands twice, in other case and spacing."""
    return {str(i): report_xml(f"Made  up\n{'TEXT' if i % 2 else 'text'} {i // 2}.", "Normal.") for i in range(n)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_phee_labels_units_and_columns(tmp_path: Path) -> None:
    train = [
        sentence("1_1", ADVERSE, ADVERSE),
        sentence("1_2", THERAPEUTIC),
        sentence("9_7", THERAPEUTIC, ADVERSE),
    ]
    assert (
        phee.main(["--source", str(phee_folder(tmp_path / "s", train=train)), "--output_dir", str(tmp_path / "o")]) == 0
    )
    rows = read(tmp_path / "o" / "train.jsonl")
    assert [(r["label"], r["unit"], r["record_id"]) for r in rows] == [
        ("adverse", "1", "1_1"),
        ("therapeutic", "1", "1_2"),
        ("both", "9", "9_7"),
    ]
    assert set(rows[0]) == {"text", "label", "unit", "record_id"} and rows[0]["text"] == "Sentence 1_1."
    assert [r["unit"] for r in read(tmp_path / "o" / "heldout.jsonl")] == ["3"]
    assert [r["unit"] for r in read(tmp_path / "o" / "validation.jsonl")] == ["2"]


def test_summary_counts_and_holds_no_text(tmp_path: Path) -> None:
    source = phee_folder(tmp_path / "s", train=[sentence("1_1", ADVERSE), sentence("1_2", THERAPEUTIC)])
    phee.prepare(str(source), tmp_path / "o")
    text = (tmp_path / "o" / prepared.SUMMARY).read_text()
    summary = json.loads(text)
    train = summary["splits"]["train"]
    assert (train["records"], train["units"], train["labels"]) == (2, 1, {"adverse": 1, "therapeutic": 1})
    assert train["sha256"] == prepared.file_sha256(tmp_path / "o" / "train.jsonl")
    assert summary["source"]["files"]["dev.json"] == prepared.file_sha256(source / "dev.json")
    assert "Sentence" not in text and str(tmp_path) not in text


def test_files_are_private_and_kept_without_overwrite(tmp_path: Path) -> None:
    source, output = str(phee_folder(tmp_path / "s")), tmp_path / "o"
    phee.prepare(source, output)
    assert output.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o600}
    phee_folder(tmp_path / "s", train=[sentence("5_1", THERAPEUTIC)])
    with pytest.raises(InputError, match="--overwrite"):
        phee.prepare(source, output)
    assert read(output / "train.jsonl")[0]["unit"] == "1"
    phee.prepare(source, output, overwrite=True)
    assert read(output / "train.jsonl")[0]["unit"] == "5"


def test_limit_takes_whole_units_by_seed() -> None:
    rows = [
        prepared.Row(text="t", label="a", unit=str(unit), record_id=f"{unit}_{i}")
        for unit in range(20)
        for i in range(unit % 3 + 1)
    ]
    size = {unit: sum(r["unit"] == unit for r in rows) for unit in {r["unit"] for r in rows}}
    kept = prepared.limited_units(rows, limit=10, seed=1)
    assert 10 <= len(kept) < 10 + 3
    assert all(sum(r["unit"] == unit for r in kept) == size[unit] for unit in {r["unit"] for r in kept})
    assert kept == prepared.limited_units(rows, limit=10, seed=1) != prepared.limited_units(rows, limit=10, seed=2)
    assert kept == [row for row in rows if row in kept]
    assert prepared.limited_units(rows, limit=None, seed=0) == rows == prepared.limited_units(rows, limit=999, seed=0)


def test_limits_reach_the_files(tmp_path: Path) -> None:
    many = [sentence(f"{pmid}_{i}", ADVERSE) for pmid in range(100, 120) for i in range(2)]
    source = phee_folder(tmp_path / "s", train=many, test=[{**row, "id": f"9{row['id']}"} for row in many])
    phee.prepare(str(source), tmp_path / "o", limit_train=5, limit_heldout=3)
    assert len(read(tmp_path / "o" / "train.jsonl")) == 6 and len(read(tmp_path / "o" / "heldout.jsonl")) == 4


@pytest.mark.parametrize("broken", ["missing", "folder", "json", "keys", "type", "shared", "limit"])
def test_phee_input_errors_are_one_line_and_write_nothing(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, extra = phee_folder(tmp_path / "s"), []
    match broken:
        case "missing":
            (source / "dev.json").unlink()
        case "folder":
            source = tmp_path / "nowhere"
        case "json":
            (source / "train.json").write_text("SECRET not json\n")
        case "keys":
            (source / "train.json").write_text('{"id": "1_1", "context": "SECRET"}\n')
        case "type":
            phee_folder(source, train=[{**sentence("1_1", "SECRET_event")}])
        case "shared":
            phee_folder(source, test=[sentence("1_9", ADVERSE)])
        case "limit":
            extra = ["--limit_train", "0"]
    assert phee.main(["--source", str(source), "--output_dir", str(tmp_path / "o"), *extra]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "SECRET" not in message
    assert not (tmp_path / "o").exists()


def test_hub_id_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    caches: list[str] = []

    def load_dataset(name: str, cache_dir: str, keep_in_memory: bool) -> datasets.DatasetDict:
        caches.append(cache_dir)
        rows = {"train": "1_1", "validation": "2_1", "test": "3_1"}
        return datasets.DatasetDict({k: datasets.Dataset.from_list([sentence(v, ADVERSE)]) for k, v in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    summary = phee.prepare("owner/phee", tmp_path / "o")
    assert summary["source"] == {"hub_id": "owner/phee"}
    assert [row["unit"] for row in read(tmp_path / "o" / "validation.jsonl")] == ["2"]
    assert not Path(caches[0]).exists()


def test_iu_text_labels_and_units(tmp_path: Path) -> None:
    reports = made_up_reports() | {"900": report_xml(None, "Only an impression."), "901": report_xml(None, None)}
    labels = {n: [0] * 13 + [1] for n in reports} | {"900": [1, 0, 1] + [0] * 11, "0": [0] * 14}
    del labels["5"]
    summary = iu_xray.prepare(iu_folder(tmp_path / "s", reports, labels), tmp_path / "o")
    rows = {r["record_id"]: r for split in prepared.SPLITS for r in read(tmp_path / "o" / f"{split}.jsonl")}
    assert rows["CXR900"] == {
        "text": "Only an impression.",
        "label": ["Label A", "Label C"],
        "unit": "900",
        "record_id": "CXR900",
    }
    assert rows["CXR0"]["label"] == [] and rows["CXR1"]["label"] == ["No Finding"]
    assert rows["CXR1"]["text"].endswith("\nNormal.") and "Not part" not in rows["CXR1"]["text"]
    assert summary["skipped"] == {"unlabelled_reports": 1, "reports_without_text": 1}
    assert len(rows) == 200


def test_iu_equal_texts_stay_in_one_split(tmp_path: Path) -> None:
    iu_xray.prepare(iu_folder(tmp_path / "s", made_up_reports()), tmp_path / "o")
    texts = {
        split: {" ".join(r["text"].lower().split()) for r in read(tmp_path / "o" / f"{split}.jsonl")}
        for split in prepared.SPLITS
    }
    assert all(texts.values()) and sum(map(len, texts.values())) == 100 == len(set.union(*texts.values()))


def test_iu_counts_twins_but_for_punctuation() -> None:
    def row(text: str) -> prepared.Row:
        return prepared.Row(text=text, label=[], unit=text, record_id=text)

    splits = {"train": [row("No change.")], "validation": [], "heldout": [row("no change"), row("Change.")]}
    assert iu_xray.punctuation_twins(splits) == 1


@pytest.mark.parametrize("broken", ["missing", "archive", "vector", "readme", "entities", "xml", "size"])
def test_iu_input_errors_are_one_line_and_write_nothing(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = iu_folder(tmp_path / "s", made_up_reports(4))
    match broken:
        case "missing":
            (source / iu_xray.ARCHIVE).unlink()
        case "archive":
            (source / iu_xray.ARCHIVE).write_bytes(b"SECRET")
        case "vector":
            iu_folder(source, made_up_reports(4), {"0": [1, 2]})
        case "readme":
            (source / iu_xray.LABEL_README).write_text("no list")
        case "entities":
            iu_folder(source, {"0": b'<!DOCTYPE a [<!ENTITY x "SECRET">]><a>&x;</a>'})
        case "xml":
            iu_folder(source, {"0": b"<a>SECRET"})
        case "size":
            monkeypatch.setattr(iu_xray, "MAX_MEMBER_BYTES", 10)
    assert iu_xray.main(["--source", str(source), "--output_dir", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "SECRET" not in message
    assert not (tmp_path / "o").exists()


def test_archive_links_and_other_members_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("ecgen-radiology/1.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret"
        archive.addfile(link)
        for name in ("../2.xml", "ecgen-radiology/../3.xml", "ecgen-radiology/4.xml"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    assert [name for name, _ in iu_xray.archived_reports(path)] == ["ecgen-radiology/4.xml"]


@pytest.mark.parametrize("name", ["phee", "iu_xray"])
def test_commands_run_as_shipped_modules(name: str, tmp_path: Path) -> None:
    # From another folder: the installed package must hold them, not only the checkout.
    done = subprocess.run(
        [sys.executable, "-m", f"dpmed.recipes.{name}.prepare", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, f"is the package installed (pip install -e .)? {done.stderr[-500:]}"
    assert "--source" in done.stdout


@real_data
def test_phee_on_the_real_files(tmp_path: Path) -> None:
    summary = phee.prepare(f"{os.environ['DPMED_DATA']}/phee", tmp_path / "o")
    assert [summary["splits"][split]["records"] for split in prepared.SPLITS] == [2898, 961, 968]
    assert summary["splits"]["train"]["labels"] == {"adverse": 2605, "both": 64, "therapeutic": 229}


@real_data
def test_iu_xray_on_the_real_files(tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    summary = iu_xray.prepare(Path(os.environ["DPMED_DATA"]) / "iu_xray", tmp_path / "o")
    assert [summary["splits"][split]["records"] for split in prepared.SPLITS] == [2323, 241, 773]
    labels = [row["label"] for row in read(tmp_path / "o" / "heldout.jsonl")]
    names = sorted({name for label in labels for name in label})
    truth = [[name in label for name in names] for label in labels]
    always = [[name == "No Finding" for name in names]] * len(labels)
    assert len(names) == 14
    assert f1_score(truth, always, average="weighted", zero_division=0) == pytest.approx(0.609, abs=5e-4)  # pyright: ignore[reportArgumentType]
