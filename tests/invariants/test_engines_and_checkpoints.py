"""The engine, the cut and gradient checkpointing are ways to compute the same step: they leave no trace in a run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from invariants.eight_patients import CASES, SGD, N, distance, dp_trainer, lora_trainer, plan, trained, weights
from torch import Tensor

import tiny_models
from dpmed.data.tasks import TaskKind
from dpmed.errors import PrivacyError
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.plan import EngineName, PrivacyPlan

REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
CHECKPOINTS: dict[str, dict[str, Any]] = {"none": {}, "reentrant": REENTRANT, "non-reentrant": NON_REENTRANT}
ENGINES: tuple[EngineName, ...] = ("one_pass", "opacus")
CLIP = 0.3
STEEP = {**SGD, "learning_rate": 5.0}  # clipped steps are short
CHECKPOINTED = [(kind, task) for kind, task in CASES if kind != "albert"]  # transformers' ALBERT cannot


@functools.cache
def lora(kind: tiny_models.Kind, task: TaskKind) -> Tensor:
    """What plain LoRA changes, on the full batch."""
    with tempfile.TemporaryDirectory() as folder:
        return trained(lora_trainer(Path(folder), kind, task, per_device_train_batch_size=N, **SGD))


@functools.cache
def clipped(kind: tiny_models.Kind, task: TaskKind) -> Tensor:
    """What the reference engine changes with clipping, in micro-batches of one."""
    with tempfile.TemporaryDirectory() as folder:
        slow = plan(clip_norm=CLIP, engine="opacus", n_steps=3)
        return trained(dp_trainer(Path(folder), kind, task, slow, micro_batch_tokens=1, **STEEP))


@pytest.mark.parametrize("checkpoints", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(("kind", "task"), CHECKPOINTED)
def test_dp_lora_under_gradient_checkpointing_is_lora(
    kind: tiny_models.Kind, task: TaskKind, checkpoints: str, tmp_path: Path
) -> None:
    trainer = dp_trainer(tmp_path, kind, task, plan(), **CHECKPOINTS[checkpoints], **SGD)
    runs: list[int] = []
    adapter = next(m for name, m in trainer.model.named_modules() if name.endswith("lora_A.default"))
    adapter.register_forward_hook(lambda *_: runs.append(1) if trainer._engine is not None else None)  # after the trial
    assert distance(trained(trainer), lora(kind, task)) < 1e-5
    assert len(runs) == 2 * 6  # each of six steps ran its layers twice


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_by_opacus_hooks_dp_lora_is_lora_too(kind: tiny_models.Kind, task: TaskKind, tmp_path: Path) -> None:
    assert distance(trained(dp_trainer(tmp_path, kind, task, plan(engine="opacus"), **SGD)), lora(kind, task)) < 1e-5


@pytest.mark.parametrize("checkpoints", ["reentrant", "non-reentrant"])
def test_opacus_hooks_under_checkpointing_are_right_or_refused(checkpoints: str, tmp_path: Path) -> None:
    """Never a third: a run that goes on with wrong sums."""
    trainer = dp_trainer(tmp_path, "llama", "causal_lm", plan(engine="opacus"), **CHECKPOINTS[checkpoints], **SGD)
    before = weights(trainer)
    try:
        change = trained(trainer)
    except PrivacyError:
        assert torch.equal(weights(trainer), before)
    else:
        assert distance(change, lora("llama", "causal_lm")) < 1e-5


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_one_batch_of_eight_is_eight_of_one_and_is_what_opacus_gives(
    kind: tiny_models.Kind, task: TaskKind, tokens: int, tmp_path: Path
) -> None:
    short = plan(clip_norm=CLIP, n_steps=3)
    got = trained(dp_trainer(tmp_path, kind, task, short, micro_batch_tokens=tokens, **STEEP))
    assert distance(got, clipped(kind, task)) < 1e-5


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_clipping_was_at_work_there(kind: tiny_models.Kind, task: TaskKind) -> None:
    assert distance(clipped(kind, task), lora(kind, task)) > 0.1


def test_the_buffer_of_gradients_may_hold_one_unit_or_all(tmp_path: Path) -> None:
    few, many = (
        trained(
            dp_trainer(tmp_path / str(n), "gpt2", "causal_lm", plan(clip_norm=CLIP, n_steps=3), buffer_mib=n, **STEEP)
        )
        for n in (0, 64)
    )
    assert distance(few, many) < 1e-5


@pytest.mark.parametrize("clipping", ["norm", "automatic"])
def test_engines_agree_in_both_clipping_modes(clipping: Any, tmp_path: Path) -> None:
    plans = [plan(clip_norm=CLIP, clipping=clipping, engine=engine, n_steps=3) for engine in ENGINES]
    one, other = (trained(dp_trainer(tmp_path / p.engine, "bert", "classification", p, **STEEP)) for p in plans)
    assert distance(one, other) < 1e-5


# --- Planted faults ---------------------------------------------------------------------------------------------------


def test_the_comparison_sees_an_engine_that_counts_a_recomputed_layer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = OnePassEngine.write_product

    def twice(self: OnePassEngine, *given: Any) -> None:
        write(self, *given)
        write(self, *given)

    monkeypatch.setattr(OnePassEngine, "write_product", twice)
    monkeypatch.setattr("dpmed.trainers.dp_lora.prove", lambda attach, *_, **__: attach())
    assert (
        distance(trained(dp_trainer(tmp_path, "llama", "causal_lm", plan(), **SGD)), lora("llama", "causal_lm")) > 0.1
    )


def test_the_comparison_sees_a_step_that_clips_each_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = PrivacyPlan.clipped_sum
    monkeypatch.setattr(PrivacyPlan, "clipped_sum", lambda self, rows: clip(self, rows.sum(0, keepdim=True)))
    trainer = dp_trainer(
        tmp_path, "llama", "causal_lm", plan(clip_norm=CLIP, n_steps=3), micro_batch_tokens=10_000, **SGD
    )
    assert distance(trained(trainer), clipped("llama", "causal_lm")) > 0.1
