"""The noise that reaches `.grad`: of the size that the accountant was told, once, and never the same twice."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.dp_runs import make_plan as plan_of_run
from faults.dp_runs import make_trainer
from guarantees.steps import ENGINES, Case, Draw, Scene, adapted, make_scene, step_sum
from torch import Tensor

from dpmed.data.batches import Collator
from dpmed.data.tasks import Example
from dpmed.privacy.clipping import Clipping
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.plan import EngineName

SIGMAS = 6.0
CASE = Case("llama", "causal_lm")
model_of: Callable[[Case], Any] = functools.cache(adapted)
fast_and_secure = pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])


def a_scene(folder: Path, **changes: Any) -> Scene:
    return make_scene(folder, CASE, Draw(sizes=(2, 1, 3), **changes), model_of(CASE))


def noise_of_step(scene: Scene, examples: list[Example] | None = None, *, engine: EngineName = "one_pass") -> Tensor:
    """`.grad` times the divisor, minus the clipped sum, in units of noise_multiplier * C."""
    noise, multiplier = scene.trainer._noise, scene.trainer.plan.noise_multiplier
    noised = step_sum(scene, examples, engine=engine)
    scene.plan(noise_multiplier=0.0, secure=False)
    quiet = step_sum(scene, examples, engine=engine)
    scene.plan(noise_multiplier=multiplier, secure=noise.secure)
    scene.trainer._noise = noise  # the same source goes on
    return (noised - quiet) / (multiplier * scene.clip_norm)


def is_standard_normal(numbers: Tensor) -> bool:
    """Mean, standard deviation and kurtosis within their statistical error."""
    n, moments = len(numbers), (numbers.mean(), numbers.square().mean() - 1, numbers.pow(4).mean() - 3)
    errors = (1.0, 2.0**0.5, 96.0**0.5)  # of the moments of a standard normal, times sqrt(n)
    return all(abs(float(m)) < SIGMAS * e / n**0.5 for m, e in zip(moments, errors, strict=True))


@fast_and_secure
@pytest.mark.parametrize("clipping", ["norm", "automatic"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_added_to_the_clipped_sum_is_the_planned_noise_once(
    engine: EngineName, clipping: Clipping, secure: bool, tmp_path: Path
) -> None:
    scene = a_scene(tmp_path, clipping=clipping, micro_batch_tokens=1, clip_factor=0.5)
    assert len(scene.cuts) > 3
    scene.plan(noise_multiplier=3.0, secure=secure)
    numbers = noise_of_step(scene, engine=engine)
    assert len(numbers) > 3000
    assert is_standard_normal(numbers)


@fast_and_secure
def test_an_empty_draw_is_noise_alone(secure: bool, tmp_path: Path) -> None:
    scene = a_scene(tmp_path)
    scene.plan(noise_multiplier=2.0, secure=secure)
    numbers = step_sum(scene, []) / (2.0 * scene.clip_norm)
    assert is_standard_normal(numbers)


@pytest.mark.parametrize("times", [0, 2])
def test_the_comparison_sees_noise_that_is_missing_or_added_twice(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GaussianNoise.add_

    def faulty(self: GaussianNoise, flat: Tensor) -> Tensor:
        for _ in range(times):
            add(self, flat)
        return flat

    monkeypatch.setattr(GaussianNoise, "add_", faulty)
    scene = a_scene(tmp_path)
    scene.plan(noise_multiplier=3.0)
    assert not is_standard_normal(noise_of_step(scene))


# --- Nothing repeats --------------------------------------------------------------------------------------------------


def noises(folder: Path, *, secure: bool, seed: int | None = None) -> list[Tensor]:
    """Noise of two steps of one trainer, and of another start by the same recipe with all global seeds the same."""
    found = []
    for start in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        scene = make_scene(folder / str(start), CASE, Draw(sizes=(2, 1, 3)), model_of(CASE), seed=7)
        scene.plan(noise_multiplier=2.0, secure=secure, noise_seed=seed)
        found += [step_sum(scene, []) for _ in range(2)]
    return found


def repeats(vectors: list[Tensor]) -> list[tuple[int, int]]:
    """Pairs that share numbers, in place or anywhere, or that correlate (a scaled or shifted copy would)."""
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(vectors), 2):
        shared = float(torch.isin(a, b).float().mean())
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        if shared > 0.1 or abs(correlation) > SIGMAS / len(a) ** 0.5:
            found.append((i, j))
    return found


@fast_and_secure
def test_no_noise_comes_twice_in_steps_or_starts(secure: bool, tmp_path: Path) -> None:
    assert repeats(noises(tmp_path, secure=secure)) == []


def test_the_check_sees_noise_that_a_seed_repeats(tmp_path: Path) -> None:
    assert repeats(noises(tmp_path, secure=False, seed=3)) == [(0, 2), (1, 3)]


# --- The other coins of a step ----------------------------------------------------------------------------------------


def first_coins(folder: Path) -> list[float]:
    """What torch's global generator would give to dropout, or to the choice of masked words, in each step."""
    trainer = make_trainer(folder, plan_of_run(n_steps=2), seed=7)
    seen: list[float] = []
    collate: Callable[[list[Example]], Any] = trainer.data_collator
    assert isinstance(collate, Collator)

    def spy(examples: list[Example]) -> Any:
        with torch.random.fork_rng(devices=[]):
            seen.append(float(torch.rand(())))
        return collate(examples)

    attach = trainer._attach
    trainer._attach = lambda: (attach(), seen.clear())[0]  # type: ignore[method-assign]
    trainer.data_collator = spy
    trainer.train()
    assert seen
    return seen


def test_masks_and_dropout_are_not_known_to_who_knows_the_recipe(tmp_path: Path) -> None:
    first, second = (first_coins(tmp_path / str(i)) for i in range(2))
    assert not set(first) & set(second)
