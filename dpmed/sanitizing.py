"""What `dpmed sanitize` does: sanitise a checkpoint, measure it, and put it through the release gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpmed.errors import GateError, InputError
from dpmed.evidence import EVIDENCE_PAGE
from dpmed.pipeline import train, weights_folder
from dpmed.recipe_io import merge
from dpmed.release import release_gate
from dpmed.report.evidence import build_evidence_page
from dpmed.splits import load_splits

if TYPE_CHECKING:
    from dpmed.recipe import Recipe


def sanitize(recipe: Recipe, output_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Sanitise `model.path` by SANI, evaluate it, and test it for release.

    Args:
        recipe: its method is taken for sani; `release` holds the thresholds.
        output_dir: a new folder, or one to go on in with `resume`. It becomes a run folder with `evidence.json`
            and `evidence.html`, the page on it.
        resume: go on from what is finished: training, evaluation and each stage of the gate.

    Returns: the gate's evidence.
    Raises: InputError without held-out records; GateError unless every test that could be made was passed: the run
        and its evidence are then written all the same.
    """
    recipe = merge(recipe, {"method": "sani"})
    if recipe.data.heldout is None:
        raise InputError("data.heldout: the release gate needs records of other patients; name them")
    train(recipe, output_dir, resume=resume)
    splits = load_splits(recipe.data, require_unit=False)
    evidence = release_gate(weights_folder(recipe, output_dir), recipe, splits, output_dir)
    page = build_evidence_page(evidence, output_dir / EVIDENCE_PAGE)
    if evidence["verdict"] != "pass":
        failed = [row for row in evidence["tested"] if row["verdict"] != "pass"]
        worst = next((row for row in failed if row["verdict"] == "fail"), failed[0] if failed else None)
        first = f"{worst['stage']}, {worst['check']}" if worst else "nothing could be tested"
        raise GateError(
            f"the gate says {evidence['verdict']}: {len(failed)} of {len(evidence['tested'])} tests were not passed,"
            f" first {first}; see {page}, and do not release these weights"
        )
    return evidence
