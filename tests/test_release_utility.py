"""What sanitising cost: an unchanged classifier has an interval, one that holds, and one model loses nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import tiny_models
from dpmed.memorization.intervals import clopper_pearson
from dpmed.release_utility import f1_loss, f1_loss_bound, same_weights


def one_hot(labels: np.ndarray, n_labels: int) -> np.ndarray:
    return np.arange(n_labels) == labels[:, None]


def macro_f1(targets: np.ndarray, said: np.ndarray) -> float:
    """scikit-learn's; the same for one label a record, since all labels count."""
    return float(f1_score(targets.astype(int), said.astype(int), average="macro", zero_division=0))  # pyright: ignore


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), st.integers(2, 4), st.integers(1, 8))
def test_no_change_of_a_share_of_the_patients_costs_more_than_the_bound(
    data: st.DataObject, multi_label: bool, n_labels: int, n_units: int
) -> None:
    n = data.draw(st.integers(n_units, 20))
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    units = np.concatenate([np.arange(n_units), rng.integers(n_units, size=n - n_units)])

    def drawn() -> np.ndarray:
        if multi_label:
            return rng.random((n, n_labels)) < rng.random()
        return one_hot(rng.integers(n_labels, size=n), n_labels)

    targets = drawn()
    before = np.where(rng.random((n, 1)) < rng.random(), targets, drawn())  # from always right to about never
    changed = rng.permutation(n_units)[: data.draw(st.integers(0, n_units))]
    worst = np.roll(targets, 1, axis=1) if not multi_label else ~targets
    after = np.where(np.isin(units, changed)[:, None], worst if rng.random() < 0.5 else drawn(), before)
    lost = [macro_f1(targets, said) for said in (before, after)]
    assert lost[0] - lost[1] <= f1_loss_bound(targets, before, units, len(changed) / n_units) + 1e-9


def test_the_bound_is_reached_where_all_labels_of_a_patient_go() -> None:
    targets = np.ones((20, 2), bool)
    after = targets.copy()
    after[:3] = False
    lost = [macro_f1(targets, said) for said in (targets, after)]
    assert f1_loss_bound(targets, targets, np.arange(20), 3 / 20) == pytest.approx(lost[0] - lost[1])


def test_patients_with_most_records_are_the_worst_case() -> None:
    targets = np.ones((10, 1), bool)
    units = np.array([0] * 7 + [1, 2, 3])
    assert f1_loss_bound(targets, targets, units, 0.25) == pytest.approx(1 - 2 * 3 / 13)
    assert f1_loss_bound(targets, targets, units, 0.0) == 0.0
    assert f1_loss_bound(targets, targets, units, 1.0) == 1.0


@pytest.mark.parametrize(("n", "shown"), [(40, False), (150, False), (250, True)])
def test_predictions_that_did_not_change_have_an_interval_as_wide_as_their_patients_are_few(
    n: int, shown: bool
) -> None:
    targets = one_hot(np.arange(n) % 2, 2)
    said = targets.copy()
    said[: n // 10] = said[: n // 10, ::-1]
    found = f1_loss(targets, said, said, np.arange(n), bootstrap=200)
    share = clopper_pearson(0, n)[1]
    assert (1 - share) ** n == pytest.approx(0.025)  # more patients would have shown it with 97.5 %
    assert macro_f1(targets, said) == pytest.approx(0.9, abs=0.01)
    assert found.value == 0 and found.low <= 0 < found.high <= 2 * share
    assert (found.high <= 0.02) == shown
    assert f1_loss(targets, said, said, np.arange(n), bootstrap=0) == found


def test_one_patient_says_nothing_and_copies_of_records_prove_nothing() -> None:
    targets = one_hot(np.arange(30) % 2, 2)
    one = f1_loss(targets, targets, targets, np.zeros(30), bootstrap=50)
    assert one.value == 0 and one.high > 0.9
    few = f1_loss(targets, targets, targets, np.arange(30), bootstrap=50)
    copies = np.tile(targets, (9, 1))
    more = f1_loss(copies, copies, copies, np.tile(np.arange(30), 9), bootstrap=50)
    assert (more.low, more.high) == pytest.approx((few.low, few.high))


def test_a_classifier_of_which_a_patient_changed_is_never_surer_than_one_that_did_not_change() -> None:
    targets = one_hot(np.arange(60) % 2, 2)
    unchanged = f1_loss(targets, targets, targets, np.arange(60))
    before = targets.copy()
    before[0] = before[0, ::-1]  # the one change is for the better
    better = f1_loss(targets, before, targets, np.arange(60))
    assert better.value < 0 and better.high >= 0.9 * unchanged.high > 0


@pytest.mark.parametrize("share", [0.06, 0.2])
def test_the_interval_holds_for_changes_that_only_harm(share: float) -> None:
    """Patients whose prediction turns wrong with a chance of `share`: two balanced labels, right before, so F1 falls by
    as much."""
    rng, n, missed = np.random.default_rng(0), 60, 0
    for _ in range(200):
        targets = one_hot(rng.integers(2, size=n), 2)
        after = np.where(rng.random((n, 1)) < share, targets[:, ::-1], targets)
        missed += f1_loss(targets, targets, after, np.arange(n), bootstrap=100).high < share
    assert missed <= 0.08 * 200


def test_one_model_is_told_from_two() -> None:
    first, again = tiny_models.make_model("llama"), tiny_models.make_model("llama")
    again.load_state_dict(first.state_dict())
    assert same_weights(first, again) and not same_weights(first, tiny_models.make_model("gpt2"))
    weight = again.model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] = np.nextafter(np.float32(weight[0, 0].item()), np.float32(math.inf)).item()
    assert not same_weights(first, again)
