"""What each token counts, which words are masked, and the loss of single records against a naive loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny_models
from dpmed.data.batches import Batch, Collator, SimilarLengths, pad_token_id, per_record_loss
from dpmed.data.tasks import Example, TaskSpec, encode

TOKENIZER = tiny_models.make_tokenizer()
LABELS = ("acute", "chronic", "none")
TEXTS = ["Mr Zwiebel has fever", "cough", "Seen by Dr Quokka on 3 March with Zwiebelkuchen and fever", "stable"]
SPANS: list[list[dict[str, Any]]] = [
    [{"start": 3, "end": 10, "type": "NAME", "source": "known"}],
    [],
    [
        {"start": 11, "end": 17, "type": "NAME", "source": "planted"},
        {"start": 34, "end": 47, "type": "INDIRECT", "source": "indirect"},
    ],
    [],
]


def spec(kind: Any = "causal_lm", **changes: Any) -> TaskSpec:
    return TaskSpec(**{"kind": kind, "max_length": 64, **changes})


def examples(task: TaskSpec, **columns: list[Any]) -> list[Example]:
    plain = {"text": TEXTS, "unit": ["a", "b", "a", "c"], "identifiers": SPANS}
    return list(encode(Dataset.from_dict({**plain, **columns}), TOKENIZER, task))


def labelled(task: TaskSpec) -> list[Example]:
    if task.multi_label:
        return examples(task, label=[["none"], [], ["acute", "none"], list(LABELS)])
    return examples(task, label=["acute", "none", "chronic", "acute"])


def targets_of(batch: Batch, row: int) -> str:
    """The text of the tokens that count."""
    return str(TOKENIZER.decode(batch["targets"][row][batch["weights"][row] > 0]))


# --- Collating ------------------------------------------------------------------------------------------------------


def test_padding_is_masked_and_the_rest_is_the_example() -> None:
    found = examples(spec())
    batch = Collator(TOKENIZER, spec())(found)
    for row, example in enumerate(found):
        n = len(example.input_ids)
        assert batch["input_ids"][row, :n].tolist() == example.input_ids
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert all(token == TOKENIZER.pad_token_id for token in batch["input_ids"][row, n:].tolist())
        assert float(batch["weights"][row, n:].sum()) == 0.0
    assert batch["unit"].tolist() == [0, 1, 0, 2]


def test_without_a_padding_token_the_end_token_pads() -> None:
    tokenizer: Any = tiny_models.make_tokenizer()
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_causal_targets_are_all_tokens_but_the_first() -> None:
    found = examples(spec())
    batch = Collator(TOKENIZER, spec())(found)
    for row, example in enumerate(found):
        assert batch["weights"][row, : len(example.input_ids)].tolist() == [0.0] + [1.0] * (len(example.input_ids) - 1)


def test_prompt_tokens_are_never_targets_and_label_tokens_weigh_as_told() -> None:
    task = spec(labels=LABELS, completion_weight=5.0)
    found = labelled(task)
    batch = Collator(TOKENIZER, task)(found)
    for row, example in enumerate(found):
        weights = batch["weights"][row].tolist()
        assert weights[: example.text_end] == [0.0] + [1.0] * (example.text_end - 1)
        assert weights[example.text_end : example.prompt_end] == [0.0] * (example.prompt_end - example.text_end)
        assert example.prompt_end > example.text_end
        assert weights[example.prompt_end : len(example.input_ids)] == [5.0] * (
            len(example.input_ids) - example.prompt_end
        )


def test_completion_alone_means_label_tokens_alone() -> None:
    task = spec(labels=LABELS, loss_on="completion")
    batch = Collator(TOKENIZER, task)(labelled(task))
    names = ["acute", "none", "chronic", "acute"]
    assert [targets_of(batch, row) for row in range(4)] == [f" {name}[EOS]" for name in names]


def test_a_text_weight_of_one_is_the_default_for_labels_too() -> None:
    task = spec(labels=LABELS)
    assert set(Collator(TOKENIZER, task)(labelled(task))["weights"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("which", "hidden"), [("direct", {0, 1}), ("indirect", {2}), ("all", {0, 1, 2}), (None, set())]
)
def test_identifier_tokens_are_never_causal_targets(which: Any, hidden: set[int]) -> None:
    found = examples(spec())
    batch = Collator(TOKENIZER, spec(), never_target=which)(found)
    spans = [(row, s) for row, e in enumerate(found) for s in e.spans]
    for number, (row, span) in enumerate(spans):
        assert float(batch["weights"][row, span.start : span.end].sum()) == (
            0.0 if number in hidden else span.end - span.start
        )
    n_targets = sum(len(e.input_ids) - 1 for e in found)
    n_hidden = sum(s.end - s.start for n, (_, s) in enumerate(spans) if n in hidden)
    assert float(batch["weights"].sum()) == n_targets - n_hidden


def test_label_targets() -> None:
    single = TaskSpec(kind="classification", labels=LABELS)
    assert Collator(TOKENIZER, single)(labelled(single))["targets"].tolist() == [0, 2, 1, 0]
    several = TaskSpec(kind="classification", labels=LABELS, multi_label=True)
    assert Collator(TOKENIZER, several)(labelled(several))["targets"].tolist() == [
        [0, 0, 1],
        [0, 0, 0],
        [1, 0, 1],
        [1, 1, 1],
    ]


# --- Masking --------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    which=st.sampled_from(["direct", "indirect", "all", None]),
    p=st.floats(0.05, 0.95),
)
def test_masks_fall_on_whole_words_and_never_on_identifiers(seed: int, which: Any, p: float) -> None:
    task = spec("masked_lm", mask_probability=p)
    found = examples(task)
    batch = Collator(TOKENIZER, task, never_target=which, masks=np.random.default_rng(seed).random)(found)
    for row, example in enumerate(found):
        weights = batch["weights"][row, example.text_start : example.text_end].numpy()
        words = np.asarray(example.words)
        for word in np.unique(words):
            assert len(set(weights[words == word])) == 1  # all of a word, or nothing of it
        for span in example.spans:
            if which == "all" or (which is not None and (which == "indirect") == (span.source == "indirect")):
                assert float(batch["weights"][row, span.start : span.end].sum()) == 0.0
                inside = slice(span.start, span.end)
                assert batch["input_ids"][row, inside].tolist() == example.input_ids[inside]
        untouched = batch["weights"][row] == 0
        assert torch.equal(batch["input_ids"][row][untouched], batch["targets"][row][untouched])
        assert int((weights > 0).sum()) >= 1  # every record has a target
        assert batch["targets"][row, : len(example.input_ids)].tolist() == example.input_ids


def test_a_text_of_identifiers_alone_has_no_target() -> None:
    task = spec("masked_lm")
    span = {"start": 0, "end": 7, "type": "NAME", "source": "known"}
    data = Dataset.from_dict({"text": ["Zwiebel"], "unit": ["a"], "identifiers": [[span]]})
    batch = Collator(TOKENIZER, task, never_target="all")(list(encode(data, TOKENIZER, task)))
    assert float(batch["weights"].sum()) == 0.0
    logits = torch.randn(*batch["input_ids"].shape, len(TOKENIZER), requires_grad=True)
    loss = per_record_loss(logits, batch, task)
    assert loss.tolist() == [0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((gradient == 0).all())  # not NaN


def test_shares_of_masked_replaced_and_kept_words() -> None:
    """Over many draws: 15 % of words are targets; of those 80 % masked, 10 % random, 10 % as they were."""
    task = spec("masked_lm")
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    data = Dataset.from_dict({"text": [" ".join(words)], "unit": ["a"], "identifiers": [[]]})
    found = list(encode(data, TOKENIZER, spec("masked_lm", max_length=400)))
    collate = Collator(TOKENIZER, task, masks=np.random.default_rng(0).random)
    drawn = masked = kept = total = 0
    for _ in range(150):
        batch = collate(found)
        targets = batch["weights"][0] > 0
        numbers = np.asarray(found[0].words)
        first = torch.from_numpy(np.flatnonzero(np.diff(numbers, prepend=-1)) + found[0].text_start)
        target_words = first[targets[first]]
        drawn += len(target_words)
        total += len(first)
        masked += batch["input_ids"][0, target_words].tolist().count(TOKENIZER.mask_token_id)
        kept += int((batch["input_ids"][0, target_words] == batch["targets"][0, target_words]).sum())
    assert total == 150 * 100
    assert abs(drawn / total - 0.15) < 5 * math.sqrt(0.15 * 0.85 / total)
    assert abs(masked / drawn - 0.8) < 5 * math.sqrt(0.8 * 0.2 / drawn)
    assert abs(kept / drawn - 0.1) < 5 * math.sqrt(0.1 * 0.9 / drawn)


def test_the_runs_seed_fixes_the_masks() -> None:
    task = spec("masked_lm")
    batches = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches.append(Collator(TOKENIZER, task)(examples(task))["weights"])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


# --- Loss -----------------------------------------------------------------------------------------------------------


def naive_loss(logits: Tensor, batch: Batch, task: TaskSpec, row: int) -> float:
    """One record, one number at a time, in float64."""
    logits = logits.double()
    if task.kind == "classification":
        if task.multi_label:
            parts = [
                -math.log(1 / (1 + math.exp(-float(x))) if y else 1 - 1 / (1 + math.exp(-float(x))))
                for x, y in zip(logits[row], batch["targets"][row], strict=True)
            ]
            return sum(parts) / len(parts)
        return float(-logits[row].log_softmax(dim=0)[batch["targets"][row]])
    shift = 1 if task.kind == "causal_lm" else 0
    total = weight = 0.0
    for position in range(shift, batch["targets"].shape[1]):
        w = float(batch["weights"][row, position])
        if w:
            log_p = logits[row, position - shift].log_softmax(dim=0)[batch["targets"][row, position]]
            total, weight = total - w * float(log_p), weight + w
    return total / weight if weight else 0.0


TASKS = [
    spec(),
    spec(labels=LABELS, completion_weight=0.25),
    spec(labels=LABELS, loss_on="completion", completion_weight=7.0),
    spec("masked_lm"),
    TaskSpec(kind="classification", labels=LABELS),
    TaskSpec(kind="classification", labels=LABELS, multi_label=True),
]


def batch_of(task: TaskSpec, seed: int) -> tuple[Tensor, Batch]:
    rng = np.random.default_rng(seed)
    found = labelled(task) if task.labels else examples(task)
    batch = Collator(TOKENIZER, task, never_target="all" if seed % 2 else None, masks=rng.random)(found)
    shape = (4, 3) if task.kind == "classification" else (*batch["input_ids"].shape, len(TOKENIZER))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3, batch


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.kind}-{t.loss_on}-{t.completion_weight}-{t.multi_label}")
def test_the_loss_of_each_record_equals_a_naive_loop(task: TaskSpec, seed: int) -> None:
    logits, batch = batch_of(task, seed)
    expected = torch.tensor([naive_loss(logits, batch, task, row) for row in range(4)])
    losses = per_record_loss(logits, batch, task)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert per_record_loss(logits.bfloat16(), batch, task).dtype == torch.float32


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.kind}-{t.loss_on}-{t.completion_weight}-{t.multi_label}")
def test_no_record_has_a_say_in_the_loss_or_gradient_of_another(task: TaskSpec) -> None:
    logits, batch = batch_of(task, 0)
    logits.requires_grad_()
    losses = per_record_loss(logits, batch, task)
    for row in range(4):
        (gradient,) = torch.autograd.grad(losses[row], logits, retain_graph=True)
        assert bool((gradient[row] != 0).any())
        assert bool((gradient[[i for i in range(4) if i != row]] == 0).all())
    other_logits, other_batch = batch_of(task, 2)
    mixed = torch.cat([logits.detach()[:1], other_logits[1:]])
    joined = {key: torch.cat([batch[key][:1], other_batch[key][1:]]) for key in batch}
    assert torch.equal(per_record_loss(mixed, joined, task)[0], losses[0].detach())


def test_padding_does_not_change_the_loss() -> None:
    task = spec()
    logits, batch = batch_of(task, 0)
    alone = {key: value[1:2, : int(batch["attention_mask"][1].sum())] for key, value in batch.items() if key != "unit"}
    alone["unit"] = batch["unit"][1:2]
    n = alone["input_ids"].shape[1]
    assert n < batch["input_ids"].shape[1]
    short = per_record_loss(logits[1:2, :n], alone, task)
    assert torch.allclose(short[0], per_record_loss(logits, batch, task)[1])


@given(st.lists(st.integers(1, 300), max_size=400), st.integers(1, 9), st.integers(0, 5))
def test_similar_lengths_yields_every_record_once(lengths: list[int], batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    sampler = SimilarLengths(lengths, batch_size)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)


def test_similar_lengths_saves_padding_without_running_from_long_to_short() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (800,)).tolist()
    order = list(SimilarLengths(lengths, 8))
    batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 800, 8)]
    padded = sum(8 * max(batch) for batch in batches)
    shuffled = sum(8 * max(lengths[k : k + 8]) for k in range(0, 800, 8))
    assert padded < 0.7 * shuffled
    means = torch.tensor([sum(batch) / 8 for batch in batches])
    assert abs(float(torch.corrcoef(torch.stack([torch.arange(100.0), means]))[0, 1])) < 0.4
    falls = float((means[1:] < means[:-1]).float().mean())
    assert 0.3 < falls < 0.7  # a group that runs from long to short would nearly always fall
