"""The documentation is run: commands, recipes and Python blocks, on a tiny model and made-up notes. Every link holds.

README and quickstart are one story, read from top to bottom in one folder: a reader who copies the blocks in order gets
what this test gets. Only the sizes differ (`SMALLER`).
"""

from __future__ import annotations

import importlib
import random
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

import tiny_models
from dpmed import cli, environment
from dpmed.privacy.plan import NOT_COVERED
from dpmed.recipe import Method
from dpmed.recipe_help import attribute_texts
from dpmed.recipe_io import build_recipe, check_recipe
from dpmed.recipe_values import expected, parse_yaml, recipe_keys, recipe_sections, shown

ROOT = Path(__file__).resolve().parents[1]
STORY = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "csv", ""}
README_LINES = 150

FEWER = "--evaluation.bootstrap 20 --training.epochs 1"
SMALLER = {
    "frontier": shlex.split(f"--frontier.methods '[dp_lora]' --frontier.epsilons '[8.0]' {FEWER}"),
    "train": shlex.split(FEWER),
    "evaluate": shlex.split("--evaluation.bootstrap 20"),
}
"""Flags put behind a documented command, so that the same command takes seconds."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            text = "\n".join(lines[opened + 1 : number]) + "\n"
            found.append(Block(page, opened + 1, lines[opened][3:].strip(), text))
            opened = None
    assert opened is None, f"{page.name}: a block that opens at line {(opened or 0) + 1} is never closed"
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a block; a comment behind a command is not part of it."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in ALL_BLOCKS if block.language == "bash"]
YAML = [block for block in ALL_BLOCKS if block.language == "yaml"]


def by_place(block: Block) -> str:
    return block.where


# --- The story ------------------------------------------------------------------------------------------------------


def write_notes(file: Path, example: str) -> None:
    """The documented rows, and made-up ones of the same columns: 40 patients, two notes each."""
    assert example.splitlines()[0] == "patient_id,text,diagnosis"
    rng = random.Random(0)
    rows = [
        f"q{patient:03d},Visit {visit + 1}. Complains of {rng.choice(signs)} for {rng.randint(2, 60)} days "
        f"and of {rng.choice(signs)}; note {patient}-{visit}.,{group}"
        for patient in range(40)
        for group, signs in [rng.choice([("lung", ["cough", "wheezing"]), ("heart", ["murmur", "swelling"])])]
        for visit in range(2)
    ]
    file.write_text(example + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `models/base` and `models/checkpoint`, made the current one; the story's files go there."""
    folder = tmp_path_factory.mktemp("story")
    for seed, name in enumerate(("base", "checkpoint")):
        tiny_models.make_model("gpt2", seed=seed).save_pretrained(folder / "models" / name)
        tiny_models.make_tokenizer().save_pretrained(folder / "models" / name)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment.OFFLINE, **environment.QUIET}.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        yield folder


def play(block: Block, folder: Path) -> list[str]:
    """Do what a reader does with a block; returns the verbs of dpmed that ran."""
    if block.language == "csv":
        write_notes(folder / "notes.csv", block.text)
    elif block.language == "yaml":
        (folder / "notes.yaml").write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, block.where, "exec"), {"__name__": "story"})
    elif block.language == "bash":
        ran = []
        for words in commands(block):
            if words[0] == "dpmed":
                extra = [] if "--help" in words else SMALLER.get(words[1], [])
                assert cli.main([*words[1:], *extra]) == 0, f"{block.where}: {shlex.join(words)}"
                ran.append(words[1])
        return ran
    return []


def test_the_story_of_readme_and_quickstart_runs(folder: Path) -> None:
    ran = [verb for page in STORY for block in blocks(page) for verb in play(block, folder)]
    assert {"recipe", "frontier", "evaluate", "report", "train", "calibrate", "tag", "env"} <= set(ran)
    named = set(re.findall(r"--output_dir (runs/\S+)", "".join(b.text for p in STORY for b in blocks(p))))
    for output in named - {"runs/demo"}:
        assert (folder / output).is_dir(), output
    report = (folder / "runs" / "report" / "report.html").read_text(encoding="utf-8")
    assert "dp_lora" in report and "Complains of" not in report
    for file in ("adapter", "privacy.json", "evaluation.json", "run.json", "metrics.jsonl", "recipe.yaml"):
        assert (folder / "runs" / "one" / file).exists(), file


def test_no_block_outside_the_story_needs_to_be_run_by_a_reader() -> None:
    """Python and dpmed commands stand where they are run; a page that gets some must join `STORY`."""
    stray = [
        block.where
        for block in ALL_BLOCKS
        if block.page not in STORY
        and (block.language == "python" or (block.language == "bash" and "dpmed " in block.text))
    ]
    assert stray == []


# --- Other commands ---------------------------------------------------------------------------------------------------


def wrong_command(words: list[str]) -> str | None:
    """Why a command that is too expensive to run here cannot work, or None."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return None if words[1] in targets else f"the Makefile has no target {words[1]}"
    if words[:2] == ["pip", "install"]:
        files = [word for word in words[2:] if word.endswith(".txt")]
        return next((f"{file} is not there" for file in files if not (ROOT / file).is_file()), None)
    if words[:2] == ["python", "-m"]:
        return wrong_prepare(words[2], words[3:])
    return None if words[0] == "dpmed" and words[1] in cli.VERBS else f"unknown command {words[0]}"


def wrong_prepare(module: str, arguments: list[str]) -> str | None:
    """Whether `python -m dpmed.recipes.X.prepare` knows its documented flags; its help says which there are."""
    if not re.fullmatch(r"dpmed\.recipes\.\w+\.prepare", module):
        return f"{module} is none of ours"
    source = ROOT / "recipes" / module.split(".")[2] / "prepare.py"
    known = re.findall(r'add_argument\("(--\w+)"', source.read_text(encoding="utf-8")) if source.is_file() else []
    return next((f"{module} has no {word}" for word in arguments if word.startswith("--") and word not in known), None)


@pytest.mark.parametrize("block", BASH, ids=by_place)
def test_every_command_exists(block: Block) -> None:
    assert [problem for words in commands(block) if (problem := wrong_command(words))] == []


def test_commands_of_the_data_sets_exist() -> None:
    found = [b for b in ALL_BLOCKS if b.language == "" and b.text.startswith("python -m")]
    assert found
    assert [problem for b in found for words in commands(b) if (problem := wrong_command(words))] == []


@pytest.mark.parametrize(
    "wrong",
    ["make tea", "pip install -c nothing.txt", "dpmed brew", "curl x", "python -m dpmed.recipes.phee.prepare --tea x"],
)
def test_the_command_check_sees_a_wrong_command(wrong: str) -> None:
    assert wrong_command(shlex.split(wrong)) is not None


def test_blocks_have_a_language_that_is_checked() -> None:
    assert {block.language for block in ALL_BLOCKS} <= LANGUAGES


# --- Recipes ----------------------------------------------------------------------------------------------------------

REST: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": "train.jsonl", "heldout": "heldout.jsonl", "label": "label", "unit": "unit"},
}


def as_recipe(text: str) -> None:
    """Check a documented recipe, or a part of one with the rest filled in."""
    values = parse_yaml(text, where="the block")
    recipe = build_recipe({**REST, **values}, where="the block")
    check_recipe(recipe, frontier="frontier" in values)


@pytest.mark.parametrize("block", YAML, ids=by_place)
def test_every_yaml_block_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    as_recipe(block.text)


@pytest.mark.parametrize("wrong", ["lora: {rnk: 8}\n", "privacy: {delta: 2.0}\n", "tea: 1\n"])
def test_the_recipe_check_sees_a_wrong_one(wrong: str) -> None:
    with pytest.raises(Exception, match=r"rnk|delta|tea"):
        as_recipe(wrong)


def reference_rows() -> list[str]:
    """One table row per recipe key, from `recipe.py` itself. A bar inside a cell would end it, so there is none."""
    texts = attribute_texts()
    rows: list[str] = []
    for key, entry in recipe_keys().items():
        default = "required" if entry.required else f"`{shown(entry.default)}`"
        meaning = " ".join(texts.get(key, "").split()).replace(" | ", ", ")
        rows.append(f"| `{key}` | {expected(entry.hint)} | {default} | {meaning} |")
    return rows


def test_the_reference_lists_every_recipe_key_as_it_is() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if re.match(r"\| `[a-z0-9_.]+` \|", line)]
    assert sorted(listed) == sorted(reference_rows())
    assert {f"## {name}" for name in recipe_sections()} <= set(page.splitlines())


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_its_page(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    assert [h for h in ("## Steps", "## Keys", "## Where it comes from", "## What it cannot do") if h not in page] == []


# --- Links and names --------------------------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    return [target for target in local if target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_are_there(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_the_link_check_sees_a_broken_link() -> None:
    assert broken_links(STORY[0], "[a](docs/no.md) [b](docs/log.md) [c](https://x.org)") == ["docs/no.md"]


def test_the_readme_is_short_and_keeps_its_place_for_the_demos_figures() -> None:
    text = STORY[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert re.search(r"<!-- demo-table -->.*<!-- /demo-table -->", text, flags=re.DOTALL)


def missing_tests(text: str) -> list[str]:
    """Tests that a page names and that do not exist."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    return [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]


def test_the_tests_that_the_pitfalls_name_exist() -> None:
    page = (ROOT / "docs" / "privacy" / "pitfalls.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    assert len(rows) >= 19
    assert [row for row in rows if "::test_" not in row] == []
    assert missing_tests(page) == []


def test_the_check_of_names_sees_a_test_that_is_not_there() -> None:
    assert missing_tests("`tests/test_docs.py::test_nothing_of_this_name`") != []


def test_the_guarantee_lists_what_the_certificate_does_not_cover() -> None:
    page = (ROOT / "docs" / "privacy" / "guarantee.md").read_text(encoding="utf-8")
    assert [item for item in NOT_COVERED if f"- {item}\n" not in page] == []


def test_pages_name_only_public_python_names() -> None:
    names = {n for p in PAGES for n in re.findall(r"from dpmed import ([\w, ]+)", p.read_text(encoding="utf-8"))}
    public = importlib.import_module("dpmed").__all__
    assert {name.strip() for group in names for name in group.split(",")} <= set(public)
