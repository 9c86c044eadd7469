"""A run folder: what is written when, so that a half-written run is never taken for a finished one.

`run.json` carries the status. It is written first with status "running" and last with "finished"; every file is written
beside its place and moved there in one step. Folders are 0700 and files 0600, since they derive from patients' records.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpmed.errors import InputError

RUN_FILE = "run.json"


def claim_output_dir(path: Path, *, resume: bool) -> None:
    """Make `path` a private folder that this process may write to.

    Raises: InputError if it holds anything and `resume` is false, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another --output_dir")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise InputError(f"{path} is not empty; choose another --output_dir, or add --resume to go on there")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step, mode 0600: readers see the old file or the new one, never a part."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON in one step; infinities and NaN are refused rather than written as text no other reader takes."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run folder.

    Raises: InputError if it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is {path.parent} a run folder?") from None
    except ValueError:
        raise InputError(f"{path} is not valid JSON; delete it and run again with --resume") from None


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a whole run."""
    file = folder / RUN_FILE
    return file.is_file() and read_json(file).get("status") == "finished"


def replace_folder(partial: Path, final: Path) -> None:
    """Move a finished folder to its place, where an older one may stand."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder: transformers writes trainer_state.json last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
