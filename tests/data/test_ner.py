"""The entity tagger against its own model, token by token, and the folders that it refuses."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForTokenClassification

import tiny_models
from dpmed.data.ner import EntityTagger
from dpmed.errors import InputError

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-DATE", 4: "tattoo"}
TEXTS = [
    "Mrs Example, 64 years old, takes metformin 500 mg twice a day.",
    "The heart is normal in size — no effusion.",
    "Übelkeit seit 3 March, jose\u0301 came; cough and fever. " * 8,  # longer than a window
    "x",
]


def save(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny random tagger whose labels differ from token to token."""
    label2id = {name: index for index, name in LABELS.items()}
    config = tiny_models.make_config("bert", **{"id2label": LABELS, "label2id": label2id, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForTokenClassification(config)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            model.classifier.weight.mul_(50)
            model.bert.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def tagged_words(folder: Path, text: str) -> set[tuple[int, int]]:
    """Words of which a token is an entity, from the model's own argmax; the text must fit one window."""
    model = BertForTokenClassification.from_pretrained(folder).eval()
    encoded = tiny_models.make_tokenizer()(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        best = model(**encoded).logits[0].argmax(-1).tolist()
    words = [match.span() for match in re.finditer(r"[\w\u0300-\u036f]+", text)]
    chosen = [place for place, label in zip(offsets, best, strict=True) if label]
    return {word for word in words for start, end in chosen if start < word[1] and word[0] < end}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spans_are_the_words_that_the_model_tags(tmp_path: Path, seed: int) -> None:
    folder = save(tmp_path / "ner", seed)
    for text, spans in zip(TEXTS, EntityTagger(folder).spans(TEXTS), strict=True):
        assert all(one["end"] <= other["start"] for one, other in pairwise(spans))
        assert {span["source"] for span in spans} <= {"ner"}
        assert {span["type"] for span in spans} <= {"NAME", "DATE", "TATTOO"}
        for span in spans:  # whole words
            assert re.match(r"\w", text[span["start"]]) and re.match(r"[\w\u0300-\u036f]", text[span["end"] - 1])
            assert not re.match(r"\w", text[span["start"] - 1 : span["start"]])
            assert not re.match(r"[\w\u0300-\u036f]", text[span["end"] : span["end"] + 1])
        if len(text) < 100:
            expected = tagged_words(folder, text)
            words = [match.span() for match in re.finditer(r"[\w\u0300-\u036f]+", text)]
            assert {w for w in words for s in spans if s["start"] <= w[0] and w[1] <= s["end"]} == expected


def test_the_end_of_a_long_text_is_read_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "ner")
    assert max(span["end"] for span in EntityTagger(folder).spans(TEXTS)[2]) > len(TEXTS[2]) * 0.9


def test_batches_and_order_change_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path / "ner")
    together = EntityTagger(folder, batch_size=4).spans(TEXTS)
    assert together == [EntityTagger(folder, batch_size=1).spans([text])[0] for text in TEXTS]
    assert any(together) and EntityTagger(folder).spans([]) == []


def test_folders_that_are_no_tagger(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        EntityTagger("dslim/bert-base-NER")
    folder = save(tmp_path / "ner")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors weights"):
        EntityTagger(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(InputError, match="cannot be loaded as a token-classification model"):
        EntityTagger(folder)


def test_a_model_without_the_head_or_names_of_labels(tmp_path: Path) -> None:
    tiny_models.make_model("bert").save_pretrained(tmp_path / "mlm")
    tiny_models.make_tokenizer().save_pretrained(tmp_path / "mlm")
    with pytest.raises(InputError, match="no token-classification head"):
        EntityTagger(tmp_path / "mlm")
    folder = save(tmp_path / "ner", id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    with pytest.raises(InputError, match="labels have no names"):
        EntityTagger(folder)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "ner")
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForTokenClassification": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        EntityTagger(folder)
