"""What is kept of a forward pass: a few numbers per text token, and files that hold them.

A file of all scores lets the runs of a grid share the base model's pass; files of finished parts let a killed pass go
on. No text and no token ids; still private, since a token's log-probability depends on it: mode 0600.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from dpmed.data.tasks import EncodedRecords, TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.vocabulary import Columns, Sampling, TokenStatistics
from dpmed.runs import write_private

_VERSION = "2"  # of the file and of what its numbers mean
_STATISTICS = tuple(field.name for field in fields(TokenStatistics))
_ARRAYS = ("record", "offsets", "first_window", *_STATISTICS)
_TOKENS_AT_ONCE = 2**18
Detail = Literal["rank", "mean", "deviation", "sampled"]


@dataclass(frozen=True)
class TokenScores:
    """Statistics of all text tokens, record after record, in reading order.

    Shapes: t = text tokens of all records, r = records.
    """

    record: np.ndarray
    """Record of each token, int32 [t]."""
    log_prob: np.ndarray
    """Log-probability of the true token, in nats, float32 [t]; NaN where nothing stands before it in its window."""
    is_argmax: np.ndarray
    """Whether the true token is the model's first choice, bool [t]; False where log_prob is NaN."""
    offsets: np.ndarray
    """Tokens of record i are offsets[i]:offsets[i + 1], int64 [r + 1]."""
    first_window: np.ndarray
    """Text tokens in the first window of each record, int32 [r]; later windows do not see these."""
    rank: np.ndarray | None = None
    """See `TokenStatistics`, as for the three below. None where only the two numbers above are known; read with
    `detail`."""
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    sampled: np.ndarray | None = None

    @classmethod
    def for_records(cls, encoded: EncodedRecords, found: TokenStatistics) -> TokenScores:
        """Put the statistics of all windows, in order, to their records."""
        per_record = np.zeros(encoded.n_records, dtype=np.int64)
        first = np.zeros(encoded.n_records, dtype=np.int32)
        for example in encoded:
            length = example.text_end - example.text_start
            per_record[example.record] += length
            if example.window == 0:
                first[example.record] = length
        offsets = np.concatenate([[0], np.cumsum(per_record)])
        record = np.repeat(np.arange(encoded.n_records, dtype=np.int32), per_record)
        return cls(record, offsets=offsets, first_window=first, **{name: getattr(found, name) for name in _STATISTICS})

    @property
    def n_records(self) -> int:
        return len(self.first_window)

    @property
    def scored(self) -> np.ndarray:
        """Tokens that have a log-probability, bool [t]."""
        return ~np.isnan(self.log_prob)

    def detail(self, name: Detail) -> np.ndarray:
        """One of the statistics of a whole pass [t].

        Raises: ValueError if these scores were made without it.
        """
        values: np.ndarray | None = getattr(self, name)
        if values is None:
            raise ValueError(f"the scores hold no {name}; make them with score_records")
        return values

    def per_record(self, values: np.ndarray) -> np.ndarray:
        """Sum of one value per token over each record, float64 [r]; tokens without a log-probability count as 0."""
        sums = np.zeros(self.n_records)
        for start in range(0, len(self.record), _TOKENS_AT_ONCE):
            cut = slice(start, start + _TOKENS_AT_ONCE)
            record, known = self.record[cut], ~np.isnan(self.log_prob[cut])
            found = np.bincount(record - record[0], weights=np.where(known, values[cut], 0))
            sums[record[0] : record[0] + len(found)] += found
        return sums

    @cached_property
    def n_scored(self) -> np.ndarray:
        """How many tokens of each record have a log-probability, float64 [r]."""
        return self.per_record(np.broadcast_to(np.float64(1), len(self.record)))

    def blocks(self) -> Iterator[TokenScores]:
        """These scores in pieces of consecutive whole records, at least one piece: a function of the tokens of single
        records then needs no memory that grows with the number of records. The tokens' numbers are not copied."""
        wanted = np.arange(0, self.offsets[-1] + _TOKENS_AT_ONCE, _TOKENS_AT_ONCE)
        edges = np.unique([0, *np.searchsorted(self.offsets, wanted[:-1], side="left"), self.n_records])
        for first, last in itertools.pairwise(edges.tolist() if self.n_records else [0, 0]):
            tokens = slice(self.offsets[first], self.offsets[last])
            own = {name: getattr(self, name) for name in _STATISTICS}
            yield replace(
                self,
                record=self.record[tokens] - first,
                offsets=self.offsets[first : last + 1] - self.offsets[first],
                first_window=self.first_window[first:last],
                **{name: None if values is None else values[tokens] for name, values in own.items()},
            )

    def save(self, path: Path, fingerprint: str) -> None:
        """Write to a safetensors file that only its owner can read, at once or not at all."""
        kept = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        write_private(path, save(kept, {"version": _VERSION, "fingerprint": fingerprint}))

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> TokenScores:
        """Read what `save` wrote.

        Raises: InputError if the file is damaged, or is not of this model, these records and this task.
        """
        return cls(**_read_private(path, fingerprint))


@dataclass(frozen=True)
class ScoreParts:
    """The finished batches of one pass of a model, in files that a restarted pass begins with.

    A part is written at once or not at all. Parts of another pass (weights, records, settings, size of the batches)
    are told by their fingerprint and left alone; one that another process just removed counts as not there.
    """

    folder: Path
    name: str
    """First words of the files' names."""
    fingerprint: str
    """Of all that the numbers depend on."""
    batch_tokens: int = 0
    """Padded tokens per batch: a batch's number means nothing where batches are cut otherwise."""

    def save(self, batches: list[int], at: np.ndarray, found: Columns) -> None:
        """Keep the entries `at` [n], for a language model's pass its tokens: those of the numbered batches."""
        arrays = {"batches": np.array(batches, np.int64), "at": at}
        arrays |= {field.name: getattr(found, field.name) for field in fields(found)}
        path = self.folder / f"{self._stem()}{batches[0]:07d}-{batches[-1]:07d}.safetensors"
        write_private(path, save(arrays, {"version": _VERSION, "fingerprint": self.fingerprint}))

    def restore(self, into: Columns) -> set[int]:
        """Fill in what earlier passes finished, and say which batches those are.

        Raises: InputError if a part is damaged.
        """
        finished: set[int] = set()
        for path in sorted(self.folder.glob(f"{self._stem()}*.safetensors")):
            try:
                arrays = _read_private(path, self.fingerprint)
            except FileNotFoundError:
                continue
            finished.update(arrays.pop("batches").tolist())
            at = arrays.pop("at")
            into.put(at, type(into)(**arrays))
        return finished

    def remove(self) -> None:
        """Delete the parts, once their numbers are kept elsewhere."""
        for path in self.folder.glob(f"{self.name}-{self.fingerprint[:16]}.part-*.safetensors"):
            path.unlink(missing_ok=True)

    def _stem(self) -> str:
        return f"{self.name}-{self.fingerprint[:16]}.part-{self.batch_tokens}-"


def _read_private(path: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises: InputError if it is damaged or not of this fingerprint; FileNotFoundError if there is none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about: Mapping[str, str] = file.metadata() or {}
            if (about.get("version"), about.get("fingerprint")) != (_VERSION, fingerprint):
                raise InputError(f"{path.name} holds scores of another model, task or data set; delete it")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} in the folder of scores cannot be read; delete it") from error


def in_blocks(function: Callable[..., np.ndarray], *scores: TokenScores) -> np.ndarray:
    """A function that gives one value per record [r], for some records at a time.

    Args:
        function: takes as many `TokenScores` as there are `scores`, of the same records.
        scores: of one or more models, on the same tokens.
    """
    return np.concatenate([function(*parts) for parts in zip(*(each.blocks() for each in scores), strict=True)])


def text_starts(encoded: EncodedRecords) -> tuple[np.ndarray, int]:
    """Where the text tokens of each window begin in the flat arrays [windows], and how many there are in all."""
    lengths = np.array([e.text_end - e.text_start for e in encoded], dtype=np.int64)
    return np.cumsum(lengths) - lengths, int(lengths.sum())


def record_units(encoded: EncodedRecords) -> np.ndarray:
    """Dense unit index of each record, int64 [r]."""
    units = np.zeros(encoded.n_records, dtype=np.int64)
    for example in encoded:
        units[example.record] = example.unit
    return units


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the model's weights and configuration, also of how strongly its adapters act, which no weight tells.

    It reads all weights: take it once per model.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    to_json: Callable[[], str] | None = getattr(getattr(model, "config", None), "to_json_string", None)
    digest.update(to_json().encode() if to_json is not None else b"")
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # a layer of LoRA: alpha / rank of each adapter, and which of them act
            acting: Any = [] if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", [])
            digest.update(f"{name} {sorted(scaling.items())} {list(acting)}".encode())
    return digest.hexdigest()


def scores_fingerprint(weights: str, encoded: EncodedRecords, spec: TaskSpec, sampling: Sampling) -> str:
    """A hash of all that the scores depend on: weights (by their hash), token ids, masked groups, task and sampling."""
    task = json.dumps([spec.to_dict(), asdict(sampling)], sort_keys=True)
    digest = hashlib.sha256(f"{_VERSION} {weights} {task}".encode())
    for e in encoded:
        at = [e.record, e.window, e.text_start, e.text_end, len(e.input_ids), *e.input_ids, len(e.words), *e.words]
        digest.update(np.array(at + [edge for span in e.spans for edge in (span.start, span.end)], np.int64).tobytes())
    return digest.hexdigest()
