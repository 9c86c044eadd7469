"""Medians, paired ratios and the Markdown tables of a results file; nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rows import BASELINE, COLUMNS, Row

Result = Mapping[str, Any]
MIB = 2**20

WANTED = (
    ("one_pass", "throughput", 0.97, "at least 0.97 of plain LoRA's throughput at equal physical batch"),
    ("one_pass", "reports", 1.5, "at least 1.5 times plain LoRA's real tokens per second on real reports"),
    ("one_pass", "memory", 1.10, "peak memory at most 1.10 times plain LoRA's"),
    ("patients", "per record", 1.05, "patient-level units cost at most 5 % over record-level"),
)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """n, median, min and max; None of no values."""
    if not values:
        return None
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}


def tokens_per_second(result: Result) -> float:
    return result["real_tokens"] / result["seconds"]


def tokens_per_cpu_second(result: Result) -> float:
    return result["real_tokens"] / result["cpu_seconds"]


def records_per_second(result: Result) -> float:
    return result["records"] / result["seconds"]


def peak(result: Result) -> float:
    return result["peak_bytes"] / MIB


def summarise(rows: Sequence[Row], measurements: Sequence[Result]) -> dict[str, Any]:
    """Per row and column: medians, ratios to plain LoRA paired within a repetition, and the reason where it is null."""
    found: dict[str, Any] = {}
    for row in rows:
        of_row = [m for m in measurements if m["row"] == row.name]
        if of_row:
            found[row.name] = {column: _column(of_row, column) for column in row.columns}
    return found


def _column(of_row: Sequence[Result], column: str) -> dict[str, Any]:
    mine = [m for m in of_row if m["column"] == column]
    done = [m for m in mine if "null" not in m]
    if not done:
        return {"null": mine[0]["null"] if mine else "not measured yet"}
    figures: dict[str, Callable[[Result], float]] = {
        "steps_per_second": lambda m: m["n_steps"] / m["seconds"],
        "real_tokens_per_second": tokens_per_second,
        "share_of_real_tokens": lambda m: m["real_tokens"] / m["padded_tokens"],
        "peak_mib": peak,
        "start_mib": lambda m: m["start_bytes"] / MIB,
    }
    found: dict[str, Any] = {"batch": done[0]["batch"]}
    found |= {name: spread([figure(m) for m in done]) for name, figure in figures.items()}
    found["throughput_ratio"] = paired(of_row, column, BASELINE, tokens_per_second)
    found["cpu_time_throughput_ratio"] = paired(of_row, column, BASELINE, tokens_per_cpu_second)
    found["memory_ratio"] = paired(of_row, column, BASELINE, peak)
    if column == "patients":  # how much longer a record takes, and a record's computing alone
        found["time_per_record_ratio"] = paired(of_row, "one_pass", column, records_per_second)
    return found


def paired(of_row: Sequence[Result], column: str, base: str, figure: Callable[[Result], float]) -> dict | None:
    """Spread of figure(column) / figure(base) over the repetitions that have both."""
    ratios: list[float] = []
    for mine in of_row:
        others = [m for m in of_row if m["column"] == base and m["repetition"] == mine["repetition"]]
        if mine["column"] == column and "null" not in mine and others and "null" not in others[0]:
            ratios.append(figure(mine) / figure(others[0]))
    return spread(ratios)


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of a results document."""
    settings, environment = document["settings"], document["environment"]
    lines = [
        f"# Speed on {', '.join(environment['devices']) or settings['device']}",
        "",
        f"{settings['steps']} timed steps after {settings['warmup']}, {settings['repetitions']} repetitions; median"
        f" (min to max). {environment['cpu_count']} cores, load average {_loads(document)} when measurements began.",
    ]
    for name, columns in document["rows"].items():
        lines += ["", f"## {name}", "", *_table(columns), "", *_verdicts(name, columns, document)]
        reasons = [f"- `{c}` was not measured: {v['null']}" for c, v in columns.items() if "null" in v]
        lines += ["", *reasons] if reasons else []
        largest = document.get("largest", {}).get(name)
        if largest:
            shown = ", ".join(f"{column} {found['batch']}" for column, found in largest.items())
            lines += ["", f"Largest physical batch that fits: {shown}."]
    lines += ["", *(f"- `{column}`: {text}" for column, text in COLUMNS.items())]
    return "\n".join(lines) + "\n"


def _table(columns: Mapping[str, Any]) -> list[str]:
    lines = [
        "| column | B | steps/s | real tokens/s | real share | x plain | x plain, CPU time | peak MiB | x plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for column, found in columns.items():
        if "null" in found:
            cells = [column, *["-"] * 8]
        else:
            cells = [
                column,
                str(found["batch"]),
                _shown(found["steps_per_second"], 3),
                _shown(found["real_tokens_per_second"], 0),
                _shown(found["share_of_real_tokens"], 2),
                _shown(found["throughput_ratio"], 3),
                _shown(found["cpu_time_throughput_ratio"], 3),
                _shown(found["peak_mib"], 0),
                _shown(found["memory_ratio"], 3),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _shown(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return "-"
    low, middle, high = (f"{found[key]:.{digits}f}" for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _verdicts(name: str, columns: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    """What was wanted of this row, and whether its median meets it."""
    drawn = name in document.get("drawn_rows", ())
    lines: list[str] = []
    for column, kind, bound, text in WANTED:
        key = {"memory": "memory_ratio", "per record": "time_per_record_ratio"}.get(kind, "throughput_ratio")
        found = columns.get(column, {}).get(key)
        if found is None or (kind == "throughput" and drawn) or (kind == "reports" and not drawn):
            continue
        met = found["median"] <= bound if kind in ("memory", "per record") else found["median"] >= bound
        lines.append(f"- {'met' if met else 'NOT met'}: {text}; here {_shown(found, 3)}.")
    return lines


def _loads(document: Mapping[str, Any]) -> str:
    loads = spread([m["load"] for m in document["measurements"]])
    return _shown(loads, 1)
