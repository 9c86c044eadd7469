"""Faults in a run as a whole: what it is said to cost, what is charged and when, and how it goes on."""

from __future__ import annotations

from mutants.mutant import Mutant

ACCOUNTING = "tests/privacy/test_accounting.py::"
CHARGED = "tests/privacy/test_charged_run.py::"
EPSILON = "tests/guarantees/test_epsilon_of_steps.py::"
HOLES = "tests/mutants/test_holes.py::"
LEDGER = "tests/privacy/test_ledger.py::"
PLAN = "tests/privacy/test_plan.py::"
PLANTED = "tests/faults/test_planted_faults.py::"
RESUMED = "tests/faults/test_resumed_runs.py::"
SPENDING = "tests/privacy/test_ledger_spending.py::"

COST = (
    Mutant(
        "delta of 1/N by default",
        "dpmed/privacy/plan.py",
        "delta=float(n_units) ** -1.1 if delta is None else delta,",
        "delta=0.999999 / n_units if delta is None else delta,",
        "such a delta lets a run publish a whole patient",
        (f"{PLAN}test_delta_by_default_is_n_units_to_the_minus_1_1",),
    ),
    Mutant(
        "delta of 1/N allowed",
        "dpmed/privacy/plan.py",
        "if not 0 < plan.delta < 1 / plan.n_units:",
        "if not 0 < plan.delta < 1:",
        "such a delta lets a run publish a whole patient",
        (
            f"{PLAN}test_the_constructor_checks_as_well",
            f"{PLAN}test_a_plan_that_no_run_may_have_is_refused_by_name",
        ),
    ),
    Mutant(
        "smaller of the two accountants",
        "dpmed/privacy/accounting.py",
        "EpsilonReport(max(pld, prv), pld, prv)",
        "EpsilonReport(min(pld, prv), pld, prv)",
        "one accountant's fault lowers the epsilon that is reported",
        (f"{ACCOUNTING}test_the_larger_of_the_two_accountants_is_reported",),
    ),
    Mutant(
        "training loss logged",
        "dpmed/trainers/dp_lora.py",
        "        return torch.zeros((), device=self.args.device)\n\n    def _clipped",
        "        return total.norm()\n\n    def _clipped",
        "the log is a function of the records that no noise covers",
        (f"{PLANTED}test_no_log_holds_training_loss_or_gradient_norms[right]",),
    ),
    Mutant(
        "private keys logged",
        "dpmed/trainers/dp_lora.py",
        'PRIVATE_LOGS = ("loss", "grad_norm", "train_loss")',
        "PRIVATE_LOGS = ()",
        "loss and gradient norm reach the logs",
        (f"{PLANTED}test_no_log_holds_training_loss_or_gradient_norms[right]",),
    ),
)

CHARGES = (
    Mutant(
        "accountant restarted on resume",
        "dpmed/privacy/charged_run.py",
        "self._ledger = charges, n_charged, 0, ledger",
        "self._ledger = charges, 0, 0, ledger",
        "the certificate leaves out the steps before the resumption",
        (f"{RESUMED}test_a_resumed_run_goes_on_counting_and_draws_fresh_noise",),
    ),
    Mutant(
        "step counted at its end",
        "dpmed/trainers/dp_lora.py",
        "        self._run.begin_step()\n",
        "",
        "an interrupted step is not charged although its noised gradient stands in memory",
        (f"{EPSILON}test_a_step_counts_when_it_begins_even_if_it_is_interrupted_half_way",),
        also=(("        if self._watched:\n", "        self._run.begin_step()\n        if self._watched:\n"),),
    ),
    Mutant(
        "ledger of another run accepted",
        "dpmed/privacy/charged_run.py",
        "if n_charged < n_seen:",
        "if False:",
        "a resumption with an empty ledger counts from zero",
        (f"{CHARGED}test_a_ledger_that_the_checkpoint_was_not_charged_to_is_refused",),
    ),
    Mutant(
        "lost steps forgotten on resume",
        "dpmed/privacy/charged_run.py",
        "            write_text(folder / STATE_FILE, state.to_json())\n",
        "            write_text(folder / STATE_FILE, state.to_json())\n            n_charged = n_seen\n",
        "steps whose weights touched the disk are left out where a crash took the checkpoint",
        (f"{RESUMED}test_a_checkpoint_that_is_resumed_twice_is_charged_twice",),
    ),
    Mutant(
        "charge after save",
        "dpmed/trainers/dp_lora.py",
        "        self.charge()\n        super().save_model(output_dir, _internal_call)\n",
        "        super().save_model(output_dir, _internal_call)\n        self.charge()\n",
        "a kill in between leaves weights on the disk that nobody was charged for",
        (f"{HOLES}test_steps_are_charged_before_weights_reach_a_checkpoint",),
        also=(
            (
                "        self.charge()\n        if self.args.should_save and self._run is not None:",
                "        if self.args.should_save and self._run is not None:",
            ),
        ),
    ),
    Mutant(
        "held-out figures before the charge",
        "dpmed/trainers/dp_lora.py",
        "        self.charge()\n        return super().evaluate(",
        "        return super().evaluate(",
        "figures of weights leave that nobody was charged for",
        (f"{HOLES}test_whatever_leaves_the_trainer_in_the_middle_of_a_run_is_charged_first[evaluate]",),
    ),
    Mutant(
        "adapter saved before the charge",
        "dpmed/trainers/dp_lora.py",
        "        self.charge()\n        target = super().save_weights(folder)\n",
        "        target = super().save_weights(folder)\n        self.charge()\n",
        "a kill in between leaves weights on the disk that nobody was charged for",
        (f"{HOLES}test_whatever_leaves_the_trainer_in_the_middle_of_a_run_is_charged_first[save_weights]",),
    ),
    Mutant(
        "charge not committed",
        "dpmed/privacy/ledger_store.py",
        'connection.execute("COMMIT")  # closing without it undoes all',
        "pass",
        "the charge is gone when the process is",
        (f"{LEDGER}test_charges_are_read_from_the_disk_over_all_starts",),
    ),
    Mutant(
        "charge without fsync",
        "dpmed/privacy/ledger_store.py",
        '"synchronous = EXTRA"',
        '"synchronous = OFF"',
        "a power cut takes the charge and leaves the weights",
        (f"{LEDGER}test_every_connection_writes_through_to_the_disk",),
    ),
    Mutant(
        "budget check skipped",
        "dpmed/privacy/ledger_spending.py",
        "        if n_steps == 0:\n            return\n",
        "        return\n",
        "runs spend more than their patients' budget",
        (
            f"{SPENDING}test_the_recipes_budget_stops_a_run_before_it_starts",
            f"{SPENDING}test_a_data_sets_budget_holds_for_charges_elsewhere",
        ),
    ),
    Mutant(
        "budget checked before the lock only",
        "dpmed/privacy/ledger.py",
        "            self._gate.check(spending, _known(spending.runs, run_id), n_steps, own=own)\n",
        "",
        "two processes that look at the same time overspend a budget together",
        (f"{SPENDING}test_what_others_charge_between_the_first_look_and_the_entry_counts[charge]",),
    ),
    Mutant(
        "overlap of data sets ignored",
        "dpmed/privacy/ledger_spending.py",
        "for cell in {cell.intersection(charged) for cell in cells} if cell]",
        "for cell in {frozenset({name}) for cell in cells for name in cell if name in charged}]",
        "a patient in two data sets is charged for the larger one alone",
        (f"{SPENDING}test_shared_units_carry_their_charges_over",),
    ),
    Mutant(
        "more steps than planned",
        "dpmed/trainers/dp_lora.py",
        "self.args.max_steps = n_seen + run.n_left",
        "self.args.max_steps = self.plan.n_steps",
        "steps lost in a crash are run again on top of the plan",
        (f"{EPSILON}test_epsilon_counts_the_steps_that_a_crash_lost",),
        also=(("        self._run.begin_step()\n", "        self._run._n_begun += 1\n"),),
    ),
    Mutant(
        "another plan may resume",
        "dpmed/trainers/dp_lora.py",
        "(different := state.differences(before))",
        "(different := [])",
        "the certificate states one mechanism for steps of two",
        (f"{RESUMED}test_another_plan_cannot_resume[clip_norm]",),
    ),
    Mutant(
        "other records may resume",
        "dpmed/privacy/run_state.py",
        'for name in ("data", "units", "model") if',
        'for name in ("units", "model") if',
        "one run's budget is spent on two data sets",
        (f"{RESUMED}test_other_records_or_units_cannot_resume[other_text-data]",),
    ),
    Mutant(
        "another model may resume",
        "dpmed/privacy/run_state.py",
        'for name in ("data", "units", "model") if',
        'for name in ("data", "units") if',
        "the weights that were charged for are put on a model that may know the records",
        (f"{RESUMED}test_another_base_model_cannot_resume",),
    ),
    Mutant(
        "steps before the first checkpoint forgotten",
        "dpmed/pipeline.py",
        "args.run_id = _stopped_run(output_dir, plan)",
        "args.run_id = None",
        "weights of a run that was killed in its first checkpoint are on the disk and in no certificate",
        (f"{HOLES}test_a_run_that_was_killed_in_its_first_checkpoint_still_counts_those_steps",),
    ),
    Mutant(
        "interrupted checkpoint taken for whole",
        "dpmed/runs.py",
        "if (p / WHOLE).is_file()]",
        "if p.is_dir()]",
        "a run goes on from weights that are half of one step and half of another",
        ("tests/test_runs.py::test_half_written_checkpoints_do_not_count",),
    ),
    Mutant(
        "checkpoint marked as whole first",
        "dpmed/trainers/base.py",
        "        self.args.save_total_limit = None\n        try:\n",
        "        self.args.save_total_limit = None\n        try:\n"
        "            folder.mkdir(parents=True, exist_ok=True)\n            mark_whole(folder)\n",
        "a run goes on from weights that are half of one step and half of another",
        (f"{HOLES}test_a_checkpoint_is_marked_as_whole_last_and_older_ones_stay_until_then",),
    ),
    Mutant(
        "older checkpoint dropped too early",
        "dpmed/trainers/base.py",
        "        self.args.save_total_limit = None\n",
        "",
        "a kill leaves no checkpoint: charged steps are lost",
        (f"{HOLES}test_a_checkpoint_is_marked_as_whole_last_and_older_ones_stay_until_then",),
    ),
    Mutant(
        "uncharged weights kept after an error",
        "dpmed/trainers/dp_lora.py",
        "            self._take_back(run, engine)\n",
        "            run.take_back()\n",
        "weights of steps that nobody was charged for stay in memory, to be saved by whoever catches the error",
        (f"{RESUMED}test_an_exception_leaves_no_uncharged_step_in_memory",),
    ),
    Mutant(
        "callbacks see uncharged weights",
        "dpmed/trainers/dp_lora.py",
        "        if self._watched:\n            self.charge()\n",
        "",
        "a user's callback may keep weights before they are charged",
        (f"{RESUMED}test_a_callback_of_the_user_is_charged_for_before_it_looks",),
    ),
)

FAULTS_OF_RUNS: tuple[Mutant, ...] = (*COST, *CHARGES)
