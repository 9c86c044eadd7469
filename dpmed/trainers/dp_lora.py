"""DP-LoRA: LoRA by DP-SGD with the patient as the unit of privacy.

One Hugging Face step is one logical DP step, so `global_step`, schedule, checkpoints and accountant count the same
thing:

1. draw patients, each independently with the plan's sampling rate; draw at most `max_records_per_unit` of their
windows;
2. cut the draw into groups of whole patients, and each group into padded micro-batches by length;
3. per group: one backward pass per micro-batch, gradients by patient, clipped to `clip_norm`, summed;
4. with several processes: each draws and clips its own patients; one sum over all;
5. add N(0, (noise_multiplier * clip_norm)^2) once, also to an empty draw;
6. divide by the fixed, public expected number of patients and hand that to the optimiser as the gradient.

Steps are charged to the ledger before any weight from them can leave the trainer: before a checkpoint, an evaluation,
a save, the end of training, and each step where a callback of the user's looks on.

Reference: Abadi et al. 2016 (arXiv 1607.00133); patient-level clipping as in McMahan et al. 2018 (arXiv 1710.06963).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from dpmed.data.tasks import EncodedRecords, Example, TaskSpec
from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import ranks
from dpmed.privacy.charged_run import ChargedRun
from dpmed.privacy.clipping import Clipping
from dpmed.privacy.plan import EngineName, PrivacyPlan
from dpmed.privacy.proof import prove
from dpmed.privacy.run_state import STATE_FILE, RunState
from dpmed.privacy.sampling import cut_groups
from dpmed.runs import WHOLE, last_checkpoint, write_json, write_text
from dpmed.trainers.base import TrainingConfig
from dpmed.trainers.dp_settings import refuse_unsafe
from dpmed.trainers.lora import LoRATrainer, with_adapters
from dpmed.trainers.sharding import shard_frozen_base
from dpmed.trainers.trial import public_examples, trial_losses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpmed.privacy.proof import Engine

CERTIFICATE = "privacy.json"
PRIVATE_LOGS = ("loss", "grad_norm", "train_loss")
"""Log keys that are functions of the private records; they are dropped, since no noise covers them."""
_OWN_CALLBACKS = ("dpmed.", "transformers.")


@dataclass
class DPLoRATrainingConfig(TrainingConfig):
    """Configuration of `DPLoRATrainer`; `unit_column` names the patient and is required."""

    target_epsilon: float = field(default=8.0, metadata={"help": "epsilon after all steps"})
    delta: float | None = field(default=None, metadata={"help": "None means n_units ** -1.1"})
    clip_norm: float = field(default=1.0, metadata={"help": "L2 norm to which a patient's gradient is clipped"})
    clipping: Clipping = field(default="norm", metadata={"help": "norm, or automatic: every gradient to clip_norm"})
    expected_batch_units: int = field(default=64, metadata={"help": "expected patients per step; the public divisor"})
    max_records_per_unit: int = field(default=4, metadata={"help": "windows of one patient per step, at most"})
    micro_batch_tokens: int = field(default=4096, metadata={"help": "padded tokens per micro-batch"})
    buffer_mib: int = field(default=512, metadata={"help": "memory for the gradients that are clipped at once"})
    engine: EngineName = field(default="one_pass", metadata={"help": "one_pass, or opacus: the slower reference"})
    secure: bool = field(default=False, metadata={"help": "cryptographic draws and noise, float-safe noise"})
    shard_base: bool = field(default=False, metadata={"help": "several processes share the frozen base (FSDP2)"})
    ledger: str | None = field(default=None, metadata={"help": "a file; None: the user's or DPMED_LEDGER; none: none"})
    budget_epsilon: float | None = field(default=None, metadata={"help": "what all runs on these patients may spend"})
    run_id: str | None = field(default=None, metadata={"help": "of the run that goes on without a checkpoint"})
    noise_seed: int | None = field(default=None, metadata={"help": "tests only: fixes noise and draws; not private"})


class LogicalBatch(list[list[list[Example]]]):
    """One Poisson draw: groups of patients, each of micro-batches of examples; empty where nobody was drawn."""


class DPLoRATrainer(LoRATrainer):
    """LoRA with a patient-level (epsilon, delta) guarantee under adding or removing one patient.

    Args:
        plan: the guarantee, calibrated beforehand; None calibrates it from `args` and the number of patients.
        The others: see `LoRATrainer`.

    Raises: InputError if the unit column is missing or the budget impossible; PrivacyError if a trainable weight would
        not be covered.
    """

    args: DPLoRATrainingConfig
    several_devices = True

    def __init__(
        self,
        model: nn.Module,
        args: DPLoRATrainingConfig,
        train_dataset: Dataset | EncodedRecords,
        eval_dataset: Dataset | EncodedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: LoraConfig | None = None,
        spec: TaskSpec | None = None,
        plan: PrivacyPlan | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        refuse_unsafe(args)
        if args.shard_base:
            model = with_adapters(model, peft_config)
            shard_frozen_base(model, args.device)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config=peft_config,
            spec=spec,
            callbacks=callbacks,
        )
        self.plan = plan or plan_for(args, n_units=len(self.train_dataset.unit_names), unit=args.unit_column or "")
        if self.plan.n_units != len(self.train_dataset.unit_names):
            raise PrivacyError(
                f"the plan is for {self.plan.n_units} patients, the records have {len(self.train_dataset.unit_names)};"
                " make the plan from these records"
            )
        args.max_steps = self.plan.n_steps
        args.max_grad_norm = 0.0  # clipping is per patient, inside the step
        args.ignore_data_skip = True  # a resumed run draws anew, it never replays
        # No DistributedDataParallel: it would wait for gradients that the engine withholds. The sum over ranks is ours.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.n_nonfinite = 0
        self._engine: Engine | None = None
        self._noise = self.plan.noise()
        self._snapshot: list[Tensor] | None = None
        self._last_rate = 0.0
        self._moved = False
        self._run: ChargedRun | None = None
        self._charged_weights: list[Tensor] | None = None  # as of the last charge
        self._watched = False

    # --- A run: start, charge, end --------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train for the plan's steps. See `transformers.Trainer.train`; the returned loss is not computed (private).

        A resumed run goes on with weights, optimiser and schedule; draws and noise are fresh. Steps that were charged
        and lost in a crash are taken off the remaining ones, so that a run never spends more than its plan.

        Raises: PrivacyError for a checkpoint of another run, or a second run without one (it would not be charged);
            BudgetError if the units' budget does not allow the run, or none of its steps is left.
        """
        if not resume_from_checkpoint and self.state.global_step > 0:
            raise PrivacyError(
                "this trainer has run already: its steps are charged once, a second run on the same weights would not"
                " be; make a new plan for more steps, or resume from a checkpoint"
            )
        checkpoint = self._checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        n_seen = 0 if checkpoint is None else _step_of(checkpoint)
        run = self._run = self._open(checkpoint, n_seen=n_seen)
        if run.n_left == 0:
            return self._as_saved(run, checkpoint)
        self.args.max_steps = n_seen + run.n_left
        self._watched = not all(type(c).__module__.startswith(_OWN_CALLBACKS) for c in self.callback_handler.callbacks)
        engine = self._engine = self._attach()
        ranks.from_first_rank_(engine.parameters)  # freshly made adapters must be the same everywhere
        self._charged_weights = engine.snapshot()
        try:
            try:
                output = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
                self._prove_movement(engine)
            except KeyboardInterrupt:
                self._stop_here()
                raise
            self.charge()  # inside: what a budget refuses at the very end must not stay in memory either
            return output
        except BaseException:
            self._take_back(run, engine)
            raise
        finally:
            engine.detach()
            self._engine = self._charged_weights = None

    def charge(self) -> None:
        """Charge all steps begun so far and not charged yet; they are on the disk when this returns.

        The trainer calls it before weights can leave it. Code that takes them elsewhere must call it first.

        Raises: BudgetError, with nothing charged, if a budget would be exceeded.
        """
        if self._run is not None and self._run.charge() and self._engine is not None:
            self._charged_weights = self._engine.snapshot()

    def privacy_spent(self) -> dict[str, Any]:
        """The certificate of the steps run so far: epsilon, delta, unit, n_units, noise_multiplier, n_steps, ...

        `n_steps` counts steps of this run that were lost in a crash as well: they were charged.
        """
        found = self.plan.spent(0) if self._run is None else self._run.certificate()
        lost = max(0, found["n_steps"] - self.state.global_step)  # fewer after an exception took steps back
        return {**found, "n_steps_lost": lost, "n_nonfinite_units": self.n_nonfinite}

    def _open(self, checkpoint: Path | None, *, n_seen: int) -> ChargedRun:
        """Establish which run this is and what it may still spend."""
        before = None if checkpoint is None else RunState.read(checkpoint)
        records = self.train_dataset
        state = RunState.of(
            self.plan,
            data=records.content(),
            units=records.unit_names,
            model=self.model,
            run_id=self.args.run_id if before is None else before.run_id,
        )
        if before is not None and checkpoint is not None and (different := state.differences(before)):
            raise PrivacyError(f"cannot resume {checkpoint.name}: this run differs in {', '.join(different)}")
        return ChargedRun.open(
            state,
            folder=Path(str(self.args.output_dir)),
            started_in=Path(str(self.args.output_dir)) if checkpoint is None else checkpoint.parent,
            units=records.unit_names,
            n_seen=n_seen,
            ledger=self.args.ledger,
            budget_epsilon=self.args.budget_epsilon,
            rank=self.args.process_index,
            device=self.args.device,
        )

    def _as_saved(self, run: ChargedRun, checkpoint: Path | None) -> TrainOutput:
        """The end of a run that has no step left: the weights of its last checkpoint."""
        if checkpoint is None:
            raise run.nothing_left()
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return TrainOutput(self.state.global_step, 0.0, {})

    def _take_back(self, run: ChargedRun, engine: Engine) -> None:
        """After an exception, leave the weights of the last charge in memory: what nobody can see costs nothing."""
        run.take_back()
        engine.restore(self._charged_weights or [])
        self.model.zero_grad()
        self.optimizer = self.lr_scheduler = None  # moments tell of the steps as well

    def _stop_here(self) -> None:
        """When the user stops a run, charge it and save a checkpoint, so that no charged step is lost."""
        self.charge()
        whole = (self.checkpoint_folder() / WHOLE).is_file()
        if self.args.save_strategy != "no" and not ranks.several() and self.state.global_step > 0 and not whole:
            self._save_checkpoint(self.model, None)

    # --- A step ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One item is one logical batch (this rank's part of it), drawn by the plan's own sampler."""
        sampler = self.plan.sampler(
            self.train_dataset.unit_of_example, rank=self.args.process_index, world_size=self.args.world_size
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self._cut)  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One DP step: leaves the noised, averaged gradient in `.grad`. Returns zero, since the loss is private."""
        engine = self._engine
        if engine is None or self._run is None:
            raise PrivacyError("the privacy engine is not attached; call train()")
        self._run.begin_step()
        if self.plan.private:
            # Masked words and dropout: from the run's public seed, one patient's presence would shift everybody's.
            torch.manual_seed(secrets.randbits(63))
        engine.check_unchanged(self.model)
        self._prove_movement(engine)
        model.train()
        total: Tensor | None = None
        nonfinite = torch.zeros((), dtype=torch.int64, device=self.args.device)
        n = sum(map(len, inputs))
        behind = ranks.most_of_all(n, self.args.device) - n if self.args.shard_base else 0
        for group in inputs:
            clipped, bad = self._clipped(model, engine, group)
            total = clipped if total is None else total.add_(clipped)
            nonfinite += bad
        for _ in range(behind):
            self._keep_pace(model, engine)
        self.n_nonfinite += int(ranks.sum_over_ranks_(nonfinite))
        if total is None:  # nobody was drawn; the noise is added all the same
            total = torch.zeros(engine.n_parameters, dtype=torch.float32, device=self.args.device)
        engine.write_gradients(ranks.noised_sum_(total, self._noise).div_(self.plan.divisor))
        if self._watched:
            self.charge()
        return torch.zeros((), device=self.args.device)

    def _clipped(self, model: nn.Module, engine: Engine, group: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor]:
        """Clipped sum over the patients of one group, [p], and how many were not finite."""
        engine.open_group(dict.fromkeys(e.unit for examples in group for e in examples), self.args.device)
        for examples in group:
            engine.begin([example.unit for example in examples], self.args.device)
            with self.compute_loss_context_manager():
                losses = self._losses_of(model, examples)
            engine.backward(losses)
        return self.plan.clipped_sum(engine.unit_gradients())

    def _keep_pace(self, model: nn.Module, engine: Engine) -> None:
        """A micro-batch of public examples, to no effect: with a sharded base each pass gathers weights from all ranks,
        so all must run equally many."""
        trial, units = public_examples(self.spec, self.processing_class)
        engine.begin(units, self.args.device)
        engine.backward(self._losses_of(model, trial))
        engine.unit_gradients()

    def _losses_of(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Loss of each example, [b]."""
        return self.record_losses(model, self._prepare_inputs(self.data_collator(list(examples))))

    def _cut(self, examples: list[Example]) -> LogicalBatch:
        fit = None if self._engine is None else int(self.args.buffer_mib * 2**20 / (4 * self._engine.n_parameters))
        groups = cut_groups(
            range(len(examples)),
            units=[e.unit for e in examples],
            lengths=[len(e.input_ids) for e in examples],
            max_tokens=self.args.micro_batch_tokens,
            max_units=None if fit is None else max(1, fit),
        )
        return LogicalBatch([[[examples[i] for i in cut] for cut in group] for group in groups])

    # --- Proofs ---------------------------------------------------------------------------------------------------

    def _attach(self) -> Engine:
        """The engine on the model, after a trial on random tokens: its rows are what single patients give."""
        if self.args.activation_checkpointing:  # transformers would switch it on later, unseen by the engine
            options = self.args.activation_checkpointing_kwargs
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # pyright: ignore
        examples, units = public_examples(self.spec, self.processing_class)
        batch = self._prepare_inputs(self.data_collator(examples))
        of = partial(trial_losses, self.model, batch, [len(example.input_ids) for example in examples], self.spec)
        attach = partial(self.plan.attach, self.model)
        return prove(attach, self.model, of(self.frozen_head), truth=of(None), units=units)

    def _prove_movement(self, engine: Engine) -> None:
        """After the first step with a rate above 0, every covered weight must have moved (Opacus issue 820)."""
        if self._moved:
            return
        if self._snapshot is None:
            self._snapshot = engine.snapshot()
        elif self._last_rate > 0:
            stuck = engine.unmoved_since(self._snapshot)
            if stuck and (self.plan.noise_multiplier > 0 or len(stuck) == len(engine.names)):
                raise PrivacyError(
                    f"{len(stuck)} trainable weights did not move in a step, first {stuck[0]}; the optimiser has other"
                    " tensors than the privacy engine"
                )
            self._moved, self._snapshot = True, None
        self._last_rate = self._get_learning_rate()

    # --- What leaves the trainer ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what does not depend on private records: learning rate, steps, seconds, held-out values."""
        shown = {k: v for k, v in logs.items() if k not in PRIVATE_LOGS}
        super().log(shown if self.plan.private else {**shown, "private": False}, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Not computed: its only use is a log line that is dropped."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; its figures tell of the weights, so their steps are charged first."""
        self.charge()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.predict`; charges first."""
        self.charge()
        return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`; charges first."""
        self.charge()
        super().save_model(output_dir, _internal_call)

    def save_weights(self, folder: str | Path) -> Path:
        """As `DpmedTrainer.save_weights`, with the certificate beside the adapter; charges first."""
        self.charge()
        target = super().save_weights(folder)
        write_json(target / CERTIFICATE, self.privacy_spent())
        return target

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Charges first, then writes the run's state, so that a whole checkpoint always has it."""
        self.charge()
        if self.args.should_save and self._run is not None:
            folder = self.checkpoint_folder(trial)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(folder / STATE_FILE, self._run.state.to_json())
        super()._save_checkpoint(model, trial)

    def _checkpoint(self, given: str | Path | bool) -> Path:
        """The checkpoint to resume from; True means the output folder's last whole one."""
        folder = last_checkpoint(Path(str(self.args.output_dir))) if given is True else Path(str(given))
        if folder is None:
            raise InputError(f"there is no checkpoint in {self.args.output_dir}; start without resume_from_checkpoint")
        return folder


def _step_of(checkpoint: Path) -> int:
    return int(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step)


def planned_steps(epochs: float, *, n_units: int, expected_batch_units: int) -> int:
    """Steps after which each patient was drawn `epochs` times in expectation; at least one."""
    return max(1, round(epochs * n_units / expected_batch_units))


def plan_for(args: DPLoRATrainingConfig, *, n_units: int, unit: str) -> PrivacyPlan:
    """Calibrate the plan of a run from its config and the number of patients.

    Raises: InputError for an impossible budget (see `PrivacyPlan.calibrated`).
    """
    steps = args.max_steps
    if steps <= 0 and args.expected_batch_units > 0:
        steps = planned_steps(args.num_train_epochs, n_units=n_units, expected_batch_units=args.expected_batch_units)
    return PrivacyPlan.calibrated(
        unit=unit,
        n_units=n_units,
        expected_batch_units=args.expected_batch_units,
        max_records_per_unit=args.max_records_per_unit,
        clip_norm=args.clip_norm,
        target_epsilon=args.target_epsilon,
        delta=args.delta,
        n_steps=steps,
        clipping=args.clipping,
        engine=args.engine,
        secure=args.secure,
        noise_seed=args.noise_seed,
    )
