"""The steps of one DP run: begun, charged before anything of them is kept, and never more than planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpmed.errors import BudgetError, PrivacyError
from dpmed.privacy import ranks
from dpmed.privacy.ledger import PrivacyLedger, RunCharges, ledger_path
from dpmed.privacy.run_state import STATE_FILE, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

OWN_CHARGES = "charges.sqlite"
"""In the run folder where there is no ledger: what this run alone was charged, so that a crash cannot lose it."""


class ChargedRun:
    """One start of a run, with its ledger.

    Steps are counted when they begin, so that one that was interrupted half-way counts. Rank 0 alone writes.

    Guarantees:
        - `begin_step` refuses a step beyond the plan, over all starts of the run.
        - When `charge` returns, every step begun is on the disk.

    Args:
        state: which run this is.
        charges: rank 0's hold on the ledger; None on the other ranks.
        n_charged: steps charged to the run before this start.
        ledger: where the ledger is; None if the run keeps to itself.
    """

    def __init__(self, state: RunState, charges: RunCharges | None, *, n_charged: int, ledger: Path | None) -> None:
        self.state = state
        self.n_left = max(0, state.plan.n_steps - n_charged)
        self._charges, self._n_charged, self._n_begun, self._ledger = charges, n_charged, 0, ledger

    @classmethod
    def open(
        cls,
        state: RunState,
        *,
        folder: Path,
        started_in: Path,
        units: Sequence[str],
        n_seen: int,
        ledger: str | None,
        budget_epsilon: float | None,
        rank: int,
        device: torch.device,
    ) -> ChargedRun:
        """Open the ledger and learn what the run may still spend; writes the state into `folder`.

        Args:
            folder: the run folder.
            started_in: where the run's own charges are if it keeps no ledger: the folder of the checkpoint it goes on
                from, so that two resumptions of one checkpoint both count.
            units: names of the units; the ledger keeps salted hashes.
            n_seen: steps that the weights at hand have seen.
            ledger: as `privacy.ledger` of a recipe.
            budget_epsilon: what all runs on these units may spend, at the plan's delta.
            rank, device: of this process.

        Raises: BudgetError if a budget does not allow the run; PrivacyError if the ledger is not the run's.
        """
        path, charges, n_charged = ledger_path(ledger), None, 0
        if rank == 0:
            from dpmed.runs import write_text

            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            book = PrivacyLedger(path or started_in / OWN_CHARGES)
            charges = book.open_run(units, state.plan, run_id=state.run_id, budget_epsilon=budget_epsilon)
            n_charged = charges.n_charged
            if n_charged < n_seen:
                raise PrivacyError(
                    f"the checkpoint has {n_seen} steps and the ledger {n_charged} of this run: it is not the ledger"
                    " that the run was charged to; put that one back, or start anew"
                )
            write_text(folder / STATE_FILE, state.to_json())
        n_charged = ranks.number_from_first_rank(n_charged, device)
        return cls(state, charges, n_charged=n_charged, ledger=path)

    @property
    def n_steps(self) -> int:
        """Steps begun over all starts of the run, those lost in a crash included."""
        return self._n_charged + self._n_begun

    def begin_step(self) -> None:
        """Count a step. Raises: PrivacyError if the plan has none left."""
        if self.n_left < 1:
            raise PrivacyError("all steps of the plan were run; a further one would exceed epsilon")
        self.n_left -= 1
        self._n_begun += 1

    def take_back(self) -> None:
        """Forget the steps begun and not charged: nothing of them was kept."""
        self.n_left, self._n_begun = self.n_left + self._n_begun, 0

    def charge(self) -> bool:
        """Charge the steps begun and not charged yet; they are on the disk when this returns. False if none were.

        Raises: BudgetError, with nothing charged, if a budget would be exceeded.
        """
        n = self._n_begun
        if n and self._charges is not None:
            self._charges.charge(n)
        self._n_charged, self._n_begun = self._n_charged + n, 0
        return n > 0

    def nothing_left(self) -> BudgetError:
        """The error of a run whose steps are all charged while none of its checkpoints is whole."""
        return BudgetError(
            f"all {self.state.plan.n_steps} steps of run {self.state.run_id} are charged and none of its checkpoints is"
            " whole: start a new run, with checkpoints more often (training.save_every)"
        )

    def certificate(self) -> dict[str, Any]:
        """The plan's certificate for the steps charged, which run it is, and what the ledger holds of its units."""
        found = {**self.state.plan.spent(self.n_steps), "run_id": self.state.run_id, "ledger": None}
        if self._ledger is None:
            found["not_covered"] = [*found["not_covered"], "other runs on the same units: no ledger was kept"]
        elif self._charges is not None:
            delta = self.state.plan.delta
            spent = PrivacyLedger(self._ledger, create=False).spent(self._charges.dataset, delta=delta).epsilon
            known = spent if spent < float("inf") else None
            found["ledger"] = {"dataset": self._charges.dataset, "epsilon_of_all_runs": known, "delta": delta}
        return found
