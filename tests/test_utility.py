"""Utility figures: equal to scikit-learn, prompted labels equal to a naive loop, intervals that behave."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from memorization.evaluated import counted_passes, killed_at
from scipy.special import expit
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpmed.data.tasks import EncodedRecords, TaskSpec, encode, label_option_ids
from dpmed.errors import InputError
from dpmed.memorization import scoring
from dpmed.memorization.intervals import unit_multiplicities
from dpmed.metrics import AVERAGES, F1, Accuracy, f1_values, resampled_auroc_macro, resampled_f1, weighted_auroc
from dpmed.recipe import EvaluationSection
from dpmed.utility import (
    KEYS,
    fit_thresholds,
    label_matrix,
    label_scores,
    majority_baseline,
    predictions,
    score_figures,
    utility,
    validation_thresholds,
)

TEXTS = [
    "Fever and cough since Monday.",
    "The heart is normal in size and the lungs are clear. " * 4,
    "Pain.",
    "Metformin 500 mg twice a day, lisinopril in the morning.",
    "No effusion.",
    "Discharged home in stable condition.",
]
ONE_TOKEN = ("a", "t", "w")  # with the space before them, single tokens of the tiny tokenizer
SEVERAL_TOKENS = ("fever", "fever high", "a", "pain", "normal heart")  # shared beginnings, and one label inside another
SETTINGS = EvaluationSection(batch_tokens=128, bootstrap=200)


def make_records(labels: list[str] | list[list[str]] | None, n: int | None = None) -> Dataset:
    n = n or (len(labels) if labels is not None else len(TEXTS))
    columns = {"text": [TEXTS[i % len(TEXTS)] for i in range(n)], "unit": [f"patient-{i // 2}" for i in range(n)]}
    return Dataset.from_dict(columns if labels is None else {**columns, "label": labels})


def one_hot(numbers: np.ndarray, n_labels: int) -> np.ndarray:
    return numbers[:, None] == np.arange(n_labels)


@st.composite
def single_label(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    n_labels, n = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    numbers = arrays(np.int64, n, elements=st.integers(0, n_labels - 1))
    return draw(numbers), draw(numbers), n_labels


@st.composite
def several_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = (draw(st.integers(1, 30)), draw(st.integers(2, 5)))
    return draw(arrays(bool, shape)), draw(arrays(bool, shape))


@settings(max_examples=25)
@given(single_label())
def test_f1_of_one_label_per_record_is_sklearns(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    true, said, n_labels = case
    values = f1_values(one_hot(true, n_labels), one_hot(said, n_labels), multi_label=False)
    for average in AVERAGES:
        expected = f1_score(true, said, average=average, labels=range(n_labels), zero_division=0)  # pyright: ignore
        assert values[average] == pytest.approx(expected)


@settings(max_examples=25)
@given(several_labels())
def test_f1_of_several_labels_per_record_is_sklearns(case: tuple[np.ndarray, np.ndarray]) -> None:
    true, said = case
    values = f1_values(true, said, multi_label=True)
    for average in AVERAGES:
        assert values[average] == pytest.approx(f1_score(true, said, average=average, zero_division=0))  # pyright: ignore


def test_accuracy_metric_counts_whole_label_sets() -> None:
    assert Accuracy().compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}
    pair = {"predictions": [[0, 1], [1, 1]], "references": [[0, 1], [1, 0]]}
    assert Accuracy(multi_label=True).compute(**pair) == {"accuracy": 0.5}


def test_metrics_leave_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(os, "makedirs", lambda *a, **k: pytest.fail("a folder was made"))
    for metric in (F1(), Accuracy()):
        assert metric.compute(predictions=[0, 1], references=[0, 1]) in ({"f1": 1.0}, {"accuracy": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("multi_label", [False, True])
def test_resampled_figures_equal_sklearn_on_the_drawn_records(multi_label: bool) -> None:
    rng = np.random.default_rng(0)
    n, n_labels, n_resamples = 60, 4, 25
    scores = rng.integers(0, 6, (n, n_labels)) / 2.0  # many ties
    if multi_label:
        true, said = rng.random((n, n_labels)) < 0.3, scores > 1.2
    else:
        true, said = (one_hot(rng.integers(0, n_labels, n), n_labels) for _ in range(2))
    units = rng.integers(0, 17, n)
    names, dense = np.unique(units, return_inverse=True)
    f1 = resampled_f1(true, said, units, n_resamples=n_resamples, seed=3)
    area = resampled_auroc_macro(scores, true, units, n_resamples=n_resamples, seed=3)
    drawn = np.concatenate(list(unit_multiplicities(len(names), n_resamples, 3)))
    assert drawn.shape == (n_resamples, len(names))
    for row, times in enumerate(drawn):
        index = np.repeat(np.arange(n), times[dense])
        a, b, s = true[index], said[index], scores[index]
        for average in AVERAGES:
            assert f1[average][row] == pytest.approx(f1_score(a, b, average=average, zero_division=0))  # pyright: ignore
        assert area[row] == pytest.approx(np.mean([roc_auc_score(a[:, i], s[:, i]) for i in range(n_labels)]))


def test_auroc_of_one_class_is_unknown_and_left_out_of_the_mean() -> None:
    scores, targets = np.array([0.1, 0.2, 0.3]), np.array([False, True, True])
    weights = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_array_equal(weighted_auroc(scores, targets, weights), [1.0, np.nan])
    both = np.stack([targets, np.array([True, True, True])], axis=1)
    mean = resampled_auroc_macro(np.stack([scores, scores], 1), both, np.arange(3), n_resamples=50, seed=0)
    assert set(mean[np.isfinite(mean)]) == {1.0} and np.isnan(mean).any()


def naive_scores(
    model: PreTrainedModel, encoded: EncodedRecords, options: list[list[int]], end: list[int]
) -> np.ndarray:
    """One forward pass per window and label, no padding."""
    sums = np.zeros((encoded.n_records, len(options)))
    windows = np.zeros(encoded.n_records)
    for example in encoded:
        windows[example.record] += 1
        prompt = example.input_ids[: example.prompt_end]
        for label, option in enumerate([[*o, *end] for o in options]):
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([prompt + option])).logits[0].log_softmax(-1)
            for i, token in enumerate(option):
                sums[example.record, label] += float(log_probs[len(prompt) - 1 + i, token])
    return sums / windows[:, None]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("names", [ONE_TOKEN, SEVERAL_TOKENS, ("fever", "pain")])
def test_label_scores_equal_a_naive_loop(
    kind: str,
    names: tuple[str, ...],
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model(kind, initializer_range=0.3)  # far from uniform, so that a wrong position shows
    spec = TaskSpec(labels=names, max_length=64)
    encoded = encode(make_records([names[i % len(names)] for i in range(6)]), tiny_tokenizer, spec)
    assert encoded.n_records_cut > 0
    end = [int(tiny_tokenizer.eos_token_id)] if names is SEVERAL_TOKENS else []  # pyright: ignore[reportArgumentType]
    expected = naive_scores(model, encoded, label_option_ids(tiny_tokenizer, spec), end)
    assert np.ptp(expected, axis=0).min() > 0.01
    for batch_tokens in (1, 300):
        scores = label_scores(model, encoded, tiny_tokenizer, spec, batch_tokens=batch_tokens)
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_single_token_labels_need_one_pass_over_the_prompt(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("gpt2").train()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    spec = TaskSpec(labels=ONE_TOKEN, max_length=64)
    assert all(len(option) == 1 for option in label_option_ids(tiny_tokenizer, spec))
    encoded = encode(make_records(["a"] * 6), tiny_tokenizer, spec)
    seen: list[tuple[int, int]] = []
    label_scores(model, encoded, tiny_tokenizer, spec, batch_tokens=1, progress=lambda *done: seen.append(done))
    assert sorted(s[1] for s in shapes) == sorted(e.prompt_end for e in encoded)
    assert seen[-1] == (len(encoded), len(encoded))
    assert model.training


def test_records_without_label_are_scored_like_those_with_one(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, spec = tiny_model("llama"), TaskSpec(labels=SEVERAL_TOKENS, max_length=64)
    scores = [
        label_scores(model, encode(make_records(labels), tiny_tokenizer, spec), tiny_tokenizer, spec, batch_tokens=512)
        for labels in (None, ["a"] * 6)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def test_killed_label_scores_go_on_where_they_stopped(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    model, spec = tiny_model("llama", initializer_range=0.3), TaskSpec(labels=SEVERAL_TOKENS, max_length=64)
    encoded = encode(make_records(["a"] * 6), tiny_tokenizer, spec)
    score = partial(label_scores, model, encoded, tiny_tokenizer, spec, batch_tokens=150)
    whole, seen = score(), []
    with pytest.raises(KeyboardInterrupt):
        score(folder=tmp_path, progress=killed_at(2, []))
    with counted_passes(model) as passes:
        found = score(folder=tmp_path, progress=lambda *done: seen.append(done))
    assert len(passes) == len(seen) - 2 > 0
    np.testing.assert_array_equal(found, whole)
    labels = [SEVERAL_TOKENS[i % len(SEVERAL_TOKENS)] for i in range(6)]
    measure = partial(utility, model, make_records(labels), tiny_tokenizer, spec, settings=SETTINGS)
    expected = measure(folder=tmp_path)
    with counted_passes(model) as passes:
        assert measure(folder=tmp_path) == expected
    assert passes == []


def test_a_label_that_begins_another_needs_the_end_token(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("gpt2")
    no_end = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[PAD]")
    spec = TaskSpec(labels=("fever", "fever high"), max_length=64)
    with pytest.raises(InputError, match="beginning of another"):
        label_scores(model, encode(make_records(None), no_end, spec), no_end, spec, batch_tokens=64)


def test_weights_that_are_not_finite_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, spec = tiny_model("gpt2"), TaskSpec(labels=ONE_TOKEN, max_length=64)
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)  # pyright: ignore
    with pytest.raises(InputError, match="not finite"):
        label_scores(model, encode(make_records(None), tiny_tokenizer, spec), tiny_tokenizer, spec, batch_tokens=64)


def test_predictions_are_the_best_label_or_all_above_their_threshold() -> None:
    scores = np.array([[2.0, 1.0, -1.0], [-3.0, -2.0, -2.5]])
    one = TaskSpec(kind="classification", labels=("a", "b", "c"))
    np.testing.assert_array_equal(predictions(scores, one), [[True, False, False], [False, True, False]])
    several = replace(one, multi_label=True)
    np.testing.assert_array_equal(predictions(scores, several), [[True, True, False], [False, False, False]])
    fixed = replace(several, thresholds=(0.9, 0.1, 0.2))
    np.testing.assert_array_equal(predictions(scores, fixed), [[False, True, True], [False, True, False]])


@given(st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_thresholds_equal_brute_force(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(0, 2, (n, 3)), rng.random((n, 3)) < 0.4
    for label, threshold in enumerate(fit_thresholds(logits, targets, ("a", "b", "c"))):
        true = set(np.flatnonzero(targets[:, label]))
        said = {t: set(np.flatnonzero(expit(logits[:, label]) >= t / 100)) for t in range(1, 100)}
        f1 = {t: 2 * len(true & s) / max(1, len(true) + len(s)) for t, s in said.items()}
        best = [t for t, value in f1.items() if value == pytest.approx(max(f1.values()))]
        assert round(100 * threshold) == min(best, key=lambda t: (abs(t - 50), t))


def test_threshold_of_a_label_that_no_record_has_is_one_half() -> None:
    assert fit_thresholds(np.array([[3.0], [-3.0]]), np.zeros((2, 1), dtype=bool), ("a",)) == (0.5,)
    with pytest.raises(ValueError, match="do not fit"):
        fit_thresholds(np.zeros((2, 1)), np.zeros((2, 2), dtype=bool), ("a",))


def test_label_matrix_reads_one_or_several_labels_and_names_no_label_in_errors() -> None:
    np.testing.assert_array_equal(label_matrix(make_records(["b", "a"]), ("a", "b")), [[False, True], [True, False]])
    several = make_records([["a", "b"], []])
    np.testing.assert_array_equal(label_matrix(several, ("a", "b")), [[True, True], [False, False]])
    with pytest.raises(InputError, match="record 1") as caught:
        label_matrix(make_records(["a", "secret"]), ("a", "b"))
    assert "secret" not in str(caught.value)


def test_majority_baseline_never_looks_at_the_held_out_labels() -> None:
    spec = TaskSpec(labels=("a", "b"))
    figures = majority_baseline(make_records(["b", "b", "a"]), make_records(["a", "a", "a", "b"]), spec)
    true, said = [0, 0, 0, 1], [1, 1, 1, 1]
    for average in AVERAGES:
        expected = f1_score(true, said, average=average, labels=[0, 1], zero_division=0)  # pyright: ignore
        assert figures[f"f1_{average}"] == pytest.approx(expected)
    assert figures["accuracy"] == 0.25
    several = TaskSpec(kind="classification", labels=("a", "b"), multi_label=True)
    train, heldout = make_records([["a"], ["a", "b"], []]), make_records([["a"], ["b"], ["a", "b"], []])
    assert majority_baseline(train, heldout, several) == pytest.approx(
        {"f1_weighted": 1 / 3, "f1_macro": 1 / 3, "f1_micro": 1 / 2, "accuracy": 1 / 4}
    )


def random_case(n: int, *, multi_label: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, TaskSpec]:
    rng = np.random.default_rng(n)
    spec = TaskSpec(kind="classification", labels=("a", "b", "c"), multi_label=multi_label)
    targets = rng.random((n, 3)) < 0.4 if multi_label else one_hot(rng.integers(0, 3, n), 3)
    return rng.normal(0, 1, (n, 3)) + targets, targets, np.arange(n) // 2, spec


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_hold_the_value_and_shrink_with_more_patients(multi_label: bool) -> None:
    widths = []
    for n in (40, 4000):
        scores, targets, units, spec = random_case(n, multi_label=multi_label)
        figures, reasons = score_figures(scores, targets, units, spec, n_resamples=300, seed=0)
        assert reasons == {}
        for figure in figures.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert figure["n"] == n and figure["higher_is"] == "better"
        widths.append({key: figure["high"] - figure["low"] for key, figure in figures.items()})
    assert all(0 < widths[1][key] < widths[0][key] / 3 for key in widths[0])
    said = predictions(scores, spec)
    assert figures["accuracy"]["value"] == pytest.approx(accuracy_score(targets, said))


def test_a_perfect_score_on_few_patients_still_has_an_interval() -> None:
    targets = one_hot(np.array([0, 1, 0, 1]), 2)
    spec = TaskSpec(kind="classification", labels=("a", "b"))
    figures, _ = score_figures(targets * 9.0, targets, np.arange(4), spec, n_resamples=100, seed=0)
    assert figures["f1_macro"]["value"] == figures["auroc_macro"]["value"] == 1.0
    assert figures["f1_micro"]["low"] < 0.7 and figures["auroc_macro"]["low"] < 0.7


def test_auroc_of_one_label_per_record_is_one_against_the_rest_and_counts_what_it_left_out() -> None:
    scores, targets, units, spec = random_case(60, multi_label=False)
    targets = one_hot(targets.argmax(1) % 2, 3)  # nobody has the third label
    figures, _ = score_figures(scores, targets, units, spec, n_resamples=50, seed=0)
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = np.mean([roc_auc_score(targets[:, i], share[:, i]) for i in range(2)])
    assert figures["auroc_macro"]["value"] == pytest.approx(expected)
    assert (figures["auroc_macro"]["labels_scored"], figures["auroc_macro"]["labels_left_out"]) == (2, 1)


def test_auroc_is_null_with_a_reason_when_all_records_agree() -> None:
    spec = TaskSpec(kind="classification", labels=("a", "b"))
    figures, reasons = score_figures(np.eye(2), one_hot(np.zeros(2), 2), np.arange(2), spec, n_resamples=20, seed=0)
    assert figures["auroc_macro"] is None and "both classes" in reasons["auroc_macro"]


def test_utility_of_prompted_labels(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = TaskSpec(labels=SEVERAL_TOKENS, max_length=64)
    model, records = tiny_model("gpt2"), make_records([SEVERAL_TOKENS[i % 3] for i in range(12)])
    figures, reasons = utility(
        model, records, tiny_tokenizer, spec, settings=SETTINGS, train_records=make_records(["a", "pain", "a"])
    )
    assert tuple(figures) == KEYS and reasons == {}
    encoded = encode(records, tiny_tokenizer, spec)
    said = label_scores(model, encoded, tiny_tokenizer, spec, batch_tokens=64).argmax(1)
    true = label_matrix(records, spec.labels).argmax(1)
    expected = f1_score(true, said, average="weighted", labels=range(5), zero_division=0)  # pyright: ignore
    assert figures["f1_weighted"]["value"] == pytest.approx(expected)
    assert figures["majority"]["accuracy"] == pytest.approx(4 / 12)


def test_utility_of_a_multi_label_head_uses_its_thresholds(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = TaskSpec(kind="classification", labels=("a", "b", "c"), multi_label=True, max_length=64)
    model = tiny_model("bert", "classification", num_labels=3)
    records = make_records([["a"], [], ["a", "b"], ["b"], ["a"], []])
    thresholds = validation_thresholds(model, records, tiny_tokenizer, spec, batch_tokens=128)
    assert thresholds is not None
    figures = {
        name: utility(model, records, tiny_tokenizer, replace(spec, thresholds=t), settings=SETTINGS)
        for name, t in {"fitted": thresholds, "never": (0.99,) * 3}.items()
    }
    assert figures["never"][0]["f1_micro"]["value"] == 0.0 < figures["fitted"][0]["f1_micro"]["value"]
    assert figures["fitted"][0]["majority"] is None and "majority" in figures["fitted"][1]
    assert figures["fitted"][0]["auroc_macro"]["labels_left_out"] == 1
    single = replace(spec, multi_label=False)
    assert validation_thresholds(model, records, tiny_tokenizer, single, batch_tokens=128) is None


@pytest.mark.parametrize(
    ("records", "spec", "reason"),
    [
        (make_records(None), TaskSpec(labels=ONE_TOKEN), "no label column"),
        (make_records(["a", "t"]), TaskSpec(), "no label column"),
        (make_records(["a"]), TaskSpec(kind="masked_lm"), "masked_lm"),
        (make_records(["a"]).select([]), TaskSpec(labels=ONE_TOKEN), "no held-out records"),
    ],
)
def test_what_cannot_be_measured_is_null_with_a_reason(
    records: Dataset,
    spec: TaskSpec,
    reason: str,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    figures, reasons = utility(tiny_model("gpt2"), records, tiny_tokenizer, spec, settings=SETTINGS)
    assert figures == dict.fromkeys(KEYS)
    assert set(reasons) == set(KEYS) and all(reason in text for text in reasons.values())
