"""What an evaluation measures from the command line: canaries and audit, persistence, and what they refuse."""

from __future__ import annotations

import json
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import World, make_world

from dpmed import cli, evaluation, frontier, pipeline
from dpmed.data.canaries import Manifest
from dpmed.errors import DpmedError, InputError, RefutedError
from dpmed.memorization import canary_figures
from dpmed.privacy.audit import AuditResult
from dpmed.recipe import Recipe

N_CANARIES = 40
COLUMNS = {"unit": "unit", "record_id": "record_id", "identifiers": "identifiers", "label": "label", "text": "text"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def planted(world: World) -> Path:
    """The folder that `dpmed plant` wrote."""
    folder = world.folder / "planted"
    train = str(world.folder / "train.jsonl")
    flags = ["--data.unit", "mrn", "--data.label", "label", "--data.identifiers", "spans"]
    options = ["--n", str(N_CANARIES), "--designs", "identifiers", "--repeats", "1,2", "--seed", "4"]
    assert cli.main(["plant", train, "--output_dir", str(folder), *flags, *options]) == 0
    return folder


def recipe_of(world: World, planted: Path, method: str = "lora", **changes: Any) -> Recipe:
    data = {**COLUMNS, "train": str(planted / "records.parquet"), "canaries": str(planted / "canaries.json")}
    heldout = {"heldout": str(world.folder / "heldout.parquet")}
    return world.recipe(method, data={**data, **heldout}, evaluation={"canary_candidates": 8}, **changes)


@pytest.fixture(scope="module")
def heldout(world: World) -> None:
    """The held-out records in the columns of the planted ones."""
    from dpmed.data.records import load_records
    from dpmed.tagging import write_records

    source = world.folder / "heldout.jsonl"
    write_records(
        world.folder / "heldout.parquet", load_records(source, label="label", unit="mrn", identifiers="spans")
    )


def test_plant_writes_records_and_a_manifest_for_the_owner_alone(planted: Path, capsys: pytest.CaptureFixture) -> None:
    assert {p.name for p in planted.iterdir()} == {"records.parquet", "canaries.json"}
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (planted, *planted.iterdir())]
    assert modes == [0o700, 0o600, 0o600]
    assert len(Manifest.load(planted / "canaries.json").canaries) == N_CANARIES


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--data.unit"),
        (["--data.unit", "mrn", "--designs", "poems"], "'poems' is not known"),
        (["--data.unit", "mrn", "--repeats", "0"], "whole number of at least 1"),
        (["--data.unit", "mrn", "--model.path", "x"], "does not use this key"),
    ],
)
def test_plant_refuses_in_one_line_and_writes_nothing(
    flags: list[str], said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train, folder = str(world.folder / "train.jsonl"), tmp_path / "out"
    assert cli.main(["plant", train, "--output_dir", str(folder), "--n", "4", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not folder.exists()


@pytest.fixture(scope="module")
def trained(world: World, planted: Path, heldout: None) -> Path:
    folder = world.folder / "runs" / "dp"
    pipeline.train(recipe_of(world, planted, "dp_lora"), folder)
    return folder


def evaluation_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_the_lower_bound_stands_beside_the_certificates_epsilon(trained: Path, planted: Path) -> None:
    found, certificate = evaluation_of(trained), json.loads((trained / "privacy.json").read_text())
    audit = found["memorization"]["audit"]
    assert (audit["epsilon_upper_bound"], audit["delta"]) == (certificate["epsilon"], certificate["delta"])
    assert audit["contradicts"] is False and audit["n_canaries"] == N_CANARIES
    n_in = int(Manifest.load(planted / "canaries.json").included.sum())
    assert found["memorization"]["canary_exposure"]["n"] == n_in
    assert certificate["n_units"] == 13 + n_in  # a canary is a patient
    assert found["counts"]["train"]["n_units"] == 13
    assert not (trained / evaluation.PARTS).exists()


def test_no_canary_is_in_any_file_of_a_run(trained: Path, planted: Path) -> None:
    secrets = [v for c in Manifest.load(planted / "canaries.json").canaries for v in c.secret.values()]
    content = [path.read_bytes() for path in trained.rglob("*") if path.is_file()]
    assert not [s for s in secrets if any(s.encode() in one for one in content)]


def refuting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit that refutes every claim."""
    audit = canary_figures.audit_epsilon

    class Refuting(AuditResult):
        def contradicts(self, upper_epsilon: float | None, **_: Any) -> bool:
            return upper_epsilon is not None

    def shown(*args: Any, **options: Any) -> Refuting:
        found = audit(*args, **options)
        return Refuting(**{field.name: getattr(found, field.name) for field in fields(found)})

    monkeypatch.setattr(canary_figures, "audit_epsilon", shown)


def test_canaries_that_refute_the_certificate_are_an_error_after_the_evaluation_is_written(
    trained: Path, world: World, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuting(monkeypatch)
    recipe = recipe_of(world, planted, model={"path": str(trained / "adapter"), "base": str(world.base)})
    with pytest.raises(RefutedError, match="do not release these weights"):
        pipeline.evaluate(recipe, tmp_path / "e")
    assert evaluation_of(tmp_path / "e")["memorization"]["audit"]["contradicts"] is True
    assert json.loads((tmp_path / "e" / "run.json").read_text())["status"] == "running"


def test_a_refuted_run_stops_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run that is waiting starts; the first one's reason stands for all."""
    (tmp_path / "logs").mkdir()
    jobs = [frontier.Job(f"dp_lora-eps{i}-s0", f"dp_lora-eps{i}", "dp_lora", None, None) for i in (1, 8)]  # type: ignore[arg-type]
    started: list[str] = []

    def start(job: Any, folder: Path, threads: int, n_private: int) -> None:
        started.append(f"{job.name} among {n_private}")
        (folder / "logs" / f"{job.name}.failure.json").write_text('{"reason": "refuted", "stops": true}')

    class Process:
        exitcode, sentinel = 1, 7

        def __init__(self, target: Any, args: Any, daemon: bool) -> None:
            self.args = args

        def start(self) -> None:
            start(*self.args)

    class Context:
        def set_forkserver_preload(self, _: Any) -> None: ...

        def __new__(cls, *_: Any) -> Any:
            return object.__new__(cls)

    Context.Process = Process  # type: ignore[attr-defined]
    monkeypatch.setattr(frontier.multiprocessing, "get_context", Context)
    monkeypatch.setattr(frontier, "_ended", lambda running: [running.pop(s) for s in list(running)])
    failed = frontier._run_all(jobs, tmp_path, jobs=1)
    assert started == ["dp_lora-eps1-s0 among 2"]
    assert [entry["name"] for entry in failed] == [job.name for job in jobs]
    assert "no other run starts" in failed[1]["reason"]


def test_evaluate_compares_with_an_evaluation_before(
    trained: Path, world: World, planted: Path, heldout: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_of(world, planted)
    sides = ["--train", recipe.data.train, "--heldout", recipe.data.heldout or ""]
    flags = [f"--data.{name}={column}" for name, column in COLUMNS.items()]
    flags += ["--data.max_length", "64", "--evaluation.bootstrap", "20", "--evaluation.prefix_tokens", "[4]"]
    flags += ["--evaluation.suffix_tokens", "[4]", "--evaluation.canary_candidates", "4"]
    canaries = ["--canaries", str(planted / "canaries.json")]

    def evaluated(name: str, *options: str) -> int:
        model = ["--model", str(trained / "adapter"), "--base_model", str(world.base)]
        return cli.main(["evaluate", *model, *sides, *flags, *options, "--output_dir", str(tmp_path / name)])

    assert evaluated("first", *canaries) == 0
    assert evaluated("again", *canaries, "--before", str(tmp_path / "first")) == 0
    persistence = evaluation_of(tmp_path / "again")["memorization"]["persistence"]
    counts = persistence["extraction"]["p4_n4"]
    assert counts["n_before"] == counts["n_after"] == counts["n_both"]
    assert evaluation_of(tmp_path / "first")["not_applicable"]["memorization.persistence"].startswith("no evaluation")
    capsys.readouterr()
    assert evaluated("other", "--before", str(tmp_path / "first"), "--evaluation.span_tokens", "5", *canaries) == 2
    assert "the evaluation before counts spans of 30 tokens" in capsys.readouterr().err
    assert evaluated("none", "--before", str(tmp_path / "nowhere"), *canaries) == 2
    assert "is missing; evaluate that model again" in capsys.readouterr().err


def test_canaries_without_heldout_records_are_refused(world: World, planted: Path, trained: Path) -> None:
    recipe = recipe_of(world, planted, model={"path": str(trained / "adapter"), "base": str(world.base)})
    recipe.data.heldout = None
    with pytest.raises(InputError, match=r"data\.heldout"):
        evaluation.evaluate_weights(recipe.model.path, recipe, pipeline.load_splits(recipe.data, require_unit=False))


def test_a_refuted_certificate_is_a_fault_not_an_input() -> None:
    assert issubclass(RefutedError, DpmedError) and RefutedError("x").exit_code == 1
