from __future__ import annotations

import stat
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization import statistics
from dpmed.memorization.extraction import extraction_strength, greedy_extraction, suffix_log_probability
from dpmed.memorization.membership import ez_score, min_k_plus_plus_score, min_k_score
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import ScoreParts, TokenScores, record_units, scores_fingerprint, weights_fingerprint
from dpmed.memorization.vocabulary import Sampling, TokenStatistics


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


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    at_once=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_metrics_do_not_depend_on_how_many_records_are_taken_at_once(sizes: list[int], at_once: int, seed: int):
    rng = np.random.default_rng(seed)
    n = sum(sizes)

    def drawn() -> TokenScores:
        log_prob = np.where(rng.random(n) < 0.2, np.nan, -rng.random(n)).astype(np.float32)
        return TokenScores(
            record=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            log_prob=log_prob,
            is_argmax=~np.isnan(log_prob) & (rng.random(n) < 0.6),
            offsets=np.cumsum([0, *sizes]),
            first_window=np.minimum(sizes, 6).astype(np.int32),
            rank=np.zeros(n, np.uint16),
            mean=-rng.random(n).astype(np.float32),
            deviation=rng.random(n).astype(np.float32),
            sampled=np.where(rng.random(n) < 0.1, -np.inf, -rng.random(n)).astype(np.float32),
        )

    scores, base = drawn(), drawn()

    def metrics() -> list[np.ndarray]:
        return [
            scores.per_record(scores.log_prob),
            min_k_score(scores, 0.3),
            min_k_plus_plus_score(scores, 0.3),
            ez_score(scores, base),
            extraction_strength(scores),
            *greedy_extraction(scores, 1, 2),
            *suffix_log_probability(scores, 2, 2),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_TOKENS_AT_ONCE", 10**6)
        whole = metrics()
        patch.setattr(statistics, "_TOKENS_AT_ONCE", at_once)
        parts = list(scores.blocks())
        assert [len(part.record) for part in parts if part.n_records > 1 and len(part.record) > at_once + 9] == []
        assert sum(part.n_records for part in parts) == len(sizes)
        for found, expected in zip(metrics(), whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(
        scores.n_scored, [np.isfinite(scores.log_prob[scores.record == r]).sum() for r in range(len(sizes))]
    )


def test_a_metrics_memory_does_not_grow_with_the_tokens():
    n = 2**21
    scores = TokenScores(
        record=np.repeat(np.arange(n // 64, dtype=np.int32), 64),
        log_prob=np.full(n, -1, np.float32),
        is_argmax=np.ones(n, bool),
        offsets=np.arange(0, n + 1, 64),
        first_window=np.full(n // 64, 64, np.int32),
    )
    for metric in (
        lambda: scores.per_record(scores.log_prob),
        lambda: min_k_score(scores, 0.2),
        lambda: extraction_strength(scores),
        lambda: greedy_extraction(scores, 30, 30),
    ):
        tracemalloc.start()
        metric()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * n  # one float64 per token and a bit; the whole takes several


def test_a_file_gives_back_what_was_saved_and_only_its_owner_reads_it(scored, tmp_path: Path):
    _, scores = scored
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(path, "abc")
    again = TokenScores.load(path, "abc")
    for name in (field.name for field in fields(TokenScores)):
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


def test_the_fingerprint_tells_weights_records_tasks_and_sampling_apart(tiny_model, tiny_tokenizer):
    spec, drawn = TaskSpec(max_length=24), Sampling()
    encoded = encode(records(), tiny_tokenizer, spec)
    first = scores_fingerprint(weights_fingerprint(tiny_model("gpt2")), encoded, spec, drawn)
    assert (
        scores_fingerprint(
            weights_fingerprint(tiny_model("gpt2")), encode(records(), tiny_tokenizer, spec), spec, drawn
        )
        == first
    )
    other_records = encode(records("The lungs are not clear."), tiny_tokenizer, spec)
    other_spec = TaskSpec(max_length=20)
    others = {
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2", seed=1)), encoded, spec, drawn),
        scores_fingerprint(weights_fingerprint(tiny_model("llama")), encoded, spec, drawn),
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2", layer_norm_epsilon=1e-3)), encoded, spec, drawn),
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2")), other_records, spec, drawn),
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2")), encoded, other_spec, drawn),
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2")), encoded, spec, Sampling(0.5)),
        scores_fingerprint(weights_fingerprint(tiny_model("gpt2")), encoded, spec, Sampling(1.0, None)),
    }
    assert len(others) == 7
    assert first not in others


def statistics_of(n: int, seed: int) -> TokenStatistics:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(4, n)).astype(np.float32)
    return TokenStatistics(
        numbers[0], rng.random(n) < 0.5, rng.integers(0, 9, n).astype(np.uint16), numbers[1], numbers[2], numbers[3]
    )


def test_parts_give_back_the_tokens_and_batches_that_they_hold(tmp_path: Path):
    truth = statistics_of(10, 0)
    parts = ScoreParts(tmp_path / "scores", "train", "f" * 64, batch_tokens=32)
    for batches, at in (([0, 2], [7, 1, 4]), ([5], [0, 9])):
        parts.save(batches, np.array(at), truth.take(np.array(at)))
    found = TokenStatistics.empty(10)
    assert parts.restore(found) == {0, 2, 5}
    filled = [0, 1, 4, 7, 9]
    for name in ("log_prob", "is_argmax", "rank", "mean", "deviation", "sampled"):
        np.testing.assert_array_equal(getattr(found, name)[filled], getattr(truth, name)[filled])
    assert np.isnan(found.log_prob[[2, 3, 5, 6, 8]]).all()
    paths = list(parts.folder.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert stat.S_IMODE(parts.folder.stat().st_mode) == 0o700
    assert len(paths) == 2


@pytest.mark.parametrize("other", [{"name": "heldout"}, {"fingerprint": "e" * 64}, {"batch_tokens": 64}])
def test_parts_of_another_pass_are_left_alone(tmp_path: Path, other: dict):
    parts = ScoreParts(tmp_path, "train", "f" * 64, batch_tokens=32)
    parts.save([0], np.array([1]), statistics_of(1, 0))
    assert replace(parts, **other).restore(TokenStatistics.empty(4)) == set()
    assert parts.restore(TokenStatistics.empty(4)) == {0}


def test_parts_are_removed_whatever_their_cut_and_no_others(tmp_path: Path):
    parts = ScoreParts(tmp_path, "train", "f" * 64)
    others = replace(parts, fingerprint="e" * 64)
    for one in (replace(parts, batch_tokens=32), replace(parts, batch_tokens=64), others):
        one.save([0], np.array([1]), statistics_of(1, 0))
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["train-eeeeeeeeeeeeeeee.part-0-0000000-0000000.safetensors"]


def test_a_damaged_part_is_named_and_one_of_the_same_name_is_checked(tmp_path: Path):
    parts = ScoreParts(tmp_path, "train", "f" * 64)
    parts.save([0], np.array([1]), statistics_of(1, 0))
    with pytest.raises(InputError, match="another model"):  # the names hold 16 characters of the fingerprint
        replace(parts, fingerprint="f" * 63 + "e").restore(TokenStatistics.empty(4))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"part-0-.*cannot be read"):
        parts.restore(TokenStatistics.empty(4))


def test_scores_without_details_say_so():
    bare = TokenScores(np.zeros(1, np.int32), np.zeros(1), np.ones(1, bool), np.array([0, 1]), np.ones(1, np.int32))
    with pytest.raises(ValueError, match="no rank"):
        bare.detail("rank")


def test_the_same_adapter_weights_at_another_strength_are_another_model(tiny_model):
    def adapted(alpha: int) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), config)

    model = adapted(8)
    first = weights_fingerprint(model)
    assert weights_fingerprint(adapted(8)) == first
    assert weights_fingerprint(adapted(64)) != first
    model.base_model.disable_adapter_layers()
    assert weights_fingerprint(model) != first
