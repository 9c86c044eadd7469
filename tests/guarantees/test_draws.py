"""What trains is a Poisson draw of units: through the plan's sampler, the trainer's loader, and over several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarantees.steps import Case, Draw, Scene, adapted, make_plan, make_scene
from scipy import stats

from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.sampling import PoissonUnitSampler
from dpmed.trainers.dp_lora import DPLoRATrainingConfig, LogicalBatch

SIGMAS = 6.0
SIZES = (1, 4, 2, 1, 3, 1, 2, 1, 1)  # records of each unit
RATE = 1 / 3
N_DRAWS = 3000
UNIT_OF_RECORD = [unit for unit, size in enumerate(SIZES) for _ in range(size)]


def plan(**changes: Any) -> PrivacyPlan:
    values = {"n_units": len(SIZES), "expected_batch_units": 3, "max_records_per_unit": 2}
    return make_plan(**{**values, **changes})


def drawn_units(draws: Iterator[list[int]], n: int = N_DRAWS) -> np.ndarray:
    """[n, units], 1 where a unit is in a draw."""
    found = np.zeros((n, len(SIZES)))
    for row, records in zip(found, draws, strict=False):
        row[[UNIT_OF_RECORD[record] for record in records]] = 1
    return found


def endless(*samplers: PoissonUnitSampler) -> Iterator[list[int]]:
    """The union of the samplers' draws, pass after pass."""
    while True:
        for parts in zip(*samplers, strict=True):
            yield [record for part in parts for record in part]


def flaws(drawn: np.ndarray) -> set[str]:
    """In what draws differ from independent draws of independent units at the rate; {} but for six sigma."""
    n, n_units = drawn.shape
    limit = SIGMAS / n**0.5
    z = (drawn - RATE) / (RATE * (1 - RATE)) ** 0.5  # [n, units], mean 0 and variance 1
    within, next_draw = z.T @ z / n, z[:-1].T @ z[1:] / n
    sizes = np.bincount(drawn.sum(axis=1).astype(int), minlength=n_units + 1)
    expected = n * stats.binom.pmf(range(n_units + 1), n_units, RATE)
    often = expected > 5
    distance = float((((sizes - expected) ** 2) / expected)[often].sum())
    found = {
        "rate": bool(np.abs(z.mean(axis=0)).max() > limit),
        "units depend on each other": bool(np.abs(within - np.diag(np.diag(within))).max() > limit),
        "draws depend on each other": bool(np.abs(next_draw).max() > limit),
        "sizes": bool(stats.chi2.sf(distance, often.sum()) < 1e-9),
    }
    return {name for name, seen in found.items() if seen}


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_union_of_the_ranks_draws_is_one_poisson_draw_of_units(world_size: int, secure: bool) -> None:
    samplers = [plan(secure=secure).sampler(UNIT_OF_RECORD, rank=r, world_size=world_size) for r in range(world_size)]
    assert flaws(drawn_units(endless(*samplers))) == set()


def test_no_unit_is_drawn_by_two_ranks() -> None:
    held = []
    for rank in range(4):
        drawn = drawn_units(endless(plan().sampler(UNIT_OF_RECORD, rank=rank, world_size=4)), n=300)
        held += list(np.flatnonzero(drawn.any(axis=0)))
    assert sorted(held) == list(range(len(SIZES)))


# --- Through the trainer's own loader ---------------------------------------------------------------------------------


def a_scene(folder: Path) -> Scene:
    case = Case("gpt2", "causal_lm")
    scene = make_scene(folder, case, Draw(sizes=SIZES, micro_batch_tokens=60), adapted(case))
    scene.plan(expected_batch_units=3, max_records_per_unit=2)
    assert scene.trainer.plan.sampling_rate == RATE
    return scene


def loaded(scene: Scene, n: int) -> Iterator[LogicalBatch]:
    """Logical batches of the trainer, pass after pass."""
    loader, given = scene.trainer.get_train_dataloader(), 0
    while given < n:
        for logical in loader:
            given += 1
            yield logical


def units_of(draws: Iterator[LogicalBatch], n: int) -> np.ndarray:
    found = np.zeros((n, len(SIZES)))
    for row, logical in zip(found, draws, strict=False):
        row[[example.unit for group in logical for micro in group for example in micro]] = 1
    return found


def test_the_trainers_batches_are_such_draws(tmp_path: Path) -> None:
    assert flaws(units_of(loaded(a_scene(tmp_path), 1500), 1500)) == set()


def test_the_trainers_batches_of_three_ranks_are_such_draws_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, together = a_scene(tmp_path), np.zeros((1200, len(SIZES)))
    monkeypatch.setattr(DPLoRATrainingConfig, "world_size", 3)
    for rank in range(3):
        monkeypatch.setattr(DPLoRATrainingConfig, "process_index", rank)
        of_this_rank = units_of(loaded(scene, 1200), 1200)
        assert list(np.flatnonzero(of_this_rank.any(axis=0))) == list(range(rank, len(SIZES), 3))
        together += of_this_rank
    assert flaws(together) == set()


def test_each_record_of_a_unit_is_used_equally_often_and_no_more_than_the_cap_at_once(tmp_path: Path) -> None:
    counts = np.zeros(sum(SIZES))
    n_of_unit = np.zeros(len(SIZES))
    unit_of: dict[int, int] = {}
    for logical in loaded(a_scene(tmp_path), 1500):
        used = [(example.unit, example.record) for group in logical for micro in group for example in micro]
        units = [unit for unit, _ in used]
        assert max(np.bincount(units), default=0) <= 2
        n_of_unit[sorted(set(units))] += 1
        for unit, record in used:
            counts[record] += 1
            unit_of[record] = unit
    sizes = np.bincount([unit_of[r] for r in range(len(counts))])
    assert sorted(sizes) == sorted(SIZES)
    for record, count in enumerate(counts):
        n, share = n_of_unit[unit_of[record]], min(1.0, 2 / sizes[unit_of[record]])
        assert abs(count - n * share) <= SIGMAS * (n * share * (1 - share)) ** 0.5


# --- Planted faults ---------------------------------------------------------------------------------------------------


def fixed_batches(rng: np.random.Generator) -> Iterator[list[int]]:
    """Three units of a shuffled list at a time: what many examples call Poisson."""
    while True:
        for units in rng.permutation(len(SIZES)).reshape(3, 3):
            yield [UNIT_OF_RECORD.index(unit) for unit in units]


def records_instead_of_units(rng: np.random.Generator) -> Iterator[list[int]]:
    """Each record at the rate: a unit with four records is in nearly every draw."""
    while True:
        yield np.flatnonzero(rng.random(len(UNIT_OF_RECORD)) < RATE).tolist()


def ranks_with_one_seed(rng: np.random.Generator) -> Iterator[list[int]]:
    """Three ranks draw the same numbers for the units that each holds."""
    while True:
        same = rng.random(3)
        yield [UNIT_OF_RECORD.index(unit) for unit in range(len(SIZES)) if same[unit // 3] < RATE]


def passes_that_repeat(rng: np.random.Generator) -> Iterator[list[int]]:
    """A pass of two draws, each of them replayed once."""
    while True:
        units = np.flatnonzero(rng.random(len(SIZES)) < RATE).tolist()
        yield from [[UNIT_OF_RECORD.index(unit) for unit in units]] * 2


def without_empty_draws(rng: np.random.Generator) -> Iterator[list[int]]:
    while True:
        if len(units := np.flatnonzero(rng.random(len(SIZES)) < RATE).tolist()) > 1:
            yield [UNIT_OF_RECORD.index(unit) for unit in units]


@pytest.mark.parametrize(
    ("faulty", "seen"),
    [
        (fixed_batches, {"units depend on each other", "draws depend on each other", "sizes"}),
        (records_instead_of_units, {"rate", "sizes"}),
        (ranks_with_one_seed, {"units depend on each other", "sizes"}),
        (passes_that_repeat, {"draws depend on each other"}),
        (without_empty_draws, {"rate", "sizes"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_sees_draws_that_are_not_poisson(faulty: Any, seen: set[str]) -> None:
    assert seen <= flaws(drawn_units(faulty(np.random.default_rng(0))))
