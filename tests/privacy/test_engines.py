"""Both engines: which trainable weights they accept, rows per unit against plain autograd, and a clean detachment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.flat import FlatParameters, uncovered_parameters
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.opacus_engine import OpacusEngine

CPU = torch.device("cpu")
ENGINES = [OnePassEngine, OpacusEngine]
Engine = type[OnePassEngine] | type[OpacusEngine]
both = pytest.mark.parametrize("engine_type", ENGINES)


def rows_of(engine: OnePassEngine | OpacusEngine, losses: Tensor, units: list[int]) -> list[list[Tensor]]:
    """Per unit, the gradient of each parameter in its own shape."""
    engine.backward(losses)
    found = []
    for row in engine.unit_gradients().clone():
        engine.write_gradients(row)
        found.append([p.grad.clone() for p in engine.parameters if p.grad is not None])
        for p in engine.parameters:
            p.grad = None
    assert len(found) == len(set(units))
    return found


def alone(model: nn.Module, losses: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(losses.sum(), [p for p in model.parameters() if p.requires_grad]))


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


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


@both
def test_uncovered_parameters_are_refused_by_name(engine_type: Engine) -> None:
    with pytest.raises(PrivacyError, match="scale"):
        engine_type(WithBareParameter())


@both
def test_a_model_without_trainable_parameters_is_refused(engine_type: Engine) -> None:
    with pytest.raises(PrivacyError, match="no parameter is trainable"):
        engine_type(nn.Linear(2, 2).requires_grad_(False))


@both
def test_a_layer_that_the_backward_pass_did_not_reach_is_refused_by_name(engine_type: Engine) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    engine = engine_type(model)
    engine.begin([0, 1], CPU)
    engine.backward(model["used"](torch.ones(2, 3)).sum(dim=1))
    with pytest.raises(PrivacyError, match=r"unused\.weight"):
        engine.unit_gradients()


@both
def test_a_layer_that_does_not_see_one_row_per_record_is_refused(engine_type: Engine) -> None:
    """As GPT-2's position embedding: its input has one row, whatever the batch."""
    model = nn.Linear(3, 2)
    engine = engine_type(model)
    engine.begin(range(4), CPU)
    with pytest.raises(PrivacyError, match="weight"):
        engine.backward(model(torch.ones(1, 3)).expand(4, 2).sum(dim=1))
        engine.unit_gradients()


class Several(nn.Module):
    """A layer used twice, a tall and a wide one, a bias alone, a norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.shared = nn.Linear(6, 6)
        self.tall = nn.Linear(6, 11)
        self.wide = nn.Linear(11, 3)
        self.bias_alone = nn.Linear(3, 3)
        self.bias_alone.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.shared(self.norm(self.embed(ids))))
        x = torch.tanh(self.shared(x))
        return self.bias_alone(self.wide(torch.tanh(self.tall(x)))).square().mean(dim=(1, 2))


@both
@pytest.mark.parametrize("units", [[4, 2, 4, 9, 2], [3, 1, 2, 0, 5], [7] * 5], ids=str)
def test_rows_per_unit_equal_plain_autograd_and_no_raw_gradient_is_left(engine_type: Engine, units: list[int]) -> None:
    torch.manual_seed(0)
    model, ids = Several(), torch.randint(7, (5, 4))
    truth = {u: alone(model, model(ids[[i for i, v in enumerate(units) if v == u]])) for u in dict.fromkeys(units)}
    engine = engine_type(model)
    for _ in range(2):  # the second micro-batch must not see the first
        engine.begin(units, CPU)
        rows = rows_of(engine, model(ids), units)
        assert all(p.grad is None for p in model.parameters())
        assert all(close(row, truth[u]) for row, u in zip(rows, truth, strict=True))
    engine.detach()
    assert close(alone(model, model(ids)), [sum(parts, torch.zeros(())) for parts in zip(*truth.values(), strict=True)])


@both
@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3, 4]], [[0, 3], [1, 4], [2]], [[4], [3], [2], [1], [0]]], ids=str)
def test_micro_batches_of_a_group_are_added_up_in_their_units_rows(engine_type: Engine, cuts: list[list[int]]) -> None:
    torch.manual_seed(0)
    model, ids, units = Several(), torch.randint(7, (5, 4)), [4, 2, 4, 9, 2]
    truth = {u: alone(model, model(ids[[i for i, v in enumerate(units) if v == u]])) for u in (2, 4, 9)}
    engine = engine_type(model)
    for _ in range(2):  # the second group must not see the first
        engine.open_group(truth, CPU)
        for cut in cuts[:-1]:
            engine.begin([units[i] for i in cut], CPU)
            engine.backward(model(ids[cut]))
        engine.begin([units[i] for i in cuts[-1]], CPU)
        rows = rows_of(engine, model(ids[cuts[-1]]), units)
        assert all(close(row, truth[u]) for row, u in zip(rows, truth, strict=True))


@both
def test_a_micro_batch_that_misses_a_weight_is_refused_even_if_another_reached_it(engine_type: Engine) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    engine = engine_type(model)
    engine.open_group([0, 1], CPU)
    engine.begin([0], CPU)
    engine.backward((model["a"](torch.ones(1, 3)) + model["b"](torch.ones(1, 3))).sum(dim=1))
    engine.begin([1], CPU)
    engine.backward(model["a"](torch.ones(1, 3)).sum(dim=1))
    with pytest.raises(PrivacyError, match=r"b\.weight"):
        engine.unit_gradients()


@both
def test_a_later_and_larger_micro_batch_fits(engine_type: Engine) -> None:
    torch.manual_seed(0)
    model = Several()
    engine = engine_type(model)
    for n in (2, 5, 1):
        ids = torch.randint(7, (n, 4))
        engine.begin(range(n), CPU)
        assert len(rows_of(engine, model(ids), list(range(n)))) == n


@both
def test_bfloat16_rows_become_float32(engine_type: Engine) -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    engine = engine_type(model)
    engine.begin([0, 1], CPU)
    engine.backward(model(torch.ones(2, 3, dtype=torch.bfloat16)).sum(dim=1))
    assert engine.unit_gradients().dtype == torch.float32


def test_under_autocast_the_rows_are_those_of_autocast_in_float32() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 8), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        truth = [alone(model, model(x[i : i + 1]).float().square().mean(dim=(1, 2))) for i in range(3)]
    engine = OnePassEngine(model)
    engine.begin(range(3), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.bfloat16
        losses = output.float().square().mean(dim=(1, 2))
    rows = rows_of(engine, losses, [0, 1, 2])
    for row, expected in zip(rows, truth, strict=True):
        for got, wanted in zip(row, expected, strict=True):
            assert got.dtype == torch.float32
            assert float((got - wanted).norm() / wanted.norm()) < 2e-2


def test_a_weight_used_behind_its_layer_is_refused() -> None:
    """As tied by a functional call: that share of the gradient would be neither clipped nor covered by noise."""
    model = nn.Linear(3, 3)
    engine = OnePassEngine(model)
    engine.begin(range(2), CPU)
    x = torch.randn(2, 3)
    with pytest.raises(PrivacyError, match="outside its own layer"):
        engine.backward(nn.functional.linear(model(x), model.weight).sum(dim=1))
        engine.unit_gradients()


def test_a_backward_pass_that_was_not_announced_is_refused() -> None:
    model = nn.Linear(3, 2)
    OnePassEngine(model)
    with pytest.raises(PrivacyError, match="weight"):
        model(torch.ones(2, 3)).sum().backward()


def test_without_gradients_the_layers_are_plain() -> None:
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    before = model(x).detach()
    engine = OnePassEngine(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    engine.detach()
    assert "forward" not in model.__dict__


@both
def test_write_gradients_replaces_whatever_stood_there(engine_type: Engine) -> None:
    model = nn.Linear(2, 2)
    engine = engine_type(model)
    model.weight.grad = torch.full((2, 2), 99.0)
    engine.write_gradients(torch.arange(6.0))
    assert model.weight.grad.tolist() == [[0, 1], [2, 3]]
    assert model.bias.grad is not None and model.bias.grad.tolist() == [4, 5]


def test_unmoved_since_names_exactly_the_weights_that_kept_their_value() -> None:
    model = nn.Linear(2, 2)
    flat = FlatParameters(model)
    before = flat.snapshot()
    assert flat.unmoved_since(before) == ["weight", "bias"]
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert flat.unmoved_since(before) == ["bias"]
    flat.restore(before)
    assert flat.unmoved_since(before) == ["weight", "bias"]


@both
def test_a_change_of_the_trainable_set_is_refused(engine_type: Engine) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    engine = engine_type(model)
    engine.check_unchanged(model)
    model[1].requires_grad_(True)
    with pytest.raises(PrivacyError, match="changed after"):
        engine.check_unchanged(model)


def test_gradient_checkpointing_is_refused_where_opacus_hooks_would_count_twice() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model.gradient_checkpointing = True  # as transformers marks it
    with pytest.raises(PrivacyError, match="gradient checkpointing"):
        OpacusEngine(model)
    with pytest.raises(PrivacyError, match=r"1\.weight"):
        OnePassEngine(model)
    model[1].requires_grad_(False)
    OnePassEngine(model).detach()


@both
def test_detach_leaves_a_plain_model_to_which_an_engine_can_be_attached_again(engine_type: Engine) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    for _ in range(2):
        engine_type(model).detach()
        assert all(not m._forward_hooks and not m._backward_hooks and "forward" not in m.__dict__ for m in model)
