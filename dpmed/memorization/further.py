"""What an evaluation measures beyond the rates of one forward pass, where it was asked for or applies.

Kinds and volume of memorised spans come from the same statistics; multiple-choice items need a pass of their own, and
figures of generated text as many tokens as they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpmed.data.sources import read_texts
from dpmed.memorization.battery import NO_BASE, SEED, Side
from dpmed.memorization.generated_figures import generation_figures
from dpmed.memorization.generation_plan import GenerationSettings
from dpmed.memorization.intervals import NotApplicable
from dpmed.memorization.kinds import TokenTexts, kind_figures, memorized_spans, reference_texts, span_kinds
from dpmed.memorization.leak_differences import Leaked, minus_base, minus_base_and_decoys, minus_decoys
from dpmed.memorization.multiple_choice import choice_figures, load_items, score_choices
from dpmed.memorization.persistence import MemorizedSet, persistence_figures
from dpmed.memorization.statistics import TokenScores, weights_fingerprint
from dpmed.recipe import EvaluationSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

GENERATED = (
    "regurgitation_rate",
    "regurgitation",
    "near_verbatim",
    "prefix_halves",
    "identifier_leak_rate",
    "identifier_leakage",
)
"""Figures of generated text."""
DIFFERENCES = ("minus_decoys", "minus_base_and_decoys")
"""Of leak rates of generated text; `minus_base` holds others too."""
NOT_ASKED = "nothing was generated; set evaluation.generate_tokens"
NO_BEFORE = "no evaluation before was named (--before)"
NO_CHOICES = "no multiple-choice items were named (evaluation.choices)"


def kinds_of(
    side: Side,
    scores: TokenScores,
    base: TokenScores | None,
    reference: TokenTexts | None,
    settings: EvaluationSection,
) -> tuple[dict[str, Any], dict[str, Any], MemorizedSet]:
    """Volume of what a causal model memorised of one side by kind, its counts, and what a later evaluation compares."""
    spans = memorized_spans(scores, side.encoded, min_tokens=settings.span_tokens)
    kinds = span_kinds(spans, side.encoded, base=base, reference=reference, k=settings.span_patients)
    figures, counts = kind_figures(
        scores,
        side.encoded,
        spans,
        kinds,
        has_base=base is not None,
        has_reference=reference is not None,
        bootstrap=settings.bootstrap,
        seed=SEED,
    )
    pairs = [(p, n) for p in settings.prefix_tokens for n in settings.suffix_tokens]
    kept = MemorizedSet.of(scores, side.encoded, spans, pairs=pairs, kinds=kinds, k=settings.span_patients)
    return figures, counts, kept


def persistence_of(before: MemorizedSet | None, now: MemorizedSet, settings: EvaluationSection) -> Any:
    """How much of what an earlier model memorised this one still has."""
    if before is None:
        return NotApplicable(NO_BEFORE)
    return persistence_figures(before, now, bootstrap=settings.bootstrap, seed=SEED)


def read_reference(settings: EvaluationSection, tokenizer: PreTrainedTokenizerBase) -> TokenTexts | None:
    """The user's reference texts. Raises: InputError if the file cannot be read or holds no text."""
    if settings.reference_text is None:
        return None
    empty = "holds no text; name a file of guidelines, or null"
    texts = read_texts(settings.reference_text, key="evaluation.reference_text", separator="\n\n", empty=empty)
    return reference_texts(texts, tokenizer)


def choices_of(
    model: nn.Module,
    base: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSection,
    *,
    folder: Path | None = None,
    fingerprint: Callable[[nn.Module], str] = weights_fingerprint,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, dict[str, int]]:
    """Accuracy on the user's multiple-choice items, and how it holds when options move or go.

    Args:
        folder: private folder for finished batches; None keeps nothing.
        fingerprint: gives a model's `weights_fingerprint`, where it was taken already.
    """
    if settings.choices is None:
        return NotApplicable(NO_CHOICES), {}
    items = load_items(settings.choices)
    asked = [
        None
        if m is None
        else score_choices(
            *(m, tokenizer, items),
            batch_tokens=settings.batch_tokens,
            folder=folder,
            weights=None if folder is None else fingerprint(m),
            progress=progress,
        )
        for m in (model, base)
    ]
    assert asked[0] is not None
    return choice_figures(asked[0], items, base=asked[1], bootstrap=settings.bootstrap, seed=SEED)


def generated_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    members: Dataset,
    others: Dataset,
    settings: EvaluationSection,
    *,
    folder: Path | None,
    weights: str | None,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, dict[str, Leaked]]]:
    """Figures of generated text of both sides, {"memorization", "heldout"}, their counts, and which values leaked."""
    if settings.generate_tokens == 0:
        return not_generated(NOT_ASKED), {}, {}
    asked = GenerationSettings(
        prompt_tokens=tuple(settings.prompt_tokens),
        ngrams=tuple(settings.ngrams),
        new_tokens=settings.new_tokens,
        temperatures=tuple(settings.temperatures),
        max_records=settings.max_records,
        budget_tokens=settings.generate_tokens,
        bootstrap=settings.bootstrap,
        seed=SEED,
    )
    return generation_figures(
        model, tokenizer, members, others, asked, folder=folder, weights=weights, progress=progress
    )


def not_generated(reason: str) -> dict[str, dict[str, Any]]:
    """What stands there where no text was generated."""
    return {side: dict.fromkeys(GENERATED, NotApplicable(reason)) for side in ("memorization", "heldout")}


def leak_differences(
    found: Sequence[Mapping[str, Mapping[str, Leaked]]], settings: EvaluationSection
) -> dict[str, Any]:
    """Leak rates of the model minus its base's, minus those of decoys, and minus both: {name of the difference: tree}.

    Args:
        found: which values leaked, as `generated_of` gives them: of the model and, where there is one, of its base.
    """
    names, own = ("minus_base", *DIFFERENCES), found[0]
    if not own:
        return {name: {"identifier_leakage": NotApplicable(NOT_ASKED)} for name in names}
    resamples: dict[str, Any] = {"bootstrap": settings.bootstrap, "seed": SEED}
    trees: dict[str, Any] = dict.fromkeys(names, NotApplicable(NO_BASE))
    trees["minus_decoys"] = minus_decoys(own["memorization"], own["heldout"], **resamples)
    if len(found) > 1:
        base = {side: minus_base(own[side], found[1][side], **resamples) for side in own}
        trees["minus_base"] = base["memorization"]
        trees["minus_base_and_decoys"] = minus_base_and_decoys(base["memorization"], base["heldout"])
    return {name: {"identifier_leakage": tree} for name, tree in trees.items()}
