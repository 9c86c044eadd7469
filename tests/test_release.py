"""The release gate: verdicts on intervals, a memoriser that fails, a clean model that does not, and restarts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import MARKER, World, make_world

from dpmed import release
from dpmed.data.tasks import encode
from dpmed.errors import BudgetError, GateError, InputError
from dpmed.memorization import scoring
from dpmed.memorization.other_words import span_tokens
from dpmed.memorization.statistics import TokenScores, weights_fingerprint
from dpmed.models import load_model, load_tokenizer
from dpmed.pipeline import load_splits
from dpmed.recipe import Recipe
from dpmed.relearning import relearn
from dpmed.release import PARTS, release_gate, weights_digest
from dpmed.release_utility import rare_words_tagged, utility_losses
from dpmed.report.evidence import build_evidence_page
from dpmed.report.evidence_wording import CHECKS
from dpmed.splits import Splits, task_spec

ORDER = ("as_released", "bfloat16", "int8", "int4", "relearned", "relearned_public", "utility")
STAGES = set(ORDER)


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
    return world.recipe("sani", model=model, release={"relearn_steps": 2}, evaluation={"generate_tokens": 8_000})


def gated(world: World, before: Path, weights: Path, folder: Path) -> tuple[dict[str, Any], Recipe, Splits]:
    recipe = recipe_of(world, before)
    splits = load_splits(recipe.data, require_unit=False)
    return release_gate(weights, recipe, splits, folder), recipe, splits


Passes = list[tuple[str, str]]
"""Of each pass of a language model over a side: the fingerprint of its weights, and what was passed."""


def count_passes(patch: pytest.MonkeyPatch) -> Passes:
    """Notes each pass of the stages on leakage from now on, kept passes that are read again not."""
    passes: Passes = []
    score: Callable[..., Any] = scoring.score_records

    def counted(model: Any, encoded: Any, *rest: Any, **options: Any) -> Any:
        found = score(model, encoded, *rest, **options)
        passes.append((weights_fingerprint(model), f"{encoded.n_records} {encoded.lengths}"))
        return found

    patch.setattr(scoring, "score_records", counted)
    return passes


@pytest.fixture(scope="module")
def uninterrupted(world: World, memoriser: Path) -> tuple[dict[str, Any], Path, Passes]:
    folder = world.folder / "gate"
    with pytest.MonkeyPatch.context() as patch:
        passes = count_passes(patch)
        return gated(world, memoriser, memoriser, folder)[0], folder, passes


@pytest.fixture(scope="module")
def of_memoriser(uninterrupted: tuple[dict[str, Any], Path, Passes]) -> tuple[dict[str, Any], Path]:
    return uninterrupted[:2]


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
    assert set(reasons) == {("relearned_public", "relearning")}


def test_the_evidence_names_types_and_counts_and_no_value(
    of_memoriser: tuple[dict[str, Any], Path], world: World, memoriser: Path
) -> None:
    evidence, folder = of_memoriser
    assert evidence["targeted"]["identifiers"]["known"]["NAME"] == 39 == evidence["targeted"]["n_records"]
    assert evidence["weights"]["sha256"] == weights_digest(memoriser)
    content = b"".join(path.read_bytes() for path in folder.rglob("*.json"))
    assert not [mark for mark in world.marks if mark in content]


def test_the_floor_is_passed_once_and_once_more_after_relearning_only(
    uninterrupted: tuple[dict[str, Any], Path, Passes], world: World, memoriser: Path
) -> None:
    _, folder, passes = uninterrupted
    spec = task_spec(world.recipe("sani"), load_splits(world.recipe("sani").data, require_unit=False).train)
    by_weights = Counter(weights for weights, _ in passes)
    floor, released = (weights_fingerprint(load_model(path, spec)) for path in (world.base, memoriser))
    assert by_weights[floor] == by_weights[released] == 2  # the two sides
    # The model as released, in bfloat16, int8, int4 and relearned, the floor, and the floor relearned.
    assert len(by_weights) == 7 and set(by_weights.values()) == {2}
    assert not (folder / "release" / PARTS).exists()


def test_a_memoriser_fails_for_what_it_writes_in_the_records_wording(
    of_memoriser: tuple[dict[str, Any], Path],
) -> None:
    rows = {row["check"]: row for row in of_memoriser[0]["tested"] if row["stage"] == "as_released"}
    assert rows["context_prompts_above_decoys"]["verdict"] == "fail"
    paraphrased = rows["paraphrased_prompts_above_decoys"]
    assert paraphrased["n"] > 0 and paraphrased["counts"]["train"]["n_generated"] > 0
    assert rows["membership_auc"]["n_attacks"] == 6
    assert "templates_prompts_above_decoys" in rows and "paraphrased_templates_prompts_above_decoys" in rows


def test_a_stage_that_was_interrupted_when_it_was_done_computes_nothing_again(
    uninterrupted: tuple[dict[str, Any], Path, Passes],
    world: World,
    memoriser: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence, _, whole = uninterrupted
    write, passes = release.write_json, count_passes(monkeypatch)
    for stage in (*ORDER, "evidence"):

        def stopped(path: Path, values: Any, stage: str = stage) -> None:
            if path.stem == stage:
                raise KeyboardInterrupt
            write(path, values)

        monkeypatch.setattr(release, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            gated(world, memoriser, memoriser, tmp_path)
        assert (tmp_path / "release" / PARTS).is_dir() and not (tmp_path / "evidence.json").exists()
    monkeypatch.setattr(release, "write_json", write)
    assert gated(world, memoriser, memoriser, tmp_path)[0] == evidence
    assert passes == whole  # a relearned model is the same again, so its passes are too
    assert not (tmp_path / "release" / PARTS).exists()


def test_a_gate_that_was_killed_within_a_stage_gives_the_same_evidence(
    uninterrupted: tuple[dict[str, Any], Path, Passes],
    world: World,
    memoriser: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence, _, whole = uninterrupted
    child = os.fork()
    if child == 0:
        try:
            patch, save = pytest.MonkeyPatch(), TokenScores.save
            passes = count_passes(patch)

            def killed(scores: TokenScores, path: Path, fingerprint: str) -> None:
                if len(passes) == 8:  # after 4 as released and 2 in bfloat16 the second of int8, not yet kept
                    os.kill(os.getpid(), signal.SIGKILL)
                save(scores, path, fingerprint)

            patch.setattr(TokenScores, "save", killed)
            gated(world, memoriser, memoriser, tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    written = {path.stem for path in (tmp_path / "release").glob("*.json")}
    assert written == {"as_released", "bfloat16"}
    passes = count_passes(monkeypatch)
    assert gated(world, memoriser, memoriser, tmp_path)[0] == evidence
    assert passes == whole[7:]  # what was passed before is kept; the last one is called again, from its parts


def test_a_masked_model_and_public_text_go_through_the_gate(tmp_path: Path) -> None:
    made, text = make_world(tmp_path, "bert"), tmp_path / "public.txt"
    text.write_text("Aspirin is a drug.\n\nFever is a sign.")
    release_section = {"relearn_steps": 1, "quantise": [], "public_text": str(text)}
    model = {"path": str(made.base), "base": str(made.base)}
    recipe = made.recipe("sani", task="masked_lm", model=model, data={"label": None}, release=release_section)
    recipe.evaluation.generate_tokens = 1000
    splits = load_splits(recipe.data, require_unit=False)
    evidence = release_gate(made.base, recipe, splits, tmp_path / "gate")
    reasons = {row["check"]: row["reason"] for row in evidence["not_tested"] if row["stage"] == "as_released"}
    assert "does not continue" in reasons["paraphrased_prompts_above_decoys"]
    tested = {(row["stage"], row["check"]): row for row in evidence["tested"]}
    assert tested["relearned_public", "identifier_extraction_above_floor"]["value"] == 0
    assert tested["utility", "perplexity_loss"]["high"] == 0  # the very same weights lose nothing


def test_another_floor_or_public_text_under_the_same_name_is_another_gate(
    world: World, memoriser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, text, floor = recipe_of(world, memoriser), tmp_path / "public.txt", tmp_path / "floor"
    shutil.copytree(world.base, floor)
    recipe.release.clean_retrain, recipe.release.public_text = str(floor), str(text)
    splits, stamps = load_splits(recipe.data, require_unit=False), list[str]()
    monkeypatch.setattr(release, "_finished", lambda path, stamp, run: stamps.append(stamp) or [])

    def stamp() -> str:
        release_gate(memoriser, recipe, splits, tmp_path / "gate")
        return stamps[-1]

    text.write_text("Aspirin is a drug.")
    first = stamp()
    assert stamp() == first
    text.write_text("Aspirin is a medicine.")
    second = stamp()
    shutil.copy(next(memoriser.glob("*.safetensors")), floor)
    assert len({first, second, stamp()}) == 3


def test_a_model_that_never_saw_the_records_does_not_fail_for_leaking(
    world: World, memoriser: Path, tmp_path: Path
) -> None:
    evidence, *_ = gated(world, memoriser, world.base, tmp_path)
    leaks = [row for row in evidence["tested"] if row["stage"] != "utility" and row["check"] != "membership_auc"]
    assert leaks and not [row for row in leaks if row["verdict"] == "fail"]
    rates = [row for row in leaks if row["check"].endswith("_above_floor") and "membership" not in row["check"]]
    assert rates and all(row["value"] == 0 for row in rates)


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
    direct, rare = (
        span_tokens(encoded, lambda s, rare=rare: (s.source == "indirect") == rare) for rare in (False, True)
    )
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
