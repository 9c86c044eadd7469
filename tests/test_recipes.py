"""Every shipped recipe loads, passes its check and opens with its commands; PHEE's and IU X-ray's runs really run.

The runs are those of the recipe's own grid, with its overrides, on a tiny model and made-up records of the columns that
`prepare` writes. Only sizes differ.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from dpmed import cli
from dpmed.errors import InputError
from dpmed.grid import Job, grid
from dpmed.pipeline import train
from dpmed.recipe import FrontierSection, Recipe
from dpmed.recipe_io import check_recipe, load_recipe, merge, shipped_recipes
from recipes.prepared import Row

NAMES = list(shipped_recipes())
FEW: dict[str, Any] = {
    "training": {"epochs": 1, "batch_size": 8, "save_every": 5},
    "privacy": {"expected_batch_units": 6, "delta": 1e-3},
    "evaluation": {"bootstrap": 10},
}


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_recipes_of_the_issue_are_shipped() -> None:
    assert {"demo/frontier.yaml", "phee/frontier.yaml", "iu_xray/frontier.yaml"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_passes_its_check(name: str) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe, frontier=recipe.frontier != FrontierSection())


def opening_commands(text: str) -> list[list[str]]:
    """The commands of the comment that a recipe opens with: lines indented by three blanks."""
    opening = text[: re.search(r"^[^#]", text, flags=re.MULTILINE).start()]  # type: ignore[union-attr]
    lines = re.findall(r"^#   (\S.*)$", opening, flags=re.MULTILINE)
    return [shlex.split(re.split(r" {2,}", line)[0]) for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_what_it_is_and_the_commands_that_run_it(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert re.match(r"# \w.*\.\n", text)
    ours = [words for words in opening_commands(text) if words[0] == "dpmed"]
    assert ours, "no dpmed command"
    for words in ours:
        assert words[1] in cli.VERBS
        assert name in words or words[1] == name.partition("/")[0]
        assert "--output_dir" in words
    for words in opening_commands(text):
        if words[:2] == ["python", "-m"]:
            assert words[2] == f"dpmed.recipes.{name.partition('/')[0]}.prepare"


@pytest.mark.parametrize("name", ["phee/frontier.yaml", "iu_xray/frontier.yaml"])
def test_a_recipe_reads_what_its_prepare_command_writes(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    prepare = next(words for words in opening_commands(text) if words[0] == "python")
    written = prepare[prepare.index("--output_dir") + 1]
    data = load_recipe(name).data
    sources = [source for source in (data.train, data.heldout, data.validation) if source]
    assert {Path(source).parent.as_posix() for source in sources} == {written}
    assert {data.text, data.label, data.unit, data.record_id} == set(Row.__annotations__)


# --- Runs -------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, labels: list[Any]) -> dict[str, str]:
    """train, validation and heldout files of made-up records in the columns of `prepare`; other patients in each."""
    files: dict[str, str] = {}
    for start, (split, n) in enumerate({"train": 24, "validation": 8, "heldout": 12}.items()):
        rows = [
            Row(
                text=f"Report {split} {i}. The {['heart', 'lung', 'bone'][i % 3]} shows finding {i * 7 % 11} today.",
                label=labels[i % len(labels)],
                unit=f"{start}-{i // 2}",
                record_id=f"{start}-{i}",
            )
            for i in range(n)
        ]
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return files


def smoke(name: str, kind: tiny_models.Kind, labels: list[Any], folder: Path, methods: list[str]) -> Recipe:
    """A shipped recipe on a tiny model and few records, with some of its methods and one of its epsilons."""
    recipe = load_recipe(name)
    model = folder / "base"
    whole: Any = tiny_models.make_model(kind)
    (whole.base_model if kind == "bert" else whole).save_pretrained(model)  # a sentence encoder has no head
    tiny_models.make_tokenizer().save_pretrained(model)
    files = write_rows(folder, labels)
    data = {split: file for split, file in files.items() if getattr(recipe.data, split)}
    overrides = recipe.frontier.overrides.items()
    shorter = {method: {**own, "training": {**own.get("training", {}), "epochs": 1}} for method, own in overrides}
    changes = {
        **FEW,
        "model": {"path": str(model)},
        "data": {**data, "max_length": 64},
        "frontier": {"methods": methods, "epsilons": [8.0], "overrides": shorter},
    }
    small = merge(recipe, changes)
    check_recipe(small, frontier=True)
    return small


def run_all(jobs: list[Job], output_dir: Path) -> dict[str, Path]:
    """Train the jobs of a grid in their order, in this process; returns their run folders."""
    folders = {job.name: output_dir / "runs" / job.name for job in jobs if job.method != "base"}
    for job in jobs:
        if job.method != "base":
            train(job.recipe, folders[job.name], name=job.name, setting=job.setting, method_name=job.method)
    return folders


def read(folder: Path, file: str) -> dict[str, Any]:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def test_phee_runs_with_its_own_settings(tmp_path: Path) -> None:
    labels = ["adverse", "therapeutic", "both"]
    recipe = smoke("phee/frontier.yaml", "llama", labels, tmp_path, ["full", "dp_lora", "sani"])
    jobs = grid(recipe, tmp_path / "out")
    assert [job.name for job in jobs] == ["base", "full-s0", "dp_lora-eps8-s0", "sani-s0"]
    rates = {job.method: job.recipe.training.learning_rate for job in jobs}
    assert rates["full"] != rates["dp_lora"] != rates["sani"]  # the overrides arrived
    folders = run_all(jobs, tmp_path / "out")
    for folder in folders.values():
        assert read(folder, "run.json")["status"] == "finished"
        evaluation = read(folder, "evaluation.json")
        assert 0 <= evaluation["utility"]["f1_weighted"]["value"] <= 1
        assert evaluation["memorization"]["identifier_extraction_indirect"] is not None  # evaluation.k of the recipe
        assert evaluation["reference"]["base_model"] is not None
    certificate = read(folders["dp_lora-eps8-s0"], "privacy.json")
    assert (certificate["private"], certificate["n_units"], certificate["unit"]) == (True, 12, "unit")
    assert 7.9 < certificate["epsilon"] <= 8.0
    assert sum(read(folders["sani-s0"], "run.json")["erased_neurons"].values()) > 0


def test_iu_xray_runs_with_its_own_settings(tmp_path: Path) -> None:
    labels = [["Cardiomegaly"], [], ["Edema", "Pneumonia"], ["No Finding"]]
    recipe = smoke("iu_xray/frontier.yaml", "bert", labels, tmp_path, ["full", "dp_lora"])
    folders = run_all(grid(recipe, tmp_path / "out"), tmp_path / "out")
    assert list(folders) == ["full-s0", "dp_lora-eps8-s0"]
    for name, weights in (("full-s0", "model"), ("dp_lora-eps8-s0", "adapter")):
        card = read(folders[name] / weights, "dpmed_task.json")
        assert card["pooling"] == "mean"
        assert card["labels"] == ["Cardiomegaly", "Edema", "No Finding", "Pneumonia"]
        assert len(card["thresholds"]) == 4  # from the validation records
        assert read(folders[name], "run.json")["thresholds_from"] == "validation"
        evaluation = read(folders[name], "evaluation.json")
        assert evaluation["utility"]["f1_micro"]["n"] == 12
        assert evaluation["memorization"]["membership"]["loss"] is not None
    assert read(folders["dp_lora-eps8-s0"], "privacy.json")["private"] is True


def test_a_recipe_on_other_columns_is_refused_before_training(tmp_path: Path) -> None:
    recipe = smoke("phee/frontier.yaml", "llama", ["adverse", "both"], tmp_path, ["full"])
    with pytest.raises(InputError, match="diagnosis"):
        train(merge(recipe, {"method": "full", "data": {"label": "diagnosis"}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
