from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from dpmed.data.batches import Collator, per_record_loss
from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization import scoring
from dpmed.memorization.membership import loss_score
from dpmed.memorization.scoring import kept_scores, mask_groups, score_classification, score_records
from dpmed.memorization.statistics import ScoreParts, TokenScores
from dpmed.memorization.vocabulary import RANK_LIMIT, Sampling

TEXTS = [
    "Mrs Example, 64 years old, takes metformin 500 mg twice a day.",
    "Impression: no acute abnormality. " * 6,
    "a",
    "The heart is normal in size. The lungs are clear, and follow-up is in two weeks.",
]
SPANS = [[(4, 11, "NAME"), (13, 15, "AGE")], [], [], [(4, 9, "ORGAN")]]


def records(label: list | None = None) -> Dataset:
    spans = [[{"start": a, "end": b, "type": t, "source": "known"} for a, b, t in of] for of in SPANS]
    columns = {
        "text": TEXTS,
        "unit": ["p0", "p1", "p1", "p2"],
        "record_id": list("abcd"),
        "identifiers": spans,
    }
    return Dataset.from_dict(columns | ({"label": label} if label else {}))


def one_by_one(model: Any, encoded: EncodedRecords, mask_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The definition, slowly: a window (and a masked group) at a time, unpadded, whole logits."""
    log_probs, firsts = [], []
    for example in encoded:
        ids = torch.tensor([example.input_ids])
        length = example.text_end - example.text_start
        log_prob, first = np.full(length, np.nan), np.zeros(length, dtype=bool)
        groups = mask_groups(example) if mask_id is not None else np.zeros(length)
        rounds = groups % scoring.MASK_ROUNDS
        for r in np.unique(rounds):
            fed = ids.clone()
            at = example.text_start + np.flatnonzero(rounds == r)
            if mask_id is not None:
                fed[0, at] = mask_id
            with torch.no_grad():
                logits = model(input_ids=fed).logits[0].log_softmax(-1)
            for t in at:
                seen = t if mask_id is not None else t - 1
                if seen >= 0:
                    log_prob[t - example.text_start] = logits[seen, ids[0, t]]
                    first[t - example.text_start] = logits[seen].argmax() == ids[0, t]
        log_probs.append(log_prob)
        firsts.append(first)
    return np.concatenate(log_probs), np.concatenate(firsts)


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "bert", "albert"])
def test_scores_equal_the_definition_however_the_batches_are_cut(tiny_model, tiny_tokenizer, kind: str, batch_tokens):
    masked = kind in ("bert", "albert")
    spec = TaskSpec("masked_lm" if masked else "causal_lm", max_length=48)
    model = tiny_model(kind)
    encoded = encode(records(), tiny_tokenizer, spec)
    assert encoded.n_records_cut > 0
    scores = score_records(model, encoded, spec, tiny_tokenizer, batch_tokens=batch_tokens)
    log_prob, first = one_by_one(model, encoded, tiny_tokenizer.mask_token_id if masked else None)
    np.testing.assert_allclose(scores.log_prob, log_prob, atol=2e-5)
    np.testing.assert_array_equal(scores.is_argmax, first)
    assert scores.scored.all() == masked


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_rank_spread_and_sampling_are_of_the_models_own_logits(tiny_model, tiny_tokenizer, kind: str):
    spec, model, sampling = TaskSpec(max_length=48), tiny_model(kind), Sampling(0.5, 7)
    encoded = encode(records(), tiny_tokenizer, spec)
    scores = score_records(model, encoded, spec, tiny_tokenizer, sampling=sampling, batch_tokens=100)
    at = 0
    for example in encoded:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        for t in range(example.text_start, example.text_end):
            if t > 0:
                row, token = logits[t - 1], example.input_ids[t]
                p = row.softmax(0)
                mean = (p * row.log_softmax(0)).sum()
                assert scores.detail("rank")[at] == (row > row[token]).sum()
                assert scores.detail("mean")[at] == pytest.approx(float(mean), abs=1e-4)
                variance = (p * (row.log_softmax(0) - mean) ** 2).sum()
                assert scores.detail("deviation")[at] == pytest.approx(float(variance.sqrt()), abs=1e-3)
                kept = (row / 0.5).masked_fill(row < row.topk(7).values[-1], -torch.inf).log_softmax(0)
                assert scores.detail("sampled")[at] == pytest.approx(float(kept[token]), abs=1e-4)
            at += 1
    unseen = ~scores.scored
    assert unseen.any()
    assert np.isnan(scores.detail("sampled")[unseen]).all()
    assert (scores.detail("rank")[unseen] == RANK_LIMIT).all()


def test_a_bfloat16_model_is_scored_from_its_own_logits_in_float32(tiny_model, tiny_tokenizer):
    spec, model = TaskSpec(max_length=48), tiny_model("llama").to(torch.bfloat16)
    encoded = encode(records(), tiny_tokenizer, spec)
    scores = score_records(model, encoded, spec, tiny_tokenizer, batch_tokens=1)  # a window at a time, as below
    at = 0
    for example in encoded:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        assert logits.dtype == torch.bfloat16
        log_p = logits.float().log_softmax(-1)
        for t in range(example.text_start, example.text_end):
            if t > 0:
                # Blocks of another size may round a bfloat16 logit to its neighbour.
                assert scores.log_prob[at] == pytest.approx(float(log_p[t - 1, example.input_ids[t]]), abs=0.02)
            at += 1
    assert scores.log_prob.dtype == np.float32


class Killed(Exception):
    pass


def killed_after(n_batches: int, seen: list[int]) -> Any:
    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == n_batches:
            raise Killed

    return progress


def forward_passes(model: Any) -> tuple[list[int], Any]:
    """Windows of every pass of the model from now on, and how to stop counting."""
    sizes: list[int] = []

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))

    return sizes, model.register_forward_pre_hook(count, with_kwargs=True)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_killed_pass_goes_on_where_it_stopped(tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch, kind: str):
    spec = TaskSpec("causal_lm" if kind == "gpt2" else "masked_lm", max_length=48)
    model, encoded = tiny_model(kind), encode(records(), tiny_tokenizer, spec)
    whole = score_records(model, encoded, spec, tiny_tokenizer, batch_tokens=64)
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    inputs = (model, encoded, spec, tiny_tokenizer, tmp_path, "train")
    with pytest.raises(Killed):
        kept_scores(*inputs, batch_tokens=64, progress=killed_after(3, []))
    assert len(list(tmp_path.glob("*.part-*"))) == 3
    assert not any(word.encode() in path.read_bytes() for path in tmp_path.iterdir() for word in ("metformin", "lungs"))
    seen: list[int] = []
    sizes, hook = forward_passes(model)
    scores = kept_scores(*inputs, batch_tokens=64, progress=lambda done, total: seen.append(done))
    hook.remove()
    assert len(sizes) == 1 + len(seen) - 3  # the trial of the output layer, and what was left
    for field in fields(TokenScores):
        np.testing.assert_array_equal(getattr(scores, field.name), getattr(whole, field.name))
    assert [path.name.count(".part-") for path in tmp_path.iterdir()] == [0]
    sizes, hook = forward_passes(model)
    again = kept_scores(*inputs, batch_tokens=64)
    hook.remove()
    assert sizes == []
    np.testing.assert_array_equal(again.log_prob, whole.log_prob)


def test_batches_of_another_size_start_anew(tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch):
    spec, model = TaskSpec(max_length=48), tiny_model("gpt2")
    encoded = encode(records(), tiny_tokenizer, spec)
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    with pytest.raises(Killed):
        kept_scores(model, encoded, spec, tiny_tokenizer, tmp_path, "x", batch_tokens=64, progress=killed_after(2, []))
    scores = kept_scores(model, encoded, spec, tiny_tokenizer, tmp_path, "x", batch_tokens=100)
    np.testing.assert_allclose(scores.log_prob, one_by_one(model, encoded, None)[0], atol=2e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_part_waits_for_its_time(tiny_model, tiny_tokenizer, tmp_path: Path):
    spec, model = TaskSpec(max_length=48), tiny_model("gpt2")
    encoded = encode(records(), tiny_tokenizer, spec)
    parts = ScoreParts(tmp_path, "x", "f" * 64)
    score_records(model, encoded, spec, tiny_tokenizer, batch_tokens=64, parts=parts)
    assert len(list(tmp_path.iterdir())) == 1  # well under a minute: one part, at the end


def test_nothing_of_a_diverged_model_is_kept(tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scoring, "PART_SECONDS", 0.0)
    model, spec = tiny_model("gpt2"), TaskSpec(max_length=48)
    model.transformer.wte.weight.data[5:] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        kept_scores(model, encode(records(), tiny_tokenizer, spec), spec, tiny_tokenizer, tmp_path, "x", batch_tokens=1)
    assert list(tmp_path.iterdir()) == []


def test_the_mean_over_tokens_is_the_training_loss(tiny_model, tiny_tokenizer):
    spec, model = TaskSpec(max_length=200), tiny_model("llama")
    encoded = encode(records(), tiny_tokenizer, spec)
    batch = Collator(tiny_tokenizer, spec)(list(encoded))
    batch["weights"][torch.arange(len(encoded)), [e.text_end for e in encoded]] = 0  # the end token is not text
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = per_record_loss(logits, batch, spec).numpy()
    found = -loss_score(score_records(model, encoded, spec, tiny_tokenizer))
    several = [0, 1, 3]  # record 2 is one token, which nothing predicts
    np.testing.assert_allclose(found[several], expected[several], rtol=1e-5)
    assert np.isnan(found[2])


class Scaled(nn.Module):
    """A model that changes its logits after the output layer, as some architectures do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = torch.tanh(output.logits) * 3
        return output


def test_logits_that_change_after_the_output_layer_are_seen(tiny_model, tiny_tokenizer):
    spec, model = TaskSpec(max_length=48), Scaled(tiny_model("gpt2")).eval()
    encoded = encode(records(), tiny_tokenizer, spec)
    scores = score_records(model, encoded, spec, tiny_tokenizer)
    np.testing.assert_allclose(scores.log_prob, one_by_one(model, encoded, None)[0], atol=2e-5)


def test_whole_logits_exist_for_a_block_of_tokens_only(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE_CPU", 5 * len(tiny_tokenizer))
    spec, model = TaskSpec(max_length=48), tiny_model("gpt2")
    encoded = encode(records(), tiny_tokenizer, spec)
    rows: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _m, _i, out: rows.append(out.numel() // out.shape[-1])
    )
    scores = score_records(model, encoded, spec, tiny_tokenizer)
    hook.remove()
    assert max(rows) <= max(5, len(encoded))
    np.testing.assert_allclose(scores.log_prob, one_by_one(model, encoded, None)[0], atol=2e-5)


def test_a_lora_model_is_scored_with_its_adapter(tiny_model, tiny_tokenizer):
    spec = TaskSpec(max_length=48)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    encoded = encode(records(), tiny_tokenizer, spec)
    scores = score_records(model, encoded, spec, tiny_tokenizer)
    np.testing.assert_allclose(scores.log_prob, one_by_one(model, encoded, None)[0], atol=2e-5)
    with model.disable_adapter():
        without = score_records(model, encoded, spec, tiny_tokenizer)
    assert np.nanmax(np.abs(without.log_prob - scores.log_prob)) > 1e-3


def test_a_beginning_token_makes_the_first_text_token_scored(tiny_model, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    import tiny_models

    tokenizer = tiny_models.make_tokenizer()
    bos = ("[BOS]", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[bos])
    spec = TaskSpec(max_length=48)
    with_bos = score_records(tiny_model("llama"), encode(records(), tokenizer, spec), spec, tokenizer)
    without = score_records(tiny_model("llama"), encode(records(), tiny_tokenizer, spec), spec, tiny_tokenizer)
    assert with_bos.scored.all()
    assert len(np.flatnonzero(~without.scored)) == len(encode(records(), tiny_tokenizer, spec))


def test_every_word_is_masked_once_and_an_identifier_at_once(tiny_tokenizer):
    spec = TaskSpec("masked_lm", max_length=48)
    encoded = encode(records(), tiny_tokenizer, spec)
    passes = scoring._masked_passes(encoded)
    for i, example in enumerate(encoded):
        positions = np.concatenate([p.scored for p in passes if p.example == i])
        assert sorted(positions) == list(range(example.text_start, example.text_end))
        groups = mask_groups(example)
        for word in set(example.words):
            assert len(set(groups[np.asarray(example.words) == word])) == 1
        for span in example.spans:
            assert len(set(groups[span.start - example.text_start : span.end - example.text_start])) == 1
    assert any(s.end - s.start > 1 for e in encoded for s in e.spans)
    assert len(set(mask_groups(encoded[0]))) > scoring.MASK_ROUNDS  # most words stay visible


def test_modules_get_their_own_mode_back(tiny_model, tiny_tokenizer):
    model = tiny_model("gpt2").train()
    model.lm_head.eval()
    before = [m.training for m in model.modules()]
    score_records(model, encode(records(), tiny_tokenizer, TaskSpec()), TaskSpec(), tiny_tokenizer)
    assert [m.training for m in model.modules()] == before
    assert len(set(before)) == 2


def test_progress_ends_at_its_total(tiny_model, tiny_tokenizer):
    seen: list[tuple[int, int]] = []
    encoded = encode(records(), tiny_tokenizer, TaskSpec(max_length=48))
    score_records(
        tiny_model("gpt2"),
        encoded,
        TaskSpec(max_length=48),
        tiny_tokenizer,
        batch_tokens=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_diverged_model_is_named_as_such(tiny_model, tiny_tokenizer, kind: str):
    model = tiny_model(kind)
    next(model.parameters()).data.fill_(float("nan"))
    spec = TaskSpec("causal_lm" if kind == "gpt2" else "masked_lm", max_length=48)
    with pytest.raises(InputError, match="not finite"):
        score_records(model, encode(records(), tiny_tokenizer, spec), spec, tiny_tokenizer)


def test_masking_needs_a_mask_token(tiny_model):
    import tiny_models

    tokenizer = tiny_models.make_tokenizer()
    tokenizer.mask_token = None
    spec = TaskSpec("masked_lm", max_length=48)
    with pytest.raises(InputError, match="mask token"):
        score_records(tiny_model("bert"), encode(records(), tokenizer, spec), spec, tokenizer)


def test_a_classifier_is_not_asked_for_token_probabilities(tiny_model, tiny_tokenizer):
    spec = TaskSpec("classification", labels=("x", "y", "z"))
    encoded = encode(records(), tiny_tokenizer, spec)
    with pytest.raises(ValueError, match="score_classification"):
        score_records(tiny_model("bert", "classification"), encoded, spec, tiny_tokenizer)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifiers_logits_are_means_over_windows(tiny_model, tiny_tokenizer, kind: str, multi_label: bool):
    labels = [["x"], ["y", "z"], [], ["z"]] if multi_label else ["x", "y", "z", "z"]
    spec = TaskSpec("classification", labels=("x", "y", "z"), multi_label=multi_label, max_length=48)
    model = tiny_model(kind, "classification")
    encoded = encode(records(labels), tiny_tokenizer, spec)
    logits, loss = score_classification(model, encoded, spec, tiny_tokenizer, batch_tokens=100)
    for record in range(4):
        windows = [e for e in encoded if e.record == record]
        with torch.no_grad():
            mean = torch.stack([model(input_ids=torch.tensor([e.input_ids])).logits[0] for e in windows]).mean(0)
        np.testing.assert_allclose(logits[record], mean, atol=1e-5)
        target = Collator(tiny_tokenizer, spec)(windows[:1])
        np.testing.assert_allclose(loss[record], per_record_loss(mean[None], target, spec)[0], rtol=1e-4)
    assert encoded.n_records_cut > 0


def test_a_record_without_label_has_no_loss(tiny_model, tiny_tokenizer):
    spec = TaskSpec("classification", labels=("x", "y", "z"), max_length=48)
    encoded = encode(records(), tiny_tokenizer, spec)
    logits, loss = score_classification(tiny_model("bert", "classification"), encoded, spec, tiny_tokenizer)
    assert np.isfinite(logits).all()
    assert np.isnan(loss).all()
