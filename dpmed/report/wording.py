"""Numbers and keys in plain words: one place, so that text, tables and figures agree."""

from __future__ import annotations

import re

from dpmed.report.settings import Summary

UTILITY_NAMES = {
    "f1_weighted": "Weighted F1",
    "f1_macro": "Macro F1",
    "f1_micro": "Micro F1",
    "accuracy": "Accuracy",
    "other_words_accuracy": "Accuracy on words in no identifier",
    "perplexity": "Perplexity",
}
LEAK_NAMES = {"identifier_extraction_rate": "Identifier extraction", "extraction_rate": "Record extraction"}
LEAK_SENTENCES = {
    "identifier_extraction_rate": "of the identifiers in the training records",
    "extraction_rate": "of the training records",
}
METHOD_NAMES = {
    "base": "Base model, not fine-tuned",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "dp_lora": "DP-LoRA",
    "sani": "SANI",
    "repair_only": "Repair only",
    "clean_retrain": "Clean retrain",
    "pruning": "Pruning, no repair",
    "rewind": "Rewind, no repair",
    "unlearn": "Unlearning",
    "gradient_ascent": "Gradient ascent",
    "gradient_difference": "Gradient difference",
    "npo": "NPO",
    "task_vector": "Negated task vector",
}
_PERCENT_KEYS = re.compile(r"extraction|_rate|tpr_at_fpr|leak")


def metric_name(dotted: str) -> str:
    """Name of the figure at a dotted key."""
    key = dotted.split(".", 1)[-1]
    match = re.fullmatch(r"membership_tpr_at_fpr_([0-9.]+)", key)
    if match:
        return f"Membership TPR at {100 * float(match[1]):.4g} % FPR"
    names = {**UTILITY_NAMES, **LEAK_NAMES, "membership_auc": "Membership AUC", "canary_exposure": "Canary exposure"}
    names["identifier_leak_rate"] = "Identifier leak rate"
    return names.get(key, key.replace("_", " "))


def is_share(dotted: str) -> bool:
    """Whether the figure is a share of something and so reads best in per cent."""
    return bool(_PERCENT_KEYS.search(dotted))


def number(value: float, dotted: str) -> str:
    """A figure's value: shares in per cent, the rest to three decimals or three digits."""
    if is_share(dotted):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(figure: Summary, dotted: str) -> str:
    """The 95 % interval in brackets; empty if there is none."""
    if figure.low is None or figure.high is None:
        return ""
    if is_share(dotted):
        return f"[{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    digits = 3 if abs(figure.high) < 10 else 1
    return f"[{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def value_with_interval(figure: Summary | None, dotted: str) -> str:
    """`4.1 % [2.9, 5.6]`, or `not measured`."""
    if figure is None:
        return "not measured"
    return f"{number(figure.value, dotted)} {interval(figure, dotted)}".strip()


def epsilon_text(epsilon: float | None) -> str:
    """An epsilon, rounded up so that the text never claims more than was proved."""
    if epsilon is None:
        return "no guarantee"
    # The small slack keeps 8.0 from becoming 8.01 through binary rounding.
    return f"{-(-(epsilon * 100 - 1e-9) // 1) / 100:g}"


def in_text(name: str) -> str:
    """A name as it stands within a sentence: `Weighted F1` -> `weighted F1`; `LoRA` stays."""
    return name[0].lower() + name[1:] if name[1:2].islower() else name


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "n/a"
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
