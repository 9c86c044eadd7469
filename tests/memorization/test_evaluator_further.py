"""Canaries, differences from the base model, kinds, persistence and generated text in one evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from memorization.evaluated import (
    FEW_CANDIDATES,
    SECRET,
    SETTINGS,
    SPEC,
    counted_passes,
    every_null,
    killed_at,
    records,
    trained,
    value,
)
from torch import nn

from dpmed import cli_show
from dpmed.data.canaries import plant_canaries
from dpmed.errors import InputError
from dpmed.memorization import scoring
from dpmed.memorization.canary_figures import Claim
from dpmed.memorization.evaluator import MemorizationEvaluator
from dpmed.memorization.persistence import MEMORIZED_FILE


@pytest.fixture(scope="module")
def sides() -> tuple[Dataset, Dataset]:
    return records(34, 0), records(32, 1)


@pytest.fixture(scope="module")
def memorised(tiny_model, tiny_tokenizer, sides) -> nn.Module:
    return trained(tiny_model("llama"), sides[0], tiny_tokenizer)


def test_canaries_have_figures_of_their_own_and_are_left_out_of_all_others(memorised, tiny_tokenizer, sides):
    planted, manifest = plant_canaries(sides[0], n=120, designs=["identifiers"], repeats=[1, 3], seed=5)
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=FEW_CANDIDATES)
    plain, with_canaries = evaluator.evaluate(*sides), evaluator.evaluate(planted, sides[1], manifest)
    own = {"canary_exposure", "epsilon_lower_bound", "audit"}
    found, without = with_canaries["memorization"], plain["memorization"]
    assert {key: found[key] for key in without if key not in own} == {k: v for k, v in without.items() if k not in own}
    assert {key: without[key] for key in own} == dict.fromkeys(own)
    n_in = int(manifest.included.sum())
    assert (value(found, "canary_exposure"), found["canary_exposure"]["n"]) == (found["canary_exposure"]["value"], n_in)
    assert with_canaries["counts"]["train"]["n_canary_records_left_out"] == len(planted) - len(sides[0]) > 0
    assert found["audit"]["n_canaries"] == 120 and found["audit"]["contradicts"] is False
    assert found["epsilon_lower_bound"]["ceiling"] > 0
    with pytest.raises(InputError, match="not of these records"):
        evaluator.evaluate(sides[0], sides[1], manifest)


def test_a_claim_that_the_canaries_refute_is_marked(tiny_model, tiny_tokenizer, sides):
    planted, manifest = plant_canaries(sides[0], n=60, designs=["identifiers"], repeats=[1], seed=2)
    model = trained(tiny_model("llama"), planted, tiny_tokenizer, steps=60)
    evaluator = MemorizationEvaluator(model, tiny_tokenizer, spec=SPEC, settings=FEW_CANDIDATES)
    audits = [
        evaluator.evaluate(planted, sides[1], manifest, claim=Claim(epsilon, 1e-5))["memorization"]["audit"]
        for epsilon in (0.1, 50.0, None)
    ]
    assert [audit["contradicts"] for audit in audits] == [True, False, False]
    assert audits[0]["lower_bound"] > 0.1


def test_differences_from_the_base_model_are_those_of_the_two_rates(memorised, tiny_model, tiny_tokenizer, sides):
    base = tiny_model("llama")
    pair = [
        MemorizationEvaluator(model, tiny_tokenizer, base_model=base, spec=SPEC, settings=SETTINGS).evaluate(*sides)
        for model in (memorised, base)
    ]
    found, before = pair[0]["memorization"], pair[0]["reference"]["base_model"]["memorization"]
    for name, own in (("extraction_rate", ("extraction_rate",)), ("all", ("identifier_extraction_rate",))):
        difference = found["minus_base"][name] if name != "all" else found["minus_base"]["identifier_extraction"]["all"]
        assert (
            difference["value"] == pytest.approx(value(found, *own) - value(before, *own)) and difference["value"] > 0
        )
        assert difference["p_value"] < 0.01
    assert value(found, "minus_base", "exact_memorization") > 0
    still = pair[1]["memorization"]["minus_base"]
    assert still["extraction_rate"]["value"] == 0 and still["extraction_rate"]["p_value"] == 1
    assert set(found["minus_base"]["identifier_extraction"]) == {"all", "NAME", "DATE"}


def test_kinds_persistence_and_generated_text_stand_on_both_sides(
    memorised, tiny_model, tiny_tokenizer, sides, tmp_path
):
    asked = replace(SETTINGS, span_tokens=4, generate_tokens=80_000, prompt_tokens=[4], ngrams=[3], new_tokens=8)
    before = MemorizationEvaluator(tiny_model("llama"), tiny_tokenizer, spec=SPEC, settings=replace(asked))
    before.evaluate(*sides)
    assert before.memorized is not None
    before.memorized.save(tmp_path / MEMORIZED_FILE)
    evaluator = MemorizationEvaluator(
        memorised, tiny_tokenizer, base_model=tiny_model("llama"), spec=SPEC, settings=asked, scores_dir=tmp_path / "s"
    )
    result = evaluator.evaluate(*sides, before=tmp_path)
    memorization, reference = result["memorization"], result["reference"]
    assert memorization["kinds"]["harmful"]["n_spans"] > 0 and memorization["persistence"]["tokens"]["n_after"] > 0
    sections = (memorization, reference["heldout"], reference["base_model"]["memorization"])
    rates = [value(section, "regurgitation_rate") for section in sections]
    assert rates[0] > rates[2]
    assert [value(section, "identifier_leak_rate") >= 0 for section in (memorization, sections[2])] == [True, True]
    assert result["counts"]["generated"]["generation"]["n_tokens_granted"] <= 80_000
    nulls = {key for key in every_null(result) if not key.startswith("settings.")}
    assert nulls <= set(result["not_applicable"])


def test_a_killed_evaluation_goes_on_among_canaries_and_items(
    memorised, tiny_model, tiny_tokenizer, sides, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    planted, manifest = plant_canaries(sides[0], n=20, designs=["identifiers"], repeats=[1], seed=5)
    rows = [{"question": f"Drug number {i}?", "options": ["aspirin", "iron"], "answer": "iron"} for i in range(8)]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    asked = replace(FEW_CANDIDATES, choices=str(tmp_path / "items.json"), batch_tokens=256)
    base = tiny_model("llama")

    def evaluated(progress: Callable[..., None] | None) -> dict[str, Any]:
        evaluator = MemorizationEvaluator(
            *(memorised, tiny_tokenizer),
            base_model=base,
            spec=SPEC,
            settings=asked,
            scores_dir=tmp_path / "parts",
            progress=progress,
        )
        return evaluator.evaluate(planted, sides[1], manifest)

    def killed(stage: str, n_batches: int) -> Callable[..., None]:
        count = killed_at(n_batches, [])
        return lambda name, *done: count(*done) if name == stage else None

    for stage in ("multiple choice", "canaries"):
        with pytest.raises(KeyboardInterrupt):
            evaluated(killed(stage, 3))
    reports: list[str] = []
    with counted_passes(memorised) as own, counted_passes(base) as of_base:
        found = evaluated(lambda name, *_: reports.append(name))
    assert set(reports) == {"canaries", "multiple choice"}  # all other passes are read from their files
    assert of_base == [] and len(own) == 1 + reports.count("canaries") - 3
    shutil.rmtree(tmp_path / "parts")
    assert evaluated(None) == found


def test_leak_rates_stand_beside_their_differences(memorised, tiny_model, tiny_tokenizer, sides):
    asked = replace(SETTINGS, generate_tokens=80_000, prompt_tokens=[4], ngrams=[3], new_tokens=8)
    renamed = [text.replace(SECRET, "Wilhelmin") for text in sides[1]["text"]]  # a decoy: it is in no training record
    heldout = sides[1].remove_columns("text").add_column("text", renamed)
    base = tiny_model("llama")
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, base_model=base, spec=SPEC, settings=asked)
    result = evaluator.evaluate(sides[0], heldout)
    memorization, of_base = result["memorization"], result["reference"]["base_model"]
    differences = {
        name: memorization[name]["identifier_leakage"]
        for name in ("minus_base", "minus_decoys", "minus_base_and_decoys")
    }
    for probe in ("context", "templates", "free"):
        own, decoys, before, decoys_before = (
            side["identifier_leakage"][probe]["rate"]
            for side in (memorization, result["reference"]["heldout"], of_base["memorization"], of_base["heldout"])
        )
        added, above = (differences[name][probe]["rate"] for name in ("minus_base", "minus_decoys"))
        both = differences["minus_base_and_decoys"][probe]
        assert added["value"] == pytest.approx(own["value"] - before["value"])
        assert above["value"] == pytest.approx(own["value"] - decoys["value"])
        assert both["value"] == pytest.approx(added["value"] - (decoys["value"] - decoys_before["value"]))
        assert all(f["low"] <= f["value"] <= f["high"] and f["low"] < f["high"] for f in (added, above, both))
        assert added["n"] == above["n"] == both["n"] == own["n"] and above["n_decoys"] == decoys["n"] == 1
        assert differences["minus_decoys"][probe]["types"]["NAME"]["n"] == 1
        assert differences["minus_decoys"][probe]["types"]["DATE"] is None  # all dates are in training records too
    assert differences["minus_base"]["free"]["types"]["NAME"]["value"] == 1


def test_the_terminal_shows_the_differences(memorised, tiny_model, tiny_tokenizer, sides, tmp_path, capsys):
    asked = replace(SETTINGS, generate_tokens=20_000, prompt_tokens=[4], ngrams=[3], new_tokens=8)
    base = tiny_model("llama")
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, base_model=base, spec=SPEC, settings=asked)
    result = evaluator.evaluate(*sides)
    (tmp_path / "evaluation.json").write_text(json.dumps(result), encoding="utf-8")
    cli_show.run({"output_dir": str(tmp_path)})
    shown = capsys.readouterr().out
    for probe in ("context", "templates", "free"):
        assert f"memorization.minus_base.identifier_leakage.{probe}.rate" in shown
        assert f"memorization.minus_decoys.identifier_leakage.{probe}.rate: no decoy to compare with" in shown
    why = result["not_applicable"]["reference.heldout.identifier_leakage.free.rate"]
    assert why == "all known identifiers of held-out patients stand in training records too"


@pytest.mark.parametrize("budget", [0, 5_000])
def test_without_a_base_model_leak_rates_are_compared_with_decoys_alone(memorised, tiny_tokenizer, sides, budget):
    settings = replace(SETTINGS, generate_tokens=budget, prompt_tokens=[4], ngrams=[3], new_tokens=8)
    result = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=settings).evaluate(*sides)
    memorization, reasons = result["memorization"], result["not_applicable"]
    assert memorization["minus_base"] is None and "base model" in reasons["memorization.minus_base"]
    assert memorization["minus_base_and_decoys"]["identifier_leakage"] is None
    assert (memorization["minus_decoys"]["identifier_leakage"] is None) == (budget == 0)
    word = "generate_tokens" if budget == 0 else "base model"
    assert word in reasons["memorization.minus_base_and_decoys.identifier_leakage"]
