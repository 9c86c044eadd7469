"""MemorizationEvaluator: what is measured, in what order, and one JSON-ready result.

Every attack reads the statistics of one forward pass over each side: members (`train`) and non-members (`heldout`). The
same figures of the base model and of held-out records stand beside them, since a model that never saw a record also
completes some of it. No result holds text or an identifier's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from scipy.stats import ks_2samp
from torch import nn

from dpmed.data.identifiers import tag_identifiers
from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.extraction import extraction_figures, identifier_extraction
from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_ratio, dense_units, figures_json
from dpmed.memorization.leakage import identifier_counts, identifier_figures
from dpmed.memorization.membership import (
    Sides,
    attack_figures,
    loss_score,
    min_k_score,
    reference_score,
    zlib_lengths,
    zlib_score,
)
from dpmed.memorization.scoring import score_classification, score_records
from dpmed.memorization.statistics import TokenScores, record_units, scores_fingerprint
from dpmed.recipe import EvaluationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EvaluationSettings = EvaluationSection

SEED = 0
"""Of the choice of records and of all resamples, so that every run of a grid is measured on the same records."""
FEW_RECORDS = 30
ATTACKS = ("loss", "reference", "min_k", "zlib")

NO_BASE = "no base model was given (model.base)"
CLASSIFIER_TEXT = "a classifier gives no probabilities of text"
CLASSIFIER_BASE = "the head of a classifier is not trained before fine-tuning"
MASKED_CONTINUES = "a masked language model does not continue a text"


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
            pass of it. Used again only for the same weights, token ids and task.
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
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.spec = spec or TaskSpec()
        self.settings = settings or EvaluationSettings()
        self.base_scores = base_scores
        self.progress = progress
        _check(self.settings)

    def evaluate(self, train: Dataset, heldout: Dataset, canaries: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure memorisation of `train`, with `heldout` as what was never seen.

        Args:
            train: records (see `load_records`) that the model was trained on.
            heldout: records of other patients.
            canaries: manifest of planted canaries; their exposure is not measured yet, and the result says so.

        Returns: {"utility", "memorization", "reference", "not_applicable", "counts", "settings", "warnings"}: plain
        JSON without text.
        Raises: InputError if a side is empty or the model's output is not finite.
        """
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
            "warnings": _warnings(members, others, tree["memorization"]),
        }

    def _side(self, name: str, records: Dataset) -> Side:
        if len(records) == 0:
            raise InputError(f"{name}: no records to evaluate; check data.{name}")
        if self.settings.k is not None:
            records = tag_identifiers(records, k=self.settings.k)
        if self.settings.max_records is not None and len(records) > self.settings.max_records:
            records = records.select(
                units_sample(list(records["unit"]), self.settings.max_records, SEED), keep_in_memory=True
            )
        encoded = encode(records, self.tokenizer, self.spec)
        return Side(name, records, encoded, record_units(encoded))

    def _classifier(self, members: Side, others: Side) -> tuple[dict[str, Any], dict[str, Any]]:
        (m_loss, o_loss) = (
            score_classification(
                self.model,
                side.encoded,
                self.spec,
                self.tokenizer,
                batch_tokens=self.settings.batch_tokens,
                progress=self._reporter(side.name),
            )[1]
            for side in (members, others)
        )
        attacks: dict[str, Any] = dict.fromkeys(ATTACKS, NotApplicable(CLASSIFIER_TEXT))
        attacks["loss"] = self._attack(members, others, -m_loss, -o_loss, "no record of one side has a label")
        attacks["reference"] = NotApplicable(CLASSIFIER_BASE)
        nothing = {
            "extraction_rate": NotApplicable(CLASSIFIER_TEXT),
            "extraction": NotApplicable(CLASSIFIER_TEXT),
            "identifier_extraction_rate": NotApplicable(CLASSIFIER_TEXT),
            "identifier_extraction": NotApplicable(CLASSIFIER_TEXT),
        }
        tree = {
            "utility": {"perplexity": NotApplicable(CLASSIFIER_TEXT)},
            "memorization": {
                **nothing,
                "train_perplexity": NotApplicable(CLASSIFIER_TEXT),
                **self._membership_headline(attacks),
                "membership": attacks,
            },
            "reference": {"base_model": NotApplicable(CLASSIFIER_BASE), "heldout": dict(nothing)},
        }
        return tree, {"train": members.counts(), "heldout": others.counts()}

    def _language_model(self, members: Side, others: Side) -> tuple[dict[str, Any], dict[str, Any]]:
        scores = {side.name: self._scores(self.model, side, side.name) for side in (members, others)}
        base = None
        if self.base_model is not None:
            base = {side.name: self._base_scores(self.base_model, side) for side in (members, others)}
        memorization, counts = self._generative(members, scores["train"])
        heldout, heldout_counts = self._generative(others, scores["heldout"])
        memorization["train_perplexity"] = self._perplexity(members, scores["train"])
        memorization |= self._membership(members, others, scores, base)
        tree = {
            "utility": {"perplexity": self._perplexity(others, scores["heldout"])},
            "memorization": memorization,
            "reference": {
                "base_model": NotApplicable(NO_BASE) if base is None else self._base_figures(members, others, base),
                "heldout": heldout,
            },
        }
        return tree, {"train": members.counts() | counts, "heldout": others.counts() | heldout_counts}

    def _base_figures(self, members: Side, others: Side, base: Mapping[str, TokenScores]) -> dict[str, Any]:
        memorization, _ = self._generative(members, base["train"])
        memorization["train_perplexity"] = self._perplexity(members, base["train"])
        memorization |= self._membership(members, others, base, None, "this is the base model")
        return {
            "utility": {"perplexity": self._perplexity(others, base["heldout"])},
            "memorization": memorization,
            "heldout": self._generative(others, base["heldout"])[0],
        }

    def _generative(self, side: Side, scores: TokenScores) -> tuple[dict[str, Any], dict[str, Any]]:
        """Extraction of records and identifiers of one side, and their counts."""
        settings, counts = self.settings, {}
        pairs: Any = NotApplicable(MASKED_CONTINUES)
        headline: Any = pairs
        if self.spec.kind == "causal_lm":
            pairs, counts["extraction"] = extraction_figures(
                scores,
                side.units,
                settings.prefix_tokens,
                settings.suffix_tokens,
                bootstrap=settings.bootstrap,
                seed=SEED,
            )
            headline = next(iter(pairs.values()))
        hits = identifier_extraction(scores, side.encoded)
        figures = {
            "extraction_rate": headline,
            "extraction": pairs,
            **identifier_figures(hits, bootstrap=settings.bootstrap, seed=SEED),
        }
        counts["n_records_without_scored_token"] = int(np.isnan(loss_score(scores)).sum())
        return figures, counts | identifier_counts(hits)

    def _membership(
        self,
        members: Side,
        others: Side,
        scores: Mapping[str, TokenScores],
        base: Mapping[str, TokenScores] | None,
        no_reference: str = NO_BASE,
    ) -> dict[str, Any]:
        def of(side: Side) -> dict[str, np.ndarray]:
            own = scores[side.name]
            found = {
                "loss": loss_score(own),
                "min_k": min_k_score(own, self.settings.min_k),
                "zlib": zlib_score(own, zlib_lengths(side.records["text"])),
            }
            return found if base is None else found | {"reference": reference_score(own, base[side.name])}

        of_members, of_others = of(members), of(others)
        attacks: dict[str, Any] = {}
        for name in ATTACKS:
            if name not in of_members:
                attacks[name] = NotApplicable(no_reference)
                continue
            reason = "no record of one side has a scored token"
            attacks[name] = self._attack(members, others, of_members[name], of_others[name], reason)
        return {**self._membership_headline(attacks), "membership": attacks}

    def _attack(self, members: Side, others: Side, m: np.ndarray, o: np.ndarray, reason: str) -> Any:
        """One attack's figures over the records that have a score; a reason if a side has none."""
        has_m, has_o = np.isfinite(m), np.isfinite(o)
        if not has_m.any() or not has_o.any():
            return NotApplicable(reason)
        sides = Sides(m[has_m], o[has_o], members.units[has_m], others.units[has_o])
        return attack_figures(sides, self.settings.fpr, bootstrap=self.settings.bootstrap, seed=SEED)

    def _membership_headline(self, attacks: Mapping[str, Any]) -> dict[str, Any]:
        """The reference attack stands for all where there is a base model, else the loss attack."""
        name = "loss" if isinstance(attacks["reference"], NotApplicable) else "reference"
        chosen = attacks[name]
        keys = ["auc", *(f"tpr_at_fpr_{fpr:g}" for fpr in self.settings.fpr)]
        figures = {f"membership_{key}": chosen if isinstance(chosen, NotApplicable) else chosen[key] for key in keys}
        return {"membership_attack": name, **figures}

    def _perplexity(self, side: Side, scores: TokenScores) -> Measure | NotApplicable:
        """exp of the mean negative log-likelihood per text token (masked_lm: pseudo-perplexity)."""
        loss = -scores.per_record(scores.log_prob)
        tokens = scores.per_record(np.ones(len(scores.record)))
        if tokens.sum() == 0:
            return NotApplicable("no scored token")
        bounds = bootstrap_ratio(loss, tokens, side.units, self.settings.bootstrap, SEED)
        if dense_units(side.units)[1] < 2:
            bounds = (np.nan, np.nan)  # one patient tells nothing about another
        value, low, high = np.exp(np.minimum([loss.sum() / tokens.sum(), *bounds], 700.0))  # exp(710) overflows
        return Measure(float(value), float(low), float(high), int(tokens.sum()), "worse")

    def _scores(self, model: nn.Module, side: Side, stage: str) -> TokenScores:
        return score_records(
            model,
            side.encoded,
            self.spec,
            self.tokenizer,
            batch_tokens=self.settings.batch_tokens,
            progress=self._reporter(stage),
        )

    def _base_scores(self, base_model: nn.Module, side: Side) -> TokenScores:
        """The base model's statistics: from the folder where they were kept, else from a pass of it."""
        if self.base_scores is None:
            return self._scores(base_model, side, f"base {side.name}")
        fingerprint = scores_fingerprint(base_model, side.encoded, self.spec)
        path = self.base_scores / f"{side.name}-{fingerprint[:16]}.safetensors"
        if path.is_file():
            return TokenScores.load(path, fingerprint)
        scores = self._scores(base_model, side, f"base {side.name}")
        scores.save(path, fingerprint)
        return scores

    def _reporter(self, stage: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


def units_sample(units: list[str], max_records: int, seed: int) -> list[int]:
    """Rows of randomly chosen whole units, in row order: as many units as fit into `max_records`, at least one."""
    dense, n_units = dense_units(np.asarray(units, dtype=str))
    order = np.random.default_rng(seed).permutation(n_units)
    fitting = np.cumsum(np.bincount(dense, minlength=n_units)[order]) <= max_records
    chosen = order[: max(1, int(fitting.sum()))]
    return np.flatnonzero(np.isin(dense, chosen)).tolist()


def _check(settings: EvaluationSettings) -> None:
    """Refuse settings that no figure can be computed from.

    Raises: InputError naming the key.
    """
    for name in ("prefix_tokens", "suffix_tokens"):
        lengths = getattr(settings, name)
        if not lengths or min(lengths) < 1:
            raise InputError(f"evaluation.{name} is {lengths}; give one or more lengths of at least 1")
    if any(not 0 < fpr < 1 for fpr in settings.fpr):
        raise InputError(f"evaluation.fpr is {settings.fpr}; give rates between 0 and 1")
    if not 0 < settings.min_k <= 1:
        raise InputError(f"evaluation.min_k is {settings.min_k}; give a share above 0 and at most 1")
    for name in ("batch_tokens", "bootstrap"):
        if getattr(settings, name) < 1:
            raise InputError(f"evaluation.{name} is {getattr(settings, name)}; give a number of at least 1")
    if settings.max_records is not None and settings.max_records < 1:
        raise InputError(f"evaluation.max_records is {settings.max_records}; give a number of at least 1, or null")


def _warnings(members: Side, others: Side, memorization: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = [
        f"{side.name}: only {side.encoded.n_records} records; the intervals are wide"
        for side in (members, others)
        if side.encoded.n_records < FEW_RECORDS
    ]
    m, o = (_text_tokens(side.encoded) for side in (members, others))
    if float(np.asarray(ks_2samp(m, o))[1]) < 0.001:  # the p-value
        found.append(
            "train and held-out records differ in length: membership attacks may tell the two sides apart by that alone"
        )
    auc = memorization["membership_auc"]
    if isinstance(auc, Measure) and auc.high < 0.5:
        found.append(
            "membership AUC is below 0.5: this does not mean more privacy, but that train and held-out records differ"
        )
    return found


def _text_tokens(encoded: EncodedRecords) -> np.ndarray:
    """Text tokens of each record [r]."""
    lengths = np.zeros(encoded.n_records, dtype=np.int64)
    for example in encoded:
        lengths[example.record] += example.text_end - example.text_start
    return lengths
