"""F1, accuracy and AUROC: the point values as `evaluate` metrics, and the same figures over resampled patients at once.

`evaluate.load` downloads and runs a script, so the metrics stand here, around scikit-learn. The bootstrap does not call
them a thousand times: F1 and AUROC need only weighted counts, which one matrix product per block of resamples gives.

Shapes: n = records, l = labels, b = resamples, u = units. Targets and predictions are bool [n, l] for one label per
record too (one True per row): with all labels counted, F1 and accuracy are the same in both readings.
"""

from __future__ import annotations

from typing import Any

import huggingface_hub.hf_api  # noqa: F401  # isort: skip  (first, else evaluate's import of the hub prints an error)
import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from sklearn.metrics import accuracy_score, f1_score

from dpmed.memorization.intervals import dense_units, unit_multiplicities

AVERAGES = ("weighted", "macro", "micro")
_CELLS_AT_ONCE = 500_000  # of a block of resamples; a few MB per temporary, which stays in the processor's cache


class _LocalMetric(evaluate.Metric):
    """An `evaluate.Metric` that touches neither network nor disk.

    Args:
        multi_label: inputs are 0/1 vectors, one place per label, instead of label numbers.
    """

    about: str = ""

    def __init__(self, *, multi_label: bool = False) -> None:
        # The seed only guards numpy's global state around `_compute`, which draws nothing.
        super().__init__(config_name="multilabel" if multi_label else "default", keep_in_memory=True, seed=0)

    def _build_data_dir(self) -> str:
        """No folder: the base class would make one in the user's cache, even for data kept in memory."""
        return ""

    def _info(self) -> evaluate.MetricInfo:
        one = Sequence(Value("int32")) if self.config_name == "multilabel" else Value("int32")
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description="predictions, references: label numbers, or 0/1 vectors (multi-label).",
            features=Features({"predictions": one, "references": one}),
        )


class F1(_LocalMetric):
    """F1 of scikit-learn: `compute(predictions=, references=, average=, labels=)` gives {"f1": value}."""

    about = "Harmonic mean of precision and recall; 0 for a label that is neither predicted nor true."

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float]:
        average, labels = options.get("average", "weighted"), options.get("labels")
        value = f1_score(references, predictions, average=average, labels=labels, zero_division=0)  # pyright: ignore
        return {"f1": float(value)}


class Accuracy(_LocalMetric):
    """Share of records whose label, or whole set of labels, is right: {"accuracy": value}."""

    about = "Share of records that are entirely right (subset accuracy where a record has several labels)."

    def _compute(self, *, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def f1_values(targets: np.ndarray, predicted: np.ndarray, *, multi_label: bool) -> dict[str, float]:
    """F1 for each of `AVERAGES`, of bool [n, l] targets and predictions; n >= 1."""
    metric = F1(multi_label=multi_label)
    if multi_label:
        inputs = {"references": targets.astype(int).tolist(), "predictions": predicted.astype(int).tolist()}
    else:
        inputs = {"references": targets.argmax(1).tolist(), "predictions": predicted.argmax(1).tolist()}
    labels = list(range(targets.shape[1]))
    values: dict[str, float] = {}
    for average in AVERAGES:
        computed = metric.compute(**inputs, average=average, labels=labels)
        assert computed is not None  # only the main process of several computes
        values[average] = computed["f1"]
    return values


def f1_from_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> dict[str, np.ndarray]:
    """F1 for each of `AVERAGES` from counts per label, [..., l] each.

    Returns: [...] per average. As with scikit-learn's `zero_division=0`, a label without any count has F1 0.
    """
    support = tp + fn
    per_label = _ratio(2 * tp, 2 * tp + fp + fn)
    return {
        "weighted": _ratio((per_label * support).sum(-1), support.sum(-1)),
        "macro": per_label.mean(-1),
        "micro": _ratio(2 * tp.sum(-1), (2 * tp + fp + fn).sum(-1)),
    }


def resampled_f1(
    targets: np.ndarray, predicted: np.ndarray, units: np.ndarray, *, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """F1 over resamples of whole units.

    Args:
        targets: bool [n, l].
        predicted: bool [n, l].
        units: unit of each record, [n].
        n_resamples: b.
        seed: of the draws.

    Returns: [b] for each of `AVERAGES`.
    """
    dense, n_units = dense_units(units)
    counts = np.concatenate([targets & predicted, ~targets & predicted, targets & ~predicted], axis=1)
    by_unit = np.zeros((n_units, counts.shape[1]))
    np.add.at(by_unit, dense, counts)
    drawn = [block @ by_unit for block in unit_multiplicities(n_units, n_resamples, seed)]  # [b, 3 l] each
    tp, fp, fn = np.split(np.concatenate(drawn or [by_unit[:0]]), 3, axis=1)
    return f1_from_counts(tp, fp, fn)


def resampled_auroc_macro(
    scores: np.ndarray, targets: np.ndarray, units: np.ndarray, *, n_resamples: int, seed: int
) -> np.ndarray:
    """Mean over labels of the area under the ROC curve, over resamples of whole units.

    Args:
        scores: [n, l], higher where the label is more likely.
        targets: bool [n, l].
        units: unit of each record, [n].
        n_resamples: b.
        seed: of the draws.

    Returns: [b]. A label that a resample shows with one class only is left out of that resample's mean; NaN where no
    label is left.
    """
    dense, n_units = dense_units(units)
    rows = max(1, _CELLS_AT_ONCE // max(1, len(dense)))
    means: list[np.ndarray] = []
    for block in unit_multiplicities(n_units, n_resamples, seed):
        for start in range(0, len(block), rows):
            weights = block[start : start + rows, dense].astype(np.float64)  # [b, n]
            each = [weighted_auroc(scores[:, i], targets[:, i], weights) for i in range(scores.shape[1])]
            table = np.stack(each, axis=1)  # [b, l]
            known = np.isfinite(table)
            means.append(_ratio(np.where(known, table, 0.0).sum(1), known.sum(1), empty=np.nan))
    return np.concatenate(means) if means else np.empty(0)


def weighted_auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Chance that a true record scores above a false one, ties counting half, under each row of weights.

    Args:
        scores: [n].
        targets: bool [n].
        weights: [b, n], at least 0.

    Returns: [b]; NaN where the weights leave one class only.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # first of each group of ties
    weights = weights[:, order]
    positive = np.add.reduceat(weights * targets[order], starts, axis=1)
    negative = np.add.reduceat(weights * ~targets[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(1)
    return _ratio(wins, positive.sum(1) * negative.sum(1), empty=np.nan)


def _ratio(top: np.ndarray, bottom: np.ndarray, *, empty: float = 0.0) -> np.ndarray:
    """top / bottom, and `empty` where the bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(bottom), empty, dtype=np.float64), where=bottom > 0)
