"""One recipe, one run: what stands in a run folder, that it holds no patient, and that a killed run goes on."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_runs import LABELS, N_HELDOUT, N_TRAIN, RECORDS_PER_UNIT, World, figures, files, make_world, write_rows

import tiny_models
from dpmed import evaluation, pipeline, training_setup
from dpmed.errors import BudgetError, InputError
from dpmed.models import read_task_card
from dpmed.recipe import Recipe
from dpmed.recipe_io import dump_recipe, load_recipe

METHODS = ("full", "lora", "dp_lora", "sani", "sani_from_lora", "unlearn")
N_RECORDS = N_TRAIN * RECORDS_PER_UNIT


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: World) -> Callable[[str], Path]:
    """The folder of a finished run, trained once for all tests."""

    def run(name: str) -> Path:
        folder = world.folder / "runs" / name
        if not folder.exists():
            pipeline.train(recipe_of(world, name, run), folder)
        return folder

    return run


def recipe_of(world: World, name: str, finished: Callable[[str], Path]) -> Recipe:
    if name in ("sani", "unlearn"):
        return world.recipe(name, model={"path": str(finished("full") / "model"), "base": str(world.base)})
    if name == "sani_from_lora":
        return world.recipe("sani", model={"path": str(finished("lora") / "adapter"), "base": str(world.base)})
    return world.recipe(name)


def weights_of(name: str) -> str:
    return "adapter" if name in ("lora", "dp_lora") else "model"


# --- What stands in a run folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_folder_holds_what_the_contract_names(name: str, world: World, finished: Callable[[str], Path]) -> None:
    folder = finished(name)
    expected = {"recipe.yaml", "run.json", "metrics.jsonl", "evaluation.json", weights_of(name)}
    expected |= {"memorized.safetensors"}  # flags and positions, for `evaluate --before`
    expected |= {"privacy.json", "privacy_run.json", "charges.sqlite"} if name == "dp_lora" else set()
    assert {path.name for path in folder.iterdir()} == expected
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["seconds"] > 0 and run["peak_memory_bytes"] > 0
    assert (run["method"], run["seed"], run["unit"]) == (name.removesuffix("_from_lora"), 0, "mrn")
    assert run["data"]["n_train_units"] == N_TRAIN and run["data"]["n_heldout_units"] == N_HELDOUT
    assert run["n_windows"] >= N_RECORDS and run["n_steps"] >= 3
    assert load_recipe(folder / "recipe.yaml") == recipe_of(world, name, finished)
    assert {"torch", "transformers", "dpmed"} <= set(run["versions"])


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_numbers_only(name: str, finished: Callable[[str], Path]) -> None:
    lines = [json.loads(line) for line in (finished(name) / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(type(value) in (int, float) for line in lines for value in line.values())
    assert any("loss" in key for line in lines for key in line) is (name != "dp_lora")  # there it is private


@pytest.mark.parametrize("name", METHODS)
def test_only_the_owner_reads_a_run(name: str, finished: Callable[[str], Path]) -> None:
    folder = finished(name)
    for path in (folder, folder / weights_of(name)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
    assert len(modes) >= 4 and set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("name", METHODS)
def test_no_patient_is_in_any_file_of_a_run(name: str, world: World, finished: Callable[[str], Path]) -> None:
    inspected = {path: path.read_bytes() for path in files(finished(name))}
    assert any(path.suffix == ".safetensors" for path in inspected)
    found = [(path.name, mark) for path, content in inspected.items() for mark in world.marks if mark in content]
    assert found == []
    source = (world.folder / "train.jsonl").read_bytes()
    assert sum(mark in source for mark in world.marks) == 1 + 2 * N_TRAIN  # the search finds what is there


def test_the_certificate_keeps_its_promise(finished: Callable[[str], Path]) -> None:
    spent = json.loads((finished("dp_lora") / "privacy.json").read_text())
    assert 0 < spent["epsilon"] <= 8.0 and spent["private"] is True
    assert (spent["delta"], spent["unit"], spent["n_units"], spent["n_steps"]) == (1e-2, "mrn", N_TRAIN, 3)


MEMORIZATION = {
    *("extraction_rate", "extraction", "membership_auc", "membership_tpr_at_fpr_0.01", "membership_tpr_at_fpr_0.001"),
    *("membership", "identifier_extraction_rate", "identifier_extraction", "canary_exposure", "identifier_leak_rate"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_evaluation_follows_the_contract(name: str, finished: Callable[[str], Path]) -> None:
    result = json.loads((finished(name) / "evaluation.json").read_text())
    assert {"model", "utility", "memorization", "reference", "not_applicable", "settings", "counts"} <= set(result)
    assert {"f1_weighted", "f1_macro", "f1_micro", "accuracy", "perplexity"} <= set(result["utility"])
    assert set(result["memorization"]) >= MEMORIZATION
    assert {"utility", "memorization"} <= set(result["reference"]["base_model"])
    assert {"extraction_rate", "identifier_extraction_rate"} <= set(result["reference"]["heldout"])
    assert result["memorization"]["extraction"].keys() == {"p4_n4", "p4_n8"}
    assert result["memorization"]["membership_attack"] == "reference"
    measured = dict(figures(result))
    assert len(measured) > 30
    for key, figure in measured.items():
        assert figure["low"] <= figure["value"] <= figure["high"], key
        assert figure["higher_is"] in ("better", "worse") and figure["n"] > 0, key
    missing = {key for key in nulls(result) if not any(part in key for part in (".low", ".high"))}
    assert missing <= set(result["not_applicable"])
    assert all(isinstance(why, str) and why for why in result["not_applicable"].values())


def nulls(tree: Any, at: str = "") -> list[str]:
    if tree is None:
        return [at]
    if not isinstance(tree, dict) or at in ("settings", "model", "counts"):
        return []
    return [key for name, value in tree.items() for key in nulls(value, f"{at}.{name}" if at else name)]


@pytest.mark.parametrize("name", METHODS)
def test_weights_load_with_plain_libraries(name: str, world: World, finished: Callable[[str], Path]) -> None:
    folder = finished(name) / weights_of(name)
    if weights_of(name) == "adapter":
        base = transformers.AutoModelForCausalLM.from_pretrained(world.base)
        model = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, transformers.LlamaForCausalLM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("fever")["input_ids"] == tiny_models.make_tokenizer()("fever")["input_ids"]
    before = transformers.AutoModelForCausalLM.from_pretrained(world.base).state_dict()
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved


def test_sani_on_an_adapter_starts_from_the_merged_model(world: World, finished: Callable[[str], Path]) -> None:
    """All weights are then repaired: a merged adapter leaves its base frozen."""
    folder = finished("sani_from_lora")
    assert not (folder / "model" / "adapter_config.json").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["erased_neurons"] == {"1": 32}  # half of 64 neurons in the last of two blocks
    base = transformers.AutoModelForCausalLM.from_pretrained(world.base)
    start = peft.PeftModel.from_pretrained(base, str(finished("lora") / "adapter")).merge_and_unload().state_dict()
    end = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    off = {key: float((end[key] - start[key]).abs().max()) for key in start}
    assert all(0 < value < 0.5 for value in off.values()), off


@pytest.mark.parametrize("method", ["lora", "dp_lora"])
def test_training_goes_on_from_an_adapter(
    method: str, world: World, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    start = finished("lora") / "adapter"
    recipe = world.recipe(method, model={"path": str(start), "base": str(world.base)})
    pipeline.train(recipe, tmp_path / "run")
    before, after = (load_file(at / "adapter_model.safetensors") for at in (start, tmp_path / "run" / "adapter"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base)


# --- Bad input --------------------------------------------------------------------------------------------------------


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be reached")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluation, training_setup):
        monkeypatch.setattr(module, "load_model", forbidden)
    monkeypatch.setattr(pipeline, "load_tokenizer", forbidden)


BUDGETS: list[tuple[dict[str, Any], str]] = [
    ({"target_epsilon": 0.0}, "privacy.target_epsilon"),
    ({"target_epsilon": -1.0}, "privacy.target_epsilon"),
    ({"delta": 1 / N_TRAIN}, "delta"),
    ({"delta": 0.0}, "delta"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"expected_batch_units": N_TRAIN + 1}, "expected_batch_units"),
    ({"max_records_per_unit": 0}, "max_records_per_unit"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("privacy", "word"), BUDGETS)
def test_impossible_budgets_are_refused_before_a_model_loads(
    privacy: dict[str, float], word: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=word) as caught:
        pipeline.train(world.recipe("dp_lora", privacy=privacy), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lerning_rate": 1}, "training.extra.lerning_rate is no field of LoRATrainingConfig"),
        ({"seed": 1}, "training.extra.seed is set by the recipe's own keys"),
        ({"optim": "none_such"}, "training: "),
    ],
)
def test_bad_extra_arguments_are_named(extra: dict[str, Any], message: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline.train(world.recipe(training={"extra": extra}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("part", "units", "message"),
    [
        ("heldout", range(N_TRAIN - 1, N_TRAIN + 2), "train and heldout share 1 units"),
        ("validation", range(N_TRAIN - 2, N_TRAIN), "train and validation share 2 units"),
        ("validation", range(N_TRAIN, N_TRAIN + 1), "heldout and validation share 1 units"),
    ],
)
def test_overlap_is_refused(part: str, units: range, message: str, world: World, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "part.jsonl", units)
    with pytest.raises(InputError, match=message):
        pipeline.train(world.recipe(data={part: str(file)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_overlap_is_dropped_on_request(world: World, tmp_path: Path) -> None:
    changes = {
        "heldout": str(write_rows(tmp_path / "h.jsonl", range(N_TRAIN - 1, N_TRAIN + 3))),
        "validation": str(write_rows(tmp_path / "v.jsonl", range(N_TRAIN - 1, N_TRAIN + 5))),
        "on_overlap": "drop",
    }
    splits = pipeline.load_splits(world.recipe(data=changes).data, require_unit=True)
    assert splits.heldout is not None and splits.validation is not None
    assert (splits.n_overlap, len(set(splits.heldout["unit"])), len(splits.train)) == (3, 3, N_RECORDS)
    assert len(set(splits.validation["unit"])) == 2
    everyone = [set(part["unit"]) for part in (splits.train, splits.heldout, splits.validation)]
    assert len(set.union(*everyone)) == sum(map(len, everyone))


@pytest.mark.usefixtures("no_model")
def test_a_label_that_nobody_learns_is_refused_before_training(world: World, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "h.jsonl", range(N_TRAIN, N_TRAIN + 2), label="kidney")
    with pytest.raises(InputError, match=r"data\.heldout: 1 of its labels are in no training record") as caught:
        pipeline.train(world.recipe(data={"heldout": str(file)}), tmp_path / "run")
    assert "kidney" not in str(caught.value)


def test_checkpoints_come_no_later_than_asked_where_texts_are_cut(world: World, tmp_path: Path) -> None:
    """`save_every` counts epochs of records; windows are more, so that checkpoints come more often, never less."""
    recipe = world.recipe(data={"max_length": 24}, training={"save_every": 1.0})
    splits = pipeline.load_splits(recipe.data, require_unit=False)
    args = pipeline.training_arguments(recipe, tmp_path, n_examples=len(splits.train), n_units=N_TRAIN)
    tokenizer = tiny_models.make_tokenizer()
    spec = pipeline.task_spec(recipe, splits.train)
    trainer = pipeline.make_trainer(recipe, args, spec, None, splits, tokenizer)
    assert len(trainer.train_dataset) > N_RECORDS
    assert 1 <= args.save_steps <= math.ceil(len(trainer.train_dataset) / args.per_device_train_batch_size)
    assert pipeline.trainer_steps(trainer) == math.ceil(len(trainer.train_dataset) / 8)


# --- Thresholds -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.mark.parametrize(
    ("method", "validation", "source"),
    [("lora", False, "train"), ("dp_lora", False, None), ("dp_lora", True, "validation")],
)
def test_no_threshold_of_private_records_leaves_a_dp_run(
    method: str, validation: bool, source: str | None, encoder: World, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"multi_label": True}
    if validation:
        data |= {"validation": str(write_rows(tmp_path / "v.jsonl", range(N_TRAIN, N_TRAIN + 3)))}
        data |= {"heldout": str(write_rows(tmp_path / "h.jsonl", range(N_TRAIN + 3, N_TRAIN + 6)))}
    run = pipeline.train(encoder.recipe(method, task="classification", data=data), tmp_path / "run")
    card = read_task_card(tmp_path / "run" / "adapter")
    assert card is not None and card.labels == LABELS
    assert run["thresholds_from"] == source
    assert (card.thresholds is not None) is (source is not None)


# --- Evaluating a model that may not be ours --------------------------------------------------------------------------


def test_a_plain_model_folder_is_evaluated(world: World, tmp_path: Path) -> None:
    result = pipeline.evaluate(world.recipe(), tmp_path / "e", task_given=False)
    assert result == json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert result["model"]["task"] == "causal_lm" and result["model"]["method"] == "unknown"
    assert result["reference"]["base_model"] is None and "reference.base_model" in result["not_applicable"]
    assert json.loads((tmp_path / "e" / "run.json").read_text())["status"] == "finished"
    assert pipeline.evaluate(world.recipe(), tmp_path / "e", resume=True) == result
    other = world.recipe(model={"path": "another-model"})
    with pytest.raises(InputError, match=r"first model\.path"):
        pipeline.evaluate(other, tmp_path / "e", resume=True)


def test_an_adapter_is_evaluated_as_its_training_run_did(
    world: World, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = finished("lora") / "adapter"
    recipe = world.recipe(model={"path": str(adapter), "base": str(world.base)})
    result = pipeline.evaluate(recipe, tmp_path / "e")
    own = json.loads((finished("lora") / "evaluation.json").read_text())
    assert result["utility"] == own["utility"] and result["memorization"] == own["memorization"]


@pytest.mark.parametrize("given", [False, True])
def test_the_task_is_the_card_s_unless_given(
    given: bool, world: World, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def measure(model: Any, base: Any, tokenizer: Any, spec: Any, *_: Any) -> dict[str, Any]:
        prompts.append(spec.prompt)
        return {}

    monkeypatch.setattr(evaluation, "_measure", measure)
    recipe = world.recipe(model={"path": str(finished("lora") / "adapter")}, data={"prompt": "\nOther:"})
    pipeline.evaluate(recipe, tmp_path / "e", task_given=given)
    assert prompts == ["\nOther:" if given else "\nLabel:"]


def test_the_revision_of_a_hub_model_is_the_one_that_is_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(path: Any, *_: Any, revision: str | None = None) -> Any:
        asked.append((str(path), revision))
        return tiny_models.make_model("llama")

    monkeypatch.setattr(evaluation, "load_model", load)
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda path, *, revision: load(path, revision=revision))
    monkeypatch.setattr(evaluation, "_measure", lambda *_: {})
    recipe = world.recipe(model={"path": "owner/name", "base": "owner/base", "revision": "abc"})
    splits = pipeline.load_splits(recipe.data, require_unit=False)
    pipeline.evaluate_weights("owner/name", recipe, splits)
    assert asked == [("owner/name", "abc"), ("owner/name", "abc"), ("owner/base", None)]
    assert "revision: abc" in dump_recipe(recipe)


# --- The ledger -------------------------------------------------------------------------------------------------------


def test_two_runs_on_the_same_patients_compose_and_a_third_over_the_budget_starts_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"ledger": str(tmp_path / "ledger.sqlite"), "target_epsilon": 4.0}
    runs = [pipeline.train(world.recipe("dp_lora", privacy=own), tmp_path / str(i)) for i in range(2)]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    first, second = (json.loads((tmp_path / str(i) / "privacy.json").read_text()) for i in range(2))
    assert first["epsilon"] == second["epsilon"] == first["ledger"]["epsilon_of_all_runs"]
    composed = second["ledger"]["epsilon_of_all_runs"]
    assert first["epsilon"] < composed < 2 * first["epsilon"]
    monkeypatch.setattr(pipeline, "make_trainer", lambda *_: pytest.fail("a model was loaded"))
    third = world.recipe("dp_lora", privacy={**own, "budget_epsilon": composed * 1.01})
    with pytest.raises(BudgetError, match="budget"):
        pipeline.train(third, tmp_path / "third")
    assert not (tmp_path / "third").exists()
