"""How each column trains a workload: real trainers with their own defaults, and Opacus' ghost clipping in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rows import Column, Job
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer, TrainingArguments
from workloads import Workload

from dpmed.data.batches import Batch, Collator, per_record_loss
from dpmed.data.tasks import EncodedRecords, Example
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.lora import LoRATrainer, LoRATrainingConfig

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 1e-4


def train(work: Workload, job: Job, folder: str) -> None:
    """Run all steps of a job, those of the warm-up first; files go to `folder`."""
    runs: dict[Column, Callable[[Workload, Job, str], None]] = {
        "plain": _plain,
        "lora": _lora,
        "one_pass": lambda w, j, f: _dp(w, j, f, engine="one_pass", records_per_unit=1),
        "patients": lambda w, j, f: _dp(w, j, f, engine="one_pass", records_per_unit=j.row.records_per_unit),
        "opacus": lambda w, j, f: _dp(w, j, f, engine="opacus", records_per_unit=1),
        "ghost": _ghost,
    }
    runs[job.column](work, job, folder)


def _common(job: Job, folder: str) -> dict[str, Any]:
    """Arguments of every trainer: quiet, on the chosen device, otherwise transformers' defaults."""
    return {
        "output_dir": folder,
        "use_cpu": job.settings.device == "cpu",
        "bf16": job.row.cuda,
        "max_steps": job.n_steps,
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": job.batch,
        "logging_steps": 500,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # there are none; spares the baseline a copy of each example
        "seed": job.repetition,
    }


def _plain(work: Workload, job: Job, folder: str) -> None:
    """What a user has today. The records are a list in memory, the fastest that a Trainer can be given."""
    pad = DataCollatorWithPadding(work.tokenizer)
    shifted = DataCollatorForLanguageModeling(work.tokenizer, mlm=False)
    records: Any = [_features(example, work) for example in work.examples]
    Trainer(
        model=work.model,
        args=TrainingArguments(**_common(job, folder)),
        train_dataset=records,
        data_collator=pad if work.spec.kind == "classification" else shifted,
        processing_class=work.tokenizer,
    ).train()


def _features(example: Example, work: Workload) -> dict[str, Any]:
    features: dict[str, Any] = {"input_ids": example.input_ids, "attention_mask": [1] * len(example.input_ids)}
    if isinstance(example.label, tuple):
        features["labels"] = [float(i in example.label) for i in range(len(work.spec.labels))]
    return features


def _lora(work: Workload, job: Job, folder: str) -> None:
    args = LoRATrainingConfig(task=work.spec.kind, **_common(job, folder))
    LoRATrainer(work.model, args, _encoded(work), processing_class=work.tokenizer, spec=work.spec).train()


def _dp(work: Workload, job: Job, folder: str, *, engine: Any, records_per_unit: int) -> None:
    """Fixed lengths: every unit in every draw, so that a step is one micro-batch of exactly `batch` records."""
    row = job.row
    records = _encoded(work, records_per_unit=records_per_unit)
    n_units = len(records.unit_names)
    plan = PrivacyPlan(
        unit="patient",
        n_units=n_units,
        expected_batch_units=n_units if row.draw is None else row.draw // records_per_unit,
        max_records_per_unit=records_per_unit,
        clip_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        n_steps=job.n_steps,
        delta=0.1 / n_units,
        engine=engine,
    )
    tokens = row.micro_batch_tokens or job.batch * work.spec.max_length
    buffer = {} if row.draw else {"buffer_mib": 1 << 16}  # nothing may cut the one micro-batch in two
    args = DPLoRATrainingConfig(
        task=work.spec.kind,
        unit_column="unit",
        ledger="none",
        micro_batch_tokens=tokens,
        **buffer,
        **_common(job, folder),
    )
    DPLoRATrainer(work.model, args, records, processing_class=work.tokenizer, spec=work.spec, plan=plan).train()


def _encoded(work: Workload, *, records_per_unit: int = 1) -> EncodedRecords:
    """The examples, in their order `records_per_unit` to a unit: made-up patients."""
    units = [i // records_per_unit for i in range(len(work.examples))]
    examples = [replace(e, unit=u) for e, u in zip(work.examples, units, strict=True)]
    return EncodedRecords(examples, [f"unit {u}" for u in range(units[-1] + 1)], len(examples))


def _ghost(work: Workload, job: Job, folder: str) -> None:
    """Opacus' own objects and nothing else: two backward passes, norms without gradients in between.

    `DPTensorFastGradientClipping` is what Opacus' loss wrapper makes of the losses per record; built here directly, it
    also takes losses that the wrapper does not, such as a mean over labels.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    device = torch.device(job.settings.device)
    clip: Any = CLIP_NORM  # Opacus' annotation says int
    model = GradSampleModuleFastGradientClipping(
        work.model.to(device).train(), strict=False, max_grad_norm=clip, use_ghost_clipping=True
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = DPOptimizerFastGradientClipping(
        torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=job.batch,
    )
    batches = _batches(work, job)
    for _ in range(job.n_steps):
        batch = {key: value.to(device) for key, value in next(batches).items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.row.cuda):
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            losses = per_record_loss(outputs.logits, batch, work.spec)
        DPTensorFastGradientClipping(model, optimizer, losses, loss_reduction="mean").backward()
        optimizer.step()
        optimizer.zero_grad()


def _batches(work: Workload, job: Job) -> Iterator[Batch]:
    """Random batches for ever."""
    examples: Any = work.examples
    collator: Any = Collator(work.tokenizer, work.spec)
    loader = DataLoader(examples, batch_size=job.batch, shuffle=True, drop_last=True, collate_fn=collator)
    while True:
        yield from loader
