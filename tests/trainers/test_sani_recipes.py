"""SANI's options from a recipe to a run folder: trained, killed, resumed, and put through the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_runs import World, make_world
from torch import Tensor

from dpmed import cli, pipeline
from dpmed.errors import InputError
from dpmed.recipe import Recipe, ReleaseSection
from dpmed.recipe_io import dump_recipe
from dpmed.trainers.base import MetricsFile

LENIENT = {name: 1.0 for name in vars(ReleaseSection()) if name.startswith("max_")}
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {"reset_to": "base"},
    "lora": {"repair": "lora"},
    "lora_over_base": {"repair": "lora", "reset_to": "base", "erase_layers": "all"},
    "surrogates": {"surrogates": True, "select": "activation"},
    "adapter": {"erase_in": "adapter", "repair": "lora", "when": "every_epoch"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkpoints(world: World) -> dict[str, Path]:
    """A whole model and an adapter, trained on the records."""
    for method in ("full", "lora"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "evaluate_weights", lambda *_, **__: {})
            pipeline.train(world.recipe(method, training={"learning_rate": 1e-2}), world.folder / method)
    return {"full": world.folder / "full" / "model", "lora": world.folder / "lora" / "adapter"}


def recipe_of(name: str, world: World, checkpoints: dict[str, Path], **changes: Any) -> Recipe:
    start = checkpoints["lora" if name == "adapter" else "full"]
    sani = {"identifiers": "direct", **OPTIONS[name]}
    model = {"path": str(start), "base": str(world.base)}
    training = {"epochs": 2, "save_every": 0.5}
    return world.recipe("sani", **{"model": model, "sani": sani, "training": training, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = [*(folder / "model").glob("*.safetensors"), *(folder / "adapter").glob("*.safetensors")]
    return load_file(file)


class Killed(Exception):
    pass


class Killing(MetricsFile):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise Killed


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the weights; what is measured of them is tested elsewhere."""
    monkeypatch.setattr(pipeline, "evaluate_weights", lambda *_, **__: {})


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("name", ["lora_over_base", "surrogates", "adapter"])
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(
    name: str, world: World, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(name, world, checkpoints)
    run = pipeline.train(recipe, tmp_path / "whole")
    assert run["status"] == "finished" and run["n_steps"] == 10
    assert set(run["erased_neurons"].values()) == {32}

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "MetricsFile", Killing)
        with pytest.raises(Killed):
            pipeline.train(recipe, tmp_path / "killed")
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    again = pipeline.train(recipe, tmp_path / "killed", resume=True)
    assert (again["status"], again["n_steps"]) == ("finished", 10)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_weights_are_what_the_options_say(
    name: str, world: World, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """At a rate of nearly 0 the run's weights are those of the erasure."""
    training = {"epochs": 1, "learning_rate": 1e-12}
    pipeline.train(recipe_of(name, world, checkpoints, training=training), tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(world.base)
    base_state = {key: value.clone() for key, value in base.state_dict().items()}
    if name == "adapter":
        assert not (tmp_path / "run" / "model").exists()
        adapter = tmp_path / "run" / "adapter"
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world.base)
        start = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(world.base), str(checkpoints["lora"])
        ).merge_and_unload()
        end = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    else:
        start = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["full"])
        end = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before, after = start.state_dict(), end.state_dict()
    blocks = (0, 1) if name == "lora_over_base" else (1,)
    layers = ("gate_proj", "up_proj", "down_proj")
    own = {f"model.layers.{block}.mlp.{layer}.weight" for block in blocks for layer in layers}
    assert all(torch.allclose(before[key], after[key], rtol=0.0, atol=1e-6) for key in before.keys() - own)
    for key in own:
        sides = [values[key].T if "down" in key else values[key] for values in (base_state, before, after)]
        stayed = torch.isclose(sides[2], sides[1], rtol=0.0, atol=1e-6).all(dim=1)
        as_base = torch.isclose(sides[2], sides[0], rtol=0.0, atol=1e-6).all(dim=1)
        assert int((~stayed).sum()) == 32, key
        if name in ("base", "lora_over_base", "adapter"):
            assert bool(as_base[~stayed].all()) and not bool(as_base[stayed].any())
        else:
            assert not bool(as_base.any())


@pytest.mark.parametrize("name", ["lora_over_base", "adapter"])
def test_sanitize_tests_the_repaired_model_for_release(
    name: str, world: World, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    release = {**LENIENT, "relearn_steps": 1, "quantise": [8]}
    recipe = recipe_of(name, world, checkpoints, data={"label": None}, release=release, training={"epochs": 1})
    recipe.method = "lora"  # `dpmed sanitize` takes it for sani
    file = tmp_path / "sanitize.yaml"
    file.write_text(dump_recipe(recipe))
    assert cli.main(["sanitize", str(file), "--output_dir", str(tmp_path / "s")]) == 0
    evidence = json.loads((tmp_path / "s" / "evidence.json").read_text())
    folder = "adapter" if name == "adapter" else "model"
    assert evidence["verdict"] == "pass" and evidence["weights"]["path"] == str(tmp_path / "s" / folder)
    assert cli.main(["sanitize", str(file), "--output_dir", str(tmp_path / "s"), "--resume"]) == 0


def test_a_whole_model_has_no_adapter_to_erase(world: World, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("adapter", world, checkpoints, model={"path": str(checkpoints["full"]), "base": None})
    with pytest.raises(InputError, match="is a LoRA adapter") as caught:
        pipeline.train(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"base": None}, "sani": {"reset_to": "base"}}, r"set model\.base"),
        ({"sani": {"erase_in": "adapter"}}, "set sani.repair to lora"),
        ({"sani": {"repair": "dp_lora"}, "data": {"unit": None}}, r"set data\.unit"),
    ],
    ids=str,
)
def test_what_the_recipe_shows_not_to_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        pipeline.train(world.recipe("sani", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
