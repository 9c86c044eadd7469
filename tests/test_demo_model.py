"""The demo's base model: exact offsets, digits apart, found again in the cache, never half written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpmed import demo_model
from dpmed.data.hospital import make_hospital
from dpmed.demo_model import DemoModelSettings, demo_base_model


def tiny_model(cache_dir: Path | None) -> Path:
    return demo_base_model(cache_dir, n_public_patients=40, vocab_size=500, hidden_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cache"))


def test_offsets_cover_a_private_note_exactly(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in make_hospital(n_patients=5, seed=1)["text"]:
        encoded = tokenizer(text, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        assert "".join(text[start:end] for start, end in offsets) == text
        assert tokenizer.decode(encoded["input_ids"]) == text


def test_digits_are_tokens_of_their_own(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("405162") == list("405162")
    assert not [token for token in tokenizer.get_vocab() if any(c.isdigit() for c in token) and len(token) > 1]


def test_special_tokens_are_there_and_none_is_added(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [demo_model._BOS_ID, demo_model._EOS_ID, demo_model._PAD_ID]
    assert not set(ids) & set(tokenizer("Name Ann")["input_ids"])


def test_the_folder_is_a_plain_hugging_face_model_that_beats_chance(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.bin"))
    ids = tokenizer(make_hospital(n_patients=1, seed=1)["text"][0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert model.config.vocab_size == len(tokenizer) <= 500
    assert loss < 0.98 * torch.tensor(float(len(tokenizer))).log()


def test_a_second_call_finds_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_make", lambda *_: pytest.fail("trained again"))
    assert tiny_model(folder.parent) == folder


def test_a_failed_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(_: DemoModelSettings, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_make", half_written)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(tmp_path)
    assert not list(tmp_path.iterdir())


def fake_model(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in demo_model._COMPLETE:
        (folder / name).write_text(content)


def test_an_incomplete_folder_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_make", lambda _, folder: fake_model(folder, "whole"))
    made = tiny_model(tmp_path)
    (made / "model.safetensors").unlink()
    assert tiny_model(tmp_path) == made
    assert (made / "model.safetensors").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [made]


def test_who_comes_second_keeps_the_model_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(settings: DemoModelSettings, folder: Path) -> None:
        fake_model(tmp_path / f"demo-{demo_model._fingerprint(settings)}", "first")
        fake_model(folder, "second")

    monkeypatch.setattr(demo_model, "_make", beaten)
    made = tiny_model(tmp_path)
    assert (made / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [made]


def test_other_settings_are_another_folder() -> None:
    several = [DemoModelSettings(), DemoModelSettings(seed=1), DemoModelSettings(epochs=3)]
    assert len({demo_model._fingerprint(settings) for settings in several}) == 3


def test_the_cache_honours_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "_make", lambda _, folder: fake_model(folder, "whole"))
    assert tiny_model(None).parent == tmp_path / "dpmed"


def test_training_leaves_the_callers_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    demo_base_model(tmp_path, n_public_patients=4, vocab_size=300, hidden_size=16)
    assert torch.equal(before, torch.get_rng_state())
