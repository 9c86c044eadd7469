"""Read the runs of a SANI frontier and write what each setting leaves of the leakage, and of the usefulness.

    python benchmarks/sani/table.py runs/sani-causal --output results/causal

FOLDER/runs/NAME/{run,evaluation}.json of `dpmed frontier` are read; several folders are taken together. Every run is
compared with the `full` run of its own seed. Leakage: causal models, share of identifiers completed exactly; masked
ones, share of identifiers' tokens that are the first choice where the whole identifier is masked. `heldout`: the same
of held-out patients, whom no model has seen: what can be guessed. `gone`: the share of the leakage above that that is
gone.
Means over seeds, with the 95 % t interval of the seeds where there are two or more. Writes OUTPUT.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
COLUMNS = (
    *("leakage", "heldout", "gone", "extraction", "in_tries", "membership_auc", "min_k_auc"),
    *("other_words", "other_words_change", "perplexity"),
)
BOUNDS = {"gone": (-math.inf, math.inf), "other_words_change": (-1.0, math.inf), "perplexity": (1.0, math.inf)}
"""Least and greatest possible values, where they are not 0 and 1."""
TRIES = "n1000_p0.1"
"""Records that are found in a thousand drawn texts with a probability of at least 0.1."""


def leakage(part: Row) -> float:
    """Share of identifiers that the model gives, of an evaluation's figures of one side."""
    masked = part.get("fill_mask")
    return float((masked["identifiers"]["top_1"] if masked else part["identifier_extraction_rate"])["value"])


def value(figure: Row | None) -> float | None:
    return None if figure is None else figure["value"]


def read_run(folder: Path) -> Row | None:
    """What the table needs of a finished run."""
    if not (folder / "evaluation.json").is_file():
        return None
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    memorization, utility = evaluation["memorization"], evaluation["utility"]
    return {
        "setting": run["setting"],
        "method": run["method"],
        "seed": run["seed"],
        "device": run.get("device"),
        "versions": run["versions"],
        "leakage": leakage(memorization),
        "heldout": leakage(evaluation["reference"]["heldout"]),
        "extraction": value(memorization["extraction_rate"]),
        "in_tries": value((memorization.get("probabilistic_extraction") or {}).get(TRIES)),
        "membership_auc": value(memorization["membership_auc"]),
        "min_k_auc": value(((memorization.get("membership") or {}).get("min_k") or {}).get("auc")),
        "other_words": utility["other_words_accuracy"]["value"],
        "perplexity": utility["other_words_perplexity"]["value"],
    }


def compared(runs: Sequence[Row]) -> list[Row]:
    """Runs with `gone` and `other_words_change`, against the `full` run of their seed."""
    before = {run["seed"]: run for run in runs if run["method"] == "full"}
    found = []
    for run in runs:
        full = before.get(run["seed"])
        gone = change = None
        if run["method"] not in ("base", "full") and full is not None:
            change = run["other_words"] / full["other_words"] - 1
            if (learned := full["leakage"] - full["heldout"]) > 0:
                gone = 1 - (run["leakage"] - run["heldout"]) / learned
        found.append({**run, "gone": gone, "other_words_change": change})
    return found


def over_seeds(values: Sequence[float | None], bounds: tuple[float, float]) -> Row | None:
    """Mean, 95 % t interval (null of a single seed; cut at what is possible) and n of the known values, or None."""
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return None
    low = high = None
    if len(known) > 1:
        half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
        low, high = max(bounds[0], float(known.mean()) - half), min(bounds[1], float(known.mean()) + half)
    return {"value": float(known.mean()), "low": low, "high": high, "n_seeds": len(known)}


def summary(runs: Sequence[Row]) -> list[Row]:
    """One row a setting, in the order in which the settings come."""
    rows = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        own = [run for run in runs if run["setting"] == setting]
        row: Row = {"setting": setting, "method": own[0]["method"], "seeds": sorted(run["seed"] for run in own)}
        rows.append(
            row | {name: over_seeds([run[name] for run in own], BOUNDS.get(name, (0.0, 1.0))) for name in COLUMNS}
        )
    return rows


def cell(figure: Row | None, write: Callable[[float], str]) -> str:
    if figure is None:
        return ""
    text = write(figure["value"])
    return text if figure["low"] is None else f"{text} ({write(figure['low'])} to {write(figure['high'])})"


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown: shares in per cent."""

    def percent(x: float) -> str:
        return f"{100 * x:.1f}"

    lines = [
        "| setting | seeds | identifiers, % | of held-out, % | gone, % | records, % | in 1000 tries, % "
        "| AUC, reference | AUC, Min-K% | other words, % | change, % | perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [cell(row[name], percent) for name in ("leakage", "heldout", "gone", "extraction", "in_tries")]
        parts += [cell(row[name], lambda x: f"{x:.2f}") for name in ("membership_auc", "min_k_auc")]
        parts += [cell(row[name], percent) for name in ("other_words", "other_words_change")]
        parts += [cell(row["perplexity"], lambda x: f"{x:.2f}")]
        lines.append(f"| {row['setting']} | {len(row['seeds'])} | " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of dpmed frontier")
    parser.add_argument("--output", required=True, type=Path, help="file to write, without ending")
    options = parser.parse_args(arguments)
    paths = sorted(path for folder in options.folders for path in (folder / "runs").iterdir())
    runs = [run for path in paths if (run := read_run(path)) is not None]
    if not runs:
        raise SystemExit(f"{options.folders[0]}: no finished run; name the folder of a frontier")
    rows = summary(compared(runs))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    made = {"device": runs[0]["device"], "versions": runs[0]["versions"]}
    document = json.dumps({"rows": rows, "runs": compared(runs), **made}, indent=1)
    options.output.with_suffix(".json").write_text(document + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
