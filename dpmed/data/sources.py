"""Where records come from: a file, a saved folder, the Hub, a Dataset or the synthetic hospital become a `Table`.

csv and json are parsed by the standard library and not by polars: polars quotes cells in its errors, fills short csv
rows with nulls in silence, and refuses valid notes such as `5" wide`; the standard library also gives line numbers.
Nothing is written to disk, and no message holds a cell.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, List

from dpmed.errors import InputError

HOSPITAL = "hospital:"
_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_texts(source: str | Path, *, key: str, separator: str, empty: str) -> list[str]:
    """The texts of one UTF-8 file, stripped; blank ones are left out.

    Args:
        source: the file.
        key: recipe key that names it, for messages.
        separator: what stands between two texts.
        empty: end of the message where there is none.

    Raises: InputError if the file cannot be read or holds no text.
    """
    file = Path(source).expanduser()
    try:
        texts = [text.strip() for text in file.read_text(encoding="utf-8-sig").split(separator)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {file}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    if not any(texts):
        raise InputError(f"{key}: {file}: {empty}")
    return [text for text in texts if text]


@dataclass(frozen=True)
class Table:
    """Named columns of one source, read on demand; `where` is how messages call the source."""

    where: str
    names: list[str]
    n_rows: int
    column: Callable[[str], list[Any]]

    def values(self, name: str) -> list[Any]:
        """The cells of a column. Raises: InputError if there is none of this name, or more than one."""
        if name not in self.names:
            raise InputError(f"{self.where}: there is no column '{name}'{shown_columns(self.names, name)}")
        if self.names.count(name) > 1:
            raise InputError(f"{self.where}: the column '{name}' stands {self.names.count(name)} times: rename one")
        return self.column(name)

    def reject(self, rows: Sequence[int], problem: str, remedy: str) -> None:
        """Raise InputError if any row is bad: how many, the first five, the remedy, and nothing of their content."""
        if rows:
            first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            count = f"{len(rows)} of {self.n_rows} records (rows {first}, counted from 0)"
            raise InputError(f"{self.where}: {problem} in {count}: {remedy}")


def read_table(source: str | Path | Dataset, split: str) -> Table:
    """Read a source; see `load_records` for what one is. Nothing of its content is checked yet.

    Raises: InputError, in one line and without content, if there is none, or it is empty, malformed or not UTF-8.
    """
    if isinstance(source, str) and source.startswith(HOSPITAL):
        from dpmed.data.hospital import hospital_records

        source = hospital_records(source)
    if isinstance(source, Dataset):
        table = _from_dataset(source, "the given Dataset")
    elif (path := Path(source).expanduser()).is_dir():
        table = _from_folder(path, split)
    elif path.is_file():
        table = _from_file(path)
    # A name that ends like a data file is a mistyped path: it must not be sent over the network.
    elif _HUB_NAME.fullmatch(str(source)) and path.suffix.lower() not in _FORMATS:
        table = _from_hub(str(source), split)
    else:
        raise InputError(f"{source}: file not found: check the path")
    if table.n_rows == 0:
        raise InputError(f"{table.where}: holds no records: give a file with at least one")
    return table


def _from_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path}: unknown format '{suffix}': use {', '.join(_FORMATS)} or a save_to_disk folder")
    if suffix == ".parquet":
        import polars  # lazily: the largest of the libraries after torch, and read for this format only

        try:
            frame = polars.read_parquet(path)
        except Exception as error:  # whatever polars raises may quote a cell
            raise InputError(f"{path}: not a readable parquet file ({type(error).__name__}): write it again") from None
        return Table(str(path), frame.columns, frame.height, lambda name: frame[name].to_list())
    content = _utf8(path)
    if not content.strip():
        raise InputError(f"{path}: the file is empty: give a file with at least one record")
    if suffix in (".csv", ".tsv"):
        return _from_delimited(path, content, "," if suffix == ".csv" else "\t")
    objects = _json_list(path, content) if content.lstrip()[0] == "[" else _json_lines(path, content)
    names = list(dict.fromkeys(name for row in objects for name in row))
    return Table(str(path), names, len(objects), lambda name: [row.get(name) for row in objects])


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}): check its permissions") from None
    except UnicodeDecodeError as error:
        at = f"the first bad byte is at offset {error.start}"
        raise InputError(f"{path}: not UTF-8 ({at}): save the file as UTF-8") from None


def _from_delimited(path: Path, content: str, delimiter: str) -> Table:
    limit = csv.field_size_limit(len(content) + 1)  # the default of 131,072 characters is less than a long note
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        header: list[str] = []
        rows: list[list[str]] = []
        for cells in reader:
            if not header:
                header = cells
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}: the record from line {start} has {len(cells)} cells, the header {len(header)}: "
                        "put quotes around cells that hold the separator or a line break"
                    )
                rows.append(cells)
            start = reader.line_num + 1
    except csv.Error:
        raise InputError(
            f"{path}: malformed record from line {start}: check that every quote is closed, and doubled inside a cell"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return Table(str(path), header, len(rows), lambda name: [cells[header.index(name)] for cells in rows])


def _json_list(path: Path, content: str) -> list[dict[str, Any]]:
    try:
        objects = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}: malformed JSON at line {line}: write a list of objects, or one a line") from None
    bad = [row for row, value in enumerate(objects) if not isinstance(value, dict)]
    if bad:
        raise InputError(f"{path}: item {bad[0]} of the list is not a JSON object: write a list of objects")
    return objects


def _json_lines(path: Path, content: str) -> list[dict[str, Any]]:
    objects = []
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() would also cut at U+2028 inside strings
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {number} is not a JSON object: write one object a line, or a list of them")
        objects.append(value)
    return objects


def _from_folder(path: Path, split: str) -> Table:
    try:
        loaded = datasets.load_from_disk(str(path), keep_in_memory=True)
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{path}: a folder, but not one that save_to_disk made ({kind}): name a file in it") from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise InputError(f"{path}: has no split '{split}': choose one of {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _from_dataset(loaded, str(path))


def _from_hub(name: str, split: str) -> Table:
    try:  # streaming leaves no copy of the records in the cache folder
        stream = datasets.load_dataset(name, split=split, streaming=True)
        loaded = Dataset.from_list(list(stream), features=stream.features)
    except Exception as error:  # the Hub client and the format readers raise many kinds, some with content
        raise InputError(
            f"{name}: file not found here, and not reachable on the Hub ({type(error).__name__}): check the path, or "
            f"the name, the split '{split}' and the network; offline, save the data set to a file first"
        ) from None
    return _from_dataset(loaded, name)


def _from_dataset(loaded: Dataset, where: str) -> Table:
    def column(name: str) -> list[Any]:
        values = list(loaded[name])
        feature = loaded.features[name]
        inner = feature.feature if isinstance(feature, List) else feature
        if not isinstance(inner, ClassLabel):
            return values
        named: list[str] = inner.names  # class numbers mean nothing to a reader; -1 is the Hub's "no label"
        known = {index: class_name for index, class_name in enumerate(named)}
        if isinstance(feature, List):
            return [None if value is None else [known.get(index) for index in value] for value in values]
        return [known.get(value) for value in values]

    return Table(where, list(loaded.column_names), len(loaded), column)


def shown_columns(names: list[str], wanted: str | None) -> str:
    """`; the columns are ...`, and the nearest, unless the "header" looks like a record (a csv without header)."""
    named = [name for name in names if name]
    if any(len(name) > 40 or not any(map(str.isalpha, name)) or not name.isprintable() for name in named):
        return "; its first line does not look like a header: add one with the names of the columns"
    nearest = difflib.get_close_matches(wanted or "", named, n=1)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    return f"{hint}; the columns are: {', '.join(named)}"
