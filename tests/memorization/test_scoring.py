from __future__ import annotations

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
from dpmed.memorization.scoring import mask_groups, score_classification, score_records

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
