"""Exposure: ranks from the right end, a fit that is refused where it does not fit, and models that know or do not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from memorization.evaluated import counted_passes, killed_at
from scipy.stats import skewnorm

import tiny_models
from dpmed.data.batches import Collator, per_record_loss
from dpmed.data.canaries import DESIGNS, Manifest, plant_canaries
from dpmed.data.hospital import HOSPITAL_LABELS, make_hospital
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization import scoring
from dpmed.memorization.exposure import (
    FEWEST_TO_FIT,
    CanaryLosses,
    canary_losses,
    chance,
    exposure_by_fit,
    exposure_by_rank,
    exposure_figures,
    label_scores,
)
from dpmed.memorization.intervals import Measure, NotApplicable, figures_json
from dpmed.privacy.audit import audit_epsilon

TOKENIZER = tiny_models.make_tokenizer()
SPEC = TaskSpec(kind="causal_lm", max_length=120)
RECORDS = make_hospital(n_patients=20, seed=1)
MANIFEST = plant_canaries(RECORDS, n=24, repeats=(1, 2), seed=2)[1]


def losses_of(canary: list[float], candidates: list[list[float]]) -> CanaryLosses:
    return CanaryLosses(np.array(canary), np.array(candidates, dtype=float))


# --- By rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_candidates", [1, 3, 7, 100])
def test_exposure_of_the_lowest_loss_is_log2_of_the_number_of_candidates(n_candidates: int) -> None:
    others = np.arange(1.0, n_candidates + 1)
    found = exposure_by_rank(losses_of([0.0, n_candidates + 1.0], [list(others)] * 2))
    assert found.tolist() == [math.log2(n_candidates + 1), 0.0]  # the canary is one of them; the highest has none


@given(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_exposure_by_rank_equals_counting(own: int, others: list[int]) -> None:
    """The rank is the mean of the first and the last place that the canary can have in the sorted order."""
    space = sorted([own, *others])
    first, last = space.index(own) + 1, len(space) - space[::-1].index(own)
    found = exposure_by_rank(losses_of([own], [[float(o) for o in others]]))[0]
    assert found == pytest.approx(math.log2(len(space)) - math.log2((first + last) / 2))


def test_chance_is_the_mean_over_all_ranks() -> None:
    ranked = exposure_by_rank(CanaryLosses(np.arange(8) - 0.5, np.tile(np.arange(7.0), (8, 1))))
    assert sorted(ranked) == sorted(3 - np.log2(np.arange(1, 9)))
    assert chance(7) == pytest.approx(ranked.mean())
    assert chance(100_000) == pytest.approx(math.log2(math.e), abs=1e-3)


# --- By a fit ---------------------------------------------------------------------------------------------------------


def sample(shape: float, n: int, seed: int = 0) -> np.ndarray:
    return 30 + 4 * np.asarray(skewnorm.rvs(shape, size=n, random_state=seed))


@pytest.mark.parametrize("shape", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("z", [-3.0, -1.0, 0.5, 2.0])
def test_the_fit_gives_the_exposure_of_the_distribution(shape: float, z: float) -> None:
    true = -math.log2(skewnorm.cdf(z, shape))
    found = exposure_by_fit(losses_of([30 + 4 * z], [list(sample(shape, 5000))]), [1e4])[0]
    assert found == pytest.approx(true, rel=0.2, abs=0.1)


def test_the_fit_agrees_with_the_rank_where_both_can_tell() -> None:
    losses = CanaryLosses(sample(1.0, 20, seed=1), np.stack([sample(1.0, 2000, seed=s) for s in range(2, 22)]))
    assert np.abs(exposure_by_rank(losses) - exposure_by_fit(losses, [50.0] * 20)).max() < 1.0


def test_no_exposure_is_more_than_the_space_of_secrets() -> None:
    found = exposure_by_fit(losses_of([-1e6, 10.0, 1e6], [list(sample(0.0, 200))] * 3), [44.0, 12.0, 44.0])
    assert found.tolist() == [44.0, pytest.approx(12.0), 0.0]


@pytest.mark.parametrize(
    "candidates",
    [
        np.concatenate([sample(0.0, 100), sample(0.0, 100) + 60]),  # two kinds of secrets
        np.exp(sample(0.0, 200)),  # far more skewed than any skew-normal
        sample(0.0, FEWEST_TO_FIT - 1),
        np.full(200, 3.0),
    ],
    ids=["two humps", "long tail", "few", "all the same"],
)
def test_a_fit_that_does_not_fit_is_refused(candidates: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    assert math.isnan(exposure_by_fit(losses_of([1.0], [list(rng.permutation(candidates))]), [50.0])[0])


def test_a_true_skew_normal_is_seldom_refused() -> None:
    losses = CanaryLosses(np.full(40, 30.0), np.stack([sample(2.0, 100, seed=s) for s in range(40)]))
    assert not np.isnan(exposure_by_fit(losses, [50.0] * 40)).any()


# --- Figures ----------------------------------------------------------------------------------------------------------


def made_up(found: bool, seed: int = 0, n_candidates: int = 100) -> CanaryLosses:
    """Losses in which canaries that were in are the lowest (`found`), or just as the others."""
    rng = np.random.default_rng(seed)
    n = len(MANIFEST.canaries)
    canary, candidates = rng.normal(30, 4, n), rng.normal(30, 4, (n, n_candidates))
    return CanaryLosses(np.where(MANIFEST.included & found, -100.0, canary), candidates)


def test_figures_tell_in_from_out_and_by_group() -> None:
    figures: dict[str, Any] = exposure_figures(made_up(found=True), MANIFEST, bootstrap=200)
    most, n_in = math.log2(101), int(MANIFEST.included.sum())
    assert [figures[f"canary_exposure{name}"].value for name in ("", "_median")] == pytest.approx([most, most])
    assert 0.6 * most < figures["canary_exposure"].low < 0.9 * most < figures["canary_exposure"].high < most + 1e-9
    assert (figures["canary_exposure"].n, figures["canary_exposure_out"].n) == (n_in, 24 - n_in)
    out = figures["canary_exposure_out"]
    assert out.low < out.value < out.high < 4 and out.extra["chance"] == chance(100)
    assert figures["canary_exposure_fitted"].value > 40 > 4 > figures["canary_exposure_fitted_out"].value
    assert set(figures["canary_exposure_by_design"]) == set(DESIGNS)
    assert list(figures["canary_exposure_by_repeats"]) == ["1", "2"]
    for groups in (figures["canary_exposure_by_design"], figures["canary_exposure_by_repeats"]):
        assert sum(sides["in"].n for sides in groups.values()) == n_in
        assert all(sides["in"].value == pytest.approx(most) for sides in groups.values())
    tree, reasons = figures_json(figures)
    shown = json.dumps(tree, allow_nan=False)
    assert reasons == {} and not [text for text in MANIFEST.texts if text in shown]


def test_untouched_canaries_cover_chance_and_the_check_sees_those_that_do_not() -> None:
    def covers(found: bool) -> list[bool]:
        sides = [made_up(found, seed, n_candidates=31) for seed in range(40)]
        figures: list[Any] = [exposure_figures(s, MANIFEST, bootstrap=200)["canary_exposure"] for s in sides]
        return [f.low <= f.extra["chance"] <= f.high for f in figures]

    assert np.mean(covers(found=False)) > 0.7  # ten canaries: the bootstrap's interval is a little short
    assert not any(covers(found=True))


def test_what_cannot_be_measured_is_not_applicable() -> None:
    few = made_up(found=True)
    few = CanaryLosses(few.canary, few.candidates[:, :10])
    assert isinstance(exposure_figures(few, MANIFEST, bootstrap=20)["canary_exposure_fitted"], NotApplicable)
    _, all_out = next(
        (p, m)
        for p, m in (plant_canaries(RECORDS, n=2, designs=["identifiers"], seed=s) for s in range(50))
        if not m.included.any()
    )
    two = CanaryLosses(few.canary[:2], few.candidates[:2])
    figures: dict[str, Any] = exposure_figures(two, all_out, bootstrap=20)
    assert isinstance(figures["canary_exposure"], NotApplicable) and isinstance(figures["canary_exposure_out"], Measure)
    tree, reasons = figures_json(figures)
    assert tree["canary_exposure"] is None and reasons["canary_exposure"] == "no canary of this kind"


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "masked_lm")])
def test_losses_are_sums_over_each_text_and_the_candidates_those_of_the_manifest(kind: Any, task: Any) -> None:
    spec, model = TaskSpec(kind=task, max_length=120), tiny_models.make_model(kind, initializer_range=0.3)
    losses = canary_losses(model, MANIFEST, spec, TOKENIZER, n_candidates=3, seed=5)
    assert losses.canary.shape == (24,) and losses.candidates.shape == (24, 3)
    if task == "masked_lm":
        again = canary_losses(model, MANIFEST, spec, TOKENIZER, n_candidates=3, seed=5, batch_tokens=200)
        np.testing.assert_allclose(again.candidates, losses.candidates, rtol=1e-4)
        return
    for row, canary in enumerate(MANIFEST.canaries[:5]):
        for text, got in zip(
            [canary.text, *MANIFEST.candidates(canary, 3, 5)],
            [losses.canary[row], *losses.candidates[row]],
            strict=True,
        ):
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            assert got == pytest.approx(-float(log_probs.gather(1, ids[0, 1:, None]).sum()), rel=1e-4)


def over_fitted(manifest: Manifest, planted: Dataset, steps: int = 60) -> Any:
    """A tiny model that has learnt the planted notes by heart; ordinary notes are left out, to be fast."""
    rows = planted.filter(lambda unit: unit in {c.unit for c in manifest.canaries}, input_columns="unit")
    encoded = encode(rows, TOKENIZER, SPEC)
    model = tiny_models.make_model("llama", hidden_size=64).train()
    batch = Collator(TOKENIZER, SPEC)(list(encoded))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        per_record_loss(logits, batch, SPEC).mean().backward()
        optimizer.step()
    return model


def test_an_over_fitted_model_gives_every_canary_away_and_no_other() -> None:
    planted, manifest = plant_canaries(RECORDS.remove_columns("label"), n=40, repeats=(1,), seed=0)
    losses = canary_losses(over_fitted(manifest, planted), manifest, SPEC, TOKENIZER, n_candidates=31)
    coins = manifest.included
    assert exposure_by_rank(losses)[coins].tolist() == [5.0] * coins.sum()
    figures: dict[str, Any] = exposure_figures(losses, manifest, bootstrap=200)
    out = figures["canary_exposure_out"]
    assert out.low < chance(31) < out.high
    audit = audit_epsilon(losses.coin_scores(), coins, delta=1e-5)
    assert audit.lower_bound == audit.ceiling > 1.5


def test_an_untouched_model_gives_nothing_away() -> None:
    _, manifest = plant_canaries(RECORDS, n=60, seed=4)
    losses = canary_losses(tiny_models.make_model("llama", seed=9), manifest, SPEC, TOKENIZER, n_candidates=31)
    for side in ("canary_exposure", "canary_exposure_out"):
        figure: Any = exposure_figures(losses, manifest, bootstrap=500)[side]
        assert figure.low < chance(31) < figure.high
    assert audit_epsilon(losses.coin_scores(), manifest.included, delta=1e-5).lower_bound < 0.5


def test_coin_scores_are_in_units_of_the_candidates_spread() -> None:
    found = losses_of([1.0, 5.0, 2.0], [[2.0, 4.0], [2.0, 4.0], [3.0, 3.0]]).coin_scores()
    assert found.tolist() == [2.0, -2.0, 0.0]  # candidates that are all the same tell nothing


def test_one_candidate_has_no_spread_and_still_lets_the_audit_see() -> None:
    coins = np.arange(60) % 2 == 0
    losses = losses_of([1.0 if coin else 3.0 for coin in coins], [[2.0]] * 60)
    assert audit_epsilon(losses.coin_scores(), coins, delta=1e-5).lower_bound > 1


def test_killed_canaries_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    model = tiny_models.make_model("llama", initializer_range=0.3)
    options: dict[str, Any] = {"n_candidates": 3, "batch_tokens": 500}
    whole = canary_losses(model, MANIFEST, SPEC, TOKENIZER, **options)
    n_batches: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        canary_losses(model, MANIFEST, SPEC, TOKENIZER, **options, folder=tmp_path, progress=killed_at(3, []))
    with counted_passes(model) as passes:
        found = canary_losses(
            model, MANIFEST, SPEC, TOKENIZER, **options, folder=tmp_path, progress=lambda *_: n_batches.append(1)
        )
    assert len(passes) == 1 + len(n_batches) - 3  # the trial of the output layer, and what was left
    np.testing.assert_array_equal(found.canary, whole.canary)
    np.testing.assert_array_equal(found.candidates, whole.candidates)
    secrets = [secret for canary in MANIFEST.canaries for secret in canary.secret.values()]
    assert not any(s.encode() in path.read_bytes() for path in tmp_path.iterdir() for s in secrets)
    other = canary_losses(model, MANIFEST, SPEC, TOKENIZER, **options, seed=1, folder=tmp_path)
    assert not np.array_equal(other.candidates, whole.candidates)  # other candidates are not what was kept


def test_a_classifier_is_scored_by_the_canaries_labels() -> None:
    spec = TaskSpec(kind="classification", labels=tuple(sorted(HOSPITAL_LABELS)), max_length=120)
    model = tiny_models.make_model("bert", "classification", num_labels=len(HOSPITAL_LABELS))
    found = label_scores(model, MANIFEST, spec, TOKENIZER)
    for row, canary in enumerate(MANIFEST.canaries[:4]):
        with torch.no_grad():
            logits = model(**TOKENIZER(canary.text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert found[row] == pytest.approx(
            float(logits.log_softmax(-1)[spec.labels.index(str(canary.label))]), rel=1e-4
        )
    with pytest.raises(ValueError, match="classifier"):
        canary_losses(model, MANIFEST, spec, TOKENIZER, n_candidates=1)


def test_bad_input() -> None:
    model = tiny_models.make_model("llama")
    with pytest.raises(ValueError, match="n_candidates is 0"):
        canary_losses(model, MANIFEST, SPEC, TOKENIZER, n_candidates=0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        canary_losses(model, MANIFEST, SPEC, TOKENIZER, n_candidates=1)
