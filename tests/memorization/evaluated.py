"""Records that a tiny model learns by heart, and how to read an evaluation of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from dpmed.data.tasks import TaskSpec, encode
from dpmed.memorization.evaluator import EvaluationSettings
from dpmed.memorization.scoring import pad

WORDS = ("heart", "lungs", "fever", "cough", "normal", "clear", "acute", "pain", "blood", "mild", "old", "new", "left")
SPEC = TaskSpec(max_length=60)
SETTINGS = EvaluationSettings(prefix_tokens=[4, 6], suffix_tokens=[4, 90], fpr=[0.1, 0.001], bootstrap=100)
FEW_CANDIDATES = replace(SETTINGS, canary_candidates=20)
SECRET = "Zacharias"


def records(n: int, seed: int, n_words: int = 8) -> Dataset:
    rng = np.random.default_rng(seed)
    texts = [" ".join(WORDS[i] for i in rng.integers(len(WORDS), size=n_words)) + f" {SECRET}" for _ in range(n)]
    spans = [
        [
            {"start": len(t) - len(SECRET), "end": len(t), "type": "NAME", "source": "planted"},
            {"start": t.index(" ") + 1, "end": t.index(" ", t.index(" ") + 1), "type": "DATE", "source": "known"},
        ]
        for t in texts
    ]
    units = [f"{seed}-{i // 2}" for i in range(n)]
    return Dataset.from_dict({"text": texts, "unit": units, "record_id": units, "identifiers": spans})


def trained(model: nn.Module, data: Dataset, tokenizer: Any, steps: int = 60) -> nn.Module:
    input_ids, attention = map(torch.from_numpy, pad(list(encode(data, tokenizer, SPEC)), 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        labels = input_ids.masked_fill(attention == 0, -100)
        model(input_ids=input_ids, attention_mask=attention, labels=labels).loss.backward()
        optimizer.step()
    return model


def value(tree: dict[str, Any], *keys: str) -> float:
    for key in keys:
        tree = tree[key]
    assert set(tree) >= {"value", "low", "high", "n", "higher_is"}
    assert tree["low"] <= tree["value"] <= tree["high"]
    return tree["value"]


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the input of each forward pass of the model, as it comes."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def killed_at(n_batches: int, seen: list[Any]) -> Callable[..., None]:
    """Progress that stops everything after so many reports, as Ctrl-C does."""

    def progress(*done: Any) -> None:
        seen.append(done)
        if len(seen) == n_batches:
            raise KeyboardInterrupt

    return progress


def every_null(tree: Any, at: str = "") -> set[str]:
    """Dotted keys of all nulls of a result."""
    if not isinstance(tree, dict):
        return {at} if tree is None else set()
    return set().union(*(every_null(v, f"{at}.{k}" if at else k) for k, v in tree.items())) if tree else set()
