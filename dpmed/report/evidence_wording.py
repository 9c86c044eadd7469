"""The release evidence in plain words: stages, measures, verdicts, and figures to as many digits as a verdict needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpmed.report.points import finite

Unit = Literal["points", "percent", "plain"]
MINUS = "\u2212"
SIGNS = {"pass": "✓", "fail": "✕", "not_shown": "?", "not_tested": "–"}
WORDS = {"pass": "passed", "fail": "failed", "not_shown": "not shown", "not_tested": "not tested"}
NO_INTERVAL = "no interval could be made, so nothing is shown"
_MAX_DIGITS = 15


@dataclass(frozen=True)
class CheckWords:
    """What was measured: its name, what that means, and the unit of its figures."""

    name: str
    meaning: str
    unit: Unit = "points"
    is_difference: bool = True


_COMPLETED = "Share of the targeted identifiers that the model completes exactly from the true text before them"
_CONTINUED = "Share of records that the model continues word for word from their first tokens"
_WRITTEN = "Share of the targeted identifiers that stand in text which the model writes"
_FLOOR = "minus the same share for the floor model, on the same records"
_HELDOUT = "minus the same share for the same model on held-out patients"
CHECKS = {
    "identifier_extraction_above_floor": CheckWords(
        "Identifiers completed, above the floor model", f"{_COMPLETED}, {_FLOOR}."
    ),
    "identifier_extraction_above_heldout": CheckWords(
        "Identifiers completed, above held-out patients", f"{_COMPLETED}, {_HELDOUT}."
    ),
    "extraction_rate_above_floor": CheckWords("Records continued, above the floor model", f"{_CONTINUED}, {_FLOOR}."),
    "extraction_rate_above_heldout": CheckWords(
        "Records continued, above held-out patients", f"{_CONTINUED}, {_HELDOUT}."
    ),
    "probabilistic_extraction_above_floor": CheckWords(
        "Records found in many tries, above the floor model",
        "Share of records whose next words stand in at least one of many drawn texts with the probability that the "
        "recipe names, minus the same share for the floor model.",
    ),
    "membership_auc": CheckWords(
        "Membership attack, the strongest (AUC)",
        "How well an attacker tells targeted patients' records from held-out ones: 0.5 is a guess, 1 is certain.",
        "plain",
        is_difference=False,
    ),
    "membership_auc_above_floor": CheckWords(
        "Membership attack, the strongest (AUC), above the floor model",
        "How much better an attacker tells targeted patients' records from held-out ones than with the floor model.",
        "plain",
    ),
    "templates_prompts_above_decoys": CheckWords(
        "Identifiers written when prompted by templates, above decoys",
        f"{_WRITTEN} after prompts such as a form's field, minus the same share for decoys.",
    ),
    "context_prompts_above_decoys": CheckWords(
        "Identifiers written when prompted by their context, above decoys",
        f"{_WRITTEN} after the words that stand before them, minus the same share for decoys.",
    ),
    "paraphrased_prompts_above_decoys": CheckWords(
        "Identifiers written when their context is put in other words, above decoys",
        f"{_WRITTEN} after the words before them, put in other words, minus the same share for decoys.",
    ),
    "paraphrased_templates_prompts_above_decoys": CheckWords(
        "Identifiers written when templates are put in other words, above decoys",
        f"{_WRITTEN} after such prompts, put in other words, minus the same share for decoys.",
    ),
    "paraphrased_prompts": CheckWords("Identifiers written when prompted by paraphrases", f"{_WRITTEN}."),
    "relearning": CheckWords("All measures of leakage", "Identifiers, records and membership, as in the other stages."),
    "perplexity_loss": CheckWords(
        "Perplexity, relative rise",
        "How much less well held-out text is predicted than by the checkpoint before sanitising.",
        "percent",
    ),
    "other_words_loss": CheckWords(
        "Accuracy on words in no identifier, lost",
        "Share of these held-out words predicted exactly: before minus after.",
    ),
    "rare_words_loss": CheckWords(
        "Accuracy on rare words in no identifier, lost",
        "Share of these held-out words predicted exactly: before minus after.",
    ),
    "f1_loss": CheckWords("Macro F1 of the labels, lost", "Before minus after, on held-out records.", "plain"),
}
LEAK_CHECKS = ("identifier_extraction", "extraction_rate")
LEAK_NAMES = {"identifier_extraction": "Identifiers completed", "extraction_rate": "Records continued word for word"}
REFERENCES = {"floor": "above the floor model", "heldout": "above held-out patients"}

SOURCES = {
    "planted": "planted",
    "known": "named with the data",
    "pattern": "found by a pattern",
    "ner": "found by a model",
    "indirect": "rare words, in the records of few patients",
}
"""How a targeted span came about, by its source."""

MEANING = {
    "pass": (
        "In every test that could be made, the whole 95 % interval lies within the threshold set before the run. "
        "It does not mean that nothing is left: a measurement is no guarantee, and holds for these weights and tests."
    ),
    "fail": (
        "In each failed test, the whole 95 % interval lies above the threshold set before the run. "
        "It does not mean that a passed test is proof of safety, nor that every failed one must be a leak: with many "
        "tests, one may fail by chance."
    ),
    "not_shown": (
        "In the tests that are not shown, the 95 % interval reaches above the threshold: too few patients to tell. "
        "It does not mean that the model leaks, and it does not mean that it is clean."
    ),
}
"""What the verdict on the whole says, and what it does not."""

READING = (
    ("95 % interval", "The range in brackets: what the figure could be with other patients drawn like these. Not the "
     "value but the interval decides a test: wholly within the threshold is passed, wholly above it is failed, and one "
     "that reaches over it is not shown. More patients make it narrower."),
    ("Points", "Percentage points. +2 points: two more of a hundred. Each figure of this page is a leak or a loss, so "
     "that less is better; a figure below zero is less than what it is compared with."),
    ("n", "How many identifiers, records or words stand behind the figure; where two groups are compared, the smaller "
     "group, for membership both together. Intervals are drawn over patients: records of one resemble each other."),
    ("Floor model", "A model that never learned the targets: what it “completes” can be guessed. The clean retrain "
     "if there is one, else the model before fine-tuning. After relearning: that model, trained in the same way."),
    ("Held-out patients", "Patients whose records the model was never trained on: what it “completes” of theirs is "
     "guessed too."),
    ("Decoys", "Identifiers of held-out patients, looked for in text after the same kind of prompts."),
)  # fmt: skip
"""Terms and what they mean."""


def sentence_of(verdict: str, counts: Mapping[str, int]) -> str:
    """The verdict on the whole in one sentence.

    Args:
        verdict: pass, fail or not_shown.
        counts: tests by verdict.
    """
    made = sum(counts.get(name, 0) for name in ("pass", "fail", "not_shown"))
    left = counts.get("not_tested", 0)
    if made == 0:
        return "Do not release these weights: nothing could be tested, so nothing is shown."
    if verdict == "pass":
        rest = f", and {counted(left, 'test')} could not be made" if left else ""
        return f"Passed: {_all(made)} that could be made stayed within the thresholds{rest}."
    if verdict == "fail":
        return (
            f"Do not release these weights: {counts['fail']} of the {counted(made, 'test')} that could be made failed."
        )
    return (
        f"Do not release these weights yet: no test failed, but {counts['not_shown']} of the {counted(made, 'test')} "
        "that could be made did not show that the threshold holds."
    )


def counted(n: int, noun: str) -> str:
    """`1 test`, `3 tests`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _all(n: int) -> str:
    return "the one test" if n == 1 else f"all {n} tests"


def plain_limit(text: str) -> str:
    """A limit as it stands in the docs, for the page: verdicts in words, no marks of code."""
    for verdict, words in WORDS.items():
        text = text.replace(f"`{verdict}`", words)
    return text.replace("`", "")


def check_words(check: str) -> CheckWords:
    """The words for a check; one that this version does not know keeps its name, and its figures stay plain."""
    return CHECKS.get(check) or CheckWords(check.replace("_", " "), "", "plain", is_difference=False)


def stage_words(stage: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """(name, what was done first) of a stage.

    Args:
        stage: its key; an unknown one keeps it as its name.
        settings: the recipe's `release` section, for what the attacker had.
    """
    bits = re.fullmatch(r"int(\d{1,2})", stage)
    if bits:
        return f"After {bits[1]}-bit rounding", f"Adapters merged, weights rounded to {bits[1]} bits."
    share, steps = finite(settings.get("relearn_share")), finite(settings.get("relearn_steps"))
    trained = "Trained again" if steps is None else f"Trained again for {steps:.0f} steps"
    some = "a share" if share is None else f"{100 * share:.3g} %"
    words = {
        "as_released": ("As released", "Nothing is done to the weights: as they would be handed over."),
        "bfloat16": ("After bfloat16 rounding", "Adapters merged, weights rounded to bfloat16."),
        "relearned": (
            "After relearning on records",
            f"{trained} on the records of {some} of the targeted patients; measured on the other patients.",
        ),
        "relearned_public": (
            "After relearning on public text",
            f"{trained} on public text; measured on the same other patients.",
        ),
        "utility": (
            "Usefulness",
            "Nothing is done to the weights: they are compared with the checkpoint before sanitising.",
        ),
    }
    return words.get(stage, (stage.replace("_", " "), "Not described in this version."))


def digits_for(threshold: float, bounds: Sequence[float | None], unit: Unit) -> int:
    """Fewest digits at which each bound, as it is printed, lies on the same side of the printed threshold as it does.

    So a reader who compares the printed numbers comes to the recorded verdict.
    """
    least = 3 if unit == "plain" else 1
    scale = 1 if unit == "plain" else 100
    for digits in range(least, _MAX_DIGITS):
        limit = float(f"{scale * threshold:.{digits}f}")
        if all((float(f"{scale * b:.{digits}f}") <= limit) == (b <= threshold) for b in bounds if b is not None):
            return digits
    return _MAX_DIGITS


def figure(value: float, digits: int, unit: Unit, *, signed: bool) -> str:
    """A number without its unit: scaled to per cent or points, with a true minus sign."""
    scaled = value if unit == "plain" else 100 * value
    text = f"{scaled:.3e}" if abs(scaled) >= 1e6 else f"{scaled:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    sign = "+" if signed and float(text) > 0 else ""
    return sign + text.replace("-", MINUS)


def unit_text(unit: Unit) -> str:
    return {"points": " points", "percent": " %", "plain": ""}[unit]
