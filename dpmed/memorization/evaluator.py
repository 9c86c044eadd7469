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

from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.battery import (
    CLASSIFIER_BASE,
    CLASSIFIER_TEXT,
    NO_BASE,
    SEED,
    Battery,
    Side,
    classifier_nothing,
)
from dpmed.memorization.checks import check_model, check_records, check_settings, check_tokens, warnings_of
from dpmed.memorization.intervals import NotApplicable, dense_units, figures_json
from dpmed.memorization.scoring import Progress, kept_scores, score_classification, score_records
from dpmed.memorization.statistics import TokenScores, record_units
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
        scores_dir: private folder in which the model's own statistics are kept, so that an evaluation that was killed
            goes on where it stopped (language models). Delete it when the figures are written.
        progress: called with (stage, windows done, windows in all).
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

    def evaluate(self, train: Dataset, heldout: Dataset, canaries: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure memorisation of `train`, with `heldout` as what was never seen.

        Args:
            train: records (see `load_records`) that the model was trained on.
            heldout: records of other patients.
            canaries: manifest of planted canaries; their exposure is not measured yet, and the result says so.

        Returns: {"utility", "memorization", "reference", "not_applicable", "counts", "settings", "warnings"}: plain
        JSON without text.
        Raises: InputError if a side is empty, a text is on both sides, the tokenizer or the context does not fit the
            model, or the model's output is not finite.
        """
        check_records(train, heldout)
        members, others = self._side("train", train), self._side("heldout", heldout)
        tree, counts = (
            self._classifier(members, others)
            if self.spec.kind == "classification"
            else self._language_model(members, others)
        )
        tree["memorization"] |= {
            "canary_exposure": NotApplicable("no canaries were planted")
            if canaries is None
            else NotApplicable("exposure of canaries is not measured by this version"),
            "identifier_leak_rate": NotApplicable("needs generated text, which this version does not make"),
        }
        result, reasons = figures_json(tree)
        return {
            **result,
            "not_applicable": reasons,
            "counts": counts,
            "settings": {**asdict(self.settings), "seed": SEED, "task": self.spec.kind},
            "warnings": warnings_of({side.name: side.encoded for side in (members, others)}, tree["memorization"]),
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
        tree = {
            "utility": {"perplexity": NotApplicable(CLASSIFIER_TEXT)},
            "memorization": {
                **classifier_nothing(),
                "train_perplexity": NotApplicable(CLASSIFIER_TEXT),
                **self.battery.classifier_membership(members, others, logits, losses),
            },
            "reference": {"base_model": NotApplicable(CLASSIFIER_BASE), "heldout": classifier_nothing()},
        }
        return tree, {"train": members.counts(), "heldout": others.counts()}

    def _language_model(self, members: Side, others: Side) -> tuple[dict[str, Any], dict[str, Any]]:
        battery, sides = self.battery, (members, others)
        scores = {side.name: self._scores(self.model, side, side.name, self.scores_dir) for side in sides}
        base = None
        if (before := self.base_model) is not None:
            base = {side.name: self._scores(before, side, f"base {side.name}", self.base_scores) for side in sides}
        memorization, counts = battery.generative(members, scores["train"])
        heldout, heldout_counts = battery.generative(others, scores["heldout"])
        memorization["train_perplexity"] = battery.perplexity(members, scores["train"])
        memorization |= battery.membership(members, others, scores, base)
        tree = {
            "utility": {"perplexity": battery.perplexity(others, scores["heldout"])},
            "memorization": memorization,
            "reference": {
                "base_model": NotApplicable(NO_BASE) if base is None else self._base_figures(members, others, base),
                "heldout": heldout,
            },
        }
        return tree, {"train": members.counts() | counts, "heldout": others.counts() | heldout_counts}

    def _base_figures(self, members: Side, others: Side, base: Mapping[str, TokenScores]) -> dict[str, Any]:
        battery = self.battery
        memorization, _ = battery.generative(members, base["train"])
        memorization["train_perplexity"] = battery.perplexity(members, base["train"])
        memorization |= battery.membership(members, others, base, None, "this is the base model")
        return {
            "utility": {"perplexity": battery.perplexity(others, base["heldout"])},
            "memorization": memorization,
            "heldout": battery.generative(others, base["heldout"])[0],
        }

    def _scores(self, model: nn.Module, side: Side, stage: str, folder: Path | None) -> TokenScores:
        """A model's statistics of one side: from the folder where they were kept, else from a pass of it."""
        inputs = (model, side.encoded, self.spec, self.tokenizer)
        sampling = Sampling(self.settings.temperature, self.settings.top_k)
        size, progress = self.settings.batch_tokens, self._reporter(stage)
        if folder is None:
            return score_records(*inputs, sampling=sampling, batch_tokens=size, progress=progress)
        return kept_scores(*inputs, folder, side.name, sampling=sampling, batch_tokens=size, progress=progress)

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
