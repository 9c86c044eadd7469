"""A tiny model on disk, records about patients who do not exist, and recipes over them: runs of a second."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
from dpmed.recipe import Recipe
from dpmed.recipe_io import build_recipe, merge

N_TRAIN, N_HELDOUT = 13, 6
RECORDS_PER_UNIT = 3
LABELS = ("heart", "lung")
MARKER = "Zorblax"
"""Stands in every text; `marks` are all strings that no file of a run folder may hold."""


@dataclass(frozen=True)
class World:
    """Paths of a base model and of the records."""

    base: Path
    folder: Path

    @property
    def marks(self) -> list[bytes]:
        names = [_name(u) for u in range(N_TRAIN + N_HELDOUT)] + [_unit(u) for u in range(N_TRAIN + N_HELDOUT)]
        return [value.encode() for value in (MARKER, *names)]

    def recipe(self, method: str = "lora", **changes: Any) -> Recipe:
        """A recipe of one pass over the records; `changes` are nested like a recipe file."""
        values: dict[str, Any] = {
            "method": method,
            "model": {"path": str(self.base)},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "heldout": str(self.folder / "heldout.jsonl"),
                "label": "label",
                "unit": "mrn",
                "identifiers": "spans",
                "max_length": 64,
            },
            "lora": {"rank": 2},
            "privacy": {"delta": 1e-2, "expected_batch_units": 4},
            "training": {"epochs": 1, "batch_size": 8},
            "evaluation": {"prefix_tokens": [4], "suffix_tokens": [4, 8], "bootstrap": 20},
        }
        return merge(build_recipe(values, where="tests"), changes)


def make_world(folder: Path, kind: tiny_models.Kind = "llama") -> World:
    """Save a base model and both sides of the records under `folder`."""
    base = folder / "base"
    tiny_models.make_model(kind).save_pretrained(base)
    tiny_models.make_tokenizer().save_pretrained(base)
    write_rows(folder / "train.jsonl", range(N_TRAIN))
    write_rows(folder / "heldout.jsonl", range(N_TRAIN, N_TRAIN + N_HELDOUT))
    return World(base, folder)


def write_rows(path: Path, units: range, **changes: Any) -> Path:
    """Write the records of these patients, one JSON object a line; `changes` replace columns."""
    lines = [json.dumps(row | changes) for unit in units for row in _rows(unit)]
    path.write_text("\n".join(lines) + "\n")
    return path


def files(folder: Path) -> Iterator[Path]:
    """All files under a folder, hidden ones too."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def figures(tree: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All measured figures of an evaluation, with their dotted keys."""
    if isinstance(tree, Mapping) and {"value", "low", "high"} <= set(tree):
        yield at, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from figures(value, f"{at}.{key}" if at else str(key))


def _name(unit: int) -> str:
    return f"Quorra{'abcdefghijklmnopqrst'[unit]}vex"


def _unit(unit: int) -> str:
    return f"MRN7{unit:03d}99"


def _rows(unit: int) -> Iterator[dict[str, Any]]:
    for visit in range(RECORDS_PER_UNIT):
        label = LABELS[unit % 2]
        word = ("murmur", "wheeze")[unit % 2]
        text = f"Patient {_name(unit)} came for visit {visit}, {word} {unit}-{visit}, {MARKER}."
        span = {"start": 8, "end": 8 + len(_name(unit)), "type": "NAME"}
        yield {"text": text, "label": label, "mrn": _unit(unit), "spans": [span]}
