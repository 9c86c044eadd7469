"""Recall and precision of dpmed's patterns on ASQ-PHI: 1,051 made-up clinical queries with labelled identifiers.

    python benchmarks/identifiers/asq_phi.py FOLDER        # results/asq_phi.json; FOLDER holds synthetic_dataset.txt

It also writes what `dpmed tag` shows, dpmed/data/asq_phi.json: the odd half of the results, nothing else.

With the extra `presidio` installed, Presidio's recognisers are measured too, alone and beside ours, on the odd half.

The data set: github.com/JamesWeatherhead/synthetic-clinical-queries (MIT). `odd` is every second query, beginning with
the second: the patterns were mended only on what they did on the others (`even`).
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from dpmed.data.presidio import PresidioPatterns
from dpmed.environment import versions
from dpmed.errors import InputError
from dpmed.runs import write_json
from dpmed.tag_check import ASQ_PHI_FILE, MEASURED_FILE, labelled_records, pattern_figures
from dpmed.tagging import pattern_finder

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "dpmed" / "data" / MEASURED_FILE
ODD = "every second query, beginning with the second; the patterns were mended on the others only"


def measure(folder: Path) -> dict[str, Any]:
    """Figures over all queries and over the two halves; no text and no value of the data set."""
    records = labelled_records(str(folder), text="text", unit=None, identifiers=None)
    halves = {"all": range(len(records)), "even": range(0, len(records), 2), "odd": range(1, len(records), 2)}
    figures: dict[str, Any] = {name: pattern_figures(records.select(rows)) for name, rows in halves.items()}
    odd = records.select(halves["odd"])
    try:
        finders = {"presidio_alone": PresidioPatterns().spans, "with_presidio": pattern_finder("presidio")}
        figures["presidio"] = {name: pattern_figures(odd, find) for name, find in finders.items()}
    except InputError as error:
        figures["presidio"], figures["not_applicable"] = None, {"presidio": str(error)}
    digest = hashlib.sha256((folder / ASQ_PHI_FILE).read_bytes()).hexdigest()
    return {"data": {"name": "ASQ-PHI", "file": ASQ_PHI_FILE, "sha256": digest}, "versions": versions(), **figures}


def shipped(result: dict[str, Any]) -> dict[str, Any]:
    """What of the results goes with the package, by `--patterns` of `dpmed tag`."""
    both = result["presidio"]
    return {
        "data": {**result["data"], "part": ODD},
        "true": result["odd"],
        "presidio": None if both is None else both["with_presidio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"the folder with {ASQ_PHI_FILE}")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "asq_phi.json")
    parser.add_argument("--shipped", type=Path, default=SHIPPED, help="what dpmed tag shows")
    args = parser.parse_args()
    result = measure(args.folder)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    write_json(args.shipped, shipped(result))
    for name in ("recall", "precision"):
        for kind, figure in result["odd"][name].items():
            interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
            print(f"{name:9} {kind:12} {figure['value']:.3f} ({interval}), n {figure['n']}")


if __name__ == "__main__":
    main()
