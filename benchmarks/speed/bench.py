"""Speed and memory of DP-LoRA beside plain LoRA and Opacus: every ratio from one run, paired and interleaved.

    python benchmarks/speed/bench.py --models MODELS --data IU_XRAY            # on the CPU: results/cpu.json, cpu.md
    python benchmarks/speed/bench.py --rows bert-small-t128 --repetitions 2    # a part
    make gpu-bench                                                             # all rows on the GPU: results/cuda.json

rows.py holds the experiment. Each measurement is a process of its own; the columns take turns within each repetition.
Results are written after every measurement, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import summary
from rows import ROWS, Column, Job, Row, Settings

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 3600
LARGEST_TRIED = 1024
"""Physical batch beyond which the search for the largest one stops."""
Measure = Callable[[Job], dict[str, Any]]


class Results:
    """The document of a run, on disk after every change.

    Args:
        path: the JSON file; the tables go beside it as .md.
        rows: the rows of this run; others that the file holds are kept.
        settings: must agree with those of the file.
        fresh: start anew.
    Raises: SystemExit if the file was made with other settings.
    """

    def __init__(self, path: Path, rows: Sequence[Row], settings: Settings, *, fresh: bool = False) -> None:
        from dpmed.environment import versions

        self.path = path
        self.document: dict[str, Any] = {"settings": {}, "environment": {}, "measurements": [], "largest": {}}
        if path.is_file() and not fresh:
            self.document = json.loads(path.read_text(encoding="utf-8"))
            self._forget_what_failed()
            before = {key: self.document["settings"].get(key) for key in settings.shared()}
            if before != settings.shared():
                raise SystemExit(f"{path} was measured with {before}: pass --fresh, or another --output")
        self.document["settings"] = {**settings.shared(), "repetitions": settings.repetitions}
        self.document["environment"] |= {"versions": versions(), "cpu_count": os.cpu_count(), "devices": []}
        known = {name for m in self.document["measurements"] if (name := m["row"])} | {row.name for row in rows}
        self._rows = [*rows, *(r for r in ROWS if r.name in known and r.name not in {row.name for row in rows})]

    def _forget_what_failed(self) -> None:
        """What was null is tried again: the model, the data or the device may be here now."""
        self.document["measurements"] = [m for m in self.document["measurements"] if "null" not in m]
        for known in self.document["largest"].values():
            for column in [column for column, found in known.items() if not found["batch"]]:
                del known[column]

    def find(self, row: Row, column: Column, repetition: int) -> dict[str, Any] | None:
        """What is known of a measurement; a column that cannot run here is null once, for all repetitions."""
        for m in self.document["measurements"]:
            if (m["row"], m["column"]) == (row.name, column) and (m["repetition"] == repetition or "null" in m):
                return m
        return None

    def add(self, found: dict[str, Any]) -> None:
        """Keep a measurement."""
        self.document["measurements"].append(found)
        self.write()

    def write(self) -> None:
        """Write both files, whole or not at all."""
        done = self.document["measurements"]
        self.document["environment"]["devices"] = sorted({m["device"] for m in done if "device" in m})
        self.document["drawn_rows"] = [row.name for row in self._rows if row.draw is not None]
        self.document["rows"] = summary.summarise(self._rows, done)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.document, indent=1) + "\n"
        for path, content in ((self.path, text), (self.path.with_suffix(".md"), summary.markdown(self.document))):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)


def run(rows: Sequence[Row], settings: Settings, results: Results, measure: Measure) -> None:
    """Measure what the results do not hold yet."""
    for row in rows:
        batch = row.batch or largest_common_batch(row, settings, results, measure)
        for repetition in range(settings.repetitions):
            for column in in_turn(row.columns, repetition):
                if results.find(row, column, repetition) is None:
                    found = measure(Job(row, column, repetition, batch, settings))
                    results.add(found)
                    say(found)


def in_turn(columns: Sequence[Column], repetition: int) -> list[Column]:
    """The columns in an order that starts elsewhere in each repetition."""
    start = repetition % len(columns)
    return [*columns[start:], *columns[:start]]


def largest_common_batch(row: Row, settings: Settings, results: Results, measure: Measure) -> int:
    """Find each column's largest physical batch; return what both plain LoRA and one_pass fit, at least 1."""
    known = results.document["largest"].setdefault(row.name, {})
    for column in row.columns:
        if column not in known:
            known[column] = largest_batch(row, column, settings, measure)
            results.write()
    return max(1, min(known[column]["batch"] for column in ("plain", "one_pass")))


def largest_batch(row: Row, column: Column, settings: Settings, measure: Measure) -> dict[str, Any]:
    """Largest of 1, 2, 3, 4, 6, 8, 12, 16, ... that one column fits, with its speed there; 0 with the reason if none.

    One timed step after one of warm-up: memory is what is asked for.
    """
    brief = replace(settings, steps=1, warmup=1)
    best: dict[str, Any] = {"batch": 0}
    size = 1
    while size <= LARGEST_TRIED:
        found = measure(Job(row, column, 0, size, brief))
        say(found)
        if "null" in found:
            best["next"] = f"{size}: {found['null']}"
            break
        best = {k: found[k] for k in ("batch", "seconds", "real_tokens", "peak_bytes")}
        power = size & (size - 1) == 0
        size = size + size // 2 if power and size > 1 else -(-size * 4 // 3) if size > 1 else 2
    return best


def in_own_process(job: Job) -> dict[str, Any]:
    """Measure in a fresh process, so that its peak memory is its own."""
    threads = str(job.settings.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "DPMED_LEDGER": "none"}
    command = [sys.executable, str(HERE / "measure.py"), json.dumps(job.to_dict())]
    reason = f"no result within {LIMIT_SECONDS} s"
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        reason = f"its process ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:200]}"
    except subprocess.TimeoutExpired:
        pass
    return {
        "row": job.row.name,
        "column": job.column,
        "repetition": job.repetition,
        "batch": job.batch,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "null": reason,
    }


def in_this_process(job: Job) -> dict[str, Any]:
    """Measure here. For a GPU, whose peak memory can be counted anew; saves the start of a process."""
    import gc

    import torch
    from measure import measure

    gc.collect()  # the model before, which trainers hold in cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return measure(job)


def say(found: dict[str, Any]) -> None:
    """One line about a measurement."""
    what = f"{found['row']} {found['column']} repetition {found['repetition']} B={found['batch']}"
    if "null" in found:
        print(f"{what}: null, {found['null']}", file=sys.stderr, flush=True)
    else:
        speed = (
            f"{found['n_steps'] / found['seconds']:.3f} steps/s, {summary.tokens_per_second(found):.0f} real tokens/s"
        )
        print(f"{what}: {speed}, {summary.peak(found):.0f} MiB, load {found['load']}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> tuple[list[Row], Settings, argparse.Namespace]:
    """The command line: rows, settings, and the rest."""
    by_name = {row.name: row for row in ROWS}
    parser = argparse.ArgumentParser(prog="bench.py", description="Speed of DP-LoRA beside plain LoRA and Opacus.")
    parser.add_argument("--rows", help=f"comma-separated, of {', '.join(by_name)}; default: all that the device can")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each measurement")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", help="folder with minilm-l6 and smollm2-135m")
    parser.add_argument("--data", help="folder with the IU X-ray reports, see recipes/iu_xray")
    parser.add_argument("--output", type=Path, help="default: results/DEVICE.json beside this script")
    parser.add_argument("--batch", type=int, help="physical batch of the rows that else search for their largest")
    parser.add_argument("--columns", help="comma-separated; default: all of a row")
    parser.add_argument("--together", action="store_true", help="cuda only: all in one process")
    parser.add_argument("--fresh", action="store_true", help="measure again what the output file holds")
    options = parser.parse_args(arguments)
    names = [row.name for row in ROWS if options.device == "cuda" or not row.cuda]
    if options.rows:
        names = options.rows.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    if min(options.repetitions, options.steps, options.warmup, options.threads) < 1:
        parser.error("--repetitions, --steps, --warmup and --threads must be at least 1")
    settings = Settings(
        steps=options.steps,
        warmup=options.warmup,
        repetitions=options.repetitions,
        threads=options.threads,
        device=options.device,
        models=options.models,
        data=options.data,
    )
    if options.together and options.device != "cuda":
        parser.error("--together needs --device cuda: resident memory cannot be counted anew within a process")
    options.output = options.output or HERE / "results" / f"{options.device}.json"
    return [_changed(by_name[name], options) for name in names], settings, options


def _changed(row: Row, options: argparse.Namespace) -> Row:
    """The row with the batch and the columns that the command line asks for."""
    columns = row.columns if not options.columns else tuple(c for c in row.columns if c in options.columns.split(","))
    return replace(row, batch=row.batch or options.batch, columns=columns)


def main(arguments: Sequence[str] | None = None) -> int:
    rows, settings, options = parse(arguments)
    results = Results(options.output, rows, settings, fresh=options.fresh)
    if options.together:
        from dpmed import environment

        environment.prepare(online=False)
        os.environ["DPMED_LEDGER"] = "none"
    run(rows, settings, results, in_this_process if options.together else in_own_process)
    print(summary.markdown(results.document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
