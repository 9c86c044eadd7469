"""The privacy-utility frontier: a grid of runs, each its own process, and one report over all of them.

Every run has its own folder with its own status, so a frontier that was killed goes on where it stood. The processes
are forked from one that has imported the heavy packages already; each starts with its own memory, seeds and entropy.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpmed.environment import versions
from dpmed.errors import DpmedError, RefutedError, fault_line
from dpmed.grid import Job, grid
from dpmed.progress import progress
from dpmed.recipe_io import check_recipe, dump_recipe
from dpmed.report.build import build_report
from dpmed.report.points import chosen_leak, non_dominated, points_from_run_folder
from dpmed.runs import claim_output_dir, is_finished, read_json, write_json, write_text

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from dpmed.recipe import Recipe

CANNOT_SHOW = (
    "Attacks that were not run may extract more: every leak rate here is a lower bound.",
    "The guarantee is for one patient added or removed; it says nothing of facts that many patients share.",
    "What the base model had seen before fine-tuning is not covered.",
    "The choice among these runs, made by looking at this report, is itself not covered by any epsilon.",
)


def run_frontier(recipe: Recipe, output_dir: Path, *, jobs: int = 1, resume: bool = False) -> dict[str, Any]:
    """Run the grid, evaluate every run, and write frontier.json, frontier.csv, figures and report.html.

    Args:
        recipe: the runs; see its `frontier` section.
        output_dir: a new folder, or one to go on in with `resume`.
        jobs: how many runs at once; they share the CPU threads.
        resume: skip finished runs, go on with the others from their checkpoints.

    Returns: what stands in frontier.json.
    Raises: InputError before anything runs, for a recipe or data that cannot be used; DpmedError at the end if a run
        failed (the report over the others is written first).
    """
    check_recipe(recipe, frontier=True)
    output_dir = Path(output_dir).absolute()
    todo = grid(recipe, output_dir)
    counts = _check_data(recipe, todo)
    claim_output_dir(output_dir, resume=resume)
    for folder in ("runs", "logs"):
        (output_dir / folder).mkdir(mode=0o700, exist_ok=True)
    write_text(output_dir / "recipe.yaml", dump_recipe(recipe))
    started = time.monotonic()
    failed = _run_all(todo, output_dir, jobs=max(1, jobs))
    frontier = _assemble(recipe, todo, output_dir, failed, counts)
    frontier["meta"]["wall_seconds"] = time.monotonic() - started
    write_json(output_dir / "frontier.json", frontier)
    if frontier["points"]:  # of no finished run there is nothing to draw
        build_report([output_dir], output_dir)
    if failed:
        first = failed[0]
        others = "the report shows the others, " if frontier["points"] else ""
        raise DpmedError(
            f"{len(failed)} of {len(todo)} runs failed, first {first['name']}: {first['reason']};"
            f" {others}--resume runs the failed ones again"
        )
    return frontier


def _check_data(recipe: Recipe, todo: Sequence[Job]) -> dict[str, int]:
    """Read the records once and refuse impossible budgets, before any model loads."""
    from dpmed.privacy.plan import PrivacyPlan
    from dpmed.splits import load_splits, split_counts

    private = [job.recipe.privacy for job in todo if job.method == "dp_lora"]
    splits = load_splits(recipe.data, require_unit=bool(private))
    counts = split_counts(splits)
    for privacy in private:
        PrivacyPlan.without_noise(
            unit=recipe.data.unit or "",
            n_units=counts["n_train_units"],
            expected_batch_units=privacy.expected_batch_units,
            max_records_per_unit=privacy.max_records_per_unit,
            clip_norm=privacy.clip_norm,
            target_epsilon=privacy.target_epsilon,
            n_steps=1,
            delta=privacy.delta,
        )
    return counts


def _run_all(todo: Sequence[Job], output_dir: Path, *, jobs: int) -> list[dict[str, str]]:
    """Run the jobs, at most so many at once, each after the one it builds on. Returns name and reason of the failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpmed.pipeline"])
    waiting, running, failed, done = list(todo), {}, [], set()
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    n_private = max(1, sum(job.method == "dp_lora" for job in todo))  # audited together
    with progress("frontier", len(todo)) as bar:
        while waiting or running:
            for job in [job for job in waiting if job.after is None or job.after in done]:
                if len(running) == jobs:
                    break
                waiting.remove(job)
                process = context.Process(target=_work, args=(job, output_dir, threads, n_private), daemon=True)
                process.start()
                running[process.sentinel] = (job, process)
            for job, process in _ended(running):
                bar.advance(1)
                if process.exitcode == 0 and is_finished(output_dir / "runs" / job.name):
                    done.add(job.name)
                    continue
                reason, stops = _reason(output_dir, job, process.exitcode)
                failed.append({"name": job.name, "reason": reason})
                for other in [other for other in waiting if stops or other.after == job.name]:
                    waiting.remove(other)
                    why = "was refuted by its canaries, so no other run" if stops else "failed, from which it"
                    failed.append({"name": other.name, "reason": f"{job.name} {why} starts"})
    return failed


def _ended(running: dict[int, tuple[Job, BaseProcess]]) -> list[tuple[Job, BaseProcess]]:
    """Wait for at least one process and take the ended ones out of `running`."""
    ended = [running.pop(sentinel) for sentinel in wait(list(running)) if isinstance(sentinel, int)]
    for _, process in ended:
        process.join()
    return ended


def _work(job: Job, output_dir: Path, threads: int, n_private: int) -> None:
    """Body of one process: output to a private log, then the run. A finished run returns at once."""
    import torch

    from dpmed import pipeline

    threading.Thread(target=_die_with_parent, daemon=True).start()
    log = os.open(output_dir / "logs" / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    folder, failure = output_dir / "runs" / job.name, output_dir / "logs" / f"{job.name}.failure.json"
    failure.unlink(missing_ok=True)
    shared = {"resume": True, "name": job.name, "setting": job.setting, "base_scores": output_dir / "base_scores"}
    try:
        if job.method == "base":
            pipeline.evaluate(job.recipe, folder, method="base", **shared)
        else:
            pipeline.train(job.recipe, folder, method_name=job.method, audited_together=n_private, **shared)
    except Exception as error:  # the reason goes to the report; an unknown exception's message may hold record text
        reason = str(error) if isinstance(error, DpmedError) else fault_line(error)
        write_json(failure, {"reason": reason, "stops": isinstance(error, RefutedError)})
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _die_with_parent() -> None:
    """A run must not outlive a killed frontier: `--resume` would start it a second time in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _reason(output_dir: Path, job: Job, exitcode: int | None) -> tuple[str, bool]:
    """Why a run failed, and whether that stops the whole grid."""
    failure = output_dir / "logs" / f"{job.name}.failure.json"
    if failure.is_file():
        found = read_json(failure)
        return str(found["reason"]), bool(found["stops"])
    return f"the process ended with status {exitcode} (out of memory?); see logs/{job.name}.log", False


def _assemble(
    recipe: Recipe, todo: Sequence[Job], output_dir: Path, failed: list[dict[str, str]], counts: dict[str, int]
) -> dict[str, Any]:
    """frontier.json: the points of all finished runs, and what is needed to read them."""
    missing = {entry["name"] for entry in failed}
    points = [points_from_run_folder(output_dir / "runs" / job.name) for job in todo if job.name not in missing]
    for point, flag in zip(points, non_dominated(points, leak=chosen_leak(points)), strict=True):
        point["on_frontier"] = flag
    base = next((point for point in points if point["method"] == "base"), None)
    meta: dict[str, Any] = {
        "versions": versions(),
        "created": datetime.now(UTC).date().isoformat(),
        "task": recipe.task,
        "model": recipe.model.base or recipe.model.path,
        "n_units": counts["n_train_units"],
        "n_records": counts["n_train_records"],
        "n_heldout_units": counts["n_heldout_units"],
        "n_heldout_records": counts["n_heldout_records"],
        "base_model": base and {"utility": base["utility"], "memorization": base["memorization"]},
        "settings": {"seeds": recipe.frontier.seeds, "epsilons": recipe.frontier.epsilons, "unit": recipe.data.unit},
        "failed": failed,
        "cannot_show": list(CANNOT_SHOW),
    }
    return {"points": points, "meta": meta}
