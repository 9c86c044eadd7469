"""The tables of the page as plain rows of text; the template only sets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpmed.report.certificate import Certificate
from dpmed.report.points import finite, lookup
from dpmed.report.settings import UTILITY_KEYS, Setting, Summary
from dpmed.report.verdicts import Verdict
from dpmed.report.wording import METHOD_NAMES, duration, epsilon_text, interval, metric_name, number, size

COMMON_STATEMENTS = {
    "neighbouring_relation": "Neighbouring relation",
    "accountant": "Accountant",
    "engine": "Engine",
    "not_covered": "Not covered",
}
GLOSSARY = (
    (
        "Epsilon (ε), delta (δ)",
        "The guarantee: with or without one unit's data, the odds of any outcome of training "
        "change by a factor of at most e^ε, except with probability δ. Smaller is more private.",
    ),
    ("Unit", "Whose data is added or removed in the guarantee, most often one patient with all records."),
    (
        "Held-out patients",
        "Patients the model was not trained on. What is 'extracted' from them is what a model "
        "guesses without having seen them: the floor for leakage.",
    ),
    ("Base model", "The model before fine-tuning on these records."),
    (
        "Identifier extraction",
        "Share of identifiers (names, numbers, dates) that the model completes exactly, "
        "given the true text before them.",
    ),
    (
        "Record extraction",
        "Share of records of which the model, given the first p tokens, continues the next n exactly.",
    ),
    (
        "Membership AUC",
        "How well an attacker tells training patients from held-out ones: 0.5 is chance, 1 is certain. "
        "Below 0.5 is not more private: an attacker may turn the answer round.",
    ),
    ("TPR at 1 % FPR", "Share of training patients found when only one in a hundred others is wrongly accused."),
    ("Canary", "An invented patient planted in the records to audit the guarantee."),
    ("95 % interval", "The range in brackets. Two figures whose ranges overlap were not told apart."),
    ("n", "How many records, identifiers or patients stand behind a figure."),
    ("Seed", "The number that starts a run's randomness; several seeds show how far results vary between runs."),
)
_LEAK_COLUMNS = (
    "memorization.identifier_extraction_rate",
    "reference.heldout.identifier_extraction_rate",
    "memorization.extraction_rate",
    "reference.heldout.extraction_rate",
    "memorization.membership_auc",
    "memorization.membership_tpr_at_fpr_0.01",
    "memorization.membership_tpr_at_fpr_0.001",
    "memorization.canary_exposure",
    "memorization.identifier_leak_rate",
)
_CERTIFICATE_KEYS = (
    "delta",
    "unit",
    "n_units",
    "sampling_rate",
    "expected_batch_units",
    "clip_norm",
    "max_records_per_unit",
    "noise_multiplier",
    "n_steps",
)
BELOW_CHANCE = "An AUC below 0.5 is not “more private”: an attacker may turn the answer round."


@dataclass
class Notes:
    """Footnotes, each text once, numbered in the order of first use."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str = ""
    n: str = ""
    seeds: str = ""
    note: int | None = None


def facts(meta: dict[str, Any]) -> list[str]:
    """What was studied, for the line under the title."""
    named = (
        ("task", "{}"),
        ("model", "{}"),
        ("n_units", "{} patients or units trained on"),
        ("n_records", "{} records"),
        ("n_heldout_units", "{} held-out units"),
        ("n_heldout_records", "{} held-out records"),
        ("created", "made {}"),
    )
    return [form.format(meta[key]) for key, form in named if meta.get(key) is not None]


def setting_tables(settings: Sequence[Setting], verdict: Verdict, notes: Notes) -> list[dict[str, Any]]:
    """Utility and cost, then leakage: each a caption, columns with an arrow, and a row a setting."""
    useful = [f"utility.{key}" for key in UTILITY_KEYS]
    useful = [dotted for dotted in useful if any(s.summary(dotted) for s in settings)]
    leaks = [dotted for dotted in _LEAK_COLUMNS if any(s.summary(dotted) for s in settings)]
    return [
        _table("Utility and cost", useful, settings, verdict, notes, costs=True),
        _table("Leakage: what attacks found", leaks, settings, verdict, notes, costs=False),
    ]


def never_measured(settings: Sequence[Setting]) -> list[str]:
    """Figures that are null in every setting, with the reason: named under the tables instead of a column of n/a."""
    keys = [*_LEAK_COLUMNS, *(f"utility.{key}" for key in UTILITY_KEYS)]
    null = [d for d in keys if any(_has_key(s, d) for s in settings) and not any(s.summary(d) for s in settings)]
    found = []
    for dotted in null:
        why = dict.fromkeys(setting.reason(dotted) for setting in settings)
        where = " (held-out patients)" if dotted.startswith("reference.") else ""
        key = dotted.removeprefix("reference.heldout.")
        found.append(f"{metric_name(key)}{where}: {'; '.join(why)}")
    return found


def _has_key(setting: Setting, dotted: str) -> bool:
    """Whether the key is there at all; a null is shown with its reason, an unknown key is not shown."""
    parent, _, key = dotted.partition(".") if dotted.startswith("memorization.") else dotted.rpartition(".")
    return any(key in (lookup(point, parent) or {}) for point in setting.points)


def _table(
    caption: str,
    columns: Sequence[str],
    settings: Sequence[Setting],
    verdict: Verdict,
    notes: Notes,
    *,
    costs: bool,
) -> dict[str, Any]:
    heads = [_head(dotted, settings) for dotted in columns]
    rows = []
    for setting in settings:
        cells = [_cell(setting, dotted, notes) for dotted in columns]
        if costs:
            cells += _cost_cells(setting, notes)
        rows.append(
            {
                "name": setting.name,
                "method": METHOD_NAMES.get(setting.method, setting.method),
                "epsilon": "none" if setting.epsilon is None else epsilon_text(setting.epsilon),
                "bound": _audited(setting),
                "n_seeds": len(setting.points),
                "chosen": verdict.chosen is not None and setting.name == verdict.chosen.name,
                "cells": cells,
            }
        )
    heads += [{"name": "Training time", "arrow": "↓"}, {"name": "Peak memory", "arrow": "↓"}] if costs else []
    return {"caption": caption, "heads": heads, "rows": rows}


def _head(dotted: str, settings: Sequence[Setting]) -> dict[str, str]:
    if dotted.startswith("reference.heldout."):
        return {"name": "same, held-out patients", "arrow": ""}
    figure = next((f for s in settings if (f := s.summary(dotted)) is not None), None)
    default = "better" if dotted.startswith("utility.") else "worse"
    better = (figure.higher_is if figure else default) == "better"
    return {"name": metric_name(dotted), "arrow": "↑" if better else "↓"}


def _cell(setting: Setting, dotted: str, notes: Notes) -> Cell:
    figure = setting.summary(dotted)
    if figure is None:
        return Cell("n/a", note=notes.mark(_reason(setting, dotted)))
    below = dotted.endswith("membership_auc") and figure.value < 0.5
    return Cell(
        value=number(figure.value, dotted),
        interval=interval(figure, dotted),
        n=f"n {figure.n:.0f}" if figure.n is not None else "",
        seeds=_seed_range(figure, dotted),
        note=notes.mark(BELOW_CHANCE) if below else None,
    )


def _cost_cells(setting: Setting, notes: Notes) -> list[Cell]:
    why = "the base model is not trained here" if setting.method == "base" else "not recorded for this setting"
    cells = []
    for key, name, worded in (("seconds", "Training time", duration), ("peak_memory_bytes", "Peak memory", size)):
        cost = setting.cost(key)
        cells.append(Cell(worded(cost)) if cost is not None else Cell("n/a", note=notes.mark(f"{name}: {why}")))
    return cells


def _reason(setting: Setting, dotted: str) -> str:
    if dotted.startswith("reference.heldout."):
        return f"{metric_name(dotted.removeprefix('reference.heldout.'))}, held-out patients: {setting.reason(dotted)}"
    return f"{metric_name(dotted)}: {setting.reason(dotted)}"


def _seed_range(figure: Summary, dotted: str) -> str:
    if figure.n_seeds < 2:
        return ""
    low, high = number(figure.seed_low, dotted), number(figure.seed_high, dotted)
    return f"seeds {low.removesuffix(' %')}–{high.removesuffix(' %')}"


def _audited(setting: Setting) -> str:
    bounds = [b for b in (finite(p.get("epsilon_lower_bound")) for p in setting.points) if b is not None]
    return f"at least {max(bounds):.2f} by audit" if bounds else ""


def certificate_table(certificates: Sequence[Certificate]) -> list[list[str]]:
    """A row a run: name, epsilon, both accountants, audit, all runs, attack, delta, unit, units, q, clip, and so on."""
    rows = []
    for certificate in certificates:
        content = certificate.content
        bound = certificate.epsilon_lower_bound
        audit = f"{bound:.2f}" if bound is not None else "n/a"
        epsilons = [_plain(content.get(key)) for key in ("epsilon", "epsilon_pld", "epsilon_prv")]
        everything = _plain((content.get("ledger") or {}).get("epsilon_of_all_runs"))
        attack = ((content.get("attack_bounds") or {}).get("tpr_at_fpr") or {}).get("0.01")
        means = [everything, "n/a" if attack is None else f"{100 * attack:.1f} %"]
        others = [_plain(content.get(key)) for key in _CERTIFICATE_KEYS]
        rows.append([certificate.name, *epsilons, audit, *means, *others])
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reasons(settings: Sequence[Setting]) -> list[tuple[str, str, str]]:
    """(figure, reason, settings) of all that does not apply."""
    found: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        for point in setting.points:
            listed = point.get("not_applicable")
            for key, reason in (listed if isinstance(listed, dict) else {}).items():
                names = found.setdefault((str(key), str(reason)), [])
                if setting.name not in names:
                    names.append(setting.name)
    everywhere = len(settings)
    return [
        (key, reason, "all settings" if len(names) == everywhere else ", ".join(names))
        for (key, reason), names in sorted(found.items())
    ]
