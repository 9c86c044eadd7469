"""A setting: the runs that differ in their seed only, and their figures summed up over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpmed.report.points import Point, finite, lookup, non_dominated
from dpmed.report.points import chosen_leak as points_leak

METHOD_ORDER = (
    *("base", "full", "clean_retrain", "lora", "dp_lora", "sani", "repair_only", "pruning", "rewind"),
    *("unlearn", "gradient_ascent", "gradient_difference", "npo", "task_vector"),
)
UTILITY_KEYS = ("f1_weighted", "f1_macro", "f1_micro", "accuracy", "other_words_accuracy", "perplexity")


@dataclass(frozen=True)
class Summary:
    """One measured figure over the seeds of a setting."""

    value: float
    """Mean over seeds."""
    low: float | None
    """Mean of the runs' own lower 95 % limits: the uncertainty within a run."""
    high: float | None
    n: float | None
    """Records, spans or patients behind one run's figure."""
    seed_low: float
    """Lowest value of any seed: the spread between runs."""
    seed_high: float
    n_seeds: int
    higher_is: str

    def as_measured(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "higher_is": self.higher_is}


@dataclass(frozen=True)
class Setting:
    """Runs of one setting."""

    name: str
    method: str
    points: tuple[Point, ...]

    @property
    def epsilon(self) -> float | None:
        """Largest epsilon of the seeds, so that it holds for each; None unless every run is private."""
        values = [finite(point.get("epsilon")) for point in self.points]
        known = [value for value in values if value is not None]
        return max(known) if known and len(known) == len(values) else None

    def first(self, key: str) -> Any:
        """The first value of a top-level key that is not None."""
        return next((point[key] for point in self.points if point.get(key) is not None), None)

    def summary(self, dotted: str) -> Summary | None:
        """The figure at `dotted` over seeds; None if no run has it."""
        figures = [lookup(point, dotted) for point in self.points]
        return summarise([figure for figure in figures if isinstance(figure, dict)])

    def cost(self, key: str) -> float | None:
        """Mean of a cost over seeds."""
        known = [v for v in (finite(lookup(point, f"cost.{key}")) for point in self.points) if v is not None]
        return sum(known) / len(known) if known else None

    def reason(self, dotted: str) -> str:
        """Why the figure at `dotted` is null."""
        for point in self.points:
            reasons = point.get("not_applicable")
            reasons = reasons if isinstance(reasons, dict) else {}
            for key in (dotted, dotted.split(".", 1)[-1], dotted.rsplit(".", 1)[-1]):
                if reasons.get(key):
                    return str(reasons[key])
        return "not recorded for this setting"


def summarise(figures: Sequence[dict[str, Any]]) -> Summary | None:
    """Average measured figures; those without a finite value are left out. None if nothing is left."""
    known = [figure for figure in figures if finite(figure.get("value")) is not None]
    if not known:
        return None
    values = [float(figure["value"]) for figure in known]
    return Summary(
        value=sum(values) / len(values),
        low=_mean_or_none([finite(figure.get("low")) for figure in known]),
        high=_mean_or_none([finite(figure.get("high")) for figure in known]),
        n=_mean_or_none([finite(figure.get("n")) for figure in known]),
        seed_low=min(values),
        seed_high=max(values),
        n_seeds=len(values),
        higher_is=str(known[0].get("higher_is") or "better"),
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def group_settings(points: Sequence[Point]) -> list[Setting]:
    """Settings in reading order: by method (base first), then from the smallest epsilon, then by name."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(str(point.get("setting") or point.get("name")), []).append(point)
    settings = [Setting(name, str(group[0].get("method")), tuple(group)) for name, group in groups.items()]

    def rank(setting: Setting) -> tuple[int, float, str]:
        known = setting.method in METHOD_ORDER
        place = METHOD_ORDER.index(setting.method) if known else len(METHOD_ORDER)
        return place, setting.epsilon or 0.0, setting.name

    return sorted(settings, key=rank)


def chosen_utility(settings: Sequence[Setting]) -> str:
    """The first of `UTILITY_KEYS` that at least half of the settings have; else the one that most have."""
    counts = {key: sum(s.summary(f"utility.{key}") is not None for s in settings) for key in UTILITY_KEYS}
    return next((key for key in UTILITY_KEYS if 2 * counts[key] >= len(settings)), max(counts, key=counts.__getitem__))


def chosen_leak(settings: Sequence[Setting]) -> str:
    """Identifier extraction if any setting has it, else extraction of whole records; as in frontier.json."""
    return points_leak([point for setting in settings for point in setting.points])


def frontier_settings(settings: Sequence[Setting], *, utility: str, leak: str) -> list[bool]:
    """`non_dominated` of the settings' means over seeds."""
    means: list[Point] = []
    for setting in settings:
        useful, leaked = setting.summary(f"utility.{utility}"), setting.summary(f"memorization.{leak}")
        means.append(
            {
                "utility": {utility: useful.as_measured() if useful else None},
                "memorization": {leak: leaked.as_measured() if leaked else None},
            }
        )
    return non_dominated(means, utility=utility, leak=leak)
