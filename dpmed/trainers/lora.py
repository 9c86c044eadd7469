"""LoRA fine-tuning: low-rank factors (and a classifier head) trained on a frozen base. No protection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dpmed.data.tasks import EncodedRecords, TaskKind, TaskSpec
from dpmed.errors import InputError
from dpmed.models import fresh_modules
from dpmed.trainers.base import HEADS, DpmedTrainer, TrainingConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass
class LoRATrainingConfig(TrainingConfig):
    """Configuration of `LoRATrainer`. The adapters' shape is the `peft_config`."""


class LoRATrainer(DpmedTrainer):
    """Trains LoRA factors, and the classifier head where the task has one.

    Reference: Hu et al. 2022 (arXiv 2106.09685), by the peft library.

    Args:
        peft_config: adapters to add; None where `model` is a PEFT model already.
        The others: see `DpmedTrainer`.

    Raises: InputError if there is neither a peft_config nor an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingConfig,
        train_dataset: Dataset | EncodedRecords,
        eval_dataset: Dataset | EncodedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: LoraConfig | None = None,
        spec: TaskSpec | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            with_adapters(model, peft_config),
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            spec=spec,
            callbacks=callbacks,
        )


def with_adapters(model: nn.Module, peft_config: LoraConfig | None) -> nn.Module:
    """Put LoRA adapters on a model; a PEFT model is returned as it is."""
    if isinstance(model, PeftModel):
        return model
    if peft_config is None:
        raise InputError("LoRA needs peft_config=peft.LoraConfig(...), or a model that has an adapter")
    return get_peft_model(model, peft_config)  # pyright: ignore[reportArgumentType]


def lora_config(
    model: nn.Module, kind: TaskKind, *, rank: int, alpha: float, target_modules: str | list[str], dropout: float
) -> LoraConfig:
    """A peft.LoraConfig for a task; a new head, and whatever else is not in the checkpoint, is trained in full.

    Args:
        model: the base model, to find the name of its head.
        kind: the task.
        rank: r of the factors.
        alpha: scale; the update is alpha / r * B A.
        target_modules: "all-linear" or names of modules.
        dropout: on the adapters' input.
    """
    task_type = {"causal_lm": TaskType.CAUSAL_LM, "masked_lm": None, "classification": TaskType.SEQ_CLS}[kind]
    heads = [name for name in HEADS if hasattr(model, name)] if kind == "classification" else []
    heads += [name for name in fresh_modules(model) if name not in heads]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=target_modules,
        lora_dropout=dropout,
        task_type=task_type,
        modules_to_save=heads or None,
        exclude_modules=heads or None,  # trained in full, so no factors beside them
    )
