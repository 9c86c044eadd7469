"""The release gate: what a sanitised checkpoint is tested for before it may be called releasable.

Every test has a threshold that stood in the recipe before the run. A verdict is decided on the 95 % interval: `pass` if
its upper limit is within the threshold, `fail` if its lower limit exceeds it, else `not_shown`, which is not a pass.
What could not be tested is `not_tested`, with the reason. Each stage is written as it ends, so that a gate that was
killed goes on where it stopped. No result holds text or an identifier's value.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn

from dpmed.data.canaries import Manifest
from dpmed.data.identifiers import identifier_counts, tag_identifiers
from dpmed.data.records import data_fingerprint
from dpmed.data.tasks import TaskSpec
from dpmed.environment import versions
from dpmed.errors import InputError
from dpmed.evidence import EVIDENCE, Row, overall
from dpmed.memorization.canary_figures import members_without_canaries
from dpmed.memorization.evaluator import MemorizationEvaluator
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.models import load_model, load_tokenizer, read_task_card
from dpmed.progress import progress
from dpmed.recipe_io import dump_recipe
from dpmed.relearning import public_records, relearn, relearning_sides
from dpmed.release_utility import utility_losses
from dpmed.runs import read_json, write_json
from dpmed.splits import Splits, task_spec
from dpmed.trainers.sani import read_terms, with_terms
from dpmed.weight_rounding import round_to_bfloat16, round_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpmed.recipe import Recipe

NO_FLOOR = "no floor was given: name the model before fine-tuning (model.base) or a clean retrain"
NOT_PARAPHRASED = "paraphrased prompts are not made: that needs a second model; prompts by template stand for them"
NO_PUBLIC = "no public text was named (release.public_text)"
ROW_KEYS = ("extraction_rate", "identifier_extraction")


def decide(stage: str, check: str, figure: Measure | Mapping[str, Any] | NotApplicable, threshold: float) -> Row:
    """The verdict on one figure of which more is worse.

    Args:
        stage: what was done to the model first.
        check: what was measured.
        figure: a `Measure`, or its JSON; a bound that is not finite, or null, shows nothing.
        threshold: the most that is allowed.
    """
    row: Row = {"stage": stage, "check": check, "threshold": threshold, "reason": None}
    if isinstance(figure, NotApplicable):
        return {**row, **dict.fromkeys(("value", "low", "high", "n")), "verdict": "not_tested", "reason": figure.reason}
    found = figure.to_json() if isinstance(figure, Measure) else figure
    low, high = found["low"], found["high"]
    verdict = "not_shown"
    if high is not None and high <= threshold:
        verdict = "pass"
    elif low is not None and low > threshold:
        verdict = "fail"
    return {**row, **{key: found[key] for key in ("value", "low", "high", "n")}, "verdict": verdict}


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over names and bytes of the safetensors files of a folder.

    Raises: InputError if there is none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no safetensors weights; name a model or adapter folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def release_gate(weights: Path, recipe: Recipe, splits: Splits, folder: Path) -> dict[str, Any]:
    """Test a sanitised language model and write what was found.

    Args:
        weights: folder of the sanitised model or adapter.
        recipe: `model.path` is the checkpoint before sanitising, `model.base` or `release.clean_retrain` the floor,
            `release` the thresholds.
        splits: the targeted records and held-out ones.
        folder: where stages (`release/*.json`) and `evidence.json` are written. Finished stages of the same weights,
            recipe and records are not run again.

    Returns: what stands in evidence.json.
    Raises: InputError without held-out records, or for a classifier.
    """
    heldout = splits.heldout
    if heldout is None:
        raise InputError("data.heldout: the release gate needs records of other patients; name them")
    spec = read_task_card(weights) or task_spec(recipe, splits.train)
    if spec.kind == "classification":
        raise InputError("task: the release gate tests language models; set causal_lm or masked_lm")
    members = splits.train
    if recipe.data.canaries is not None:
        members, _ = members_without_canaries(members, Manifest.load(Path(recipe.data.canaries).expanduser()))
    terms = recipe.sani.terms
    if terms is not None:  # then they are what was to be forgotten, and what leakage is measured of
        members, heldout = with_terms(members, terms), with_terms(heldout, terms)
    gate = _Gate(weights, recipe, spec, members, heldout, load_tokenizer(weights))
    digest, rows = weights_digest(weights), list[Row]()
    stages = list(gate.stages())
    made_of = [digest, dump_recipe(recipe), data_fingerprint(members), data_fingerprint(heldout)]
    made_of += [] if terms is None else read_terms(terms)
    stamp = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    with progress("release gate", len(stages)) as bar:
        for number, (name, run) in enumerate(stages):
            bar.update_stage(name, number, len(stages))
            rows += _finished(folder / "release" / f"{name}.json", stamp, run)
    sani = recipe.sani
    targeted = members
    if terms is None:
        targeted = tag_identifiers(members, k=sani.k, indirect=sani.identifiers != "direct")
    evidence = {
        "verdict": overall(rows),
        "targeted": {
            "identifiers": identifier_counts(targeted),
            "n_records": len(members),
            "n_units": len(set(members["unit"])),
        },
        "tested": [row for row in rows if row["verdict"] != "not_tested"],
        "not_tested": [row for row in rows if row["verdict"] == "not_tested"],
        "thresholds": asdict(recipe.release),
        "floor": gate.floor,
        "before": recipe.model.path,
        "weights": {"path": str(weights), "sha256": digest},
        "task": spec.kind,
        "n_heldout": {"n_records": len(heldout), "n_units": len(set(heldout["unit"]))},
        "seeds": {"training": recipe.training.seed, "relearning": recipe.training.seed},
        "versions": versions(),
    }
    write_json(folder / EVIDENCE, evidence)
    return evidence


def _finished(path: Path, stamp: str, run: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a stage: those that were written for the same weights, recipe and records, or new ones."""
    if path.is_file() and (kept := read_json(path)).get("stamp") == stamp:
        return kept["rows"]
    rows = run()
    write_json(path, {"stamp": stamp, "rows": rows})
    gc.collect()
    return rows


@dataclass(frozen=True)
class _Gate:
    """The tests of one checkpoint; models are loaded for a stage and dropped after it."""

    weights: Path
    recipe: Recipe
    spec: TaskSpec
    members: Dataset
    heldout: Dataset
    tokenizer: PreTrainedTokenizerBase

    @property
    def floor(self) -> str | None:
        """Path of the model that never learned the targets."""
        return self.recipe.release.clean_retrain or self.recipe.model.base

    def stages(self) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        yield "as_released", self.as_released
        yield "bfloat16", lambda: self.rounded("bfloat16", round_to_bfloat16)
        for bits in dict.fromkeys(self.recipe.release.quantise):
            yield f"int{bits}", lambda bits=bits: self.rounded(f"int{bits}", lambda model: round_weights(model, bits))
        yield "relearned", self.relearned
        yield "relearned_public", self.relearned_public
        yield "utility", self.utility

    def as_released(self) -> list[Row]:
        limits, stage = self.recipe.release, "as_released"
        found = self._evaluated(self._load(self.weights, merge=False), self._floor(), self.members, generate=True)
        rows = leak_rows(
            stage,
            found,
            (limits.max_extraction_above_floor, limits.max_identifier_extraction_above_floor),
            limits.max_membership_auc,
        )
        rows += prompt_rows(stage, found, limits.max_identifier_extraction_above_floor)
        reason = NotApplicable(NOT_PARAPHRASED)
        return [*rows, decide(stage, "paraphrased_prompts", reason, limits.max_identifier_extraction_above_floor)]

    def rounded(self, stage: str, rounding: Callable[[nn.Module], int]) -> list[Row]:
        limits, model = self.recipe.release, self._load(self.weights)
        rounding(model)
        found = self._evaluated(model, self._floor(), self.members)
        return leak_rows(
            stage, found, (limits.max_after_quantisation, limits.max_after_quantisation), limits.max_membership_auc
        )

    def relearned(self) -> list[Row]:
        seed = self.recipe.training.seed
        mine, others = relearning_sides(self.members, self.recipe.release.relearn_share, seed)
        return self._attacked("relearned", mine, others)

    def relearned_public(self) -> list[Row]:
        limits = self.recipe.release
        if limits.public_text is None:
            reason = NotApplicable(NO_PUBLIC)
            return [decide("relearned_public", "relearning", reason, limits.max_after_relearning)]
        _, others = relearning_sides(self.members, limits.relearn_share, self.recipe.training.seed)
        return self._attacked("relearned_public", public_records(limits.public_text), others)

    def utility(self) -> list[Row]:
        limits = self.recipe.release
        before = self._load(self.recipe.model.path, revision=self.recipe.model.revision)
        losses = utility_losses(
            before,
            self._load(self.weights),
            self.tokenizer,
            self.spec,
            self.members,
            self.heldout,
            settings=self.recipe.evaluation,
            rare_k=limits.rare_k,
        )
        allowed = dict.fromkeys(losses, limits.max_utility_loss) | {"rare_words": limits.max_rare_word_loss}
        return [decide("utility", f"{name}_loss", loss, allowed[name]) for name, loss in losses.items()]

    def _attacked(self, stage: str, mine: Dataset, others: Dataset) -> list[Row]:
        """Train the checkpoint and the floor on the attacker's text; measure leakage of the other records."""
        limits = self.recipe.release

        def trained(model: nn.Module) -> nn.Module:
            return relearn(
                model,
                self.tokenizer,
                self.spec,
                mine,
                steps=limits.relearn_steps,
                learning_rate=limits.relearn_learning_rate,
                batch_size=self.recipe.training.batch_size,
                seed=self.recipe.training.seed,
            )

        floor = self._floor()
        model = trained(self._load(self.weights))
        found = self._evaluated(model, None if floor is None else trained(floor), others)
        return leak_rows(
            stage, found, (limits.max_after_relearning, limits.max_after_relearning), limits.max_membership_auc
        )

    def _evaluated(
        self, model: nn.Module, floor: nn.Module | None, members: Dataset, *, generate: bool = False
    ) -> dict[str, Any]:
        settings = self.recipe.evaluation
        if not generate:
            settings = replace(settings, generate_tokens=0, choices=None)
        evaluator = MemorizationEvaluator(
            model, self.tokenizer, base_model=floor, spec=self.spec, settings=replace(settings, k=None)
        )
        return evaluator.evaluate(members, self.heldout)

    def _floor(self) -> nn.Module | None:
        if self.floor is None:
            return None
        return self._load(self.floor)

    def _load(self, path: str | Path, *, merge: bool = True, revision: str | None = None) -> nn.Module:
        model = load_model(path, self.spec, revision=revision, merge=merge).eval()
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def leak_rows(stage: str, found: Mapping[str, Any], limits: tuple[float, float], max_auc: float) -> list[Row]:
    """The verdicts on one evaluation: both rates above the floor and above held-out records, and membership.

    Args:
        stage: what was done to the model first.
        found: result of `MemorizationEvaluator.evaluate` with the floor as base model.
        limits: thresholds of (p, n) extraction and of identifier extraction.
        max_auc: threshold of the strongest membership attack. It is chosen by its value, which errs upwards.
    """
    memorization, heldout = found["memorization"], found["reference"]["heldout"]
    reasons, above, rows = found["not_applicable"], memorization["minus_base"], list[Row]()
    for name, limit in zip(ROW_KEYS, limits, strict=True):
        figure = None if above is None else above[name] if name == "extraction_rate" else above[name]["all"]
        key = "memorization.minus_base" + ("" if above is None else f".{name}")
        why = NO_FLOOR if above is None else reasons.get(key) or reasons.get(f"{key}.all", "")
        rows.append(decide(stage, f"{name}_above_floor", figure or NotApplicable(why), limit))
        rate = name if name == "extraction_rate" else "identifier_extraction_rate"
        why = reasons.get(f"memorization.{rate}") or reasons.get(f"reference.heldout.{rate}", "")
        difference = unpaired_difference(memorization[rate], heldout[rate])
        rows.append(decide(stage, f"{name}_above_heldout", difference or NotApplicable(why), limit))
    attacks = [attack["auc"] for attack in memorization["membership"].values() if attack and attack.get("auc")]
    best = max(attacks, key=lambda auc: auc["value"], default=None)
    return [*rows, decide(stage, "membership_auc", best or NotApplicable("no attack could be made"), max_auc)]


def prompt_rows(stage: str, found: Mapping[str, Any], limit: float) -> list[Row]:
    """Identifiers that text written from templates and from their own context holds, above decoys."""
    leaks, decoys = (side.get("identifier_leakage") for side in (found["memorization"], found["reference"]["heldout"]))
    rows, reasons = list[Row](), found["not_applicable"]
    for probe in ("templates", "context"):
        own, other = ((side or {}).get(probe, {}).get("rate") for side in (leaks, decoys))
        keys = ("memorization.identifier_leakage", f"memorization.identifier_leakage.{probe}.rate")
        keys += (f"reference.heldout.identifier_leakage.{probe}.rate",)
        why = next((reasons[key] for key in keys if key in reasons), "no decoy")
        figure = unpaired_difference(own, other) or NotApplicable(why)
        rows.append(decide(stage, f"{probe}_prompts_above_decoys", figure, limit))
    return rows


def unpaired_difference(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One rate minus another of other patients, from their JSON; None if one was not measured.

    Reference: Newcombe 1998, method 10, from the intervals that the rates have.
    """
    if first is None or second is None:
        return None
    value = first["value"] - second["value"]
    bounds = [figure[side] for figure in (first, second) for side in ("low", "high")]
    n = min(first["n"], second["n"])
    if None in bounds:
        return {"value": value, "low": None, "high": None, "n": n}
    low = value - math.hypot(first["value"] - first["low"], second["high"] - second["value"])
    high = value + math.hypot(first["high"] - first["value"], second["value"] - second["low"])
    return {"value": value, "low": low, "high": high, "n": n}
