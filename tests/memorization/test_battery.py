from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.battery import ATTACKS, Battery, Side, classifier_nothing, label_array
from dpmed.memorization.intervals import Measure, NotApplicable
from dpmed.memorization.membership import margin_score, modified_entropy_score
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import record_units
from dpmed.recipe import EvaluationSection

SETTINGS = EvaluationSection(
    prefix_tokens=[3], suffix_tokens=[3], fpr=[0.1], bootstrap=50, tries=[2], probability=[0.5]
)
NAMES = ("x", "y", "z")


def side(name: str, labels: list[Any], tokenizer: Any, spec: TaskSpec, words: str = "fever and cough for") -> Side:
    n = len(labels)
    columns = {"text": [f"{words} {i} days" for i in range(n)], "unit": [f"p{i}" for i in range(n)]}
    spans = {"record_id": columns["unit"], "identifiers": [[]] * n}
    records = Dataset.from_dict({**columns, **spans, "label": labels})
    encoded = encode(records, tokenizer, spec)
    return Side(name, records, encoded, record_units(encoded))


def test_labels_as_the_attacks_take_them(tiny_tokenizer):
    single = TaskSpec("classification", labels=NAMES, max_length=16)
    several = TaskSpec("classification", labels=NAMES, multi_label=True, max_length=16)
    assert label_array(side("train", ["z", "x"], tiny_tokenizer, single).encoded, single).tolist() == [2, 0]
    one = side("t", ["z"], tiny_tokenizer, single).records.remove_columns("label")
    unlabelled = encode(one, tiny_tokenizer, single)
    assert label_array(unlabelled, single).tolist() == [-1]
    found = label_array(side("train", [["y", "x"], [], ["z"]], tiny_tokenizer, several).encoded, several)
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    none = encode(side("t", [["y"]], tiny_tokenizer, several).records.remove_columns("label"), tiny_tokenizer, several)
    assert np.isnan(label_array(none, several)).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_that_is_surer_of_its_own_records_is_found_out(tiny_tokenizer, multi_label: bool):
    spec = TaskSpec("classification", labels=NAMES, multi_label=multi_label, max_length=16)
    labels = [[NAMES[i % 3]] if multi_label else NAMES[i % 3] for i in range(12)]
    members, others = (side(name, labels, tiny_tokenizer, spec) for name in ("train", "heldout"))
    truth = np.eye(3)[np.arange(12) % 3]
    logits = {"train": (8 * truth - 4).astype(np.float32), "heldout": (2 * truth - 1).astype(np.float32)}
    losses = {"train": np.full(12, 0.1, np.float32), "heldout": np.full(12, 0.9, np.float32)}
    figures = Battery(spec, SETTINGS).classifier_membership(members, others, logits, losses)
    for name in ("loss", "margin", "modified_entropy"):
        assert figures["membership"][name]["auc"].value == 1.0
    assert figures["membership_attack"] == "loss"
    given = label_array(members.encoded, spec)
    for score in (margin_score, modified_entropy_score):
        assert score(logits["train"], given).min() > score(logits["heldout"], given).max()
    swapped = Battery(spec, SETTINGS).classifier_membership(
        members, others, {"train": logits["heldout"], "heldout": logits["train"]}, losses
    )
    assert swapped["membership"]["margin"]["auc"].value == 0.0


def test_what_a_classifier_cannot_leak_has_reasons():
    nothing = classifier_nothing()
    assert set(nothing) >= {"extraction_rate", "probabilistic_extraction", "extraction_strength", "fill_mask"}
    assert all(isinstance(figure, NotApplicable) and figure.reason for figure in nothing.values())


def test_a_token_that_is_ruled_out_makes_no_finite_perplexity(tiny_model, tiny_tokenizer):
    spec = TaskSpec(max_length=32)
    members = side("train", [None] * 4, tiny_tokenizer, spec)
    scores = score_records(tiny_model("gpt2"), members.encoded, spec, tiny_tokenizer)
    assert isinstance(Battery(spec, SETTINGS).perplexity(members, scores), Measure)
    scores.log_prob[3] = -np.inf
    found = Battery(spec, SETTINGS).perplexity(members, scores)
    assert isinstance(found, NotApplicable) and "infinite" in found.reason


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_model_and_its_own_copy_as_base_differ_in_nothing(tiny_model, tiny_tokenizer, kind: str):
    spec = TaskSpec("causal_lm" if kind == "gpt2" else "masked_lm", max_length=32)
    battery = Battery(spec, SETTINGS)
    members = side("train", [None] * 8, tiny_tokenizer, spec, "fever")
    others = side("heldout", [None] * 8, tiny_tokenizer, spec, "cough")
    scores = {s.name: score_records(tiny_model(kind), s.encoded, spec, tiny_tokenizer) for s in (members, others)}
    figures = battery.membership(members, others, scores, scores)
    assert tuple(figures["membership"]) == ATTACKS
    for name in ("reference", "ez"):  # nothing moved: all records tie
        assert figures["membership"][name]["auc"].value == 0.5
    alone = battery.membership(members, others, scores, None, "none here")["membership"]
    assert {alone[name].reason for name in ("reference", "ez")} == {"none here"}
    own, counts = battery.generative(members, scores["train"])
    assert isinstance(own["exact_memorization"], Measure)
    assert isinstance(own["extraction_strength"], Measure if kind == "gpt2" else NotApplicable)
    assert isinstance(own["fill_mask"], dict if kind == "bert" else NotApplicable)
    assert ("extraction" in counts) == (kind == "gpt2")
    assert counts["n_records_without_scored_token"] == 0
