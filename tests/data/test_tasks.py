"""Records to windows of tokens: nothing is lost, labels and identifiers stay where they belong."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

import tiny_models
from dpmed.data import tasks
from dpmed.data.tasks import EncodedRecords, TaskSpec, covers, encode, label_names, label_option_ids
from dpmed.errors import InputError

TOKENIZER = tiny_models.make_tokenizer()
LABELS = ("acute", "chronic")
WORDS = st.sampled_from(
    ["fever", "Ærøskøbing", "naïve", "北京", "🙂", "e\u0301te\u0301", "MRN", "0042", "x\ty", "a\n\nb"]
)
LANGUAGE_TASKS = st.sampled_from(["causal_lm", "masked_lm"])
TEXTS = st.lists(WORDS, min_size=1, max_size=30).map(" ".join)


def with_special_tokens() -> Any:
    """The same tokenizer with [CLS] before and [SEP] after a text, as BERT's."""
    tokenizer = tiny_models.make_tokenizer()
    ids = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    return tokenizer


SPECIAL = with_special_tokens()


def records(texts: list[str], **columns: list[Any]) -> Dataset:
    plain = {"text": texts, "unit": [f"p{i}" for i in range(len(texts))], "identifiers": [[] for _ in texts]}
    return Dataset.from_dict({**plain, **columns})


def spec(kind: Any = "causal_lm", **changes: Any) -> TaskSpec:
    return TaskSpec(**{"kind": kind, "max_length": 24, **changes})


def text_tokens(encoded: EncodedRecords, row: int) -> list[int]:
    windows = [e for e in encoded if e.record == row]
    assert [e.window for e in windows] == list(range(len(windows)))
    return [token for e in windows for token in e.input_ids[e.text_start : e.text_end]]


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), kind=LANGUAGE_TASKS, cls=st.booleans())
def test_windows_cut_the_tokens_of_a_text_exactly_and_fit(texts: list[str], kind: Any, cls: bool) -> None:
    tokenizer = SPECIAL if cls else TOKENIZER
    encoded = encode(records(texts), tokenizer, spec(kind))
    for row, text in enumerate(texts):
        assert text_tokens(encoded, row) == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert TOKENIZER.decode(text_tokens(encoded, row)) == text
    assert max(encoded.lengths) <= 24
    assert encoded.n_records == len(texts)
    assert encoded.n_records_cut == sum(sum(e.record == row for e in encoded) > 1 for row in range(len(texts)))
    for example in encoded:
        assert example.unit == example.record  # each text has its own unit here
        if cls:
            ids = tokenizer.get_vocab()
            assert example.input_ids[0] == ids["[CLS]"]
            assert kind == "causal_lm" or example.input_ids[-1] == ids["[SEP]"]


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_texts_are_tokenised_some_at_a_time_with_the_same_result(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["fever 🙂 0042", "", "naïve " * 30, "MRN", "北京 a\n\nb"]
    whole = list(encode(records(texts), SPECIAL, spec(kind)).content())
    monkeypatch.setattr(tasks, "_TEXTS_AT_ONCE", 2)
    assert list(encode(records(texts), SPECIAL, spec(kind)).content()) == whole


def test_encoded_records_take_little_more_than_a_reference_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TEXTS_AT_ONCE", 10)
    data, tokenizer = records(["lisinopril metformin cardiologist " * 30] * 100), tiny_models.make_tokenizer()
    tracemalloc.start()
    encoded = encode(data, tokenizer, spec(max_length=120))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_tokens = sum(encoded.lengths)
    assert kept < 16 * n_tokens  # 8 for each place in a list, and the windows themselves
    assert peak < 60 * n_tokens  # and a tenth of all texts in the form of the tokenizer


def test_windows_stay_with_their_patient() -> None:
    long = "fever and cough " * 30
    encoded = encode(records([long, "short", long], unit=["b", "a", "b"]), TOKENIZER, spec())
    assert encoded.unit_names == ["b", "a"]
    for example in encoded:
        assert encoded.unit_names[example.unit] == ("a" if example.record == 1 else "b")
    assert encoded.unit_of_example == [e.unit for e in encoded]
    assert encoded.n_records_cut == 2


@given(before=TEXTS, value=WORDS, after=TEXTS, length=st.integers(8, 64), kind=LANGUAGE_TASKS)
def test_token_spans_cover_every_character_of_an_identifier(
    before: str, value: str, after: str, length: int, kind: Any
) -> None:
    text, start = f"{before} {value} {after}", len(before) + 1
    span = {"start": start, "end": start + len(value), "type": "NAME", "source": "known"}
    encoded = encode(records([text], identifiers=[[span]]), TOKENIZER, spec(kind, max_length=length))
    offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    reached: set[int] = set()
    done = 0
    for example in encoded:
        n_text = example.text_end - example.text_start
        own = offsets[done : done + n_text]
        for found in example.spans:
            assert example.text_start <= found.start < found.end <= example.text_end
            inside = own[found.start - example.text_start : found.end - example.text_start]
            reached |= {c for a, b in inside for c in range(a, b)}
            covered = inside[0][0] <= start and inside[-1][1] >= start + len(value)
            assert found.whole == covered
        done += n_text
    assert set(range(start, start + len(value))) <= reached
    outside = [i for i, (a, b) in enumerate(offsets) if b <= start or a >= start + len(value)]
    assert not reached & {c for i in outside for c in range(*offsets[i])} or "🙂" in text or "北" in text


def test_an_identifier_that_a_window_cuts_is_kept_in_both_and_is_not_whole() -> None:
    value = "Bartholomew-Zwiebelkuchen"
    text = f"Mr {value} has fever"
    span = {"start": 3, "end": 3 + len(value), "type": "NAME", "source": "known"}
    one = encode(records([text], identifiers=[[span]]), TOKENIZER, spec(max_length=64))
    assert [s.whole for e in one for s in e.spans] == [True]
    several = encode(records([text], identifiers=[[span]]), TOKENIZER, spec(max_length=12))
    cut = [s for e in several for s in e.spans]
    assert len(cut) >= 2
    assert not any(s.whole for s in cut)
    assert {(s.type, s.source) for s in cut} == {("NAME", "known")}


def test_the_tokens_under_a_span_spell_the_identifier() -> None:
    text = "Seen by Dr Ærøskøbing on 3 March."
    span = {"start": 11, "end": 21, "type": "NAME", "source": "planted"}
    (example,) = encode(records([text], identifiers=[[span]]), TOKENIZER, spec(max_length=64))
    (found,) = example.spans
    assert str(TOKENIZER.decode(example.input_ids[found.start : found.end])).strip() == "Ærøskøbing"


def test_label_tokens_follow_the_prompt_in_every_window() -> None:
    data = records(["fever " * 40, "cough"], label=["chronic", "acute"])
    task = spec(labels=LABELS, max_length=48)
    encoded = encode(data, TOKENIZER, task)
    assert sum(e.record == 0 for e in encoded) > 1
    for example in encoded:
        name = ("chronic", "acute")[example.record]
        assert TOKENIZER.decode(example.input_ids[example.prompt_end :]) == f" {name}[EOS]"
        assert TOKENIZER.decode(example.input_ids[example.text_end : example.prompt_end]) == "\nLabel:"
        assert example.label == LABELS.index(name)


def test_label_options_are_the_tokens_that_training_saw() -> None:
    task = spec(labels=LABELS, max_length=48)
    options = label_option_ids(TOKENIZER, task)
    for example in encode(records(["a", "b"], label=list(LABELS)), TOKENIZER, task):
        assert isinstance(example.label, int)
        assert example.input_ids[example.prompt_end : -1] == options[example.label]


def test_labels_that_a_model_cannot_tell_apart_are_refused() -> None:
    lossy = tiny_models.make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="same tokens"):
        label_option_ids(lossy, spec(labels=("Acute", "acute")))


def test_without_labels_only_the_last_window_ends_the_text() -> None:
    encoded = list(encode(records(["fever " * 40]), TOKENIZER, spec()))
    ends = [e.input_ids[-1] == TOKENIZER.eos_token_id for e in encoded]
    assert ends == [False] * (len(encoded) - 1) + [True]


def test_several_labels_become_their_indices() -> None:
    task = TaskSpec(kind="classification", labels=("a", "b", "c"), multi_label=True)
    encoded = list(encode(records(["x", "y"], label=[["c", "a"], []]), TOKENIZER, task))
    assert [e.label for e in encoded] == [(2, 0), ()]


def test_word_numbers_group_the_tokens_of_a_word() -> None:
    (example,) = encode(records(["Bartholomew coughs"]), TOKENIZER, spec("masked_lm", max_length=64))
    words = example.words
    assert len(words) == example.text_end - example.text_start
    tokens_and_words = list(zip(example.input_ids[example.text_start : example.text_end], words, strict=True))
    by_word = {word: [token for token, w in tokens_and_words if w == word] for word in words}
    assert [TOKENIZER.decode(tokens) for tokens in by_word.values()] == ["Bartholomew", " coughs"]


def test_an_unknown_label_is_refused_by_row_and_not_by_value() -> None:
    with pytest.raises(InputError, match="record 1") as error:
        encode(records(["x", "y"], label=["acute", "Zanzibar"]), TOKENIZER, spec(labels=LABELS, max_length=48))
    assert "Zanzibar" not in str(error.value)


def test_a_context_without_room_for_text_is_refused() -> None:
    with pytest.raises(InputError, match="no room for text"):
        encode(records(["x"], label=["acute"]), TOKENIZER, spec(labels=LABELS, max_length=5))


def test_a_slow_tokenizer_is_refused() -> None:
    slow: Any = type("Slow", (), {"is_fast": False})()
    with pytest.raises(InputError, match="fast tokenizer"):
        encode(records(["x"]), slow, spec())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "regression"}, "not known"),
        ({"multi_label": True}, "one label per record"),
        ({"kind": "classification"}, "needs labels"),
        ({"loss_on": "completion"}, "needs labels"),
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"mask_probability": 1.0}, "mask_probability"),
        ({"completion_weight": 0.0}, "completion_weight"),
    ],
)
def test_a_task_that_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TaskSpec(**changes)


@pytest.mark.parametrize("thresholds", [None, (0.4, 0.6)])
def test_a_task_survives_json(thresholds: Any) -> None:
    task = TaskSpec(kind="classification", labels=LABELS, multi_label=True, thresholds=thresholds, pooling="mean")
    assert TaskSpec.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_label_names_are_sorted_and_distinct() -> None:
    assert label_names(records(["x", "y", "z"], label=["b", "a", "b"])) == ("a", "b")
    assert label_names(records(["x", "y"], label=[["c", "a"], []])) == ("a", "c")
    assert label_names(records(["x"])) == ()


@pytest.mark.parametrize(
    ("which", "covered"),
    [
        ("direct", {"planted", "known", "pattern"}),
        ("indirect", {"indirect"}),
        ("all", {"planted", "known", "pattern", "indirect"}),
    ],
)
def test_which_sources_a_choice_of_identifiers_covers(which: Any, covered: set[str]) -> None:
    assert {s for s in ("planted", "known", "pattern", "indirect") if covers(which, s)} == covered
