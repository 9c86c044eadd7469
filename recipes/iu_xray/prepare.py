"""Turn the Indiana University chest X-ray reports and their CheXpert labels into the files that a recipe reads.

    python -m dpmed.recipes.iu_xray.prepare --source iu_xray --output_dir data/iu_xray

The split is by a hash of the text, because one report in five repeats another word for word.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dpmed.errors import InputError

from ..prepared import Row, check_output, file_sha256, limited_units, run_prepare, source_files, write_prepared

ARCHIVE = "NLMCXR_reports.tgz"
LABEL_FILE = "chexpert_labels.json"
LABEL_README = "chexpert_labels_readme.txt"
REMEDY = f"expected {ARCHIVE}, {LABEL_FILE} and {LABEL_README}; recipes/iu_xray/README.md says where they come from"
MEMBER = re.compile(r"ecgen-radiology/(\d+)\.xml")
MAX_MEMBER_BYTES = 1 << 20
"""The largest report has about 10 kB; more than this is not a report."""
N_LABELS = 14
HELDOUT_FROM = 80
VALIDATION_FROM = 72
"""Of 100 hash buckets: 0-71 train, 72-79 validation, 80-99 held out."""


def label_names(readme: str) -> list[str]:
    """Return the 14 label names, in the order of the label vectors, from the readme beside the label file.

    Raises: InputError if the readme holds no such list.
    """
    listed = re.search(r"\[\s*'[^\]]*\]", readme)
    try:
        names = ast.literal_eval(listed.group()) if listed else []
    except (SyntaxError, ValueError):
        names = []
    if len(names) != N_LABELS or not all(isinstance(name, str) for name in names):
        raise InputError(f"{LABEL_README}: holds no list of {N_LABELS} label names; {REMEDY}")
    return names


def report_text(xml: bytes, *, where: str) -> str:
    """Return FINDINGS and IMPRESSION of one report, one per line; "" if it has neither.

    Raises: InputError if the bytes are no plain XML. Entity declarations are refused: no report has one.
    """
    if b"<!DOCTYPE" in xml or b"<!ENTITY" in xml:
        raise InputError(f"{where}: declares XML entities; {REMEDY}")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        raise InputError(f"{where}: not XML; {REMEDY}") from None
    sections = {part.get("Label"): (part.text or "").strip() for part in root.iter("AbstractText")}
    return "\n".join(text for name in ("FINDINGS", "IMPRESSION") if (text := sections.get(name)))


def archived_reports(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each report, in memory: nothing is extracted, links and other members are skipped.

    Raises: InputError if the archive is damaged or a member is too large for a report.
    """
    try:
        with tarfile.open(archive, mode="r:gz") as members:
            for member in members:
                if not (member.isfile() and MEMBER.fullmatch(member.name)):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise InputError(f"{archive.name}: a member has {member.size} bytes, too large for a report")
                handle = members.extractfile(member)
                if handle is not None:
                    yield member.name, handle.read()
    except (tarfile.TarError, EOFError, OSError):
        raise InputError(f"{archive.name}: cannot be read as a .tgz archive; download it again") from None


def split_of(text: str) -> str:
    """Return "train", "validation" or "heldout" from a hash of the text, without case and white space.

    Guarantee: equal normalised texts get the same split, whatever other reports there are.
    """
    normalised = " ".join(text.lower().split())
    bucket = int(hashlib.md5(normalised.encode(), usedforsecurity=False).hexdigest(), 16) % 100
    if bucket >= HELDOUT_FROM:
        return "heldout"
    return "validation" if bucket >= VALIDATION_FROM else "train"


def read_labels(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the positive labels per archive member.

    Raises: InputError if the file is not a mapping from member name to 14 zeros and ones.
    """
    try:
        vectors = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path.name}: not JSON; {REMEDY}") from None
    if not isinstance(vectors, Mapping):
        raise InputError(f"{path.name}: not a mapping from report to label vector; {REMEDY}")
    labels: dict[str, list[str]] = {}
    for member, vector in vectors.items():
        if not isinstance(vector, list) or len(vector) != len(names) or not all(bit in (0, 1) for bit in vector):
            raise InputError(f"{path.name}: a label vector is not {len(names)} zeros and ones; {REMEDY}")
        labels[member] = [name for name, bit in zip(names, vector, strict=True) if bit]
    return labels


def punctuation_twins(splits: Mapping[str, Sequence[Row]]) -> int:
    """Return how many held-out records equal a train or validation record but for punctuation."""

    def words(row: Row) -> str:
        return " ".join(re.findall(r"[a-z0-9]+", row["text"].lower()))

    members = {words(row) for split in ("train", "validation") for row in splits[split]}
    return sum(words(row) in members for row in splits["heldout"])


def prepare(
    source: Path,
    output_dir: Path,
    *,
    limit_train: int | None = None,
    limit_heldout: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, heldout.jsonl and prepare.json under `output_dir`.

    Args:
        source: the folder with the archive, the label file and its readme.
        limit_train: take this many reports, drawn by `seed`.
        limit_heldout: the same for the held-out file.
    Returns: what prepare.json holds.
    Raises: InputError; nothing is written then.
    """
    check_output(output_dir, overwrite=overwrite)
    paths = source_files(source, (ARCHIVE, LABEL_FILE, LABEL_README), remedy=REMEDY)
    labels = read_labels(paths[LABEL_FILE], label_names(paths[LABEL_README].read_text(encoding="utf-8")))
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "heldout": []}
    skipped = {"unlabelled_reports": 0, "reports_without_text": 0}
    for member, xml in archived_reports(paths[ARCHIVE]):
        if member not in labels:
            skipped["unlabelled_reports"] += 1
            continue
        text = report_text(xml, where=member)
        if not text:
            skipped["reports_without_text"] += 1
            continue
        number = member.removeprefix("ecgen-radiology/").removesuffix(".xml")
        row = Row(text=text, label=labels[member], unit=number, record_id=f"CXR{number}")
        splits[split_of(text)].append(row)
    twins = punctuation_twins(splits)
    splits["train"] = limited_units(splits["train"], limit=limit_train, seed=seed)
    splits["heldout"] = limited_units(splits["heldout"], limit=limit_heldout, seed=seed)
    summary = {
        "data_set": "Indiana University chest X-ray reports, CheXpert labels",
        "licence": "CC BY-NC-ND 4.0: do not publish these files",
        "unit": "report (the set names no patients)",
        "source": {"files": {name: file_sha256(path) for name, path in paths.items()}},
        "arguments": {"limit_train": limit_train, "limit_heldout": limit_heldout, "seed": seed},
        "skipped": skipped,
        "heldout_twins_but_for_punctuation": twins,
    }
    return write_prepared(output_dir, splits, summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2: the input cannot be used)."""
    parser = argparse.ArgumentParser(prog="python -m dpmed.recipes.iu_xray.prepare", description="Prepare IU X-ray.")
    parser.add_argument("--source", required=True, type=Path, help=f"folder with {ARCHIVE} and {LABEL_FILE}")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--limit_train", type=int, help="at most this many reports")
    parser.add_argument("--limit_heldout", type=int, help="the same for the held-out file")
    parser.add_argument("--seed", type=int, default=0, help="draws the reports of a limit (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    return run_prepare(lambda: prepare(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
