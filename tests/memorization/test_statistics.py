from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import TokenScores, record_units, scores_fingerprint


def records(text: str = "The lungs are clear.") -> Dataset:
    texts = ["Fever and cough on admission. " * 5, text, "No effusion."]
    return Dataset.from_dict(
        {"text": texts, "unit": ["b", "a", "b"], "record_id": list("012"), "identifiers": [[], [], []]}
    )


@pytest.fixture
def scored(tiny_model, tiny_tokenizer):
    spec = TaskSpec(max_length=24)
    encoded = encode(records(), tiny_tokenizer, spec)
    return encoded, score_records(tiny_model("gpt2"), encoded, spec, tiny_tokenizer)


def test_tokens_stand_with_their_records(scored):
    encoded, scores = scored
    assert scores.n_records == 3
    for record in range(3):
        own = slice(scores.offsets[record], scores.offsets[record + 1])
        assert set(scores.record[own]) == {record}
        windows = [e.text_end - e.text_start for e in encoded if e.record == record]
        assert own.stop - own.start == sum(windows)
        assert scores.first_window[record] == windows[0]
    assert list(record_units(encoded)) == [0, 1, 0]
    assert encoded.n_records_cut == 1


def test_sums_leave_out_what_nothing_predicts(scored):
    _, scores = scored
    counts = scores.per_record(np.ones(len(scores.record)))
    n_windows = np.array([len(np.flatnonzero(~scores.scored[scores.record == r])) for r in range(3)])
    np.testing.assert_array_equal(counts, np.diff(scores.offsets) - n_windows)
    np.testing.assert_allclose(scores.per_record(scores.log_prob).sum(), np.nansum(scores.log_prob), rtol=1e-5)


def test_a_file_gives_back_what_was_saved_and_only_its_owner_reads_it(scored, tmp_path: Path):
    _, scores = scored
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(path, "abc")
    again = TokenScores.load(path, "abc")
    for name in ("record", "log_prob", "is_argmax", "offsets", "first_window"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
        assert getattr(again, name).dtype == getattr(scores, name).dtype
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["scores.safetensors"]
    assert b"lungs" not in path.read_bytes()


def test_a_file_of_another_model_or_a_damaged_one_is_refused(scored, tmp_path: Path):
    _, scores = scored
    path = tmp_path / "scores.safetensors"
    scores.save(path, "abc")
    with pytest.raises(InputError, match="another model"):
        TokenScores.load(path, "abd")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="cannot be read"):
        TokenScores.load(path, "abc")


def test_the_fingerprint_tells_weights_records_and_tasks_apart(tiny_model, tiny_tokenizer):
    spec = TaskSpec(max_length=24)
    encoded = encode(records(), tiny_tokenizer, spec)
    first = scores_fingerprint(tiny_model("gpt2"), encoded, spec)
    assert scores_fingerprint(tiny_model("gpt2"), encode(records(), tiny_tokenizer, spec), spec) == first
    other_records = encode(records("The lungs are not clear."), tiny_tokenizer, spec)
    other_spec = TaskSpec(max_length=20)
    others = {
        scores_fingerprint(tiny_model("gpt2", seed=1), encoded, spec),
        scores_fingerprint(tiny_model("llama"), encoded, spec),
        scores_fingerprint(tiny_model("gpt2", layer_norm_epsilon=1e-3), encoded, spec),
        scores_fingerprint(tiny_model("gpt2"), other_records, spec),
        scores_fingerprint(tiny_model("gpt2"), encoded, other_spec),
    }
    assert len(others) == 5
    assert first not in others
