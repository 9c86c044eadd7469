"""SANI: the repair never learns a target, and its options do what they say; erasure itself: test_erasure.py."""

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
from dpmed.models import load_model
from dpmed.trainers.full import FullTrainer, FullTrainingConfig
from dpmed.trainers.lora import lora_config
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig, divergence_by_record


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def biased(kind: tiny_models.Kind, **changes: Any) -> Any:
    """A model in which no bias is zero, so that a reset bias shows."""
    model = tiny_models.make_model(kind, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.5)
    return model


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
    name = "transformer.h.1.mlp.c_fc.weight"
    assert int((before[name] != state(model)[name]).all(dim=0).sum()) == 64
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


# --- Options ----------------------------------------------------------------------------------------------------------


def make_sani(model: Any, folder: Path, *, records: Dataset | None = None, **changes: Any) -> SANITrainer:
    options: dict[str, Any] = {name: changes.pop(name) for name in ("base_model", "peft_config") if name in changes}
    tokenizer = tiny_models.make_tokenizer()
    return SANITrainer(
        model, make_args(folder, **changes), records or make_records(), processing_class=tokenizer, **options
    )


def test_a_target_is_never_a_label_in_ten_thousand_draws(tmp_path: Path) -> None:
    trainer = make_sani(tiny_models.make_model("bert"), tmp_path, task="masked_lm")
    examples = list(trainer.train_dataset)
    target = torch.zeros(4, max(len(e.input_ids) for e in examples))
    for row, example in enumerate(examples):
        for span in example.spans:
            target[row, span.start : span.end] = 1
    labels = torch.zeros_like(target)
    for _ in range(2500):  # of four records each
        labels += trainer.data_collator(examples)["weights"]
    assert float((labels * target).sum()) == 0 < float(target.sum())
    assert float(labels.sum()) > 10_000
    causal = make_sani(tiny_models.make_model("llama"), tmp_path)
    weights = causal.data_collator(list(causal.train_dataset))["weights"]
    inside = weights[:, : target.shape[1]] * target  # the end token comes after the text
    assert float(inside.sum()) == 0 < float(weights.sum())


class FullWithoutTargets(FullTrainer):
    never_target = "direct"


def test_erase_zero_is_full_fine_tuning_with_targets_left_out(tmp_path: Path) -> None:
    ends = []
    for each in ("sani", "full"):
        model = tiny_models.make_model("gpt2")
        if each == "sani":
            trainer: Any = make_sani(model, tmp_path, erase_fraction=0.0)
        else:
            values = {"output_dir": str(tmp_path), "use_cpu": True, "unit_column": "unit", "max_steps": 2}
            args = FullTrainingConfig(**values, per_device_train_batch_size=4, max_length=64)
            trainer = FullWithoutTargets(model, args, make_records(), processing_class=tiny_models.make_tokenizer())
        torch.manual_seed(0)
        trainer.train()
        ends.append(state(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"when": "every_epoch"}, {"select": "gradient", "when": "every_epoch"}, {"repair": "lora"}, {"kl": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("step", [1, 2])
def test_killed_and_resumed_it_ends_as_an_uninterrupted_run(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    """Two steps an epoch: stopped within the first epoch, and at its end, before the next erasure."""

    def make(folder: Path) -> SANITrainer:
        torch.manual_seed(0)
        model = tiny_models.make_model("llama")
        more = dict(options)
        if more.get("repair") == "lora":
            more["peft_config"] = lora_config(
                model, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0
            )
        changes = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        return make_sani(model, folder, **changes, save_strategy="steps", save_steps=1, **more)

    whole = make(tmp_path / "whole")
    whole.train()
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert again.state.global_step == 4
    first, second = state(whole.model), state(again.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_erasing_before_every_epoch_resets_other_neurons_each_time(tmp_path: Path) -> None:
    trainer = make_sani(
        biased("gpt2"), tmp_path, when="every_epoch", max_steps=6, per_device_train_batch_size=2, learning_rate=0.0
    )
    name, counts, seen = "transformer.h.1.mlp.c_fc.bias", [], state(trainer.model)
    counts.append(int((seen[name] == 0).sum()))
    trainer.train()
    counts.append(int((state(trainer.model)[name] == 0).sum()))
    assert counts[0] == 64 and 64 < counts[1] < 128  # three draws of a half: about seven eighths


@pytest.mark.parametrize("select", ["gradient", "activation"])
def test_scored_neurons_follow_from_the_records(select: str, tmp_path: Path) -> None:
    ends = [
        state(make_sani(biased("gpt2"), tmp_path, select=select, seed=seed, reset_to="zero").model) for seed in (0, 1)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # all windows fit, so no chance is left
    drawn = state(make_sani(biased("gpt2"), tmp_path, reset_to="zero").model)
    assert not all(torch.equal(ends[0][name], drawn[name]) for name in drawn)


def test_terms_are_the_only_targets(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("COUGH\n\n  was   admitted \n", encoding="utf-8")
    trainer = make_sani(tiny_models.make_model("llama"), tmp_path, terms=str(file))
    tokenizer = tiny_models.make_tokenizer()
    for example in trainer.train_dataset:
        found = [(str(tokenizer.decode(example.input_ids[s.start : s.end])).strip(), s.type) for s in example.spans]
        assert found == [("was admitted", "TERM"), ("cough", "TERM")]
        weights = trainer.data_collator([example])["weights"][0]
        assert sum(float(weights[s.start : s.end].sum()) for s in example.spans) == 0.0 < float(weights.sum())


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), ("\n \n", "holds no term"), ("zebra\n", "found no term")]
)
def test_terms_that_cannot_be_used_are_refused(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        make_sani(tiny_models.make_model("llama"), tmp_path, terms=str(file))
    assert "zebra" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_divergence_is_that_of_a_slow_loop_and_skips_targets(kind: Any, tmp_path: Path) -> None:
    task = "causal_lm" if kind == "llama" else "masked_lm"
    trainer = make_sani(tiny_models.make_model(kind), tmp_path, task=task, kl=0.5)
    batch = trainer.data_collator(list(trainer.train_dataset))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    trainer.model.eval()
    new = trainer.model(**inputs).logits.detach()
    assert trainer.reference is not None
    old = trainer.reference(**inputs).logits
    shift = 1 if kind == "llama" else 0
    expected = []
    for row, weights in enumerate(batch["weights"]):
        at = [i - shift for i in range(len(weights)) if weights[i] > 0]
        p, q = old[row, at].softmax(dim=1), new[row, at].softmax(dim=1)
        expected.append(float((p * (p / q).log()).sum(dim=1).mean()))
    found = divergence_by_record(new, old, batch, trainer.spec)
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert float(found.max()) > 0
    plain = per_record_loss(new, batch, trainer.spec)
    assert torch.allclose(trainer.record_losses(trainer.model, batch), plain)  # not part of a held-out loss
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.allclose(trainer.record_losses(trainer.model, batch), plain + 0.5 * found, rtol=1e-4)


def test_the_reference_is_the_checkpoint_before_erasure_and_stays_it(tmp_path: Path) -> None:
    model = biased("gpt2")
    before = state(model)
    trainer = make_sani(model, tmp_path, kl=1.0, learning_rate=1e-2)
    trainer.train()
    assert not all(torch.equal(before[name], value) for name, value in state(trainer.model).items())
    assert all(torch.equal(before[name], value) for name, value in state(trainer.reference).items())


def test_a_repair_by_lora_is_saved_merged_with_the_erased_model(tmp_path: Path) -> None:
    model = tiny_models.make_model("llama")
    config = lora_config(model, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    trainer = make_sani(model, tmp_path, repair="lora", peft_config=config, learning_rate=1e-2)
    trainer.train()
    saved = trainer.save_weights(tmp_path / "weights")
    assert not (saved / "adapter_config.json").exists()
    batch = trainer.data_collator(list(trainer.train_dataset))
    again = load_model(saved, trainer.spec).eval()
    logits = [m(input_ids=batch["input_ids"]).logits for m in (trainer.model.eval(), again)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select": "best"}, "select"),
        ({"reset_to": "base"}, "set model.base"),
        ({"kl": -1.0}, "kl"),
        ({"score_windows": 0}, "score_windows"),
        ({"repair": "lora", "when": "every_epoch"}, "every_epoch"),
        ({"repair": "lora"}, "peft_config"),
        ({"erase_layers": 9}, "2 blocks"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        make_sani(tiny_models.make_model("llama"), tmp_path, **changes)
