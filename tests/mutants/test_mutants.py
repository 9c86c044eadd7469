"""The suite would notice: each planted fault turns its named tests red, and without a fault all of them are green."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutants.harness import NULL, ROOT, plant
from mutants.mutant import Mutant
from mutants.mutants import MUTANTS

SECONDS = 900
"""About 80 are needed; the rest is for a busy machine."""
pytestmark = [pytest.mark.timeout(SECONDS + 60), pytest.mark.slow]
BROKEN = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError")
"""A test that ends so was not stopped by its assertion but by a mutant that does not run."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the harness found, by the mutant's name."""
    result = tmp_path_factory.mktemp("mutants") / "result.json"
    ours = ("PYTEST_", "PYTHONPATH", "COV_")  # those of this very test run
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-m", "mutants.harness", str(result)],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def is_of(test: str, run: str) -> bool:
    """Whether a test that ran is a named one, or a variant of it."""
    return run == test or run.startswith(f"{test}[")


def test_without_a_fault_all_named_tests_pass(outcomes: dict[str, dict[str, Any]]) -> None:
    null = outcomes[NULL]
    assert (null["exit"], null["failed"]) == (0, {}), null["output"]
    missing = [
        test for mutant in MUTANTS for test in mutant.tests if not any(is_of(test, run) for run in null["passed"])
    ]
    assert missing == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_noticed(mutant: Mutant, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[mutant.name]
    assert outcome["exit"] == pytest.ExitCode.TESTS_FAILED, outcome["output"]
    assert outcome["file"].endswith("/copy/dpmed/__init__.py")
    blind = [test for test in mutant.tests if not any(is_of(test, run) for run in outcome["failed"])]
    assert blind == []
    assert not [reason for reason in outcome["failed"].values() if reason.startswith(BROKEN)]


def test_the_table_names_each_fault_once_and_says_what_it_breaks() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len({name.lower() for name in names}) >= 20
    assert all(mutant.why and mutant.tests and mutant.file.startswith("dpmed/") for mutant in MUTANTS)
    assert all((ROOT / test.partition("::")[0]).is_file() for mutant in MUTANTS for test in mutant.tests)


@pytest.mark.parametrize("old", ["not in the file", "self.sampling_rate"], ids=["absent", "twice"])
def test_a_table_that_is_out_of_date_is_refused(old: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dpmed" / "privacy", tmp_path / "dpmed" / "privacy")
    file = "dpmed/privacy/sampling.py"
    before = (tmp_path / file).read_bytes()
    with pytest.raises(ValueError, match="times, not once"):
        plant(Mutant("stale", file, old, "", "", ()), tmp_path)
    assert (tmp_path / file).read_bytes() == before
