"""DP-LoRA's step against the slow truth: each patient alone, plain autograd, clipped by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

import tiny_models
from dpmed.data.batches import Batch, per_record_loss
from dpmed.data.head_losses import record_losses
from dpmed.data.tasks import EncodedRecords, Example, TaskKind, TaskSpec, encode
from dpmed.errors import InputError, PrivacyError
from dpmed.models import MeanPoolingClassifier, MeanPoolingConfig
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig, LogicalBatch, plan_for, planned_steps
from dpmed.trainers.lora import lora_config, with_adapters

LABELS = ("acute", "chronic", "none")
UNITS = (0, 1, 0, 2, 3, 3, 3, 4, 5)  # several records of patients 0 and 3, apart from each other
N_UNITS = 6
CASES: list[tuple[tiny_models.Kind, TaskKind]] = [
    *((kind, "classification") for kind in tiny_models.KINDS),
    *((kind, "masked_lm") for kind in tiny_models.ENCODERS),
    *((kind, "causal_lm") for kind in tiny_models.DECODERS),
]


def make_records(*, multi_label: bool = False, label: bool = True) -> Dataset:
    """Texts of ragged lengths, 2 to 9 sentences' parts."""
    words = ["fever", "cough", "effusion", "metformin", "stable", "radiograph", "cardiologist", "admitted", "twice"]
    texts = [f"Patient {i} " + " ".join(words[: 1 + (3 * i) % 9]) + "." for i in range(len(UNITS))]
    columns: dict[str, Any] = {"text": texts, "unit": [f"p{u}" for u in UNITS], "identifiers": [[] for _ in UNITS]}
    if label and multi_label:
        columns["label"] = [[LABELS[j] for j in range(3) if (i + 1) >> j & 1] for i in range(len(UNITS))]
    elif label:
        columns["label"] = [LABELS[i % 3] for i in range(len(UNITS))]
    return Dataset.from_dict(columns)


def make_spec(kind: TaskKind, **changes: Any) -> TaskSpec:
    labels = LABELS if kind == "classification" else ()
    return TaskSpec(**{"kind": kind, "labels": labels, "max_length": 64, **changes})


def make_plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "unit": "patient",
        "n_units": N_UNITS,
        "expected_batch_units": 3,
        "max_records_per_unit": 4,
        "clip_norm": 0.01,
        "noise_multiplier": 0.0,
        "n_steps": 3,
        "delta": 1e-3,
    }
    return PrivacyPlan(**{**values, **changes})


def make_args(folder: Path, **changes: Any) -> DPLoRATrainingConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "micro_batch_tokens": 80,
    }
    return DPLoRATrainingConfig(**{**values, **changes})


def with_lora(model: Any, kind: TaskKind) -> Any:
    """All linear layers and the head; B is not zero, so that A has a gradient too."""
    config = lora_config(model, kind, rank=3, alpha=6, target_modules="all-linear", dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on Conv1D
        adapted = with_adapters(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapted


def make_trainer(
    folder: Path, model: Any, spec: TaskSpec, records: Dataset, plan: PrivacyPlan, **changes: Any
) -> DPLoRATrainer:
    tokenizer = tiny_models.make_tokenizer()
    args = make_args(folder, **changes)
    encoded = encode(records, tokenizer, spec)
    return DPLoRATrainer(model, args, encoded, processing_class=tokenizer, spec=spec, plan=plan)


class FixedBatches:
    """Collates once, so that the trainer and the slow loop see the same masked words; rows are cut from it."""

    def __init__(self, collator: Callable[[list[Example]], Batch], examples: list[Example]) -> None:
        self.rows = {id(e): i for i, e in enumerate(examples)}
        self.lengths = [len(e.input_ids) for e in examples]
        self.whole = collator(examples)

    def __call__(self, examples: list[Example]) -> Batch:
        rows = [self.rows[id(e)] for e in examples]
        longest = max(self.lengths[row] for row in rows)
        batch = {key: value[rows] for key, value in self.whole.items()}
        per_token = ("input_ids", "attention_mask", "weights")
        for key in per_token + (("targets",) if "weights" in batch else ()):
            if key in batch:
                batch[key] = batch[key][:, :longest]
        return batch


def engine_sum(trainer: DPLoRATrainer, examples: list[Example]) -> Tensor:
    """What one real training step leaves in `.grad`, times the divisor: the clipped sum, as the plan has no noise."""
    trainer.create_optimizer_and_scheduler(3)
    trainer._snapshot = None  # no optimiser steps here, so nothing has to move between two calls
    trainer._run = trainer._open(None, n_seen=0)
    trainer._engine = trainer.plan.attach(trainer.model)
    try:
        loss = trainer.training_step(trainer.model, trainer._cut(examples))
    finally:
        trainer._engine.detach()
        trainer._engine = None
    assert float(loss) == 0.0
    return flat_gradient(trainer.model) * trainer.plan.divisor


def flat_gradient(model: Any) -> Tensor:
    found = [p.grad.reshape(-1) for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return torch.cat(found)


def slow_sum(trainer: DPLoRATrainer, examples: list[Example]) -> tuple[Tensor, list[float]]:
    """One patient at a time, one record at a time, without padding; returns the sum and each patient's norm."""
    model = trainer.model.train()
    total: Tensor | None = None
    norms: list[float] = []
    for unit in sorted({e.unit for e in examples}):
        model.zero_grad()
        for example in (e for e in examples if e.unit == unit):
            batch = trainer.data_collator([example])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            per_record_loss(logits, batch, trainer.spec)[0].backward()
        gradient = flat_gradient(model).double()
        norm = float(gradient.norm())
        clipped = gradient * min(1.0, trainer.plan.clip_norm / norm)
        total = clipped if total is None else total + clipped
        norms.append(norm)
    assert total is not None
    return total, norms


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def compare(trainer: DPLoRATrainer, *, clip_some: bool = False) -> None:
    """Assert that step and slow loop agree; `clip_some` sets the clip norm between the norms of the patients."""
    examples = list(trainer.train_dataset)
    trainer.data_collator = FixedBatches(trainer.data_collator, examples)
    cuts = [cut for group in trainer._cut(examples) for cut in group]
    assert len(cuts) > 1 and max(len(cut) for cut in cuts) > 1
    if clip_some:
        _, norms = slow_sum(trainer, examples)
        trainer.plan = replace(trainer.plan, clip_norm=float(np.median(norms)))
    got = engine_sum(trainer, examples)
    expected, norms = slow_sum(trainer, examples)
    assert trainer.plan.clip_norm < max(norms)
    assert clip_some == (trainer.plan.clip_norm > min(norms))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(("kind", "task"), CASES)
@pytest.mark.parametrize("clip_some", [False, True], ids=["clip-all", "clip-some"])
def test_clipped_sums_equal_a_loop_over_single_patients(
    kind: tiny_models.Kind, task: TaskKind, clip_some: bool, tmp_path: Path
) -> None:
    model = with_lora(tiny_models.make_model(kind, task, initializer_range=0.1), task)
    spec = make_spec(task)
    trainer = make_trainer(tmp_path, model, spec, make_records(label=bool(spec.labels)), make_plan(clip_norm=0.01))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in name for name in trainable) == (task == "classification")
    compare(trainer, clip_some=clip_some)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_clipped_sums_with_several_labels_per_record(kind: tiny_models.Kind, tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model(kind, "classification", initializer_range=0.1), "classification")
    spec = make_spec("classification", multi_label=True)
    compare(make_trainer(tmp_path, model, spec, make_records(multi_label=True), make_plan()))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_clipped_sums_with_mean_pooling(kind: tiny_models.Kind, multi_label: bool, tmp_path: Path) -> None:
    backbone: Any = tiny_models.make_model(kind).base_model
    config = MeanPoolingConfig(backbone=backbone.config.to_dict(), num_labels=3)
    model = with_lora(MeanPoolingClassifier(config, backbone), "classification")
    spec = make_spec("classification", multi_label=multi_label, pooling="mean")
    compare(make_trainer(tmp_path, model, spec, make_records(multi_label=multi_label), make_plan()))


def test_clipped_sums_with_labels_as_text_and_weights(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    spec = make_spec("causal_lm", labels=LABELS, completion_weight=3.0)
    compare(make_trainer(tmp_path, model, spec, make_records(), make_plan()))


def test_clipped_sums_where_texts_fall_into_windows(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("llama"), "causal_lm")
    spec = make_spec("causal_lm", max_length=16)
    trainer = make_trainer(tmp_path, model, spec, make_records(label=False), make_plan())
    assert trainer.train_dataset.n_records_cut > 0
    compare(trainer)


def test_the_comparison_sees_a_patient_that_is_split_over_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(tiny_models.make_model("llama"), "causal_lm")
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), make_plan())
    monkeypatch.setattr(trainer, "_cut", lambda examples: LogicalBatch([[[e]] for e in examples]))
    examples = list(trainer.train_dataset)
    got, (expected, _) = engine_sum(trainer, examples), slow_sum(trainer, examples)
    assert relative_error(got, expected) > 1e-2


def test_the_comparison_sees_a_mean_in_place_of_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_models.make_model("llama"), "causal_lm")
    plan = make_plan(clip_norm=1e6)
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), plan)
    monkeypatch.setattr("dpmed.trainers.base.record_losses", lambda *a: record_losses(*a) / a[1]["input_ids"].shape[0])
    examples = list(trainer.train_dataset)
    got, (expected, _) = engine_sum(trainer, examples), slow_sum(trainer, examples)
    assert relative_error(got, expected) > 1e-2


@pytest.mark.parametrize("kind", ["albert", "gpt2", "llama"])
def test_the_sum_does_not_depend_on_the_micro_batches(kind: tiny_models.Kind, tmp_path: Path) -> None:
    task: TaskKind = "masked_lm" if kind in tiny_models.ENCODERS else "causal_lm"
    model = with_lora(tiny_models.make_model(kind), task)
    trainer = make_trainer(tmp_path, model, make_spec(task), make_records(label=False), make_plan())
    examples = list(trainer.train_dataset)
    trainer.data_collator = FixedBatches(trainer.data_collator, examples)
    sums: list[Tensor] = []
    n_cuts: list[int] = []
    for tokens in (1, 80, 150, 10_000):
        trainer.args.micro_batch_tokens = tokens
        n_cuts.append(sum(map(len, trainer._cut(examples))))
        sums.append(engine_sum(trainer, examples))
    assert n_cuts[0] == len(UNITS) and n_cuts[-1] == 1 and len(set(n_cuts)) >= 3
    for other in sums[1:]:
        assert relative_error(other, sums[0].double()) < 1e-5


def test_the_sum_does_not_depend_on_the_order_of_the_draw(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), make_plan())
    examples = list(trainer.train_dataset)
    forward = engine_sum(trainer, examples)
    assert relative_error(engine_sum(trainer, examples[::-1]), forward.double()) < 1e-5


def test_one_more_patient_changes_the_sum_by_at_most_the_clip_norm(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("bert", "classification"), "classification")
    trainer = make_trainer(tmp_path, model, make_spec("classification"), make_records(), make_plan())
    examples = list(trainer.train_dataset)
    whole = engine_sum(trainer, examples)
    for unit in range(N_UNITS):
        rest = engine_sum(trainer, [e for e in examples if e.unit != unit])
        assert 0 < float((whole - rest).norm()) <= trainer.plan.clip_norm * (1 + 1e-4)


def test_the_divisor_is_the_expected_batch_and_not_the_draw(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    plan = make_plan(expected_batch_units=5)
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), plan)
    few = [e for e in trainer.train_dataset if e.unit == 0]
    engine_sum(trainer, few)
    expected, _ = slow_sum(trainer, few)
    engine_sum(trainer, few)
    assert relative_error(flat_gradient(trainer.model), expected / 5) < 1e-5


def test_the_harmless_warning_about_hooks_is_silent_and_no_other(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("bert", "classification"), "classification")
    trainer = make_trainer(tmp_path, model, make_spec("classification"), make_records(), make_plan())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine_sum(trainer, list(trainer.train_dataset))
        warnings.warn("still heard", UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["still heard"]


def test_an_uncovered_head_or_norm_is_refused_by_name(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("llama"), "causal_lm")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), make_plan())
    with pytest.raises(PrivacyError, match=r"norm\.weight"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_classifier_head_outside_modules_to_save_is_still_protected(tmp_path: Path) -> None:
    """The fault of a published package: the head trained with its raw gradient."""
    model = with_lora(tiny_models.make_model("bert", "classification"), "classification")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name and "original" not in name)
    plan = make_plan(noise_multiplier=1.0)
    trainer = make_trainer(tmp_path, model, make_spec("classification"), make_records(), plan)
    drawn: list[int] = []
    noise = trainer._noise.add_
    trainer._noise.add_ = lambda flat: drawn.append(flat.numel()) or noise(flat)  # type: ignore[method-assign]
    trainer.train()
    assert drawn == [32 * 3 + 3] * 3


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_accumulation_steps": 2},
        {"neftune_noise_alpha": 5.0},
        {"use_liger_kernel": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        {"auto_find_batch_size": True},
        {"torch_compile": True},
        {"dataloader_num_workers": 1},
    ],
)
def test_settings_that_break_the_guarantee_are_refused_by_name(setting: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.make_model("gpt2")
    args = make_args(tmp_path)
    for name, value in setting.items():
        setattr(args, name, value)
    with pytest.raises(InputError, match=next(iter(setting))):
        DPLoRATrainer(model, args, make_records(label=False), processing_class=tiny_models.make_tokenizer())


def test_the_patient_column_is_required(tmp_path: Path) -> None:
    args = make_args(tmp_path, unit_column=None)
    with pytest.raises(InputError, match="unit_column"):
        DPLoRATrainer(
            tiny_models.make_model("gpt2"), args, make_records(), processing_class=tiny_models.make_tokenizer()
        )


def test_a_plan_for_other_data_is_refused(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    with pytest.raises(PrivacyError, match="plan is for 7 patients"):
        make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), make_plan(n_units=7))


def test_without_a_plan_the_config_is_calibrated_for_the_patients_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    spec, tokenizer = make_spec("causal_lm"), tiny_models.make_tokenizer()
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("dpmed.privacy.accounting.calibrate", lambda **values: asked.append(values) or 1.5)
    args = make_args(tmp_path, target_epsilon=6.0, expected_batch_units=3, num_train_epochs=2)
    trainer = DPLoRATrainer(model, args, encode(make_records(), tokenizer, spec), processing_class=tokenizer, spec=spec)
    assert (trainer.plan.n_units, trainer.plan.n_steps, trainer.plan.unit) == (N_UNITS, 4, "unit")
    assert trainer.args.max_steps == 4
    assert trainer.plan.noise_multiplier == 1.5
    assert asked == [{"target_epsilon": 6.0, "delta": N_UNITS**-1.1, "sampling_rate": 0.5, "n_steps": 4}]


def test_steps_are_planned_from_patients_and_not_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpmed.privacy.accounting.calibrate", lambda **_: 1.0)  # takes seconds, and has its own tests
    assert planned_steps(3, n_units=100, expected_batch_units=10) == 30
    assert planned_steps(0.01, n_units=10, expected_batch_units=10) == 1
    args = make_args(Path("unused"), max_steps=7, expected_batch_units=4, target_epsilon=5.0)
    assert plan_for(args, n_units=40, unit="patient").n_steps == 7


def test_a_second_run_of_the_same_trainer_is_refused_since_it_would_not_be_charged(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    plan = make_plan(noise_multiplier=1.0, n_steps=2)
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), plan)
    trainer.train()
    with pytest.raises(PrivacyError, match="has run already"):
        trainer.train()
    assert trainer.privacy_spent()["n_steps"] == 2


def test_outside_of_train_there_is_no_step(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), make_plan())
    with pytest.raises(PrivacyError, match="call train"):
        trainer.training_step(trainer.model, LogicalBatch())


def test_the_draws_come_from_the_plan_and_cap_the_windows_of_a_patient(tmp_path: Path) -> None:
    model = with_lora(tiny_models.make_model("gpt2"), "causal_lm")
    plan = make_plan(expected_batch_units=N_UNITS, max_records_per_unit=2)
    trainer = make_trainer(tmp_path, model, make_spec("causal_lm"), make_records(label=False), plan)
    encoded: EncodedRecords = trainer.train_dataset
    assert max(np.bincount(encoded.unit_of_example)) == 3
    for logical in trainer.get_train_dataloader():
        units = [e.unit for group in logical for micro in group for e in micro]
        assert sorted(set(units)) == list(range(N_UNITS))  # rate 1: everybody
        assert max(np.bincount(units)) == 2
