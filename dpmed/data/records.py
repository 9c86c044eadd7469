"""Records in: csv, tsv, json, jsonl, parquet, a saved folder or the Hub become one `datasets.Dataset` in memory.

Columns of the result: `text`, `label` (absent, str, or list[str]), `unit` (the patient), `record_id` and `identifiers`
(character spans). Nothing is written to disk, and no message holds text, labels, units or identifier values:
messages name columns, counts and rows (counted from 0, as in `records[0]`).

csv and json are parsed by the standard library and not by polars: polars quotes cells in its errors, fills short csv
rows with nulls in silence, and refuses valid notes such as `5" wide`; the standard library also gives line numbers.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import polars
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from dpmed.errors import InputError

HOSPITAL = "hospital:"
PLACEHOLDER_UNIT = "record-"
"""Units that start so were made here, because no unit column was named: such a unit is one record, not a patient."""

SPAN_SOURCES = ("planted", "known", "pattern", "indirect")
_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT_TRIALS = 20


def load_records(
    source: str | Path | Dataset,
    *,
    text: str = "text",
    label: str | None = None,
    unit: str | None = None,
    record_id: str | None = None,
    identifiers: str | None = None,
    multi_label: bool = False,
    split: str = "train",
    require_unit: bool = False,
    label_separator: str = "|",
) -> Dataset:
    """Load records of any supported format into the columns that all of dpmed reads.

    Args:
        source: a csv, tsv, json (list of objects, or one a line), jsonl or parquet file; a folder made by
            `save_to_disk`; a loaded Dataset; or, when no such path exists, a Hub name `owner/name`. The name
            "hospital:PART?n_patients=N&seed=S" makes the synthetic hospital's records in memory.
        text: the column of the notes. Labels, units and ids are stripped of outer blanks; texts are kept as they are.
        label: the label column. Numbers and booleans become str: 3 and 3.0 -> "3", True -> "true".
        unit: the column that names the patient. Without it each record is its own unit, "record-<row>".
        record_id: the column that names the record. Without it the row number.
        identifiers: the column of known spans: list of {"start", "end", "type"[, "source"]}, or that as a JSON string.
            Offsets count characters (code points) of `text`, end exclusive.
        multi_label: the label is a list, or a string of labels joined by `label_separator`; "" is no label at all.
        split: which split of a saved DatasetDict or of the Hub data set; files have none.
        require_unit: refuse to fall back to records as units. DP training sets it.
        label_separator: see `multi_label`.

    Guarantee: the order of the rows is kept, none is dropped, and the same rows give the same Dataset in every format.
    Raises: InputError, in one line, when anything is missing, blank, malformed or not UTF-8.
    """
    if isinstance(source, str) and source.startswith(HOSPITAL):
        from dpmed.data.hospital import hospital_records

        source = hospital_records(source)
    table = _read(source, split)
    if require_unit and (unit is None or unit not in table.names):
        found = "no unit column is named" if unit is None else f"there is no column '{unit}'"
        raise InputError(
            f"{table.where}: {found}; differential privacy protects patients, so it needs the column that names the "
            f"patient of each record: set the recipe key data.unit{_shown(table.names, unit)}"
        )
    texts = _texts(table, text)
    columns: dict[str, list[Any]] = {"text": texts}
    if label is not None:
        columns["label"] = _labels(table, label, multi_label, label_separator)
    columns["unit"] = _names(table, unit) if unit else [f"{PLACEHOLDER_UNIT}{row}" for row in range(table.n_rows)]
    columns["record_id"] = _names(table, record_id) if record_id else [str(row) for row in range(table.n_rows)]
    columns["identifiers"] = _spans(table, identifiers, texts) if identifiers else [[] for _ in texts]
    kind = "none" if label is None else "multi" if multi_label else "single"
    return Dataset.from_dict(columns, features=record_features(label=kind))


def record_features(*, label: str = "none") -> Features:
    """The exact columns and types of records; `label` is "none", "single" or "multi"."""
    string = Value("string")
    span = {"start": Value("int64"), "end": Value("int64"), "type": string, "source": string}
    kinds: dict[str, dict[str, Any]] = {"none": {}, "single": {"label": string}, "multi": {"label": List(string)}}
    return Features({"text": string, **kinds[label], "unit": string, "record_id": string, "identifiers": List(span)})


# --- Sources: each becomes a _Table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Named columns of one source, read on demand; `where` is how messages call the source."""

    where: str
    names: list[str]
    n_rows: int
    column: Callable[[str], list[Any]]

    def values(self, name: str) -> list[Any]:
        if name not in self.names:
            raise InputError(f"{self.where}: there is no column '{name}'{_shown(self.names, name)}")
        if self.names.count(name) > 1:
            raise InputError(f"{self.where}: the column '{name}' stands {self.names.count(name)} times: rename one")
        return self.column(name)

    def reject(self, rows: Sequence[int], problem: str, remedy: str) -> None:
        """Raise InputError if any row is bad: how many, the first five, the remedy, and nothing of their content."""
        if rows:
            first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            count = f"{len(rows)} of {self.n_rows} records (rows {first}, counted from 0)"
            raise InputError(f"{self.where}: {problem} in {count}: {remedy}")


def _read(source: str | Path | Dataset, split: str) -> _Table:
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


def _from_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path}: unknown format '{suffix}': use {', '.join(_FORMATS)} or a save_to_disk folder")
    if suffix == ".parquet":
        try:
            frame = polars.read_parquet(path)
        except Exception as error:  # whatever polars raises may quote a cell
            raise InputError(f"{path}: not a readable parquet file ({type(error).__name__}): write it again") from None
        return _Table(str(path), frame.columns, frame.height, lambda name: frame[name].to_list())
    content = _utf8(path)
    if not content.strip():
        raise InputError(f"{path}: the file is empty: give a file with at least one record")
    if suffix in (".csv", ".tsv"):
        return _from_delimited(path, content, "," if suffix == ".csv" else "\t")
    objects = _json_list(path, content) if content.lstrip()[0] == "[" else _json_lines(path, content)
    names = list(dict.fromkeys(name for row in objects for name in row))
    return _Table(str(path), names, len(objects), lambda name: [row.get(name) for row in objects])


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}): check its permissions") from None
    except UnicodeDecodeError as error:
        at = f"the first bad byte is at offset {error.start}"
        raise InputError(f"{path}: not UTF-8 ({at}): save the file as UTF-8") from None


def _from_delimited(path: Path, content: str, delimiter: str) -> _Table:
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
    return _Table(str(path), header, len(rows), lambda name: [cells[header.index(name)] for cells in rows])


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


def _from_folder(path: Path, split: str) -> _Table:
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


def _from_hub(name: str, split: str) -> _Table:
    try:  # streaming leaves no copy of the records in the cache folder
        stream = datasets.load_dataset(name, split=split, streaming=True)
        loaded = Dataset.from_list(list(stream), features=stream.features)
    except Exception as error:  # the Hub client and the format readers raise many kinds, some with content
        raise InputError(
            f"{name}: file not found here, and not reachable on the Hub ({type(error).__name__}): check the path, or "
            f"the name, the split '{split}' and the network; offline, save the data set to a file first"
        ) from None
    return _from_dataset(loaded, name)


def _from_dataset(loaded: Dataset, where: str) -> _Table:
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

    return _Table(where, list(loaded.column_names), len(loaded), column)


# --- Columns ----------------------------------------------------------------------------------------------------------


def _shown(names: list[str], wanted: str | None) -> str:
    """`; the columns are ...`, and the nearest, unless the "header" looks like a record (a csv without header)."""
    named = [name for name in names if name]
    if any(len(name) > 40 or not any(map(str.isalpha, name)) or not name.isprintable() for name in named):
        return "; its first line does not look like a header: add one with the names of the columns"
    nearest = difflib.get_close_matches(wanted or "", named, n=1)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    return f"{hint}; the columns are: {', '.join(named)}"


def _storable(value: str) -> bool:
    """False for half a surrogate pair (JSON allows the escape), which Arrow refuses with the content in its message."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(table: _Table, name: str) -> list[str]:
    values = table.values(name)
    blank = [row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())]
    table.reject(blank, f"the text ('{name}') is blank", "drop them, or name the column of the notes (data.text)")
    other = [row for row, value in enumerate(values) if not isinstance(value, str)]
    table.reject(other, f"'{name}' is not text", "name the column of the notes (data.text)")
    broken = [row for row, value in enumerate(values) if not _storable(value)]
    table.reject(broken, f"the text ('{name}') is not valid Unicode (lone surrogates)", "save the data as UTF-8")
    return values


def _scalar(value: object) -> str | None:
    """One value as str; None for a missing or blank one. Raises TypeError for lists and objects."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, dict, tuple, set, bytes)) or (isinstance(value, str) and not _storable(value)):
        raise TypeError
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def _scalars(table: _Table, name: str, convert: Callable[[object], Any], wanted: str) -> list[Any]:
    """Convert a column, with one message for the rows that cannot be converted and one for the missing ones."""
    converted: list[Any] = []
    bad: list[int] = []
    for row, value in enumerate(table.values(name)):
        try:
            converted.append(convert(value))
        except TypeError:
            bad.append(row)
    table.reject(bad, f"'{name}' is not {wanted}", "store it so, or name another column")
    missing = [row for row, value in enumerate(converted) if value is None]
    table.reject(missing, f"'{name}' is missing", "fill it in, or drop these records")
    return converted


def _names(table: _Table, name: str) -> list[str]:
    return _scalars(table, name, _scalar, "a single value")


def _label(value: object) -> str | None:
    found = _scalar(value)
    # csv writers spell booleans True, true or TRUE: one class, whatever the format.
    return found.lower() if found is not None and found.lower() in ("true", "false") else found


def _labels(table: _Table, name: str, multi_label: bool, separator: str) -> list[Any]:
    def many(value: object) -> list[str] | None:
        if isinstance(value, str):
            parts: list[Any] = [part for part in value.split(separator) if part.strip()]
        elif isinstance(value, (list, tuple)):
            parts = list(value)
        else:
            parts = [value]
            if _scalar(value) is None:
                return None
        found = [_label(part) for part in parts]
        if None in found:
            raise TypeError
        return list(dict.fromkeys(part for part in found if part is not None))

    if not multi_label:
        return _scalars(table, name, _label, "a single label (for lists set multi_label)")
    return _scalars(table, name, many, "a list of labels without gaps")


def _spans(table: _Table, name: str, texts: list[str]) -> list[list[dict[str, Any]]]:
    result: list[list[dict[str, Any]]] = []
    bad: list[int] = []
    for row, (value, text) in enumerate(zip(table.values(name), texts, strict=True)):
        try:
            result.append(sorted((_span(span, len(text)) for span in _span_list(value)), key=lambda s: s["start"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            bad.append(row)
    remedy = 'give a list of {"start", "end", "type"} with 0 <= start < end <= characters of the text'
    table.reject(bad, f"'{name}' does not hold valid spans", f"{remedy}; source is one of {', '.join(SPAN_SOURCES)}")
    return result


def _span_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if isinstance(value, dict):  # older versions of datasets store a list of dicts as a dict of lists
        columns = list(value)
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, type(None))):
        raise TypeError
    return value or []


def _span(span: Any, n_characters: int) -> dict[str, Any]:
    start, end, kind, source = span["start"], span["end"], span["type"], span.get("source") or "known"
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not isinstance(source, str):
        raise TypeError
    if not 0 <= start < end <= n_characters or not kind.strip() or source not in SPAN_SOURCES or not _storable(kind):
        raise ValueError
    return {"start": start, "end": end, "type": kind.strip().upper(), "source": source}


# --- Units, texts, splits ---------------------------------------------------------------------------------------------


def normalised_text(text: str) -> str:
    """NFKC, casefolded, runs of white space as one blank: what counts as the same text when splits are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def unit_hash(unit: str, salt: str = "") -> str:
    """12 hex characters that name a unit in messages.

    Guarantee: hides the value only as far as it cannot be guessed: short record numbers can be enumerated, so whatever
    leaves the machine must use a secret `salt`.
    """
    return _digest(salt, unit)[:12]


def data_fingerprint(records: Dataset) -> str:
    """SHA-256 of the records' (unit, record_id, text), independent of their order; repeated records count."""
    rows = zip(records["unit"], records["record_id"], records["text"], strict=True)
    return _digest(*sorted(_digest(*row) for row in rows))


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)  # lengths keep ("a", "bc") and ("ab", "c") apart
    return digest.hexdigest()


def _groups(units: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Rows that must stay together: connected over shared units and shared (normalised) texts."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for unit, text in zip(units, texts, strict=True):
        parent[root(("text", text))] = root(("unit", unit))
    groups: dict[tuple[str, str], list[int]] = {}
    for row, unit in enumerate(units):
        groups.setdefault(root(("unit", unit)), []).append(row)
    return list(groups.values())


def _assigned(groups: Iterable[list[int]], targets: dict[str, float]) -> dict[str, list[int]]:
    """Give each group in turn to the part that lacks most records."""
    parts: dict[str, list[int]] = {name: [] for name in targets}
    for group in groups:
        parts[max(targets, key=lambda name: targets[name] - len(parts[name]))].extend(group)
    return parts


def split_by_unit(records: Dataset, *, fractions: dict[str, float], seed: int) -> dict[str, Dataset]:
    """Split records so that no patient, and no text, stands in two parts.

    Args:
        fractions: name of each part -> its share of the records, for example
            {"train": 0.7, "validation": 0.1, "heldout": 0.2}; they sum to 1.
        seed: decides which patients go where. The order of the rows does not, as long as a unit column was loaded.

    Guarantee: neither a unit nor a normalised text is in two parts; every record is in exactly one, in its old order.
        Sizes come as near to the fractions as the best of 20 seeded orders; within one record when groups are single.
    Raises: InputError if the fractions do not sum to 1, or if a part would stay empty.
    """
    shares = list(fractions.values())
    if not shares or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise InputError("the fractions of a split must be above 0 and sum to 1: for example train 0.8, heldout 0.2")
    units, texts = list(records["unit"]), [normalised_text(text) for text in records["text"]]
    keyed = [(min(_digest(units[r], texts[r]) for r in group), group) for group in _groups(units, texts)]
    targets = {name: share * len(records) for name, share in fractions.items()}
    best: tuple[tuple[int, float], dict[str, list[int]]] | None = None
    for trial in range(_SPLIT_TRIALS):
        ordered = sorted(keyed, key=lambda item: _digest(str(seed), str(trial), item[0]))
        parts = _assigned((group for _, group in ordered), targets)
        off = [abs(len(rows) - targets[name]) for name, rows in parts.items()]
        score = (sum(not rows for rows in parts.values()), sum(off))
        best = (score, parts) if best is None or score < best[0] else best
        if score[0] == 0 and max(off) < 1:
            break
    assert best is not None
    empty = [name for name, rows in best[1].items() if not rows]
    if empty:
        largest = max((len(group) for _, group in keyed), default=0)
        raise InputError(
            f"the part '{empty[0]}' would be empty: {len(records)} records form {len(keyed)} groups that share a unit "
            f"or a text, the largest of {largest}: raise its fraction, ask for fewer parts, or drop repeated texts"
        )
    return {name: records.select(sorted(rows), keep_in_memory=True) for name, rows in best[1].items()}


def _overlap(train: Dataset, heldout: Dataset) -> tuple[list[str | None], list[bool]]:
    """Per heldout record: its unit if that is a real unit of `train` too, else None; whether its text is in `train`."""
    units = {unit for unit in train["unit"] if not unit.startswith(PLACEHOLDER_UNIT)}
    texts = {normalised_text(text) for text in train["text"]}
    shared = [unit if unit in units else None for unit in heldout["unit"]]
    return shared, [normalised_text(text) in texts for text in heldout["text"]]


def check_disjoint(train: Dataset, heldout: Dataset, *, names: tuple[str, str] = ("train", "heldout")) -> None:
    """Raise InputError if a unit or a normalised text stands in both: every membership figure would be wrong.

    Placeholder units ("record-<row>") are not compared: the same row number of two files is not the same patient.
    """
    shared_units, shared_texts = _overlap(train, heldout)
    units = Counter(unit for unit in shared_units if unit is not None)
    if not units and not any(shared_texts):
        return
    first = ", ".join(unit_hash(unit) for unit in list(units)[:3])
    raise InputError(
        f"{names[0]} and {names[1]} share {len(units)} units{f' (hashes {first})' if first else ''} and "
        f"{sum(shared_texts)} records of {names[1]} have a text of {names[0]}: set the recipe key data.on_overlap to "
        "drop them, or split anew with split_by_unit"
    )


def drop_overlap(train: Dataset, heldout: Dataset) -> tuple[Dataset, int]:
    """`heldout` without the records whose unit or normalised text is in `train`, and how many those were.

    Raises: InputError if none would be left.
    """
    flags = zip(*_overlap(train, heldout), strict=True)
    kept = [row for row, (unit, text) in enumerate(flags) if unit is None and not text]
    if not kept:
        raise InputError("every heldout record shares its patient or its text with train: split with split_by_unit")
    return heldout.select(kept, keep_in_memory=True), len(heldout) - len(kept)
