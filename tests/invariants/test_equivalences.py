"""Different ways to say the same give the same weights: DP without noise is LoRA, cuts and stops leave no trace."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed.data.tasks import EncodedRecords, TaskKind, TaskSpec, encode
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.base import DpmedTrainer
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.full import FullTrainer, FullTrainingConfig
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


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_dp_lora_without_noise_and_clipping_is_lora_on_the_full_batch(
    kind: tiny_models.Kind, task: TaskKind, tmp_path: Path
) -> None:
    private = trained(dp_trainer(tmp_path / "dp", kind, task, plan(), **SGD))
    plain = trained(lora_trainer(tmp_path / "lora", kind, task, per_device_train_batch_size=N, **SGD))
    assert distance(private, plain) < 1e-5


def test_so_it_is_with_adamw_and_a_schedule(tmp_path: Path) -> None:
    more = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    private = trained(dp_trainer(tmp_path / "dp", "llama", "causal_lm", plan(), **more))
    plain = trained(lora_trainer(tmp_path / "lora", "llama", "causal_lm", per_device_train_batch_size=N, **more))
    assert distance(private, plain) < 1e-4


@pytest.mark.parametrize("change", [{"clip_norm": 0.01}, {"noise_multiplier": 0.5, "clip_norm": 1.0}])
def test_clipping_or_noise_makes_a_difference(change: dict[str, Any], tmp_path: Path) -> None:
    """So the equality above is no accident of a step that ignores the plan."""
    private = trained(dp_trainer(tmp_path / "dp", "llama", "causal_lm", plan(**change), **SGD))
    plain = trained(lora_trainer(tmp_path / "lora", "llama", "causal_lm", per_device_train_batch_size=N, **SGD))
    assert distance(private, plain) > 0.1


def test_micro_batches_leave_no_trace(tmp_path: Path) -> None:
    clipped = plan(clip_norm=0.05)
    one, eight = (
        trained(dp_trainer(tmp_path / str(n), "llama", "causal_lm", clipped, micro_batch_tokens=n, **SGD))
        for n in (10_000, 1)
    )
    assert distance(one, eight) < 1e-5


@pytest.mark.parametrize(("kind", "task"), CASES[:3])
def test_a_batch_of_eight_is_eight_accumulated_batches_of_one(
    kind: tiny_models.Kind, task: TaskKind, tmp_path: Path
) -> None:
    """Since each record's loss is its own mean, not a share of the batch's tokens."""
    whole = trained(lora_trainer(tmp_path / "8x1", kind, task, per_device_train_batch_size=N, **SGD))
    parts = trained(
        lora_trainer(tmp_path / "1x8", kind, task, per_device_train_batch_size=1, gradient_accumulation_steps=N, **SGD)
    )
    assert distance(whole, parts) < 1e-5


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
        return control


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "masked_lm"), ("bert", "classification")])
def test_a_stop_and_a_resumption_leave_no_trace_in_full_training(
    kind: tiny_models.Kind, task: TaskKind, tmp_path: Path
) -> None:
    """Weights, order of records, masked words and schedule go on as if the run had never stopped."""

    def trainer(folder: str) -> FullTrainer:
        records, spec = encoded(task)
        changes = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
        args = FullTrainingConfig(**values(tmp_path / folder, save_strategy="epoch", **changes))
        model = tiny_models.make_model(kind, task, num_labels=2)
        return FullTrainer(model, args, records, processing_class=TOKENIZER, spec=spec)

    whole = trained(trainer("whole"))
    stopped = trainer("stopped")
    stopped.add_callback(StopAfter(2))
    half = trained(stopped)
    assert distance(half, whole) > 0.1
    again = trainer("stopped")
    resumed = trained(again, resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert distance(resumed, whole) < 1e-6


def test_a_stop_and_a_resumption_leave_no_trace_in_dp_training_without_noise(tmp_path: Path) -> None:
    """With noise they must, see tests/faults; what is left are weights, optimiser and schedule."""
    clipped = plan(clip_norm=0.05)

    def trainer(folder: str) -> DPLoRATrainer:
        changes = {"save_strategy": "steps", "save_steps": 3, "adam_epsilon": 1e-3}
        return dp_trainer(tmp_path / folder, "llama", "causal_lm", clipped, **changes)

    whole = trained(trainer("whole"))
    stopped = trainer("stopped")
    stopped.add_callback(StopAfter(3))
    stopped.train()
    again = trainer("stopped")
    resumed = trained(again, resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert again.privacy_spent()["n_steps"] == 6
    assert distance(resumed, whole) < 1e-5


def test_equal_seeds_give_equal_weights_without_privacy(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> Tensor:
        return trained(lora_trainer(tmp_path / name, "llama", "causal_lm", per_device_train_batch_size=2, seed=seed))

    first = run("a", 1)
    assert torch.equal(first, run("b", 1))
    assert not torch.equal(first, run("c", 2))
