"""SANI: exactly the chosen neurons are reset, and the repair never learns an identifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import tiny_models
from dpmed.data.batches import Collator, per_record_loss
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig, erase_neurons

KINDS: tuple[tiny_models.Kind, ...] = ("bert", "gpt2", "llama", "qwen2")
# block prefix, weights whose row is a neuron, weight whose column is one, biases with an entry per neuron
PARTS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...]]] = {
    "bert": (
        "bert.encoder.layer.{}.",
        ("intermediate.dense.weight",),
        "output.dense.weight",
        ("intermediate.dense.bias",),
    ),
    "gpt2": ("transformer.h.{}.", ("mlp.c_fc.weight",), "mlp.c_proj.weight", ("mlp.c_fc.bias",)),
    "llama": ("model.layers.{}.", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.down_proj.weight", ()),
    "qwen2": ("model.layers.{}.", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.down_proj.weight", ()),
}


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def biased(kind: tiny_models.Kind, **changes: Any) -> Any:
    """A model in which no bias is zero, so that a reset bias shows."""
    model = tiny_models.make_model(kind, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.5)
    return model


def as_rows(kind: str, weight: Tensor) -> Tensor:
    """[outputs, inputs]; GPT-2 stores the transpose."""
    return weight.T if kind == "gpt2" and weight.dim() == 2 else weight


def changed_neurons(kind: str, before: dict[str, Tensor], after: dict[str, Tensor], block: int) -> set[int]:
    """The neurons of a block that differ, which must be the same in every one of its matrices."""
    prefix, ups, down, biases = PARTS[kind]
    prefix = prefix.format(block)

    def differs(name: str) -> Tensor:
        return as_rows(kind, before[prefix + name] != after[prefix + name])

    hits = [*(differs(up).all(dim=1) for up in ups), differs(down).all(dim=0), *(differs(bias) for bias in biases)]
    found = [set(hit.nonzero().flatten().tolist()) for hit in hits]
    assert all(neurons == found[0] for neurons in found), "a neuron was reset in one matrix and not in another"
    return found[0]


def restored(kind: str, before: dict[str, Tensor], after: dict[str, Tensor], block: int, neurons: set[int]) -> None:
    """Put the old values of these neurons back into `after`, in place."""
    prefix, ups, down, biases = PARTS[kind]
    prefix, rows = prefix.format(block), sorted(neurons)
    for up in ups:
        as_rows(kind, after[prefix + up])[rows] = as_rows(kind, before[prefix + up])[rows]
    as_rows(kind, after[prefix + down])[:, rows] = as_rows(kind, before[prefix + down])[:, rows]
    for bias in biases:
        after[prefix + bias][rows] = before[prefix + bias][rows]


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_chosen_neurons_of_the_last_blocks_are_reset(kind: tiny_models.Kind, n_layers: int) -> None:
    model = biased(kind, num_hidden_layers=3) if kind != "gpt2" else biased(kind, n_layer=3)
    before = state(model)
    erased = erase_neurons(model, fraction=0.5, n_layers=n_layers, generator=generator())
    after = state(model)
    assert list(erased) == list(range(3 - n_layers, 3))
    for block, count in erased.items():
        neurons = changed_neurons(kind, before, after, block)
        width = after[PARTS[kind][0].format(block) + PARTS[kind][1][0]].numel() // tiny_models.HIDDEN
        assert len(neurons) == count == width // 2
        restored(kind, before, after, block, neurons)
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing else


@pytest.mark.parametrize("kind", KINDS)
def test_fraction_zero_changes_nothing_and_one_resets_all(kind: tiny_models.Kind) -> None:
    model = biased(kind)
    before = state(model)
    assert erase_neurons(model, fraction=0.0, n_layers=1, generator=generator()) == {1: 0}
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    erased = erase_neurons(model, fraction=1.0, n_layers=1, generator=generator())
    assert len(changed_neurons(kind, before, state(model), 1)) == erased[1]


@pytest.mark.parametrize("kind", KINDS)
def test_reset_neurons_are_as_freshly_initialised(kind: tiny_models.Kind) -> None:
    sizes = {"n_inner": 1024} if kind == "gpt2" else {"intermediate_size": 1024}
    model = biased(kind, initializer_range=0.05, **sizes)
    for name, parameter in model.named_parameters():
        if not name.endswith("bias"):
            parameter.data.fill_(7.0)
    erase_neurons(model, fraction=0.5, n_layers=1, generator=generator())
    prefix, ups, down, biases = PARTS[kind]
    after = state(model)
    for name in (*ups, down):
        fresh = after[prefix.format(1) + name]
        fresh = fresh[fresh != 7.0]
        assert fresh.numel() == 512 * tiny_models.HIDDEN
        assert abs(float(fresh.std()) / 0.05 - 1) < 0.05  # 16384 numbers: 9 standard errors
        assert abs(float(fresh.mean())) < 0.05 * 6 / 16384**0.5
    for name in biases:
        assert sorted(after[prefix.format(1) + name].unique().tolist()) == [0.0, 0.5]


def test_the_generator_chooses_the_neurons() -> None:
    chosen = []
    for seed in (0, 0, 1):
        model = biased("llama")
        before = state(model)
        erase_neurons(model, fraction=0.5, n_layers=1, generator=generator(seed))
        chosen.append(changed_neurons("llama", before, state(model), 1))
    assert chosen[0] == chosen[1] != chosen[2]


def test_an_unknown_layout_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'albert'.*known: bert"):
        erase_neurons(tiny_models.make_model("albert"), fraction=0.5, n_layers=1, generator=generator())


@pytest.mark.parametrize("n_layers", [0, 3])
def test_blocks_that_the_model_does_not_have_are_refused(n_layers: int) -> None:
    with pytest.raises(InputError, match="the model has 2 blocks"):
        erase_neurons(tiny_models.make_model("llama"), fraction=0.5, n_layers=n_layers, generator=generator())


# --- Repair ---------------------------------------------------------------------------------------------------------

NAME = "Brunhilde Zwiebel"


def make_records(*, identifiers: bool = True, name: str = NAME) -> Dataset:
    texts = [f"The patient {name} was admitted with fever {i} and cough." for i in range(4)]
    start = len("The patient ")
    span = {"start": start, "end": start + len(name), "type": "NAME", "source": "known"}
    return Dataset.from_dict(
        {
            "text": texts,
            "unit": [f"p{i // 2}" for i in range(4)],
            "identifiers": [[span] if identifiers else [] for _ in texts],
        }
    )


def make_args(folder: Path, **changes: Any) -> SANITrainingConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "identifiers": "direct",
        "max_length": 64,
    }
    return SANITrainingConfig(**{**values, **changes})


def repair_loss(model: Any, trainer: SANITrainer) -> Tensor:
    examples = list(trainer.train_dataset)
    batch = trainer.data_collator(examples)
    model.zero_grad()
    return trainer.compute_loss(model, batch)


def test_the_repair_has_no_gradient_from_identifier_targets(tmp_path: Path) -> None:
    """Other tokens as targets at the places of the identifiers: neither loss nor gradient notices."""
    model = tiny_models.make_model("llama")
    trainer = SANITrainer(model, make_args(tmp_path), make_records(), processing_class=tiny_models.make_tokenizer())
    examples = list(trainer.train_dataset)
    batch = trainer.data_collator(examples)
    changed = {key: value.clone() for key, value in batch.items()}
    places = [(row, i) for row, e in enumerate(examples) for s in e.spans for i in range(s.start, s.end)]
    assert len(places) >= 4 * 2
    for row, i in places:
        changed["targets"][row, i] = (changed["targets"][row, i] + 11) % 300
    assert not torch.equal(changed["targets"], batch["targets"])
    results = []
    for each in (batch, changed):
        model.zero_grad()
        loss = trainer.compute_loss(model, each)
        loss.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = Collator(tiny_models.make_tokenizer(), trainer.spec)(examples)
    losses = [per_record_loss(logits, {**plain, "targets": c["targets"]}, trainer.spec) for c in (batch, changed)]
    assert not torch.equal(losses[0], losses[1])  # a loss over all tokens does notice


def test_identifiers_stay_visible_as_context(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.make_model("llama"), tiny_models.make_tokenizer()
    trainer = SANITrainer(model, make_args(tmp_path), make_records(), processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert NAME in tokenizer.decode(batch["input_ids"][0])


def test_the_repair_never_masks_an_identifier(tmp_path: Path) -> None:
    tokenizer = tiny_models.make_tokenizer()
    args = make_args(tmp_path, task="masked_lm")
    trainer = SANITrainer(tiny_models.make_model("bert"), args, make_records(), processing_class=tokenizer)
    examples = list(trainer.train_dataset)
    masked = torch.zeros(1)
    for _ in range(60):
        batch = trainer.data_collator(examples)
        masked = masked + batch["weights"].sum()
        for row, example in enumerate(examples):
            for span in example.spans:
                inside = slice(span.start, span.end)
                assert float(batch["weights"][row, inside].sum()) == 0.0
                assert batch["input_ids"][row, inside].tolist() == example.input_ids[inside]
    assert float(masked) > 60


def test_the_trainer_erases_when_it_is_made_and_trains_all_weights(tmp_path: Path) -> None:
    model = biased("gpt2")
    before = state(model)
    trainer = SANITrainer(model, make_args(tmp_path), make_records(), processing_class=tiny_models.make_tokenizer())
    assert trainer.erased == {1: 64}  # half of 4 * 32
    assert len(changed_neurons("gpt2", before, state(model), 1)) == 64
    trainer.train()
    assert trainer.state.global_step == 2


def test_repair_only_starts_from_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    model = biased("gpt2")
    before = state(model)
    args = make_args(tmp_path, erase_fraction=0.0)
    SANITrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer())
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_equal_seeds_erase_equal_neurons(tmp_path: Path) -> None:
    states = []
    for seed in (3, 3, 4):
        model = biased("gpt2")
        args = make_args(tmp_path, seed=seed)
        SANITrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer())
        states.append(state(model)["transformer.h.1.mlp.c_fc.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_classification_is_refused(tmp_path: Path) -> None:
    model = tiny_models.make_model("bert", "classification")
    with pytest.raises(InputError, match="language models"):
        SANITrainer(
            model,
            make_args(tmp_path, task="classification"),
            make_records(),
            processing_class=tiny_models.make_tokenizer(),
        )


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_share_outside_of_zero_and_one_is_refused(fraction: float, tmp_path: Path) -> None:
    args = make_args(tmp_path, erase_fraction=fraction)
    with pytest.raises(InputError, match="erase_fraction"):
        SANITrainer(tiny_models.make_model("gpt2"), args, make_records(), processing_class=tiny_models.make_tokenizer())


def test_records_without_identifiers_are_refused_before_anything_is_erased(tmp_path: Path) -> None:
    model, tokenizer = biased("gpt2"), tiny_models.make_tokenizer()
    before = state(model)
    spec = TaskSpec(kind="causal_lm", max_length=64)
    encoded = encode(make_records(identifiers=False), tokenizer, spec)
    with pytest.raises(InputError, match="no identifier"):
        SANITrainer(model, make_args(tmp_path), encoded, processing_class=tokenizer, spec=spec)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_rare_words_and_other_mentions_become_identifiers_whatever_the_columns_are_called(tmp_path: Path) -> None:
    texts = ["The patient Zwiebel has gout.", "Zwiebel again, with gout.", "Fever and gout.", "Fever and cough today."]
    span = {"start": 12, "end": 19, "type": "NAME", "source": "known"}
    columns = {"note": texts, "pid": ["a", "a", "b", "b"], "identifiers": [[span], [], [], []]}
    trainer = SANITrainer(
        tiny_models.make_model("gpt2"),
        make_args(tmp_path, identifiers="all", text_column="note", unit_column="pid"),
        Dataset.from_dict(columns),
        processing_class=tiny_models.make_tokenizer(),
    )
    found = [[span.source for span in example.spans] for example in trainer.train_dataset]
    assert found == [["known"], ["known"], [], ["indirect"]]  # the second Zwiebel; "today", in one patient alone
