"""Recipes: what YAML and flags mean, what is refused and in which words, and that writing one loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmed.errors import InputError
from dpmed.recipe import Recipe
from dpmed.recipe_help import attribute_texts, recipe_help
from dpmed.recipe_io import build_recipe, check_recipe, dump_recipe, load_recipe, merge, shipped_recipes
from dpmed.recipe_values import parse_yaml, recipe_keys

REQUIRED: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
MINIMAL = "model: {path: m}\ndata: {train: t.jsonl}\n"


def made(*flags: str) -> Recipe:
    return build_recipe(REQUIRED, where="r.yaml", flags=flags)


def load(folder: Path, text: str, *flags: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, flags)


def message(call: Any) -> str:
    """The one line of the InputError that `call` raises."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_yaml_and_flags_become_typed_values(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        MINIMAL + "training: {learning_rate: 5e-4, epochs: 2}\nprivacy:\nlora: {target_modules: [q, v]}\n",
        *("--training.batch_size", "4", "--frontier.epsilons", "[1,8]", "--data.label=null", "--data.unit", "5"),
        *("--training.extra.optim", "sgd", "--training.extra.foo.bar", "1", "--method=dp_lora"),
    )
    assert recipe.training.learning_rate == 5e-4
    assert type(recipe.training.epochs) is float
    assert recipe.training.batch_size == 4
    assert recipe.frontier.epsilons == [1.0, 8.0]
    assert recipe.data.label is None
    assert recipe.data.unit == "5"
    assert recipe.lora.target_modules == ["q", "v"]
    assert recipe.training.extra == {"optim": "sgd", "foo": {"bar": 1}}
    assert recipe.method == "dp_lora"


def test_flags_win_over_the_file_and_may_give_what_it_lacks(tmp_path: Path) -> None:
    recipe = load(tmp_path, "training: {epochs: 1}\n", "--model.path=m", "--data.train=t", "--training.epochs=7e0")
    assert recipe.training.epochs == 7


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("privacy.epsilon", "privacy.target_epsilon"),
        ("epochs", "training.epochs"),
        ("training.lr", "training.learning_rate"),
        ("training.num_train_epochs", "training.epochs"),
        ("data.trian", "data.train"),
        ("lora.r", "lora.rank"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, typo: str, meant: str) -> None:
    section, _, name = typo.rpartition(".")
    nested = f"{section}: {{{name}: 1}}\n" if section not in ("", "data") else f"{typo}: 1\n"
    from_file = message(lambda: load(tmp_path, MINIMAL + nested))
    assert f"recipe.yaml: unknown key '{typo}': did you mean '{meant}'" in from_file
    assert f"unknown key '{typo}': did you mean '{meant}'" in message(lambda: made(f"--{typo}", "1"))


def test_unknown_section_and_hopeless_key(tmp_path: Path) -> None:
    assert "'trainig': did you mean 'training'?" in message(lambda: load(tmp_path, MINIMAL + "trainig: {epochs: 1}\n"))
    assert "lists all keys" in message(lambda: made("--qqqq", "1"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {epochs: abc}", ["'training.epochs'", "got abc", "expected a number", "default is 3.0"]),
        ("training: {batch_size: 2.5}", ["'training.batch_size'", "got 2.5", "a whole number"]),
        ("training: {bf16: 1}", ["'training.bf16'", "true or false"]),
        ("training: {seed: true}", ["'training.seed'", "got true", "a whole number"]),
        ("training: 3", ["'training'", "got 3", "expected keys below it"]),
        ("evaluation: {fpr: 0.1}", ["'evaluation.fpr'", "a list, each item a number"]),
        ("evaluation: {fpr: [a]}", ["'evaluation.fpr'", "got [a]"]),
        ("method: dplora", ["'method'", "one of full, lora, dp_lora, sani, unlearn"]),
        ("lora: {target_modules: 4}", ["'lora.target_modules'", "text or a list", "quotes"]),
        ("sani: {k: null}", ["'sani.k'", "got null"]),
        ("privacy: {delta: x}", ["'privacy.delta'", "a number or null"]),
        ("frontier: {overrides: {full: 3}}", ["'frontier.overrides'", "keys and values"]),
        ("frontier: {methods: [full, x]}", ["'frontier.methods'", "got [full, x]"]),
    ],
)
def test_wrong_type_says_key_got_and_expected(tmp_path: Path, text: str, parts: list[str]) -> None:
    said = message(lambda: load(tmp_path, f"{MINIMAL}{text}\n"))
    assert [part for part in parts if part not in said] == []


def test_a_required_text_refuses_null() -> None:
    assert "'model.path': got null, expected text" in message(
        lambda: build_recipe({"model": {"path": None}, "data": {"train": "t"}}, where="r")
    )


def test_wrong_type_of_a_flag_names_the_flag() -> None:
    assert message(lambda: made("--training.epochs", "abc")).startswith("--training.epochs: got abc, expected a number")


@pytest.mark.parametrize("flags", [["--training.epochs"], ["--training.epochs", "--data.unit", "p"]])
def test_flag_without_value(flags: list[str]) -> None:
    assert message(lambda: made(*flags)).startswith("--training.epochs: needs a value")


def test_stray_argument_is_refused() -> None:
    assert message(lambda: made("3")).startswith("unexpected argument '3'")


@pytest.mark.parametrize(("text", "key"), [("model: {path: m}\n", "data.train"), ("data: {train: t}\n", "model.path")])
def test_missing_key(tmp_path: Path, text: str, key: str) -> None:
    assert f"recipe.yaml: missing key '{key}'" in message(lambda: load(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {path: m}\ndata: {train: t\nx: 1\n", "recipe.yaml: line 3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "recipe.yaml: line 2: not valid YAML"),
        ("method: full\nmethod: lora\n", "recipe.yaml: line 2: not valid YAML (the key 'method' stands twice)"),
        ("a: !!python/object:os.system {}\n", "line 1: not valid YAML (could not determine a constructor"),
        ("a: 2024-13-45\n", "not valid YAML (ValueError)"),
        ("", "got nothing"),
        ("- 1\n", "got [1], expected a recipe"),
    ],
)
def test_malformed_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(lambda: load(tmp_path, text))


def test_missing_file_names_shipped_recipes(tmp_path: Path) -> None:
    said = message(lambda: load_recipe(tmp_path / "none.yaml"))
    assert "none.yaml: no such recipe file" in said and "dpmed recipe ls" in said
    assert "is a folder" in message(lambda: load_recipe(tmp_path))


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model: \xff\n")
    assert "cannot be read (UnicodeDecodeError)" in message(lambda: load_recipe(tmp_path / "r.yaml"))


def test_shipped_recipes_load_by_name_and_pass_the_checks() -> None:
    root = Path(__file__).resolve().parents[1] / "recipes"
    assert set(shipped_recipes()) == {file.relative_to(root).as_posix() for file in root.rglob("*.yaml")}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        check_recipe(recipe, frontier="frontier" in parse_yaml(shipped_recipes()[name].read_text("utf-8"), where=name))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "1e-3",
        "5e4",
        "[a]",
        "yes",
        "on",
        "",
        " x ",
        "a: b",
        "@x",
        "=",
        "<<",
        "2024-01-01",
        "\n",
        "0x1f",
        "1_0",
    ]
)
floats = st.floats(allow_nan=False, allow_infinity=False)


@given(
    prompt=texts,
    unit=st.none() | texts,
    modules=texts | st.lists(texts, max_size=3),
    rate=floats,
    epsilons=st.lists(floats, max_size=3),
    seed=st.integers(),
    extra=st.dictionaries(texts, texts | st.integers() | floats | st.none() | st.booleans(), max_size=3),
)
def test_a_dumped_recipe_reads_back_equal(
    prompt: str, unit: Any, modules: Any, rate: float, epsilons: list[float], seed: int, extra: dict[str, Any]
) -> None:
    recipe = made("--method=dp_lora")
    recipe.data.prompt, recipe.data.unit, recipe.lora.target_modules = prompt, unit, modules
    recipe.training.learning_rate, recipe.training.seed, recipe.training.extra = rate, seed, extra
    recipe.frontier.epsilons = epsilons
    assert build_recipe(parse_yaml(dump_recipe(recipe), where="dump"), where="dump") == recipe


def test_a_dumped_recipe_opens_with_the_method_and_holds_every_key() -> None:
    text = dump_recipe(made())
    assert text.startswith("method: lora\ntask: causal_lm\n")
    values = parse_yaml(text, where="dump")
    assert all(values[k.split(".")[0]][k.split(".")[1]] is not ... if "." in k else k in values for k in recipe_keys())


def test_merge_copies_and_keeps_the_rest() -> None:
    recipe = made("--training.extra", "{a: 1}", "--training.epochs", "9")
    changed = merge(recipe, {"training": {"learning_rate": 2, "extra": {"b": 2}}, "method": "full"})
    assert (changed.training.learning_rate, changed.training.epochs, changed.method) == (2.0, 9.0, "full")
    assert changed.training.extra == {"a": 1, "b": 2}
    assert recipe == made("--training.extra", "{a: 1}", "--training.epochs", "9")
    changed.training.extra["c"] = 3
    assert "c" not in recipe.training.extra


def test_merge_refuses_as_a_file_does() -> None:
    said = message(lambda: merge(made(), {"training": {"lr": 1}}, where="frontier.overrides.full"))
    assert said == "frontier.overrides.full: unknown key 'training.lr': did you mean 'training.learning_rate'?"
    assert "expected a number" in message(lambda: merge(made(), {"training": {"epochs": "x"}}))


@pytest.mark.parametrize(
    "flag",
    [
        *("privacy.target_epsilon=0", "privacy.target_epsilon=-1", "privacy.target_epsilon=.inf", "privacy.delta=0"),
        *("privacy.delta=1", "privacy.clip_norm=0", "privacy.clip_norm=.nan", "privacy.expected_batch_units=0"),
        *("privacy.max_records_per_unit=0", "training.epochs=0", "training.learning_rate=0", "training.batch_size=0"),
        *(
            "lora.rank=0",
            "lora.dropout=1",
            "sani.erase_fraction=1.1",
            "sani.erase_fraction=-0.1",
            "sani.k=0",
            "unlearn.beta=0",
            "unlearn.alpha=0",
            "unlearn.retain_weight=-1",
            "unlearn.k=0",
        ),
        *("evaluation.prefix_tokens=[]", "evaluation.suffix_tokens=[5, 0]", "evaluation.fpr=[0]", "evaluation.fpr=[]"),
        *("evaluation.fpr=[1.0]", "evaluation.max_records=0", "frontier.methods=[]", "frontier.seeds=[]"),
        *("frontier.seeds=[1, 1]", "frontier.epsilons=[0]", "frontier.methods=[full, full]"),
    ],
)
def test_check_refuses_values_out_of_range(flag: str) -> None:
    recipe = made(f"--{flag}")
    assert message(lambda: check_recipe(recipe)).startswith(flag.partition("=")[0] + ": ")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--method=dp_lora"], "dp_lora needs the patient column: set data.unit"),
        (["--method=sani", "--task=classification", "--data.label=l"], "method: sani repairs a language model"),
        (["--method=unlearn", "--task=classification", "--data.label=l"], "method: unlearn works on a language model"),
        (["--task=classification"], "set data.label"),
        (["--data.loss_on=completion"], "data.loss_on: completion"),
        (["--data.multi_label=true"], "data.multi_label: needs"),
    ],
)
def test_check_refuses_combinations(flags: list[str], part: str) -> None:
    assert part in message(lambda: check_recipe(made(*flags)))


def grid(*flags: str) -> Recipe:
    return made("--data.heldout=h.jsonl", "--data.unit=p", *flags)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.unit=null"], "frontier.methods: dp_lora needs the patient column"),
        (["--data.heldout=null"], "data.heldout: a frontier needs"),
        (["--frontier.epsilons=[]"], "frontier.epsilons: the list is empty"),
        (["--frontier.overrides.ful.training.epochs=1"], "unknown method 'ful': did you mean 'full'?"),
        (["--frontier.overrides.full.training.lr=1"], "frontier.overrides.full: unknown key 'training.lr'"),
        (["--frontier.overrides.full.training.epochs=0"], "frontier.overrides.full: training.epochs: got 0.0"),
        (["--frontier.overrides.full.method=lora"], "frontier.overrides.full: 'method' is the same for all runs"),
        (["--frontier.grids.ful.training.epochs=[1]"], "frontier.grids: unknown method 'ful'"),
        (["--frontier.grids.npo.training.epochs=[1]"], "npo is not among frontier.methods"),
        (["--frontier.grids.full.training.epochs=[1, 2]"], "other methods start from the full run"),
        (["--frontier.grids.lora.training.epochs=2"], "'training.epochs': expected a dotted key and a list"),
        (["--frontier.grids.lora.training.epochs=[]"], "'training.epochs': expected a dotted key and a list"),
        (["--frontier.grids.lora.training.epochs=[1, 1]"], "the same value stands twice"),
        (["--frontier.grids.lora.training.epochs=[1, 0]"], "frontier.grids.lora: training.epochs: got 0.0"),
        (["--frontier.grids.lora.training.epoch=[1]"], "frontier.grids.lora: unknown key 'training.epoch'"),
        (["--frontier.grids.lora.training.seed=[1]"], "'training.seed' is varied by frontier.seeds"),
        (["--frontier.grids.dp_lora.privacy.target_epsilon=[1]"], "varied by frontier.epsilons"),
        (["--frontier.grids={lora: {method: [full]}}"], "'method': expected a dotted key"),
        (
            ["--task=classification", "--data.label=l", "--frontier.methods=[full, repair_only]"],
            "frontier.methods: repair_only repairs a language model",
        ),
    ],
)
def test_check_of_a_grid(flags: list[str], part: str) -> None:
    assert part in message(lambda: check_recipe(grid(*flags), frontier=True))


def test_check_passes_what_can_work() -> None:
    check_recipe(made())
    check_recipe(grid(), frontier=True)
    check_recipe(grid("--frontier.methods=[full]", "--frontier.epsilons=[]", "--data.unit=null"), frontier=True)
    check_recipe(grid("--frontier.overrides.full.training.epochs=2"), frontier=True)
    check_recipe(grid("--frontier.grids.sani.sani.erase_layers=[1, all, [0, 2]]"), frontier=True)
    check_recipe(grid("--frontier.grids={sani: {training.epochs: [0, 1]}}"), frontier=True)
    check_recipe(replace(made("--data.unit=p"), method="dp_lora"))


def test_every_key_has_a_help_text() -> None:
    found = attribute_texts()
    assert [key for key in recipe_keys() if not found.get(key)] == []


def test_help_shows_flag_meaning_type_and_default() -> None:
    text = recipe_help(["data.train", "data.prompt", "training.epochs"])
    assert "  --training.epochs\n        Passes over the records" in text
    text = " ".join(text.split())
    assert "(a number; default: 3.0)" in text and "(text; required)" in text and '"\\nLabel:"' in text
