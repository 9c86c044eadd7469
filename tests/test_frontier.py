"""The grid, its processes, and what is left when one of them, or all of them, die."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import N_HELDOUT, N_TRAIN, RECORDS_PER_UNIT, World, figures, files, make_world

from dpmed.errors import DpmedError, InputError
from dpmed.frontier import run_frontier
from dpmed.grid import grid
from dpmed.recipe import Objective, Recipe
from dpmed.recipe_io import dump_recipe, merge
from dpmed.runs import last_checkpoint

ALL = ["full", "lora", "dp_lora", "sani", "repair_only"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_for(world: World, methods: list[str], **changes: Any) -> Recipe:
    frontier = {"methods": methods, "epsilons": [8.0], "seeds": [0]}
    return merge(world.recipe(evaluation={"suffix_tokens": [4]}, frontier=frontier), changes)


# --- The grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_names_every_run(world: World, tmp_path: Path) -> None:
    changes = {"epsilons": [1.0, 0.5], "seeds": [0, 3], "overrides": {"dp_lora": {"training": {"epochs": 2}}}}
    jobs = grid(recipe_for(world, ALL, frontier=changes), tmp_path)
    settings = ["full", "lora", "dp_lora-eps1", "dp_lora-eps0.5", "sani", "repair_only"]
    assert [job.name for job in jobs] == ["base", *(f"{name}-s{seed}" for seed in (0, 3) for name in settings)]
    by_name = {job.name: job for job in jobs}
    assert {job.setting for job in jobs} == {"base", *settings}
    assert {job.method for job in jobs} == {"base", *ALL}
    assert by_name["dp_lora-eps0.5-s3"].recipe.privacy.target_epsilon == 0.5
    assert by_name["lora-s3"].recipe.training.seed == 3
    assert {job.recipe.training.epochs for job in jobs if job.method == "dp_lora"} == {2}
    assert {job.recipe.training.epochs for job in jobs if job.method != "dp_lora"} == {1}
    assert {job.recipe.method for job in jobs if job.name.startswith("repair_only")} == {"sani"}


def test_repairs_start_from_the_full_run_of_their_seed(world: World, tmp_path: Path) -> None:
    jobs = {job.name: job for job in grid(recipe_for(world, ["repair_only"], frontier={"seeds": [0, 1]}), tmp_path)}
    assert list(jobs) == ["base", "full-s0", "repair_only-s0", "full-s1", "repair_only-s1"]  # full is added
    job = jobs["repair_only-s1"]
    assert job.after == "full-s1" and job.recipe.sani.erase_fraction == 0
    assert job.recipe.model.path == str(tmp_path / "runs" / "full-s1" / "model")
    assert job.recipe.model.base == str(world.base)
    assert jobs["full-s1"].after is None and jobs["full-s1"].recipe.model.path == str(world.base)


def test_an_override_of_the_fraction_does_not_make_repair_only_erase(world: World, tmp_path: Path) -> None:
    overrides = {"repair_only": {"sani": {"erase_fraction": 0.9}}, "sani": {"sani": {"erase_fraction": 0.25}}}
    jobs = grid(recipe_for(world, ["sani", "repair_only"], frontier={"overrides": overrides}), tmp_path)
    fractions = {job.name: job.recipe.sani.erase_fraction for job in jobs if job.recipe.method == "sani"}
    assert fractions == {"sani-s0": 0.25, "repair_only-s0": 0.0}


def test_a_grid_of_keys_is_run_in_every_combination(world: World, tmp_path: Path) -> None:
    grids = {
        "sani": {"sani": {"erase_layers": [1, "all", [0, 1]], "erase_fraction": [0.25, 1.0]}, "training.epochs": [2]},
        "dp_lora": {"lora.rank": [1, 2]},
    }
    recipe = recipe_for(world, ["dp_lora", "sani"], frontier={"grids": grids, "epsilons": [8.0]})
    jobs = {job.name: job for job in grid(recipe, tmp_path)}
    assert set(jobs) == {
        "base",
        "full-s0",
        *(f"dp_lora-eps8-rank={rank}-s0" for rank in (1, 2)),
        *(
            f"sani-erase_layers={layers}-erase_fraction={fraction}-epochs=2-s0"
            for layers in ("1", "all", "0+1")
            for fraction in ("0.25", "1")
        ),
    }
    job = jobs["sani-erase_layers=0+1-erase_fraction=0.25-epochs=2-s0"]
    made = job.recipe
    assert (made.sani.erase_layers, made.sani.erase_fraction, made.training.epochs) == ([0, 1], 0.25, 2)
    assert job.setting == job.name.removesuffix("-s0") and job.method == "sani"
    assert jobs["dp_lora-eps8-rank=2-s0"].recipe.lora.rank == 2


def test_the_baselines_of_sani(world: World, tmp_path: Path) -> None:
    """A clean retrain starts from the base and trains as `full` does; pruning and rewinding train nothing."""
    overrides = {"full": {"training": {"epochs": 7}}, "sani": {"training": {"epochs": 2}}}
    methods = ["clean_retrain", "pruning", "rewind"]
    jobs = {job.method: job for job in grid(recipe_for(world, methods, frontier={"overrides": overrides}), tmp_path)}
    assert list(jobs) == ["base", "full", *methods]
    clean, pruned, rewound = (jobs[name].recipe for name in methods)
    assert clean.model.path == str(world.base) and jobs["clean_retrain"].after is None
    assert (clean.training.epochs, clean.method, clean.sani.erase_fraction) == (7, "sani", 0)
    assert jobs["pruning"].after == jobs["rewind"].after == "full-s0"
    assert (pruned.training.epochs, pruned.sani.reset_to) == (0, "zero")
    assert (rewound.training.epochs, rewound.sani.reset_to, rewound.sani.erase_fraction) == (0, "base", 1)


def test_pruning_and_rewinding_change_the_erased_neurons_alone(world: World, tmp_path: Path) -> None:
    recipe = recipe_for(world, ["pruning", "rewind"])
    run_frontier(recipe, tmp_path / "out")
    full, pruned, rewound = (
        load_file(tmp_path / "out" / "runs" / f"{name}-s0" / "model" / "model.safetensors")
        for name in ("full", "pruning", "rewind")
    )
    base = load_file(world.base / "model.safetensors")
    for name, weight in full.items():
        last = ".1.mlp." in name  # the second of two blocks
        assert torch.equal(weight, pruned[name]) == (not last), name
        assert torch.equal(rewound[name], base[name] if last else weight), name
        if last and "gate" in name:
            assert int((pruned[name] == 0).all(dim=1).sum()) == len(weight) // 2


def test_the_objectives_of_unlearning_are_methods_of_a_grid(world: World, tmp_path: Path) -> None:
    """Each starts from the full run of its seed, and an override cannot make one another."""
    objectives = get_args(Objective)
    overrides = {"npo": {"unlearn": {"objective": "task_vector", "beta": 0.5}}}
    jobs = grid(recipe_for(world, list(objectives), frontier={"overrides": overrides}), tmp_path)
    assert [job.name for job in jobs] == ["base", "full-s0", *(f"{name}-s0" for name in objectives)]
    made = {job.method: job for job in jobs if job.method in objectives}
    assert {name: (job.recipe.method, job.recipe.unlearn.objective) for name, job in made.items()} == {
        name: ("unlearn", name) for name in objectives
    }
    assert {job.after for job in made.values()} == {"full-s0"}
    assert (made["npo"].recipe.unlearn.beta, made["gradient_ascent"].recipe.unlearn.beta) == (0.5, 0.1)


def test_the_base_model_has_one_run_where_it_can_be_measured(world: World, tmp_path: Path) -> None:
    recipe = recipe_for(world, ["lora"], model={"path": "tuned", "base": str(world.base)})
    base = grid(recipe, tmp_path)[0]
    assert (base.name, base.method, base.recipe.model.path, base.recipe.model.base) == (
        *("base", "base"),
        *(str(world.base), None),
    )
    assert [job.name for job in grid(merge(recipe, {"task": "classification"}), tmp_path)] == ["lora-s0"]


# --- A whole frontier -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world: World) -> Callable[[], Path]:
    def run() -> Path:
        folder = world.folder / "frontier"
        if not folder.exists():
            run_frontier(recipe_for(world, ALL), folder, jobs=2)
        return folder

    return run


def test_frontier_json_follows_the_contract(whole: Callable[[], Path]) -> None:
    frontier = json.loads((whole() / "frontier.json").read_text())
    points = {point["name"]: point for point in frontier["points"]}
    assert set(points) == {"base", "full-s0", "lora-s0", "dp_lora-eps8-s0", "sani-s0", "repair_only-s0"}
    keys = {"name", "setting", "method", "seed", "epsilon", "epsilon_lower_bound", "delta", "unit", "utility"}
    keys |= {"memorization", "reference", "cost", "on_frontier"}
    for name, point in points.items():
        assert keys <= set(point)
        assert (point["epsilon"] is None) is (name != "dp_lora-eps8-s0")
        assert len(list(figures(point))) > 20
        assert point["cost"]["seconds"] > 0 or name == "base"
    private = points["dp_lora-eps8-s0"]
    assert private["epsilon"] <= 8.0 and (private["delta"], private["unit"]) == (1e-2, "mrn")
    assert {point["method"] for point in points.values()} == {"base", *ALL}
    assert any(point["on_frontier"] for point in points.values())
    meta = frontier["meta"]
    assert (meta["n_units"], meta["n_heldout_units"]) == (N_TRAIN, N_HELDOUT)
    assert meta["n_records"] == N_TRAIN * RECORDS_PER_UNIT
    assert meta["failed"] == [] and meta["wall_seconds"] > 0 and len(meta["cannot_show"]) > 2
    assert meta["base_model"]["utility"] == points["base"]["utility"]
    assert {"task", "model", "versions", "created", "settings"} <= set(meta)


def test_a_frontier_folder_holds_the_report(whole: Callable[[], Path]) -> None:
    folder = whole()
    with (folder / "frontier.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    page = (folder / "report.html").read_text()
    assert "dp_lora" in page.lower() and 'src="http' not in page
    drawn = {path.suffix for path in (folder / "figures").iterdir()}
    assert {".svg", ".png"} <= drawn


def test_the_base_model_is_scored_once(whole: Callable[[], Path]) -> None:
    assert len(list((whole() / "base_scores").glob("*.safetensors"))) == 2  # one for each side, shared by all runs


def test_no_patient_is_in_any_file_of_a_frontier(world: World, whole: Callable[[], Path]) -> None:
    inspected = {path: path.read_bytes() for path in files(whole())}
    assert {"base.log", "lora-s0.log"} <= {path.name for path in inspected}
    found = [(path.name, mark) for path, content in inspected.items() for mark in world.marks if mark in content]
    assert found == []


def test_only_the_owner_reads_a_frontier(whole: Callable[[], Path]) -> None:
    folder = whole()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    inner = [path for path in folder.rglob("*") if path.parent.name in ("logs", "runs", "base_scores")]
    assert len(inner) >= 14
    open_to_others = [path.name for path in inner if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert open_to_others == []
    assert stat.S_IMODE((folder / "frontier.json").stat().st_mode) == 0o600


def test_resume_leaves_finished_runs_alone(world: World, whole: Callable[[], Path]) -> None:
    folder = whole()
    before = {path: path.stat().st_mtime_ns for path in files(folder / "runs")}
    again = run_frontier(recipe_for(world, ALL), folder, jobs=2, resume=True)
    assert {path: path.stat().st_mtime_ns for path in files(folder / "runs")} == before
    assert len(again["points"]) == 6
    with pytest.raises(InputError, match="add --resume"):
        run_frontier(recipe_for(world, ALL), folder)


# --- Runs that fail ---------------------------------------------------------------------------------------------------


def test_a_failed_run_is_named_and_the_others_are_reported(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "frontier"
    broken = recipe_for(world, ["lora", "sani"], frontier={"overrides": {"full": {"training": {"extra": {"x": 1}}}}})
    with pytest.raises(
        DpmedError, match=r"2 of 4 runs failed, first full-s0: training\.extra\.x is no field"
    ) as caught:
        run_frontier(broken, folder, jobs=2)
    assert caught.value.exit_code == 1
    frontier = json.loads((folder / "frontier.json").read_text())
    assert {point["name"] for point in frontier["points"]} == {"base", "lora-s0"}
    reasons = {entry["name"]: entry["reason"] for entry in frontier["meta"]["failed"]}
    assert set(reasons) == {"full-s0", "sani-s0"}
    assert reasons["sani-s0"] == "full-s0 failed, from which it starts"
    assert "full-s0" in (folder / "report.html").read_text()

    kept = (folder / "runs" / "lora-s0" / "run.json").stat().st_mtime_ns
    fixed = run_frontier(recipe_for(world, ["lora", "sani"]), folder, jobs=2, resume=True)
    assert {point["name"] for point in fixed["points"]} == {"base", "lora-s0", "full-s0", "sani-s0"}
    assert fixed["meta"]["failed"] == []
    assert (folder / "runs" / "lora-s0" / "run.json").stat().st_mtime_ns == kept


def test_a_fault_shows_no_record(world: World, tmp_path: Path) -> None:
    """An exception that nobody foresaw may quote a record: only its type and place are told, also where all fail."""
    base = tmp_path / "base"
    base.mkdir()
    for path in world.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    recipe = recipe_for(world, ["lora"], model={"path": str(base)})
    with pytest.raises(DpmedError, match=r"2 of 2 runs failed, first (base|lora-s0): .*; --resume runs"):
        run_frontier(recipe, tmp_path / "frontier", jobs=2)
    reason = json.loads((tmp_path / "frontier" / "frontier.json").read_text())["meta"]["failed"][0]["reason"]
    assert reason.startswith("internal fault: ZeroDivisionError at ")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"privacy": {"delta": 0.5}}, "delta"),
        (
            {"frontier": {"overrides": {"dp_lora": {"privacy": {"expected_batch_units": N_TRAIN + 1}}}}},
            "expected_batch",
        ),
        ({"data": {"train": "none.jsonl"}}, "file not found"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    changes: dict[str, Any], word: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=word):
        run_frontier(recipe_for(world, ["dp_lora"], **changes), tmp_path / "frontier")
    assert not (tmp_path / "frontier").exists()


# --- Killed -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> set[int]:
    """All processes below this one."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes under /proc")
def test_a_killed_frontier_takes_its_runs_along_and_goes_on(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "frontier"
    recipe = recipe_for(world, ["lora"], training={"epochs": 24, "save_every": 1.0})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "dpmed", "frontier", str(tmp_path / "recipe.yaml"), "--output_dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with (tmp_path / "stderr.txt").open("wb") as log:
        process = subprocess.Popen([*command, "--jobs", "2"], env=environment, stdout=log, stderr=log)
    try:
        state = folder / "runs" / "lora-s0"
        started = wait_until(lambda: any(state.glob("checkpoint-*/trainer_state.json")), 120)
        assert started, (tmp_path / "stderr.txt").read_text()
        below = children(process.pid)
        assert below
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert wait_until(lambda: not any(map(alive, below)), 10), "a run outlived its frontier"
    assert json.loads((state / "run.json").read_text())["status"] == "running"
    assert not (folder / "frontier.json").exists()
    checkpoint, n_logged = last_checkpoint(state), len(logged_steps(state))
    assert checkpoint is not None
    done = run_frontier(recipe, folder, jobs=2, resume=True)
    assert {point["name"] for point in done["points"]} == {"base", "lora-s0"}
    steps = logged_steps(state)[n_logged:]
    assert steps and all(step > int(checkpoint.name.split("-")[1]) for step in steps)  # it went on from there
    assert json.loads((state / "run.json").read_text())["n_steps"] == steps[-1] == 120


def logged_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
