"""One of several processes that train together: runs all scenarios of `test_ranks`, and writes what it saw as JSON.

Started as torchrun starts a process, with RANK, WORLD_SIZE and so on in the environment. The scenarios that have a
counterpart with one process are called by the tests as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from faults.dp_runs import UNITS, make_plan, make_trainer, weights
from torch import Tensor
from transformers import TrainerCallback

from dpmed.errors import BudgetError
from dpmed.privacy import ranks
from dpmed.privacy.charged_run import ChargedRun
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.sampling import PoissonUnitSampler
from dpmed.trainers.dp_lora import DPLoRATrainer

SGD = {"optim": "sgd", "learning_rate": 1.0}
RANK = int(os.environ.get("RANK", "0"))
Seen = dict[str, Any]


@dataclass
class Watches(TrainerCallback):
    """What the optimiser was given at each step, and a digest of the weights after it."""

    stop_at: int | None = None
    gradients: list[Tensor] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.requires_grad]))

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> Any:
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
        self.digests.append(hashlib.sha256(flat.numpy().tobytes()).hexdigest())
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_at
        return control


def run(
    folder: Path, plan: PrivacyPlan, *, stop_at: int | None = None, resume: str | None = None, **changes: Any
) -> tuple[DPLoRATrainer, Seen]:
    """Train, and return what there is to compare."""
    watches = Watches(stop_at=stop_at)
    trainer = make_trainer(folder, plan, callbacks=[watches], **{**SGD, **changes})
    trainer.train(resume_from_checkpoint=resume)
    spent = trainer.privacy_spent()
    return trainer, {
        "weights": weights(trainer).tolist(),
        "sums": [(gradient * plan.divisor).tolist() for gradient in watches.gradients],
        "digests": watches.digests,
        "global_step": trainer.state.global_step,
        "n_steps": spent["n_steps"],
        "n_nonfinite_units": spent["n_nonfinite_units"],
    }


# --- Scenarios --------------------------------------------------------------------------------------------------------


def quiet(folder: Path) -> Seen:
    """No noise, every unit, some units clipped; micro-batches of different numbers on the ranks."""
    return run(folder, make_plan(noise_multiplier=0.0, clip_norm=0.3))[1]


def different_start(folder: Path) -> Seen:
    """As `quiet`, but rank 1 made other adapters."""
    plan = make_plan(noise_multiplier=0.0, clip_norm=0.3)
    trainer = make_trainer(folder, plan, callbacks=[watches := Watches()], **SGD)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and RANK > 0:
                parameter += 1.0
    trainer.train()
    return {"weights": weights(trainer).tolist(), "digests": watches.digests}


@contextmanager
def zero_sums() -> Iterator[None]:
    """All units' gradients are zero, so what reaches `.grad` is noise."""

    def zero(self: PrivacyPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows.shape[1]), torch.zeros((), dtype=torch.int64)

    with mock.patch.object(PrivacyPlan, "clipped_sum", zero):
        yield


def noise_alone(folder: Path, *, secure: bool) -> Seen:
    with zero_sums():
        return run(folder, make_plan(noise_multiplier=3.0, clip_norm=0.2, secure=secure), learning_rate=0.01)[1]


def noise_of_each(folder: Path) -> Seen:
    """The planted fault: every rank adds noise."""

    def faulty(clipped: Tensor, noise: GaussianNoise) -> Tensor:
        return ranks.sum_over_ranks_(noise.add_(clipped))

    with mock.patch.object(ranks, "noised_sum_", faulty):
        return noise_alone(folder, secure=False)


def starts_of_each(folder: Path) -> Seen:
    """The planted fault: every rank goes on with the adapters that it made."""
    with mock.patch.object(ranks, "from_first_rank_", lambda tensors: None):
        return different_start(folder)


def noisy(folder: Path) -> Seen:
    """A run as a user's, draws and noise and all."""
    seen = run(folder, make_plan(expected_batch_units=3), learning_rate=0.01)[1]
    return {"digests": seen["digests"], "n_steps": seen["n_steps"]}


def empty_share(folder: Path) -> Seen:
    """Patients of even number alone, all of whom rank 0 of two holds; then nobody; then everybody."""
    draw, calls = PoissonUnitSampler.draw, iter(("even", "nobody"))

    def chosen(self: PoissonUnitSampler) -> list[int]:
        rows, who = draw(self), next(calls, "everybody")
        return [row for row in rows if who == "everybody" or (who == "even" and UNITS[row] % 2 == 0)]

    with mock.patch.object(PoissonUnitSampler, "draw", chosen):
        return run(folder, make_plan(noise_multiplier=0.0, clip_norm=0.3))[1]


def tiny_rate(folder: Path) -> Seen:
    """One unit of six is expected: the ranks' shares are empty more often than not."""
    seen = run(folder, make_plan(expected_batch_units=1, n_steps=8), learning_rate=0.01)[1]
    return {"digests": seen["digests"], "n_steps": seen["n_steps"]}


def own_folders(folder: Path) -> Seen:
    """Each rank is told a folder and a ledger of its own: what it writes can then be told apart."""
    own = folder / f"rank{RANK}"
    run(own, make_plan(), save_strategy="steps", save_steps=2, ledger=str(own.parent / f"ledger{RANK}.sqlite"))
    return {}


def stopped(folder: Path) -> Seen:
    """Half of a run without noise, in a folder that all share, with a ledger."""
    return run(folder, half_plan(), stop_at=2, **saved(folder))[1]


def resumed(folder: Path) -> Seen:
    """The other half."""
    return run(folder, half_plan(), resume=str(folder / "checkpoint-2"), **saved(folder))[1]


def half_plan() -> PrivacyPlan:
    return make_plan(noise_multiplier=0.0, clip_norm=0.3, n_steps=4)


def saved(folder: Path) -> Seen:
    return {"save_strategy": "steps", "save_steps": 2, "ledger": str(folder.parent / f"{folder.name}.sqlite")}


def nonfinite(folder: Path) -> Seen:
    """Unit 1, which rank 1 holds, gives NaN in each of three steps."""
    clip = PrivacyPlan.clipped_sum

    def with_nan(self: PrivacyPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        return clip(self, torch.cat([rows, torch.full_like(rows[:1], torch.nan)]) if RANK == 1 else rows)

    with mock.patch.object(PrivacyPlan, "clipped_sum", with_nan):
        return run(folder, make_plan(), micro_batch_tokens=10_000)[1]


def budget_ends(folder: Path) -> Seen:
    """The ledger of rank 0 says no in the middle of the run: no process may wait for another for ever."""
    charge, calls = ChargedRun.charge, iter((True,))

    def refused(self: ChargedRun) -> bool:
        if RANK == 0 and not next(calls, False):
            raise BudgetError("no more")
        return charge(self)

    started = time.monotonic()
    with mock.patch.object(ChargedRun, "charge", refused):
        try:
            run(folder, make_plan(n_steps=50), logging_steps=1000)  # logging is a meeting of transformers' own
        except Exception as error:
            return {"error": type(error).__name__, "seconds": time.monotonic() - started}
    return {"error": None}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Seen] = {
        "quiet": quiet(folder / "quiet"),
        "different_start": different_start(folder / "different_start"),
        "noise_fast": noise_alone(folder / "noise_fast", secure=False),
        "noise_secure": noise_alone(folder / "noise_secure", secure=True),
        "noise_of_each": noise_of_each(folder / "noise_of_each"),
        "starts_of_each": starts_of_each(folder / "starts_of_each"),
        "noisy": noisy(folder / "noisy"),
        "empty_share": empty_share(folder / "empty_share"),
        "tiny_rate": tiny_rate(folder / "tiny_rate"),
        "own_folders": own_folders(folder / "own_folders"),
        "stopped": stopped(folder / "stopped"),
        "resumed": resumed(folder / "from_one"),
        "nonfinite": nonfinite(folder / "nonfinite"),
    }
    found["world"] = {"size": torch.distributed.get_world_size(), "units": len(set(UNITS))}
    write(folder, found)
    found["budget_ends"] = budget_ends(folder / "budget_ends")  # after it the processes do not hear of each other
    write(folder, found)
    os._exit(0)  # at once, so that the others see that this one is gone


def write(folder: Path, found: dict[str, Seen]) -> None:
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
