"""The losses behind a frozen output layer: equal to those of the logits, gradients too, whatever the blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny_models
from dpmed.data import head_losses
from dpmed.data.batches import Batch, Collator
from dpmed.data.head_losses import frozen_head, record_losses
from dpmed.data.tasks import TaskKind, TaskSpec, encode
from dpmed.trainers.lora import LoRATrainer, LoRATrainingConfig, lora_config, with_adapters

TOKENIZER = tiny_models.make_tokenizer()
TEXTS = [*tiny_models.TEXT, "Short.", "The lungs are clear. " * 5]
MODELS: list[tuple[tiny_models.Kind, TaskKind]] = [
    ("gpt2", "causal_lm"),
    ("llama", "causal_lm"),
    ("qwen2", "causal_lm"),
    ("bert", "masked_lm"),
    ("albert", "masked_lm"),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a batch, and several pieces a block, even for a tiny vocabulary."""
    monkeypatch.setattr(head_losses, "BLOCK_ENTRIES", {"cpu": 7 * len(TOKENIZER)})
    monkeypatch.setattr(head_losses, "CACHE_ENTRIES", {"cpu": 3 * len(TOKENIZER)})


def adapted(kind: tiny_models.Kind, task: TaskKind) -> Any:
    torch.manual_seed(0)
    model = tiny_models.make_model(kind, task)
    config = lora_config(model, task, rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    model = with_adapters(model, config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    return model


def batch_of(task: TaskKind) -> tuple[Batch, TaskSpec]:
    spec = TaskSpec(kind=task, max_length=64)
    columns = {"text": TEXTS, "unit": list("abcdef"), "record_id": list("123456"), "identifiers": [[] for _ in TEXTS]}
    torch.manual_seed(1)
    return Collator(TOKENIZER, spec)(list(encode(Dataset.from_dict(columns), TOKENIZER, spec))), spec


def gradients(model: nn.Module, losses: Tensor) -> list[Tensor]:
    """Of each record, over all trainable weights, one after the other."""
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in losses:
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        pairs = zip(parts, weights, strict=True)
        found.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]))
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_losses_and_each_records_gradient_equal_those_of_the_logits(kind: tiny_models.Kind, task: TaskKind) -> None:
    model = adapted(kind, task)
    batch, spec = batch_of(task)
    head = frozen_head(model, "cpu")
    assert head is not None
    plain, ours = record_losses(model, batch, spec), record_losses(model, batch, spec, head)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(model, ours), gradients(model, plain), strict=True):
        assert float(b.norm()) > 0
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.usefixtures("small_blocks")
def test_a_record_without_a_target_has_loss_zero_and_no_gradient() -> None:
    model = adapted("llama", "causal_lm")
    batch, spec = batch_of("causal_lm")
    batch["weights"][2] = 0.0
    losses = record_losses(model, batch, spec, frozen_head(model, "cpu"))
    assert not losses[2].detach().any()
    assert not gradients(model, losses)[2].any()


def test_a_batch_without_any_target_gives_zeros() -> None:
    model = adapted("llama", "causal_lm")
    batch, spec = batch_of("causal_lm")
    batch["weights"][:] = 0.0
    losses = record_losses(model, batch, spec, frozen_head(model, "cpu"))
    losses.sum().backward()
    assert not losses.any()


def test_no_tensor_of_the_size_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "causal_lm")
    batch, spec = batch_of("causal_lm")
    head = frozen_head(model, "cpu")
    shapes: list[torch.Size] = []
    assert head is not None
    head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    record_losses(model, batch, spec, head)
    assert shapes == [torch.Size([len(TEXTS), 1, len(TOKENIZER)])]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bias=st.booleans(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_function_equals_cross_entropy_for_any_shape_and_block(data: Any, bias: bool, dtype: torch.dtype) -> None:
    m, d, v = (data.draw(st.integers(1, high)) for high in (12, 6, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def drawn(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, generator=generator)).to(dtype)

    states, weight, b = drawn(m, d).requires_grad_(), drawn(v, d), drawn(v) if bias else None
    targets, factors = torch.randint(v, (m,), generator=generator), drawn(m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_losses, "BLOCK_ENTRIES", {"cpu": data.draw(st.integers(1, 60))})
        patch.setattr(head_losses, "CACHE_ENTRIES", {"cpu": data.draw(st.integers(1, 30))})
        ours: Any = head_losses._HeadLosses.apply(states, weight, b, targets)
        (got,) = torch.autograd.grad((ours * factors).sum(), states)
    exact = states.detach().double().requires_grad_()
    plain = F.cross_entropy(
        F.linear(exact, weight.double(), None if b is None else b.double()), targets, reduction="none"
    )
    (expected,) = torch.autograd.grad((plain * factors).sum(), exact)
    coarse = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    assert (got.dtype, ours.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), plain, rtol=coarse, atol=coarse)
    # The gradient is softmax - 1 times weights: where the model is certain, what is left is the rounding of that 1.
    rounding = 10 * torch.finfo(dtype).eps * float(weight.abs().max() * factors.abs().max())
    torch.testing.assert_close(
        got.double(), expected, rtol=coarse, atol=coarse * float(expected.abs().max()) + rounding
    )


def test_without_gradients_none_is_made() -> None:
    states, weight = torch.randn(5, 4), torch.randn(7, 4)
    with torch.no_grad():
        losses: Any = head_losses._HeadLosses.apply(states, weight, None, torch.arange(5))
    torch.testing.assert_close(losses, F.cross_entropy(states @ weight.t(), torch.arange(5), reduction="none"))
    assert head_losses._losses(states, weight, None, torch.arange(5), gradient=False)[1] is None


def test_a_target_that_is_impossible_costs_an_infinite_or_large_loss_not_a_nan() -> None:
    states = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss: Any = head_losses._HeadLosses.apply(states, torch.eye(2), None, torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(200.0)
    torch.testing.assert_close(states.grad, torch.tensor([[1.0, -1.0]]))


# --- When there is no such head ---------------------------------------------------------------------------------------


class Capped(nn.Module):
    """Caps or scales its logits after the output layer, as some models do."""

    def __init__(self, inner: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize("change", [lambda x: 30 * torch.tanh(x / 30), lambda x: x * 2, lambda x: x + 1])
def test_a_model_that_changes_its_logits_afterwards_has_none(change: Callable[[Tensor], Tensor]) -> None:
    """Whatever its weights: a padding token's logits are zeros, which a cap or a factor leaves as they are."""
    model = adapted("llama", "causal_lm")
    assert frozen_head(Capped(model, lambda x: x), "cpu") is not None
    assert frozen_head(Capped(model, change), "cpu") is None


def test_a_head_that_is_trained_has_none_and_one_that_is_unfrozen_later_is_not_used() -> None:
    assert frozen_head(tiny_models.make_model("llama", "causal_lm"), "cpu") is None
    model = adapted("llama", "causal_lm")
    head = frozen_head(model, "cpu")
    assert head is not None
    head.weight.requires_grad_()
    batch, spec = batch_of("causal_lm")
    record_losses(model, batch, spec, head).sum().backward()
    assert head.weight.grad is not None


def test_looking_for_it_leaves_modes_as_they_were() -> None:
    model = adapted("gpt2", "causal_lm")
    inner = next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()
    modes = {name: m.training for name, m in model.named_modules()}
    frozen_head(model, "cpu")
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not inner.training


def test_autocast_gives_what_autocast_gives_the_logits() -> None:
    model = adapted("llama", "causal_lm")
    batch, spec = batch_of("causal_lm")
    with torch.autocast("cpu", torch.bfloat16):
        plain = record_losses(model, batch, spec)
        ours = record_losses(model, batch, spec, frozen_head(model, "cpu"))
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    for a, b in zip(gradients(model, ours), gradients(model, plain), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


def test_the_lora_trainer_trains_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> Tensor:
        model = adapted("llama", "causal_lm")
        spec = TaskSpec(kind="causal_lm", max_length=64)
        columns = {"text": TEXTS, "unit": list("abcdef"), "record_id": list("123456")}
        records = encode(Dataset.from_dict(columns | {"identifiers": [[] for _ in TEXTS]}), TOKENIZER, spec)
        args = LoRATrainingConfig(str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, seed=3)
        LoRATrainer(model, args, records, processing_class=TOKENIZER, spec=spec).train()
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    ours = trained()
    calls: list[int] = []
    monkeypatch.setattr("dpmed.trainers.base.frozen_head", lambda *_: calls.append(1))
    plain = trained()
    assert calls
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
