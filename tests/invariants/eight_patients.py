"""Tiny runs of eight patients, the same weights and records at each call, whose changes of the weights compare."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed.data.tasks import EncodedRecords, TaskKind, TaskSpec, encode
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.base import DpmedTrainer
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.lora import LoRATrainer, LoRATrainingConfig, lora_config, with_adapters

N = 8
LABELS = ("acute", "chronic")
TOKENIZER = tiny_models.make_tokenizer()
CASES: list[tuple[tiny_models.Kind, TaskKind]] = [
    ("llama", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("bert", "classification"),
    ("albert", "classification"),
]


def encoded(task: TaskKind) -> tuple[EncodedRecords, TaskSpec]:
    """Eight records of eight patients, of ragged lengths."""
    texts = [f"Patient {i} has fever" + " and cough" * (i % 4) for i in range(N)]
    columns: dict[str, Any] = {"text": texts, "unit": [f"p{i}" for i in range(N)], "identifiers": [[]] * N}
    if task == "classification":
        columns["label"] = [LABELS[i % 2] for i in range(N)]
    spec = TaskSpec(kind=task, labels=LABELS if task == "classification" else (), max_length=64)
    return encode(Dataset.from_dict(columns), TOKENIZER, spec), spec


def adapted(kind: tiny_models.Kind, task: TaskKind) -> Any:
    model = tiny_models.make_model(kind, task, num_labels=2, initializer_range=0.1)
    config = lora_config(model, task, rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return with_adapters(model, config)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    plain = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    }
    return {**plain, **changes}


def plan(**changes: Any) -> PrivacyPlan:
    """Every patient in every step, no noise, no clipping."""
    plain: dict[str, Any] = {
        "unit": "patient",
        "n_units": N,
        "expected_batch_units": N,
        "max_records_per_unit": 1,
        "clip_norm": math.inf,
        "noise_multiplier": 0.0,
        "n_steps": 6,
        "delta": 1e-3,
    }
    return PrivacyPlan(**{**plain, **changes})


def dp_trainer(
    folder: Path, kind: tiny_models.Kind, task: TaskKind, dp_plan: PrivacyPlan, **changes: Any
) -> DPLoRATrainer:
    records, spec = encoded(task)
    args = DPLoRATrainingConfig(**values(folder, **changes))
    return DPLoRATrainer(adapted(kind, task), args, records, processing_class=TOKENIZER, spec=spec, plan=dp_plan)


def lora_trainer(folder: Path, kind: tiny_models.Kind, task: TaskKind, **changes: Any) -> LoRATrainer:
    records, spec = encoded(task)
    args = LoRATrainingConfig(**values(folder, max_steps=6, **changes))
    return LoRATrainer(adapted(kind, task), args, records, processing_class=TOKENIZER, spec=spec)


def weights(trainer: DpmedTrainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad])


def trained(trainer: DpmedTrainer, **resume: Any) -> Tensor:
    """What training changed in the weights, since the model was made."""
    before = weights(trainer)
    trainer.train(**resume)
    return weights(trainer) - before


def distance(a: Tensor, b: Tensor) -> float:
    """Of two changes, relative to their size: the weights themselves would hide a difference."""
    assert float(b.norm()) > 1e-2
    return float((a - b).norm() / b.norm())


# SGD: Adam divides by the gradient's own size, so where that is rounding alone, any difference becomes a full step.
SGD = {"optim": "sgd", "learning_rate": 1.0}


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
        return control
