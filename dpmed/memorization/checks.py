"""What an evaluation refuses because its figures would mislead, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from scipy.stats import ks_2samp
from torch import nn

from dpmed.data.records import normalised_text
from dpmed.data.tasks import EncodedRecords, TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.generation import context_size
from dpmed.memorization.intervals import Measure
from dpmed.recipe import EvaluationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_RECORDS = 30
DIFFERENT = 0.001
"""p-value of a Kolmogorov-Smirnov test below which the two sides are said to differ in length or date."""


def check_settings(settings: EvaluationSection) -> None:
    """Refuse settings that no figure can be computed from.

    Raises: InputError naming the key.
    """
    for name in ("prefix_tokens", "suffix_tokens", "tries"):
        numbers = getattr(settings, name)
        if not numbers or min(numbers) < 1:
            raise InputError(f"evaluation.{name} is {numbers}; give one or more numbers of at least 1")
    for name in ("fpr", "probability"):
        if any(not 0 < rate < 1 for rate in getattr(settings, name)):
            raise InputError(f"evaluation.{name} is {getattr(settings, name)}; give numbers between 0 and 1")
    if not settings.probability:
        raise InputError("evaluation.probability is empty; give one or more numbers between 0 and 1")
    if not 0 < settings.min_k <= 1:
        raise InputError(f"evaluation.min_k is {settings.min_k}; give a share above 0 and at most 1")
    if not 0 < settings.temperature < float("inf"):
        raise InputError(f"evaluation.temperature is {settings.temperature}; give a number above 0")
    for name in ("batch_tokens", "bootstrap", "span_tokens", "span_patients", "canary_candidates"):
        if getattr(settings, name) < 1:
            raise InputError(f"evaluation.{name} is {getattr(settings, name)}; give a number of at least 1")
    if settings.generate_tokens < 0:
        raise InputError(f"evaluation.generate_tokens is {settings.generate_tokens}; give a budget, or 0 for none")
    for name in ("max_records", "top_k"):
        number = getattr(settings, name)
        if number is not None and number < 1:
            raise InputError(f"evaluation.{name} is {number}; give a number of at least 1, or null")


def check_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, spec: TaskSpec, settings: EvaluationSection
) -> None:
    """Refuse a model without tokenizer, and a causal one whose context has no room for a prefix and a suffix.

    Raises: InputError.
    """
    if tokenizer is None:
        raise InputError("no tokenizer was given; load the model's own, from the folder of the model or of its base")
    context = context_size(model)
    prefix, suffix = max(settings.prefix_tokens), max(settings.suffix_tokens)
    if spec.kind == "causal_lm" and context is not None and prefix + suffix > context:
        raise InputError(
            f"evaluation.prefix_tokens {prefix} + evaluation.suffix_tokens {suffix} is more than the model's context "
            f"of {context} tokens; choose less"
        )


def check_records(train: Dataset, heldout: Dataset) -> None:
    """Refuse an empty side, and texts that are on both sides: they would be members and non-members.

    Raises: InputError with counts, never a text.
    """
    for name, records in (("train", train), ("heldout", heldout)):
        if len(records) == 0:
            raise InputError(f"{name}: no records to evaluate; check data.{name}")
    texts = {normalised_text(text) for text in train["text"]}
    shared = sum(normalised_text(text) in texts for text in heldout["text"])
    if shared:
        raise InputError(
            f"heldout: {shared} of {len(heldout)} records have a text that is also in train; drop them (recipe key "
            "data.on_overlap: drop), or split anew"
        )


def check_dates(train: Dataset, heldout: Dataset, settings: EvaluationSection) -> None:
    """Refuse to match records by date that have none.

    Raises: InputError naming the key.
    """
    if settings.match_dates and not all("date" in records.column_names for records in (train, heldout)):
        raise InputError("evaluation.match_dates: the records have no dates; name their column (data.date)")


def record_days(records: Dataset) -> np.ndarray:
    """The day of each record, counted from the year 1 [r]."""
    return np.array([date.fromisoformat(day).toordinal() for day in records["date"]], dtype=np.int64)


def check_tokens(model: nn.Module, encoded: EncodedRecords, what: str) -> None:
    """Refuse token ids that the model does not know, and windows longer than its context.

    Args:
        what: "the model" or "the base model".

    Raises: InputError.
    """
    get = getattr(model, "get_input_embeddings", None)
    known = getattr(get() if get is not None else None, "num_embeddings", None)
    highest = max((max(e.input_ids, default=0) for e in encoded), default=0)
    if known is not None and highest >= known:
        raise InputError(
            f"the tokenizer gives token id {highest} where {what} knows {known} tokens: it is the tokenizer of another "
            "model; load the model's own"
        )
    context, longest = context_size(model), max(encoded.lengths, default=0)
    if context is not None and longest > context:
        raise InputError(f"data.max_length: a window has {longest} tokens, {what} can see {context}; choose less")


def warnings_of(
    encoded: Mapping[str, EncodedRecords],
    memorization: Mapping[str, Any],
    settings: EvaluationSection,
    days: Sequence[np.ndarray] = (),
) -> list[str]:
    """What a reader must know before believing the figures.

    Args:
        encoded: the two sides by name, members first.
        memorization: the figures, as `Measure`.
        settings: whether the attacks compared equally many records of each length, or date.
        days: of the records of both sides (`record_days`), where they have dates.
    """
    found = [
        f"{name}: only {side.n_records} records; the intervals are wide"
        for name, side in encoded.items()
        if side.n_records < FEW_RECORDS
    ]
    compared = {"length": [text_tokens(side) for side in encoded.values()], "date": days}
    for name, sides in compared.items():
        key = f"match_{name}s"
        if sides and not getattr(settings, key) and float(np.asarray(ks_2samp(*sides))[1]) < DIFFERENT:  # the p-value
            found.append(
                f"train and held-out records differ in {name}: membership attacks may tell the two sides apart by that"
                f" alone; set evaluation.{key}"
            )
    auc = memorization["membership_auc"]
    if isinstance(auc, Measure) and auc.high < 0.5:
        found.append(
            "membership AUC is below 0.5: this does not mean more privacy, but that train and held-out records differ"
        )
    return found


def text_tokens(encoded: EncodedRecords) -> np.ndarray:
    """Text tokens of each record [r]."""
    lengths = np.zeros(encoded.n_records, dtype=np.int64)
    for example in encoded:
        lengths[example.record] += example.text_end - example.text_start
    return lengths
