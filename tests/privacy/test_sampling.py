"""The sampler draws what the accountant assumes; micro-batches never split a unit."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.sampling import PoissonUnitSampler, cut_micro_batches

FALSE_ALARM = 1e-6  # probability with which a right sampler fails one of these tests


def make_sampler(
    units: list[int], rate: float = 0.5, cap: int = 100, steps: int = 10, seed: int | None = None
) -> PoissonUnitSampler:
    return PoissonUnitSampler(units, sampling_rate=rate, max_records_per_unit=cap, steps_per_pass=steps, seed=seed)


def as_bounds(n: int, p: float) -> tuple[float, float]:
    """Counts that Binomial(n, p) leaves with probability FALSE_ALARM."""
    return float(stats.binom.ppf(FALSE_ALARM / 2, n, p)), float(stats.binom.ppf(1 - FALSE_ALARM / 2, n, p))


def test_each_unit_is_drawn_at_the_sampling_rate_however_many_records_it_has():
    sizes = [1, 50, 3, 1, 20, 7]
    units = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    random.Random(0).shuffle(units)
    steps = 20_000
    counts = Counter(
        unit
        for draw in make_sampler(units, rate=0.1, cap=2, steps=steps)
        for unit in {units[record] for record in draw}
    )
    low, high = as_bounds(steps, 0.1)
    assert all(low <= counts[unit] <= high for unit in range(len(sizes))), counts


def test_units_are_drawn_independently_so_the_size_of_a_draw_is_binomial():
    n_units, rate, steps = 20, 0.25, 20_000
    sizes = Counter(len(draw) for draw in make_sampler(list(range(n_units)), rate=rate, steps=steps))
    expected = stats.binom.pmf(np.arange(n_units + 1), n_units, rate) * steps
    kept = expected >= 5  # chi-square needs filled cells; the rest is one cell
    observed = np.array([sizes[k] for k in range(n_units + 1)], dtype=float)
    result = stats.chisquare([*observed[kept], observed[~kept].sum()], [*expected[kept], steps - expected[kept].sum()])
    assert result.pvalue > FALSE_ALARM


def test_steps_are_independent_of_each_other():
    steps = 20_000
    drawn = np.array([bool(draw) for draw in make_sampler([0], rate=0.5, steps=steps)])
    low, high = as_bounds(steps // 2, 0.25)
    assert low <= (drawn[0::2] & drawn[1::2]).sum() <= high


def test_a_drawn_unit_gives_distinct_records_uniformly_up_to_the_cap():
    steps, size, cap = 12_000, 6, 2
    counts: Counter[int] = Counter()
    for draw in make_sampler([0] * size, rate=1.0, cap=cap, steps=steps):
        assert len(draw) == len(set(draw)) == cap
        counts.update(draw)
    low, high = as_bounds(steps, cap / size)
    assert all(low <= counts[record] <= high for record in range(size)), counts


def test_units_below_the_cap_give_all_their_records():
    units = [0, 1, 0, 2, 1, 0]
    (draw,) = make_sampler(units, rate=1.0, cap=2, steps=1)
    assert Counter(units[record] for record in draw) == {0: 2, 1: 2, 2: 1}


def test_empty_draws_are_yielded_not_skipped():
    draws = list(make_sampler([0], rate=1e-9, steps=50))
    assert draws == [[]] * 50


def test_rate_one_draws_every_unit_every_time():
    assert all(sorted(draw) == list(range(30)) for draw in make_sampler(list(range(30)), rate=1.0))


def test_length_is_the_number_of_draws_of_one_pass():
    sampler = make_sampler(list(range(10)), steps=7)
    assert len(sampler) == len(list(sampler)) == 7


def test_a_second_pass_goes_on_with_fresh_draws():
    sampler = make_sampler(list(range(200)), steps=3)
    assert list(sampler) != list(sampler)


def test_global_seeds_have_no_influence():
    def draws_after_seeding() -> list[list[int]]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return list(make_sampler(list(range(500)), steps=2))

    assert draws_after_seeding() != draws_after_seeding()


def test_the_test_only_seed_repeats_draws():
    units = list(range(200))
    assert list(make_sampler(units, seed=3)) == list(make_sampler(units, seed=3))
    assert list(make_sampler(units, seed=3)) != list(make_sampler(units, seed=4))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_replay_draws_is_refused(duplicate):
    with pytest.raises(PrivacyError, match="make a new one"):
        duplicate(make_sampler([0, 1]))


@pytest.mark.parametrize(
    ("units", "rate", "cap", "steps", "message"),
    [
        ([], 0.5, 1, 1, "non-empty"),
        ([0.0, 1.0], 0.5, 1, 1, "unit indices"),
        ([0, 2], 0.5, 1, 1, "dense"),
        ([-1, 0], 0.5, 1, 1, "dense"),
        ([0], 0.0, 1, 1, "sampling_rate"),
        ([0], 1.01, 1, 1, "expected_batch_units"),
        ([0], float("nan"), 1, 1, "sampling_rate"),
        ([0], 0.5, 0, 1, "max_records_per_unit"),
        ([0], 0.5, 1, 0, "steps_per_pass"),
    ],
)
def test_wrong_inputs_are_refused(units, rate, cap, steps, message):
    with pytest.raises(InputError, match=message):
        make_sampler(units, rate=rate, cap=cap, steps=steps)


draws = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(draw=draws, max_tokens=st.integers(1, 400))
def test_micro_batches_partition_the_draw_without_splitting_a_unit(draw, max_tokens):
    units, lengths = [unit for unit, _ in draw], [length for _, length in draw]
    records = list(range(len(draw)))
    batches = cut_micro_batches(records, units=units, lengths=lengths, max_tokens=max_tokens)

    assert sorted(record for batch in batches for record in batch) == records
    assert all(batches)
    batches_of_unit = [{units[record] for record in batch} for batch in batches]
    assert sum(map(len, batches_of_unit)) == len(set(units))  # no unit in two
    for batch, members in zip(batches, batches_of_unit, strict=True):
        padded = len(batch) * max(lengths[record] for record in batch)
        assert padded <= max_tokens or len(members) == 1
    widths = [max(lengths[record] for record in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_an_empty_draw_gives_no_micro_batch():
    assert cut_micro_batches([], units=[], lengths=[], max_tokens=10) == []


def test_micro_batches_are_filled_up_to_the_budget():
    batches = cut_micro_batches([10, 11, 12, 13], units=[0, 1, 2, 3], lengths=[5, 5, 5, 5], max_tokens=10)
    assert batches == [[10, 11], [12, 13]]


def test_the_elements_returned_are_the_caller_s_record_indices():
    assert cut_micro_batches([70, 30], units=[1, 0], lengths=[2, 9], max_tokens=9) == [[30], [70]]


def test_a_unit_larger_than_the_budget_stands_alone():
    batches = cut_micro_batches([0, 1, 2, 3], units=[0, 0, 0, 1], lengths=[8, 8, 8, 1], max_tokens=10)
    assert batches == [[0, 1, 2], [3]]


def test_micro_batch_inputs_are_checked():
    with pytest.raises(InputError, match="max_tokens"):
        cut_micro_batches([0], units=[0], lengths=[1], max_tokens=0)
    with pytest.raises(ValueError):
        cut_micro_batches([0, 1], units=[0], lengths=[1, 1], max_tokens=5)
