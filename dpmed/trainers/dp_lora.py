"""DP-LoRA: LoRA by DP-SGD with the patient as the unit of privacy.

One Hugging Face step is one logical DP step, so `global_step`, schedule, checkpoints and accountant count the same
thing:

1. draw patients, each independently with the plan's sampling rate; draw at most `max_records_per_unit` of their
windows;
2. cut the draw into padded micro-batches, none of which splits a patient;
3. per micro-batch: one backward pass, per-record gradients, summed by patient, clipped to `clip_norm`, summed;
4. add N(0, (noise_multiplier * clip_norm)^2) once, also to an empty draw;
5. divide by the fixed, public expected number of patients and hand that to the optimiser as the gradient.

Reference: Abadi et al. 2016 (arXiv 1607.00133); patient-level clipping as in McMahan et al. 2018 (arXiv 1710.06963).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from dpmed.data.batches import Batch, per_record_loss
from dpmed.data.tasks import EncodedRecords, Example, TaskSpec
from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.clipping import OpacusEngine, clipped_sum
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.sampling import cut_micro_batches
from dpmed.trainers.base import TrainingConfig
from dpmed.trainers.lora import LoRATrainer

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAN_FILE = "privacy_plan.json"
PRIVATE_LOGS = ("loss", "grad_norm", "train_loss")
"""Log keys that are functions of the private records; they are dropped, since no noise covers them."""


@dataclass
class DPLoRATrainingConfig(TrainingConfig):
    """Configuration of `DPLoRATrainer`; `unit_column` names the patient and is required."""

    target_epsilon: float = field(default=8.0, metadata={"help": "epsilon after all steps"})
    delta: float | None = field(default=None, metadata={"help": "None means n_units ** -1.1"})
    clip_norm: float = field(default=1.0, metadata={"help": "L2 norm to which a patient's gradient is clipped"})
    expected_batch_units: int = field(default=64, metadata={"help": "expected patients per step; the public divisor"})
    max_records_per_unit: int = field(default=4, metadata={"help": "windows of one patient per step, at most"})
    micro_batch_tokens: int = field(default=4096, metadata={"help": "padded tokens per micro-batch"})
    noise_seed: int | None = field(default=None, metadata={"help": "tests only: fixes noise and draws; not private"})


class LogicalBatch(list[list[Example]]):
    """One Poisson draw as micro-batches of examples; empty where nobody was drawn."""


class DPLoRATrainer(LoRATrainer):
    """LoRA with a patient-level (epsilon, delta) guarantee under adding or removing one patient.

    Args:
        plan: the guarantee, calibrated beforehand; None calibrates it from `args` and the number of patients.
        The others: see `LoRATrainer`.

    Raises: InputError if the unit column is missing or the budget impossible; PrivacyError if a trainable weight would
        not be covered.
    """

    args: DPLoRATrainingConfig

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
        _refuse_unsafe(args)
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
        self.n_nonfinite = 0
        self._engine: OpacusEngine | None = None
        self._noise = self.plan.noise()
        self._snapshot: list[Tensor] | None = None
        self._last_rate = 0.0
        self._moved = False

    def get_train_dataloader(self) -> DataLoader:
        """One item is one logical batch, drawn by the plan's own sampler."""
        sampler = self.plan.sampler(self.train_dataset.unit_of_example)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self._cut)  # type: ignore[arg-type]

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train for the plan's steps. See `transformers.Trainer.train`; the returned loss is not computed (private).

        Raises: PrivacyError for a checkpoint of another plan, or a second run without one (it would not be charged).
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint(resume_from_checkpoint)
        elif self.state.global_step > 0:
            raise PrivacyError(
                "this trainer has run already: its steps are charged once, a second run on the same weights would not"
                " be; make a new plan for more steps, or resume from a checkpoint"
            )
        self._engine = OpacusEngine(self.model)
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self._prove_movement(self._engine)
            return output
        finally:
            self._engine.detach()
            self._engine = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One DP step: leaves the noised, averaged gradient in `.grad`. Returns zero, since the loss is private."""
        engine = self._engine
        if engine is None:
            raise PrivacyError("the privacy engine is not attached; call train()")
        engine.check_unchanged(self.model)
        self._prove_movement(engine)
        model.train()
        total = torch.zeros(engine.n_parameters, dtype=torch.float32, device=self.args.device)
        for examples in inputs:
            batch: Batch = self._prepare_inputs(self.data_collator(examples))
            total += self._clipped(model, engine, batch)
        total += self._noise.draw(engine.n_parameters, device=total.device)
        engine.write_gradients(total / self.plan.divisor)
        return torch.zeros((), device=self.args.device)

    def privacy_spent(self) -> dict[str, Any]:
        """The certificate of the steps run so far: epsilon, delta, unit, n_units, noise_multiplier, n_steps, ..."""
        return {**self.plan.spent(self.state.global_step), "n_nonfinite_units": self.n_nonfinite}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what does not depend on private records: learning rate, steps, seconds, held-out values."""
        super().log({k: v for k, v in logs.items() if k not in PRIVATE_LOGS}, start_time)

    def _clipped(self, model: nn.Module, engine: OpacusEngine, batch: Batch) -> Tensor:
        """Clipped sum over the patients of one micro-batch, [p]."""
        with self.compute_loss_context_manager():
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            losses = per_record_loss(outputs.logits, batch, self.spec)
        with warnings.catch_warnings():
            # The first adapters read frozen embeddings, so no input needs a gradient; the hooks use the outputs' alone.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()  # a sum: each record's gradient is its own, whatever the batch
        total, nonfinite = clipped_sum(engine.unit_gradients(batch["unit"]), clip_norm=self.plan.clip_norm)
        self.n_nonfinite += nonfinite
        return total

    def _cut(self, examples: list[Example]) -> LogicalBatch:
        cuts = cut_micro_batches(
            range(len(examples)),
            units=[e.unit for e in examples],
            lengths=[len(e.input_ids) for e in examples],
            max_tokens=self.args.micro_batch_tokens,
        )
        return LogicalBatch([[examples[i] for i in cut] for cut in cuts])

    def _prove_movement(self, engine: OpacusEngine) -> None:
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the plan first: transformers' last file makes the checkpoint a whole one, so it must find the plan."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / PLAN_FILE).write_text(json.dumps(self.plan.to_dict()) + "\n", encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _checkpoint(self, given: str | Path | bool) -> str:
        """The checkpoint to resume from, which must be of the same plan; True means the folder's last one."""
        folder = get_last_checkpoint(str(self.args.output_dir)) if given is True else str(given)
        if folder is None:
            raise InputError(f"there is no checkpoint in {self.args.output_dir}; start without resume_from_checkpoint")
        self._check_same_plan(Path(folder))
        return folder

    def _check_same_plan(self, checkpoint: Path) -> None:
        """A resumed run must have the guarantee of the run that was stopped."""
        file = checkpoint / PLAN_FILE
        if not file.is_file():
            raise PrivacyError(f"{checkpoint.name} has no {PLAN_FILE}; it is no checkpoint of a DP run, start anew")
        different = self.plan.differences(PrivacyPlan.from_dict(json.loads(file.read_text(encoding="utf-8"))))
        if different:
            raise PrivacyError(f"cannot resume {checkpoint.name}: the plan differs in {', '.join(different)}")


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
        noise_seed=args.noise_seed,
    )


def _refuse_unsafe(args: DPLoRATrainingConfig) -> None:
    """Refuse settings under which the guarantee would not hold; each names its remedy."""
    if not args.unit_column:
        raise InputError("dp_lora needs the patient column: set unit_column (recipe: data.unit)")
    refused = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps != 1,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "fp16": bool(args.fp16),
        "load_best_model_at_end": bool(args.load_best_model_at_end),
        "auto_find_batch_size": bool(args.auto_find_batch_size),
        "torch_compile": bool(args.torch_compile),
        "dataloader_num_workers": args.dataloader_num_workers > 0,
    }
    names = [name for name, unsafe in refused.items() if unsafe]
    if names:
        raise InputError(
            f"dp_lora cannot run with {', '.join(names)}: one step is one draw; remove it from training.extra"
        )
