"""Negated task vectors: base - alpha * (checkpoint - base), number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from dpmed.errors import InputError
from dpmed.trainers.task_vector import negated_task_vector


def state(**values: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_a_hand_computed_example() -> None:
    made = negated_task_vector(state(a=[3.0, 1.0], b=[0.0]), state(a=[1.0, 2.0], b=[0.5]), 0.5)
    assert made["a"].tolist() == [0.0, 2.5]  # 1 - 0.5 * (3 - 1), 2 - 0.5 * (1 - 2)
    assert made["b"].tolist() == [0.75]


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_alpha_zero_is_the_base_and_minus_one_the_checkpoint(kind: tiny_models.Kind) -> None:
    checkpoint = tiny_models.make_model(kind, seed=1).state_dict()
    base = tiny_models.make_model(kind, seed=0).state_dict()
    assert same(negated_task_vector(checkpoint, base, 0.0), base)
    assert same(negated_task_vector(checkpoint, base, -1.0), checkpoint)
    assert not same(negated_task_vector(checkpoint, base, 1.0), base)


def test_tied_weights_are_computed_once_and_stay_tied() -> None:
    model: Any = tiny_models.make_model("gpt2", seed=1)
    made = negated_task_vector(model.state_dict(), tiny_models.make_model("gpt2").state_dict(), 1.0)
    assert made["lm_head.weight"] is made["transformer.wte.weight"]
    before = made["lm_head.weight"].clone()
    model.load_state_dict(made)
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_the_inputs_are_left_as_they_are() -> None:
    checkpoint, base = state(a=[3.0]), state(a=[1.0])
    made = negated_task_vector(checkpoint, base, 1.0)
    made["a"].zero_()
    assert (checkpoint["a"].item(), base["a"].item()) == (3.0, 1.0)


def test_short_types_are_computed_in_float32_and_whole_numbers_are_the_checkpoints() -> None:
    checkpoint = {"a": torch.tensor([1.0078125]).bfloat16(), "steps": torch.tensor([7])}
    base = {"a": torch.tensor([1.0]).bfloat16(), "steps": torch.tensor([2])}
    made = negated_task_vector(checkpoint, base, 100.0)
    assert made["a"].dtype == torch.bfloat16 and made["a"].item() == 0.21875  # 1 - 0.78125, exact
    assert made["steps"].tolist() == [7]


@pytest.mark.parametrize(
    ("checkpoint", "base", "said"),
    [
        (state(a=[1.0], b=[1.0]), state(a=[1.0]), "'b' is in one model only"),
        (state(a=[1.0]), state(a=[1.0], c=[1.0]), "'c' is in one model only"),
        (state(a=[1.0]), state(a=[1.0, 2.0]), "'a' has another shape"),
    ],
)
def test_other_models_are_refused(checkpoint: dict[str, Tensor], base: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        negated_task_vector(checkpoint, base)


def test_weights_tied_in_the_checkpoint_only_are_refused() -> None:
    weight = torch.ones(2)
    with pytest.raises(InputError, match="'b' is tied to 'a' in the checkpoint only"):
        negated_task_vector({"a": weight, "b": weight}, state(a=[1.0, 1.0], b=[1.0, 2.0]))


def test_an_alpha_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"unlearn\.alpha"):
        negated_task_vector(state(a=[1.0]), state(a=[1.0]), float("nan"))
