"""A tiny DP run, the same at each call except for its noise, for the tests of faults."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed.data.tasks import TaskKind, TaskSpec, encode
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.lora import lora_config, with_adapters

UNITS = (0, 1, 0, 2, 3, 3, 4, 5)
N_UNITS = 6
LABELS = ("acute", "chronic")
TOKENIZER = tiny_models.make_tokenizer()


def make_plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "unit": "patient",
        "n_units": N_UNITS,
        "expected_batch_units": N_UNITS,  # every patient in every step, unless a test says otherwise
        "max_records_per_unit": 4,
        "clip_norm": 0.5,
        "noise_multiplier": 1.0,
        "n_steps": 3,
        "delta": 1e-3,
    }
    return PrivacyPlan(**{**values, **changes})


def make_records() -> Dataset:
    words = ["fever", "cough", "effusion", "metformin", "stable", "radiograph"]
    return Dataset.from_dict(
        {
            "text": [f"Patient {i} " + " ".join(words[: 1 + (5 * i) % 6]) for i in range(len(UNITS))],
            "label": [LABELS[i % 2] for i in range(len(UNITS))],
            "unit": [f"p{u}" for u in UNITS],
            "identifiers": [[] for _ in UNITS],
        }
    )


def with_lora(model: Any, kind: TaskKind, **changes: Any) -> Any:
    config = lora_config(model, kind, rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return with_adapters(model, config)


def make_trainer(
    folder: Path,
    plan: PrivacyPlan | None = None,
    *,
    model: Any = None,
    trainer: type[DPLoRATrainer] = DPLoRATrainer,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> DPLoRATrainer:
    """A DP trainer of a tiny Llama (causal) or of the given PEFT model; weights are the same at each call."""
    spec = TaskSpec(kind="causal_lm", max_length=64)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "micro_batch_tokens": 60,
    }
    return trainer(
        model if model is not None else with_lora(tiny_models.make_model("llama"), "causal_lm"),
        DPLoRATrainingConfig(**{**values, **changes}),
        encode(make_records(), TOKENIZER, spec),
        processing_class=TOKENIZER,
        spec=spec,
        plan=plan or make_plan(),
        callbacks=callbacks,
    )


def weights(trainer: DPLoRATrainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad])
