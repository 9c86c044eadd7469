"""Turn PHEE into the three files that a recipe reads.

    python -m dpmed.recipes.phee.prepare --source PHEE/data/json --output_dir data/phee

The original split is kept (train / dev / test become train / validation / heldout): it is by article already.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpmed.errors import InputError

from ..prepared import Row, check_output, file_sha256, limited_units, run_prepare, source_files, write_prepared

FILES = {"train": "train.json", "validation": "dev.json", "heldout": "test.json"}
HUB_SPLITS = {"train": ("train",), "validation": ("validation", "dev"), "heldout": ("test",)}
REMEDY = "expected train.json, dev.json and test.json of the PHEE repository, or a Hub id `owner/name`"
LABELS = {
    frozenset({"Adverse_event"}): "adverse",
    frozenset({"Potential_therapeutic_event"}): "therapeutic",
    frozenset({"Adverse_event", "Potential_therapeutic_event"}): "both",
}


def record(sentence: Mapping[str, Any], *, where: str) -> Row:
    """Return one PHEE sentence as a record: its label from the set of event types, its unit the article (PMID).

    Args:
        sentence: `id` "PMID_sentence", `context`, `annotations[].events[].event_type`; other keys are not read.
        where: file and line for the message, no text of the record.
    Raises: InputError if a key is missing or an event type is unknown.
    """
    try:
        identifier, text = sentence["id"], sentence["context"].strip()
        types = frozenset(event["event_type"] for note in sentence["annotations"] for event in note["events"])
        pmid, separator, _ = identifier.partition("_")
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{where}: not a PHEE sentence (id, context, annotations[].events[].event_type)") from None
    if not (separator and pmid and text):
        raise InputError(f"{where}: empty context, or an id that is not PMID_sentence; {REMEDY}")
    if types not in LABELS:
        raise InputError(f"{where}: event types are not Adverse_event or Potential_therapeutic_event; {REMEDY}")
    return Row(text=text, label=LABELS[types], unit=pmid, record_id=identifier)


def folder_splits(folder: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Read the three JSON-lines files of `folder`.

    Returns: the records per split, and the name and SHA-256 of each source file.
    Raises: InputError if a file is missing or a line is not a PHEE sentence.
    """
    paths = source_files(folder, list(FILES.values()), remedy=REMEDY)
    splits: dict[str, list[Row]] = {}
    for split, name in FILES.items():
        rows: list[Row] = []
        with paths[name].open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{name} line {number}"
                try:
                    sentence = json.loads(line)
                except json.JSONDecodeError:
                    raise InputError(f"{where}: not JSON; {REMEDY}") from None
                rows.append(record(sentence, where=where))
        splits[split] = rows
    return splits, {"files": {name: file_sha256(path) for name, path in paths.items()}}


def hub_splits(hub_id: str) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Read PHEE from the Hugging Face Hub; the download is deleted afterwards.

    Returns: the records per split, and the Hub id.
    Raises: InputError if the set cannot be loaded or lacks a split or a column.
    """
    # Imported here: reading a folder needs no `datasets`, and the import takes seconds.
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(hub_id, cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            # The cause stays chained: the Hub's own errors come in a dozen types.
            raise InputError(f"--source {hub_id}: no such folder, and not loadable from the Hub; {REMEDY}") from error
        if not isinstance(loaded, datasets.DatasetDict):
            raise InputError(f"--source {hub_id}: no splits; {REMEDY}")
        splits: dict[str, list[Row]] = {}
        for split, names in HUB_SPLITS.items():
            name = next((name for name in names if name in loaded), None)
            if name is None:
                raise InputError(f"--source {hub_id}: no split named {' or '.join(names)}; {REMEDY}")
            splits[split] = [record(s, where=f"{hub_id} {name} row {i}") for i, s in enumerate(loaded[name].to_list())]
    return splits, {"hub_id": hub_id}


def prepare(
    source: str,
    output_dir: Path,
    *,
    limit_train: int | None = None,
    limit_heldout: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, heldout.jsonl and prepare.json under `output_dir`.

    Args:
        source: a folder with train.json, dev.json, test.json, or a Hub id.
        limit_train: take whole articles, drawn by `seed`, until they hold this many sentences.
        limit_heldout: the same for the held-out file.
    Returns: what prepare.json holds.
    Raises: InputError; nothing is written then.
    """
    check_output(output_dir, overwrite=overwrite)
    folder = Path(source)
    is_hub_id = not folder.exists() and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    splits, origin = hub_splits(source) if is_hub_id else folder_splits(folder)
    splits["train"] = limited_units(splits["train"], limit=limit_train, seed=seed)
    splits["heldout"] = limited_units(splits["heldout"], limit=limit_heldout, seed=seed)
    summary = {
        "data_set": "PHEE",
        "licence": "MIT",
        "unit": "article (PMID)",
        "source": origin,
        "arguments": {"limit_train": limit_train, "limit_heldout": limit_heldout, "seed": seed},
    }
    return write_prepared(output_dir, splits, summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2: the input cannot be used)."""
    parser = argparse.ArgumentParser(prog="python -m dpmed.recipes.phee.prepare", description="Prepare PHEE.")
    parser.add_argument("--source", required=True, help="folder with train.json, dev.json, test.json; or a Hub id")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--limit_train", type=int, help="whole articles until they hold this many sentences")
    parser.add_argument("--limit_heldout", type=int, help="the same for the held-out file")
    parser.add_argument("--seed", type=int, default=0, help="draws the articles of a limit (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    return run_prepare(lambda: prepare(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
