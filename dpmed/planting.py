"""What `dpmed plant` does: training records with canary patients among them, and the manifest that the audit reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dpmed.data.canaries import DESIGNS, Design, plant_canaries
from dpmed.errors import InputError
from dpmed.privacy.audit import ceiling
from dpmed.runs import claim_output_dir
from dpmed.tagging import RECORDS_FILE, write_records

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST_FILE = "canaries.json"


def plant_folder(
    records: Dataset,
    folder: Path,
    *,
    unit: str | None,
    n: int,
    designs: Sequence[str] | None = None,
    repeats: Sequence[int] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Plant canaries and write a folder: `records.parquet` to train on, and `canaries.json`, the manifest.

    Args:
        records: training records, as loaded.
        folder: new or empty; made 0700, its files 0600: the manifest tells the coins.
        unit: the column that named the patients; a canary is one.
        n, designs, repeats, seed: see `plant_canaries`; None takes its defaults.

    Returns: counts, and the largest lower bound on epsilon that so many canaries can show. No text.
    Raises: InputError without a patient column, for an unknown design, or as `plant_canaries` does.
    """
    if unit is None:
        raise InputError("a canary is a patient: name the column of the records' patients with --data.unit")
    chosen: list[Design] = [name for name in get_args(Design) if name in (designs or DESIGNS)]
    if unknown := sorted(set(designs or ()) - set(DESIGNS)):
        raise InputError(f"--designs: {unknown[0]!r} is not known; choose of {', '.join(DESIGNS)}")
    planted, manifest = plant_canaries(records, n=n, designs=chosen, repeats=repeats or (1, 2, 4), seed=seed)
    delta = float(len(set(planted["unit"]))) ** -1.1
    claim_output_dir(folder, resume=False)
    write_records(folder / RECORDS_FILE, planted)
    manifest.save(folder / MANIFEST_FILE)
    return {
        "n_records": len(records),
        "n_units": len(set(records["unit"])),
        "n_canaries": n,
        "n_canary_records": len(planted) - len(records),
        "designs": list(chosen),
        "repeats": list(manifest.repeats),
        "seed": seed,
        "delta": delta,
        "audit_ceiling": ceiling(n, delta=delta),
        "records": str(folder / RECORDS_FILE),
        "manifest": str(folder / MANIFEST_FILE),
    }
