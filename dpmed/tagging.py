"""What `dpmed tag` does: identifiers from all sources, kept apart; the records with their spans; counts without values.

Each source is asked alone and the answers are put together by `resolved_spans`, so that the counts also tell how far
the sources agree: the share of known identifiers that a pattern finds too is the patterns' recall on the user's data.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpmed.data.identifier_types import IDENTIFIER_TYPES, canonical_type, is_direct
from dpmed.data.identifiers import Span, identifier_counts, resolved_spans, tag_identifiers, with_spans
from dpmed.data.patterns import pattern_spans
from dpmed.data.records import SPAN_SOURCES, normalised_text
from dpmed.errors import InputError
from dpmed.runs import claim_output_dir, write_json, write_private

if TYPE_CHECKING:
    from datasets import Dataset

COUNTS_FILE = "identifiers.json"
RECORDS_FILE = "records.parquet"
STRATA = {"1": 1, "2-4": 4, "5+": None}
"""In the records of how many patients a value stands, as in leakage figures -> the largest number of the stratum."""


@dataclass(frozen=True)
class TagSources:
    """Where identifiers come from, beside the spans that the records bring."""

    patterns: Literal["true", "false", "presidio"] = "true"
    """presidio: dpmed's own and Presidio's, see presidio.py."""
    table: str | None = None
    """The user's patient table."""
    table_unit: str | None = None
    """Its column with the patient; null takes the name of the records' column."""
    table_types: Mapping[str, str] = field(default_factory=dict)
    """Column -> type, beside the columns whose names say it."""
    everywhere: bool = False
    """Look for the table's values in the records of other patients too."""
    day_first: bool = False
    """Whether 03/04/1950 is the third of April."""
    ner: str | None = None
    """Folder of a token-classification model."""


def tag_records(
    records: Dataset, sources: TagSources, *, unit: str | None, k: int = 2
) -> tuple[Dataset, dict[str, Any]]:
    """Tag records with all sources.

    Args:
        records: as loaded.
        sources: see there.
        unit: the name of the column that the units came from; None if each record is its own unit.
        k: see `tag_identifiers`.

    Returns: the records with spans that do not overlap, types by their names here; and counts without values.
    Raises: InputError as the sources' own loaders do; if a table is given and no patient column.
    """
    layers: list[list[list[Span]]] = [[_canonical(spans) for spans in records["identifiers"]]]
    counts: dict[str, Any] = {}
    if sources.table is not None:
        found, counts["table"] = _from_table(records, sources, unit)
        layers.append(found)
    if sources.patterns != "false":
        find = pattern_finder(sources.patterns)
        layers.append([find(text) for text in records["text"]])
    if sources.ner is not None:
        from dpmed.data.ner import EntityTagger

        layers.append(EntityTagger(sources.ner).spans(list(records["text"])))
    together = [[span for spans in found for span in spans] for found in zip(*layers, strict=True)]
    resolved = [resolved_spans(text, spans) for text, spans in zip(records["text"], together, strict=True)]
    tagged = tag_identifiers(with_spans(records, resolved), k=k)
    spans_of = list(tagged["identifiers"])
    counts = {
        "identifiers": identifier_counts(tagged),
        "types": {name: _about(name) for name in sorted({span["type"] for spans in spans_of for span in spans})},
        "by_patients": _by_patients(tagged),
        "touched": _touched(tagged),
        "overlaps": _overlaps(together),
        **counts,
    }
    return tagged, counts


def pattern_finder(patterns: Literal["true", "presidio"]) -> Callable[[str], list[Span]]:
    """What finds the spans of source "pattern" in a text.

    Raises: InputError if Presidio is asked for and not installed.
    """
    if patterns == "true":
        return pattern_spans
    from dpmed.data.presidio import PresidioPatterns

    presidio = PresidioPatterns()
    return lambda text: resolved_spans(text, [*pattern_spans(text), *presidio.spans(text)])


def tag_folder(
    records: Dataset,
    folder: Path,
    sources: TagSources,
    *,
    about: Mapping[str, Any],
    unit: str | None,
    k: int,
    check: Dataset | None = None,
) -> dict[str, Any]:
    """Tag records and write a folder: `identifiers.json` (counts) and `records.parquet` (records and spans).

    Args:
        records: as loaded.
        folder: new or empty; made 0700, its files 0600.
        sources: see there.
        about: goes first into the counts, for instance the name of the data.
        unit: see `tag_records`.
        k: see `tag_identifiers`.
        check: labelled records on which the patterns are measured, see `pattern_figures`.

    Returns: what `identifiers.json` holds; in it `asq_phi`, what the patterns are worth on that data set.
    """
    from dpmed.tag_check import measured_on_asq_phi, pattern_figures

    tagged, counts = tag_records(records, sources, unit=unit, k=k)
    checked = "presidio" if sources.patterns == "presidio" else "true"
    result = {
        **about,
        "n_records": len(records),
        "n_units": len(set(records["unit"])),
        "unit": unit,
        "k": k,
        **counts,
        "check": None if check is None else pattern_figures(check, pattern_finder(checked)),
        "asq_phi": None if sources.patterns == "false" else measured_on_asq_phi(sources.patterns),
    }
    claim_output_dir(folder, resume=False)
    write_records(folder / RECORDS_FILE, tagged if unit else tagged.remove_columns("unit"))
    write_json(folder / COUNTS_FILE, result)
    return result


def _from_table(records: Dataset, sources: TagSources, unit: str | None) -> tuple[list[list[Span]], dict[str, Any]]:
    from dpmed.data.patient_table import load_patient_table, table_spans

    assert sources.table is not None
    if unit is None:
        raise InputError("a patient table needs the column that names the patient of each record: set --data.unit")
    table = load_patient_table(
        sources.table, unit=sources.table_unit or unit, types=sources.table_types, day_first=sources.day_first
    )
    found = table_spans(records, table, everywhere=sources.everywhere)
    return found.spans, {"columns": dict(table.columns), "ignored": list(table.ignored), **found.counts}


def _canonical(spans: Sequence[Span]) -> list[Span]:
    return [span | {"type": canonical_type(span["type"])} for span in spans]


def _about(name: str) -> dict[str, Any]:
    kind = IDENTIFIER_TYPES.get(name)
    return {"direct": is_direct(name), "safe_harbor": kind.safe_harbor if kind else None}


def _by_patients(tagged: Dataset) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Source -> type -> stratum -> how many different values, and how many spans of them.

    A value's stratum is the number of units in whose records it is tagged, from whatever source and as whatever type.
    """
    units: dict[int, set[str]] = {}
    spans: Counter[tuple[str, str, int]] = Counter()
    for unit, text, found in zip(tagged["unit"], tagged["text"], tagged["identifiers"], strict=True):
        for span in found:
            value = hash(normalised_text(text[span["start"] : span["end"]]))
            units.setdefault(value, set()).add(unit)
            spans[span["source"], span["type"], value] += 1
    result: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for (source, kind, value), count in sorted(spans.items(), key=lambda item: item[0][:2]):
        cells = result.setdefault(source, {}).setdefault(kind, {name: {"values": 0, "spans": 0} for name in STRATA})
        cell = cells[_stratum(len(units[value]))]
        cell["values"] += 1
        cell["spans"] += count
    return result


def _stratum(n_units: int) -> str:
    return next(name for name, most in STRATA.items() if most is None or n_units <= most)


def _touched(tagged: Dataset) -> dict[str, dict[str, int]]:
    """Source (and "any") -> how many records and units hold one of its spans."""
    records: Counter[str] = Counter()
    units: dict[str, set[str]] = {}
    for unit, spans in zip(tagged["unit"], tagged["identifiers"], strict=True):
        for source in {span["source"] for span in spans} | ({"any"} if spans else set()):
            records[source] += 1
            units.setdefault(source, set()).add(unit)
    return {
        name: {"n_records": records[name], "n_units": len(units[name])}
        for name in ("any", *SPAN_SOURCES)
        if name in units
    }


def _overlaps(together: Sequence[Sequence[Span]]) -> dict[str, dict[str, int]]:
    """Before they are resolved: source -> other source -> how many spans of the one overlap a span of the other."""
    result: dict[str, Counter[str]] = {}
    for spans in together:
        for span in spans:
            others = {
                other["source"]
                for other in spans
                if other["start"] < span["end"] and span["start"] < other["end"] and other["source"] != span["source"]
            }
            counts = result.setdefault(span["source"], Counter())
            counts.update(["n_spans", *others])
    return {source: dict(result[source]) for source in SPAN_SOURCES if source in result}


def write_records(path: Path, records: Dataset) -> None:
    """Write parquet in one step, mode 0600."""
    import polars

    frame = polars.from_arrow(records.data.table)
    assert isinstance(frame, polars.DataFrame)
    parquet = io.BytesIO()
    frame.write_parquet(parquet)
    write_private(path, parquet.getvalue())
