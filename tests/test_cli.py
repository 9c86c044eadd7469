"""The command line: one line per error, the right exit status, JSON alone on stdout, and a help that stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpmed
from dpmed import cli, environment
from dpmed.cli import main
from dpmed.errors import BudgetError, PrivacyError
from dpmed.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SECRET = "Jane Doe has anthrax"
MINIMAL = "model: {path: m}\ndata: {train: t.jsonl, unit: patient}\n"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets variables for its process; put them back after each test."""
    for name, value in {**environment.OFFLINE, **environment.QUIET}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DPMED_DEBUG", raising=False)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL, encoding="utf-8")
    return str(file)


@pytest.fixture
def notes(tmp_path: Path) -> str:
    rows = [
        {"patient": "p1", "text": f"{SECRET} today", "spans": [{"start": 0, "end": 8, "type": "NAME"}]},
        {"patient": "p2", "text": "Chest pain today", "spans": []},
    ]
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Put a function in place of a heavy one; returns the list of its calls as (args, kwargs)."""

    def put(module: str, name: str, answer: Any) -> list[Any]:
        calls: list[Any] = []

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return answer() if callable(answer) else answer

        fake = types.ModuleType(module)
        setattr(fake, name, called)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return put


def failure(capsys: Captured, *argv: str, status: int = 2) -> str:
    """Run a command that must fail; returns its one line."""
    assert main(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").strip()


def printed(capsys: Captured, *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "name a command: demo, train"),
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["qqq"], "unknown command 'qqq': name one of demo"),
        (["train", "r.yaml"], "the following arguments are required: --output_dir: see 'dpmed train --help'"),
        (["demo", "--output_dir", "d", "--jobs", "0"], "got '0', expected a whole number of at least 1"),
        (["demo", "--output_dir", "d", "--preset", "huge"], "invalid choice: 'huge'"),
        (["demo", "--output", "d"], "--output_dir"),
        (["calibrate", "--target_epsilon", "x"], "invalid float value: 'x'"),
        (["train", "r.yaml", "--output_dri", "d"], "unknown key 'output_dri': did you mean 'output_dir'?"),
        (["train", "r.yaml", "--epochs", "3", "--output_dir", "d"], "did you mean 'training.epochs'?"),
        (["train", "none.yaml", "--output_dir", "d"], "none.yaml: no such recipe file"),
        (["recipe", "cp", "none.yaml", "x.yaml"], "none.yaml: no shipped recipe of that name"),
        (["recipe", "check", "none.yaml"], "none.yaml: no such recipe file"),
        (["tag", "none.jsonl", "--output_dir", "d"], "none.jsonl: file not found"),
        (["tag", "n.jsonl", "--output_dir", "d", "--training.epochs", "1"], "'tag' does not use this key"),
        (["ledger"], "show|verify|budget"),
        (["ledger", "show", "none.sqlite"], "none.sqlite: no such privacy ledger"),
        (["ledger", "verify", "."], "the privacy ledger cannot be read (not a file)"),
        (["ledger", "budget", "ab", "--epsilon", "1"], "required: --delta"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in failure(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_recipe_errors_reach_the_user(capsys: Captured, recipe_file: str, tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "run")]
    assert "did you mean 'privacy.target_epsilon'" in failure(
        capsys, "train", recipe_file, "--privacy.epsilon", "3", *out
    )
    assert "got abc" in failure(capsys, "train", recipe_file, "--training.epochs", "abc", *out)
    assert "needs a value" in failure(capsys, "train", recipe_file, *out, "--training.epochs")
    assert "training.epochs: got 0.0" in failure(capsys, "train", recipe_file, "--training.epochs=0", *out)
    assert "data.heldout: a frontier needs" in failure(capsys, "frontier", recipe_file, *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "status"), [(PrivacyError("two\nlines"), 1), (BudgetError("two\nlines"), 3)])
def test_our_own_errors_keep_their_status(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(args: Any) -> Any:
        raise error

    monkeypatch.setitem(cli.VERBS, "env", cli.Verb("", fail, lambda parser: None, print))
    assert failure(capsys, "env", status=status) == "two lines"


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def versions() -> dict[str, str]:
        raise error

    monkeypatch.setattr(environment, "versions", versions)


def test_unexpected_exceptions_show_type_and_place_but_never_their_message(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ValueError(SECRET))
    said = failure(capsys, "env", status=1)
    assert said.startswith("internal fault: ValueError at dpmed/cli.py:") and said.endswith("; please report")
    assert SECRET not in said


def test_system_errors_say_the_systems_words_only(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(28, SECRET))
    said = failure(capsys, "env", status=1)
    assert "OSError (No space left on device) at" in said and SECRET not in said


def test_debug_shows_the_traceback(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPMED_DEBUG", "1")
    failing(monkeypatch, ValueError("planned"))
    assert main(["env"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "planned" in err


def test_interrupt(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "stopped; go on with --resume\n"


def test_train_passes_recipe_and_flags(
    capsys: Captured, stand_in: Callable[..., list[Any]], recipe_file: str, tmp_path: Path
) -> None:
    def noisy() -> dict[str, Any]:
        print("a library prints")
        return {"status": "finished", "loss": float("inf"), "path": Path("x")}

    calls = stand_in("dpmed.pipeline", "train", noisy)
    argv = ["--json", "train", "--training.epochs", "2", recipe_file, "--method=full", "--output_dir", str(tmp_path)]
    assert main([*argv, "--resume", "--run_name", "n", "--run_setting", "s", "--base_scores", "b"]) == 0
    captured = capsys.readouterr()
    want = {"output_dir": str(tmp_path), "status": "finished", "loss": None, "path": "x"}
    assert json.loads(captured.out) == want
    assert captured.err == "a library prints\n"
    (recipe, folder), keywords = calls[0]
    assert isinstance(recipe, Recipe) and (recipe.training.epochs, recipe.method) == (2.0, "full")
    assert folder == tmp_path
    assert keywords == {"resume": True, "name": "n", "setting": "s", "base_scores": Path("b")}


@pytest.mark.parametrize(
    ("flags", "given"), [([], False), (["--task", "masked_lm"], True), (["--task=causal_lm"], True)]
)
def test_evaluate_builds_a_recipe(
    capsys: Captured, stand_in: Callable[..., list[Any]], tmp_path: Path, flags: list[str], given: bool
) -> None:
    calls = stand_in("dpmed.pipeline", "evaluate", {})
    argv = ["--model", "m", "--base_model", "b", "--train", "t", "--heldout", "h", "--output_dir", str(tmp_path)]
    printed(capsys, "evaluate", *argv, "--data.unit", "p", "--evaluation.prefix_tokens", "[5]", *flags)
    (recipe, _), keywords = calls[0]
    assert (recipe.model.path, recipe.model.base, recipe.data.train, recipe.data.heldout) == ("m", "b", "t", "h")
    assert (recipe.data.unit, recipe.evaluation.prefix_tokens) == ("p", [5])
    assert keywords["task_given"] is given
    assert "'evaluate' does not use this key" in failure(capsys, "evaluate", *argv, "--lora.rank", "3")


def test_demo_frontier_and_report_pass_their_arguments(
    capsys: Captured, stand_in: Callable[..., list[Any]], recipe_file: str, tmp_path: Path
) -> None:
    point = {"name": "lora-s0", "epsilon": None, "utility": {"f1_micro": {"value": 0.5}}, "on_frontier": True}
    result = {"points": [point], "meta": {"failed": [{"name": "full-s0", "reason": "no memory"}]}}
    out = ["--output_dir", str(tmp_path)]
    demo = stand_in("dpmed.demo", "run_demo", result)
    text = printed(capsys, "demo", *out, "--preset", "full", "--jobs", "2", "--resume")
    assert demo == [((tmp_path,), {"preset": "full", "jobs": 2, "resume": True})]
    assert "lora-s0" in text and "0.5" in text and "failed: full-s0: no memory" in text
    frontier = stand_in("dpmed.frontier", "run_frontier", result)
    printed(capsys, "frontier", recipe_file, *out, "--data.heldout", "h", "--jobs", "3")
    assert frontier[0][0][1:] == (tmp_path,) and frontier[0][1] == {"jobs": 3, "resume": False}
    report = stand_in("dpmed.report.build", "build_pages", {"report": tmp_path / "report.html"})
    assert str(tmp_path / "report.html") in printed(capsys, "report", "a", "b", *out)
    assert report == [(([Path("a"), Path("b")], tmp_path), {})]


def test_run_summary_shows_privacy_figures_and_reasons(
    capsys: Captured, stand_in: Callable[..., list[Any]], recipe_file: str, tmp_path: Path
) -> None:
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 9, "higher_is": "worse"}
    reasons = {"memorization.canary_exposure": "no canaries were planted"}
    inner = {"loss": {"auc": {**figure, "value": 0.61}, "roc": {"fpr": [0.0], "tpr": [0.0]}}}
    evaluation = {
        "memorization": {"extraction_rate": figure, "canary_exposure": None, "membership": inner},
        "utility": {"accuracy": {**figure, "value": 0.87, "higher_is": "better"}},
        "reference": {
            "base_model": {"memorization": {"extraction_rate": {**figure, "value": 0.011}}},
            "heldout": {"extraction_rate": {**figure, "value": 0.022}},
        },
        "not_applicable": reasons | {"reference.base_model.memorization.canary_exposure": "said once is enough"},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (tmp_path / "privacy.json").write_text('{"epsilon": 7.98, "delta": 1e-05}', encoding="utf-8")
    stand_in("dpmed.pipeline", "train", {})
    text = printed(capsys, "train", recipe_file, "--output_dir", str(tmp_path))
    assert "epsilon 7.98 at delta 1e-05" in text and "0.2 to 0.3" in text and "no canaries were planted" in text
    row = next(line for line in text.splitlines() if "memorization.extraction_rate" in line)
    assert row.split() == ["memorization.extraction_rate", "0.25", "0.2", "to", "0.3", "\u2193", "0.011", "0.022"]
    assert "memorization.membership.loss.auc" in text and "said once" not in text
    assert "\u2191" in next(line for line in text.splitlines() if "utility.accuracy" in line)


def test_calibrate(capsys: Captured) -> None:
    argv = ["--target_epsilon", "8", "--delta", "1e-3", "--n_units", "200", "--expected_batch_units", "50"]
    result = json.loads(printed(capsys, "calibrate", *argv, "--n_steps", "4", "--json"))
    assert 7.9 < result["epsilon"] <= 8.0 and result["noise_multiplier"] > 0.3
    curve = {point["delta"]: point["epsilon"] for point in result["epsilon_curve"]}
    assert list(curve.values()) == sorted(curve.values()) and len(curve) == 5
    assert "noise multiplier: 0." in printed(capsys, "calibrate", *argv, "--n_steps", "4")
    assert "expected_batch_units 20 exceeds" in failure(
        capsys, "calibrate", *argv[:-4], "--n_units", "5", "--expected_batch_units", "20", "--n_steps", "4"
    )


def test_tag_counts_and_shows_no_values(capsys: Captured, notes: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = printed(capsys, "tag", notes, "--output_dir", str(out), "--data.unit=patient", "--data.identifiers=spans")
    stored = (out / "identifiers.json").read_text(encoding="utf-8")
    counts = json.loads(stored)
    assert counts["identifiers"]["known"] == {"NAME": 1}
    assert counts["identifiers"]["indirect"]["INDIRECT"] >= 1
    assert (counts["n_records"], counts["n_units"]) == (2, 2)
    assert "known" in text and "NAME" in text
    assert not any(word in text + stored for word in ("Jane", "Doe", "anthrax", "p1"))
    assert "is not empty" in failure(capsys, "tag", notes, "--output_dir", str(out), "--data.unit=patient")
    assert (out / "identifiers.json").read_text(encoding="utf-8") == stored


def test_tag_says_when_no_patient_column_is_named(capsys: Captured, notes: str, tmp_path: Path) -> None:
    assert "each record counts as its own patient" in printed(capsys, "tag", notes, "--output_dir", str(tmp_path / "o"))


def test_recipe_check(capsys: Captured, notes: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "r.yaml").write_text("model: {path: m}\ndata: {train: t}\n", encoding="utf-8")

    def recipe(path: str, unit: str) -> str:
        file = tmp_path / "r.yaml"
        file.write_text(f"model: {{path: {path}}}\ndata: {{train: {notes}, unit: {unit}}}\n", encoding="utf-8")
        return str(file)

    assert "holds no config.json" in failure(capsys, "recipe", "check", recipe(str(model), "patient"))
    (model / "config.json").write_text("{}", encoding="utf-8")
    assert "no column 'patent'" in failure(capsys, "recipe", "check", recipe(str(model), "patent"))
    result = json.loads(printed(capsys, "recipe", "check", recipe(str(model), "patient"), "--json"))
    assert result["records"] == {"train": 2} and result["methods"] == ["lora"] and result["model"] == "a folder"
    assert "no such folder" in failure(capsys, "recipe", "check", recipe(str(tmp_path / "none"), "patient"))


def test_recipe_ls_and_cp(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "shipped.yaml"
    source.write_text("# What it does.\n" + MINIMAL, encoding="utf-8")
    monkeypatch.setattr("dpmed.recipe_io.shipped_recipes", lambda: {"phee/frontier.yaml": source})
    assert json.loads(printed(capsys, "recipe", "ls", "--json")) == {"recipes": {"phee/frontier.yaml": "What it does."}}
    folder = tmp_path / "mine"
    folder.mkdir()
    printed(capsys, "recipe", "cp", "phee/frontier.yaml", str(folder))
    copied = folder / "frontier.yaml"
    assert copied.read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    copied.write_text("mine", encoding="utf-8")
    assert "already exists" in failure(capsys, "recipe", "cp", "phee/frontier.yaml", str(folder))
    assert copied.read_text(encoding="utf-8") == "mine"
    assert "'phee/frontier.yaml'?" in failure(capsys, "recipe", "cp", "phe/frontier", str(folder))
    assert "no such folder" in failure(capsys, "recipe", "cp", "phee/frontier.yaml", str(folder / "a" / "b.yaml"))


def test_env_and_offline_by_default(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert json.loads(printed(capsys, "env", "--json"))["offline"] is True
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    result = json.loads(printed(capsys, "--online", "env", "--json"))
    assert result["offline"] is False and result["versions"]["torch"][0].isdigit() and result["device"]
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.versions()["no-such-package"] == "not installed"


FLAGS = {"train": "--training.learning_rate", "frontier": "--frontier.epsilons"}


@pytest.mark.parametrize("verb", [[], *([name] for name in cli.VERBS), ["recipe", "cp"], ["ledger", "budget"]])
def test_help_of_every_command(capsys: Captured, verb: list[str]) -> None:
    text = printed(capsys, *verb, "--help")
    assert text.startswith("usage: dpmed") and "--json" in text
    takes = {name for name, key in FLAGS.items() if key in text}
    expected = {"train": {"train"}, "sanitize": {"train"}, "frontier": {"train", "frontier"}}
    assert takes == expected.get("".join(verb), set())
    of_runs = (["train"], ["sanitize"], ["frontier"])
    assert ("--evaluation.fpr" in text) == (verb in (*of_runs, ["evaluate"]))
    assert ("--data.train" in text) == (verb in of_runs)  # evaluate and tag have a flag of their own
    assert ("--release.max_utility_loss" in text) == (verb == ["sanitize"])


HEAVY = ("torch", "transformers", "datasets", "polars", "altair", "jsonargparse", "pandas", "numpy", "rich")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--help"], ["frontier", "--help"], ["evaluate", "-h"], ["ledger", "show", "--help"]],
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = f"import sys, dpmed.cli; s = dpmed.cli.main({argv!r}); print([m for m in {HEAVY!r} if m in sys.modules], s)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_version(capsys: Captured) -> None:
    assert printed(capsys, "--version") == f"dpmed {dpmed.__version__}\n"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "dpmed", "x"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: unknown command 'x'")


def test_public_names() -> None:
    names = [name for name in dpmed.__all__ if name != "__version__"]
    assert set(names) == set(dpmed._MODULES) and dpmed.__all__ == sorted(dpmed.__all__)
    assert {"load_records", "run_frontier"} <= set(dir(dpmed))
    assert dpmed.PrivacyPlan.__module__ == "dpmed.privacy.plan"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpmed.nothing  # noqa: B018
    assert dpmed.__version__[0].isdigit()
