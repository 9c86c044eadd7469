"""What makes per-unit gradients hard: checkpointing, dropout, few bits, and trained layers that are not linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from guarantees.steps import (
    ENGINES,
    Case,
    Draw,
    Scene,
    adapted,
    flat_gradient,
    make_scene,
    relative_error,
    slow_sum,
    step_sum,
)
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.plan import EngineName

DRAW = Draw(sizes=(2, 1, 4, 3, 1), micro_batch_tokens=150)
CHECKPOINTED = [
    Case("bert", "classification"),
    Case("bert", "masked_lm"),
    Case("gpt2", "causal_lm"),
    Case("llama", "causal_lm"),
    Case("qwen2", "classification"),
]
both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def checkpointed(model: Any, *, reentrant: bool) -> Any:
    """As transformers' trainer switches it on, which also makes the embeddings' output ask for a gradient."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


class CountsRuns:
    """How often one adapter ran with gradients on."""

    def __init__(self, model: nn.Module, name: str = "lora_A.default") -> None:
        self.n = 0
        layer = next(m for n, m in model.named_modules() if n.endswith(name))
        layer.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n += 1


# --- Gradient checkpointing -------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("case", CHECKPOINTED, ids=str)
def test_the_sum_is_exact_under_gradient_checkpointing(case: Case, reentrant: bool, tmp_path: Path) -> None:
    plain = slow_sum(make_scene(tmp_path, case, DRAW))
    scene = make_scene(tmp_path, case, DRAW, checkpointed(adapted(case), reentrant=reentrant))
    _ = scene.trainer.frozen_head  # looked for once, by a forward pass of its own
    runs, n_cuts = CountsRuns(scene.trainer.model), len(scene.cuts)
    assert relative_error(step_sum(scene), plain) < 1e-5
    assert runs.n == 2 * n_cuts > 2  # so it was at work: each micro-batch ran its layers twice


@both_kinds
def test_dropout_under_checkpointing_has_the_mask_of_the_first_run(reentrant: bool, tmp_path: Path) -> None:
    case = Case("bert", "classification")
    model = checkpointed(adapted(case, dropout=0.3, hidden_dropout_prob=0.2), reentrant=reentrant)
    scene = make_scene(tmp_path, case, DRAW, model)
    rows, truth = rows_and_batch_gradient(scene)
    assert relative_error(rows.sum(0), truth) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@both_kinds
def test_hooks_under_checkpointing_are_refused_by_name(engine: EngineName, reentrant: bool, tmp_path: Path) -> None:
    """Opacus' hooks, which one_pass needs for layers that are not linear."""
    case, model = Case("bert", "classification"), adapted(Case("bert", "classification"))
    if engine == "one_pass":
        assert unfreeze(model, "attention.output.LayerNorm") > 0
    scene = make_scene(tmp_path, case, DRAW, model)
    checkpointed(model, reentrant=reentrant)
    with pytest.raises(PrivacyError, match="gradient checkpointing.*" + ("LayerNorm" if engine == "one_pass" else "")):
        step_sum(scene, engine=engine)


# --- Dropout ----------------------------------------------------------------------------------------------------------


def rows_and_batch_gradient(
    scene: Scene, *, n_records: int | None = None, engine: EngineName = "one_pass", autocast: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of one micro-batch in training mode, and autograd's gradient of the same batch under the same seed."""
    trainer, examples = scene.trainer, scene.examples[:n_records]
    model = trainer.model.train()
    scene.plan(engine=engine)

    def losses() -> Tensor:
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return trainer._losses_of(model, examples)

    model.zero_grad()
    losses().sum().backward()
    truth = flat_gradient(model).clone()
    attached = trainer.plan.attach(model)
    try:
        attached.begin([e.unit for e in examples], torch.device("cpu"))
        attached.backward(losses())
        rows = attached.unit_gradients().clone()
        found = []
        for row in rows:
            attached.write_gradients(row)
            found.append(flat_gradient(model).clone())
    finally:
        attached.detach()
    assert all(row.dtype == torch.float32 for row in rows)
    return torch.stack(found), truth


NOISY: list[tuple[Case, dict[str, float]]] = [
    (Case("bert", "classification"), {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
    (Case("albert", "masked_lm"), {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
    (Case("gpt2", "causal_lm"), {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}),
    (Case("llama", "causal_lm"), {"attention_dropout": 0.2}),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("case", "dropout"), NOISY, ids=[str(case) for case, _ in NOISY])
def test_with_dropout_the_rows_add_up_to_the_batch_gradient_of_the_same_masks(
    case: Case, dropout: dict[str, float], engine: EngineName, tmp_path: Path
) -> None:
    scene = make_scene(tmp_path, case, DRAW, adapted(case, dropout=0.3, **dropout))
    rows, truth = rows_and_batch_gradient(scene, engine=engine)
    assert len(rows) == len(DRAW.sizes)
    assert relative_error(rows.sum(0), truth) < 1e-5
    row, alone = rows_and_batch_gradient(scene, n_records=1, engine=engine)
    assert relative_error(row[0], alone) < 1e-5


def test_that_comparison_sees_other_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, dropout = NOISY[0]
    scene = make_scene(tmp_path, case, DRAW, adapted(case, dropout=0.3, **dropout))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    rows, truth = rows_and_batch_gradient(scene)
    assert relative_error(rows.sum(0), truth) > 1e-2


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["no checkpoints", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("case", [Case("bert", "classification"), Case("llama", "causal_lm")], ids=str)
def test_under_autocast_the_rows_are_float32_and_add_up_to_autograds_gradient(
    case: Case, reentrant: bool | None, tmp_path: Path
) -> None:
    model = adapted(case)
    scene = make_scene(tmp_path, case, DRAW, model)
    exact, _ = rows_and_batch_gradient(scene)
    if reentrant is not None:
        checkpointed(model, reentrant=reentrant)
    rows, truth = rows_and_batch_gradient(scene, autocast=True)
    assert relative_error(rows.sum(0), truth) < 2e-2
    assert 1e-4 < relative_error(rows, exact) < 5e-2  # so bfloat16 was at work


def test_a_step_under_bf16_is_near_that_of_float32(tmp_path: Path) -> None:
    case = Case("llama", "causal_lm")
    truth = slow_sum(make_scene(tmp_path, case, DRAW))
    scene = make_scene(tmp_path, case, DRAW, bf16=True)
    scene.trainer.accelerator.prepare_model(scene.trainer.model)  # as in train(): forward passes then run in bfloat16
    got = step_sum(scene)
    assert got.dtype == torch.float32
    assert 1e-4 < relative_error(got, truth) < 5e-2


# --- Trained layers that are not linear -------------------------------------------------------------------------------


def unfreeze(model: nn.Module, *marks: str) -> int:
    """Make all base weights trainable whose name holds one of the marks; returns how many."""
    named = [p for n, p in model.named_parameters() if any(m in n for m in marks) and "original_module" not in n]
    for parameter in named:
        parameter.requires_grad_(True)
    return len(named)


UNFROZEN: list[tuple[Case, tuple[str, ...]]] = [
    (Case("bert", "classification"), ("LayerNorm",)),
    (Case("bert", "masked_lm"), ("word_embeddings",)),  # tied to the decoder
    (Case("bert", "classification"), ("word_embeddings", "base_layer.bias")),
    (Case("bert", "classification"), ("bias",)),
    (Case("albert", "classification"), ("layer_norm", "LayerNorm", "word_embeddings")),
    (Case("gpt2", "causal_lm"), ("ln_",)),
    (Case("gpt2", "causal_lm"), ("wte",)),  # tied to the head
    (Case("qwen2", "causal_lm"), ("base_layer.bias", "embed_tokens")),
]


@pytest.mark.parametrize(("case", "marks"), UNFROZEN, ids=[f"{c}-{'-'.join(marks)}" for c, marks in UNFROZEN])
def test_trained_norms_embeddings_and_biases_are_clipped_together_with_the_factors(
    case: Case, marks: tuple[str, ...], tmp_path: Path
) -> None:
    model = adapted(case)
    assert unfreeze(model, *marks) > 0
    scene = make_scene(tmp_path, case, DRAW, model)
    assert len(scene.cuts) > 1
    assert relative_error(step_sum(scene), slow_sum(scene)) < 1e-5


def test_position_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    """GPT-2 looks them up once for all records, so no record has a gradient of its own."""
    case, model = Case("gpt2", "causal_lm"), adapted(Case("gpt2", "causal_lm"))
    assert unfreeze(model, "wpe") == 1
    scene = make_scene(tmp_path, case, DRAW, model)
    with pytest.raises(PrivacyError, match=r"wpe\.weight"):
        step_sum(scene)


def test_the_comparison_sees_a_tied_weight_that_keeps_half_of_its_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = Case("gpt2", "causal_lm"), adapted(Case("gpt2", "causal_lm"))
    unfreeze(model, "wte")
    scene = make_scene(tmp_path, case, DRAW, model)

    def forgets_the_lookups(self: OnePassEngine, parameter: Any) -> None:
        parameter.grad_sample = parameter.grad = None

    monkeypatch.setattr(OnePassEngine, "_take_hooked", forgets_the_lookups)
    assert relative_error(step_sum(scene), slow_sum(scene)) > 1e-2
