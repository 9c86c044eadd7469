"""The figures of one forward pass: all that the pure metrics say of one side, and of two sides together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from dpmed.data.tasks import EncodedRecords, TaskSpec
from dpmed.memorization.checks import record_days, text_tokens
from dpmed.memorization.extraction import (
    exact_memorization,
    extraction_figures,
    greedy_extraction,
    identifier_extraction,
    probabilistic_extraction,
    strength_figures,
)
from dpmed.memorization.fill_mask import fill_mask_figures
from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_ratio, dense_units
from dpmed.memorization.leakage import DIRECT, identifier_counts, identifier_figures
from dpmed.memorization.membership import (
    Sides,
    attack_figures,
    ez_score,
    loss_score,
    margin_score,
    matched_records,
    min_k_plus_plus_score,
    min_k_score,
    modified_entropy_score,
    reference_score,
    zlib_lengths,
    zlib_score,
)
from dpmed.memorization.other_words import other_word_figures
from dpmed.memorization.paired import paired_mean_difference, paired_rate_difference
from dpmed.memorization.statistics import TokenScores
from dpmed.recipe import EvaluationSection

SEED = 0
"""Of the choice of records and of all resamples, so that every run of a grid is measured on the same records."""
ATTACKS = ("loss", "reference", "min_k", "min_k_plus_plus", "zlib", "ez")
WITH_BASE = ("reference", "ez")
"""Attacks that compare the model with the one before fine-tuning."""
CONTINUED = ("extraction_rate", "extraction", "probabilistic_extraction", "extraction_strength")
"""Figures of models that continue a text."""
TEXT_UTILITY = ("perplexity", "other_words_accuracy", "other_words_perplexity")

NO_BASE = "no base model was given (model.base)"
CLASSIFIER_TEXT = "a classifier gives no probabilities of text"
CLASSIFIER_BASE = "the head of a classifier is not trained before fine-tuning"
MASKED_CONTINUES = "a masked language model does not continue a text"
CAUSAL_FILLS = "a causal language model fills no masks; identifier_extraction is its counterpart"
UNMATCHED = "no member and non-member of the same length or date has a score; compare sides that are more alike"
UNLABELLED = "no record of one side has a label"


@dataclass(frozen=True)
class Side:
    """The records of one side, tokenised."""

    name: str
    records: Dataset
    encoded: EncodedRecords
    units: np.ndarray
    """Unit of each record [r]."""

    def counts(self) -> dict[str, int]:
        return {
            "n_records": self.encoded.n_records,
            "n_units": len(self.encoded.unit_names),
            "n_windows": len(self.encoded),
            "n_records_cut": self.encoded.n_records_cut,
            "n_text_tokens": sum(e.text_end - e.text_start for e in self.encoded),
        }


@dataclass(frozen=True)
class Battery:
    """What is measured, and how: the same for the model and for its base.

    Args:
        spec: the task.
        settings: lengths, rates, resamples.
    """

    spec: TaskSpec
    settings: EvaluationSection

    def generative(self, side: Side, scores: TokenScores) -> tuple[dict[str, Any], dict[str, Any]]:
        """Extraction of records and identifiers of one side, and their counts."""
        settings, counts = self.settings, {}
        resamples = {"bootstrap": settings.bootstrap, "seed": SEED}
        figures: dict[str, Any] = dict.fromkeys(CONTINUED, NotApplicable(MASKED_CONTINUES))
        figures |= strength_figures(scores, side.units, **resamples)
        if self.spec.kind == "causal_lm":
            prefixes, suffixes = settings.prefix_tokens, settings.suffix_tokens
            pairs, counts["extraction"] = extraction_figures(scores, side.units, prefixes, suffixes, **resamples)
            figures["extraction_rate"], figures["extraction"] = next(iter(pairs.values())), pairs
            figures["probabilistic_extraction"] = probabilistic_extraction(
                scores, side.units, prefixes[0], suffixes[0], settings.tries, settings.probability, **resamples
            )
            figures["fill_mask"] = NotApplicable(CAUSAL_FILLS)
        else:
            figures["extraction_strength"] = NotApplicable(MASKED_CONTINUES)
            figures["fill_mask"] = fill_mask_figures(scores, side.encoded, **resamples)
        hits = identifier_extraction(scores, side.encoded)
        counts["n_records_without_scored_token"] = int(np.isnan(loss_score(scores)).sum())
        return figures | identifier_figures(hits, **resamples), counts | identifier_counts(hits)

    def perplexity(self, side: Side, scores: TokenScores) -> Measure | NotApplicable:
        """exp of the mean negative log-likelihood per text token (masked_lm: pseudo-perplexity)."""
        loss = -scores.per_record(scores.log_prob)
        tokens = scores.n_scored
        if tokens.sum() == 0:
            return NotApplicable("no scored token")
        if not np.isfinite(loss).all():
            return NotApplicable("the model rules a token of the records out (probability 0): perplexity is infinite")
        bounds = bootstrap_ratio(loss, tokens, side.units, self.settings.bootstrap, SEED)
        if dense_units(side.units)[1] < 2:
            bounds = (np.nan, np.nan)  # one patient tells nothing about another
        value, low, high = np.exp(np.minimum([loss.sum() / tokens.sum(), *bounds], 700.0))  # exp(710) overflows
        return Measure(float(value), float(low), float(high), int(tokens.sum()), "worse")

    def utility(self, side: Side, scores: TokenScores) -> dict[str, Any]:
        """How well held-out text is predicted: all of it, and what is in no identifier."""
        resamples: dict[str, Any] = {"bootstrap": self.settings.bootstrap, "seed": SEED}
        figures = other_word_figures(scores, side.encoded, self.spec, **resamples)
        return {"perplexity": self.perplexity(side, scores), **figures}

    def minus_base(self, side: Side, scores: TokenScores, base: TokenScores) -> dict[str, Any]:
        """Rates of the model minus those of its base, on the same records: the choice of patients cancels."""
        resamples: dict[str, Any] = {"bootstrap": self.settings.bootstrap, "seed": SEED}
        found: dict[str, Any] = {"extraction_rate": NotApplicable(MASKED_CONTINUES)}
        if self.spec.kind == "causal_lm":
            lengths = self.settings.prefix_tokens[0], self.settings.suffix_tokens[0]
            eligible, own = greedy_extraction(scores, *lengths)
            before = greedy_extraction(base, *lengths)[1]
            found["extraction_rate"] = NotApplicable("no record is long enough")
            if eligible.any():
                found["extraction_rate"] = paired_rate_difference(
                    own[eligible], before[eligible], side.units[eligible], "worse", **resamples
                )
        hits, hits_before = (identifier_extraction(s, side.encoded) for s in (scores, base))
        direct = np.isin(hits.source, DIRECT)
        groups = {"all": direct} | {str(name): direct & (hits.type == name) for name in np.unique(hits.type[direct])}
        found["identifier_extraction"] = {
            name: paired_rate_difference(
                hits.hit[chosen], hits_before.hit[chosen], hits.unit[chosen], "worse", **resamples
            )
            if chosen.any()
            else NotApplicable("no known identifier in the records; name data.identifiers")
            for name, chosen in groups.items()
        }
        found["exact_memorization"] = paired_mean_difference(
            *(exact_memorization(scores), exact_memorization(base)),
            side.units,
            "worse",
            weights=scores.n_scored,
            **resamples,
        )
        return found

    def membership(
        self,
        members: Side,
        others: Side,
        scores: Mapping[str, TokenScores],
        base: Mapping[str, TokenScores] | None,
        no_reference: str = NO_BASE,
    ) -> dict[str, Any]:
        """All attacks of a language model, and the one that stands for them.

        Args:
            scores: of both sides, by name.
            base: of the model before fine-tuning, or None.
            no_reference: why there is none.
        """

        def of(side: Side) -> dict[str, np.ndarray]:
            own, min_k = scores[side.name], self.settings.min_k
            found = {
                "loss": loss_score(own),
                "min_k": min_k_score(own, min_k),
                "min_k_plus_plus": min_k_plus_plus_score(own, min_k),
                "zlib": zlib_score(own, zlib_lengths(side.records["text"])),
            }
            if base is None:
                return found
            before = base[side.name]
            return found | {"reference": reference_score(own, before), "ez": ez_score(own, before)}

        of_members, of_others = of(members), of(others)
        attacks: dict[str, Any] = dict.fromkeys(ATTACKS, NotApplicable(no_reference))
        for name in of_members:
            reason = "no record of one side has a scored token"
            attacks[name] = self._attack(members, others, of_members[name], of_others[name], reason)
        return {**self._headline(attacks), "membership": attacks}

    def classifier_membership(
        self, members: Side, others: Side, logits: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """All attacks of a classifier, from its logits [r, l] and losses [r] of both sides, by name."""
        attacks: dict[str, Any] = dict.fromkeys(ATTACKS, NotApplicable(CLASSIFIER_TEXT))
        attacks |= dict.fromkeys(WITH_BASE, NotApplicable(CLASSIFIER_BASE))
        labels = {side.name: label_array(side.encoded, self.spec) for side in (members, others)}
        found = {
            "loss": {name: -loss for name, loss in losses.items()},
            "margin": {name: margin_score(logits[name], labels[name]) for name in logits},
            "modified_entropy": {name: modified_entropy_score(logits[name], labels[name]) for name in logits},
        }
        for name, of in found.items():
            attacks[name] = self._attack(members, others, of[members.name], of[others.name], UNLABELLED)
        return {**self._headline(attacks), "membership": attacks}

    def _attack(self, members: Side, others: Side, m: np.ndarray, o: np.ndarray, reason: str) -> Any:
        """One attack's figures over the records that have a score; a reason if a side has none."""
        has_m, has_o = np.isfinite(m), np.isfinite(o)
        if self.settings.match_lengths or self.settings.match_dates:
            kept = matched_records(*(self._properties(side) for side in (members, others)), seed=SEED)
            has_m, has_o, reason = has_m & kept[0], has_o & kept[1], UNMATCHED
        if not has_m.any() or not has_o.any():
            return NotApplicable(reason)
        sides = Sides(m[has_m], o[has_o], members.units[has_m], others.units[has_o])
        return attack_figures(sides, self.settings.fpr, bootstrap=self.settings.bootstrap, seed=SEED)

    def _properties(self, side: Side) -> list[np.ndarray]:
        """What members and non-members are matched by, each [r]."""
        found = [text_tokens(side.encoded)] if self.settings.match_lengths else []
        return [*found, record_days(side.records)] if self.settings.match_dates else found

    def _headline(self, attacks: Mapping[str, Any]) -> dict[str, Any]:
        """The reference attack stands for all where there is a base model, else the loss attack."""
        name = "loss" if isinstance(attacks["reference"], NotApplicable) else "reference"
        chosen = attacks[name]
        keys = ["auc", *(f"tpr_at_fpr_{fpr:g}" for fpr in self.settings.fpr)]
        figures = {f"membership_{key}": chosen if isinstance(chosen, NotApplicable) else chosen[key] for key in keys}
        return {"membership_attack": name, **figures}


def classifier_nothing() -> dict[str, Any]:
    """What a classifier cannot leak, since it writes no text, with the reason."""
    names = (*CONTINUED, "exact_memorization", "fill_mask", "identifier_extraction_rate", "identifier_extraction")
    return dict.fromkeys(names, NotApplicable(CLASSIFIER_TEXT))


def label_array(encoded: EncodedRecords, spec: TaskSpec) -> np.ndarray:
    """Labels of all records as `membership.margin_score` takes them: int [r], -1 for none; or 0 and 1 [r, l], NaN."""
    if not spec.multi_label:
        labels = np.full(encoded.n_records, -1, dtype=np.int64)
        for example in encoded:
            if isinstance(example.label, int):
                labels[example.record] = example.label
        return labels
    several = np.full((encoded.n_records, len(spec.labels)), np.nan)
    for example in encoded:
        if isinstance(example.label, tuple):
            several[example.record] = 0.0
            several[example.record, list(example.label)] = 1.0
    return several
