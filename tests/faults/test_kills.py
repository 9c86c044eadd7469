"""Real kills at random moments: no weights are ever on the disk that the ledger was not charged for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
N_KILLS = 50
SECONDS = 600
"""About 40 are needed; the rest is for a busy machine."""
STATISTICS = "DPMED_KILL_STATISTICS"
"""Environment variable: where to write how many kills there were and where."""
pytestmark = [pytest.mark.timeout(SECONDS + 60), pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness found in at least `N_KILLS` kills, and in runs with planted faults."""
    result = tmp_path_factory.mktemp("kills") / "result.json"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "faults.kill_harness", str(result), str(N_KILLS)],
        cwd=ROOT / "tests",
        env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(result.read_text())
    text = json.dumps(values["statistics"], indent=1)
    print(f"\n{text}")
    if os.environ.get(STATISTICS):
        Path(os.environ[STATISTICS]).write_text(text + "\n")
    return values


def problems(found: dict[str, Any], kind: str) -> list[str]:
    return [line for run in found["runs"] for line in run["problems"] if line.startswith(kind)]


def test_runs_were_killed_in_steps_and_in_saves_with_and_without_a_ledger(found: dict[str, Any]) -> None:
    kills = found["statistics"]["kills"]
    assert kills["total"] >= N_KILLS
    assert min(kills["step"], kills["save"]) >= N_KILLS // 5
    assert {run["ledger"] for run in found["runs"]} == {"none", "own file"}
    assert found["statistics"]["steps_lost"] > 0  # some kills came between the charge and the mark of a checkpoint


def test_no_weights_touch_the_disk_before_their_steps_are_charged(found: dict[str, Any]) -> None:
    assert problems(found, "charges") == []
    assert found["statistics"]["writes"] > N_KILLS
    assert all(run["charged_steps"] >= run["released_steps"] > 0 for run in found["runs"])


def test_the_certificate_covers_every_lineage_that_was_written_and_never_more_than_the_plan(
    found: dict[str, Any],
) -> None:
    assert problems(found, "certificate") == []
    assert all(run["epsilon"] > 0 for run in found["runs"])


def test_no_noise_and_no_draw_repeats_over_all_starts(found: dict[str, Any]) -> None:
    assert found["repeated"] == {"draw": 0, "noise": 0}
    assert min(found["statistics"]["noises"], found["statistics"]["draws"]) > N_KILLS


def test_every_run_finishes_and_every_whole_checkpoint_can_be_resumed(found: dict[str, Any]) -> None:
    assert [line for run in found["runs"] for line in run["problems"] if line.startswith(("start", "checkpoint"))] == []
    assert all(run["finished"] for run in found["runs"])


def test_the_ledger_is_whole_after_every_kill(found: dict[str, Any]) -> None:
    assert problems(found, "ledger") == []


def test_no_other_problem_was_found(found: dict[str, Any]) -> None:
    assert [run["problems"] for run in found["runs"] if run["problems"]] == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("charge after save", "charges: after kill 1 0 steps for 2"), ("run forgotten", "certificate: 12 steps, 14")],
)
def test_the_checks_see_a_planted_fault(fault: str, kind: str, found: dict[str, Any]) -> None:
    run = found["planted"][fault]
    assert run["finished"] and run["kills"] == {"save": 1}
    assert any(line.startswith(kind) for line in run["problems"]), run["problems"]


def test_the_checks_see_noise_and_draws_that_repeat(found: dict[str, Any]) -> None:
    repeated = found["planted"]["fixed seed"]["repeated"]
    assert repeated["draw"] > 0 and repeated["noise"] > 0
