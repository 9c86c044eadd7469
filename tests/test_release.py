"""The release gate: verdicts on intervals, a memoriser that fails, a clean model that does not, and restarts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MARKER, World, make_world

from dpmed import release
from dpmed.data.tasks import encode
from dpmed.errors import BudgetError, GateError, InputError
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.models import load_model, load_tokenizer
from dpmed.pipeline import load_splits
from dpmed.recipe import Recipe
from dpmed.relearning import relearn
from dpmed.release import decide, overall, release_gate, unpaired_difference, weights_digest
from dpmed.release_utility import rare_words_tagged, span_tokens, utility_losses
from dpmed.report.evidence import build_evidence_page
from dpmed.report.evidence_wording import CHECKS
from dpmed.splits import Splits, task_spec

STAGES = {"as_released", "bfloat16", "int8", "int4", "relearned", "relearned_public", "utility"}


@given(low=st.floats(-1, 1), width=st.floats(0, 1), threshold=st.floats(-1, 1))
def test_a_verdict_is_decided_on_the_interval(low: float, width: float, threshold: float) -> None:
    high = low + width
    verdict = decide("s", "c", Measure((low + high) / 2, low, high, 9, "worse"), threshold)["verdict"]
    assert (verdict == "pass") == (high <= threshold)
    assert (verdict == "fail") == (low > threshold)
    assert verdict in ("pass", "fail", "not_shown")


def test_a_bound_that_is_missing_shows_nothing_and_a_reason_is_kept() -> None:
    assert decide("s", "c", Measure(0.0, math.nan, math.nan, 3, "worse"), 0.5)["verdict"] == "not_shown"
    row = decide("s", "c", NotApplicable("no labels"), 0.5)
    assert (row["verdict"], row["reason"], row["value"]) == ("not_tested", "no labels", None)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "not_tested"], "pass"),
        (["pass", "not_shown", "fail"], "fail"),
        (["pass", "not_shown"], "not_shown"),
        (["not_tested"], "not_shown"),
        ([], "not_shown"),
    ],
)
def test_all_verdicts_together(verdicts: list[str], expected: str) -> None:
    assert overall([{"verdict": verdict} for verdict in verdicts]) == expected


def test_the_unpaired_difference_is_newcombes() -> None:
    first, second = (
        {"value": v, "low": a, "high": b, "n": n} for v, a, b, n in [(0.7, 0.6, 0.8, 80), (0.2, 0.1, 0.4, 50)]
    )
    found = unpaired_difference(first, second)
    assert found is not None
    assert found["value"] == pytest.approx(0.5) and found["n"] == 50
    assert found["low"] == pytest.approx(0.5 - math.sqrt(0.1**2 + 0.2**2))
    assert found["high"] == pytest.approx(0.5 + math.sqrt(0.1**2 + 0.1**2))
    assert unpaired_difference(None, second) is None


def test_the_error_of_a_gate_is_exit_status_3() -> None:
    assert issubclass(GateError, BudgetError) and GateError("x").exit_code == 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """As of `tiny_runs`, but the name stands behind what tells it: a model that knows a record can complete it."""
    made = make_world(tmp_path_factory.mktemp("world"))
    for file in (made.folder / "train.jsonl", made.folder / "heldout.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            span, text = row["spans"][0], row["text"]
            start = f"Case {chr(65 + int(row['mrn'][4:7]))}, {MARKER}, {text.split(', ')[1].split()[0]}"
            name = text[span["start"] : span["end"]]
            visit = text.split("visit ")[1][0]
            room = 100 + int(row["mrn"][4:7])
            row["text"] = f"{start}, patient {name} came for visit {visit}, room {room}."
            at = row["text"].index(name)
            row["spans"] = [{"start": at, "end": at + len(name), "type": "NAME"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def memoriser(world: World) -> Path:
    """The base model, trained until it knows its records by heart."""
    recipe = world.recipe("sani")
    splits, tokenizer = load_splits(recipe.data, require_unit=False), load_tokenizer(world.base)
    spec = task_spec(recipe, splits.train)
    model: Any = load_model(world.base, spec)
    relearn(model, tokenizer, spec, splits.train, steps=150, learning_rate=1e-2, batch_size=39, seed=0)
    folder = world.folder / "memoriser"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(world: World, before: Path) -> Recipe:
    model = {"path": str(before), "base": str(world.base)}
    return world.recipe("sani", model=model, release={"relearn_steps": 2})


def gated(world: World, before: Path, weights: Path, folder: Path) -> tuple[dict[str, Any], Recipe, Splits]:
    recipe = recipe_of(world, before)
    splits = load_splits(recipe.data, require_unit=False)
    return release_gate(weights, recipe, splits, folder), recipe, splits


@pytest.fixture(scope="module")
def of_memoriser(world: World, memoriser: Path) -> tuple[dict[str, Any], Path]:
    folder = world.folder / "gate"
    return gated(world, memoriser, memoriser, folder)[0], folder


def verdicts(evidence: dict[str, Any], check: str) -> dict[str, str]:
    rows = [*evidence["tested"], *evidence["not_tested"]]
    return {row["stage"]: row["verdict"] for row in rows if row["check"] == check}


def test_a_memoriser_fails_as_it_is_and_rounded(of_memoriser: tuple[dict[str, Any], Path]) -> None:
    evidence, folder = of_memoriser
    assert evidence["verdict"] == "fail"
    found = verdicts(evidence, "identifier_extraction_above_floor")
    assert found["as_released"] == found["int8"] == found["bfloat16"] == "fail"
    assert {path.stem for path in (folder / "release").iterdir()} == STAGES
    assert json.loads((folder / "evidence.json").read_text()) == evidence


def test_the_page_has_words_for_every_stage_and_measure_of_the_gate(
    of_memoriser: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    evidence, _ = of_memoriser
    rows = [*evidence["tested"], *evidence["not_tested"]]
    assert {row["check"] for row in rows} <= set(CHECKS)
    assert {row["stage"] for row in rows} == STAGES
    page = build_evidence_page(evidence, tmp_path / "evidence.html").read_text()
    assert "Not described in this version" not in page and "Do not release these weights: " in page


def test_what_was_not_tested_stands_with_its_reason(of_memoriser: tuple[dict[str, Any], Path]) -> None:
    reasons = {(row["stage"], row["check"]): row["reason"] for row in of_memoriser[0]["not_tested"]}
    assert "public_text" in reasons["relearned_public", "relearning"]
    assert "generate_tokens" in reasons["as_released", "templates_prompts_above_decoys"]
    assert ("as_released", "paraphrased_prompts") in reasons and all(reasons.values())


def test_the_evidence_names_types_and_counts_and_no_value(
    of_memoriser: tuple[dict[str, Any], Path], world: World, memoriser: Path
) -> None:
    evidence, folder = of_memoriser
    assert evidence["targeted"]["identifiers"]["known"]["NAME"] == 39 == evidence["targeted"]["n_records"]
    assert evidence["weights"]["sha256"] == weights_digest(memoriser)
    content = b"".join(path.read_bytes() for path in folder.rglob("*.json"))
    assert not [mark for mark in world.marks if mark in content]


def test_a_model_that_never_saw_the_records_does_not_fail_for_leaking(
    world: World, memoriser: Path, tmp_path: Path
) -> None:
    evidence, *_ = gated(world, memoriser, world.base, tmp_path)
    leaks = [row for row in evidence["tested"] if row["stage"] != "utility" and row["check"] != "membership_auc"]
    assert leaks and not [row for row in leaks if row["verdict"] == "fail"]
    assert all(row["value"] == 0 for row in leaks if row["check"].endswith("_above_floor"))


def test_a_restart_runs_only_what_is_missing(
    of_memoriser: tuple[dict[str, Any], Path], world: World, memoriser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, folder = of_memoriser
    (folder / "release" / "utility.json").unlink()
    ran: list[str] = []
    finished: Callable[..., Any] = release._finished

    def watched(path: Path, stamp: str, run: Callable[[], Any]) -> Any:
        return finished(path, stamp, lambda: ran.append(path.stem) or run())

    monkeypatch.setattr(release, "_finished", watched)
    assert gated(world, memoriser, memoriser, folder)[0] == evidence
    assert ran == ["utility"]
    again = recipe_of(world, memoriser)
    again.release.max_utility_loss = 0.5
    stages: list[str] = []

    def asked(path: Path, stamp: str, run: Callable[[], Any]) -> Any:
        return finished(path, stamp, lambda: stages.append(path.stem) or [])

    monkeypatch.setattr(release, "_finished", asked)
    release_gate(memoriser, again, load_splits(again.data, require_unit=False), folder)
    assert set(stages) == STAGES  # a threshold that changed is another gate: nothing of the old one is taken over


def test_utility_of_the_same_model_is_not_lost_and_of_another_is(world: World, memoriser: Path) -> None:
    recipe = recipe_of(world, memoriser)
    splits, tokenizer = load_splits(recipe.data, require_unit=False), load_tokenizer(memoriser)
    assert splits.heldout is not None
    spec = task_spec(recipe, splits.train)

    def losses(before: Path, after: Path) -> dict[str, Any]:
        models = [load_model(path, spec).eval() for path in (before, after)]
        assert splits.heldout is not None
        return utility_losses(
            models[0],
            models[1],
            tokenizer,
            spec,
            splits.train,
            splits.heldout,
            settings=recipe.evaluation,
            rare_k=5,
        )

    same, worse = losses(memoriser, memoriser), losses(memoriser, world.base)
    assert set(same) == {"perplexity", "other_words", "rare_words", "f1"}
    assert [figure.value for figure in same.values()] == [0.0] * 4
    assert worse["other_words"].value > 0.3 and worse["other_words"].low > 0


def test_rare_words_are_counted_over_both_sides_and_outside_identifiers(world: World) -> None:
    recipe = world.recipe("sani")
    splits, tokenizer = load_splits(recipe.data, require_unit=False), load_tokenizer(world.base)
    assert splits.heldout is not None
    encoded = encode(rare_words_tagged(splits.train, splits.heldout, 2), tokenizer, task_spec(recipe, splits.train))
    direct, rare = (span_tokens(encoded, indirect=which) for which in (False, True))
    assert direct.any() and rare.any() and not (direct & rare).any()
    for row in rare_words_tagged(splits.train, splits.heldout, 2).to_list():
        words = [row["text"][s["start"] : s["end"]] for s in row["identifiers"] if s["source"] == "indirect"]
        assert all(np.char.isdigit(word) for word in words)  # visit and room; "murmur" has many patients


def test_a_gate_without_heldout_records_or_weights_is_refused(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(world, world.base)
    splits = load_splits(recipe.data, require_unit=False)
    with pytest.raises(InputError, match=r"data\.heldout"):
        release_gate(world.base, recipe, Splits(splits.train, None, None, 0), tmp_path)
    with pytest.raises(InputError, match="no safetensors"):
        weights_digest(tmp_path)


def test_terms_are_what_the_gate_measures_where_they_were_the_targets(
    world: World, memoriser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("murmur\n\nWheeze\n")
    recipe = recipe_of(world, memoriser)
    recipe.sani.terms = str(file)
    stamps: list[str] = []
    monkeypatch.setattr(release, "_finished", lambda path, stamp, run: stamps.append(stamp) or [])
    splits = load_splits(recipe.data, require_unit=False)
    evidence = release_gate(memoriser, recipe, splits, tmp_path)
    assert evidence["targeted"]["identifiers"]["known"] == {"TERM": len(splits.train)}  # each record has one of the two
    file.write_text("murmur\n")
    release_gate(memoriser, recipe, splits, tmp_path)
    assert len(set(stamps)) == 2  # other terms under the same name are another gate
