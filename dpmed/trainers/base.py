"""What every method shares: encoding records, the per-record loss, the order of batches, and quiet logs. Nothing
else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from dpmed.data.batches import Batch, Collator, SimilarLengths, per_record_loss
from dpmed.data.head_losses import frozen_head, record_losses
from dpmed.data.records import load_records
from dpmed.data.tasks import EncodedRecords, Example, Targets, TaskKind, TaskSpec, encode, label_names
from dpmed.errors import InputError
from dpmed.models import write_task_card
from dpmed.privacy import ranks
from dpmed.runs import WHOLE, mark_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState

NUMBERS_ONLY = (int, float)
HEADS = ("classifier", "score")
"""Names of sequence-classification heads in transformers; freshly made, so they must be trained in full."""


@dataclass
class TrainingConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the columns and the task of the records. Shared by all methods."""

    task: TaskKind = field(default="causal_lm", metadata={"help": "causal_lm, masked_lm or classification"})
    max_length: int = field(default=256, metadata={"help": "tokens per window"})
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    label_column: str | None = field(default=None, metadata={"help": "column with the label or labels"})
    unit_column: str | None = field(default=None, metadata={"help": "column with the patient, the unit of privacy"})
    head_learning_rate: float | None = field(default=None, metadata={"help": "of a classification head"})
    save_strategy: str = field(default="no", metadata={"help": "checkpoints hold weights of unfinished runs"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "dpmed's collator reads its own examples"})
    report_to: str | list[str] = field(default="none", metadata={"help": "no tracker unless asked"})
    disable_tqdm: bool = field(default=True, metadata={"help": "dpmed shows its own progress"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of metrics.jsonl"})


class DpmedTrainer(Trainer):
    """Base of all methods; use one of its subclasses.

    Args:
        model: a transformers model (or PEFT model) for the task.
        args: the method's config.
        train_dataset: records (a `datasets.Dataset` with text and optional label, unit, identifiers), or encoded ones.
        eval_dataset: records of other patients, or None.
        processing_class: the model's fast tokenizer.
        spec: the task in full; None builds it from `args` and the labels of `train_dataset`.
        callbacks: further callbacks. They see numbers only, never text.

    Raises: InputError if a column is missing.
    """

    never_target: Targets | None = None
    forget: Targets | None = None
    several_devices = False
    """Whether the method's step is right when several processes share it."""
    model: nn.Module
    train_dataset: EncodedRecords
    data_collator: Callable[[list[Example]], Batch]
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: nn.Module,
        args: TrainingConfig,
        train_dataset: Dataset | EncodedRecords,
        eval_dataset: Dataset | EncodedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        spec: TaskSpec | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if processing_class is None:
            raise InputError("the trainer needs the model's tokenizer: pass processing_class=tokenizer")
        if args.n_gpu > 1 or (args.world_size > 1 and not self.several_devices):
            remedy = "start it with torchrun" if self.several_devices else "set CUDA_VISIBLE_DEVICES to one device"
            raise InputError(f"this process would train on several devices at once, which is not supported: {remedy}")
        self.spec = spec or _spec_of(args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(processing_class, self.spec, never_target=self.never_target, forget=self.forget),
            train_dataset=_encoded(train_dataset, processing_class, self.spec, args, prepare=self.prepare_records),
            eval_dataset=None if eval_dataset is None else _encoded(eval_dataset, processing_class, self.spec, args),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean of per-record losses, never of the batch's tokens
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)

    def prepare_records(self, records: Dataset, args: Any) -> Dataset:
        """What a method does to training records, in `load_records`' columns, before they are encoded: nothing here."""
        return records

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the batch of each record's own loss; `num_items_in_batch` is ignored on purpose."""
        if return_outputs:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return per_record_loss(outputs.logits, inputs, self.spec).mean(), {"logits": outputs.logits}
        return self.record_losses(model, inputs).mean()

    def record_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each example of a batch, [b], float32."""
        return record_losses(model, batch, self.spec, self.frozen_head)

    @cached_property
    def frozen_head(self) -> nn.Linear | None:
        """The output layer of a language model where training leaves it as it is: its logits are then never held."""
        return None if self.spec.kind == "classification" else frozen_head(self.model, self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with a rate of its own for a classification head where one is set."""
        rate = getattr(self.args, "head_learning_rate", None)
        if self.optimizer is None and rate is not None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            heads = [p for n, p in named if not set(HEADS).isdisjoint(n.split("."))]
            if not heads:
                raise InputError("training.head_learning_rate: the model has no classification head; set it to null")
            rest = [p for n, p in named if set(HEADS).isdisjoint(n.split("."))]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            decay = {"weight_decay": self.args.weight_decay}
            groups = [{"params": rest, **decay}, {"params": heads, "lr": rate, **decay}]
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of a held-out batch; logits are not collected (the evaluator streams its own)."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def save_weights(self, folder: str | Path) -> Path:
        """Save model or adapter (safetensors), tokenizer and task card; nothing pickled, no model card with rows."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(str(target), safe_serialization=True)
        (target / "README.md").unlink(missing_ok=True)  # peft's template of a card; dpmed writes its own facts as JSON
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(target))
        write_task_card(target, self.spec)
        for file in target.iterdir():
            file.chmod(0o600)  # weights derive from patients' records
        return target

    def checkpoint_folder(self, trial: Any = None) -> Path:
        """Where the checkpoint of the current step goes."""
        return Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does, but older checkpoints are dropped only when this one is whole, and marked as such."""
        folder, limit = self.checkpoint_folder(trial), self.args.save_total_limit
        if self.args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        ranks.wait_for_all()  # each rank has written its random state
        if self.args.should_save:
            mark_whole(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        return SimilarLengths(self.train_dataset.lengths, self.args.train_batch_size)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: seconds and tokens are what dpmed reports."""
        return 0


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl: numbers only, whatever a callback or a model may have put there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        line = {"step": state.global_step}
        line |= {k: v for k, v in (logs or {}).items() if isinstance(v, NUMBERS_ONLY)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _spec_of(args: TrainingConfig, records: Dataset | EncodedRecords) -> TaskSpec:
    if isinstance(records, EncodedRecords):
        raise InputError("encoded records come with their task: pass spec=")
    labels: tuple[str, ...] = ()
    multi = False
    if args.label_column is not None:
        canonical = load_records(records, text=args.text_column, label=args.label_column, unit=args.unit_column)
        labels, multi = label_names(canonical), not isinstance(canonical[0]["label"], str)
    return TaskSpec(kind=args.task, labels=labels, multi_label=multi, max_length=args.max_length)


def _encoded(
    records: Dataset | EncodedRecords,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    args: TrainingConfig,
    *,
    prepare: Callable[[Dataset, Any], Dataset] | None = None,
) -> EncodedRecords:
    if isinstance(records, EncodedRecords):
        return records
    if spec.labels and args.label_column is None:
        raise InputError("the task has labels, but no label column is named: set label_column")
    canonical = load_records(
        records,
        text=args.text_column,
        label=args.label_column,
        unit=args.unit_column,
        multi_label=spec.multi_label,
        identifiers="identifiers" if "identifiers" in records.column_names else None,
    )
    return encode(prepare(canonical, args) if prepare else canonical, tokenizer, spec)
