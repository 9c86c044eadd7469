"""What planted canaries show of one model: exposure, and a lower bound on epsilon beside the upper one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from torch import nn

from dpmed.data.canaries import Manifest
from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.exposure import CANDIDATES, canary_losses, exposure_figures, label_scores
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.privacy.audit import audit_epsilon

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CANARIES = "no canaries were planted"
CLASSIFIER_CANARIES = "a classifier gives no probabilities of text; the audit reads the losses of the canaries' labels"
NO_CLAIM = "the run makes no claim; the bound is for this delta"
_DELTA = 1e-5
"""Of the bound where nothing is claimed: canaries times delta must be small for a bound to show anything."""
KEYS = ("canary_exposure", "epsilon_lower_bound", "audit")
"""Keys that are null where there are no canaries."""


@dataclass(frozen=True)
class Claim:
    """What a run's certificate says; epsilon is None where it claims nothing."""

    epsilon: float | None
    delta: float
    among: int = 1
    """How many runs are audited together; the error is shared among them."""
    every_unit_in_every_step: bool = False
    """A sampling rate of 1: the run is Gaussian DP, for which the audit has a tighter bound."""


def no_claim(n_units: int, among: int = 1) -> Claim:
    """What stands for the claim of a run without one."""
    return Claim(None, min(_DELTA, float(n_units) ** -1.1), among)


def members_without_canaries(train: Dataset, manifest: Manifest) -> tuple[Dataset, int]:
    """The patients among the training records, and how many records are canaries' and left out.

    Canaries are made to be memorised: they would make every other rate too large.

    Raises: InputError unless these are the records that the canaries were planted in.
    """
    manifest.check_planted(train)
    members = manifest.ordinary(train)
    if len(members) == 0:
        raise InputError("train holds canaries only: plant them in patients' records")
    return members, len(train) - len(members)


def canary_figures(
    model: nn.Module,
    manifest: Manifest,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    claim: Claim,
    batch_tokens: int = 8192,
    bootstrap: int = 1000,
    seed: int = 0,
    candidates: int = CANDIDATES,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Exposure of the canaries and an audit of the run that trained the model.

    Args:
        model: on its device; language model or classifier.
        manifest: of the records that it was trained on.
        spec, tokenizer: as in training.
        claim: of the run; its delta is the audit's.
        candidates: other secrets that each canary is ranked among.
        folder, weights: of a language model's passes that may be killed; see `kept_scores`.
        batch_tokens, bootstrap, seed, progress: see `canary_losses` and `exposure_figures`.

    Returns: those of `exposure_figures`, `epsilon_lower_bound` (with its ceiling) and `audit`, in which `contradicts`
        says whether the canaries refute the claim.
    """
    figures: dict[str, Any] = {}
    if spec.kind == "classification":
        figures["canary_exposure"] = NotApplicable(CLASSIFIER_CANARIES)
        scores = label_scores(model, manifest, spec, tokenizer, batch_tokens=batch_tokens)
    else:
        losses = canary_losses(
            model,
            manifest,
            spec,
            tokenizer,
            n_candidates=candidates,
            seed=seed,
            batch_tokens=batch_tokens,
            folder=folder,
            weights=weights,
            progress=progress,
        )
        figures |= exposure_figures(losses, manifest, bootstrap=bootstrap, seed=seed)
        scores = losses.coin_scores()
    if not np.isfinite(scores).all():
        reason = NotApplicable("a canary has no finite score; the records have no labels")
        return {**figures, "epsilon_lower_bound": reason, "audit": reason}
    family = "gaussian" if claim.every_unit_in_every_step else "approximate"
    audit = audit_epsilon(scores, manifest.included, delta=claim.delta, family=family)
    figures["epsilon_lower_bound"] = Measure(
        audit.lower_bound, audit.lower_bound, math.nan, audit.n_canaries, "worse", {"ceiling": audit.ceiling}
    )
    refuted = audit.contradicts(claim.epsilon, delta=claim.delta, among=claim.among)
    upper = {"epsilon_upper_bound": claim.epsilon, "contradicts": refuted}
    figures["audit"] = {**audit.to_json(), **upper, **({} if claim.epsilon is not None else {"note": NO_CLAIM})}
    return figures


def no_canaries() -> dict[str, NotApplicable]:
    """What stands there without a manifest."""
    return dict.fromkeys(KEYS, NotApplicable(NO_CANARIES))
