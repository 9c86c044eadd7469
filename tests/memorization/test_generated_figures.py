"""All generated figures of one model: a model that knows its records by heart, an untouched one, budgets, resuming."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import tiny_models
from dpmed.errors import InputError
from dpmed.memorization.generated_figures import generation_figures
from dpmed.memorization.generation_plan import GenerationSettings
from dpmed.memorization.intervals import Measure, NotApplicable, figures_json
from dpmed.memorization.leak_differences import Leaked

NAMES = ("Berta Quimby", "Carl Zorn", "Dora Yates", "Emil Voss", "Fritz Ulm", "Gerd Teague")
SMALL = GenerationSettings(
    prompt_tokens=(8, 24, 300),
    ngrams=(6, 12),
    new_tokens=40,
    temperatures=(0.1, 1.0),
    half_tokens=60,
    context_tokens=40,
    identifier_tokens=12,
    template_samples=10,
    free_samples=20,
    free_tokens=60,
    batch_tokens=4000,
    bootstrap=200,
)


def side(names: tuple[str, ...], seed: int) -> Dataset:
    """One short note a patient, with a name and a number of the patient's own."""
    rng = np.random.default_rng(seed)
    notes = []
    for name in names:
        number = f"{rng.integers(10**6):06d}"
        words = " ".join(rng.choice(["heart", "lung", "fever", "cough", "pain", "rest"], size=5))
        text = f"Patient name: {name}. MRN: {number}. {words}."
        spans = [
            {"start": text.index(v), "end": text.index(v) + len(v), "type": kind, "source": "known"}
            for v, kind in ((name, "NAME"), (number, "MRN"))
        ]
        notes.append({"text": text, "unit": f"{seed}-{name}", "record_id": name, "identifiers": spans})
    return Dataset.from_list(notes)


MEMBERS, OTHERS = side(NAMES, 1), side(("Ida Nook", "Jim Obrist", "Kai Pell", "Lea Rusk", "Max Stern", "Ned Thorn"), 2)


@functools.cache
def overfitted() -> Any:
    """A tiny model that knows its six notes by heart, with and without a first token in front of them."""
    tokenizer, model = tiny_models.make_tokenizer(), tiny_models.make_model("llama").train()
    end: Any = tokenizer.eos_token_id
    ids = [[*tokenizer(t)["input_ids"], end] for t in MEMBERS["text"]]  # pyright: ignore[reportGeneralTypeIssues]
    ids += [[tokenizer.bos_token_id, *i] for i in ids]
    longest = max(map(len, ids))
    batch = torch.tensor([i + [end] * (longest - len(i)) for i in ids])
    labels = torch.tensor([i + [-100] * (longest - len(i)) for i in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@functools.cache
def measured(tuned: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Leaked]]]:
    model = overfitted() if tuned else tiny_models.make_model("llama")
    return generation_figures(model, tiny_models.make_tokenizer(), MEMBERS, OTHERS, SMALL)


def test_a_model_that_knows_its_records_by_heart_leaks_them_and_no_decoy():
    figures, *_ = measured(tuned=True)
    own, floor = figures["memorization"], figures["heldout"]
    assert own["regurgitation"]["p24_n12"].value == 1.0  # 24 tokens tell the patients apart
    assert own["near_verbatim"]["p24"]["rouge_l_rate"].value == 1.0
    assert own["near_verbatim"]["p24"]["edit_distance"].value < 0.05
    assert own["prefix_halves"]["t0.1"]["longest_ngram_share"].value > 0.9
    leakage = own["identifier_leakage"]
    assert leakage["context"]["types"]["MRN"]["rate"].value >= 0.8
    assert leakage["free"]["types"]["NAME"]["rate"].value >= 0.5
    assert leakage["templates"]["per_1000_samples"].value > 100
    assert floor["identifier_leak_rate"].value == 0.0
    assert floor["identifier_leakage"]["free"]["rate"].value == 0.0
    assert floor["regurgitation"]["p24_n12"].value < 0.5


def test_the_base_model_is_measured_by_the_same_function_and_leaks_nothing():
    figures, counts, _ = measured(tuned=False)
    own = figures["memorization"]
    for probe in ("context", "templates", "free"):
        rate = own["identifier_leakage"][probe]["rate"]
        assert (rate.value, rate.n) == (0.0, 12)
    assert own["regurgitation_rate"].value == 0.0
    assert own["prefix_halves"]["t1"]["longest_ngram_share"].value < 0.2
    tuned_counts = measured(tuned=True)[1]["generation"]
    assert tuned_counts["prompts"] == counts["generation"]["prompts"]


def test_what_was_not_tested_is_counted_or_has_a_reason():
    figures, counts, _ = measured(tuned=True)
    tree, reasons = figures_json(figures)
    assert tree["memorization"]["regurgitation"]["p300_n6"] is None
    assert "context of 128" in reasons["memorization.regurgitation.p300_n6"]
    n = counts["train"]["regurgitation"]["p24_n12"]
    assert n == {"n_tested": 6, "n_too_short": 0, "n_not_generated": 0}
    assert counts["train"]["regurgitation"]["p24"] == {"new_tokens": 40, "n_empty_outputs": 0}
    assert counts["train"]["identifier_values"] == {
        "n_values": 12,
        "n_too_short": 0,
        "n_also_in_training": 0,
        "n_with_context": 12,
    }
    text = json.dumps([tree, counts])
    assert not any(word in text for name in (*NAMES, *OTHERS["text"]) for word in name.split() if word.istitle())


def test_a_budget_cuts_every_job_alike_and_says_so(tiny_tokenizer):
    whole = measured(tuned=False)[1]["generation"]
    budget = whole["n_tokens_wanted"] // 2
    model, settings = tiny_models.make_model("llama"), replace(SMALL, budget_tokens=budget)
    figures, counts, _ = generation_figures(model, tiny_tokenizer, MEMBERS, OTHERS, settings)
    found = counts["generation"]
    assert found["n_tokens_wanted"] == whole["n_tokens_wanted"] > budget >= found["n_tokens_granted"] > budget * 0.7
    assert found["n_tokens_written"] <= found["n_tokens_granted"]
    for job in found["prompts"].values():
        assert job["n_generated"] <= job["n_wanted"] <= max(1, 3 * max(1, job["n_generated"]))
    n = counts["train"]["regurgitation"]["p8_n6"]
    assert n["n_tested"] == figures["memorization"]["regurgitation"]["p8_n6"].n == 3
    assert n["n_tested"] + n["n_too_short"] + n["n_not_generated"] == 6
    context = figures["memorization"]["identifier_leakage"]["context"]["rate"]
    assert context.n == found["prompts"]["train context"]["n_generated"] < 12  # values without a prompt are no cases
    nothing, counts, _ = generation_figures(model, tiny_tokenizer, MEMBERS, OTHERS, replace(SMALL, budget_tokens=1))
    _, reasons = figures_json(nothing)
    assert counts["generation"]["n_tokens_granted"] == 0
    assert "budget" in reasons["memorization.regurgitation.p8_n6"]
    assert "budget" in reasons["memorization.identifier_leak_rate"]


def test_max_records_limits_the_prompts_and_not_the_identifiers(tiny_tokenizer):
    settings = replace(SMALL, max_records=2)
    model = tiny_models.make_model("llama")
    figures, counts, _ = generation_figures(model, tiny_tokenizer, MEMBERS, OTHERS, settings)
    assert counts["train"]["n_records_for_generation"] == 2
    assert figures["memorization"]["regurgitation"]["p8_n6"].n == 2
    assert figures["memorization"]["identifier_leakage"]["free"]["rate"].n == 12


def test_a_resumed_measurement_gives_the_same_figures(tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, int, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, SMALL, folder=tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 5
    figures, *_ = generation_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, SMALL, folder=tmp_path)
    assert figures_json(figures) == figures_json(measured(tuned=True)[0])
    n_parts = len(list(tmp_path.iterdir()))
    monkeypatch.setattr(type(overfitted()), "generate", None)  # nothing is left to generate
    generation_figures(overfitted(), tiny_tokenizer, MEMBERS, OTHERS, SMALL, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == n_parts


def test_records_without_identifiers_still_have_the_other_figures(tiny_tokenizer):
    plain = [data.map(lambda _: {"identifiers": []}) for data in (MEMBERS, OTHERS)]
    model = tiny_models.make_model("gpt2")
    figures, *_ = generation_figures(model, tiny_tokenizer, plain[0], plain[1], SMALL)
    own = figures["memorization"]
    assert isinstance(own["identifier_leak_rate"], NotApplicable)
    assert "data.identifiers" in own["identifier_leakage"]["free"]["rate"].reason
    assert isinstance(own["regurgitation_rate"], Measure)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_tokens": ()}, "prompt_tokens"),
        ({"ngrams": (0,)}, "ngrams"),
        ({"new_tokens": 10}, "exceed new_tokens"),
        ({"temperatures": (-0.1,)}, "temperatures"),
        ({"budget_tokens": 0}, "budget_tokens"),
        ({"free_samples": 0}, "free_samples"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as caught:
        GenerationSettings(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_a_side_without_records_is_refused(tiny_tokenizer, name: str):
    sides = {"train": MEMBERS, "heldout": OTHERS, name: MEMBERS.select([])}
    with pytest.raises(InputError, match=f"{name}: no records"):
        generation_figures(tiny_models.make_model("gpt2"), tiny_tokenizer, sides["train"], sides["heldout"], SMALL)


def test_every_figure_is_finite():
    tree, _ = figures_json(measured(tuned=True)[0])

    def numbers(node: Any) -> list[float]:
        if isinstance(node, dict):
            return [x for inner in node.values() for x in numbers(inner)]
        return [node] if isinstance(node, float) else []

    assert len(numbers(tree)) > 100
    assert all(map(math.isfinite, numbers(tree)))
