"""The frontier point: made from a run folder, read by dotted key, compared with other points.

A point is a plain dictionary (see `points_from_run_folder`), so that `frontier.json` is its own documentation.
A measured figure is `{"value", "low", "high", "n", "higher_is"}`; what does not apply is None.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmed.errors import InputError

Point = dict[str, Any]

LEAK_KEYS = ("identifier_extraction_rate", "extraction_rate")
"""What the frontier may be drawn against, the preferred first."""

_SEED_SUFFIX = re.compile(r"-s\d+$")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: InputError if the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except ValueError as error:
        # The decoder's message may quote the file, so only the place is passed on.
        raise InputError(f"{path}: is not valid JSON; run the step that writes it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; run the step that writes it again")
    return content


def lookup(tree: Any, dotted: str) -> Any:
    """Value at a dotted key, or None. Keys may hold dots themselves (`membership_tpr_at_fpr_0.01`)."""
    if not isinstance(tree, dict):
        return None
    if dotted in tree:
        return tree[dotted]
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        if head in tree:
            found = lookup(tree[head], ".".join(parts[cut:]))
            if found is not None:
                return found
    return None


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def measured_value(point: Point, dotted: str) -> float | None:
    """The finite value of the measured figure at `dotted`, or None."""
    figure = lookup(point, dotted)
    return finite(figure.get("value")) if isinstance(figure, dict) else None


def chosen_leak(points: Sequence[Point]) -> str:
    """The first of `LEAK_KEYS` that some point other than the base model has a value for; the first of all if none."""
    tuned = [point for point in points if point.get("method") != "base"]
    found = (key for key in LEAK_KEYS if any(measured_value(p, f"memorization.{key}") is not None for p in tuned))
    return next(found, LEAK_KEYS[0])


def non_dominated(
    points: Sequence[Point], *, utility: str = "f1_weighted", leak: str = "identifier_extraction_rate"
) -> list[bool]:
    """Which points no other point beats.

    A point is dominated when another is at least as good on both axes and better on one. Equal points do not
    dominate each other. The direction of an axis is the figure's own `higher_is` (utility defaults to "better",
    leak to "worse"), so perplexity works as a utility. A point whose value on either axis is null or not finite is
    never on the frontier and dominates nothing.

    Args:
        points: frontier points.
        utility: key under `utility`.
        leak: key under `memorization`.

    Returns: one flag a point, in order. Cost: O(n log n).
    """
    losses = [_losses(point, utility, leak) for point in points]
    order = sorted((pair, index) for index, pair in enumerate(losses) if pair is not None)
    flags = [False] * len(points)
    best: tuple[float, float] | None = None
    # Sorted by leak, then by lost utility: a point survives only if it loses less utility than all that leak less.
    for pair, index in order:
        if best is None or pair[1] < best[1] or pair == best:
            flags[index] = True
            best = pair
    return flags


def _losses(point: Point, utility: str, leak: str) -> tuple[float, float] | None:
    """(leak, lost utility), both lower is better; None if either is missing."""
    leaked = _signed(point, f"memorization.{leak}", default="worse")
    lost = _signed(point, f"utility.{utility}", default="better")
    return None if leaked is None or lost is None else (leaked, lost)


def _signed(point: Point, dotted: str, *, default: str) -> float | None:
    value = measured_value(point, dotted)
    if value is None:
        return None
    return value if (lookup(point, dotted).get("higher_is") or default) == "worse" else -value


def points_from_run_folder(folder: Path) -> Point:
    """Make one frontier point of a finished, evaluated run.

    Reads `run.json`, `evaluation.json` and, if there is one, `privacy.json`. Keys that are absent become None.
    `on_frontier` is False: it is a property of a set of points (see `non_dominated`).

    Returns: the point: name, setting, method, seed, epsilon (None = not private), epsilon_lower_bound, delta, unit,
        utility, memorization, reference, not_applicable, cost {seconds, peak_memory_bytes}, on_frontier.
    Raises: InputError if `run.json` or `evaluation.json` is missing or unreadable, or the run did not finish.
    """
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder}: no run.json, so this is not a run folder; name the folder given as --output_dir")
    run = read_json(folder / "run.json")
    if run.get("status") != "finished":
        raise InputError(f"{folder}: the run's status is {run.get('status')!r}; finish it with --resume, then report")
    if not (folder / "evaluation.json").is_file():
        raise InputError(f"{folder}: no evaluation.json; run `dpmed evaluate` on it first")
    evaluation = read_json(folder / "evaluation.json")
    privacy = read_json(folder / "privacy.json") if (folder / "privacy.json").is_file() else {}
    is_private = bool(privacy) and privacy.get("private") is not False
    memorization = evaluation.get("memorization") or {}
    name = str(run.get("name") or folder.name)
    return {
        "name": name,
        "setting": str(run.get("setting") or _SEED_SUFFIX.sub("", name)),
        "method": str(run.get("method") or "unknown"),
        "seed": run.get("seed"),
        "epsilon": finite(privacy.get("epsilon")) if is_private else None,
        "epsilon_lower_bound": finite(lookup(memorization, "epsilon_lower_bound.value")),
        "delta": finite(privacy.get("delta")) if is_private else None,
        "unit": privacy.get("unit") if is_private else None,
        "utility": evaluation.get("utility") or {},
        "memorization": memorization,
        "reference": evaluation.get("reference") or {},
        "not_applicable": evaluation.get("not_applicable") or {},
        "cost": {"seconds": finite(run.get("seconds")), "peak_memory_bytes": finite(run.get("peak_memory_bytes"))},
        "on_frontier": False,
    }
