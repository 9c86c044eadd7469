"""The sampler draws what the accountant assumes; micro-batches never split a unit."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.sampling import PoissonUnitSampler, cut_groups, cut_micro_batches

FALSE_ALARM = 1e-9  # probability with which a right sampler fails one of these tests
BOTH = pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])


def make_sampler(
    units: list[int],
    rate: float = 0.5,
    cap: int = 100,
    steps: int = 10,
    *,
    secure: bool = False,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
) -> PoissonUnitSampler:
    return PoissonUnitSampler(
        units,
        sampling_rate=rate,
        max_records_per_unit=cap,
        steps_per_pass=steps,
        secure=secure,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def as_bounds(n: int, p: float) -> tuple[float, float]:
    """Counts that Binomial(n, p) leaves with probability FALSE_ALARM."""
    return float(stats.binom.ppf(FALSE_ALARM / 2, n, p)), float(stats.binom.ppf(1 - FALSE_ALARM / 2, n, p))


# --- Draws are Poisson ------------------------------------------------------------------------------------------------

SIZES = [1, 50, 3, 1, 20, 7]  # records of each unit


def units_in_shuffled_order() -> list[int]:
    units = [unit for unit, size in enumerate(SIZES) for _ in range(size)]
    random.Random(0).shuffle(units)
    return units


def included(units: list[int], draws: list[list[int]]) -> np.ndarray:
    """[step, unit]: whether the step drew the unit."""
    table = np.zeros((len(draws), max(units) + 1), dtype=bool)
    for step, draw in enumerate(draws):
        table[step, [units[record] for record in draw]] = True
    return table


def assert_poisson(table: np.ndarray, rate: float) -> None:
    """Each unit at the rate; each pair of units, and each unit in successive steps, at the rate squared; sizes are
    binomial."""
    steps, n_units = table.shape
    low, high = as_bounds(steps, rate)
    assert all(low <= count <= high for count in table.sum(0))
    low, high = as_bounds(steps, rate**2)
    both = table.T.astype(int) @ table.astype(int)
    assert all(low <= both[i, j] <= high for i in range(n_units) for j in range(i))
    low, high = as_bounds(steps // 2, rate**2)
    assert all(low <= count <= high for count in (table[0::2][: steps // 2] & table[1::2]).sum(0))
    expected = stats.binom.pmf(np.arange(n_units + 1), n_units, rate) * steps
    kept = expected >= 5  # chi-square needs filled cells; the rest is one cell
    observed = np.bincount(table.sum(1), minlength=n_units + 1).astype(float)
    cells = [(observed[kept], expected[kept])]
    if not kept.all():
        cells.append((observed[~kept].sum(keepdims=True), steps - expected[kept].sum(keepdims=True)))
    seen, hoped = (np.concatenate(column) for column in zip(*cells, strict=True))
    assert stats.chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > FALSE_ALARM


@BOTH
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_draws_are_poisson_however_many_records_a_unit_has(rate, secure):
    units = units_in_shuffled_order()
    draws = list(make_sampler(units, rate=rate, cap=2, steps=20_000, secure=secure))
    assert_poisson(included(units, draws), rate)


@BOTH
def test_the_size_of_a_draw_of_many_units_is_binomial(secure):
    units = list(range(20))
    draws = list(make_sampler(units, rate=0.25, steps=20_000, secure=secure))
    assert_poisson(included(units, draws), 0.25)


def union_over_ranks(samplers: list[PoissonUnitSampler]) -> list[list[int]]:
    return [[record for draw in draws for record in draw] for draws in zip(*samplers, strict=True)]


@BOTH
@pytest.mark.parametrize("world_size", [2, 4, 9])
def test_the_union_over_ranks_is_one_poisson_draw(world_size, secure):
    units = units_in_shuffled_order()
    ranks = [
        make_sampler(units, rate=0.2, cap=2, steps=20_000, secure=secure, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(sampler.n_units == len(SIZES) for sampler in ranks)
    assert_poisson(included(units, union_over_ranks(ranks)), 0.2)


@BOTH
def test_each_rank_draws_its_own_units_only(secure):
    units = [0, 1, 2, 3, 4, 0, 1]
    for rank in range(3):
        (draw,) = make_sampler(units, rate=1.0, steps=1, secure=secure, rank=rank, world_size=3)
        assert sorted({units[record] for record in draw}) == list(range(rank, 5, 3))


@BOTH
def test_a_rank_without_a_unit_yields_empty_draws(secure):
    sampler = make_sampler([0, 1], rate=1.0, steps=5, secure=secure, rank=2, world_size=3)
    assert list(sampler) == [[]] * 5
    assert sampler.n_units == 2


def test_ranks_with_the_same_test_only_seed_draw_differently():
    first, second = (make_sampler(list(range(400)), steps=3, seed=1, rank=rank, world_size=2).draw() for rank in (0, 1))
    assert [unit // 2 for unit in first] != [unit // 2 for unit in second]


def fixed_key(n: int) -> bytes:
    return bytes(n)


def test_draws_from_a_key_that_is_used_twice_are_seen(monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", fixed_key)
    units = list(range(6))
    with pytest.raises(AssertionError):
        assert_poisson(included(units, list(make_sampler(units, rate=0.2, steps=2_000, secure=True))), 0.2)


@pytest.mark.parametrize("fault", ["rate", "fixed size", "shared entropy"])
def test_draws_that_are_not_poisson_are_seen(fault):
    rng, steps, n_units, rate = np.random.default_rng(0), 20_000, 6, 1 / 3
    if fault == "rate":
        table = rng.random((steps, n_units)) < rate * 1.1
    elif fault == "fixed size":  # a shuffled batch of two
        table = rng.random((steps, n_units)).argsort(1) < 2
    else:  # ranks 0 and 1 with the same numbers
        table = np.repeat(rng.random((steps, n_units // 2)) < rate, 2, axis=1)
    with pytest.raises(AssertionError):
        assert_poisson(table, rate)


# --- Records of a unit ------------------------------------------------------------------------------------------------


def assert_uniform_choice(draws: list[list[int]], *, size: int, cap: int) -> None:
    """Each set of `cap` of the `size` records equally often."""
    assert all(len(draw) == len(set(draw)) == cap for draw in draws)
    counts = Counter(tuple(sorted(draw)) for draw in draws)
    sets = list(combinations(range(size), cap))
    assert stats.chisquare([counts[each] for each in sets]).pvalue > FALSE_ALARM


@BOTH
@pytest.mark.parametrize(("size", "cap"), [(6, 2), (5, 4), (4, 1)])
def test_a_drawn_unit_gives_distinct_records_uniformly_up_to_the_cap(size, cap, secure):
    draws = list(make_sampler([0] * size, rate=1.0, cap=cap, steps=12_000, secure=secure))
    assert_uniform_choice(draws, size=size, cap=cap)


@pytest.mark.parametrize("fault", ["first ones", "neighbours", "favoured"])
def test_a_choice_that_is_not_uniform_is_seen(fault):
    rng = np.random.default_rng(0)
    if fault == "first ones":
        draws = [[0, 1]] * 12_000
    elif fault == "neighbours":  # each record equally often, but not each pair
        draws = [[first, (first + 1) % 6] for first in rng.integers(0, 6, 12_000).tolist()]
    else:
        draws = (rng.random((12_000, 6)) * [0.8, 1, 1, 1, 1, 1]).argsort(1)[:, :2].tolist()
    with pytest.raises(AssertionError):
        assert_uniform_choice(draws, size=6, cap=2)


def test_units_below_the_cap_give_all_their_records():
    units = [0, 1, 0, 2, 1, 0]
    (draw,) = make_sampler(units, rate=1.0, cap=2, steps=1)
    assert Counter(units[record] for record in draw) == {0: 2, 1: 2, 2: 1}


@BOTH
def test_empty_draws_are_yielded_not_skipped(secure):
    draws = list(make_sampler([0], rate=1e-12, steps=50, secure=secure))
    assert draws == [[]] * 50


@BOTH
def test_rate_one_draws_every_unit_every_time(secure):
    assert all(sorted(draw) == list(range(30)) for draw in make_sampler(list(range(30)), rate=1.0, secure=secure))


def test_length_is_the_number_of_draws_of_one_pass():
    sampler = make_sampler(list(range(10)), steps=7)
    assert len(sampler) == len(list(sampler)) == 7


@BOTH
def test_a_second_pass_goes_on_with_fresh_draws(secure):
    sampler = make_sampler(list(range(200)), steps=3, secure=secure)
    assert list(sampler) != list(sampler)


@BOTH
def test_two_samplers_draw_differently(secure):
    first, second = (make_sampler(list(range(200)), steps=3, secure=secure) for _ in range(2))
    assert list(first) != list(second)


def drawn_by_a_fork(sampler: PoissonUnitSampler) -> bytes:
    """What a forked copy of the sampler draws, as text; nothing if it fails."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(sampler.draw()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return content


def test_forks_of_a_secure_sampler_draw_afresh_and_those_of_a_fast_one_refuse():
    sampler = make_sampler(list(range(200)), secure=True)
    drawn = [str(sampler.draw()).encode(), drawn_by_a_fork(sampler), drawn_by_a_fork(sampler)]
    assert len(set(drawn)) == 3 and all(drawn)
    assert drawn_by_a_fork(make_sampler(list(range(200)))) == b""


@BOTH
def test_global_seeds_have_no_influence(secure):
    def draws_after_seeding() -> list[list[int]]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return list(make_sampler(list(range(500)), steps=2, secure=secure))

    assert draws_after_seeding() != draws_after_seeding()


def test_the_test_only_seed_repeats_draws():
    units = list(range(200))
    assert list(make_sampler(units, seed=3)) == list(make_sampler(units, seed=3))
    assert list(make_sampler(units, seed=3)) != list(make_sampler(units, seed=4))


def test_the_test_only_seed_has_no_place_in_secure_draws():
    with pytest.raises(InputError, match="leave out noise_seed, or secure"):
        make_sampler([0, 1], secure=True, seed=3)


@BOTH
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_replay_draws_is_refused(duplicate, secure):
    with pytest.raises(PrivacyError, match="make a new one"):
        duplicate(make_sampler([0, 1], secure=secure))


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_outside_the_world_are_refused(rank, world_size):
    with pytest.raises(InputError, match="rank must lie"):
        make_sampler([0, 1], rank=rank, world_size=world_size)


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


# --- Groups of micro-batches ------------------------------------------------------------------------------------------

DRAWN = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=20)


@given(drawn=DRAWN, max_tokens=st.integers(1, 120), max_units=st.none() | st.integers(1, 4))
def test_groups_hold_whole_units_and_each_record_once(
    drawn: list[tuple[int, int]], max_tokens: int, max_units: int | None
) -> None:
    units, lengths = [u for u, _ in drawn], [n for _, n in drawn]
    names = [100 + i for i in range(len(drawn))]
    groups = cut_groups(names, units=units, lengths=lengths, max_tokens=max_tokens, max_units=max_units)
    assert sorted(name for group in groups for batch in group for name in batch) == names
    unit_of, length_of = dict(zip(names, units, strict=True)), dict(zip(names, lengths, strict=True))
    owners = [{unit_of[name] for batch in group for name in batch} for group in groups]
    assert sum(map(len, owners)) == len(set(units))  # no unit is in two groups: it would be clipped twice
    assert all(1 <= len(owner) <= (max_units or 99) for owner in owners)
    batches = [batch for group in groups for batch in group]
    assert all(len(b) * max(length_of[n] for n in b) <= max_tokens or len(b) == 1 for b in batches)


def test_short_records_of_a_unit_are_not_padded_to_its_longest() -> None:
    units, lengths = [0, 0, 1, 1, 2, 2], [100, 10, 90, 10, 80, 10]
    (group,) = cut_groups(range(6), units=units, lengths=lengths, max_tokens=300)
    assert sorted(map(sorted, group)) == [[0, 2, 4], [1, 3, 5]]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in group)
    whole = cut_micro_batches(range(6), units=units, lengths=lengths, max_tokens=300)
    assert padded < 0.7 * sum(len(batch) * max(lengths[i] for i in batch) for batch in whole)


def test_units_of_one_record_need_no_group_beyond_a_micro_batch() -> None:
    groups = cut_groups(range(4), units=[5, 3, 1, 0], lengths=[9, 9, 9, 9], max_tokens=18)
    assert [[len(batch) for batch in group] for group in groups] == [[2], [2]]
