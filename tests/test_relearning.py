"""The relearning attack: whole patients on one side, a bounded training that learns, and files it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.scoring import score_records
from dpmed.relearning import public_records, relearn, relearning_sides


def records(units: list[str]) -> Dataset:
    return Dataset.from_dict(
        {"text": [f"Patient {u} has fever, note {i}." for i, u in enumerate(units)], "unit": units}
    )


@settings(max_examples=40, deadline=None)
@given(
    units=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda u: len(set(u)) > 1),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_whole_patients_stand_on_one_side_and_none_is_lost(units: list[int], share: float, seed: int) -> None:
    given_records = records([f"u{u}" for u in units])
    mine, others = relearning_sides(given_records, share, seed)
    assert sorted([*mine["text"], *others["text"]]) == sorted(given_records["text"])
    held, rest, n_units = set(mine["unit"]), set(others["unit"]), len(set(units))
    assert held and rest and not held & rest
    assert len(held) == min(max(1, round(share * n_units)), n_units - 1)


def test_the_choice_follows_the_seed() -> None:
    given_records = records([f"u{i}" for i in range(40)])
    first, again, other = (set(relearning_sides(given_records, 0.1, seed)[0]["unit"]) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 4


def test_one_patient_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2 patients"):
        relearning_sides(records(["a", "a"]), 0.1, 0)


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "masked_lm")])
def test_training_learns_what_the_attacker_holds(kind: tiny_models.Kind, task: str) -> None:
    model, tokenizer, spec = tiny_models.make_model(kind), tiny_models.make_tokenizer(), TaskSpec(task)  # pyright: ignore[reportArgumentType]
    given_records = records([f"u{i}" for i in range(6)])
    encoded = encode(given_records, tokenizer, spec)
    before = float(torch.tensor(score_records(model, encoded, spec, tokenizer).log_prob).nanmean())
    found = relearn(model, tokenizer, spec, given_records, steps=30, learning_rate=1e-2, batch_size=6, seed=0)
    after = float(torch.tensor(score_records(found, encoded, spec, tokenizer).log_prob).nanmean())
    assert found is model and not found.training
    assert after > before + 1.0


def test_steps_bound_the_training_and_labels_are_left_out() -> None:
    tokenizer, labelled = tiny_models.make_tokenizer(), TaskSpec(labels=("heart", "lung"), loss_on="completion")
    moved: list[float] = []
    for steps in (1, 3):
        model = tiny_models.make_model("llama")
        start = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        relearn(
            model, tokenizer, labelled, records(["a", "b", "c"]), steps=steps, learning_rate=1e-3, batch_size=3, seed=0
        )
        moved.append(float((model.model.layers[0].mlp.up_proj.weight.detach() - start).abs().max()))
    assert 0 < moved[0] <= 1e-3 * 1.01  # AdamW moves no weight by more than the rate in its first step
    assert moved[0] < moved[1] <= 3e-3 * 1.01


def test_a_classifier_is_refused() -> None:
    with pytest.raises(InputError, match="classifier"):
        relearn(
            tiny_models.make_model("bert", "classification"),
            tiny_models.make_tokenizer(),
            TaskSpec("classification", labels=("a", "b")),
            records(["a", "b"]),
            steps=1,
            learning_rate=1e-3,
            batch_size=2,
            seed=0,
        )


def test_public_text_is_read_by_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "public.txt"
    file.write_text("First text\nof two lines.\n\n\n\nSecond text.\n")
    assert public_records(file)["text"] == ["First text\nof two lines.", "Second text."]
    file.write_text("\n\n \n")
    with pytest.raises(InputError, match="holds no text"):
        public_records(file)
    with pytest.raises(InputError, match="FileNotFoundError"):
        public_records(tmp_path / "none.txt")


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "masked_lm")])
def test_training_again_gives_the_same_weights_and_leaves_no_gradients(kind: tiny_models.Kind, task: str) -> None:
    """A gate that was killed trains again; and what is measured next must not hold a second copy of the model."""
    spec, found = TaskSpec(task), list[torch.Tensor]()  # pyright: ignore[reportArgumentType]
    start = tiny_models.make_model(kind).state_dict()
    for _ in range(2):
        model = tiny_models.make_model(kind)
        model.load_state_dict(start)
        torch.rand(3)  # whatever was drawn before
        given_records = records([f"u{i}" for i in range(6)])
        relearn(
            model, tiny_models.make_tokenizer(), spec, given_records, steps=3, learning_rate=1e-2, batch_size=2, seed=5
        )
        assert all(p.grad is None for p in model.parameters())
        found.append(torch.cat([p.detach().ravel() for p in model.parameters()]))
    assert torch.equal(*found)
