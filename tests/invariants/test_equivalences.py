"""Different ways to say the same give the same weights: DP without noise is LoRA, cuts and stops leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invariants.eight_patients import (
    CASES,
    SGD,
    TOKENIZER,
    N,
    StopAfter,
    distance,
    dp_trainer,
    encoded,
    lora_trainer,
    plan,
    trained,
    values,
)
from torch import Tensor

import tiny_models
from dpmed.data.tasks import TaskKind
from dpmed.trainers.dp_lora import DPLoRATrainer
from dpmed.trainers.full import FullTrainer, FullTrainingConfig


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
