"""The grid of a frontier: which runs there are, and what each one's recipe is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dpmed.recipe import START_FROM_BASE, Objective, Recipe
from dpmed.recipe_io import check_recipe, merge, varied_keys

SPECIAL_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "repair_only": ("sani", {"sani": {"erase_fraction": 0.0}}),
    "clean_retrain": ("sani", {"sani": {"erase_fraction": 0.0}}),
    "pruning": ("sani", {"sani": {"reset_to": "zero"}, "training": {"epochs": 0.0}}),
    "rewind": ("sani", {"sani": {"reset_to": "base", "erase_fraction": 1.0}, "training": {"epochs": 0.0}}),
    **{name: ("unlearn", {"unlearn": {"objective": name}}) for name in get_args(Objective)},
}
"""Methods of a grid that are a recipe's method with fixed settings."""


@dataclass(frozen=True)
class Job:
    """One run of the grid. `after` names the run whose weights it starts from."""

    name: str
    setting: str
    method: str
    recipe: Recipe
    after: str | None = None


def grid(recipe: Recipe, output_dir: Path) -> list[Job]:
    """All runs of a recipe's frontier: the base model once, then every setting for every seed, long chains first."""
    base = recipe.model.base or recipe.model.path
    jobs: list[Job] = []
    if recipe.task != "classification":  # there the base model has no trained head to measure
        jobs.append(Job("base", "base", "base", merge(recipe, {"model": {"path": base, "base": None}})))
    chosen = recipe.frontier.methods
    if "full" not in chosen and any(method not in START_FROM_BASE for method in chosen):
        chosen = ["full", *chosen]
    for seed in recipe.frontier.seeds:
        for method in chosen:
            after, start = None, {"path": base}
            if method not in START_FROM_BASE:
                after = f"full-s{seed}"
                start = {"path": str(output_dir / "runs" / after / "model"), "revision": None}
            changes = {"model": {**start, "base": base}} if method in SPECIAL_CASES or after else {}
            for setting, varied in settings(recipe, method):
                jobs.append(_job(recipe, method, setting, seed, [changes, varied], after))
    return jobs


def settings(recipe: Recipe, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes of every setting of a method: one for each epsilon, and for each combination of its grid."""
    varied = varied_keys(recipe, method)
    if method == "dp_lora":
        varied = {"privacy.target_epsilon": recipe.frontier.epsilons, **varied}
    for values in itertools.product(*varied.values()):
        name, changes = method, dict[str, Any]()
        for key, value in zip(varied, values, strict=True):
            section, _, last = key.partition(".")
            changes.setdefault(section, {})[last] = value
            name += f"-eps{value:g}" if key == "privacy.target_epsilon" else f"-{last}={_written(value)}"
        yield name, changes


def _written(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, list):
        return "+".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _job(recipe: Recipe, method: str, setting: str, seed: int, changes: list[dict[str, Any]], after: str | None) -> Job:
    """One run: the recipe, the method's overrides, its place in the grid, then what makes it this method."""
    overrides = recipe.frontier.overrides
    if method == "clean_retrain":  # trained as `full` is, but for the targets
        recipe = merge(recipe, overrides.get("full", {}), where="frontier.overrides.full")
    changed = merge(recipe, overrides.get(method, {}), where=f"frontier.overrides.{method}")
    own, fixed = SPECIAL_CASES.get(method, (method, {}))
    for change in (*changes, fixed, {"method": own, "training": {"seed": seed}}):
        changed = merge(changed, change)
    check_recipe(changed)
    return Job(f"{setting}-s{seed}", setting, method, changed, after)
