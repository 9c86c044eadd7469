from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmed.data.hospital import make_hospital
from dpmed.memorization.intervals import Measure, NotApplicable, wilson
from dpmed.memorization.leak_probes import (
    TokenisedText,
    context_prompts,
    continuations,
    decoded,
    decoy_values,
    identifier_values,
    leak_figures,
    leaks,
    leaks_per_1000,
    templates,
)

NAMES = ("Berta Quimby", "Carl Zorn", "Dora Yates", "Emil Voss", "Fritz Ulm", "Gerd Teague")


def note(text: str, *values: tuple[str, str], source: str = "known") -> dict[str, Any]:
    spans = [
        {"start": text.index(v), "end": text.index(v) + len(v), "type": kind, "source": source} for v, kind in values
    ]
    return {"text": text, "identifiers": spans}


def records(notes: list[dict[str, Any]], units: list[str]) -> Dataset:
    rows = [n | {"unit": u, "record_id": str(i)} for i, (n, u) in enumerate(zip(notes, units, strict=True))]
    return Dataset.from_list(rows)


def by_value(data: Dataset) -> dict[str, tuple[str, int]]:
    values = identifier_values(data)
    return {v: (str(values.type[i]), int(values.n_units[i])) for i, v in enumerate(values._values)}


# --- Values -----------------------------------------------------------------------------------------------------------


def test_values_are_counted_by_patient_and_spellings_are_one():
    data = records(
        [
            note("Berta Quimby, seen in Springfield.", ("Berta Quimby", "PATIENT"), ("Springfield", "LOCATION")),
            note("BERTA  QUIMBY again, MRN 123456.", ("BERTA  QUIMBY", "NAME"), ("123456", "MRN")),
            note("A man from Springfield, age 64.", ("64", "AGE")),
            note("Carl Zorn has the number 123456.", ("Carl Zorn", "NAME"), source="pattern"),
        ],
        ["a", "a", "b", "c"],
    )
    assert by_value(data) == {
        "Berta Quimby": ("NAME", 1),  # one value in two spellings, of one patient; PATIENT is another word for NAME
        "Springfield": ("LOCATION", 2),  # the second patient's is not tagged, and is there
        "123456": ("MRN", 2),
    }
    assert identifier_values(data).n_too_short == 1
    assert "Quimby" not in repr(identifier_values(data))


def test_strata_cut_at_one_four_and_five():
    n_holders = [1, 2, 4, 5, 7]
    notes, units = [], []
    for value, n in zip(NAMES, n_holders, strict=False):
        notes += [note(f"{value} came.", (value, "NAME"))] * n
        units += [f"{value}{i}" for i in range(n)]
    values = identifier_values(records(notes, units))
    assert values.n_units.tolist() == n_holders
    found = {name: np.flatnonzero(values.stratum(name)).tolist() for name in ("1", "2-4", "5+")}
    assert found == {"1": [0], "2-4": [1, 2], "5+": [3, 4]}


def test_decoys_stand_in_no_training_record_not_even_untagged_or_inside_a_longer_value():
    training = records([note("Seen by Carl Zorn in Oldtown."), note("Dora Yates, Newtown.")], ["a", "b"])
    heldout = records(
        [
            note("Carl Zorn, Zorn, Oldtown, Emil Voss.", ("Carl Zorn", "NAME"), ("Oldtown", "LOCATION")),
            note("Zorn was here.", ("Zorn", "NAME")),  # hidden by "Carl Zorn" in the training record
            note("Emil Voss, Newtowns.", ("Emil Voss", "NAME"), ("Newtowns", "LOCATION")),
        ],
        ["x", "y", "z"],
    )
    decoys = decoy_values(heldout, training)
    assert sorted(decoys._values) == ["Emil Voss", "Newtowns"]
    assert decoys.n_shared == 3
    assert decoys.n_units.tolist() == [2, 1]  # the strata of decoys are those of their own side
    assert decoys.type.tolist() == ["NAME", "LOCATION"]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(NAMES), max_size=6), st.lists(st.sampled_from(NAMES), max_size=6))
def test_decoys_are_the_difference_of_the_two_sides(train: list[str], heldout: list[str]):
    sides = [
        records([note("x"), *(note(f"{v} came.", (v, "NAME")) for v in side)], [str(i) for i in range(len(side) + 1)])
        for side in (train, heldout)
    ]
    assert set(decoy_values(sides[1], sides[0])._values) == set(heldout) - set(train)


# --- Leaks ------------------------------------------------------------------------------------------------------------


def test_a_leak_is_in_the_output_and_not_in_the_prompt():
    values = identifier_values(
        records([note(f"{n} came.", (n, "NAME")) for n in (*NAMES, "Quimby")], [str(i) for i in range(7)])
    )
    name = values.index_of
    cases = [
        ("Patient name:", " Carl Zorn, and DORA YATES", {name("Carl Zorn"), name("Dora Yates")}),
        ("Carl Zorn is", " carl zorn, Dora Yates", {name("Dora Yates")}),
        ("carl  zorn is", " Carl Zorn", set()),  # the prompt gave it away, however it is written
        ("Berta Quimby has", " Quimby", set()),  # also inside a longer value
        ("x", " Carl Zornig, Mc Carl Zorn2", set()),  # only whole words
        ("x", " Berta Quimby", {name("Berta Quimby")}),  # not also the shorter value inside it
        ("x", "", set()),
        ("Mc", "Carl Zorn came", set()),  # the prompt ends in the middle of the output's first word
        ("Mc", " Carl Zorn came", {name("Carl Zorn")}),
        ("Mc", "x Carl Zorn came", {name("Carl Zorn")}),
        ("Berta ", "Quimby came", {name("Quimby")}),  # half of a longer value: the prompt holds the other half
    ]
    prompts, outputs, expected = zip(*cases, strict=True)
    assert leaks(values, prompts, outputs) == list(expected)
    assert None not in set().union(*expected)


def test_prompt_and_output_are_told_apart_in_the_text_of_both(tiny_tokenizer):
    for text, cut in (("came to 555-01427 today", 5), ("born 3/14/1950, José", 3), ("naïve 😀 patient", 8)):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(1, len(ids)):
            (before,), (behind,) = continuations(tiny_tokenizer, [ids[:at]], [np.array(ids[at:])])
            assert before + behind == text or "\ufffd" in before + behind
        (before,), (behind,) = continuations(tiny_tokenizer, [ids[:cut]], [np.array(ids[cut:])])
        assert (before, behind) == tuple(decoded(tiny_tokenizer, [ids[:cut], ids[cut:]]))


def test_rates_are_per_type_and_stratum_over_what_was_tested():
    notes = [note(f"{n} came.", (n, "NAME")) for n in NAMES] + [note("MRN 123456", ("123456", "MRN"))] * 2
    values = identifier_values(records(notes, [f"p{i}" for i in range(8)]))
    leaked = np.array([True, True, False, False, False, True, True])
    tested = np.array([True, True, True, True, False, False, True])
    figures: Any = leak_figures(values, leaked, tested)
    names = figures["types"]["NAME"]["rate"]
    assert (names.value, names.n, names.higher_is) == (0.5, 4, "worse")
    assert (names.low, names.high) == wilson(2, 4)
    assert set(figures["types"]["NAME"]) == {"rate", "1"}
    assert set(figures["types"]["MRN"]) == {"rate", "2-4"}
    assert (figures["rate"].value, figures["rate"].n) == (0.6, 5)
    assert figures["strata"]["1"].n == 4 and figures["strata"]["2-4"].value == 1.0
    nothing: Any = leak_figures(values, leaked, np.zeros(7, bool))
    assert isinstance(nothing["rate"], NotApplicable) and nothing["types"] == {}


def test_leaks_per_thousand_samples():
    hits = [set(), {1, 2}, set(), {1}] * 25
    figure = leaks_per_1000(hits, np.arange(100))
    assert isinstance(figure, Measure)
    assert (figure.value, figure.n) == (750.0, 100)
    assert 500 < figure.low < 750 < figure.high < 1000
    none = leaks_per_1000([set()] * 100, np.arange(100))
    assert isinstance(none, Measure)
    assert none.value == none.low == 0 and none.high == pytest.approx(1000 * wilson(0, 100)[1])
    assert isinstance(leaks_per_1000([], np.array([])), NotApplicable)


def test_templates_ask_for_the_types_at_hand():
    assert "MRN:" in templates(["MRN"]) and "Patient name:" not in templates(["MRN"])
    assert templates(["SPECIMEN_CODE"]) == ["Specimen code:"]
    assert templates(["AGE", "AGE_OVER_89"]) == ["Age:"]


# --- Context prompts --------------------------------------------------------------------------------------------------


def tokenised(tokenizer: Any, data: Dataset) -> list[TokenisedText]:
    tokens = tokenizer(list(data["text"]), add_special_tokens=False, return_offsets_mapping=True)
    columns = zip(data["text"], tokens["input_ids"], tokens["offset_mapping"], data["identifiers"], strict=True)
    return [TokenisedText(*row) for row in columns]


def test_the_prompt_is_the_true_text_up_to_the_identifier(tiny_tokenizer):
    data = records(
        [
            note("Berta Quimby came. MRN: 123456, again 123456.", ("Berta Quimby", "NAME"), ("123456", "MRN")),
            note("Yesterday Berta Quimby called.", ("Berta Quimby", "NAME")),
        ],
        ["a", "a"],
    )
    values = identifier_values(data)
    found = context_prompts(tokenised(tiny_tokenizer, data), values, [], 200)
    text = dict(zip(found.value.tolist(), decoded(tiny_tokenizer, found.prompts), strict=True))
    # The name opens the first record, where nothing stands before it, so the second record asks for it.
    assert {index: prompt.rstrip() for index, prompt in text.items()} == {
        values.index_of("123456"): "Berta Quimby came. MRN:",
        values.index_of("Berta Quimby"): "Yesterday",
    }
    for prompt in found.prompts:  # cut between the record's own tokens, as in training
        assert any(prompt == t.ids[: len(prompt)] for t in tokenised(tiny_tokenizer, data))
    assert found.n_without_context == 0
    short = context_prompts(tokenised(tiny_tokenizer, data), values, [], 3)
    assert short.prompts == [prompt[-3:] for prompt in found.prompts]
    opened = context_prompts(tokenised(tiny_tokenizer, data), values, [9], 3)
    # With a token that opens every text, the name can be asked for where it opens a record.
    assert dict(zip(opened.value.tolist(), opened.prompts, strict=True)) == {
        values.index_of("Berta Quimby"): [9],
        values.index_of("123456"): [9, *short.prompts[0]],
    }


def test_a_context_that_holds_the_value_is_no_test(tiny_tokenizer):
    text = "123456 is on the form: 123456"
    spans = [{"start": len(text) - 6, "end": len(text), "type": "MRN", "source": "planted"}]
    data = records([{"text": text, "identifiers": spans}], ["a"])
    found = context_prompts(tokenised(tiny_tokenizer, data), identifier_values(data), [], 200)
    assert found.prompts == [] and found.n_without_context == 1


def test_the_synthetic_hospital_has_values_decoys_and_contexts_of_every_type(tiny_tokenizer):
    members, others = make_hospital(n_patients=6, seed=1), make_hospital(n_patients=6, seed=2)
    values, decoys = identifier_values(members), decoy_values(others, members)
    assert set(values.type) == set(decoys.type) == {"NAME", "MRN", "DATE", "PHONE", "ADDRESS", "DOCTOR"}
    assert not set(values._values) & set(decoys._values)
    found = context_prompts(tokenised(tiny_tokenizer, members), values, [], 100)
    assert len(found.value) == len(values) - found.n_without_context > 0.9 * len(values)
