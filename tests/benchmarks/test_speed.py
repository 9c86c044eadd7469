"""The speed benchmark on a tiny row, in this process: what it writes, never how fast."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"
COLUMNS = ("plain", "lora", "one_pass", "patients", "opacus", "ghost")
FIGURES = {"steps_per_second", "real_tokens_per_second", "share_of_real_tokens", "peak_mib", "start_mib"}
RATIOS = {"throughput_ratio", "cpu_time_throughput_ratio", "memory_ratio"}


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The script's modules, which import each other by their bare names."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in ("rows", "summary", "measure", "bench")}
    finally:
        sys.path.remove(str(SCRIPTS))


def tiny_row(scripts: Any, **changes: Any) -> Any:
    values = {"name": "tiny-t16", "model": "tiny", "rank": 2, "targets": "all-linear", "batch": 8, "tokens": 16}
    return scripts["rows"].Row(**{**values, "columns": COLUMNS, **changes})


def one_step(scripts: Any, **changes: Any) -> Any:
    return scripts["rows"].Settings(**{"steps": 1, "warmup": 1, "repetitions": 1, **changes})


def run(scripts: Any, path: Path, row: Any, settings: Any, measure: Any) -> dict[str, Any]:
    results = scripts["bench"].Results(path, [row], settings)
    scripts["bench"].run([row], settings, results, measure)
    return json.loads(path.read_text())


def test_every_column_is_measured_and_written(scripts: Any, tmp_path: Path) -> None:
    row, settings = tiny_row(scripts), one_step(scripts)
    document = run(scripts, tmp_path / "cpu.json", row, settings, scripts["measure"].measure)
    assert {m["column"]: m.get("null") for m in document["measurements"]} == dict.fromkeys(COLUMNS)
    for m in document["measurements"]:
        assert (m["passes"], m["records"], m["padded_tokens"], m["real_tokens"]) == (1, 8, 128, 128)
        assert len(m["step_seconds"]) == 1 and m["peak_bytes"] >= m["start_bytes"] > 0
    assert len({m["n_trainable"] for m in document["measurements"]}) == 1
    for column, found in document["rows"]["tiny-t16"].items():
        assert set(found) >= FIGURES | RATIOS
        assert all(found[key]["n"] == 1 and math.isfinite(found[key]["median"]) for key in FIGURES | RATIOS)
        assert ("time_per_record_ratio" in found) == (column == "patients")
    assert set(document["environment"]) == {"versions", "cpu_count", "devices"}
    assert document["settings"] == {"steps": 1, "warmup": 1, "threads": 1, "device": "cpu", "repetitions": 1}
    table = (tmp_path / "cpu.md").read_text()
    assert all(f"| {column} | 8 |" in table for column in COLUMNS)


def test_a_job_survives_its_command_line(scripts: Any) -> None:
    rows = scripts["rows"]
    for row in rows.ROWS:
        job = rows.Job(row, "one_pass", 3, 4, rows.Settings(models="somewhere"))
        assert rows.Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_steps_without_draws_train_as_many_records(scripts: Any) -> None:
    rows = scripts["rows"]
    row = next(row for row in rows.ROWS if row.name == "minilm-reports")
    jobs = {column: rows.Job(row, column, 0, 32, rows.Settings(steps=5)) for column in COLUMNS}
    assert {column: job.n_timed for column, job in jobs.items()} == {
        **dict.fromkeys(("plain", "lora", "ghost"), 24),
        **dict.fromkeys(("one_pass", "patients", "opacus"), 3),
    }


def test_a_run_goes_on_where_it_stopped(scripts: Any, tmp_path: Path) -> None:
    path, row = tmp_path / "cpu.json", tiny_row(scripts, columns=("plain", "one_pass"))
    asked: list[tuple[str, int]] = []

    def measure(job: Any) -> dict[str, Any]:
        asked.append((job.column, job.repetition))
        return made_up(job, seconds=2.0 if job.column == "plain" else 4.0 / (1 + job.repetition))

    run(scripts, path, row, one_step(scripts), measure)
    document = run(scripts, path, row, one_step(scripts, repetitions=2), measure)
    assert asked == [("plain", 0), ("one_pass", 0), ("one_pass", 1), ("plain", 1)]
    found = document["rows"]["tiny-t16"]["one_pass"]["throughput_ratio"]
    assert found == {"n": 2, "median": 0.75, "min": 0.5, "max": 1.0}
    with pytest.raises(SystemExit, match="--fresh"):
        run(scripts, path, row, one_step(scripts, steps=2), measure)


def test_a_column_that_cannot_run_is_null_once(scripts: Any, tmp_path: Path) -> None:
    row, settings = tiny_row(scripts, model="minilm", columns=("plain", "ghost")), one_step(scripts, repetitions=3)
    document = run(scripts, tmp_path / "cpu.json", row, settings, scripts["measure"].measure)
    assert len(document["measurements"]) == 2
    assert "--models" in document["rows"]["tiny-t16"]["plain"]["null"]
    assert "was not measured" in (tmp_path / "cpu.md").read_text()
    document = run(scripts, tmp_path / "cpu.json", row, settings, lambda job: made_up(job, seconds=1.0))
    assert [m["repetition"] for m in document["measurements"]] == [0, 0, 1, 1, 2, 2]


def test_largest_batch_is_what_both_fit(scripts: Any, tmp_path: Path) -> None:
    row = tiny_row(scripts, batch=None, columns=("plain", "one_pass", "ghost"))
    fits = {"plain": 13, "one_pass": 11, "ghost": 0}

    def measure(job: Any) -> dict[str, Any]:
        full = {"null": "OutOfMemoryError: out of memory"} if job.batch > fits[job.column] else {}
        return {**made_up(job, seconds=1.0), **full}

    document = run(scripts, tmp_path / "cuda.json", row, one_step(scripts), measure)
    assert {c: found["batch"] for c, found in document["largest"]["tiny-t16"].items()} == {
        "plain": 12,
        "one_pass": 8,
        "ghost": 0,
    }
    assert document["rows"]["tiny-t16"]["one_pass"]["batch"] == 8
    assert "OutOfMemoryError" in document["rows"]["tiny-t16"]["ghost"]["null"]


def test_the_command_line_fixes_batch_and_columns(scripts: Any) -> None:
    given = ["--device", "cuda", "--together", "--rows", "llama-1b-t512,smollm2-t128", "--batch", "6"]
    rows, settings, options = scripts["bench"].parse([*given, "--columns", "plain,one_pass"])
    assert [(row.name, row.batch, row.columns) for row in rows] == [
        ("llama-1b-t512", 6, ("plain", "one_pass")),
        ("smollm2-t128", 4, ("plain", "one_pass")),
    ]
    assert settings.device == "cuda" and options.together
    with pytest.raises(SystemExit):
        scripts["bench"].parse(["--together"])


def test_measurements_together_share_a_process(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append(name))
    rows = scripts["rows"]
    job = rows.Job(tiny_row(scripts), "one_pass", 0, 8, one_step(scripts))
    assert scripts["bench"].in_this_process(job)["records"] == 8
    assert calls == ["empty_cache", "reset_peak_memory_stats"]


def made_up(job: Any, *, seconds: float) -> dict[str, Any]:
    """A result as a measurement would give it."""
    counts = {"n_steps": 1, "passes": 1, "records": job.batch, "real_tokens": 100, "padded_tokens": 100}
    memory = {"peak_bytes": 2 << 20, "start_bytes": 1 << 20}
    who = {"row": job.row.name, "column": job.column, "repetition": job.repetition, "batch": job.batch}
    return {**who, **counts, **memory, "seconds": seconds, "cpu_seconds": seconds, "load": 0.0, "device": "made up"}
