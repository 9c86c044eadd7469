"""`sani.surrogates`: what the repair reads holds no target, its surrogates are never labels, and all else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import tiny_models
from dpmed.data.identifiers import tag_identifiers
from dpmed.data.records import load_records
from dpmed.data.tasks import Example, TaskSpec, covers, encode
from dpmed.errors import InputError
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig

NAMES = ("Brunhilde Zwiebel", "Ottokar Knoblauch")


def make_records() -> Dataset:
    """Two patients; one name is tagged in one note only, and each has a word that is rare."""
    rows: list[dict[str, Any]] = []
    for patient, name in enumerate(NAMES):
        for visit in range(2):
            text = f"The patient {name} came on 03/0{visit + 1}/2019 with fever and {('gout', 'angina')[patient]}."
            spans = [
                {"start": 12, "end": 12 + len(name), "type": "NAME"},
                {"start": 21 + len(name), "end": 31 + len(name), "type": "DATE"},
            ]
            rows.append({"text": text, "unit": f"p{patient}", "identifiers": spans if visit == 0 else spans[1:]})
    return Dataset.from_list(rows)


def make_sani(folder: Path, *, kind: tiny_models.Kind = "llama", records: Any = None, **changes: Any) -> SANITrainer:
    values: dict[str, Any] = {"identifiers": "all", "max_length": 96, "max_steps": 2, "surrogates": True}
    values |= {"task": "masked_lm" if kind == "bert" else "causal_lm", "per_device_train_batch_size": 2}
    args = SANITrainingConfig(output_dir=str(folder), use_cpu=True, unit_column="unit", **{**values, **changes})
    options: dict[str, Any] = {} if records is None else {"spec": TaskSpec(kind=args.task, max_length=96)}
    return SANITrainer(
        tiny_models.make_model(kind),
        args,
        records or make_records(),
        processing_class=tiny_models.make_tokenizer(),
        **options,
    )


def text_of(example: Example) -> str:
    return str(tiny_models.make_tokenizer().decode(example.input_ids[example.text_start : example.text_end]))


@pytest.mark.parametrize("identifiers", ["direct", "indirect", "all"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_no_target_is_read_and_no_surrogate_is_a_label(kind: Any, identifiers: Any, tmp_path: Path) -> None:
    trainer = make_sani(tmp_path, kind=kind, identifiers=identifiers)
    records = load_records(make_records(), unit="unit", identifiers="identifiers")
    tagged = tag_identifiers(records, k=2, indirect=identifiers != "direct")
    examples = list(trainer.train_dataset)
    assert len(examples) == len(tagged) == 4
    total = torch.zeros(4)
    for _ in range(40 if kind == "bert" else 1):
        batch = trainer.data_collator(examples)
        for row, example in enumerate(examples):
            for span in example.spans:
                if covers(identifiers, span.source):
                    assert float(batch["weights"][row, span.start : span.end].sum()) == 0.0
        total += batch["weights"].sum(dim=1)
    assert bool((total > 3).all())
    n_targets = 0
    for example, old in zip(examples, tagged.to_list(), strict=True):
        read = text_of(example)
        done = 0
        for span in old["identifiers"]:
            value = old["text"][span["start"] : span["end"]]
            n_targets += covers(identifiers, span["source"])
            assert (value in read) is not covers(identifiers, span["source"])
            between = old["text"][done : span["start"]]
            assert between in read
            done = span["end"]
        assert read.endswith(old["text"][done:])
    assert n_targets >= 2


def test_one_patient_has_the_same_surrogates_in_all_notes(tmp_path: Path) -> None:
    trainer = make_sani(tmp_path, identifiers="direct")
    names: list[str] = []
    for example in trainer.train_dataset:
        text = text_of(example)
        names.append(text[len("The patient ") : text.index(" came on")])
    assert names[0] == names[1] != names[2] == names[3]
    assert make_sani(tmp_path, identifiers="direct", seed=42).train_dataset.examples == trainer.train_dataset.examples
    assert make_sani(tmp_path, identifiers="direct", seed=7).train_dataset.examples != trainer.train_dataset.examples


def test_terms_get_surrogates_too(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("fever\n", encoding="utf-8")
    trainer = make_sani(tmp_path, terms=str(file))
    for example in trainer.train_dataset:
        text = text_of(example)
        assert "fever" not in text and any(name in text for name in NAMES)
        assert [span.type for span in example.spans] == ["TERM"]


@pytest.mark.parametrize("select", ["gradient", "activation"])
def test_neurons_are_scored_on_what_the_checkpoint_learned(select: Any, tmp_path: Path) -> None:
    """Surrogates mean nothing to the checkpoint: the same neurons are erased with and without them."""
    ends = [
        make_sani(tmp_path, kind="llama", surrogates=surrogates, select=select, reset_to="zero").model.state_dict()
        for surrogates in (True, False)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_trains_and_resumes_with_the_same_surrogates(tmp_path: Path) -> None:
    ends = []
    for folder, start in (("whole", None), ("again", tmp_path / "whole" / "checkpoint-1")):
        torch.manual_seed(0)
        trainer = make_sani(tmp_path / folder, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        assert trainer.state.global_step == 2
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_encoded_records_are_refused(tmp_path: Path) -> None:
    records = load_records(make_records(), unit="unit", identifiers="identifiers")
    encoded = encode(records, tiny_models.make_tokenizer(), TaskSpec(kind="causal_lm", max_length=96))
    with pytest.raises(InputError, match=r"sani\.surrogates"):
        make_sani(tmp_path, records=encoded)
