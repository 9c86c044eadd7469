"""The records of one run: train, held-out and validation, with nobody on two sides, and the task that they define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from dpmed.data.records import apart, load_records
from dpmed.data.tasks import TaskSpec, label_names

if TYPE_CHECKING:
    from dpmed.recipe import DataSection, Recipe


@dataclass(frozen=True)
class Splits:
    """The records of one run. `n_overlap` held-out records were dropped because they are also in train."""

    train: Dataset
    heldout: Dataset | None
    validation: Dataset | None
    n_overlap: int


def load_splits(data: DataSection, *, require_unit: bool) -> Splits:
    """Load train, held-out and validation records and make sure that no patient or text is on two sides.

    Raises: InputError as `load_records` and `apart` do.
    """

    def read(source: str, split: str) -> Dataset:
        return load_records(
            source,
            text=data.text,
            label=data.label,
            unit=data.unit,
            record_id=data.record_id,
            date=data.date,
            identifiers=data.identifiers,
            multi_label=data.multi_label,
            split=split,
            require_unit=require_unit,
        )

    train = read(data.train, "train")
    heldout = read(data.heldout, "test") if data.heldout else None
    validation = read(data.validation, "validation") if data.validation else None
    drop, dropped = data.on_overlap == "drop", 0
    if heldout is not None:
        heldout, dropped = apart(train, heldout, ("train", "heldout"), drop)
    if validation is not None:  # thresholds of a DP run come from it, so no patient of train may be in it
        validation, _ = apart(train, validation, ("train", "validation"), drop)
        if heldout is not None:
            validation, _ = apart(heldout, validation, ("heldout", "validation"), drop)
    return Splits(train, heldout, validation, dropped)


def task_spec(recipe: Recipe, train: Dataset) -> TaskSpec:
    """The task of a recipe, with the labels of its training records."""
    data = recipe.data
    return TaskSpec(
        kind=recipe.task,
        labels=label_names(train),
        multi_label=data.multi_label,
        max_length=data.max_length,
        prompt=data.prompt,
        loss_on=data.loss_on,
        completion_weight=data.completion_weight,
        pooling=recipe.model.pooling,
        mask_probability=data.mask_probability,
    )


def split_counts(splits: Splits) -> dict[str, int]:
    """How many records and patients each side has."""
    counts: dict[str, int] = {}
    for side, records in (("train", splits.train), ("heldout", splits.heldout)):
        if records is not None:
            counts |= {f"n_{side}_records": len(records), f"n_{side}_units": len(set(records["unit"]))}
    return counts
