"""Clipping: sums by unit and clipped sums against slow loops, and which trainable weights the engine accepts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dpmed.privacy.clipping import clipped_sum, unit_norms

LARGE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)  # squares overflow float32
ANY = LARGE | st.floats(-64, 64, width=32, allow_subnormal=False) | st.sampled_from([math.inf, -math.inf, math.nan])
NORMS = st.floats(1e-3, 1e3)


def matrices(elements: st.SearchStrategy[float], *, min_units: int = 0) -> st.SearchStrategy[Tensor]:
    shapes = st.tuples(st.integers(min_units, 5), st.integers(1, 6))
    return shapes.flatmap(lambda shape: arrays("float32", shape, elements=elements)).map(torch.from_numpy)


def slow_clipped_sum(rows: Tensor, clip_norm: float) -> tuple[Tensor, int]:
    """Row by row, in float64; a norm that float32 cannot hold counts as not finite."""
    total, nonfinite = torch.zeros(rows.shape[1], dtype=torch.float64), 0
    for row in rows:
        if not math.isfinite(float(row.norm())):
            nonfinite += 1
            continue
        norm = math.sqrt(sum(float(x) ** 2 for x in row))
        total += row.double() * (1.0 if norm <= clip_norm else clip_norm / norm)
    return total, nonfinite


@given(rows=matrices(ANY), clip_norm=NORMS | st.just(math.inf))
def test_clipped_sum_equals_a_loop_over_units_whatever_the_rows_hold(rows: Tensor, clip_norm: float) -> None:
    total, nonfinite = clipped_sum(rows, clip_norm=clip_norm)
    expected, expected_nonfinite = slow_clipped_sum(rows, clip_norm)
    kept = rows[torch.isfinite(rows.norm(dim=1))]
    magnitude = float(kept.abs().max()) if kept.numel() else 0.0
    scale = len(rows) * min(clip_norm, magnitude)
    assert total.dtype == torch.float32
    assert nonfinite == expected_nonfinite
    assert bool(torch.isfinite(total).all())
    assert float((total.double() - expected).abs().max()) <= 1e-5 * scale + 1e-37


@given(rows=matrices(ANY), clip_norm=NORMS, extra=st.integers(0, 2**31), size=st.sampled_from([1e-3, 1.0, 1e6, 1e25]))
def test_one_more_unit_changes_the_sum_by_at_most_the_clip_norm(
    rows: Tensor, clip_norm: float, extra: int, size: float
) -> None:
    row = torch.randn(1, rows.shape[1], generator=torch.Generator().manual_seed(extra)) * size
    without, _ = clipped_sum(rows, clip_norm=clip_norm)
    added, _ = clipped_sum(torch.cat([rows, row]), clip_norm=clip_norm)
    rounding = len(rows) * clip_norm * 1e-6  # of a sum of len(rows) terms, none larger than the clip norm
    assert float((added.double() - without.double()).norm()) <= clip_norm * (1 + 1e-5) + rounding


@given(rows=matrices(ANY, min_units=1), clip_norm=NORMS)
def test_each_unit_alone_has_at_most_the_clip_norm(rows: Tensor, clip_norm: float) -> None:
    for row in rows:
        assert float(clipped_sum(row.unsqueeze(0), clip_norm=clip_norm)[0].double().norm()) <= clip_norm * (1 + 1e-5)


def test_no_unit_gives_zeros() -> None:
    total, nonfinite = clipped_sum(torch.zeros(0, 7), clip_norm=1.0)
    assert torch.equal(total, torch.zeros(7))
    assert nonfinite == 0


def test_a_unit_with_a_zero_gradient_stays_zero() -> None:
    assert torch.equal(clipped_sum(torch.zeros(3, 4), clip_norm=0.1)[0], torch.zeros(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_unit_that_is_not_finite_counts_as_absent_and_is_reported(bad: float) -> None:
    rows = torch.tensor([[0.3, 0.4], [bad, bad], [3.0, 4.0]])
    total, nonfinite = clipped_sum(rows, clip_norm=1.0)
    assert nonfinite == 1
    assert torch.allclose(total, torch.tensor([0.9, 1.2]))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_clip_norm_that_is_not_above_zero_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        clipped_sum(torch.ones(2, 2), clip_norm=clip_norm)


def test_an_infinite_clip_norm_is_a_plain_sum() -> None:
    rows = torch.randn(5, 3) * 1e6
    assert torch.allclose(clipped_sum(rows, clip_norm=math.inf)[0], rows.sum(dim=0))


@pytest.mark.parametrize("p", [1, 4095, 4096, 4097, 3_000_001])
def test_norms_of_long_rows_are_right_to_a_millionth(p: int) -> None:
    """A float32 norm in one go is too small for millions of weights, and the row would keep more than C."""
    rows = torch.randn(2, p, generator=torch.Generator().manual_seed(0))
    truth = rows.double().norm(dim=1)
    assert float(((unit_norms(rows).double() - truth) / truth).abs().max()) < 1e-6


@given(rows=matrices(ANY), clip_norm=NORMS)
def test_automatic_clipping_scales_every_row_to_nearly_the_clip_norm_and_never_above(
    rows: Tensor, clip_norm: float
) -> None:
    total, nonfinite = clipped_sum(rows, clip_norm=clip_norm, clipping="automatic")
    expected = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows[torch.isfinite(rows.norm(dim=1))].double():
        expected += row * clip_norm / (row.norm() + 0.01)
    assert float((total.double() - expected).norm()) <= 1e-5 * clip_norm * max(1, len(rows))
    assert int(nonfinite) == int((~torch.isfinite(rows.norm(dim=1))).sum())
    for row in rows:
        alone, _ = clipped_sum(row.unsqueeze(0), clip_norm=clip_norm, clipping="automatic")
        assert float(alone.double().norm()) <= clip_norm * (1 + 1e-5)


def test_the_sensitivity_check_sees_a_mean_and_a_row_that_was_not_clipped() -> None:
    """The property above is no tautology: the classic wrong versions break it."""
    rows = torch.full((4, 3), 10.0)
    unclipped = rows.sum(dim=0) - rows[1:].sum(dim=0)
    assert float(unclipped.norm()) > 1.0
    split = clipped_sum(torch.cat([rows[:1], rows[:1]]), clip_norm=1.0)[0]  # one unit in two micro-batches
    assert float(split.norm()) == pytest.approx(2.0)
