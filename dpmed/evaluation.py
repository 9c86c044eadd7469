"""Evaluate saved weights as a user would load them: utility and memorisation, beside what the run claims."""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpmed.data.canaries import Manifest
from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.canary_figures import Claim, no_claim
from dpmed.memorization.evaluator import MemorizationEvaluator
from dpmed.memorization.persistence import MEMORIZED_FILE
from dpmed.models import load_model, load_tokenizer, read_task_card
from dpmed.privacy.audit import refutation
from dpmed.progress import progress
from dpmed.runs import read_json
from dpmed.splits import Splits, task_spec
from dpmed.trainers.dp_lora import CERTIFICATE
from dpmed.trainers.sani import with_terms
from dpmed.utility import utility

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from dpmed.recipe import Recipe

PARTS = ".evaluation.partial"
"""Statistics and generated text of an evaluation that is under way, in the run's folder; deleted when it is written."""


def evaluate_weights(
    weights: str | Path,
    recipe: Recipe,
    splits: Splits,
    *,
    run_dir: Path | None = None,
    base_scores: Path | None = None,
    spec: TaskSpec | None = None,
    before: Path | None = None,
    audited_together: int = 1,
) -> dict[str, Any]:
    """Utility and memorisation of saved weights, reloaded from disk.

    Args:
        weights: model or adapter folder, or a Hub id.
        recipe: names the base model and what to measure.
        splits: members and non-members.
        run_dir: where the evaluation will stand. Its parts are kept there meanwhile, so that a killed evaluation goes
            on; and what the model has memorised (flags and positions), for a later `before`.
        base_scores: folder where the base model's scores of these records are shared between runs.
        spec: the task; None reads the task card beside the weights, or takes the recipe's task.
        before: folder of an earlier evaluation of the same records, to measure persistence.
        audited_together: runs whose canaries are audited together; see `AuditResult.contradicts`.

    Returns: what stands in evaluation.json.
    """
    spec = spec or read_task_card(weights) or task_spec(recipe, splits.train)
    revision = recipe.model.revision  # of a Hub id; a folder has none
    tokenizer = load_tokenizer(weights, revision=revision)
    model = load_model(weights, spec, revision=revision).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    base_path = recipe.model.base or recipe.model.path
    base = None
    if str(base_path) != str(weights) and spec.kind != "classification":  # a base model has no trained head
        base_revision = None if recipe.model.base else revision
        base = load_model(base_path, spec, revision=base_revision).eval().to(next(model.parameters()).device)
    started = time.monotonic()
    claim = _claim(run_dir, weights, splits, audited_together)
    result = _measure(model, base, tokenizer, spec, recipe, splits, run_dir, base_scores, claim, before)
    result["model"] = {"path": str(weights), "base": str(base_path), "method": recipe.method, "task": spec.kind}
    result.setdefault("settings", {})["seconds"] = time.monotonic() - started
    del model, base
    gc.collect()
    return result


def _measure(
    model: nn.Module,
    base: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    recipe: Recipe,
    splits: Splits,
    run_dir: Path | None,
    base_scores: Path | None,
    claim: Claim,
    before: Path | None,
) -> dict[str, Any]:
    if splits.heldout is None:
        if before is not None or recipe.data.canaries is not None:
            raise InputError("data.heldout: canaries and an evaluation before need held-out records too; name them")
        reason = "no held-out records were given (data.heldout)"
        return {"utility": None, "memorization": None, "not_applicable": {"utility": reason, "memorization": reason}}
    train_records, heldout, settings = splits.train, splits.heldout, recipe.evaluation
    if recipe.sani.terms is not None:  # then they are what a model should not say, and what leakage is measured of
        train_records, heldout = (with_terms(side, recipe.sani.terms) for side in (train_records, heldout))
    manifest = None if recipe.data.canaries is None else Manifest.load(Path(recipe.data.canaries).expanduser())
    parts = None if run_dir is None else run_dir / PARTS
    with progress("evaluate memorisation", 1) as bar:
        evaluator = MemorizationEvaluator(
            model,
            tokenizer,
            base_model=base,
            spec=spec,
            settings=settings,
            base_scores=base_scores,
            scores_dir=parts,
            progress=bar.update_stage,
        )
        result = evaluator.evaluate(train_records, heldout, manifest, claim=claim, before=before)
    if run_dir is not None and evaluator.memorized is not None:
        evaluator.memorized.save(run_dir / MEMORIZED_FILE)
    with progress("evaluate utility", 1) as bar:
        figures, reasons = utility(
            *(model, heldout, tokenizer, spec),
            settings=settings,
            train_records=train_records,
            folder=parts,
            progress=bar.update,
        )
    result["utility"] = {**figures, **(result.get("utility") or {})}
    result.setdefault("not_applicable", {}).update({f"utility.{key}": why for key, why in reasons.items()})
    return result


def _claim(run_dir: Path | None, weights: str | Path, splits: Splits, among: int) -> Claim:
    """What the certificate of the weights says: of their own run's folder, or of this one."""
    folders = [Path(weights).parent, *([] if run_dir is None else [run_dir])]
    for folder in folders:
        if (folder / CERTIFICATE).is_file():
            certificate = read_json(folder / CERTIFICATE)
            return Claim(certificate["epsilon"], certificate["delta"], among, certificate["sampling_rate"] == 1)
    return no_claim(len(set(splits.train["unit"])), among)


def finish_evaluation(run_dir: Path, evaluation: dict[str, Any]) -> None:
    """After evaluation.json is written: drop its parts, and stop if the canaries refute the certificate.

    Raises: RefutedError.
    """
    shutil.rmtree(run_dir / PARTS, ignore_errors=True)
    audit = (evaluation.get("memorization") or {}).get("audit") or {}
    if audit.get("contradicts"):
        raise refutation(audit["lower_bound"], audit["epsilon_upper_bound"], audit["delta"])
