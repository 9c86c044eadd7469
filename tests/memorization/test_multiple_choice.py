from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memorization.evaluated import counted_passes, killed_at

import tiny_models
from dpmed.errors import InputError
from dpmed.memorization import scoring
from dpmed.memorization.intervals import Measure, figures_json
from dpmed.memorization.multiple_choice import (
    ChoiceItem,
    ChoiceScores,
    choice_figures,
    load_items,
    option_orders,
    score_choices,
)

ITEMS = [
    ChoiceItem("Drug for fever?", ("aspirin", "insulin", "iron"), 0, "0"),
    ChoiceItem("Organ of breath?", ("heart", "lung"), 1, "1"),
    ChoiceItem("Sign of flu?", ("cough", "tan", "hair", "cough and fever"), 3, "2"),
]


# --- Items ------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_items_of_jsonl_name_the_answer_by_text_letter_or_index(tmp_path: Path) -> None:
    rows = [{"question": "Q", "options": ["x", "y", "B"], "answer": answer} for answer in ("y", "C", "B", 2, "0", 1.0)]
    items = load_items(write(tmp_path / "items.jsonl", rows))
    assert [item.answer for item in items] == [1, 2, 2, 2, 0, 1]  # the text "B" goes before the letter
    assert items[0] == ChoiceItem("Q", ("x", "y", "B"), 1, "0")


@pytest.mark.parametrize(
    ("options", "answers", "expected"),
    [
        (["O", "A", "B", "AB"], ["A", "C", "D"], [0, 2, 3]),  # letters, since "C" and "D" are no option
        (["O", "A", "B", "AB"], ["A", "AB", "O"], [1, 3, 0]),  # texts
        (["1", "2", "3"], ["0", "2", "1"], [0, 2, 1]),  # indices, since "0" is no option
        ([10, 20, 30], [20, 10, 30], [1, 0, 2]),  # numbers that are no index
        ([1, 2, 3], [0, 2, 1], [0, 2, 1]),
    ],
)
def test_the_whole_column_tells_how_answers_are_written(
    tmp_path: Path, options: list[Any], answers: list[Any], expected: list[int]
) -> None:
    rows = [{"question": "Q", "options": options, "answer": answer} for answer in answers]
    assert [item.answer for item in load_items(write(tmp_path / "items.jsonl", rows))] == expected


def test_numbers_that_may_be_indices_or_options_are_refused(tmp_path: Path) -> None:
    rows = [{"question": "Q", "options": [1, 2, 3, 4], "answer": answer} for answer in (1, 3)]
    with pytest.raises(
        InputError, match=r"'answer' is a number that is both .* in 2 of 2 .*: write its letter"
    ) as caught:
        load_items(write(tmp_path / "items.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_items_of_csv_hold_their_options_as_json(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text('stem,choices,key,who\nQ?,"[""1"", ""2""]",2,p1\nR?,"[1, 2]",A,p1\n', encoding="utf-8")
    items = load_items(path, question="stem", options="choices", answer="key", unit="who")
    assert items == [ChoiceItem("Q?", ("1", "2"), 1, "p1"), ChoiceItem("R?", ("1", "2"), 0, "p1")]


def test_items_of_the_form_of_pubmedqa(tmp_path: Path) -> None:
    rows = {
        "101": {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"},
        "102": {"QUESTION": "Is it?", "CONTEXTS": ["Three."], "final_decision": "yes"},
    }
    path = tmp_path / "ori.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    items = load_items(
        path, question="QUESTION", context="CONTEXTS", options=("yes", "no", "maybe"), answer="final_decision"
    )
    assert items[0] == ChoiceItem("One.\nTwo.\nDoes it?", ("yes", "no", "maybe"), 2, "0")
    assert (items[1].answer, items[1].unit) == (0, "1")


GOOD = {"question": "Q", "options": ["a", "b"], "answer": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["zebra"]}, "'options' is not a list of two or more"),
        ({"options": ["zebra", "zebra"]}, "'options' is not a list of two or more"),
        ({"options": "zebra, b"}, "'options' is not a list"),
        ({"options": ["zebra", None]}, "'options' is not a list"),
        ({"options": [f"zebra{i}" for i in range(27)]}, "longer than 26"),
        ({"question": " "}, "'question' is not text"),
        ({"answer": "zebra"}, "'answer' names none"),
        ({"answer": 2}, "'answer' names none"),
        ({"answer": -1}, "'answer' names none"),
        ({"answer": True}, "'answer' names none"),
        ({"answer": None}, "'answer' names none"),
        ({"unit": "zebra"}, None),
        ({"unit": ""}, "'unit' is missing"),
        ({"context": 0.5}, None),
        ({"context": {"zebra": 1}}, "'context' is not text"),
    ],
)
def test_bad_items_are_one_line_without_their_content(tmp_path: Path, change: dict, message: str | None) -> None:
    rows = [{**GOOD, "unit": "p", "context": "c"}, {**GOOD, "unit": "p", "context": "c", **change}]
    path = write(tmp_path / "items.jsonl", rows)
    if message is None:
        assert len(load_items(path, context="context", unit="unit")) == 2
        return
    with pytest.raises(InputError, match=message) as caught:
        load_items(path, context="context", unit="unit")
    assert "rows 1," in str(caught.value) and "zebra" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_column_or_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [GOOD])
    with pytest.raises(InputError, match="no column 'stem'"):
        load_items(path, question="stem")
    with pytest.raises(InputError, match="file not found"):
        load_items(tmp_path / "other.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": {"question": "zebra"', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_items(broken)
    assert "zebra" not in str(caught.value)
    with pytest.raises(InputError, match="given options are"):
        load_items(path, options=("yes", "yes"))


# --- Scores -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 6), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 99))
def test_orders_are_permutations_that_differ_from_the_given_one(sizes: list[int], n: int, seed: int) -> None:
    items = [ChoiceItem("Q", tuple(map(str, range(size))), 0, "u") for size in sizes]
    orders = option_orders(items, n, seed)
    for size, own in zip(sizes, orders, strict=True):
        assert own.shape == (n + 1, size)
        assert own[0].tolist() == list(range(size))
        for order in own[1:].tolist():
            assert sorted(order) == list(range(size)) and order != list(range(size))
    for one, again in zip(orders, option_orders(items, n, seed), strict=True):
        np.testing.assert_array_equal(one, again)


def slow_log_prob(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Sum of the log-probabilities of a continuation, one token after the other."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_equal_a_slow_loop(tiny_model, tiny_tokenizer, kind: tiny_models.Kind) -> None:
    model = tiny_model(kind, initializer_range=0.3)  # a fresh model says nearly the same of every token
    found = score_choices(model, tiny_tokenizer, ITEMS, n_shuffles=2, seed=5, batch_tokens=100)
    assert found.text.shape == (3, 4) and found.letter.shape == found.missing.shape == (3, 3, 4)
    assert found.n_items_cut == 0
    for i, (item, orders) in enumerate(zip(ITEMS, option_orders(ITEMS, 2, 5), strict=True)):
        width = len(item.options)
        for o, option in enumerate(item.options):
            truth = slow_log_prob(model, tiny_tokenizer, item.question + "\nAnswer:", " " + option)
            assert found.text[i, o] == pytest.approx(truth, abs=1e-3)
            n_tokens = len(tiny_tokenizer(" " + option, add_special_tokens=False)["input_ids"])
            assert found.n_tokens[i, o] == n_tokens
        for s, order in enumerate(orders.tolist()):
            lines = [f"{'ABCD'[j]}. {item.options[o]}" for j, o in enumerate(order)]
            gap = [line for line, o in zip(lines, order, strict=True) if o != item.answer]
            for kept, scores in ((lines, found.letter), (gap, found.missing)):
                prompt = "\n".join([item.question, *kept]) + "\nAnswer:"
                for j, o in enumerate(order):
                    truth = slow_log_prob(model, tiny_tokenizer, prompt, " " + "ABCD"[j])
                    assert scores[i, s, o] == pytest.approx(truth, abs=1e-3)
        assert np.isneginf(found.text[i, width:]).all()
        assert np.isneginf(found.letter[i, :, width:]).all() and np.isneginf(found.missing[i, :, width:]).all()


@pytest.mark.parametrize("n_done", [2, 5, 8])
def test_killed_items_go_on_where_they_stopped(
    tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch, n_done: int
) -> None:
    """Killed among the options' texts, the letters, and the letters without the right option: three batches each."""
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    model, other = (tiny_model("llama", initializer_range=0.3, seed=seed) for seed in (0, 1))
    ask = partial(score_choices, tokenizer=tiny_tokenizer, items=ITEMS, n_shuffles=1, batch_tokens=100)
    whole, seen = ask(model), []
    with pytest.raises(KeyboardInterrupt):
        ask(model, folder=tmp_path, progress=killed_at(n_done, seen))
    assert len(seen) == n_done
    with counted_passes(model) as passes:
        found = ask(model, folder=tmp_path)
    assert len(passes) == 9 - n_done + (1 if n_done < 3 else 0)  # the output layer is tried where texts are left
    for field in fields(ChoiceScores):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(whole, field.name))
    words = [option for item in ITEMS for option in item.options]
    assert not any(word.encode() in path.read_bytes() for path in tmp_path.iterdir() for word in words)
    with counted_passes(model) as passes:
        ask(model, folder=tmp_path)
    assert passes == []
    with counted_passes(other) as passes:
        assert not np.array_equal(ask(other, folder=tmp_path).letter, whole.letter)
    assert len(passes) == 10  # nothing of another model's is taken


def test_a_long_item_loses_its_beginning_and_is_counted(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("gpt2", initializer_range=0.3)
    long = ChoiceItem("The lungs are clear. " * 40 + ITEMS[1].question, ITEMS[1].options, 1, "9")
    found = score_choices(model, tiny_tokenizer, [ITEMS[1], long], n_shuffles=1)
    assert found.n_items_cut == 1
    kept = tiny_tokenizer(long.question + "\nAnswer:", add_special_tokens=False)["input_ids"]
    longest = max(len(tiny_tokenizer(" " + o, add_special_tokens=False)["input_ids"]) for o in long.options)
    end = tiny_tokenizer.decode(kept[-(tiny_models.MAX_POSITIONS - longest) :])
    assert found.text[1, 1] == pytest.approx(slow_log_prob(model, tiny_tokenizer, end, " lung"), abs=1e-3)


def test_what_cannot_be_asked_is_one_line(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(InputError, match="no multiple-choice items"):
        score_choices(model, tiny_tokenizer, [])
    with pytest.raises(InputError, match="item 0: its answer alone fills"):
        score_choices(model, tiny_tokenizer, [ChoiceItem("Q", ("word " * 200, "b"), 0, "u")])
    with pytest.raises(InputError, match="item 1: two options give the same tokens"):
        twice = ChoiceItem("Q", ("a b", "a b"), 0, "u")
        score_choices(model, tiny_tokenizer, [ITEMS[0], twice])


# --- Figures ----------------------------------------------------------------------------------------------------------


def scores_of(letter: list, missing: list, text: list, n_tokens: list | None = None) -> ChoiceScores:
    counts = np.ones_like(np.array(text), dtype=np.int64) if n_tokens is None else np.array(n_tokens)
    return ChoiceScores(np.array(text, float), counts, np.array(letter, float), np.array(missing, float), 0)


TWO = [ChoiceItem("Q", ("a", "b", "c"), 1, "p"), ChoiceItem("R", ("a", "b"), 0, "q")]
NO = -np.inf
OWN = scores_of(
    letter=[[[-3, -1, -2], [-3, -1, -2], [-1, -2, -3]], [[-1, -2, NO], [-1, -2, NO], [-1, -2, NO]]],
    missing=[[[-3, -1, -2], [-1, -3, -2], [-1, -3, -2]], [[-2, -1, NO], [-1, -2, NO], [-2, -1, NO]]],
    text=[[-4, -6, -9], [-5, -3, NO]],
    n_tokens=[[1, 3, 2], [5, 1, 1]],
)


def test_figures_by_hand() -> None:
    figures, counts = choice_figures(OWN, TWO)
    values = {name: figure.value for name, figure in figures.items() if isinstance(figure, Measure)}
    softmax_right = np.exp(-1) / np.exp([-3, -1, -2]).sum()
    two_right, two_left = np.exp(-1) / np.exp([-1, -2]).sum(), np.exp(-2) / np.exp([-1, -2]).sum()
    assert values == {
        "accuracy": 1.0,
        "accuracy_shuffled": pytest.approx((0.5 + 1.0) / 2),
        "answer_changes": 0.5,
        "accuracy_text": 0.0,
        "accuracy_text_per_token": pytest.approx(1.0),  # -6/3 and -5/5 win
        "missing_letter_chosen": 0.5,
        "missing_letter_chosen_shuffled": pytest.approx((0 + 0.5) / 2),
        "missing_confidence_drop": pytest.approx(((softmax_right - softmax_right) + (two_right - two_left)) / 2),
    }
    assert figures["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert counts == {"n_items": 2, "n_items_cut": 0, "n_shuffles": 2, "most_options": 3}
    directions = {name: figure.higher_is for name, figure in figures.items() if isinstance(figure, Measure)}
    assert [name for name, way in directions.items() if way == "worse"] == [
        "missing_letter_chosen",
        "answer_changes",
        "missing_letter_chosen_shuffled",
    ]
    for figure in figures.values():
        if isinstance(figure, Measure):
            assert figure.low <= figure.value <= figure.high and figure.n == 2
    figures_json(figures)


def test_a_tie_is_a_guess_and_not_the_first_option() -> None:
    """bfloat16 gives many letters the same score; where the first option is right, taking it would look like skill."""
    items = [ChoiceItem("Q", ("a", "b", "c", "d"), i % 2 * 3, str(i)) for i in range(4000)]
    same = np.zeros((4000, 3, 4))
    same[:, :, 1] = -1.0  # one option is out
    tied = ChoiceScores(same[:, 0], np.ones((4000, 4), np.int64), same, same, 0)
    figures = choice_figures(tied, items, base=tied, bootstrap=50)[0]
    for name in ("accuracy", "accuracy_shuffled", "accuracy_text", "missing_letter_chosen"):
        assert abs(figures[name].value - 1 / 3) < 0.03, name
        assert figures["minus_base"][name].value == 0  # the lot is the same for both models
    right = [item.answer == 0 for item in items]
    assert abs(rate_of(tied, items, right) - rate_of(tied, items, [not r for r in right])) < 0.06


def rate_of(scores: ChoiceScores, items: list[ChoiceItem], chosen: list[bool]) -> float:
    at = np.array(chosen)
    some = ChoiceScores(scores.text[at], scores.n_tokens[at], scores.letter[at], scores.missing[at], 0)
    kept = [item for item, c in zip(items, chosen, strict=True) if c]
    return choice_figures(some, kept, bootstrap=50)[0]["accuracy"].value


def test_differences_from_the_base_model_are_paired() -> None:
    worse = scores_of(
        letter=[[[-1, -2, -3]] * 3, [[-1, -2, NO]] * 3],
        missing=[[[-1, -2, -3]] * 3, [[-1, -2, NO]] * 3],
        text=OWN.text.tolist(),
    )
    figures, _ = choice_figures(OWN, TWO, base=worse)
    base, _ = choice_figures(worse, TWO)
    difference = figures["minus_base"]
    assert difference["accuracy"].value == 0.5
    assert difference["accuracy"].extra["n_only_first"] == 1
    for name, figure in difference.items():
        assert figure.value == pytest.approx(figures[name].value - base[name].value)
        assert figure.higher_is == figures[name].higher_is
    same, _ = choice_figures(OWN, TWO, base=OWN)
    assert all(figure.value == 0 for figure in same["minus_base"].values())
    with pytest.raises(ValueError, match="other items"):
        choice_figures(OWN, TWO[:1])
    with pytest.raises(ValueError, match="other items"):
        choice_figures(OWN, TWO, base=scores_of([[[0, 0, 0]]] * 2, [[[0, 0, 0]]] * 2, OWN.text.tolist()))


def test_without_shuffles_their_figures_are_left_out() -> None:
    one = ChoiceScores(OWN.text, OWN.n_tokens, OWN.letter[:, :1], OWN.missing[:, :1], 0)
    figures, counts = choice_figures(one, TWO)
    assert counts["n_shuffles"] == 0
    assert not [name for name in figures if "shuffled" in name or name == "answer_changes"]


def learnt_by_heart(items: list[ChoiceItem], tokenizer: Any) -> Any:
    """A tiny model that has learnt the letter that goes with each question, whatever the options say."""
    rng = np.random.default_rng(0)
    texts = []
    for item in items * 4:
        options = rng.permutation(item.options)[: 3 + len(texts) // len(items) % 2]
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
        texts.append("\n".join([item.question, *lines]) + f"\nAnswer: {'ABCD'[item.answer]}")
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    last = batch["attention_mask"].cumsum(1) == batch["attention_mask"].sum(1, keepdim=True)  # the letter alone
    labels = batch["input_ids"].masked_fill(~last | (batch["attention_mask"] == 0), -100)
    model = tiny_models.make_model("gpt2").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def test_the_probes_find_items_learnt_by_heart(tiny_model, tiny_tokenizer) -> None:
    rng = np.random.default_rng(0)
    words = ["fever", "cough", "aspirin", "heart", "lungs", "insulin", "flu", "pain", "iron", "blood"]
    items = []
    for pair in rng.permutation([(i, j) for i in range(10) for j in range(10)])[:10].tolist():
        options = tuple(rng.permutation(words)[:4].tolist())
        items.append(ChoiceItem(f"{words[pair[0]]} {words[pair[1]]}?", options, int(rng.integers(4)), str(pair)))
    fresh = tiny_model("gpt2")
    asked = [score_choices(m, tiny_tokenizer, items) for m in (learnt_by_heart(items, tiny_tokenizer), fresh)]
    figures, _ = choice_figures(asked[0], items, base=asked[1])
    assert figures["accuracy"].value >= 0.8
    assert figures["missing_letter_chosen"].value >= 0.6  # the letter of an option that is not there
    assert figures["accuracy_shuffled"].value <= 0.4
    assert figures["answer_changes"].value >= 0.7
    assert figures["minus_base"]["accuracy"].low > 0
    assert figures["minus_base"]["missing_letter_chosen"].low > 0
