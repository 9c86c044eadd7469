"""SANI on a GPU as on a CPU: the same neurons are scored, chosen and reset, in weights and in an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny_models
from dpmed.trainers.dp_sani import DPSANITrainer, DPSANITrainingConfig
from dpmed.trainers.erasure import erase_neurons
from dpmed.trainers.lora import lora_config
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reset_to": "zero", "select": "activation"},
    {"reset_to": "base", "select": "gradient", "surrogates": True, "kl": 0.1},
    {"repair": "lora", "erase_layers": "all"},
    {"erase_in": "adapter", "repair": "lora", "when": "every_epoch", "select": "gradient"},
    {"repair": "dp_lora"},
]


def make_records() -> Dataset:
    texts = [f"The patient Brunhilde Zwiebel was admitted with fever {i} and cough." for i in range(6)]
    span = {"start": 12, "end": 29, "type": "NAME", "source": "known"}
    return Dataset.from_dict({"text": texts, "unit": [f"p{i}" for i in range(6)], "identifiers": [[span]] * 6})


def make_sani(folder: Path, device: str, options: dict[str, Any], *, bf16: bool = False) -> SANITrainer:
    values: dict[str, Any] = {"identifiers": "direct", "max_steps": 4, "max_length": 64, "learning_rate": 1e-3}
    values |= {"per_device_train_batch_size": 3, "use_cpu": device == "cpu", "bf16": bf16, "unit_column": "unit"}
    model: Any = tiny_models.make_model("llama")
    if options.get("erase_in") == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    more: dict[str, Any] = {"base_model": tiny_models.make_model("llama", seed=1)}
    if options.get("repair", "full") != "full" and options.get("erase_in") != "adapter":
        more["peft_config"] = lora_config(model, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    torch.manual_seed(0)
    if options.get("repair") == "dp_lora":
        values |= {"delta": 1e-2, "expected_batch_units": 6, "ledger": "none", "noise_seed": 0, "clip_norm": 0.01}
        args: Any = DPSANITrainingConfig(output_dir=str(folder), **values, **options)
        return DPSANITrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer(), **more)
    args = SANITrainingConfig(output_dir=str(folder), **values, **options)
    return SANITrainer(model, args, make_records(), processing_class=tiny_models.make_tokenizer(), **more)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@DEVICES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_neurons_are_reset_on_any_device_and_the_repair_runs(
    options: dict[str, Any], device: str, tmp_path: Path
) -> None:
    wanted = state(make_sani(tmp_path / "a", "cpu", options).model)
    trainer = make_sani(tmp_path / "b", device, options)
    assert {p.device.type for p in trainer.model.parameters()} == {device}
    found = state(trainer.model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    trainer.train()
    end = state(trainer.model)
    assert trainer.state.global_step == 4 and any(not torch.equal(end[name], found[name]) for name in found)
    assert all(bool(torch.isfinite(value).all()) for value in end.values())


@DEVICES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_repair_runs_with_bfloat16_autocast(options: dict[str, Any], device: str, tmp_path: Path) -> None:
    trainer = make_sani(tmp_path, device, options, bf16=True)
    trainer.train()
    assert all(bool(torch.isfinite(value).all()) for value in state(trainer.model).values())


@DEVICES
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_bfloat16_weights_are_reset_to_a_base_on_another_device(kind: Any, device: str) -> None:
    model: Any = tiny_models.make_model(kind)
    model = model.to(device=device, dtype=torch.bfloat16)
    base = tiny_models.make_model(kind, seed=1)
    generator = torch.Generator().manual_seed(0)
    erase_neurons(model, fraction=1.0, layers="all", generator=generator, reset_to="base", base=base)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, torch.bfloat16)}
    name = {"gpt2": "transformer.h.1.mlp.c_fc", "bert": "bert.encoder.layer.1.intermediate.dense"}.get(
        kind, "model.layers.1.mlp.up_proj"
    )
    weight = state(model)[f"{name}.weight"]
    assert torch.equal(weight, state(base)[f"{name}.weight"].bfloat16())
