"""SANI with a DP repair: steps as the slow truth has them, no target learned, and no epsilon claimed for the model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_runs import World, make_world
from torch import Tensor

import tiny_models
from dpmed import cli_show, pipeline
from dpmed.errors import InputError
from dpmed.recipe import Recipe
from dpmed.report.certificate import Certificate
from dpmed.report.points import points_from_run_folder
from dpmed.trainers.base import MetricsFile
from dpmed.trainers.dp_sani import (
    CHECKPOINT,
    SCORES,
    SURROGATES,
    TARGETS,
    TERMS,
    DPSANITrainer,
    DPSANITrainingConfig,
    certificate,
)
from dpmed.trainers.lora import lora_config
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig

NAME = "Brunhilde Zwiebel"
N_UNITS = 6


def make_records() -> Dataset:
    texts = [f"The patient {NAME} was admitted with fever {i} and cough." for i in range(2 * N_UNITS)]
    span = {"start": 12, "end": 12 + len(NAME), "type": "NAME", "source": "known"}
    units = [f"p{i // 2}" for i in range(2 * N_UNITS)]
    return Dataset.from_dict({"text": texts, "unit": units, "identifiers": [[span]] * len(texts)})


def make_args(folder: Path, **changes: Any) -> DPSANITrainingConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "max_steps": 3,
        "identifiers": "direct",
        "max_length": 64,
        "delta": 1e-2,
        "expected_batch_units": N_UNITS,
        "learning_rate": 1e-2,
        "ledger": "none",
    }
    return DPSANITrainingConfig(**{**values, **changes})


def make_sani(folder: Path, *, kind: tiny_models.Kind = "llama", **changes: Any) -> DPSANITrainer:
    model = tiny_models.make_model(kind)
    task = "masked_lm" if kind == "bert" else "causal_lm"
    torch.manual_seed(0)
    return DPSANITrainer(
        model,
        make_args(folder, task=task, **changes),
        make_records(),
        processing_class=tiny_models.make_tokenizer(),
        peft_config=lora_config(model, task, rank=2, alpha=4, target_modules="all-linear", dropout=0.0),
    )


def without_noise(trainer: DPSANITrainer) -> DPSANITrainer:
    trainer.plan = replace(trainer.plan, noise_multiplier=0.0, clip_norm=math.inf)
    trainer._noise = trainer.plan.noise()
    return trainer


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_step_is_the_sum_over_patients_of_the_repair_s_gradient(tmp_path: Path) -> None:
    """All patients drawn, no noise, no clipping: gradients as a loop over patients gives, targets left out by hand."""
    trainer = without_noise(make_sani(tmp_path))
    for name, parameter in trained(trainer.model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    seen: list[dict[str, Tensor]] = []
    step = trainer.training_step

    def watched(*args: Any, **options: Any) -> Tensor:
        loss = step(*args, **options)
        if not seen:
            seen.append({name: p.grad.clone() for name, p in trained(trainer.model).items() if p.grad is not None})
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    truth: dict[str, Tensor] = {}
    model: Any = trainer.model
    for unit in range(N_UNITS):
        model.zero_grad()
        for example in (e for e in trainer.train_dataset if e.unit == unit):
            ids = torch.tensor([example.input_ids])
            losses = -model(input_ids=ids).logits[0, :-1].log_softmax(dim=1)[range(ids.shape[1] - 1), ids[0, 1:]]
            targets = {i for span in example.spans for i in range(span.start, span.end)}
            assert len(targets) > 3
            losses[[i for i in range(len(losses)) if i + 1 not in targets]].mean().backward()
        for name, parameter in trained(model).items():
            truth[name] = truth.get(name, torch.zeros_like(parameter)) + (
                0 if parameter.grad is None else parameter.grad
            )
    model.zero_grad()
    trainer.train()
    assert seen[0].keys() == truth.keys()
    for name, gradient in seen[0].items():
        assert torch.allclose(gradient, truth[name] / N_UNITS, atol=1e-6), name


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_erases_trains_adapters_and_saves_a_merged_model_with_its_certificate(kind: Any, tmp_path: Path) -> None:
    trainer = make_sani(tmp_path / "run", kind=kind)
    assert trainer.erased == {1: 32}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)
    saved = trainer.save_weights(tmp_path / "weights")
    assert not (saved / "adapter_config.json").exists()
    spent = json.loads((saved / "privacy.json").read_text())
    assert spent["private"] is False and spent["epsilon"] is None and spent["n_steps"] == 3
    assert 0 < spent["repair"]["epsilon"] <= 8.0


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, float) else []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [CHECKPOINT, TARGETS]),
        ({"terms": "terms.txt"}, [CHECKPOINT, TERMS]),
        ({"select": "gradient", "surrogates": True}, [CHECKPOINT, TARGETS, SCORES, SURROGATES]),
    ],
    ids=str,
)
def test_the_certificate_says_what_epsilon_does_not_cover(
    changes: dict[str, Any], wanted: list[str], tmp_path: Path
) -> None:
    repair = make_sani(tmp_path).plan.spent(3)
    found = certificate(repair, make_args(tmp_path, **changes))
    assert found["not_covered"] == wanted + repair["not_covered"]
    assert found["private"] is False and found["why"]
    assert found["repair"]["epsilon"] == repair["epsilon"] and found["repair"]["private"] is True
    outside = {key: value for key, value in found.items() if key != "repair"}
    assert repair["epsilon"] in numbers(repair) and repair["epsilon"] not in numbers(outside)
    assert not {"attack_bounds", "epsilon_curve"} & outside.keys()
    assert found["sampling_rate"] is None and found["repair"]["sampling_rate"] == 1.0
    assert any("not private" in warning for warning in Certificate("x", found).warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl": 0.5}, r"sani\.kl"),
        ({"when": "every_epoch"}, r"sani\.when"),
        ({"shard_base": True}, "shard_base"),
        ({"repair": "lora"}, "use SANITrainer"),
        ({"unit_column": None}, "patient column"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
    ids=str,
)
def test_options_under_which_the_guarantee_would_not_hold_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        make_sani(tmp_path, **changes)


def test_the_plain_trainer_refuses_a_dp_repair(tmp_path: Path) -> None:
    args = SANITrainingConfig(output_dir=str(tmp_path), use_cpu=True, unit_column="unit", repair="dp_lora")
    with pytest.raises(InputError, match="DPSANITrainer"):
        SANITrainer(
            tiny_models.make_model("llama"), args, make_records(), processing_class=tiny_models.make_tokenizer()
        )


# --- From a recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_of(world: World, **changes: Any) -> Recipe:
    sani = {"repair": "dp_lora", "identifiers": "direct", "surrogates": True}
    return world.recipe("sani", **{"sani": sani, "training": {"epochs": 2, "save_every": 0.4}, **changes})


class Killed(Exception):
    pass


class Killing(MetricsFile):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise Killed


def test_a_run_that_is_killed_goes_on_and_its_point_has_no_epsilon(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = recipe_of(world), tmp_path / "run"
    monkeypatch.setattr(pipeline, "MetricsFile", Killing)
    with pytest.raises(Killed):
        pipeline.train(recipe, folder)
    monkeypatch.setattr(pipeline, "MetricsFile", MetricsFile)
    run = pipeline.train(recipe, folder, resume=True)
    assert (run["status"], run["method"], run["erased_neurons"]) == ("finished", "sani", {"1": 32})
    spent = json.loads((folder / "privacy.json").read_text())
    assert spent["epsilon"] is None and spent["private"] is False and spent["n_steps"] == spent["planned_steps"] == 6
    assert json.loads((folder / "model" / "privacy.json").read_text()) == spent
    point = points_from_run_folder(folder)
    assert (point["method"], point["epsilon"], point["delta"], point["unit"]) == ("sani", None, None, None)
    capsys.readouterr()
    cli_show.run({"output_dir": str(folder)})  # pyright: ignore[reportArgumentType]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("privacy:")]
    assert "only the steps of the repair" in line and "epsilon" not in line


def test_the_repair_is_charged_to_the_ledger(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "evaluate_weights", lambda *_, **__: {})
    ledger = {"ledger": str(tmp_path / "ledger.sqlite"), "delta": 1e-2, "expected_batch_units": 4}
    pipeline.train(recipe_of(world, privacy=ledger), tmp_path / "run")
    spent = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert "ledger" not in spent
    assert spent["repair"]["ledger"]["epsilon_of_all_runs"] == pytest.approx(spent["repair"]["epsilon"])
