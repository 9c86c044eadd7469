"""Real processes: charging at once, killed right after a charge or in the middle of one, out of disk space."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from privacy.ledger_runs import DELTA, linear_epsilon, make_plan, patients

from dpmed.privacy import accounting
from dpmed.privacy.ledger import PrivacyLedger

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120

# A run that waits for the others, charges `n_steps` `times` times, says what it was let through, and waits to be ended.
CHARGE = """
import sys, time
from pathlib import Path
from privacy.ledger_runs import linear_epsilon, make_plan, patients
from dpmed.errors import BudgetError
from dpmed.privacy import accounting
from dpmed.privacy.ledger import PrivacyLedger

path, times, n_steps, planned = Path(sys.argv[1]), *map(int, sys.argv[2:])

def slow_epsilon(history, *, delta):
    time.sleep(0.02)  # long enough for another process to come between a check and its charge
    return linear_epsilon(history, delta=delta)

accounting.composed_epsilon = slow_epsilon
print("ready", flush=True)
sys.stdin.readline()
run = PrivacyLedger(path).open_run(patients(0, 20), make_plan(n_steps=planned))
charged = 0
try:
    for _ in range(times):
        run.charge(n_steps)
        charged += n_steps
        print(charged, flush=True)
except BudgetError:
    print("refused", flush=True)
print("done", run.run_id, charged, flush=True)
sys.stdin.readline()
"""


@contextmanager
def processes(script: str, *arguments: list[Any]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process per list of arguments, all of them ready; none is left behind."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for given in arguments
    ]
    try:
        for process in started:
            assert said(process) == "ready"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=SECONDS)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def results(running: list[subprocess.Popen[str]]) -> list[tuple[str, int, bool]]:
    """(run id, steps that the process was let charge, whether it was refused in the end), once all are done."""
    for process in running:
        go(process)
    found = []
    for process in running:
        lines = until_done(process)
        _, run_id, charged = lines[-1].split()
        found.append((run_id, int(charged), "refused" in lines))
    return found


def until_done(process: subprocess.Popen[str]) -> list[str]:
    lines = [said(process)]
    while not lines[-1].startswith("done"):
        assert lines[-1], "the process ended early"
        lines.append(said(process))
    return lines


def charged(ledger: PrivacyLedger) -> dict[str, int]:
    return {run["run_id"]: run["n_steps"] for described in ledger.datasets() for run in described["runs"]}


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "composed_epsilon", linear_epsilon)


def test_two_processes_charge_at_once_and_lose_nothing(tmp_path: Path) -> None:
    """They make the file, too: none of them may find half of one, or replace the other's."""
    path = tmp_path / "new" / "ledger.sqlite"
    with processes(CHARGE, [path, 60, 1, 60], [path, 40, 3, 120], [path, 20, 7, 140]) as running:
        let = results(running)
    ledger = PrivacyLedger(path, create=False)
    assert charged(ledger) == {run_id: steps for run_id, steps, _ in let}
    assert sorted(steps for _, steps, _ in let) == [60, 120, 140]
    assert ledger.verify() == [] and ledger.head[0] == 1 + 3 + 60 + 40 + 20
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]


def test_a_budget_that_two_processes_race_for_is_never_overspent(tmp_path: Path) -> None:
    """Noise 4 and rate 1: `linear_epsilon` is steps / 4, so 30 of the 2 * 20 steps fit."""
    path = tmp_path / "ledger.sqlite"
    ledger = PrivacyLedger(path)
    dataset = ledger.register(patients(0, 20))
    ledger.set_budget(dataset, epsilon=30 / 4, delta=DELTA)
    with processes(CHARGE, [path, 20, 1, 1], [path, 20, 1, 1]) as running:
        let = results(running)
    assert sum(steps for _, steps, _ in let) == 30 and any(refused for _, _, refused in let)
    assert charged(ledger) == {run_id: steps for run_id, steps, _ in let}
    assert ledger.spent(dataset, delta=DELTA).epsilon == 30 / 4
    assert ledger.verify() == []


def test_a_charge_outlives_the_process_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with processes(CHARGE, [path, 1, 5, 5]) as (process,):
        go(process)
        assert said(process) == "5"
        process.send_signal(signal.SIGKILL)
    ledger = PrivacyLedger(path, create=False)
    assert list(charged(ledger).values()) == [5] and ledger.verify() == []


@pytest.mark.parametrize("line", [3, 8, 20])
def test_a_kill_at_any_time_loses_no_charge_that_was_confirmed(tmp_path: Path, line: int) -> None:
    path = tmp_path / "ledger.sqlite"
    with processes(CHARGE, [path, 100_000, 1, 100_000]) as (process,):
        go(process)
        confirmed = [int(said(process)) for _ in range(line)][-1]
        process.send_signal(signal.SIGKILL)  # in the middle of some later charge
        assert process.stdout is not None
        confirmed = max([confirmed, *(int(more) for more in process.stdout.read().split("\n")[:-1])])
    ledger = PrivacyLedger(path, create=False)
    (steps,) = charged(ledger).values()
    assert steps in (confirmed, confirmed + 1) and ledger.verify() == []
    ledger.open_run(patients(0, 20), make_plan(), run_id=next(iter(charged(ledger)))).charge(1)
    assert list(charged(ledger).values()) == [steps + 1] and ledger.verify() == []


DISK_FULL = """
import json, resource, signal, sys
from pathlib import Path
from privacy.ledger_runs import make_plan, patients
from dpmed.errors import PrivacyError
from dpmed.privacy.ledger import PrivacyLedger

path = Path(sys.argv[1])
run = PrivacyLedger(path).open_run(patients(0, 20), make_plan())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
print("ready", flush=True)
sys.stdin.readline()
charged, message = 0, ""
try:
    while charged < 1000:
        run.charge(1)
        charged += 1
except PrivacyError as error:
    message = str(error)
print(json.dumps([charged, message]), flush=True)
"""


def test_a_full_disk_stops_the_run_and_the_ledger_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with processes(DISK_FULL, [path]) as (process,):
        go(process)
        confirmed, message = json.loads(said(process))
    assert 0 < confirmed < 1000 and "could not be written" in message and "\n" not in message
    ledger = PrivacyLedger(path, create=False)
    assert list(charged(ledger).values()) == [confirmed] and ledger.verify() == []
