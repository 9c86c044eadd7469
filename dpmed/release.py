"""The release gate: what a sanitised checkpoint is tested for before it may be called releasable.

Every test has a threshold that stood in the recipe before the run; see `release_rows` for the verdicts. Each stage is
written as it ends, and its passes and generated text are kept until then, so that a gate that was killed goes on where
it stopped. No result holds text or an identifier's value.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
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
from dpmed.memorization.battery import MASKED_CONTINUES, SEED
from dpmed.memorization.canary_figures import members_without_canaries
from dpmed.memorization.evaluator import MemorizationEvaluator
from dpmed.memorization.further import NOT_ASKED
from dpmed.memorization.generation_plan import GenerationSettings
from dpmed.memorization.intervals import NotApplicable
from dpmed.memorization.prompt_probes import prompt_figures
from dpmed.models import load_model, load_tokenizer, read_task_card
from dpmed.progress import progress
from dpmed.recipe_io import dump_recipe
from dpmed.relearning import public_records, relearn, relearning_sides
from dpmed.release_rows import decide, leak_rows, prompt_rows
from dpmed.release_utility import utility_losses
from dpmed.runs import read_json, write_json
from dpmed.splits import Splits, task_spec
from dpmed.trainers.sani import read_terms, with_terms
from dpmed.weight_rounding import round_to_bfloat16, round_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpmed.recipe import Recipe

PARTS = ".partial"
"""Under `release/`: statistics and written text of a gate that is under way; deleted when the evidence is written."""
OF_FLOOR, OF_STAGE = "floor", "stage"
"""Folders in it: one pass of the floor serves all stages; the rest is deleted when its stage is written."""
NO_PUBLIC = "no public text was named (release.public_text)"


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
            recipe, records, floor and public text are not run again.

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
    parts = folder / "release" / PARTS
    gate = _Gate(weights, recipe, spec, members, heldout, load_tokenizer(weights), parts)
    digest, rows = weights_digest(weights), list[Row]()
    stages = list(gate.stages())
    made_of = [digest, dump_recipe(recipe), data_fingerprint(members), data_fingerprint(heldout)]
    made_of += [] if terms is None else read_terms(terms)
    named = {"before": recipe.model.path, "floor": gate.floor, "public_text": recipe.release.public_text}
    hashes = {role: _content(path) for role, path in named.items()}
    made_of += [hashes[role] or path for role, path in named.items()]
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
        "sha256": {role: hashes[role] for role in ("before", "floor")},
        "task": spec.kind,
        "n_heldout": {"n_records": len(heldout), "n_units": len(set(heldout["unit"]))},
        "seeds": {"training": recipe.training.seed, "relearning": recipe.training.seed},
        "versions": versions(),
    }
    write_json(folder / EVIDENCE, evidence)
    shutil.rmtree(parts, ignore_errors=True)
    return evidence


def _finished(path: Path, stamp: str, run: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a stage: those that were written for the same weights, recipe and records, or new ones."""
    if path.is_file() and (kept := read_json(path)).get("stamp") == stamp:
        return kept["rows"]
    rows = run()
    write_json(path, {"stamp": stamp, "rows": rows})
    shutil.rmtree(path.parent / PARTS / OF_STAGE, ignore_errors=True)  # not before: a killed stage goes on with them
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # blocks that were cut for one stage's models do not fit another's
    return rows


def _content(path: str | None) -> str | None:
    """SHA-256 of what a folder of weights or a file holds; None of a Hub id, whose weights are not files here."""
    if path is None or not Path(path).expanduser().exists():
        return None
    where = Path(path).expanduser()
    return weights_digest(where) if where.is_dir() else hashlib.sha256(where.read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Gate:
    """The tests of one checkpoint; models are loaded for a stage and dropped after it."""

    weights: Path
    recipe: Recipe
    spec: TaskSpec
    members: Dataset
    heldout: Dataset
    tokenizer: PreTrainedTokenizerBase
    parts: Path

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
        model = self._load(self.weights, merge=False)
        found = self._evaluated(model, self._floor(), self.members)
        rates = limits.max_extraction_above_floor, limits.max_identifier_extraction_above_floor
        rows = self._rows(stage, found, rates)
        return [*rows, *self._prompted(stage, model)]

    def rounded(self, stage: str, rounding: Callable[[nn.Module], int]) -> list[Row]:
        limits, model = self.recipe.release, self._load(self.weights)
        rounding(model)
        found = self._evaluated(model, self._floor(), self.members)
        rates = limits.max_after_quantisation, limits.max_after_quantisation
        return self._rows(stage, found, rates)

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

    def _rows(self, stage: str, found: dict[str, Any], rates: tuple[float, float]) -> list[Row]:
        limits = self.recipe.release
        membership = limits.max_membership_auc, limits.max_membership_above_floor
        return leak_rows(stage, found, rates, *membership, limits.max_probabilistic_extraction_above_floor)

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
        if floor is not None:
            floor = trained(floor)
        found = self._evaluated(trained(self._load(self.weights)), floor, others, own_floor=True)
        rates = limits.max_after_relearning, limits.max_after_relearning
        return self._rows(stage, found, rates)

    def _evaluated(
        self, model: nn.Module, floor: nn.Module | None, members: Dataset, *, own_floor: bool = False
    ) -> dict[str, Any]:
        """Rates and attacks of one pass; a floor that was not trained is passed once for all stages."""
        evaluator = MemorizationEvaluator(
            model,
            self.tokenizer,
            base_model=floor,
            spec=self.spec,
            settings=replace(self.recipe.evaluation, k=None, generate_tokens=0, choices=None),
            base_scores=self.parts / (OF_STAGE if own_floor else OF_FLOOR),
            scores_dir=self.parts / OF_STAGE,
        )
        return evaluator.evaluate(members, self.heldout)

    def _prompted(self, stage: str, model: nn.Module) -> list[Row]:
        """What the model writes after prompts for identifiers: all tokens of `evaluation.generate_tokens` go there."""
        limit, settings = self.recipe.release.max_identifier_extraction_above_floor, self.recipe.evaluation
        if self.spec.kind != "causal_lm" or settings.generate_tokens == 0:
            reason = NOT_ASKED if self.spec.kind == "causal_lm" else MASKED_CONTINUES
            return prompt_rows(stage, NotApplicable(reason), {}, limit)
        asked = GenerationSettings(
            max_records=settings.max_records,
            budget_tokens=settings.generate_tokens,
            bootstrap=settings.bootstrap,
            seed=SEED,
        )
        figures, counts = prompt_figures(
            model, self.tokenizer, self.members, self.heldout, asked, folder=self.parts / OF_STAGE
        )
        return prompt_rows(stage, figures, counts, limit)

    def _floor(self) -> nn.Module | None:
        if self.floor is None:
            return None
        return self._load(self.floor)

    def _load(self, path: str | Path, *, merge: bool = True, revision: str | None = None) -> nn.Module:
        model = load_model(path, self.spec, revision=revision, merge=merge).eval()
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
