"""Erasure in an adapter: the chosen neurons are the base's again, and nothing else of base or adapter changes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny_models
from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError
from dpmed.models import load_model
from dpmed.trainers.adapter_erasure import erase_adapter_neurons
from dpmed.trainers.erasure import feed_forwards
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig

# Layout -> block prefix, layers with a row per neuron, the one with a column per neuron; written down once more.
PARTS: dict[Any, tuple[str, tuple[str, ...], str]] = {
    "bert": ("bert.encoder.layer.{}.", ("intermediate.dense",), "output.dense"),
    "gpt2": ("transformer.h.{}.", ("mlp.c_fc",), "mlp.c_proj"),
    "llama": ("model.layers.{}.", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
}


def adapted(kind: Any, *, seed: int = 0, **changes: Any) -> Any:
    """A model with an adapter all of whose factors have learned something."""
    options: dict[str, Any] = {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2"}
    model = get_peft_model(tiny_models.make_model(kind), LoraConfig(**{**options, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def merged(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in deepcopy(model).merge_and_unload().state_dict().items()}


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", PARTS)
def test_the_merged_weights_are_the_base_s_at_the_chosen_neurons_alone(kind: Any, fraction: float) -> None:
    model, base = adapted(kind), tiny_models.make_model(kind).state_dict()
    before, factors = merged(model), state(model)
    erased = erase_adapter_neurons(model, fraction=fraction, layers=[1], generator=generator())
    after = merged(model)
    width = feed_forwards(model)[1].width
    assert erased == {1: int(fraction * width)}
    prefix, ups, down = PARTS[kind]
    own = {prefix.format(1) + f"{layer}.weight" for layer in (*ups, down)}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - own)
    chosen: list[set[int]] = []
    for name in sorted(own):
        sides = [values[name] for values in (base, before, after)]
        if kind == "gpt2":
            sides = [value.T for value in sides]  # Conv1D keeps [inputs, outputs]
        if name.endswith(f"{down}.weight"):
            sides = [value.T for value in sides]
        old, learned, new = sides  # [neurons, ...]
        assert len(old) == width and not bool((old == learned).all(dim=1).any())
        reset = (new == old).all(dim=1)
        chosen.append(set(reset.nonzero().flatten().tolist()))
        assert torch.allclose(new[~reset], learned[~reset], atol=1e-6)
    assert all(len(each) == erased[1] and each == chosen[0] for each in chosen)
    moved = {name for name, value in state(model).items() if not torch.equal(value, factors[name])}
    assert all("lora_" in name for name in moved) and (bool(moved) is (fraction > 0))


def test_the_highest_scores_are_reset() -> None:
    model = adapted("llama")
    scores = {0: torch.randn(64, generator=generator()).double()}
    erase_adapter_neurons(model, fraction=0.25, layers=[0], generator=generator(), scores=scores)
    rows = state(model)["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"]
    assert set((rows == 0).all(dim=1).nonzero().flatten().tolist()) == set(scores[0].topk(16).indices.tolist())


def test_where_some_feed_forward_layers_have_factors_these_are_reset() -> None:
    model = adapted("llama", target_modules=["down_proj", "q_proj"], lora_bias=False)
    assert erase_adapter_neurons(model, fraction=0.5, layers="all", generator=generator()) == {0: 32, 1: 32}
    columns = state(model)["base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"]
    assert int((columns == 0).all(dim=0).sum()) == 32


def test_a_bias_of_the_factors_is_reset_too() -> None:
    model = adapted("llama", lora_bias=True)
    erase_adapter_neurons(model, fraction=0.5, layers=1, generator=generator())
    bias = state(model)["base_model.model.model.layers.1.mlp.gate_proj.lora_B.default.bias"]
    assert int((bias == 0).sum()) == 32


REFUSED: list[tuple[Any, str]] = [
    (lambda: tiny_models.make_model("llama"), "is a LoRA adapter"),
    (lambda: adapted("llama", target_modules=["q_proj", "v_proj"]), "no factors on the feed-forward layers of block 0"),
    (
        lambda: adapted("llama", target_modules=["up_proj"], layers_to_transform=[0]),
        "no factors on the feed-forward layers of block 1",
    ),
    (lambda: adapted("llama", use_dora=True), "DoRA"),
    (lambda: adapted("bert", bias="lora_only"), "trained biases"),
    (
        lambda: adapted("llama", target_modules=["q_proj", "up_proj"], modules_to_save=["down_proj"]),
        "modules_to_save",
    ),
    (lambda: adapted("albert"), "'albert'"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_erased_in_an_adapter_is_refused_before_anything_changes(make: Any, words: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises(InputError, match=words) as caught:
        erase_adapter_neurons(model, fraction=0.5, layers="all", generator=generator())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


# --- The trainer ------------------------------------------------------------------------------------------------------


def make_records() -> Dataset:
    texts = [f"The patient Brunhilde Zwiebel was admitted with fever {i} and cough." for i in range(4)]
    span = {"start": 12, "end": 29, "type": "NAME", "source": "known"}
    return Dataset.from_dict({"text": texts, "unit": ["a", "a", "b", "b"], "identifiers": [[span]] * 4})


def make_sani(model: Any, folder: Path, **changes: Any) -> SANITrainer:
    values: dict[str, Any] = {"erase_in": "adapter", "repair": "lora", "identifiers": "direct", "max_steps": 4}
    values |= {"max_length": 64, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    args = SANITrainingConfig(output_dir=str(folder), use_cpu=True, unit_column="unit", **{**values, **changes})
    return SANITrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer())


def test_the_repair_trains_the_adapter_and_an_adapter_is_saved(tmp_path: Path) -> None:
    tiny_models.make_model("llama").save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", TaskSpec(kind="causal_lm", max_length=64))
    model: Any = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    start = state(model)
    trainer = make_sani(model, tmp_path / "run", kl=0.1)
    assert trainer.erased == {1: 32}
    erased = state(trainer.model)
    rows = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    gone = (erased[rows] == 0).all(dim=1)
    assert int(gone.sum()) == 32
    assert trainer.reference is not None
    assert torch.equal(trainer.reference.state_dict()[rows], start[rows])  # the checkpoint before erasure
    trainer.train()
    end = state(trainer.model)
    assert all(torch.equal(start[name], end[name]) for name in start if "lora_" not in name)
    assert bool((end[rows][gone] != 0).any(dim=1).all())  # the repair uses these neurons again
    saved = trainer.save_weights(tmp_path / "weights")
    assert (saved / "adapter_config.json").is_file() and (saved / "adapter_model.safetensors").is_file()
    batch = trainer.data_collator(list(trainer.train_dataset))
    again = load_model(saved, trainer.spec).eval()
    logits = [m(input_ids=batch["input_ids"]).logits for m in (trainer.model.eval(), again)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"when": "every_epoch", "select": "gradient"}], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_killed_and_resumed_it_ends_as_an_uninterrupted_run(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    ends = []
    for folder, start in (("whole", None), ("again", tmp_path / "whole" / f"checkpoint-{step}")):
        trainer = make_sani(adapted("llama"), tmp_path / folder, save_strategy="steps", save_steps=1, **options)
        torch.manual_seed(0)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        assert trainer.state.global_step == 4
        ends.append(state(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_erasing_before_every_epoch_resets_other_neurons_each_time(tmp_path: Path) -> None:
    trainer = make_sani(adapted("llama"), tmp_path, when="every_epoch", learning_rate=0.0)
    rows = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    counts = [int((state(trainer.model)[rows] == 0).all(dim=1).sum())]
    trainer.train()
    counts.append(int((state(trainer.model)[rows] == 0).all(dim=1).sum()))
    assert counts[0] == 32 and 32 < counts[1] < 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repair": "full"}, "set sani.repair to lora"),
        ({"reset_to": "zero"}, "zero would prune"),
        ({"erase_in": "x"}, "erase_in"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_an_adapter_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        make_sani(adapted("llama"), tmp_path, **changes)


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a LoRA adapter"):
        make_sani(tiny_models.make_model("llama"), tmp_path)
