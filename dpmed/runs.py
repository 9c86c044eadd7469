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

import yaml

from dpmed.errors import InputError

RUN_FILE = "run.json"


def claim_output_dir(path: Path, *, resume: bool) -> None:
    """Make `path` a private folder that this process may write to.

    Raises: InputError if it holds anything and `resume` is false, is a file, or cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another --output_dir")
    try:
        if path.is_dir() and any(path.iterdir()):
            if not resume:
                raise InputError(f"{path} is not empty; choose another --output_dir, or add --resume to go on there")
            return
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)  # an empty folder of the user's may be open to others
    except OSError as error:
        raise InputError(f"{path} cannot be made or written ({error.strerror}); choose another --output_dir") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_private` does."""
    write_private(path, text.encode("utf-8"))


def write_private(path: Path, data: bytes) -> None:
    """Write a file in one step, mode 0600: readers see the old file or the new one, never a part.

    Its folder is made if needed, mode 0700.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
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


def check_same_recipe(folder: Path, recipe: str, *, weights_may_move: bool) -> None:
    """A run may only go on with the recipe that it was started with: its weights and figures are of that one.

    Paths of records may differ (records are compared by fingerprint), and so may the grid around the run, what only
    concerns memory, and the ledger (a run refuses one that it was not charged to).

    Args:
        folder: the run folder.
        recipe: the recipe now, as YAML.
        weights_may_move: `model.path` may differ where `model.base` is named: a frontier's folder may have been moved.

    Raises: InputError naming the first key that differs.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return
    before, now = (_flat(yaml.safe_load(text) or {}) for text in (file.read_text(encoding="utf-8"), recipe))
    ignored = {"data.train", "data.heldout", "data.validation", "privacy.ledger", "privacy.budget_epsilon"}
    ignored |= {"privacy.buffer_mib", "privacy.micro_batch_tokens"}
    if weights_may_move and now.get("model.base"):
        ignored.add("model.path")
    for key in [*now, *before]:
        if key not in ignored and not key.startswith("frontier.") and before.get(key) != now.get(key):
            raise InputError(
                f"{folder}: the recipe changed since this run was started, first {key}; use a new --output_dir, or"
                " delete this folder"
            )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def replace_folder(partial: Path, final: Path) -> None:
    """Move a finished folder to its place, where an older one may stand."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)


WHOLE = "checkpoint_is_whole"
"""Empty file that is written into a checkpoint last: without it a checkpoint is one that was interrupted."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    found = [p for p in folder.glob("checkpoint-*") if (p / WHOLE).is_file()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def mark_whole(checkpoint: Path) -> None:
    """Put all files of a checkpoint on the disk, then mark it as whole."""
    for file in [*(p for p in checkpoint.rglob("*") if p.is_file()), checkpoint]:
        _sync(file)
    (checkpoint / WHOLE).touch(mode=0o600)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
