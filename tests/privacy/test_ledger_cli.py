"""`dpmed ledger show`, `verify` and `budget`: what they print, their exit status, and that they load no torch."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from privacy.ledger_runs import linear_epsilon
from test_cli import Captured, failure, printed

from dpmed import cli
from dpmed.privacy import accounting
from dpmed.privacy.ledger import PrivacyLedger, RunCharges
from dpmed.privacy.plan import PrivacyPlan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PrivacyLedger:
    """The ledger that DPMED_LEDGER names; epsilon is steps * rate / noise, so that it costs nothing."""
    monkeypatch.setattr(accounting, "composed_epsilon", linear_epsilon)
    monkeypatch.setenv("DPMED_LEDGER", str(tmp_path / "ledger.sqlite"))
    return PrivacyLedger(tmp_path / "ledger.sqlite")


def dp_run(ledger: PrivacyLedger, units: list[str], **changes: Any) -> RunCharges:
    values: dict[str, Any] = {
        "unit": "patient",
        "n_units": len(units),
        "expected_batch_units": len(units),
        "delta": 1e-3,
    }
    values |= {"max_records_per_unit": 1, "clip_norm": 1.0, "noise_multiplier": 2.0, "n_steps": 4}
    return ledger.open_run(units, PrivacyPlan(**{**values, **changes}))


def test_ledger_shows_what_was_spent(capsys: Captured, ledger: PrivacyLedger) -> None:
    assert "no data set was charged yet" in printed(capsys, "ledger", "show")
    run = dp_run(ledger, ["Jane", "Joe"])
    run.charge(3)
    other = ledger.register(["Jane"])
    shown = json.loads(printed(capsys, "ledger", "show", "--json"))
    assert shown == {"ledger": str(ledger.path), "datasets": ledger.datasets()}
    text = printed(capsys, "ledger", "show", str(ledger.path))
    assert run.run_id in text and "3 of 4" in text and "1.5" in text and f"{other}: 1 units" in text
    assert "Jane" not in text and "no guarantee" not in text
    dp_run(ledger, ["Jane", "Joe"], noise_multiplier=0.0).charge(1)
    assert json.loads(printed(capsys, "ledger", "show", "--json"))["datasets"][1]["epsilon"] is None
    assert "no bound" in (text := printed(capsys, "ledger", "show")) and "nothing is guaranteed any more" in text
    text = printed(capsys, "ledger", "verify")
    assert "whole: 6 entries" in text and f"data set {other}: no guarantee any more" in text


def test_ledger_verify_finds_what_was_changed(capsys: Captured, ledger: PrivacyLedger) -> None:
    dp_run(ledger, ["p1", "p2"]).charge(3)
    result = json.loads(printed(capsys, "ledger", "verify", "--json"))
    n_entries, head = ledger.head
    assert result == {
        "ledger": str(ledger.path),
        "whole": True,
        "n_entries": 3,
        "head": head,
        "unprotected": [],
    }
    assert n_entries == 3 and head in printed(capsys, "ledger", "verify")
    with closing(sqlite3.connect(ledger.path)) as connection:
        connection.executescript("DROP TRIGGER entries_no_update; UPDATE entries SET n_steps = 1 WHERE n = 3")
    said = failure(capsys, "ledger", "verify", status=1)
    assert "entry 3 (charge) was changed (and 1 more): what was spent is not known; restore" in said


def test_a_budget_of_the_ledger_is_exit_status_3(
    capsys: Captured, ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ledger.register(["p1", "p2"])
    flags = ["--epsilon", "2", "--delta", "0.001"]
    said = printed(capsys, "ledger", "budget", dataset[:5], *flags)
    assert f"data set {dataset[:5]}: budget epsilon 2 at delta 0.001" in said
    assert "epsilon 2 at delta 0.001" in printed(capsys, "ledger", "show")

    def train(args: Any) -> dict[str, Any]:
        return {"run": dp_run(ledger, ["p1", "p2"], n_steps=5)}

    monkeypatch.setitem(cli.VERBS, "env", cli.Verb("", train, lambda parser: None, print))
    assert f"the budget of data set {dataset} is 2" in failure(capsys, "env", status=3)


def test_a_budget_that_cannot_be_is_refused(capsys: Captured, ledger: PrivacyLedger) -> None:
    dataset = ledger.register(["p1", "p2"])
    flags = ["--epsilon", "2", "--delta", "0.001"]
    assert "no data set of the ledger begins so" in failure(capsys, "ledger", "budget", "xyz", *flags)
    assert "delta must lie in" in failure(capsys, "ledger", "budget", dataset, *flags[:2], "--delta", "0.5")
    assert "epsilon must be a finite number" in failure(capsys, "ledger", "budget", dataset, *flags[2:], "--epsilon=-1")
    assert "unrecognized arguments: c" in failure(capsys, "ledger", "budget", "a", "b", *flags, "c")
    assert ledger.head[0] == 1


@pytest.mark.parametrize("order", ["D E P", "D P E", "E D P"])
def test_the_file_may_stand_before_or_behind_the_budget(capsys: Captured, tmp_path: Path, order: str) -> None:
    path = tmp_path / "other.sqlite"
    dataset = PrivacyLedger(path).register(["p1", "p2"])
    words = {"D": [dataset], "E": ["--epsilon", "2", "--json", "--delta", "0.001"], "P": [str(path)]}
    result = json.loads(printed(capsys, "ledger", "budget", *(word for key in order.split() for word in words[key])))
    assert result == {"ledger": str(path), "dataset": dataset, "budget": {"epsilon": 2.0, "delta": 0.001}}
    assert PrivacyLedger(path).head[0] == 2


def test_ledger_that_is_turned_off(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPMED_LEDGER", "none")
    assert "name its file behind the command" in failure(capsys, "ledger", "show")


def test_the_ledger_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dpmed import cli, PrivacyLedger, PrivacyPlan;"
        "ledger = PrivacyLedger(Path(sys.argv[1])); plan = PrivacyPlan(unit='p', n_units=2, expected_batch_units=1,"
        " max_records_per_unit=1, clip_norm=1.0, noise_multiplier=2.0, n_steps=4, delta=1e-3);"
        "run = ledger.open_run(['a', 'b'], plan, budget_epsilon=9.0); run.charge(2);"
        "show = [cli.main(['ledger', 'budget', run.dataset, '--epsilon', '9', '--delta', '1e-3', sys.argv[1]])];"
        "show += [cli.main(['ledger', action, sys.argv[1]]) for action in ('verify', 'show')];"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], show)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ledger.sqlite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[] [0, 0, 0]", done.stderr
