"""The embedded default: the main job on a synthetic hospital, with nothing downloaded and nothing scripted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dpmed.demo_model import demo_base_model
from dpmed.frontier import run_frontier
from dpmed.recipe import Recipe
from dpmed.recipe_io import load_recipe, merge

Preset = Literal["quick", "full"]
SEEDS: dict[str, list[int]] = {"quick": [0, 1], "full": [0, 1, 2, 3, 4]}


def demo_recipe(base_model: Path, *, preset: Preset) -> Recipe:
    """The shipped recipe `demo/frontier.yaml` on a base model, with the preset's seeds."""
    recipe = load_recipe("demo/frontier.yaml")
    return merge(recipe, {"model": {"path": str(base_model)}, "frontier": {"seeds": SEEDS[preset]}})


def run_demo(output_dir: Path, *, preset: Preset = "quick", jobs: int = 2, resume: bool = False) -> dict[str, Any]:
    """Make the base model (or take it from the cache), then run the frontier on the private half of the hospital.

    Args:
        output_dir: see `run_frontier`.
        preset: quick has two seeds, full has five.
        jobs: runs at once.
        resume: see `run_frontier`.

    Returns: what stands in frontier.json.
    """
    recipe = demo_recipe(demo_base_model(), preset=preset)
    own = {"privacy": {"ledger": str(output_dir / "ledger.sqlite")}}  # made-up patients have no place in the user's
    return run_frontier(merge(recipe, own), output_dir, jobs=jobs, resume=resume)
