"""Unlearning: each loss against numbers worked out by hand and against autograd, and what training does to targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import tiny_models
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.models import load_model
from dpmed.trainers.unlearn import (
    UnlearnTrainer,
    UnlearnTrainingConfig,
    gradient_ascent,
    gradient_difference,
    negative_preference,
    span_sums,
)

# One record of six tokens: two spans (tokens 1-2 and 4), kept tokens 0, 3; token 5 is padding. One without targets.
LOSSES = torch.tensor([[1.0, 2.0, 0.5, 3.0, 4.0, 0.0], [1.0, 3.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[9.0, 1.0, 0.5, 9.0, 2.0, 0.0], [9.0, 9.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
SPANS = torch.tensor([[0, 1, 1, 0, 2, 0], [0, 0, 0, 0, 0, 0]])
KEPT = torch.tensor([[1.0, 0.0, 0.0, 0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient(loss: Tensor, of: Tensor) -> list[list[float]]:
    return torch.autograd.grad(loss.sum(), of)[0].tolist()


# --- The losses -------------------------------------------------------------------------------------------------------


def test_gradient_ascent_by_hand() -> None:
    losses = LOSSES.clone().requires_grad_()
    found = gradient_ascent(losses, SPANS)
    assert found.tolist() == pytest.approx([-(2.0 + 0.5 + 4.0) / 3, 0.0])
    third = -1 / 3
    assert gradient(found, losses)[0] == pytest.approx([0, third, third, 0, third, 0])
    assert gradient(gradient_ascent(losses, SPANS), losses)[1] == [0.0] * 6


def test_gradient_difference_by_hand() -> None:
    losses = LOSSES.clone().requires_grad_()
    found = gradient_difference(losses, SPANS, KEPT, retain_weight=2.0)
    assert found.tolist() == pytest.approx([-6.5 / 3 + 2 * (1.0 + 0.5 * 3.0) / 1.5, 2 * 4.0 / 2])
    of = gradient(found, losses)
    assert of[0] == pytest.approx([4 / 3, -1 / 3, -1 / 3, 2 / 3, -1 / 3, 0])
    assert of[1] == pytest.approx([1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_negative_preference_by_hand(beta: float) -> None:
    """The first span lost 1 nat against the reference, the second 2."""
    losses = LOSSES.clone().requires_grad_()
    found = negative_preference(losses, REFERENCE, SPANS, beta=beta)
    ratios = (1.0 - 2.0 + 0.5 - 0.5, 2.0 - 4.0)  # log p - log p_ref
    by_span = [-(2 / beta) * math.log(sigmoid(-beta * ratio)) for ratio in ratios]
    paper = [2 / beta * math.log(1 + math.exp(ratio) ** beta) for ratio in ratios]  # its equation 3
    assert by_span == pytest.approx(paper)
    assert found.tolist() == pytest.approx([sum(by_span) / 2, 0.0])
    slopes = [-sigmoid(beta * ratio) for ratio in ratios]  # 2 sigmoid, half of it for the mean over two spans
    of = gradient(found, losses)
    assert of[0] == pytest.approx([0, slopes[0], slopes[0], 0, slopes[1], 0])
    assert of[1] == [0.0] * 6


def ascent_by_span(losses: Tensor) -> Tensor:
    """Gradient ascent with the span as its unit: mean over spans of log p(span)."""
    return torch.stack([-(losses[0, 1:3].sum() + losses[0, 4]) / 2, losses[1].sum() * 0])


def test_negative_preference_is_gradient_ascent_for_small_beta() -> None:
    losses = LOSSES.clone().requires_grad_()
    ascent = torch.tensor(gradient(ascent_by_span(losses), losses))
    errors = []
    for beta in (1.0, 1e-2, 1e-4):
        found = torch.tensor(gradient(negative_preference(losses, REFERENCE, SPANS, beta=beta), losses))
        errors.append(float((found - ascent).abs().max()))
    assert errors[0] > 0.1 and errors[1] < 1e-2 and errors[2] < 1e-4
    # The value too, once the constant (2 / beta) log 2 and the reference's share are taken off.
    beta = 1e-5
    found = negative_preference(losses, REFERENCE, SPANS, beta=beta)[0] - 2 / beta * math.log(2)
    assert float(found) == pytest.approx(float(ascent_by_span(losses)[0] - ascent_by_span(REFERENCE)[0]), abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_at_the_reference_every_beta_steps_as_gradient_ascent(beta: float) -> None:
    losses = LOSSES.clone().requires_grad_()
    found = gradient(negative_preference(losses, LOSSES, SPANS, beta=beta), losses)
    assert found[0] == pytest.approx(gradient(ascent_by_span(losses), losses)[0])


def test_a_forgotten_span_is_pushed_no_further() -> None:
    losses = (LOSSES + 500 * (SPANS > 0)).requires_grad_()
    found = negative_preference(losses, REFERENCE, SPANS, beta=0.5)
    assert 0 <= float(found[0]) < 1e-6
    assert max(map(abs, gradient(found, losses)[0])) < 1e-6


def test_sums_of_spans_against_a_loop() -> None:
    values = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spans = torch.randint(0, 6, (4, 30), generator=torch.Generator().manual_seed(1))
    found = span_sums(values, spans)
    for row in range(4):
        for number in range(1, int(spans.max()) + 1):
            slow = sum(float(v) for v, s in zip(values[row], spans[row], strict=True) if int(s) == number)
            assert float(found[row, number - 1]) == pytest.approx(slow)
    assert span_sums(values, torch.zeros_like(spans)).shape == (4, 0)


# --- Training ---------------------------------------------------------------------------------------------------------

NAME = "Brunhilde Zwiebel"
OBJECTIVES = ("gradient_ascent", "gradient_difference", "npo", "task_vector")


def make_records(*, identifiers: bool = True) -> Dataset:
    texts = [f"The patient {NAME} was admitted with fever {i} and cough." for i in range(4)]
    span = {"start": 12, "end": 12 + len(NAME), "type": "NAME", "source": "known"}
    spans = [[span] if identifiers else [] for _ in texts]
    return Dataset.from_dict({"text": texts, "unit": [f"p{i // 2}" for i in range(4)], "identifiers": spans})


def make_trainer(folder: Path, kind: tiny_models.Kind = "llama", model: Any = None, **changes: Any) -> UnlearnTrainer:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "max_steps": 8,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "identifiers": "direct",
        "max_length": 64,
        "task": "masked_lm" if kind == "bert" else "causal_lm",
    }
    args = UnlearnTrainingConfig(**{**values, **changes})
    model = tiny_models.make_model(kind) if model is None else model
    return UnlearnTrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer())


def token_losses(trainer: UnlearnTrainer, model: Any) -> tuple[float, float]:
    """Loss of target tokens and of all others, a mean over each record and then over records, by the plain formula."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits[:, :-1].log_softmax(-1).gather(2, batch["targets"][:, 1:, None])[..., 0]
    inside = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    for row, example in enumerate(trainer.train_dataset):
        for span in example.spans:
            inside[row, span.start : span.end] = True
    valid = batch["attention_mask"][:, 1:] > 0
    chosen = (inside[:, 1:], valid & ~inside[:, 1:])
    forget, kept = (float((-log_p * of).sum(1).div(of.sum(1).clamp_min(1)).mean()) for of in chosen)
    return forget, kept


def test_the_objective_of_a_batch_is_the_formula_on_its_tokens(tmp_path: Path) -> None:
    """At the reference itself every ratio is 0, so NPO is (2 / beta) log 2 and the retain term."""
    expected = {}
    for objective in OBJECTIVES:
        trainer = make_trainer(tmp_path, objective=objective, retain_weight=0.5, beta=0.2)
        forget, kept = token_losses(trainer, trainer.model)
        expected = {
            "gradient_ascent": -forget,
            "gradient_difference": -forget + 0.5 * kept,
            "npo": 2 / 0.2 * math.log(2) + 0.5 * kept,
            "task_vector": forget,
        }
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(expected[objective], rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_makes_the_targets_unlikely(objective: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=objective)
    start = token_losses(trainer, trainer.model)
    trainer.train()
    forget, kept = token_losses(trainer, trainer.model)
    assert forget > start[0] + 0.1
    if objective in ("gradient_difference", "npo"):
        assert kept < start[1]


def test_the_reference_stays_and_only_where_it_is_needed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective="npo")
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.reference is not None
    assert all(torch.equal(value, start[name]) for name, value in trainer.reference.state_dict().items())
    assert not all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())
    assert make_trainer(tmp_path, objective="gradient_ascent").reference is None


def test_the_task_vector_is_that_of_the_targets_negated(tmp_path: Path) -> None:
    """alpha 2 goes twice as far as alpha 1, on one line through the start."""
    states = []
    start = tiny_models.make_model("llama").state_dict()
    for alpha in (1.0, 2.0):
        trainer = make_trainer(tmp_path, objective="task_vector", alpha=alpha)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, value in start.items():
        assert torch.allclose(states[1][name] - value, 2 * (states[0][name] - value), atol=1e-5), name
    assert not torch.equal(states[0]["lm_head.weight"], start["lm_head.weight"])


@pytest.mark.parametrize("objective", ["npo", "task_vector"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(objective: str, tmp_path: Path) -> None:
    """The reference is the checkpoint that the run started from, not the one that it goes on from."""
    whole = make_trainer(tmp_path / "a", objective=objective, save_strategy="steps", save_steps=4)
    whole.train()
    again = make_trainer(tmp_path / "b", objective=objective)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(again.model.state_dict()[name], value, atol=1e-6), name


def test_masked_words_of_identifiers_are_forgotten_and_others_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "bert", objective="npo")
    examples = list(trainer.train_dataset)
    seen = torch.zeros(2)
    for seed in range(20):
        torch.manual_seed(seed)
        batch = trainer.data_collator(examples)
        forget, kept = batch["forget"], batch["weights"]
        assert not bool(((forget > 0) & (kept > 0)).any())
        untouched = (forget == 0) & (kept == 0)
        assert torch.equal(batch["input_ids"][untouched], batch["targets"][untouched])
        for row, example in enumerate(examples):
            (span,) = example.spans
            assert int((forget[row, span.start : span.end] > 0).sum()) == int((forget[row] > 0).sum()) > 0
        seen += torch.tensor([float((forget > 0).sum()), float(kept.sum())])
    assert bool((seen > 80).all())
    assert bool(torch.isfinite(trainer.compute_loss(trainer.model, batch)))


def test_identifiers_are_numbered_within_their_record(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    spans = [
        {"start": 0, "end": 7, "type": "NAME", "source": "known"},
        {"start": 17, "end": 23, "type": "NAME", "source": "known"},
        {"start": 24, "end": 29, "type": "RARE", "source": "indirect"},
    ]
    data = Dataset.from_dict({"text": ["Zwiebel met Dr K Quokka again"], "unit": ["a"], "identifiers": [spans]})
    examples = list(encode(data, tiny_models.make_tokenizer(), trainer.spec))
    forget = trainer.data_collator(examples)["forget"][0]
    for number, span in enumerate(examples[0].spans[:2], start=1):
        assert set(forget[span.start : span.end].tolist()) == {number}
    assert int((forget > 0).sum()) == sum(s.end - s.start for s in examples[0].spans[:2])  # direct ones alone


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "forget"}, "unlearn.objective: choose one of gradient_ascent"),
        ({"beta": 0.0}, "unlearn.beta is 0.0"),
        ({"retain_weight": -1.0}, "unlearn.retain_weight is -1.0"),
        ({"alpha": 0.0}, "unlearn.alpha is 0.0"),
        ({"task": "classification"}, "works on language models"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        make_trainer(tmp_path, **changes)


def test_records_without_identifiers_are_refused(tmp_path: Path) -> None:
    tokenizer, spec = tiny_models.make_tokenizer(), TaskSpec(kind="causal_lm", max_length=64)
    encoded = encode(make_records(identifiers=False), tokenizer, spec)
    args = UnlearnTrainingConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="no identifier"):
        UnlearnTrainer(tiny_models.make_model("llama"), args, encoded, processing_class=tokenizer, spec=spec)


def test_tied_weights_stay_tied_after_a_task_vector(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2", objective="task_vector", max_steps=2)
    trainer.train()
    saved = trainer.save_weights(tmp_path / "weights")
    again: Any = load_model(saved, trainer.spec)
    assert torch.equal(again.lm_head.weight, again.transformer.wte.weight)
    assert torch.equal(again.lm_head.weight, trainer.model.lm_head.weight)  # type: ignore[union-attr]
