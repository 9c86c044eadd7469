"""Recipes in and out: YAML and flags become one typed `Recipe`, a `Recipe` becomes YAML, and one is checked.

Relative paths inside a recipe (data, models) count from the current directory, not from the recipe's folder.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import yaml

from dpmed.errors import InputError
from dpmed.recipe import START_FROM_BASE, FrontierMethod, Objective, Recipe
from dpmed.recipe_values import (
    RecipeDumper,
    Values,
    flag_pairs,
    flag_value,
    parse_yaml,
    recipe_keys,
    recipe_sections,
    shown,
    typed_value,
    typed_values,
)


def load_recipe(path: str | Path, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, with flags on top.

    Args:
        path: a YAML file, or a name that `shipped_recipes` lists, e.g. "phee/frontier.yaml". A file wins over a name.
        flags: as typed, e.g. ["--training.epochs", "3", "--data.label=null", "--frontier.epsilons", "[1, 8]"].

    Raises: InputError for a missing file, malformed YAML, unknown or missing keys and values of a wrong type.
    """
    name = str(path)
    return build_recipe(parse_yaml(_recipe_text(name), where=name), where=name, flags=flags)


def build_recipe(values: Mapping[str, Any], *, where: str, flags: Sequence[str] = ()) -> Recipe:
    """Make a recipe of nested values, as YAML gives them, and flags; `where` opens the messages. Raises: InputError."""
    given = typed_values(values, where=where)
    for key, rest, text in flag_pairs(flags):
        value = flag_value(key, rest, text)
        if rest:
            value = _merged(given.get(key, {}), value)
        given[key] = typed_value(key, value, where=f"--{key}")
    for key, entry in recipe_keys().items():
        if entry.required and key not in given:
            raise InputError(f"{where}: missing key '{key}': set it there, or pass --{key}")
    return _assembled(given)


def merge(recipe: Recipe, overrides: Mapping[str, Any], *, where: str = "overrides") -> Recipe:
    """A copy of `recipe` with nested values replaced, checked as those of a file; mappings (training.extra) are merged.

    Raises: InputError whose message opens with `where`.
    """
    new = typed_values(overrides, where=where)
    current = _values_of(recipe)
    return _assembled({key: _merged(value, new[key]) if key in new else value for key, value in current.items()})


def dump_recipe(recipe: Recipe) -> str:
    """The effective recipe as YAML, every key included; `load_recipe` reads an equal recipe back."""
    nested = asdict(recipe)
    ordered = {"method": nested.pop("method"), "task": nested.pop("task"), **nested}
    return yaml.dump(ordered, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)


def shipped_recipes() -> dict[str, Traversable]:
    """The recipes inside the package, by name, e.g. "phee/frontier.yaml"."""
    try:
        root: Traversable = resources.files("dpmed.recipes")
    except ModuleNotFoundError:  # run from a checkout that is not installed: there the folder stands at the root
        root = Path(__file__).resolve().parents[1] / "recipes"
    return dict(sorted(_yaml_files(root, ""))) if root.is_dir() else {}


# --- Checks -----------------------------------------------------------------------------------------------------------

_POSITIVE = ("a number above 0", lambda v: v > 0)
_COUNT = ("a whole number of at least 1", lambda v: v >= 1)
_NOT_NEGATIVE = ("0 or more", lambda v: v >= 0)
_SHARE = ("a share between 0 and 1", lambda v: 0 <= v <= 1)
_OPEN_SHARE = ("a number between 0 and 1, both excluded", lambda v: 0 < v < 1)

# Key -> what its value, or each item of a list, must be; null passes where the type allows it.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data.max_length": ("a whole number of at least 2", lambda v: v >= 2),
    "data.completion_weight": _NOT_NEGATIVE,
    "data.mask_probability": _OPEN_SHARE,
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "lora.dropout": ("0 or more and below 1", lambda v: 0 <= v < 1),
    "privacy.target_epsilon": _POSITIVE,
    "privacy.delta": _OPEN_SHARE,
    "privacy.clip_norm": _POSITIVE,
    "privacy.expected_batch_units": _COUNT,
    "privacy.max_records_per_unit": _COUNT,
    "privacy.micro_batch_tokens": _COUNT,
    "privacy.buffer_mib": _COUNT,
    "privacy.budget_epsilon": _POSITIVE,
    "sani.erase_fraction": _SHARE,
    "sani.erase_layers": ("a number of blocks, all, or block numbers from 0", lambda v: v == "all" or v >= 0),
    "sani.score_windows": _COUNT,
    "sani.k": _COUNT,
    "sani.kl": _NOT_NEGATIVE,
    "unlearn.beta": _POSITIVE,
    "unlearn.retain_weight": _NOT_NEGATIVE,
    "unlearn.alpha": _POSITIVE,
    "unlearn.k": _COUNT,
    "training.epochs": _NOT_NEGATIVE,
    "training.learning_rate": _POSITIVE,
    "training.batch_size": _COUNT,
    "training.warmup_steps": _NOT_NEGATIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.seed": _NOT_NEGATIVE,
    "training.save_every": _POSITIVE,
    "training.head_learning_rate": _POSITIVE,
    "evaluation.prefix_tokens": _COUNT,
    "evaluation.suffix_tokens": _COUNT,
    "evaluation.fpr": _OPEN_SHARE,
    "evaluation.min_k": ("a share above 0, up to 1", lambda v: 0 < v <= 1),
    "evaluation.max_records": _COUNT,
    "evaluation.batch_tokens": _COUNT,
    "evaluation.bootstrap": _COUNT,
    "evaluation.k": _COUNT,
    **{
        f"release.max_{name}": _SHARE
        for name in (
            "identifier_extraction_above_floor",
            "extraction_above_floor",
            "membership_auc",
            "membership_above_floor",
            "probabilistic_extraction_above_floor",
            "after_relearning",
            "after_quantisation",
            "utility_loss",
            "rare_word_loss",
        )
    },
    "release.rare_k": ("a whole number of at least 2", lambda v: v >= 2),
    "release.quantise": ("8 or 4", lambda v: v in (4, 8)),
    "release.relearn_share": _OPEN_SHARE,
    "release.relearn_steps": _COUNT,
    "release.relearn_learning_rate": _POSITIVE,
    "frontier.epsilons": _POSITIVE,
    "frontier.seeds": _NOT_NEGATIVE,
}
_MAY_BE_EMPTY = ("frontier.epsilons", "release.quantise")  # a grid without dp_lora has none; no rounding tested
_FIXED_BY_THE_GRID = ("method", "task", "frontier")
_ERASES = ("sani", "pruning", "rewind")  # without any epoch they still do something
_VARIED_ELSEWHERE = {"privacy.target_epsilon": "frontier.epsilons", "training.seed": "frontier.seeds"}


def check_recipe(recipe: Recipe, *, frontier: bool = False) -> None:
    """Refuse a recipe that cannot work, without looking at data or model, and without any heavy import.

    Args:
        frontier: check the grid too: each method of `frontier.methods` instead of `method`, and each override.

    Raises: InputError, one line with the dotted key, its value and the remedy.
    """
    _check_values(recipe)
    _check_labels(recipe)
    if not frontier:
        _check_epochs(recipe, recipe.method)
    methods = recipe.frontier.methods if frontier else [recipe.method]
    key = "frontier.methods" if frontier else "method"
    if "dp_lora" in methods and recipe.data.unit is None:
        raise InputError(f"{key}: dp_lora needs the patient column: set data.unit")
    sani = [method for method in methods if method in ("sani", "repair_only", "clean_retrain", "pruning", "rewind")]
    if sani and recipe.task == "classification":
        raise InputError(
            f"{key}: {sani[0]} repairs a language model, not a classifier: set task to causal_lm or masked_lm, "
            "or name another method"
        )
    unlearn = [method for method in methods if method in ("unlearn", *get_args(Objective))]
    if unlearn and recipe.task == "classification":
        raise InputError(
            f"{key}: {unlearn[0]} works on a language model, not a classifier: set task to causal_lm or masked_lm, "
            "or name another method"
        )
    if frontier:
        _check_grid(recipe)


def _check_values(recipe: Recipe) -> None:
    for key, value in _values_of(recipe).items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            raise InputError(f"{key}: got {shown(value)}, expected a finite number")
        if not items and key not in _MAY_BE_EMPTY:
            raise InputError(f"{key}: the list is empty: name at least one, e.g. {shown(recipe_keys()[key].default)}")
        words, fits = _RANGES.get(key, ("", lambda v: True))
        bad = [item for item in items if item is not None and not fits(item)]
        if bad:
            default = recipe_keys()[key].default
            raise InputError(f"{key}: got {shown(bad[0])}, expected {words} (the default is {shown(default)})")
        if key.startswith("frontier.") and len(set(map(shown, items))) < len(items):
            raise InputError(f"{key}: the same item stands twice in {shown(value)}: name each once")


def _check_labels(recipe: Recipe) -> None:
    data = recipe.data
    if recipe.task == "classification" and data.label is None:
        raise InputError("task: classification needs the column with the label: set data.label")
    if data.loss_on == "completion" and data.label is None:
        raise InputError("data.loss_on: completion trains on the label alone: set data.label, or data.loss_on to all")
    if data.multi_label and data.label is None:
        raise InputError("data.multi_label: needs the column with the labels: set data.label")


def _check_grid(recipe: Recipe) -> None:
    grid = recipe.frontier
    if recipe.data.heldout is None:
        raise InputError("data.heldout: a frontier needs patients outside the training data: set data.heldout")
    if "dp_lora" in grid.methods and not grid.epsilons:
        raise InputError("frontier.epsilons: the list is empty, and dp_lora needs one at least: e.g. [1.0, 8.0]")
    for method, overrides in grid.overrides.items():
        where = f"frontier.overrides.{method}"
        _check_method(method, "frontier.overrides")
        _check_changes(recipe, method, overrides, where=where)
    for method in grid.grids:
        _check_method(method, "frontier.grids")
        _check_varied(recipe, method, where=f"frontier.grids.{method}")


def _check_epochs(recipe: Recipe, method: str) -> None:
    if recipe.training.epochs == 0 and method not in _ERASES:
        raise InputError(f"training.epochs: got 0.0, and {method} would learn nothing: expected a number above 0")


def _check_method(method: str, key: str) -> None:
    known = get_args(FrontierMethod)
    if method not in known:
        nearest = difflib.get_close_matches(method, known, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"name one of {', '.join(known)}"
        raise InputError(f"{key}: unknown method '{method}': {hint}")


def _check_changes(recipe: Recipe, method: str, changes: Mapping[str, Any], *, where: str) -> None:
    """Refuse what a grid cannot change, and values that no recipe may have."""
    fixed = [key for key in changes if key.partition(".")[0] in _FIXED_BY_THE_GRID]
    if fixed:
        raise InputError(f"{where}: '{fixed[0]}' is the same for all runs of a frontier: remove it")
    changed = merge(recipe, changes, where=where)
    try:
        _check_values(changed)
        _check_labels(changed)
        _check_epochs(changed, method)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def varied_keys(recipe: Recipe, method: str) -> dict[str, Any]:
    """Dotted key -> values to try of a method's grid, which may be written nested or dotted, as a recipe."""
    flat: dict[str, Any] = {}
    for name, value in recipe.frontier.grids.get(method, {}).items():
        flat |= {f"{name}.{key}": values for key, values in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _check_varied(recipe: Recipe, method: str, *, where: str) -> None:
    """Check each value of a method's grid by itself."""
    grid = recipe.frontier
    if method not in grid.methods:
        raise InputError(f"{where}: {method} is not among frontier.methods: name it there, or remove its grid")
    if method == "full" and any(other not in START_FROM_BASE for other in grid.methods):
        raise InputError(f"{where}: other methods start from the full run, and of a grid there would be several")
    for key, values in varied_keys(recipe, method).items():
        if key in _VARIED_ELSEWHERE:
            raise InputError(f"{where}: '{key}' is varied by {_VARIED_ELSEWHERE[key]}: set it there")
        if key.count(".") != 1 or not isinstance(values, list) or not values:
            raise InputError(f"{where}: '{key}': expected a dotted key and a list of values: training.epochs: [1, 2]")
        if len(set(map(shown, values))) < len(values):
            raise InputError(f"{where}: '{key}': the same value stands twice in {shown(values)}: name each once")
        for value in values:
            section, _, last = key.partition(".")
            _check_changes(recipe, method, {section: {last: value}}, where=where)


# --- Parts ------------------------------------------------------------------------------------------------------------


def _values_of(recipe: Recipe) -> Values:
    nested = asdict(recipe)
    parts = [key.partition(".") for key in recipe_keys()]
    return {section + dot + name: nested[section][name] if dot else nested[section] for section, dot, name in parts}


def _assembled(given: Mapping[str, Any]) -> Recipe:
    sections = {
        name: kind(**{key[len(name) + 1 :]: value for key, value in given.items() if key.startswith(f"{name}.")})
        for name, kind in recipe_sections().items()
    }
    return Recipe(**sections, **{key: value for key, value in given.items() if "." not in key})


def _merged(old: Any, new: Any) -> Any:
    """`new`, or both where both are mappings."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return copy.deepcopy(new)
    return {name: _merged(old.get(name), new[name]) if name in new else old[name] for name in [*old, *new]}


def _recipe_text(name: str) -> str:
    path = Path(name).expanduser()
    shipped = shipped_recipes()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read ({type(error).__name__}): save it as UTF-8, readable") from None
    if name in shipped:
        return shipped[name].read_text(encoding="utf-8")
    if path.is_dir():
        raise InputError(f"{name}: is a folder: name the recipe file in it")
    nearest = difflib.get_close_matches(name, shipped, n=2, cutoff=0.3)
    hint = f"; shipped recipes: {', '.join(nearest or list(shipped)[:3])}" if shipped else ""
    raise InputError(f"{name}: no such recipe file{hint}: check the path, or see 'dpmed recipe ls'")


def _yaml_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _yaml_files(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".yaml"):
            yield prefix + item.name, item
