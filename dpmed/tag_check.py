"""How well the patterns do on labelled text: `dpmed tag --check`, and what was measured on ASQ-PHI.

`dpmed/data/asq_phi.json` is made by benchmarks/identifiers/asq_phi.py from its results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpmed.data.identifier_types import canonical_type
from dpmed.data.identifiers import Span
from dpmed.data.matching import KnownValues
from dpmed.data.patterns import pattern_spans
from dpmed.data.records import PLACEHOLDER_UNIT, load_records, record_features
from dpmed.errors import InputError
from dpmed.memorization.intervals import NotApplicable, figures_json, rate_by_unit

if TYPE_CHECKING:
    from datasets import Dataset

ASQ_PHI_FILE = "synthetic_dataset.txt"
MEASURED_FILE = "asq_phi.json"
"""Among the files of dpmed.data."""
_QUERY, _TAGS = "===QUERY===", "===PHI_TAGS==="


def labelled_records(source: str, *, text: str, unit: str | None, identifiers: str | None) -> Dataset:
    """Records whose identifiers somebody labelled.

    Args:
        source: what `load_records` reads, with a column of spans; or the folder or file of ASQ-PHI
            (github.com/JamesWeatherhead/synthetic-clinical-queries).
        text: column of the text.
        unit: column of the patient.
        identifiers: column of the labelled spans; None takes "identifiers".

    Raises: InputError if there is none, or it labels nothing.
    """
    path = Path(source).expanduser()
    if (path / ASQ_PHI_FILE).is_file() or (path.name == ASQ_PHI_FILE and path.is_file()):
        records = _asq_phi(path / ASQ_PHI_FILE if path.is_dir() else path)
    else:
        records = load_records(source, text=text, unit=unit, identifiers=identifiers or "identifiers")
    if not any(records["identifiers"]):
        raise InputError(
            f"{source}: labels no identifier, so nothing can be measured: name the column (data.identifiers)"
        )
    return records


def _asq_phi(path: Path) -> Dataset:
    """Each query is a record of its own; a label's value is looked for in it as whole words, at all its places."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"text": [], "unit": [], "record_id": [], "identifiers": []}
    try:
        blocks = path.read_text(encoding="utf-8").split(_QUERY)[1:]
        for row, block in enumerate(blocks):
            query, _, tags = block.partition(_TAGS)
            labels = [json.loads(line) for line in tags.splitlines() if line.strip()]
            known = KnownValues(
                [str(label["value"]) for label in labels], [label["identifier_type"] for label in labels]
            )
            spans = [
                {"start": found.start, "end": found.end, "type": known.types[found.index], "source": "known"}
                for found in known.find(query.strip())
            ]
            for name, value in zip(columns, (query.strip(), f"{PLACEHOLDER_UNIT}{row}", str(row), spans), strict=True):
                columns[name].append(value)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path}: not in ASQ-PHI's form ({type(error).__name__}): download the file again") from None
    return Dataset.from_dict(columns, features=record_features())


def measured_on_asq_phi(patterns: Literal["true", "presidio"]) -> dict[str, Any] | None:
    """Recall and precision of the patterns as measured on ASQ-PHI: figures of that data set, not of anybody's notes.

    Args:
        patterns: dpmed's own, or with Presidio's.

    Returns: as `pattern_figures`, with "data": which part of which file; None if that was not measured.
    """
    measured = json.loads(resources.files("dpmed.data").joinpath(MEASURED_FILE).read_text(encoding="utf-8"))
    figures = measured[patterns]
    return None if figures is None else {"data": measured["data"], **figures}


def pattern_figures(
    labelled: Dataset, find: Callable[[str], list[Span]] = pattern_spans, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Recall and precision of the patterns, by type and over all.

    A labelled span is found if all its letters and digits lie in spans of patterns, of whatever type: what counts is
    that it is covered. A pattern's span is right if it overlaps a labelled one, of whatever type.

    Args:
        labelled: records with labelled spans.
        find: gives the patterns' spans of a text, none overlapping.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: {"n_records", "n_units", "recall": {type: figure}, "precision": {type: figure}}; the first type is "all".
        Types of recall are those of the labels, types of precision those of the patterns. Intervals: `rate_by_unit`.
    """
    recall: list[tuple[str, bool, str]] = []
    precision: list[tuple[str, bool, str]] = []
    for text, unit, labels in zip(labelled["text"], labelled["unit"], labelled["identifiers"], strict=True):
        found = find(text)
        covered, labelled_at = _places(found), _places(labels)
        for span in labels:
            inside = {at for at in _places([span]) if text[at].isalnum()}
            recall.append((canonical_type(span["type"]), inside <= covered, unit))
        for span in found:
            precision.append((span["type"], not labelled_at.isdisjoint(_places([span])), unit))
    figures: Mapping[str, Any] = {
        "n_records": len(labelled),
        "n_units": len(set(labelled["unit"])),
        "recall": _rates(recall, "no identifier is labelled", bootstrap, seed),
        "precision": _rates(precision, "the patterns find nothing here", bootstrap, seed),
    }
    tree, reasons = figures_json(figures)
    return {**tree, "not_applicable": reasons}


def _places(spans: list[Span]) -> set[int]:
    return {at for span in spans for at in range(span["start"], span["end"])}


def _rates(cases: list[tuple[str, bool, str]], reason: str, bootstrap: int, seed: int) -> dict[str, Any]:
    if not cases:
        return {"all": NotApplicable(reason)}
    types = np.array([kind for kind, _, _ in cases])
    hits = np.array([hit for _, hit, _ in cases])
    _, units = np.unique([unit for _, _, unit in cases], return_inverse=True)

    def rate(chosen: np.ndarray) -> Any:
        return rate_by_unit(hits[chosen], units[chosen], "better", bootstrap, seed)

    by_type = {str(kind): rate(types == kind) for kind in np.unique(types)}
    return {"all": rate(np.ones(len(hits), dtype=bool)), **by_type}
