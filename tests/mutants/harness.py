"""Runs named tests against faulty copies of `dpmed`, never against the working tree.

One process imports the heavy libraries once, but not `dpmed`. For each mutant it makes a copy of the package with one
fault in it and forks a child that imports the copy, runs the tests that must notice, and reports each outcome.

Run as `python -m mutants.harness RESULT.json [NAME ...]` with the tests' folder as working directory.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mutants.mutant import Mutant
from mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
NULL = "no fault"
CRASHED = 70
"""Exit status of a child that could not run its tests at all; pytest's own end at 5."""
CPU_SECONDS = 120
FAST_DISK = Path("/dev/shm")
"""For the copies and the tests' files: nothing here has to outlive the machine."""
PLUGINS = ("pytest_timeout", "pytest_socket", "_hypothesis_pytestplugin")
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "opacus.grad_sample",
    "datasets",
    "accelerate",
    "safetensors.torch",
    "scipy.stats",
    "dp_accounting.pld.privacy_loss_distribution",
    "hypothesis",
    *PLUGINS,
    "sklearn.metrics",
    "cryptography.hazmat.primitives.ciphers",
)
OPTIONS = (
    # pyproject's own, but in this process, and without "." on the path: there the working tree's dpmed would be found
    "addopts=--import-mode=importlib --strict-markers --disable-socket --allow-unix-socket",
    "pythonpath=tests",
    "timeout=100",
)


def main(result: Path, names: Sequence[str]) -> None:
    """Try all mutants, or the named ones, and first the package as it is on all of their tests."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those that are needed are named; others cost a second each
    os.environ["CI"] = "1"  # hypothesis then draws the same examples each time, and keeps none
    _import_libraries()
    gc.collect()
    gc.freeze()  # or each child would go through all libraries' objects
    chosen = [m for m in MUTANTS if not names or m.name in names]
    union = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    found: dict[str, dict[str, Any]] = {}
    memory = FAST_DISK if os.access(FAST_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dpmed-mutants-", dir=memory) as folder:
        base = Path(folder) / "base"
        # One copy for all: others may be at work on the tree meanwhile.
        shutil.copytree(ROOT / "dpmed", base / "dpmed")
        found[NULL] = _outcome(base, union)
        for mutant in chosen:
            copy = Path(folder) / "copy"
            found[mutant.name] = _try(mutant, base, copy)
            shutil.rmtree(copy, ignore_errors=True)
    result.write_text(json.dumps(found, indent=1))


def _try(mutant: Mutant, base: Path, copy: Path) -> dict[str, Any]:
    try:
        shutil.copytree(base, copy)
        plant(mutant, copy)
    except (ValueError, OSError, SyntaxError) as error:
        return {"exit": CRASHED, "file": "", "seconds": 0.0, "output": f"{error}", "failed": {}, "passed": []}
    return _outcome(copy, mutant.tests)


def plant(mutant: Mutant, copy: Path) -> None:
    """Change the one file in a copy of the package.

    Raises: ValueError if a text that is to be replaced is not there exactly once: the table is out of date.
    """
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    for old, new in mutant.edits:
        if (n := text.count(old)) != 1:
            raise ValueError(f"{mutant.file} has {n} times, not once: {old!r}")
        text = text.replace(old, new)
    compile(text, mutant.file, "exec")
    file.unlink()  # and the compiled file, which a change within the same second would leave standing
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_text(text, encoding="utf-8")


def _outcome(copy: Path, tests: Sequence[str]) -> dict[str, Any]:
    """What a child that imports `copy` makes of the tests."""
    started = time.monotonic()
    report, output = copy / "report.json", copy / "output.txt"
    child = os.fork()
    if child == 0:
        os._exit(_in_child(lambda: _run_tests(copy, tests, report), output))
    _, status, used = os.wait4(child, 0)
    found: dict[str, Any] = {"file": "", "failed": {}, "passed": []}
    if report.is_file():
        found |= json.loads(report.read_text())
    text = output.read_text(errors="replace")
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "output": text[-4000:],
        **found,
    }


def _in_child(work: Callable[[], int], output: Path) -> int:
    """Run in a forked child with all output in a file; whatever happens becomes an exit status."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))  # a mutant may loop for ever
        status = work()
    except BaseException:
        traceback.print_exc()
        status = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class _Recorder:
    """A pytest plugin: which tests failed, and in which words."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = " ".join(str(getattr(crash, "message", report.longrepr)).split())[:300]
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def _run_tests(copy: Path, tests: Iterable[str], report: Path) -> int:
    """Run tests in this process with the copy's dpmed."""
    assert not any(name.split(".")[0] == "dpmed" for name in sys.modules)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = f"{copy}{os.pathsep}{ROOT / 'tests'}"  # for processes that tests start
    os.chdir(ROOT)
    recorder = _Recorder()
    arguments = ["-p", "no:cacheprovider", "-q", "--no-header", "--tb=short"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported already
    arguments += [word for plugin in PLUGINS for word in ("-p", plugin)]
    arguments += [word for option in OPTIONS for word in ("-o", option)]
    arguments.append(f"--basetemp={copy / 'tests'}")
    status = int(pytest.main([*arguments, *tests], plugins=[recorder]))
    import dpmed

    loaded = [getattr(m, "__file__", None) for name, m in sys.modules.items() if name.split(".")[0] == "dpmed"]
    strangers = [file for file in loaded if file and Path(file).is_relative_to(ROOT / "dpmed")]
    found: dict[str, Any] = {"file": str(dpmed.__file__), "failed": recorder.failed, "passed": recorder.passed}
    report.write_text(json.dumps(found))
    if strangers or not Path(found["file"]).is_relative_to(copy):
        print("not of the copy:", strangers or found["file"])
        return CRASHED
    return status


def _import_libraries() -> None:
    """All that is slow to import, once; forked children have it at once. Nothing runs here, so no threads start."""
    for name in LIBRARIES:
        importlib.import_module(name)
    import tiny_models

    for kind in tiny_models.KINDS:  # transformers imports each architecture on first use
        tiny_models.make_config(kind)
    tiny_models.make_model("llama")
    assert "dpmed" not in sys.modules


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
