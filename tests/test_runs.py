"""Run folders: private, never overwritten, never half-written and taken for whole."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from dpmed import runs
from dpmed.errors import InputError
from dpmed.runs import (
    RUN_FILE,
    check_same_recipe,
    claim_output_dir,
    is_finished,
    last_checkpoint,
    mark_whole,
    read_json,
    replace_folder,
    write_json,
    write_text,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def open_umask() -> object:
    """Modes must not depend on the user's umask."""
    before = os.umask(0)
    yield
    os.umask(before)


# --- Claiming a folder ------------------------------------------------------------------------------------------------


def test_a_new_folder_is_private(tmp_path: Path) -> None:
    claim_output_dir(tmp_path / "a" / "b", resume=False)
    assert mode(tmp_path / "a" / "b") == 0o700


def test_an_empty_folder_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    claim_output_dir(tmp_path / "open", resume=False)
    assert mode(tmp_path / "open") == 0o700


def test_a_folder_that_holds_anything_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("kept")
    with pytest.raises(InputError, match="is not empty; choose another --output_dir, or add --resume"):
        claim_output_dir(tmp_path, resume=False)
    claim_output_dir(tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == [".hidden"]
    assert (tmp_path / ".hidden").read_text() == "kept"


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_way_is_refused(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("kept")
    with pytest.raises(InputError, match="is a file"):
        claim_output_dir(tmp_path / "x", resume=resume)
    with pytest.raises(InputError, match="cannot be made"):  # its parent is a file
        claim_output_dir(tmp_path / "x" / "y", resume=resume)
    assert (tmp_path / "x").read_text() == "kept"


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_files_are_private_and_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("old")
    file.chmod(0o644)
    write_text(file, "Émile\n")
    assert file.read_bytes() == "Émile\n".encode()
    assert mode(file) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    write_text(file, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new" * 10_000)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment before the move, the old file is whole and the new one lies beside it, whole."""
    file, seen = tmp_path / "x.txt", []
    write_text(file, "old")
    move = os.replace

    def replace(source: str, target: Path) -> None:
        seen.append((Path(target).read_text(), Path(source).read_text(), mode(Path(source))))
        move(source, target)

    monkeypatch.setattr(runs.os, "replace", replace)
    write_text(file, "new")
    assert seen == [("old", "new", 0o600)]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_other_readers_do_not_take(number: float, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": {"b": [number]}})
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_reading_json_says_what_is_wrong_without_content(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is missing; is .* a run folder"):
        read_json(tmp_path / "none.json")
    for bad in (b'{"Zorblax": ', b"\xff\xfe Zorblax"):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(InputError, match="is not valid JSON") as caught:
            read_json(tmp_path / "bad.json")
        assert "Zorblax" not in str(caught.value)


# --- Whole or not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "finished"), [({"status": "running"}, False), ({}, False), (None, False)])
def test_only_the_status_finished_is_finished(content: dict | None, finished: bool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "evaluation.json").write_text("{}")
    if content is not None:
        write_json(tmp_path / RUN_FILE, content)
    assert is_finished(tmp_path) is finished
    write_json(tmp_path / RUN_FILE, {"status": "finished"})
    assert is_finished(tmp_path)
    assert not is_finished(tmp_path / "none")


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        mark_whole(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"  # the newest by number, not by name


@pytest.mark.parametrize("before", [None, {"old": "1", "stale": "2"}])
def test_a_folder_is_replaced_whole(before: dict[str, str] | None, tmp_path: Path) -> None:
    final, partial = tmp_path / "model", tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "old").write_text("new")
    for name, text in (before or {}).items():
        final.mkdir(exist_ok=True)
        (final / name).write_text(text)
    replace_folder(partial, final)
    assert {p.name: p.read_text() for p in final.iterdir()} == {"old": "new"}
    assert not partial.exists()


# --- The recipe of a resumed run --------------------------------------------------------------------------------------

RECIPE = {"method": "lora", "model": {"path": "a"}, "data": {"train": "t", "label": "y"}, "training": {"epochs": 3}}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"training": {"epochs": 4}}, "training.epochs"),
        ({"training": {"epochs": 3, "seed": 1}}, "training.seed"),
        ({"training": {}}, "training.epochs"),
        ({"method": "full"}, "method"),
        ({"data": {"train": "t", "label": "z"}}, "data.label"),
        ({"model": {"path": "b"}}, "model.path"),
    ],
)
def test_another_recipe_cannot_resume(change: dict, key: str, tmp_path: Path) -> None:
    write_text(tmp_path / "recipe.yaml", json.dumps(RECIPE))  # JSON is YAML
    with pytest.raises(InputError, match=f"the recipe changed since this run was started, first {key};"):
        check_same_recipe(tmp_path, json.dumps(RECIPE | change), weights_may_move=True)


def test_other_places_and_another_grid_may_resume(tmp_path: Path) -> None:
    check_same_recipe(tmp_path, json.dumps(RECIPE), weights_may_move=False)
    started = RECIPE | {"model": {"path": "a/full", "base": "gpt2"}}
    write_text(tmp_path / "recipe.yaml", json.dumps(started))
    moved = {"data": {"train": "elsewhere", "label": "y"}, "frontier": {"seeds": [1]}}
    check_same_recipe(tmp_path, json.dumps(started | moved), weights_may_move=False)
    moved |= {"model": {"path": "b/full", "base": "gpt2"}}
    check_same_recipe(tmp_path, json.dumps(started | moved), weights_may_move=True)
    with pytest.raises(InputError, match=r"model\.path"):
        check_same_recipe(tmp_path, json.dumps(started | moved), weights_may_move=False)
