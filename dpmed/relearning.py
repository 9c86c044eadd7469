"""The relearning attack: a short fine-tuning, and what comes back of records that it never saw.

A model that only suppresses what it knows gives it back after a few steps on related text (arXiv 2406.13356). Two
attackers are simulated: one who holds the records of a share of the forgotten patients, and one who has public text
only. Leakage is then measured on the records of the OTHER patients. A model that never saw any of these records is
trained in the same way, since the attack itself teaches the form of the records.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from dpmed.data.sources import read_texts
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.intervals import dense_units
from dpmed.trainers.full import FullTrainer, FullTrainingConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def relearning_sides(records: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split records by patient into what the attacker trains on and what leakage is measured on.

    Args:
        records: the forgotten records, with `unit`.
        share: of the patients that the attacker holds; at least one of them, and never all.
        seed: of the choice.

    Raises: InputError with fewer than two patients.
    """
    units, n_units = dense_units(np.asarray(records["unit"], dtype=str))
    if n_units < 2:
        raise InputError("data.train: a relearning attack needs the records of at least 2 patients; name data.unit")
    held = min(max(1, round(share * n_units)), n_units - 1)
    chosen = np.isin(units, np.random.default_rng(seed).permutation(n_units)[:held])
    mine, others = (records.select(np.flatnonzero(which), keep_in_memory=True) for which in (chosen, ~chosen))
    return mine, others


def public_records(path: str | Path) -> Dataset:
    """Texts of a file, a blank line between two, as records without identifiers.

    Raises: InputError if the file cannot be read or holds no text.
    """
    empty = "holds no text; name a file of public text, or null"
    texts = read_texts(path, key="release.public_text", separator="\n\n", empty=empty)
    return Dataset.from_dict({"text": texts, "unit": [f"text-{i}" for i in range(len(texts))]})


def relearn(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    records: Dataset,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """Fine-tune all weights for some steps, in place: the attacker's training.

    Args:
        model: a plain language model, on the device to train on; merge adapters first.
        tokenizer: of the model.
        spec: the task; labels are left out, since the attack is on text.
        records: what the attacker holds.
        steps: optimizer steps, at a constant learning rate.
        learning_rate: of AdamW.
        batch_size: windows per step.
        seed: of order and masks.

    Returns: the same model, in evaluation mode.
    Raises: InputError for a classification task.
    """
    if spec.kind == "classification":
        raise InputError("a relearning attack trains a language model; a classifier gives no text")
    spec = replace(spec, labels=(), loss_on="all")
    model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:  # the trainer asks for one and writes nothing into it
        args = FullTrainingConfig(
            output_dir=folder,
            task=spec.kind,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        FullTrainer(model, args, encode(records, tokenizer, spec), None, tokenizer, spec=spec).train()
    return model.eval()
