"""Two processes train what one process trains: same sums, same weights, one noise, one book.

They are real processes with gloo between them; `rank_worker` holds what they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.dp_runs import N_UNITS
from invariants import rank_worker
from tiny_runs import make_world

from dpmed import pipeline
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.recipe_io import dump_recipe

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 200
SIGMAS = 6.0
Ranks = list[dict[str, Any]]


def environment(**changes: str) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    return {**found, "OMP_NUM_THREADS": "1", "DPMED_LEDGER": "none", **changes}


def free_port() -> str:
    """Asked for by a process of its own, since this one may open no socket."""
    ask = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def start_two(folder: Path) -> list[int]:
    """Run the worker as two ranks; returns their exit codes. None is left behind."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "invariants.rank_worker", str(folder)]
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(2)]
    started = [
        subprocess.Popen(
            command, env=environment(RANK=str(r), LOCAL_RANK=str(r), **place), stdout=logs[r], stderr=logs[r], cwd=ROOT
        )
        for r in range(2)
    ]
    try:
        return [process.wait(SECONDS) for process in started]
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """The same by this process alone; its checkpoint `from_one` is what the two resume."""
    found = {
        "quiet": rank_worker.quiet(folder / "one_quiet"),
        "empty_share": rank_worker.empty_share(folder / "one_empty_share"),
        "whole": rank_worker.run(folder / "one_whole", rank_worker.half_plan())[1],
        "stopped": rank_worker.stopped(folder / "from_one"),
    }
    return found


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> Ranks:
    """What each of the two ranks saw."""
    codes = start_two(folder)
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n\n".join(logs)[-4000:]
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in found] == [{"size": 2, "units": N_UNITS}] * 2
    return found


def distance(a: list[float], b: list[float]) -> float:
    """Relative, of two vectors."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert float(y.norm()) > 0
    return float((x - y).norm() / y.norm())


# --- Sums and weights -------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_sums_and_weights_of_one(one: dict[str, Any], two: Ranks) -> None:
    alone = one["quiet"]
    for rank in two:
        assert len(rank["quiet"]["sums"]) == len(alone["sums"]) == 3
        for got, expected in zip(rank["quiet"]["sums"], alone["sums"], strict=True):
            assert distance(got, expected) < 1e-5
        assert distance(rank["quiet"]["weights"], alone["weights"]) < 1e-5


def test_clipping_was_at_work_on_both_sides(one: dict[str, Any]) -> None:
    """The sum of six clipped gradients, none of them alone."""
    assert 0.3 < float(torch.tensor(one["quiet"]["sums"][0]).norm()) <= 0.3 * N_UNITS


@pytest.mark.parametrize("scenario", ["quiet", "different_start", "noise_fast", "noise_secure", "noisy", "tiny_rate"])
def test_both_ranks_have_the_same_weights_to_the_bit_after_every_step(scenario: str, two: Ranks) -> None:
    first, second = (rank[scenario]["digests"] for rank in two)
    assert len(first) >= 3 and len(set(first)) == len(first)
    assert first == second


def test_adapters_that_were_made_differently_start_from_those_of_rank_0(one: dict[str, Any], two: Ranks) -> None:
    assert distance(two[1]["different_start"]["weights"], one["quiet"]["weights"]) < 1e-5


def test_a_rank_that_drew_nobody_takes_part(one: dict[str, Any], two: Ranks) -> None:
    """Step 1 is of rank 0's patients alone, step 2 of nobody."""
    alone = one["empty_share"]["sums"]
    assert set(alone[1]) == {0.0} and distance(alone[0], alone[2]) > 0.1
    for rank in two:
        seen = rank["empty_share"]
        assert distance(seen["sums"][0], alone[0]) < 1e-5
        assert seen["sums"][1] == alone[1]
        assert distance(seen["weights"], one["empty_share"]["weights"]) < 1e-5
    assert two[0]["empty_share"]["digests"] == two[1]["empty_share"]["digests"]


# --- Noise ------------------------------------------------------------------------------------------------------------


def noise_in(seen: dict[str, Any]) -> torch.Tensor:
    """What reached `.grad`, in units of noise_multiplier * C: [steps, p]."""
    return torch.tensor(seen["sums"]) / (3.0 * 0.2)


def variance_is_one(numbers: torch.Tensor) -> bool:
    return abs(float(numbers.square().mean()) - 1) < SIGMAS * (2 / numbers.numel()) ** 0.5


@pytest.mark.parametrize("scenario", ["noise_fast", "noise_secure"])
def test_two_ranks_add_one_noise(scenario: str, two: Ranks) -> None:
    """Not one each, which would be sqrt(2) of it, nor their mean."""
    numbers = noise_in(two[0][scenario])
    assert variance_is_one(numbers)
    assert abs(float(numbers.mean())) < SIGMAS / numbers.numel() ** 0.5
    of_different_steps = torch.corrcoef(numbers) - torch.eye(len(numbers))
    assert float(of_different_steps.abs().max()) < SIGMAS / numbers.shape[1] ** 0.5
    assert two[1][scenario]["sums"] == two[0][scenario]["sums"]


def test_the_checks_see_noise_and_starts_of_each_rank(two: Ranks) -> None:
    assert not variance_is_one(noise_in(two[0]["noise_of_each"]))
    assert two[0]["starts_of_each"]["digests"] != two[1]["starts_of_each"]["digests"]


# --- Books and checkpoints --------------------------------------------------------------------------------------------


def charged(ledger: Path) -> list[int]:
    """Steps charged to each run of a ledger with one data set."""
    (dataset,) = PrivacyLedger(ledger, create=False).datasets()
    return [run["n_steps"] for run in dataset["runs"]]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("two")
def test_rank_0_alone_writes_and_charges(folder: Path) -> None:
    own = folder / "own_folders"
    assert charged(own / "ledger0.sqlite") == [3]
    assert not (own / "ledger1.sqlite").exists()
    assert {"privacy_run.json", "checkpoint-2/adapter_model.safetensors"} <= names(own / "rank0")
    assert {name.split("/")[1] for name in names(own / "rank1")} == {"rng_state_1.pth"}  # transformers' own


def test_each_step_is_charged_once_however_many_ranks_run_it(two: Ranks, folder: Path) -> None:
    assert charged(folder / "stopped.sqlite")[0] >= 2
    for rank in two:
        assert (rank["noisy"]["n_steps"], rank["tiny_rate"]["n_steps"]) == (3, 8)
        assert (rank["stopped"]["global_step"], rank["stopped"]["n_steps"]) == (2, 2)
        assert (rank["resumed"]["global_step"], rank["resumed"]["n_steps"]) == (4, 4)


def test_a_checkpoint_of_one_process_is_resumed_by_two(one: dict[str, Any], two: Ranks, folder: Path) -> None:
    for rank in two:
        assert distance(rank["resumed"]["weights"], one["whole"]["weights"]) < 1e-5
    assert distance(one["stopped"]["weights"], one["whole"]["weights"]) > 1e-3  # there was something left to do
    assert charged(folder / "from_one.sqlite") == [4]


@pytest.mark.usefixtures("two")
def test_a_checkpoint_of_two_processes_is_resumed_by_one(one: dict[str, Any], folder: Path) -> None:
    assert charged(folder / "stopped.sqlite") == [2]
    seen = rank_worker.resumed(folder / "stopped")
    assert distance(seen["weights"], one["whole"]["weights"]) < 1e-5
    assert (seen["global_step"], seen["n_steps"]) == (4, 4)
    assert charged(folder / "stopped.sqlite") == [4]


def test_the_certificate_counts_units_that_gave_nan_on_any_rank(two: Ranks) -> None:
    assert two[0]["nonfinite"]["n_nonfinite_units"] == 3


def test_when_one_rank_stops_no_other_waits_for_it(two: Ranks) -> None:
    first, second = (rank["budget_ends"] for rank in two)
    assert first["error"] == "BudgetError"
    assert second["error"] == "PrivacyError"  # that it lost the others; not a fault to report
    assert second["seconds"] < 60


# --- The command line -------------------------------------------------------------------------------------------------


def test_torchrun_trains_by_the_command_line_what_one_process_trains(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    recipe = world.recipe("dp_lora", privacy={"expected_batch_units": 3}, training={"save_every": 0.4})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dpmed", "train", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "two"), "--json"]
    done = subprocess.run(
        command,
        env=environment(DPMED_LEDGER=str(tmp_path / "ledger.sqlite"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)  # told once, by rank 0
    run = pipeline.train(recipe, tmp_path / "one")
    assert result["status"] == run["status"] == "finished"
    assert result["n_steps"] == run["n_steps"] == 4
    assert names(tmp_path / "two") == names(tmp_path / "one") - {"charges.sqlite"}  # it had a ledger instead
    certificate = json.loads((tmp_path / "two" / "privacy.json").read_text())
    assert (certificate["n_steps"], certificate["n_steps_lost"], certificate["planned_steps"]) == (4, 0, 4)
    assert charged(tmp_path / "ledger.sqlite") == [4]
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) + (steps.count(4) - 1)  # no line by two processes; the last step has a summary


def test_rank_1_joins_rank_0_even_where_nothing_but_the_evaluation_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group comes with the training arguments, which rank 0 makes before it looks at the folder."""
    joined: list[Path] = []
    make: Callable[..., Any] = pipeline.training_arguments

    def spy(recipe: Any, output_dir: Path, **counts: int) -> Any:
        joined.append(output_dir)
        return make(recipe, output_dir, **counts)

    monkeypatch.setattr(pipeline, "training_arguments", spy)
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    pipeline.train(make_world(tmp_path).recipe("dp_lora"), tmp_path / "run", resume=True)
    assert joined == [tmp_path / "run"]
