"""Models in and out: what is loaded, what is refused, and that a saved one loads again with equal outputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel

import tiny_models
from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError
from dpmed.models import (
    TASK_CARD,
    MeanPoolingClassifier,
    MeanPoolingConfig,
    fresh_modules,
    load_model,
    load_tokenizer,
    read_task_card,
    with_thresholds,
    write_task_card,
)
from dpmed.trainers.lora import lora_config, with_adapters

LABELS = ("a", "b", "c")
CLASSES = TaskSpec(kind="classification", labels=LABELS)
MEAN = replace(CLASSES, pooling="mean")
CAUSAL = TaskSpec(kind="causal_lm")
MASKED = TaskSpec(kind="masked_lm")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in tiny_models.KINDS:
        tiny_models.make_model(kind).save_pretrained(folder / kind)
        tiny_models.make_tokenizer().save_pretrained(folder / kind)
    return folder


def logits(model: Any) -> Tensor:
    """Of two texts, the second one padded."""
    ids = torch.randint(7, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


def randomised(model: Any) -> Any:
    """Adapters start as no change at all; this one changes something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("bert", MASKED), ("albert", MASKED), ("gpt2", CAUSAL), ("llama", CAUSAL), ("qwen2", CAUSAL)],
)
def test_a_folder_loads_as_it_was_saved(kind: tiny_models.Kind, spec: TaskSpec, bases: Path) -> None:
    model: Any = load_model(bases / kind, spec)
    assert torch.equal(logits(model), logits(tiny_models.make_model(kind)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fresh_modules(model) == []


@pytest.mark.parametrize("spec", [CLASSES, MEAN, replace(CLASSES, multi_label=True)], ids=["own", "mean", "several"])
@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "llama"])
def test_a_classifier_loads_again_with_equal_outputs(
    kind: tiny_models.Kind, spec: TaskSpec, bases: Path, tmp_path: Path
) -> None:
    model: Any = load_model(bases / kind, spec)
    assert logits(model).shape == (2, 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, spec)), logits(model))


@pytest.mark.parametrize("spec", [CLASSES, MEAN], ids=["own", "mean"])
@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "llama", "qwen2"])
def test_an_adapter_loads_again_on_its_base_also_where_the_base_has_no_head(
    kind: tiny_models.Kind, spec: TaskSpec, bases: Path, tmp_path: Path
) -> None:
    """The head (and BERT's pooler) is drawn at random at each load of the base: the adapter must hold it."""
    base = load_model(bases / kind, spec)
    config = lora_config(base, "classification", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    adapted: Any = randomised(with_adapters(base, config))
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(1234)
    loaded = load_model(tmp_path, spec)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(adapted))
    merged = load_model(tmp_path, spec, merge=True)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)


def test_that_check_sees_an_adapter_without_the_fresh_pooler(bases: Path, tmp_path: Path) -> None:
    base = load_model(bases / "bert", CLASSES)
    assert fresh_modules(base) == ["bert.pooler.dense", "classifier"]
    config = lora_config(base, "classification", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    assert config.modules_to_save == ["classifier", "bert.pooler.dense"]
    config.modules_to_save, config.exclude_modules = ["classifier"], None
    adapted: Any = with_adapters(base, config)
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(1234)
    assert not torch.allclose(logits(load_model(tmp_path, CLASSES)), logits(adapted), atol=1e-5)


@pytest.mark.parametrize(("kind", "spec"), [("llama", CAUSAL), ("gpt2", CAUSAL), ("bert", MASKED)])
def test_language_model_adapters_load_and_merge(
    kind: tiny_models.Kind, spec: TaskSpec, bases: Path, tmp_path: Path
) -> None:
    base = load_model(bases / kind, spec)
    config = lora_config(base, spec.kind, rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    config.fan_in_fan_out = kind == "gpt2"
    adapted: Any = randomised(with_adapters(base, config))
    assert not torch.allclose(logits(adapted), logits(tiny_models.make_model(kind)), atol=1e-4)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, spec)), logits(adapted))
    assert torch.allclose(logits(load_model(tmp_path, spec, merge=True)), logits(adapted), atol=1e-5)


# --- Mean pooling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_mean_pooling_is_the_mean_over_valid_tokens(kind: tiny_models.Kind, bases: Path) -> None:
    model: Any = load_model(bases / kind, MEAN)
    backbone = AutoModel.from_pretrained(bases / kind).eval()
    ids = torch.randint(7, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = torch.stack([hidden[0].mean(dim=0), hidden[1, :6].mean(dim=0)])
        assert torch.allclose(logits(model), model.classifier(pooled), atol=1e-5)


def test_mean_pooling_leaves_out_the_pooler_that_it_would_never_train() -> None:
    config = tiny_models.make_config("bert")
    model = MeanPoolingClassifier(MeanPoolingConfig(backbone=config.to_dict(), num_labels=2))
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    logits(model).sum()
    model.train()(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# --- Heads ----------------------------------------------------------------------------------------------------------


def test_decoders_without_a_padding_token_pool_at_the_last_real_token(tmp_path: Path) -> None:
    tiny_models.make_model("gpt2", pad_token_id=None).save_pretrained(tmp_path)
    model: Any = load_model(tmp_path, CLASSES)
    assert model.config.pad_token_id == model.config.eos_token_id
    assert logits(model).shape == (2, 3)


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [CAUSAL, MASKED, CLASSES, MEAN])
def test_a_folder_without_a_model_is_refused(spec: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors weights at"):
        load_model(tmp_path / "absent", spec)


def test_pickled_weights_are_refused(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(bases / "gpt2", folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_models.make_model("gpt2").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_model(folder, CAUSAL)


def test_pickled_adapters_are_refused(bases: Path, tmp_path: Path) -> None:
    base = load_model(bases / "llama", CAUSAL)
    config = lora_config(base, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    adapted: Any = with_adapters(base, config)
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_model(tmp_path, CAUSAL)


def test_an_adapter_whose_base_is_gone_is_refused(bases: Path, tmp_path: Path) -> None:
    base = load_model(bases / "llama", CAUSAL)
    config = lora_config(base, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    adapted: Any = with_adapters(base, config)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="gone"):
        load_model(tmp_path, CAUSAL)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")


def test_the_tokenizer_comes_from_the_folder(bases: Path) -> None:
    assert load_tokenizer(bases / "llama").get_vocab() == tiny_models.make_tokenizer().get_vocab()


# --- Task card ------------------------------------------------------------------------------------------------------


def test_the_task_card_survives(tmp_path: Path) -> None:
    spec = with_thresholds(replace(MEAN, multi_label=True), (0.2, 0.5, 0.9))
    write_task_card(tmp_path, spec)
    assert read_task_card(tmp_path) == spec
    assert json.loads((tmp_path / TASK_CARD).read_text())["thresholds"] == [0.2, 0.5, 0.9]


def test_a_foreign_model_has_no_task_card(bases: Path) -> None:
    assert read_task_card(bases / "gpt2") is None
