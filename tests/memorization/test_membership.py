from __future__ import annotations

import itertools
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from dpmed.memorization import membership
from dpmed.memorization.intervals import Measure, bootstrap_by_unit, wilson
from dpmed.memorization.membership import (
    ROC_POINTS,
    Sides,
    attack_figures,
    auc,
    bootstrap_attack,
    ez_score,
    loss_score,
    margin_score,
    matched_records,
    min_k_plus_plus_score,
    min_k_score,
    modified_entropy_score,
    reference_score,
    roc,
    tpr_at_fpr,
    zlib_lengths,
    zlib_score,
)
from dpmed.memorization.statistics import TokenScores
from dpmed.memorization.vocabulary import Sampling, token_statistics


def scores_of(log_probs: list[list[float]]) -> TokenScores:
    lengths = [len(r) for r in log_probs]
    flat = np.array([v for r in log_probs for v in r], dtype=np.float32)
    return TokenScores(
        record=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        log_prob=flat,
        is_argmax=np.zeros(len(flat), dtype=bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_window=np.array(lengths, dtype=np.int32),
    )


def sides(members: np.ndarray, others: np.ndarray, per_unit: int = 1) -> Sides:
    return Sides(members, others, np.arange(len(members)) // per_unit, np.arange(len(others)) // per_unit)


NAN = float("nan")


def test_scores_by_hand():
    scores = scores_of([[NAN, -1, -2, -9], [NAN, -4], [NAN], [-3, NAN, -1, -1, -1, -2]])
    assert loss_score(scores)[[0, 1, 3]].tolist() == pytest.approx([-4, -4, -1.6])
    base = scores_of([[NAN, -2, -2, -11], [NAN, -1], [NAN], [-3, NAN, -1, -1, -1, -2]])
    assert reference_score(scores, base)[[0, 1, 3]].tolist() == pytest.approx([1, -3, 0])
    assert min_k_score(scores, 0.4)[[0, 1, 3]].tolist() == pytest.approx([-9, -4, -2.5])  # 1 of 3, 1 of 1, 2 of 5
    assert min_k_score(scores, 1.0)[[0, 1, 3]].tolist() == pytest.approx([-4, -4, -1.6])
    assert zlib_score(scores, np.array([6, 2, 5, 4]))[[0, 1, 3]].tolist() == pytest.approx([-2, -2, -2])
    for score in (loss_score(scores), min_k_score(scores, 0.4), zlib_score(scores, np.ones(4))):
        assert np.isnan(score[2])


def test_a_text_that_repeats_itself_compresses():
    lengths = zlib_lengths(["fever " * 50, "äöü"])
    assert lengths.tolist() == [len(zlib.compress(b"fever " * 50)), len(zlib.compress("äöü".encode()))]


def test_scores_of_different_records_are_not_compared():
    with pytest.raises(ValueError, match="different records"):
        reference_score(scores_of([[-1.0, -2.0]]), scores_of([[-1.0]]))


def test_a_vocabulary_of_three_tokens_by_hand():
    """All attacks on two records, worked out with pencil and paper; natural logarithms, L = log 2 = 0.693147.

    The model has three tokens with p = (1/2, 1/4, 1/4) at every position:
        log p = (-L, -2L, -2L)
        mu    = 1/2 (-L) + 1/4 (-2L) + 1/4 (-2L) = -1.5 L
        var   = 1/2 (0.5 L)^2 + 1/4 (0.5 L)^2 + 1/4 (0.5 L)^2 = 0.25 L^2, sigma = 0.5 L
        z     = (log p - mu) / sigma = (+1, -1, -1)

    Member:     tokens 0 0 0 0 1   log p = -L -L -L -L -2L   z = 1 1 1 1 -1
    Non-member: tokens 1 2 1 0 2   log p = -2L -2L -2L -L -2L   z = -1 -1 -1 1 -1

    LOSS       member -(4 L + 2 L) / 5 = -1.2 L         non-member -(4 * 2 L + L) / 5 = -1.8 L
    Min-40 %   2 of 5: member -(2 L + L) / 2 = -1.5 L   non-member -(2 L + 2 L) / 2 = -2 L
    Min-40 %++ member (-1 + 1) / 2 = 0                  non-member (-1 - 1) / 2 = -1
    zlib       6 bytes each: member -6 L / 6 = -L       non-member -9 L / 6 = -1.5 L
    AUC        the one member is above the one non-member: 1 in each; with both sides swapped, 0
    """
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(10, 3)
    found = token_statistics(logits, torch.tensor([0, 0, 0, 0, 1, 1, 2, 1, 0, 2]), Sampling())
    offsets = np.array([0, 5, 10])
    scores = TokenScores(
        np.repeat([0, 1], 5).astype(np.int32),
        found.log_prob,
        found.is_argmax,
        offsets,
        np.array([5, 5], np.int32),
        found.rank,
        found.mean,
        found.deviation,
        found.sampled,
    )
    log_2 = 0.6931471805599453
    expected = {
        "loss": (loss_score(scores), [-1.2 * log_2, -1.8 * log_2]),
        "min_k": (min_k_score(scores, 0.4), [-1.5 * log_2, -2 * log_2]),
        "min_k_plus_plus": (min_k_plus_plus_score(scores, 0.4), [0.0, -1.0]),
        "zlib": (zlib_score(scores, np.array([6, 6])), [-log_2, -1.5 * log_2]),
    }
    for name, (score, by_hand) in expected.items():
        np.testing.assert_allclose(score, by_hand, atol=2e-5, err_msg=name)
        assert auc(score[:1], score[1:]) == 1.0
        assert auc(score[1:], score[:1]) == 0.0


def test_a_certain_model_gives_min_k_plus_plus_no_infinity():
    scores = scores_of([[-1e-6, -20.0]])
    certain = replace(scores, mean=np.zeros(2, np.float32), deviation=np.zeros(2, np.float32))
    assert min_k_plus_plus_score(certain, 1.0)[0] == pytest.approx(-10.0 / membership.SMALLEST_DEVIATION, rel=1e-3)
    with pytest.raises(ValueError, match="no deviation"):
        min_k_plus_plus_score(scores, 1.0)


def test_ez_by_hand():
    """log p_M - log p_R where M is wrong (w): +2 and -1 give 2 / 3; what M has right does not count."""
    own = scores_of([[NAN, -1, -4, -5], [NAN, -1, -2, -2], [NAN, -9, -1, -1], [NAN], [NAN, -3], [NAN, -1, -1, -1]])
    base = scores_of([[NAN, -9, -6, -4], [NAN, -1, -1, -1], [NAN, -8, -9, -9], [NAN], [NAN, -1], [NAN, -1, -1, -1]])
    right = [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0], [0, 0], [0, 0, 0, 0]]
    own = replace(own, is_argmax=np.concatenate(right).astype(bool))
    score = ez_score(own, base)
    assert score[0] == pytest.approx(2 / 3)
    assert score[1] == 0.0  # all went down
    assert score[2] == 2.0 == np.nanmax(score)  # one wrong token: known by heart, so the highest, not 0
    assert np.isnan(score[3]) and np.isnan(score[4])  # no token, or one: nothing can be said
    assert score[5] == 0.5  # nothing moved


@pytest.mark.parametrize("seed", range(5))
def test_ez_orders_records_as_the_ratio_does(seed: int):
    rng = np.random.default_rng(seed)
    own, base = (scores_of((-rng.exponential(size=(20, 12))).tolist()) for _ in range(2))
    own = replace(own, is_argmax=rng.random(240) < 0.3)
    score = ez_score(own, base)
    ratio = []
    for i in range(20):
        at = [t for t in range(12 * i, 12 * i + 12) if not own.is_argmax[t]]
        moved = [float(own.log_prob[t]) - float(base.log_prob[t]) for t in at]
        ratio.append(sum(m for m in moved if m > 0) / -sum(m for m in moved if m < 0))
    assert np.argsort(score).tolist() == np.argsort(ratio).tolist()
    np.testing.assert_allclose(score / (1 - score), ratio, rtol=1e-9)


def test_scores_of_other_records_are_not_compared_by_ez():
    with pytest.raises(ValueError, match="different records"):
        ez_score(scores_of([[-1.0, -2.0]]), scores_of([[-1.0]]))


def test_a_classifiers_attacks_by_hand():
    """Probabilities (1/2, 1/4, 1/4), label 0: Mentr = -(1/2) log(1/2) - 2 * 1/4 log(3/4) = 0.490415.

    Label 1: Mentr = -(3/4) log(1/4) - 1/2 log(1/2) - 1/4 log(3/4) = 1.458215. Margins: log 2, and -log 2.
    """
    logits = np.log([[0.5, 0.25, 0.25]] * 3).astype(np.float32) + 7
    labels = np.array([0, 1, -1])
    np.testing.assert_allclose(margin_score(logits, labels)[:2], [np.log(2), -np.log(2)], rtol=1e-5)
    np.testing.assert_allclose(modified_entropy_score(logits, labels)[:2], [-0.490415, -1.458215], atol=2e-5)
    assert np.isnan(margin_score(logits, labels)[2]) and np.isnan(modified_entropy_score(logits, labels)[2])


def test_several_labels_are_questions_of_two_classes():
    logits, labels = np.array([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]]), np.array([[1.0, 0], [0, 1], [NAN, NAN]])
    assert margin_score(logits, labels)[:2].tolist() == [1.5, 1.25]
    for i in range(2):
        each = []
        for logit, label in zip(logits[i], labels[i], strict=True):
            two = np.array([[0.0, logit]])
            each.append(modified_entropy_score(two, np.array([int(label)]))[0])
        assert modified_entropy_score(logits, labels)[i] == pytest.approx(np.mean(each))
    assert np.isnan(margin_score(logits, labels)[2]) and np.isnan(modified_entropy_score(logits, labels)[2])


def test_a_certain_classifier_stays_finite():
    logits = np.array([[500.0, -500.0, 0.0], [500.0, -500.0, 0.0]], dtype=np.float32)
    right, wrong = modified_entropy_score(logits, np.array([0, 1]))
    assert right == pytest.approx(0.0, abs=1e-12)
    assert np.isfinite(wrong) and wrong < -900


def test_modified_entropy_of_many_labels_equals_the_plain_formula_and_takes_no_square_of_them():
    logits = np.random.default_rng(0).normal(0, 3, size=(50, 400))
    labels = np.arange(50) * 7
    tracemalloc.start()
    found = modified_entropy_score(logits, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for row in range(50):
        p = np.exp(logits[row]) / np.exp(logits[row]).sum()
        true = p[labels[row]]
        entropy = -(1 - true) * np.log(true) - sum(q * np.log(1 - q) for i, q in enumerate(p) if i != labels[row])
        assert found[row] == pytest.approx(-entropy)
    assert peak < 20 * logits.nbytes


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_min_k_needs_a_share(share: float):
    with pytest.raises(ValueError, match="share"):
        min_k_score(scores_of([[-1.0]]), share)


@pytest.mark.parametrize("decimals", [1, 12])  # with many ties, and without
def test_auc_and_roc_agree_with_sklearn(decimals: int):
    rng = np.random.default_rng(2)
    members, others = rng.normal(0.5, 1, 300).round(decimals), rng.normal(0, 1, 200).round(decimals)
    truth, score = np.repeat([1, 0], [300, 200]), np.concatenate([members, others])
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(roc(members, others), (fpr, tpr), atol=1e-12)
    for rate in (0.001, 0.01, 0.1, 0.995):
        assert tpr_at_fpr(members, others, rate) == pytest.approx(tpr[fpr <= rate + 1e-12].max())


def test_tpr_at_fpr_by_hand():
    members, others = np.array([5.0, 3, 3, 1]), np.array([4.0, 3, 2, 0])
    assert tpr_at_fpr(members, others, 0.0) == 0.25  # above 4
    assert tpr_at_fpr(members, others, 0.2499) == 0.25
    assert tpr_at_fpr(members, others, 0.25) == 0.25  # a threshold at 3 would let both 4 and 3 pass
    assert tpr_at_fpr(members, others, 0.5) == 0.75
    assert tpr_at_fpr(members, others, 1.0) == 1.0


def test_ties_count_half():
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert auc(np.array([2.0, 1.0]), np.array([1.0])) == 0.75


def test_equal_distributions_are_near_one_half_and_planted_members_stand_out():
    rng = np.random.default_rng(5)
    same = attack_figures(sides(rng.normal(size=2000), rng.normal(size=2000)), [0.01], bootstrap=200)["auc"]
    assert isinstance(same, Measure)
    assert same.low < 0.5 < same.high
    assert abs(same.value - 0.5) < 0.03
    planted = attack_figures(sides(rng.normal(2, 1, 200), rng.normal(size=200)), [0.01], bootstrap=200)
    area, tpr = planted["auc"], planted["tpr_at_fpr_0.01"]
    assert isinstance(area, Measure) and isinstance(tpr, Measure)
    assert area.low > 0.88 and area.value > 0.9
    assert area.higher_is == tpr.higher_is == "worse"
    assert area.n == 400
    assert tpr.low < tpr.value <= tpr.high


@pytest.mark.parametrize("decimals", [0, 12])
def test_the_weighted_bootstrap_equals_the_attack_on_the_resampled_records(decimals: int, monkeypatch):
    """Every resample's weights are turned into records again and given to the plain functions."""
    rng = np.random.default_rng(4)
    members, others = rng.normal(1, 1, 30).round(decimals), rng.normal(0, 1, 24).round(decimals)
    own = sides(members, others, per_unit=3)
    weights = {10: rng.integers(1, 4, size=(6, 10)), 8: rng.integers(0, 3, size=(6, 8)) + np.eye(6, 8, dtype=int)}
    monkeypatch.setattr("dpmed.memorization.membership.unit_multiplicities", lambda n, *_: iter([weights[n]]))
    monkeypatch.setattr("dpmed.memorization.membership.percentile_interval", lambda values: values)
    areas, (at_10, at_50) = bootstrap_attack(own, [0.1, 0.5], 6, 0)
    for i in range(6):
        m = np.repeat(members, weights[10][i][own.member_units])
        o = np.repeat(others, weights[8][i][own.other_units])
        assert areas[i] == pytest.approx(auc(m, o))
        assert at_10[i] == pytest.approx(tpr_at_fpr(m, o, 0.1))
        assert at_50[i] == pytest.approx(tpr_at_fpr(m, o, 0.5))


def test_intervals_draw_patients():
    rng = np.random.default_rng(9)
    of_member, of_other = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    plain = sides(of_member, of_other)
    repeated = sides(np.repeat(of_member, 5), np.repeat(of_other, 5), per_unit=5)
    one, _ = bootstrap_attack(plain, [], 2000, 0)
    five, _ = bootstrap_attack(repeated, [], 2000, 0)
    assert five == pytest.approx(one, abs=0.01)  # copies of a patient's record add nothing
    units = np.concatenate([plain.member_units, 1000 + plain.other_units])
    both, member = np.concatenate([of_member, of_other]), np.repeat([True, False], 60)

    def area(index: np.ndarray) -> float:
        return auc(both[index][member[index]], both[index][~member[index]])

    assert bootstrap_by_unit(area, units, 1000, 1) == pytest.approx(one, abs=0.03)


def test_blocks_of_resamples_are_drawn_apart(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(membership, "_WEIGHTS_AT_ONCE", 100 * 200)
    own = sides(rng.normal(size=200), rng.normal(size=200))
    low, high = bootstrap_attack(own, [], 2_000, 0)[0]
    expected = 2 * 1.96 * np.sqrt(401 / (12 * 200**2))  # Mann-Whitney under equal distributions
    assert high - low == pytest.approx(expected, rel=0.1)


def test_the_memory_of_an_attacks_interval_does_not_grow_with_resamples_times_records():
    rng = np.random.default_rng(1)

    def peak(n: int) -> int:
        own = sides(rng.normal(size=n), rng.normal(size=n))
        tracemalloc.start()
        bootstrap_attack(own, [0.1], 200, 0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(20_000) < peak(2_000) + 18_000 * 200


def test_separated_sides_keep_an_interval():
    figures = attack_figures(sides(np.arange(10.0) + 100, np.arange(20.0)), [0.1], bootstrap=100)
    area, tpr = figures["auc"], figures["tpr_at_fpr_0.1"]
    assert isinstance(area, Measure) and isinstance(tpr, Measure)
    assert (area.value, area.low, area.high) == (1.0, *wilson(10, 10))
    assert (tpr.value, tpr.low) == (1.0, wilson(10, 10)[0])


def test_a_rate_finer_than_one_record_says_so():
    figures = attack_figures(sides(np.arange(50.0), np.arange(50.0)), [0.1, 0.02, 0.001], bootstrap=50)
    resolutions = {name: f.extra.get("resolution") for name, f in figures.items() if isinstance(f, Measure)}
    assert resolutions == {"auc": None, "tpr_at_fpr_0.1": None, "tpr_at_fpr_0.02": None, "tpr_at_fpr_0.001": 0.02}


def test_the_thinned_curve_lies_on_the_curve():
    rng = np.random.default_rng(8)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    thin = attack_figures(sides(members, others), [0.01], bootstrap=10)["roc"]
    assert isinstance(thin, dict)
    assert 30 < len(thin["fpr"]) == len(thin["tpr"]) <= ROC_POINTS
    assert (thin["fpr"][0], thin["fpr"][-1], thin["tpr"][-1]) == (0.0, 1.0, 1.0)
    assert sum(0 < f < 0.01 for f in thin["fpr"]) >= 5  # where it matters
    whole = {(round(f, 6), round(t, 6)) for f, t in zip(*roc(members, others), strict=True)}
    assert set(zip(thin["fpr"], thin["tpr"], strict=True)) <= whole


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)


@given(members=lengths, others=lengths, bins=st.integers(1, 12))
def test_matched_sides_have_as_many_records_in_each_piece(members: np.ndarray, others: np.ndarray, bins: int) -> None:
    kept_m, kept_o = matched_records([members], [others], bins=bins)
    assert (len(kept_m), len(kept_o)) == (len(members), len(others))
    edges = np.unique(np.quantile(np.concatenate([members, others]), np.linspace(0, 1, bins + 1)[1:-1]))
    for piece in range(len(edges) + 1):
        own_m, own_o = (np.searchsorted(edges, of, side="right") == piece for of in (members, others))
        assert kept_m[own_m].sum() == kept_o[own_o].sum() == min(own_m.sum(), own_o.sum())


def test_length_alone_tells_nothing_once_it_is_matched() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(20, 200, size=3000), rng.integers(60, 240, size=3000)
    assert auc(members, others) < 0.4
    kept_m, kept_o = matched_records([members], [others], bins=20)
    assert abs(auc(members[kept_m], others[kept_o]) - 0.5) < 0.02
    assert kept_m.sum() > 1000


def test_what_is_matched_by_two_properties_is_matched_in_each_combination() -> None:
    rng = np.random.default_rng(1)
    members = rng.integers(0, 4, size=(2, 900))
    others = rng.integers(1, 5, size=(2, 700))
    kept_m, kept_o = matched_records(list(members), list(others), bins=50)
    assert kept_m.sum() == kept_o.sum() > 300
    for pair in itertools.product(range(5), range(5)):
        in_m, in_o = ((side == np.array(pair)[:, None]).all(axis=0) for side in (members, others))
        assert kept_m[in_m].sum() == kept_o[in_o].sum() == min(in_m.sum(), in_o.sum())


def test_sides_without_a_common_piece_leave_nothing_to_compare() -> None:
    kept_m, kept_o = matched_records([np.arange(10)], [np.arange(100, 110)])
    assert not kept_m.any() and not kept_o.any()
