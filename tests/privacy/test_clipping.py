"""Clipping: sums by unit and clipped sums against slow loops, and which trainable weights the engine accepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.clipping import OpacusEngine, clipped_sum, sum_by_unit, uncovered_parameters

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


pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the trainer does so, and says why


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


@given(
    units=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    width=st.integers(1, 5),
)
def test_sum_by_unit_equals_a_loop_over_records(units: list[int], seed: int, width: int) -> None:
    rows = torch.randn(len(units), width, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack(
        [sum((rows[i] for i, u in enumerate(units) if u == unit), torch.zeros(width)) for unit in sorted(set(units))]
    )
    assert torch.allclose(sum_by_unit(rows, torch.tensor(units)), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_record_stays_in_its_own_unit(bad: float) -> None:
    rows = torch.ones(4, 2)
    rows[1] = bad
    total = sum_by_unit(rows, torch.tensor([7, 3, 7, 5]))
    assert torch.equal(total[1:], torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert not bool(torch.isfinite(total[0]).any())


def test_the_sensitivity_check_sees_a_mean_and_a_row_that_was_not_clipped() -> None:
    """The property above is no tautology: the classic wrong versions break it."""
    rows = torch.full((4, 3), 10.0)
    unclipped = rows.sum(dim=0) - rows[1:].sum(dim=0)
    assert float(unclipped.norm()) > 1.0
    split = clipped_sum(torch.cat([rows[:1], rows[:1]]), clip_norm=1.0)[0]  # one unit in two micro-batches
    assert float(split.norm()) == pytest.approx(2.0)


class WithBareParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


class UnknownNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class LinearOfAnotherKind(nn.Linear):
    """A subclass may compute anything; the grad sampler of its base would be wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("model", "uncovered"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(4, 3)), []),
        (WithBareParameter(), ["scale"]),
        (nn.Sequential(nn.Linear(3, 3), UnknownNorm()), ["1.weight"]),
        (nn.Sequential(LinearOfAnotherKind(3, 3)), ["0.weight", "0.bias"]),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), ["1.weight", "1.bias"]),
        (nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), ["0.weight", "0.bias"]),
    ],
)
def test_uncovered_parameters_are_named(model: nn.Module, uncovered: list[str]) -> None:
    assert uncovered_parameters(model) == uncovered


def test_frozen_parameters_of_unknown_layers_do_not_matter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), UnknownNorm())
    model[1].requires_grad_(False)
    assert uncovered_parameters(model) == []


def test_a_parameter_shared_with_an_unknown_layer_is_uncovered() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), UnknownNorm())
    model[1].weight = model[0].weight
    assert uncovered_parameters(model) == ["0.weight"]


def test_the_engine_refuses_uncovered_parameters_by_name() -> None:
    with pytest.raises(PrivacyError, match="scale"):
        OpacusEngine(WithBareParameter())


def test_the_engine_refuses_a_model_without_trainable_parameters() -> None:
    with pytest.raises(PrivacyError, match="no parameter is trainable"):
        OpacusEngine(nn.Linear(2, 2).requires_grad_(False))


def test_a_layer_that_the_backward_pass_did_not_reach_is_refused_by_name() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    engine = OpacusEngine(model)
    model["used"](torch.ones(2, 3)).sum().backward()
    with pytest.raises(PrivacyError, match=r"unused\.weight"):
        engine.unit_gradients(torch.tensor([0, 1]))


def test_a_layer_that_does_not_see_one_row_per_record_is_refused() -> None:
    """As GPT-2's position embedding: its input has one row, whatever the batch."""
    model = nn.Linear(3, 2)
    engine = OpacusEngine(model)
    model(torch.ones(1, 3)).expand(4, 2).sum().backward()
    with pytest.raises(PrivacyError, match="left no gradient per record"):
        engine.unit_gradients(torch.arange(4))


def test_the_engine_gives_rows_per_unit_and_leaves_no_raw_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, units = torch.randn(5, 3), torch.tensor([4, 2, 4, 9, 2])
    engine = OpacusEngine(model)
    model(x).sum().backward()
    rows = engine.unit_gradients(units)
    assert all(p.grad is None for p in model.parameters())
    engine.detach()
    for row, unit in zip(rows, [2, 4, 9], strict=True):
        model.zero_grad()
        model(x[units == unit]).sum().backward()
        alone = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        assert torch.allclose(row, alone, atol=1e-6)


def test_write_gradients_puts_the_flat_vector_back_in_place_and_in_order() -> None:
    model = nn.Linear(2, 2)
    engine = OpacusEngine(model)
    model.weight.grad = torch.full((2, 2), 99.0)
    engine.write_gradients(torch.arange(6.0))
    assert model.weight.grad.tolist() == [[0, 1], [2, 3]]
    assert model.bias.grad is not None and model.bias.grad.tolist() == [4, 5]


def test_bfloat16_rows_become_float32() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    engine = OpacusEngine(model)
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert engine.unit_gradients(torch.tensor([0, 1])).dtype == torch.float32


def test_unmoved_since_names_exactly_the_weights_that_kept_their_value() -> None:
    model = nn.Linear(2, 2)
    engine = OpacusEngine(model)
    before = engine.snapshot()
    assert engine.unmoved_since(before) == ["weight", "bias"]
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert engine.unmoved_since(before) == ["bias"]


def test_a_change_of_the_trainable_set_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    engine = OpacusEngine(model)
    engine.check_unchanged(model)
    model[1].requires_grad_(True)
    with pytest.raises(PrivacyError, match="changed after"):
        engine.check_unchanged(model)


def test_gradient_checkpointing_is_refused() -> None:
    model: Any = nn.Linear(2, 2)
    model.gradient_checkpointing = True  # as transformers marks it
    with pytest.raises(PrivacyError, match="gradient_checkpointing_disable"):
        OpacusEngine(model)


def test_detach_leaves_a_plain_model_to_which_an_engine_can_be_attached_again() -> None:
    model = nn.Linear(2, 2)
    OpacusEngine(model).detach()
    assert not model._forward_hooks and not model._backward_hooks
    OpacusEngine(model).detach()
