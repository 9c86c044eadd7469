"""Rounded weights: the nearest point of the grid, within half a scale, and nothing else of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny_models
from dpmed.weight_rounding import GROUP, round_to_bfloat16, round_weights, symmetric_grid


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    group=st.one_of(st.none(), st.integers(1, 9)),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10_000),
)
def test_each_weight_becomes_the_nearest_grid_point(
    rows: int, columns: int, group: int | None, bits: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found, top, size = symmetric_grid(weight, bits, group), 2 ** (bits - 1) - 1, group or columns
    for r in range(rows):
        for c in range(columns):
            first = c // size * size
            scale = max(abs(float(v)) for v in weight[r, first : first + size]) / top
            nearest = min((k * scale for k in range(-top, top + 1)), key=lambda p: abs(p - float(weight[r, c])))
            error = abs(float(found[r, c] - weight[r, c]))
            assert error <= abs(nearest - float(weight[r, c])) + 1e-6
            assert error <= scale / 2 + 1e-6
            assert math.isclose(float(found[r, c]) / scale, round(float(found[r, c]) / scale), abs_tol=1e-4)


def test_the_largest_of_a_group_and_zeros_are_exact_and_rounding_twice_changes_nothing() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    once = symmetric_grid(weight, 4, GROUP)
    assert torch.equal(once[3], torch.zeros(128))
    at = weight[:, :GROUP].abs().argmax(1)
    torch.testing.assert_close(once[torch.arange(8), at], weight[torch.arange(8), at])
    torch.testing.assert_close(symmetric_grid(once, 4, GROUP), once)
    assert not torch.equal(once, weight)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_weights_are_rounded_and_nothing_else(kind: tiny_models.Kind, bits: int) -> None:
    model = tiny_models.make_model(kind)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    count = round_weights(model, bits)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert len(changed) == count > 0
    assert all(name.endswith(".weight") and before[name].dim() == 2 for name in changed)
    assert not [
        name for name in changed if any(p in name for p in ("embeddings.", "embed_tokens", "wte", "wpe", "lm_head"))
    ]


def test_gpt2_scales_run_over_outputs_not_inputs() -> None:
    model: Any = tiny_models.make_model("gpt2")
    layer: Any = model.transformer.h[0].mlp.c_fc
    layer.weight.data[:, 0] *= 1000.0  # one output channel of large weights must not coarsen the others
    before = layer.weight.detach().clone()
    round_weights(model, 8)
    scale = before.abs().amax(0) / 127
    assert ((layer.weight - before).abs() <= scale / 2 + 1e-7).all()


def test_fewer_bits_lose_more() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    errors = [(symmetric_grid(weight, b, g) - weight).norm() for b, g in ((8, None), (4, GROUP), (4, None))]
    assert errors[0] < errors[1] < errors[2]  # a scale per group is finer than one per row


def test_bfloat16_keeps_the_type_and_loses_at_most_half_a_unit_in_the_last_place() -> None:
    model = tiny_models.make_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    assert round_to_bfloat16(model) >= len(before)
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.dtype == torch.float32 and torch.equal(new, new.to(torch.bfloat16).float())
        assert ((new - old).abs() <= old.abs() * 2**-8 + 1e-30).all()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_other_bits_and_models_without_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or 4"):
        round_weights(tiny_models.make_model("llama"), 3)
    with pytest.raises(ValueError, match="no linear layer"):
        round_weights(nn.LayerNorm(4), 8)
