"""Paraphrases by rule: identifiers never change and stay in place, the seed decides, what no rule says is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpmed.memorization import leak_probes
from dpmed.memorization.leak_probes import TokenisedText, context_prompts, decoded, identifier_values, templates
from dpmed.memorization.paraphrase import (
    _FIELDS,
    _FILLERS,
    _WORDS,
    RULES,
    paraphrase,
    paraphrased_contexts,
    paraphrased_templates,
)

FORMS = [*_WORDS, *_WORDS.values(), *(f"{form}:" for group in _FIELDS for form in group), *_FILLERS]
PIECES = st.one_of(
    st.sampled_from(FORMS),
    st.sampled_from(FORMS).map(str.upper),
    st.sampled_from([" ", " ", " ", "\n", "\n\n", ". ", ", ", "/", "-", "Berta Quimby", "12345", "é", "ß", "İ"]),
    st.text(max_size=6),
)


@st.composite
def texts_with_spans(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    text = "".join(draw(st.lists(PIECES, max_size=14)))
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return text, [{"start": a, "end": b, "type": f"T{i}"} for i, (a, b) in enumerate(pairs)]


@given(texts_with_spans(), st.integers(0, 50))
def test_an_identifier_never_changes_and_its_span_stays_on_it(
    given_text: tuple[str, list[dict[str, Any]]], seed: int
) -> None:
    text, spans = given_text
    said = paraphrase(text, spans, seed)
    assert [s["type"] for s in said.spans] == [s["type"] for s in spans]
    for before, after in zip(spans, said.spans, strict=True):
        assert said.text[after["start"] : after["end"]] == text[before["start"] : before["end"]]
    edges = [edge for span in said.spans for edge in (span["start"], span["end"])]
    assert edges == sorted(edges) and all(0 <= edge <= len(said.text) for edge in edges)
    assert (said.text == text) == (not said.rules)
    assert set(said.rules) <= set(RULES)
    assert said.text[len(said.text.rstrip()) :] == text[len(text.rstrip()) :]


@given(texts_with_spans(), st.integers(0, 50))
def test_the_same_seed_gives_the_same_words(given_text: tuple[str, list[dict[str, Any]]], seed: int) -> None:
    first, again = (paraphrase(*given_text, seed) for _ in range(2))
    assert (first.text, first.spans, first.rules) == (again.text, again.spans, again.rules)


@given(texts_with_spans(), st.integers(0, 20))
def test_a_text_that_is_one_identifier_has_no_paraphrase(
    given_text: tuple[str, list[dict[str, Any]]], seed: int
) -> None:
    text, _ = given_text
    assert paraphrase(text, [{"start": 0, "end": len(text)}] if text else [], seed).rules == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pt has hx of HTN", "patient has history of hypertension"),
        ("Patient status post stroke", "Pt s/p stroke"),
        ("64 y/o woman w/ cough", "64 year-old woman with cough"),
        ("PATIENT w/o SOB", "PT without shortness of breath"),
        ("seen in the clinic", "seen in clinic"),
        ("the ptosis of patients", "ptosis of pts"),
        ("a sob story", "sob story"),  # only SOB in capitals is the abbreviation
    ],
)
def test_words_are_exchanged_in_their_own_case(text: str, expected: str) -> None:
    said = {paraphrase(text, [], seed).text for seed in range(20)}
    assert expected in said and said <= {expected, expected.lower()}


def test_a_field_gets_another_name_and_never_its_own() -> None:
    said = {paraphrase("Patient name:", [], seed).text for seed in range(40)}
    assert {"Name of the patient:", "Pt name -"} <= said
    assert not [text for text in said if text.lower().startswith("patient name")]
    assert paraphrase("a patient name was read", [], 0).rules[0] == "words"  # without a colon it is no field


def test_styles_change_case_lines_and_stops_where_no_word_does() -> None:
    said = {paraphrase("Cough.\nFever at night. Better now.", [], seed).text for seed in range(30)}
    assert said == {
        "cough.\nfever at night. better now.",
        "Cough. Fever at night. Better now.",
        "Cough.\nFever at night; Better now.",
    }


def test_other_templates_ask_for_the_same_types_in_other_words() -> None:
    for name in (*leak_probes._TEMPLATES, "SPECIMEN_CODE"):
        asked = {text.lower() for text in paraphrased_templates([name])}
        assert asked and not asked & {text.lower() for text in templates([name])}
    assert paraphrased_templates(["SPECIMEN_CODE"]) == ["The specimen code is"]
    assert paraphrased_templates(["AGE", "AGE_OVER_89"]) == ["The age of the patient is"]


# --- Contexts of records ----------------------------------------------------------------------------------------------


def record(text: str, *values: str) -> dict[str, Any]:
    spans = [{"start": text.index(v), "end": text.index(v) + len(v), "type": "NAME", "source": "known"} for v in values]
    return {"text": text, "identifiers": spans}


def contexts(tokenizer: Any, notes: list[dict[str, Any]], room: int = 60) -> tuple[Any, Any]:
    data = Dataset.from_list([n | {"unit": str(i), "record_id": str(i)} for i, n in enumerate(notes)])
    tokens = tokenizer(list(data["text"]), add_special_tokens=False, return_offsets_mapping=True)
    columns = zip(data["text"], tokens["input_ids"], tokens["offset_mapping"], data["identifiers"], strict=True)
    values = identifier_values(data)
    found = context_prompts([TokenisedText(*row) for row in columns], values, [1], room)
    return values, (found, paraphrased_contexts(found, values, tokenizer, [1], room, seed=3))


def test_contexts_are_asked_again_with_the_identifiers_in_them(tiny_tokenizer: Any) -> None:
    notes = [
        record("Pt Patricia Patient has hx of gout. Attending physician: Dora Yates", "Patricia Patient", "Dora Yates"),
        record("xyz 7 Emil Voss", "Emil Voss"),
    ]
    values, (plain, said) = contexts(tiny_tokenizer, notes)
    texts = dict(zip(said.value.tolist(), decoded(tiny_tokenizer, said.prompts), strict=True))
    assert set(texts) == {values.index_of("Patricia Patient"), values.index_of("Dora Yates")}
    assert texts[values.index_of("Patricia Patient")].strip() == "Patient"
    asked = texts[values.index_of("Dora Yates")]
    assert "Patricia Patient" in asked and "history of gout" in asked and "Attending physician" not in asked
    assert said.counts["n_unchanged"] == 1 and said.counts["n_prompts"] == 2 and said.counts["rules"]["words"] == 2
    before = dict(zip(plain.value.tolist(), plain.prompts, strict=True))
    for index, prompt in zip(said.value.tolist(), said.prompts, strict=True):
        assert prompt[0] == 1 and prompt != before[index]
        # As in the true context, white space that belongs to the identifier's own token does not end the prompt.
        ends = [decoded(tiny_tokenizer, [ids])[0][-1].isspace() for ids in (prompt, before[index])]
        assert ends[0] == ends[1]


def test_a_paraphrase_is_cut_to_the_room_and_never_holds_its_value(tiny_tokenizer: Any) -> None:
    values, (_, said) = contexts(tiny_tokenizer, [record("pt pt pt pt pt pt Dora Yates", "Dora Yates")], room=6)
    assert [len(prompt) for prompt in said.prompts] == [7]
    notes = [record("her last wish, rx and then prescription", "prescription")]
    values, (plain, said) = contexts(tiny_tokenizer, notes)
    assert len(plain.prompts) == 1 and said.prompts == [] and said.counts["n_holds_value"] == 1
    assert len(values) == 1 and said.value.dtype == np.int64
