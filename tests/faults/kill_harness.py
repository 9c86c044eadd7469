"""Kills tiny DP runs at random moments, resumes them until they finish, and checks what the ledger knew at each moment.

One process imports everything once and forks a child per start of a run. The child writes down each draw, each noise
and each write of weights before it happens; the parent kills it in steps and in saves, and compares those facts with
the ledger on the disk.

Run as `python -m faults.kill_harness RESULT.json KILLS` with the tests' folder as working directory.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import select
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faults.dp_runs import make_plan, make_trainer
from peft import peft_model
from safetensors.torch import load_file
from torch import Tensor

from dpmed.privacy import accounting, sampling
from dpmed.privacy.charged_run import OWN_CHARGES
from dpmed.privacy.ledger import PrivacyLedger
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.run_state import STATE_FILE, RunState
from dpmed.runs import last_checkpoint, read_json
from dpmed.trainers.dp_lora import CERTIFICATE, DPLoRATrainer

Fault = Literal["charge after save", "fixed seed", "run forgotten"]
Place = Literal["start", "step", "save", "write", "weights"]
N_STEPS, SAVE_STEPS = 12, 2
MAX_KILLS = 9
"""Of one run; then it is left to finish."""
SILENT_SECONDS = 120.0
"""After that long without a word a child counts as hung."""
FAST_DISK = Path("/dev/shm")
"""A kill takes nothing from a file system that it would not take from a disk, so the waiting for a disk is left out."""


@dataclass
class Run:
    """One DP run over all its starts, and what was seen of it."""

    folder: Path
    ledger: Path | None
    """None: the recipe's "none", the run keeps its own charges in its folder."""
    fault: Fault | None = None
    starts: int = 0
    kills: Counter[Place] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def facts(self) -> Path:
        return self.folder.with_suffix(".facts")

    @property
    def charges(self) -> Path:
        return self.ledger or self.folder / OWN_CHARGES

    @property
    def plan(self) -> PrivacyPlan:
        return make_plan(n_steps=N_STEPS, expected_batch_units=3, noise_seed=3 if self.fault == "fixed seed" else None)


# --- The child: one start of a run ------------------------------------------------------------------------------------


class Facts:
    """What a start does, on the disk before it does it: each line survives a kill right after it."""

    def __init__(self, run: Run, die_after: int) -> None:
        self.run, self.n_noises, self.n_writes, self.die_after = run, 0, 0, die_after
        self._file = os.open(run.facts, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, kind: str, **values: Any) -> None:
        line = json.dumps({"start": self.run.starts, "kind": kind, **values}) + "\n"
        os.write(self._file, line.encode())
        os.fsync(self._file)

    def spy(self) -> None:
        """Write down raw draws, noise, and writes of weights and of the optimizer's moments."""
        make_uniforms, add = sampling._fast_uniforms, GaussianNoise.add_

        def fast_uniforms(seed: int | None, rank: int) -> Callable[[int], np.ndarray]:
            uniforms = make_uniforms(seed, rank)
            return lambda n: self._draw(uniforms(n))

        def add_(noise: Any, flat: Tensor) -> Tensor:
            numbers = add(noise, torch.zeros_like(flat))  # alone, since a sum with other data would hide a repetition
            self.n_noises += 1
            self.tell("noise", hash=hashlib.sha256(numbers.numpy().tobytes()).hexdigest())
            return flat.add_(numbers)

        sampling._fast_uniforms = fast_uniforms
        GaussianNoise.add_ = add_  # pyright: ignore[reportAttributeAccessIssue]
        for module, name in ((peft_model, "safe_save_file"), (torch, "save")):
            setattr(module, name, self._told_write(getattr(module, name)))

    def _draw(self, numbers: np.ndarray) -> np.ndarray:
        self.tell("draw", hash=hashlib.sha256(numbers.tobytes()).hexdigest())
        return numbers

    def _told_write(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            # each noise of this start is a step that the weights contain beyond the checkpoint that it went on from
            self.tell("write", steps=self.n_noises, charged=charged_steps(self.run))
            result = write(*args, **kwargs)
            self.n_writes += 1
            if self.n_writes == self.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return told


def watched_trainer(say: Callable[[bytes], Any], fault: Fault | None) -> type[DPLoRATrainer]:
    """A trainer that says when steps and saves begin, and may have a fault."""

    class Watched(DPLoRATrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            say(b"t")
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            say(b"s")
            if fault == "charge after save":
                self.charge = lambda: None
            super()._save_checkpoint(model, trial)
            if fault == "charge after save":
                del self.charge
                self.charge()
            say(b"e")

    return Watched


def start_run(run: Run, say: Callable[[bytes], Any], die_after: int = 0) -> None:
    """Train from where the run stands, as `dpmed train --resume` does, to its end; or die after so many writes."""
    Facts(run, die_after).spy()
    checkpoint, run_id = last_checkpoint(run.folder), None
    if checkpoint is None and (run.folder / STATE_FILE).is_file() and run.fault != "run forgotten":
        run_id = RunState.read(run.folder).run_id
    trainer = make_trainer(
        run.folder,
        run.plan,
        trainer=watched_trainer(say, run.fault),
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        ledger="none" if run.ledger is None else str(run.ledger),
        run_id=run_id,
    )
    trainer.train(resume_from_checkpoint=True if checkpoint else None)
    say(b"w")
    trainer.save_weights(run.folder / "adapter")


# --- The parent: kills ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """When to kill: `delay` seconds after the start, its first step, its n-th save, or the saving of the result.

    "write" is exact: the child kills itself between its n-th write of weights or moments and whatever comes next.
    """

    place: Place
    delay: float = 0.0
    nth: int = 1

    def met(self, events: str) -> bool:
        sign = {"start": "", "step": "t", "save": "s", "write": "never", "weights": "w"}[self.place]
        return not sign or events.count(sign) >= self.nth


def place_of(events: str) -> Place:
    """Where a start was when it ended, by what it had said."""
    if "w" in events:
        return "weights"
    if "s" in events and events.rindex("s") > events.rfind("e"):
        return "save"
    return "step" if "t" in events else "start"


def attempt(run: Run, aim: Aim | None) -> dict[str, float]:
    """One start of a run, killed as aimed; returns when it said what, in seconds since its start."""
    run.starts += 1
    ears, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ears)
        os._exit(_in_child(run, mouth, aim.nth if aim is not None and aim.place == "write" else 0))
    os.close(mouth)
    try:
        events, times = _listen(child, ears, aim)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
        os.close(ears)
    code = os.waitstatus_to_exitcode(status)
    run.finished = code == 0
    if code == -signal.SIGKILL:
        run.kills[place_of(events)] += 1
    elif code != 0:
        run.problems.append(f"start {run.starts} failed: {run.folder.with_suffix('.error').read_text()[-1500:]}")
    return times


def _in_child(run: Run, mouth: int, die_after: int) -> int:
    try:
        start_run(run, lambda word: os.write(mouth, word), die_after)
        return 0
    except BaseException:
        run.folder.with_suffix(".error").write_text(traceback.format_exc())
        return 1


def _listen(child: int, ears: int, aim: Aim | None) -> tuple[str, dict[str, float]]:
    """Follow a child until it ends, and kill it when the time has come."""
    begun = time.monotonic()
    events, times, kill_at = "", {}, None
    while True:
        if kill_at is None and aim is not None and aim.met(events):
            kill_at = time.monotonic() + aim.delay
        left = SILENT_SECONDS if kill_at is None else max(0.0, kill_at - time.monotonic())
        if select.select([ears], [], [], left)[0]:
            words = os.read(ears, 4096).decode()
            if not words:
                return events, times
            events += words
            for word in words:
                times.setdefault(word, time.monotonic() - begun)
            times["last"] = time.monotonic() - begun
        elif kill_at is None:
            raise TimeoutError(f"a child said nothing for {SILENT_SECONDS} seconds after {events!r}")
        if kill_at is not None and time.monotonic() >= kill_at:
            os.kill(child, signal.SIGKILL)
            while words := os.read(ears, 4096).decode():  # what it said before it died
                events += words
            return events, times


# --- The parent: checks -----------------------------------------------------------------------------------------------


def charged_steps(run: Run) -> int:
    """Steps charged to the run, read from the disk by other means than the package's; 0 where nothing is there yet."""
    if not run.charges.is_file() or not (run.folder / STATE_FILE).is_file():
        return 0
    run_id = RunState.read(run.folder).run_id
    with closing(sqlite3.connect(run.charges)) as connection:
        query = "SELECT coalesce(sum(n_steps), 0) FROM entries WHERE kind = 'charge' AND run = ?"
        return connection.execute(query, (run_id,)).fetchone()[0]


def facts_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.facts.read_text().splitlines()] if run.facts.is_file() else []


def released(run: Run) -> list[tuple[int, int]]:
    """The truth at each write: steps of all lineages whose weights touched the disk, each once; and those charged."""
    most, found = Counter[int](), []
    for fact in facts_of(run):
        if fact["kind"] == "write":
            most[fact["start"]] = max(most[fact["start"]], fact["steps"])
            found.append((most.total(), fact["charged"]))
    return found


def released_steps(run: Run) -> int:
    return released(run)[-1][0] if released(run) else 0


def check_moment(run: Run) -> None:
    """Right after a kill: all that is on the disk has been charged, the ledger is whole, the checkpoint too."""
    if (charged := charged_steps(run)) < (truth := released_steps(run)):
        run.problems.append(f"charges: after kill {run.kills.total()} {charged} steps for {truth} on the disk")
    if run.charges.is_file():
        run.problems += [f"ledger: {line}" for line in PrivacyLedger(run.charges, create=False).verify()]
    if (checkpoint := last_checkpoint(run.folder)) is not None:
        try:
            load_file(checkpoint / "adapter_model.safetensors")
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            RunState.read(checkpoint)
        except Exception as error:
            run.problems.append(f"checkpoint: {checkpoint.name} is called whole and cannot be read: {error}")


def check_certificate(run: Run) -> dict[str, Any]:
    """The certificate is that of at least the truth, and of no more than the plan."""
    found, plan, truth = read_json(run.folder / "adapter" / CERTIFICATE), run.plan, released_steps(run)
    if not truth <= found["n_steps"] <= plan.n_steps:
        run.problems.append(f"certificate: {found['n_steps']} steps, {truth} released, {plan.n_steps} planned")
    if (epsilon := found["epsilon"]) != plan.spent(found["n_steps"])["epsilon"]:
        run.problems.append(f"certificate: epsilon {epsilon} is not the plan's for {found['n_steps']} steps")
    if plan.private and epsilon < epsilon_of(plan, truth):
        run.problems.append(f"certificate: epsilon {epsilon} is below that of {truth} steps")
    if found["n_steps"] != charged_steps(run):
        run.problems.append(f"certificate: {found['n_steps']} steps, {charged_steps(run)} charged")
    return found


def epsilon_of(plan: PrivacyPlan, n_steps: int) -> float:
    run = {"noise_multiplier": plan.noise_multiplier, "sampling_rate": plan.sampling_rate, "n_steps": n_steps}
    return accounting.epsilon(**run, delta=plan.delta).epsilon


def repeated(facts: list[dict[str, Any]]) -> dict[str, int]:
    """How many draws and noises were seen before."""
    kinds = {kind: [fact["hash"] for fact in facts if fact["kind"] == kind] for kind in ("draw", "noise")}
    return {kind: len(hashes) - len(set(hashes)) for kind, hashes in kinds.items()}


# --- Whole runs -------------------------------------------------------------------------------------------------------


def random_aim(rng: random.Random, times: dict[str, float], run: Run) -> Aim | None:
    """Somewhere in a start, steps and saves alike; None leaves the run to finish.

    A run whose first checkpoint was killed too often would have no step left, which is refused as it should be.
    """
    if run.kills.total() >= MAX_KILLS or (last_checkpoint(run.folder) is None and charged_steps(run) > N_STEPS // 2):
        return None
    training, save = times["w"] - times["t"], times["e"] - times["s"]
    step = max(0.002, training / N_STEPS - save / SAVE_STEPS)
    return rng.choices(
        [
            Aim("start", rng.uniform(0, times["t"])),
            Aim("step", rng.uniform(0, training)),
            Aim("step", rng.uniform(0, step), rng.randint(1, N_STEPS)),
            Aim("save", rng.uniform(0, save), rng.randint(1, 3)),
            Aim("write", nth=rng.randint(1, 15)),
            Aim("weights", rng.uniform(0, save)),
        ],
        weights=[2, 4, 6, 3, 3, 2],
    )[0]


def kill_until_finished(run: Run, next_aim: Callable[[], Aim | None]) -> dict[str, Any]:
    """Start, kill and resume a run until it finishes or a start fails; returns what was found."""
    begun = time.monotonic()
    while not run.finished and not any("failed" in problem for problem in run.problems):
        attempt(run, next_aim())
        check_moment(run)
    late = [f"charges: {n} steps when {truth} were about to be written" for truth, n in released(run) if n < truth]
    run.problems += late
    certificate = check_certificate(run) if run.finished else {}
    return {
        **{name: getattr(run, name) for name in ("starts", "kills", "problems", "finished")},
        "ledger": "own file" if run.ledger else "none",
        "released_steps": released_steps(run),
        "charged_steps": charged_steps(run),
        "lost_steps": certificate.get("n_steps_lost"),
        "epsilon": certificate.get("epsilon"),
        "repeated": repeated(facts_of(run)),
        "seconds": round(time.monotonic() - begun, 2),
    }


def planted(folder: Path, fault: Fault) -> dict[str, Any]:
    """A faulty run, killed between the first write of its weights and whatever follows; then it is let finish."""
    run = Run(folder / fault.replace(" ", "-"), None, fault)
    return kill_until_finished(run, lambda: None if run.starts else Aim("write", nth=1))


def kills_of(runs: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(run["kills"]) for run in runs), Counter())


def enough(kills: Counter[str], n_kills: int) -> bool:
    """So many in all, and a fifth of them in steps and in saves at least."""
    return kills.total() >= n_kills and min(kills["step"], kills["save"]) >= n_kills // 5


def main(result: Path, n_kills: int) -> None:
    """Kill at least `n_kills` times in as many runs as it takes, then plant the faults that the checks must see."""
    torch.set_num_threads(1)
    begun, rng = time.monotonic(), random.Random()
    runs, facts = [], []
    place = FAST_DISK if os.access(FAST_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dpmed-kills-", dir=place) as name:
        folder = Path(name)
        warm_up(folder)
        whole = Run(folder / "whole", None)
        times = attempt(whole, None)  # unkilled: how long things take
        if not whole.finished:
            raise RuntimeError(f"a run that nobody killed failed: {whole.problems}")
        while not enough(kills_of(runs), n_kills):
            number = len(runs)
            run = Run(folder / f"run-{number}", folder / f"ledger-{number}.sqlite" if number % 2 else None)
            runs.append(kill_until_finished(run, lambda run=run: random_aim(rng, times, run)))
            facts += facts_of(run)
        timing = {"seconds": round(time.monotonic() - begun, 1), "seconds_of_a_whole_run": round(times["last"], 2)}
        faults: tuple[Fault, ...] = ("charge after save", "fixed seed", "run forgotten")
        found = {
            "runs": runs,
            "repeated": repeated(facts),
            "statistics": statistics(runs, facts) | timing,
            "planted": {fault: planted(folder, fault) for fault in faults},
        }
    result.write_text(json.dumps(found, indent=1))


def warm_up(folder: Path) -> None:
    """What every child would do anew: imports of the libraries and the plan's cost. No training, so no threads."""
    make_trainer(folder / "warm-up", Run(folder, None).plan)
    Run(folder, None).plan.spent(N_STEPS)
    gc.collect()
    gc.freeze()


def statistics(runs: list[dict[str, Any]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the closing note reports."""
    kills = kills_of(runs)
    return {
        "runs": len(runs),
        "starts": sum(run["starts"] for run in runs),
        "kills": {"total": kills.total(), **kills},
        "steps_released": sum(run["released_steps"] for run in runs),
        "steps_charged": sum(run["charged_steps"] for run in runs),
        "steps_lost": sum(run["lost_steps"] or 0 for run in runs),
        **{f"{kind}s": n for kind, n in Counter(fact["kind"] for fact in facts).items()},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
