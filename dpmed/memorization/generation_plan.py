"""What a model is asked to write: settings, prompts of both sides, and what the budget of tokens leaves of them.

The plan depends on records, tokenizer, context and settings only, so the base model gets the prompts of the tuned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from dpmed.errors import InputError
from dpmed.memorization.intervals import dense_units
from dpmed.memorization.leak_probes import IdentifierValues, TokenisedText, context_prompts, templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF_STEP = 32  # second halves are generated together with those of about the same length
_NO_BUDGET = "the budget of tokens left no prompt for it; raise evaluation.generate_tokens"
_POSITIVE = ("new_tokens", "half_tokens", "context_tokens", "identifier_tokens", "template_samples", "free_samples")
_POSITIVE += ("free_tokens", "sample_temperature", "batch_tokens", "bootstrap")


@dataclass(frozen=True)
class GenerationSettings:
    """What is generated. Lengths are tokens of the model's own tokenizer."""

    prompt_tokens: tuple[int, ...] = (50, 100, 500)
    """Regurgitation: first tokens of a record that are its prompt."""
    ngrams: tuple[int, ...] = (30, 50)
    """Regurgitation: run of true tokens that counts."""
    new_tokens: int = 500
    """Regurgitation: tokens written, and compared with as many true ones."""
    temperatures: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Prefix halves."""
    half_tokens: int = 512
    """Prefix halves: first tokens of a record that are cut into halves."""
    context_tokens: int = 200
    """Identifiers: true text in front of one."""
    identifier_tokens: int = 32
    """Identifiers: tokens written after their context or a template."""
    template_samples: int = 50
    """Identifiers: samples of each template."""
    free_samples: int = 200
    """Identifiers: samples without a prompt."""
    free_tokens: int = 256
    """Identifiers: tokens of a sample without a prompt."""
    sample_temperature: float = 1.0
    """Identifiers: of templates and of samples without a prompt."""
    top_k: int | None = 40
    """The same; null draws from all tokens."""
    max_records: int | None = 1000
    """Records of each side that give prompts, of randomly chosen patients; null takes all."""
    budget_tokens: int | None = 1_000_000
    """Prompt and new tokens of all jobs of one model; null sets no limit."""
    batch_tokens: int = 16384
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("ngrams", 1), ("temperatures", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise InputError(f"generation {name} is {list(values)}; give one or more numbers of at least {least}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise InputError(f"generation {name} is {getattr(self, name)}; give a number above 0")
        for name in ("top_k", "max_records", "budget_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"generation {name} is {value}; give a number above 0, or null")
        if self.seed < 0:
            raise InputError(f"generation seed is {self.seed}; give 0 or more")
        if min(self.ngrams) > self.new_tokens:
            raise InputError(f"generation ngrams {list(self.ngrams)} exceed new_tokens {self.new_tokens}; raise it")


@dataclass(frozen=True, repr=False)  # holds text
class Side:
    """The records of one side that give prompts, in a random order of patients."""

    name: str
    texts: list[TokenisedText]
    units: np.ndarray
    """Unit of each, [r]."""
    values: IdentifierValues
    """Training identifiers, or decoys."""


@dataclass(frozen=True, repr=False)  # holds text
class Job:
    """Prompts that are continued with one kind of decoding. q = prompts."""

    name: str
    prompts: list[list[int]]
    new_tokens: list[int]
    """Of each prompt [q]."""
    units: np.ndarray
    """Patient of each prompt [q]."""
    temperature: float = 0.0
    top_k: int | None = None
    truths: list[list[int]] = field(default_factory=list)
    """True continuations [q], where the job compares with one."""
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Identifier value that follows each prompt [q], where it is in front of one."""
    reason: str = ""
    """Why there is no prompt at all."""

    def costs(self) -> np.ndarray:
        return np.array([len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True)], dtype=np.int64)

    def first(self, n: int) -> Job:
        """The same with its first n prompts."""
        return replace(
            self,
            prompts=self.prompts[:n],
            new_tokens=self.new_tokens[:n],
            units=self.units[:n],
            truths=self.truths[:n],
            targets=self.targets[:n],
            reason=self.reason or (_NO_BUDGET if n == 0 else ""),
        )


def tokenised_side(
    name: str,
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    values: IdentifierValues,
) -> Side:
    """The first `max_records` records of a random order of patients, tokenised whole."""
    dense, n_units = dense_units(np.asarray(list(records["unit"]), dtype=str))
    place = np.random.default_rng(settings.seed).permutation(n_units)
    rows = np.argsort(place[dense], kind="stable")[: settings.max_records]
    chosen = records.select(rows.tolist(), keep_in_memory=True)
    texts = list(chosen["text"])
    tokens: Any = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    columns = zip(texts, tokens["input_ids"], tokens["offset_mapping"], chosen["identifiers"], strict=True)
    return Side(name, [TokenisedText(*row) for row in columns], dense[rows], values)


def side_jobs(side: Side, start: list[int], size: int | None, settings: GenerationSettings) -> list[Job]:
    """What is written from a side's own records.

    Args:
        start: special tokens in front of every text.
        size: the model's context in tokens, None if unknown; no prompt with its new tokens exceeds it.
    """
    jobs = [_prefix_job(side, p, start, size, settings) for p in settings.prompt_tokens]
    jobs += [_half_job(side, t, start, size, settings) for t in settings.temperatures]
    return [*jobs, _context_job(side, start, size, settings)]


def _prefix_job(side: Side, p: int, start: list[int], size: int | None, settings: GenerationSettings) -> Job:
    """The first p tokens of every record that has a shortest n-gram behind them."""
    least = min(settings.ngrams)
    room = settings.new_tokens if size is None else min(settings.new_tokens, size - len(start) - p)
    rows = [i for i, t in enumerate(side.texts) if len(t.ids) >= p + least] if room >= least else []
    reason = f"no record has {p} + {least} tokens; choose less"
    if room < least:
        reason = f"the model's context of {size} tokens does not hold {p} + {least}; choose less"
    return Job(
        f"{side.name} prefix p{p}",
        [start + side.texts[i].ids[:p] for i in rows],
        [room] * len(rows),
        side.units[rows],
        truths=[side.texts[i].ids[p : p + room] for i in rows],
        reason="" if rows else reason,
    )


def _half_job(side: Side, temperature: float, start: list[int], size: int | None, settings: GenerationSettings) -> Job:
    """The first half of the first `half_tokens` tokens of every record that has two."""
    most = settings.half_tokens if size is None else min(settings.half_tokens, size - len(start) - _HALF_STEP)
    parts = [t.ids[:most] for t in side.texts] if most >= 2 else []
    rows = [i for i, ids in enumerate(parts) if len(ids) >= 2]
    truths = [parts[i][len(parts[i]) // 2 :] for i in rows]
    return Job(
        f"{side.name} halves t{temperature:g}",
        [start + parts[i][: len(parts[i]) // 2] for i in rows],
        [-(-len(truth) // _HALF_STEP) * _HALF_STEP for truth in truths],
        side.units[rows],
        temperature=temperature,
        truths=truths,
        reason="" if rows else "no record has two halves that fit into the model's context",
    )


def _context_job(side: Side, start: list[int], size: int | None, settings: GenerationSettings) -> Job:
    """The true text in front of every identifier value."""
    room = context_room(start, size, settings)
    found = context_prompts(side.texts, side.values, start, room) if room > 0 else None
    prompts = found.prompts if found is not None else []
    targets = found.value if found is not None else np.empty(0, np.int64)
    reason = "no known identifier with text in front of it; name data.identifiers"
    return targeted_job(f"{side.name} context", side, prompts, targets, settings, reason)


def context_room(start: list[int], size: int | None, settings: GenerationSettings) -> int:
    """Text tokens that fit in front of an identifier; 0 or less if none do."""
    room = settings.context_tokens
    return room if size is None else min(room, size - len(start) - settings.identifier_tokens)


def targeted_job(
    name: str, side: Side, prompts: list[list[int]], targets: np.ndarray, settings: GenerationSettings, reason: str
) -> Job:
    """Greedy continuations of prompts that each ask for one value of the side; `reason` says why there are none."""
    return Job(
        name,
        prompts,
        [settings.identifier_tokens] * len(prompts),
        side.values.unit[targets],
        targets=targets,
        reason="" if prompts else reason,
    )


def sampling_jobs(
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    size: int | None,
    training: IdentifierValues,
    settings: GenerationSettings,
) -> list[Job]:
    """Samples from templates and from nothing; training values and decoys are looked for in the same samples."""
    asked = [start + text_ids(tokenizer, text) for text in templates(training.type.tolist())]
    special = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opening = start or ([int(special)] if special is not None else [])  # pyright: ignore[reportArgumentType]
    free = [opening] * settings.free_samples if opening else []
    return [
        template_job("templates", asked, size, settings),
        _sampled_job(
            "free", free, settings.free_tokens, size, settings, "the tokenizer has no token that opens a text"
        ),
    ]


def template_job(name: str, asked: list[list[int]], size: int | None, settings: GenerationSettings) -> Job:
    """`template_samples` samples of each prompt."""
    prompts = asked * settings.template_samples  # turn by turn, so that a budget leaves every template its share
    reason = "no known identifier in the training records to ask for"
    return _sampled_job(name, prompts, settings.identifier_tokens, size, settings, reason)


def _sampled_job(
    name: str, prompts: list[list[int]], wanted: int, size: int | None, settings: GenerationSettings, reason: str
) -> Job:
    longest = max(map(len, prompts), default=0)
    room = wanted if size is None else min(wanted, size - longest)
    kept = prompts if room > 0 else []
    return Job(
        name,
        kept,
        [room] * len(kept),
        np.arange(len(kept)),
        settings.sample_temperature,
        settings.top_k,
        reason="" if kept else reason,
    )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


def within_budget(jobs: Sequence[Job], budget: int | None) -> list[Job]:
    """The jobs, each cut to the same share of its tokens where all together exceed the budget."""
    total = int(sum(job.costs().sum() for job in jobs))
    if budget is None or total <= budget:
        return list(jobs)
    granted: list[Job] = []
    for job in jobs:
        costs = job.costs()
        granted.append(job.first(int((np.cumsum(costs) <= costs.sum() * (budget / total)).sum())))
    return granted
