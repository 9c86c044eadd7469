"""Prompts for identifiers in the records' wording and in other words: a model that knows its notes, and one that does
not."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import tiny_models
from dpmed.data.tasks import TaskSpec
from dpmed.memorization.generation_plan import GenerationSettings
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.memorization.prompt_probes import NO_RULE, PROBES, prompt_figures
from dpmed.relearning import relearn

SMALL = GenerationSettings(context_tokens=40, identifier_tokens=14, template_samples=10, bootstrap=100)
NAMES = ("Berta Quimby", "Carl Zorn", "Dora Yates", "Emil Voss", "Fritz Ulm", "Gerd Teague")
OTHER_NAMES = ("Ida Nook", "Jim Obrist", "Kai Pell", "Lea Rusk", "Max Stern", "Ned Thorn")


def side(names: tuple[str, ...], opening: str) -> Dataset:
    """One note a patient: what tells the patient stands in front, in letters that no rule changes."""
    notes = []
    for i, name in enumerate(names):
        text = f"{opening} {chr(97 + i) * 3} Patient name: {name}."
        span = {"start": text.index(name), "end": text.index(name) + len(name), "type": "NAME", "source": "known"}
        notes.append({"text": text, "unit": name, "record_id": name, "identifiers": [span]})
    return Dataset.from_list(notes)


MEMBERS, OTHERS = side(NAMES, "bed"), side(OTHER_NAMES, "bed")


@functools.cache
def overfitted() -> Any:
    model, tokenizer = tiny_models.make_model("llama"), tiny_models.make_tokenizer()
    return relearn(
        model, tokenizer, TaskSpec(max_length=64), MEMBERS, steps=150, learning_rate=1e-2, batch_size=6, seed=0
    )


@functools.cache
def measured(tuned: bool) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    model = overfitted() if tuned else tiny_models.make_model("llama")
    return prompt_figures(model, tiny_models.make_tokenizer(), MEMBERS, OTHERS, SMALL)


def test_a_model_that_knows_its_notes_answers_the_true_wording_and_no_decoy_comes_out() -> None:
    figures, counts = measured(tuned=True)
    assert set(figures["memorization"]) == set(figures["heldout"]) == set(PROBES)
    own, decoys = figures["memorization"], figures["heldout"]
    assert own["context"]["rate"].value == 1.0
    for probe in PROBES:
        assert (own[probe]["rate"].n, decoys[probe]["rate"].n, decoys[probe]["rate"].value) == (6, 6, 0.0)
    assert counts["train"]["n_prompts"] == counts["train"]["n_generated"] == 6
    assert counts["train"]["rules"]["fields"] == 6 and counts["train"]["n_unchanged"] == 0


def test_other_words_reach_what_was_learned_in_them() -> None:
    """The probe asks what it says it asks: a model trained on the paraphrased form answers it, the other does not."""
    reworded = Dataset.from_list(
        [
            row | {"text": row["text"].replace("Patient name:", form), "identifiers": []}
            for row in MEMBERS.to_list()
            for form in ("Name of the patient:", "Name of the patient -", "Pt name:", "Pt name -", "Name of patient -")
        ]
    )
    model, tokenizer = tiny_models.make_model("llama"), tiny_models.make_tokenizer()
    relearn(model, tokenizer, TaskSpec(max_length=64), reworded, steps=250, learning_rate=1e-2, batch_size=30, seed=0)
    rates = prompt_figures(model, tokenizer, MEMBERS, OTHERS, SMALL)[0]["memorization"]
    assert rates["paraphrased"]["rate"].value > 0.5
    assert measured(tuned=False)[0]["memorization"]["paraphrased"]["rate"].value == 0.0


def test_prompts_that_no_rule_changes_are_left_out_and_counted(tiny_tokenizer: Any) -> None:
    plain = MEMBERS.map(lambda row: {"text": row["text"].replace("Patient name:", "xyz xyz xyzzy")})  # as long
    figures, counts = prompt_figures(tiny_models.make_model("llama"), tiny_tokenizer, plain, OTHERS, SMALL)
    assert counts["train"]["n_unchanged"] == 6 and counts["train"]["n_prompts"] == 0
    rate = figures["memorization"]["paraphrased"]["rate"]
    assert isinstance(rate, NotApplicable) and rate.reason == NO_RULE
    assert isinstance(figures["memorization"]["context"]["rate"], Measure)


def test_without_a_budget_there_is_a_reason_and_a_killed_probe_goes_on(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing, _ = prompt_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, replace(SMALL, budget_tokens=1))
    assert all("budget" in nothing["memorization"][probe]["rate"].reason for probe in PROBES)
    first = prompt_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, SMALL, folder=tmp_path)
    monkeypatch.setattr(type(overfitted()), "generate", None)  # all that was written is there
    assert prompt_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, SMALL, folder=tmp_path) == first
