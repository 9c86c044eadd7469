"""What is kept of a forward pass: two numbers per text token, and a file that holds them for the base model.

No text and no token ids; still private, since a token's log-probability depends on it: files are made with mode 0600.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from dpmed.data.tasks import EncodedRecords, TaskSpec
from dpmed.errors import InputError

_VERSION = "1"  # of the file and of what its numbers mean
_ARRAYS = ("record", "log_prob", "is_argmax", "offsets", "first_window")


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

    @classmethod
    def for_records(cls, encoded: EncodedRecords, log_prob: np.ndarray, is_argmax: np.ndarray) -> TokenScores:
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
        return cls(record, log_prob, is_argmax, offsets, first)

    @property
    def n_records(self) -> int:
        return len(self.first_window)

    @property
    def scored(self) -> np.ndarray:
        """Tokens that have a log-probability, bool [t]."""
        return ~np.isnan(self.log_prob)

    def per_record(self, values: np.ndarray) -> np.ndarray:
        """Sum of one value per token over each record, float64 [r]; tokens without a log-probability count as 0."""
        return np.bincount(self.record, weights=np.where(self.scored, values, 0), minlength=self.n_records)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write to a safetensors file that only its owner can read, at once or not at all."""
        data = save({name: getattr(self, name) for name in _ARRAYS}, {"version": _VERSION, "fingerprint": fingerprint})
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> TokenScores:
        """Read what `save` wrote.

        Raises: InputError if the file is damaged, or is not of this model, these records and this task.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                if (about.get("version"), about.get("fingerprint")) != (_VERSION, fingerprint):
                    raise InputError(f"{path.name} holds scores of another model, task or data set; delete it")
                return cls(**{name: file.get_tensor(name) for name in _ARRAYS})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path.name} in the folder of base scores cannot be read; delete it") from error


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


def scores_fingerprint(model: nn.Module, encoded: EncodedRecords, spec: TaskSpec) -> str:
    """A hash of all that the scores depend on: weights, configuration, token ids, masked groups and task."""
    digest = hashlib.sha256(f"{_VERSION} {type(model).__name__} {json.dumps(spec.to_dict(), sort_keys=True)}".encode())
    to_json: Callable[[], str] | None = getattr(getattr(model, "config", None), "to_json_string", None)
    digest.update(to_json().encode() if to_json is not None else b"")
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for e in encoded:
        at = [e.record, e.window, e.text_start, e.text_end, len(e.input_ids), *e.input_ids, len(e.words), *e.words]
        digest.update(np.array(at + [edge for span in e.spans for edge in (span.start, span.end)], np.int64).tobytes())
    return digest.hexdigest()
