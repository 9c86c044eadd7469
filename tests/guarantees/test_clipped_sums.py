"""The clipped sum of a real step, by both engines, is that of a slow loop over single units; faults are seen."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarantees.steps import CASES, ENGINES, Case, Draw, adapted, make_scene, relative_error, slow_sum, step_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpmed.data.batches import Batch
from dpmed.data.head_losses import record_losses
from dpmed.data.tasks import TaskSpec
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers import base, dp_lora
from dpmed.trainers.dp_lora import DPLoRATrainer, LogicalBatch

DRAWS = st.builds(
    Draw,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple),
    seed=st.integers(0, 2**16),
    micro_batch_tokens=st.sampled_from([1, 30, 60, 120, 10_000]),
    buffer_units=st.sampled_from([1, 2, 3, 100]),
    clipping=st.sampled_from(["norm", "automatic"]),
    clip_factor=st.sampled_from([0.3, 1.0, 3.0]),
)
model_of: Callable[[Case], Any] = functools.cache(adapted)  # a step leaves the weights alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sum_of_a_step_is_that_of_a_loop_over_single_units(case: Case, folder: Path) -> None:
    @settings(max_examples=8, derandomize=True, deadline=None, database=None)
    @given(DRAWS)
    def equal(draw: Draw) -> None:
        scene = make_scene(folder, case, draw, model_of(case))
        truth = slow_sum(scene)
        for engine in ENGINES:
            assert relative_error(step_sum(scene, engine=engine), truth) < 1e-5, engine

    equal()


# --- Planted faults: the comparison above must see each of them -------------------------------------------------------


def later_uses_overwrite(patch: pytest.MonkeyPatch) -> None:
    """A shared weight (ALBERT) keeps its last use alone."""
    write = OnePassEngine.write

    def faulty(self: OnePassEngine, parameter: Any, rows: Tensor) -> None:
        self._slots[id(parameter)].written = False
        write(self, parameter, rows)

    patch.setattr(OnePassEngine, "write", faulty)


def records_instead_of_units(patch: pytest.MonkeyPatch) -> None:
    """Each record gets a row of its own, over all micro-batches of the group."""
    begin, seen = OnePassEngine.begin, itertools.count()
    opens = OnePassEngine.open_group
    patch.setattr(OnePassEngine, "open_group", lambda self, units, device: opens(self, range(10_000, 10_040), device))

    def begin_by_record(self: OnePassEngine, units: list[int], device: torch.device) -> None:
        begin(self, [10_000 + next(seen) % 40 for _ in units], device)

    patch.setattr(OnePassEngine, "begin", begin_by_record)


def the_batch_instead_of_units(patch: pytest.MonkeyPatch) -> None:
    clip = PrivacyPlan.clipped_sum
    patch.setattr(PrivacyPlan, "clipped_sum", lambda self, rows: clip(self, rows.sum(0, keepdim=True)))


def units_split_over_micro_batches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DPLoRATrainer, "_cut", lambda self, examples: LogicalBatch([[[e]] for e in examples]))


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    """A mean over all positions of the padded batch."""

    def faulty(model: Any, batch: Batch, spec: TaskSpec, head: Any) -> Tensor:
        return record_losses(model, batch, spec, head) * batch["attention_mask"].float().mean(dim=1)

    patch.setattr(base, "record_losses", faulty)


def a_mean_instead_of_a_sum(patch: pytest.MonkeyPatch) -> None:
    backward = OnePassEngine.backward
    patch.setattr(OnePassEngine, "backward", lambda self, losses: backward(self, losses / len(losses)))


def the_other_clipping(patch: pytest.MonkeyPatch) -> None:
    clip = dp_lora.PrivacyPlan.clipped_sum

    def faulty(self: PrivacyPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        short = rows.norm(dim=1, keepdim=True) <= self.clip_norm  # what is short is scaled up to C
        return clip(self, torch.where(short, rows * self.clip_norm / rows.norm(dim=1, keepdim=True), rows))

    patch.setattr(PrivacyPlan, "clipped_sum", faulty)


FAULTS = [
    later_uses_overwrite,
    records_instead_of_units,
    the_batch_instead_of_units,
    units_split_over_micro_batches,
    padding_counts,
    a_mean_instead_of_a_sum,
    the_other_clipping,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees_a_planted_fault(
    fault: Callable[[pytest.MonkeyPatch], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, draw = Case("albert", "masked_lm"), Draw(sizes=(2, 1, 4, 3), micro_batch_tokens=150)
    scene = make_scene(folder, case, draw, model_of(case))
    assert len(scene.cuts) > 1 and any(len({e.unit for e in cut}) > 1 for cut in scene.cuts)
    truth = slow_sum(scene)
    assert relative_error(step_sum(scene), truth) < 1e-5
    fault(monkeypatch)
    assert relative_error(step_sum(scene), truth) > 1e-2
