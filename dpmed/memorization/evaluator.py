"""MemorizationEvaluator: what is measured, in what order, and one JSON-ready result.

Every attack reads the statistics of one forward pass over each side: members (`train`) and non-members (`heldout`). The
same figures of the base model and of held-out records stand beside them, since a model that never saw a record also
completes some of it. No result holds text or an identifier's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from torch import nn

from dpmed.data.canaries import Manifest
from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.battery import (
    CLASSIFIER_BASE,
    CLASSIFIER_TEXT,
    MASKED_CONTINUES,
    NO_BASE,
    SEED,
    TEXT_UTILITY,
    Battery,
    Side,
    classifier_nothing,
)
from dpmed.memorization.canary_figures import Claim, canary_figures, members_without_canaries, no_canaries, no_claim
from dpmed.memorization.checks import (
    check_dates,
    check_model,
    check_records,
    check_settings,
    check_tokens,
    record_days,
    warnings_of,
)
from dpmed.memorization.further import (
    DIFFERENCES,
    choices_of,
    generated_of,
    kinds_of,
    leak_differences,
    not_generated,
    persistence_of,
    read_reference,
)
from dpmed.memorization.intervals import NotApplicable, dense_units, figures_json
from dpmed.memorization.leak_differences import Leaked
from dpmed.memorization.persistence import MEMORIZED_FILE, MemorizedSet
from dpmed.memorization.scoring import Progress, kept_scores, score_classification
from dpmed.memorization.statistics import TokenScores, record_units, weights_fingerprint
from dpmed.memorization.vocabulary import Sampling
from dpmed.recipe import EvaluationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EvaluationSettings = EvaluationSection


class MemorizationEvaluator:
    """Measures what a model memorised of its training records.

    Args:
        model: any causal or masked language model or classifier, PEFT models included, on the device it should use.
        tokenizer: the model's own, a fast one.
        base_model: the model before fine-tuning: reference attack and reference figures. None where there is none, or
            where `model` is that model.
        spec: how the records become tokens; the one the model was trained with.
        settings: lengths, rates, resamples (`recipe.EvaluationSection`).
        base_scores: private folder in which the base model's statistics are kept, so that all runs of a grid share one
            pass of it. Used again only for the same weights, token ids, task and sampling.
        scores_dir: private folder in which statistics (without `base_scores` those of the base model too), those of
            canaries and multiple-choice items, and generated text are kept, so that an evaluation that was killed goes
            on where it stopped (language models). Delete it when the figures are written: generated text may hold
            patients' data.
        progress: called with (stage, windows done, windows in all).

    Attributes:
        memorized: after `evaluate` of a causal model: what it has memorised, for a later evaluation to compare with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_model: nn.Module | None = None,
        spec: TaskSpec | None = None,
        settings: EvaluationSettings | None = None,
        base_scores: Path | None = None,
        scores_dir: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.spec = spec or TaskSpec()
        self.settings = settings or EvaluationSettings()
        self.base_scores = base_scores
        self.scores_dir = scores_dir
        self.progress = progress
        check_settings(self.settings)
        check_model(model, tokenizer, self.spec, self.settings)
        self.battery = Battery(self.spec, self.settings)
        self.memorized: MemorizedSet | None = None
        self._before: MemorizedSet | None = None
        self._weights: dict[nn.Module, str] = {}

    def evaluate(
        self,
        train: Dataset,
        heldout: Dataset,
        canaries: Manifest | None = None,
        *,
        claim: Claim | None = None,
        before: Path | None = None,
    ) -> dict[str, Any]:
        """Measure memorisation of `train`, with `heldout` as what was never seen.

        Args:
            train: records (see `load_records`) that the model was trained on.
            heldout: records of other patients.
            canaries: manifest of the canaries planted in `train`. They give exposure and a lower bound on epsilon, and
                are left out of all other figures.
            claim: what the run's certificate says; the audit stands beside it.
            before: folder of an earlier evaluation of the same records, of the model that this one was trained on from
                (causal_lm): what was memorised then and still is.

        Returns: {"utility", "memorization", "reference", "not_applicable", "counts", "settings", "warnings"}: plain
        JSON without text.
        Raises: InputError if a side is empty, a text is on both sides, the tokenizer or the context does not fit the
            model, the canaries or the earlier evaluation are of other records, or the model's output is not finite.
        """
        check_records(train, heldout)
        check_dates(train, heldout, self.settings)
        everyone, n_planted = train, 0
        if canaries is not None:
            train, n_planted = members_without_canaries(everyone, canaries)
        self._before = None if before is None else MemorizedSet.load(before / MEMORIZED_FILE)
        self._weights.clear()
        members, others = self._side("train", train), self._side("heldout", heldout)
        tree, counts = (
            self._classifier(members, others)
            if self.spec.kind == "classification"
            else self._language_model(members, others, (train, heldout))
        )
        if canaries is None:
            tree["memorization"] |= no_canaries()
        else:
            counts["train"]["n_canary_records_left_out"] = n_planted
            claim = claim or no_claim(len(set(everyone["unit"])))
            tree["memorization"] |= self._canaries(canaries, claim)
        result, reasons = figures_json(tree)
        return {
            **result,
            "not_applicable": reasons,
            "counts": counts,
            "settings": {**asdict(self.settings), "seed": SEED, "task": self.spec.kind},
            "warnings": warnings_of(
                {side.name: side.encoded for side in (members, others)},
                tree["memorization"],
                self.settings,
                [record_days(s.records) for s in (members, others)] if "date" in train.column_names else [],
            ),
        }

    def _side(self, name: str, records: Dataset) -> Side:
        if self.settings.k is not None:
            records = tag_identifiers(records, k=self.settings.k)
        if self.settings.max_records is not None and len(records) > self.settings.max_records:
            records = records.select(
                units_sample(list(records["unit"]), self.settings.max_records, SEED), keep_in_memory=True
            )
        encoded = encode(records, self.tokenizer, self.spec)
        check_tokens(self.model, encoded, "the model")
        if self.base_model is not None:
            check_tokens(self.base_model, encoded, "the base model")
        return Side(name, records, encoded, record_units(encoded))

    def _classifier(self, members: Side, others: Side) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {
            side.name: score_classification(
                self.model,
                side.encoded,
                self.spec,
                self.tokenizer,
                batch_tokens=self.settings.batch_tokens,
                progress=self._reporter(side.name),
            )
            for side in (members, others)
        }
        logits, losses = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        nothing = not_generated(CLASSIFIER_TEXT)["memorization"]
        nothing |= dict.fromkeys(("kinds", "persistence", "minus_base", *DIFFERENCES), NotApplicable(CLASSIFIER_TEXT))
        tree = {
            "utility": dict.fromkeys(TEXT_UTILITY, NotApplicable(CLASSIFIER_TEXT)),
            "memorization": {
                **classifier_nothing(),
                **nothing,
                "train_perplexity": NotApplicable(CLASSIFIER_TEXT),
                **self.battery.classifier_membership(members, others, logits, losses),
            },
            "reference": {"base_model": NotApplicable(CLASSIFIER_BASE), "heldout": classifier_nothing()},
        }
        return tree, {"train": members.counts(), "heldout": others.counts()}

    def _language_model(
        self, members: Side, others: Side, records: tuple[Dataset, Dataset]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        battery, sides = self.battery, (members, others)
        scores = {side.name: self._scores(self.model, side, side.name, self.scores_dir) for side in sides}
        base = None
        if (before := self.base_model) is not None:
            folder = self.base_scores or self.scores_dir
            base = {side.name: self._scores(before, side, f"base {side.name}", folder) for side in sides}
        memorization, counts = battery.generative(members, scores["train"])
        heldout, heldout_counts = battery.generative(others, scores["heldout"])
        memorization["train_perplexity"] = battery.perplexity(members, scores["train"])
        memorization |= battery.membership(members, others, scores, base)
        memorization["minus_base"] = (
            NotApplicable(NO_BASE) if base is None else battery.minus_base(members, scores["train"], base["train"])
        )
        tree: dict[str, Any] = {
            "utility": battery.utility(others, scores["heldout"]),
            "memorization": memorization,
            "reference": {
                "base_model": NotApplicable(NO_BASE) if base is None else self._base_figures(members, others, base),
                "heldout": heldout,
            },
        }
        all_counts = {"train": members.counts() | counts, "heldout": others.counts() | heldout_counts}
        if self.spec.kind == "causal_lm":
            self._continued(tree, all_counts, sides, records, scores, base)
        else:
            memorization |= {"kinds": NotApplicable(MASKED_CONTINUES), "persistence": NotApplicable(MASKED_CONTINUES)}
            memorization |= not_generated(MASKED_CONTINUES)["memorization"]
            memorization |= dict.fromkeys(DIFFERENCES, NotApplicable(MASKED_CONTINUES))
        return tree, all_counts

    def _continued(
        self,
        tree: dict[str, Any],
        counts: dict[str, Any],
        sides: tuple[Side, Side],
        records: tuple[Dataset, Dataset],
        scores: Mapping[str, TokenScores],
        base: Mapping[str, TokenScores] | None,
    ) -> None:
        """Add to the tree what a model that continues a text shows besides: kinds, persistence, generated text."""
        settings, places = self.settings, {"train": tree["memorization"], "heldout": tree["reference"]["heldout"]}
        reference = read_reference(settings, self.tokenizer)
        for side in sides:
            before = None if base is None else base[side.name]
            figures, found, kept = kinds_of(side, scores[side.name], before, reference, settings)
            places[side.name]["kinds"], counts[side.name]["kinds"] = figures, found
            if side.name == "train":
                self.memorized = kept
                tree["memorization"]["persistence"] = persistence_of(self._before, kept, settings)
        choices, counts["choices"] = choices_of(
            *(self.model, self.base_model, self.tokenizer, settings),
            folder=self.scores_dir,
            fingerprint=self._fingerprint,
            progress=self._reporter("multiple choice"),
        )
        tree["utility"]["multiple_choice"] = choices
        of_base = tree["reference"]["base_model"]
        models = [(self.model, places["train"], places["heldout"], "generated")]
        if self.base_model is not None and isinstance(of_base, dict):
            models.append((self.base_model, of_base["memorization"], of_base["heldout"], "generated_base"))
        all_leaked: list[dict[str, dict[str, Leaked]]] = []
        for model, members, others, name in models:
            figures, counts[name], leaked = generated_of(
                model,
                self.tokenizer,
                *records,
                settings,
                folder=self.scores_dir,
                weights=self._kept_weights(model),
                progress=self.progress,
            )
            members |= figures["memorization"]
            others |= figures["heldout"]
            all_leaked.append(leaked)
        for name, differences in leak_differences(all_leaked, settings).items():
            there = tree["memorization"].get(name, {})  # minus_base without a base model holds a reason
            if isinstance(there, dict):
                tree["memorization"][name] = there | differences

    def _canaries(self, manifest: Manifest, claim: Claim) -> dict[str, Any]:
        return canary_figures(
            self.model,
            manifest,
            self.spec,
            self.tokenizer,
            claim=claim,
            batch_tokens=self.settings.batch_tokens,
            bootstrap=self.settings.bootstrap,
            candidates=self.settings.canary_candidates,
            folder=self.scores_dir,
            weights=self._kept_weights(self.model),
            progress=self._reporter("canaries"),
        )

    def _base_figures(self, members: Side, others: Side, base: Mapping[str, TokenScores]) -> dict[str, Any]:
        battery = self.battery
        memorization, _ = battery.generative(members, base["train"])
        memorization["train_perplexity"] = battery.perplexity(members, base["train"])
        memorization |= battery.membership(members, others, base, None, "this is the base model")
        return {
            "utility": battery.utility(others, base["heldout"]),
            "memorization": memorization,
            "heldout": battery.generative(others, base["heldout"])[0],
        }

    def _scores(self, model: nn.Module, side: Side, stage: str, folder: Path | None) -> TokenScores:
        """A model's statistics of one side: from the folder where they were kept, else from a pass of it."""
        return kept_scores(
            *(model, side.encoded, self.spec, self.tokenizer, folder, side.name),
            sampling=Sampling(self.settings.temperature, self.settings.top_k),
            batch_tokens=self.settings.batch_tokens,
            weights=None if folder is None else self._fingerprint(model),
            progress=self._reporter(stage),
        )

    def _kept_weights(self, model: nn.Module) -> str | None:
        """The fingerprint, where something is kept that needs it."""
        return None if self.scores_dir is None else self._fingerprint(model)

    def _fingerprint(self, model: nn.Module) -> str:
        """Hash of a model's weights, taken once per evaluation: for a large model that is a minute."""
        if model not in self._weights:
            self._weights[model] = weights_fingerprint(model)
        return self._weights[model]

    def _reporter(self, stage: str) -> Progress | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


def units_sample(units: list[str], max_records: int, seed: int) -> list[int]:
    """Rows of randomly chosen whole units, in row order: as many units as fit into `max_records`, at least one."""
    dense, n_units = dense_units(np.asarray(units, dtype=str))
    order = np.random.default_rng(seed).permutation(n_units)
    fitting = np.cumsum(np.bincount(dense, minlength=n_units)[order]) <= max_records
    chosen = order[: max(1, int(fitting.sum()))]
    return np.flatnonzero(np.isin(dense, chosen)).tolist()
