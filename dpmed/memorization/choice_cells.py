"""Cells of a table of multiple-choice items: texts, lists of options, and which option is the right one."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence


def cell_text(cell: object) -> str | None:
    """A cell as text; a list of texts is joined by line breaks. None for anything else, and for a blank one."""
    if isinstance(cell, list) and cell and all(isinstance(part, str) for part in cell):
        cell = "\n".join(cell)
    if isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell):
        cell = str(cell)
    return cell.strip() or None if isinstance(cell, str) else None


def cell_options(cell: object) -> tuple[str, ...] | None:
    """A list of texts, or a list as JSON; None for anything else."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    texts = [cell_text(option) for option in cell] if isinstance(cell, list | tuple) else []
    return None if None in texts else tuple(text for text in texts if text is not None)


def right_options(cells: Sequence[object], options: Sequence[Sequence[str]]) -> tuple[list[int | None], list[int]]:
    """The right option of each item, and the rows where that is not clear.

    A cell holds the option's text, its letter (A is the first) or its index from 0. The first of these three that fits
    the whole column is how the column is read: where options are "O", "A", "B", "AB" and another row says "C", an "A"
    is a letter. Where none fits all rows, each row is read by the first that fits it; a number is an index first.

    Args:
        cells: as they stand in the table.
        options: of each item.

    Returns: index or None [i]; rows of a column of numbers that may be indices as well as options, and differ.
    """
    readings = [[read(c, o) for c, o in zip(cells, options, strict=True)] for read in (_by_text, _by_letter, _by_index)]
    texts, _, indices = readings
    whole = [reading for reading in readings if None not in reading]
    if any(isinstance(cell, str) for cell in cells) or len(whole) < 2:
        if whole:
            return whole[0], []
        rows = zip(cells, *readings, strict=True)
        return [_first(found if isinstance(cell, str) else found[::-1]) for cell, *found in rows], []
    return indices, [row for row, (a, b) in enumerate(zip(texts, indices, strict=True)) if a != b]


def _by_text(cell: object, options: Sequence[str]) -> int | None:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = cell_text(cell)
    return list(options).index(text) if text is not None and text in options else None


def _by_letter(cell: object, options: Sequence[str]) -> int | None:
    text, letters = (cell_text(cell) if isinstance(cell, str) else None), string.ascii_uppercase[: len(options)]
    return letters.index(text) if text is not None and text in list(letters) else None


def _by_index(cell: object, options: Sequence[str]) -> int | None:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = None if isinstance(cell, float) else cell_text(cell)
    numbers = [str(index) for index in range(len(options))]
    return numbers.index(text) if text is not None and text in numbers else None


def _first(found: Sequence[int | None]) -> int | None:
    return next((index for index in found if index is not None), None)
