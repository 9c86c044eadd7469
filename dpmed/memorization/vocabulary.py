"""What is kept of a row of logits: the truth's probability and rank, and how the whole vocabulary is distributed.

A row has tens of thousands of entries, so that passes over it, not arithmetic, cost the time. Logits are taken in
slices that stay in a core's cache, in buffers used again, with one exponential for all sums. On a GPU with Triton,
`fused_statistics` reads them as they are, twice in all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

RANK_LIMIT = 65535
"""Ranks are uint16: a worse rank is kept as this one."""
_SLICE = 2**18
"""Logits of one slice on a CPU: 1 MiB in float32, about a second-level cache; smaller ones cost more in calls."""
_SLICE_ELSEWHERE = 2**25
"""The same on a GPU without Triton: three buffers of 128 MiB."""
_GROUPED = 64
"""Entries per group in the search for the largest: few groups to sort, few entries in those that win."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is drawn from a model: logits are divided by the temperature, then all but the largest are dropped."""

    temperature: float = 1.0
    top_k: int | None = 40
    """None draws from the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Equally long arrays, one entry for each of the things that are scored: what a pass fills in batch by batch."""

    def take(self, at: np.ndarray) -> Self:
        """The entries `at`, as a copy."""
        return type(self)(*(getattr(self, field.name)[at] for field in fields(self)))

    def put(self, at: np.ndarray, found: Self) -> None:
        """Write another's entries to the positions `at`, in place."""
        for field in fields(self):
            getattr(self, field.name)[at] = getattr(found, field.name)


@dataclass(frozen=True, slots=True)
class TokenStatistics(Columns):
    """Statistics of tokens in any order.

    Shapes: t = tokens.
    """

    log_prob: np.ndarray
    """Log-probability of the true token, in nats, float32 [t]."""
    is_argmax: np.ndarray
    """Whether the true token is the model's first choice, bool [t]; among equals the lowest token id is first."""
    rank: np.ndarray
    """Vocabulary entries with a higher logit than the true token, at most `RANK_LIMIT`, uint16 [t]."""
    mean: np.ndarray
    """Mean of the vocabulary's log-probabilities under the model's own distribution, float32 [t]."""
    deviation: np.ndarray
    """Standard deviation of the same, float32 [t]."""
    sampled: np.ndarray
    """Log-probability of the true token when text is drawn by `Sampling`, float32 [t]; -inf outside its top k."""

    @classmethod
    def empty(cls, n: int) -> TokenStatistics:
        """Room for n tokens, all marked as not scored: NaN, never a first choice, the worst rank."""
        nothing = (np.full(n, np.nan, np.float32) for _ in range(4))
        log_prob, mean, deviation, sampled = nothing
        return cls(log_prob, np.zeros(n, bool), np.full(n, RANK_LIMIT, np.uint16), mean, deviation, sampled)

    @classmethod
    def of(cls, found: Tensor) -> TokenStatistics:
        """The tokens that `measured` gave [6, t], fetched from its device."""
        log_prob, first, rank, mean, deviation, sampled = found.cpu().numpy()
        rank = np.minimum(rank, RANK_LIMIT).astype(np.uint16)
        return cls(log_prob, first.astype(bool), rank, mean, deviation, sampled)


def token_statistics(logits: Tensor, targets: Tensor, sampling: Sampling) -> TokenStatistics:
    """Statistics of the true token of each row of logits, computed in float32.

    Shapes: n = rows, v = vocabulary.

    Args:
        logits: [n, v], any floating type and device; left as they are.
        targets: true token of each row, int64 [n], on the same device.
        sampling: as transformers draws: temperature first; every entry as large as the k-th largest stays.

    Edge cases: a row with a NaN or an infinite logit gives NaN; entries of -inf have probability 0.
    Reference: mean and deviation as in Min-K%++ (Zhang et al. 2024, arXiv 2404.02936).
    """
    return TokenStatistics.of(measured(logits, targets, sampling))


def measured(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """The fields of `token_statistics` in their order, float32 [6, n] on the logits' device: not waited for."""
    statistics = fused_path(logits.device, logits.dtype, logits.shape[1]) or plain_statistics
    return statistics(logits, targets, sampling)


@cache
def fused_path(
    device: torch.device, dtype: torch.dtype, vocabulary: int
) -> Callable[[Tensor, Tensor, Sampling], Tensor] | None:
    """The Triton kernel, compiled and tried on one row; None where it cannot run. Decided once for each of these."""
    if device.type != "cuda":
        return None
    try:
        from dpmed.memorization.fused_statistics import fused_statistics

        row = torch.zeros(1, vocabulary, dtype=dtype, device=device)
        fused_statistics(row, torch.zeros(1, dtype=torch.int64, device=device), Sampling())
    except ImportError:  # no Triton
        return None
    except Exception as error:  # no C compiler, an old GPU, a folder that cannot be written: whatever Triton lacks
        warnings.warn(f"statistics are slower: the Triton kernel failed with {type(error).__name__}", stacklevel=2)
        return None
    return fused_statistics


def plain_statistics(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """What `measured` returns, in torch alone."""
    entries = _SLICE if logits.device.type == "cpu" else _SLICE_ELSEWHERE
    rows = max(1, min(entries // logits.shape[1], len(logits)))
    buffers = torch.empty(3, rows, logits.shape[1], device=logits.device)
    found = torch.empty(6, len(logits), device=logits.device)
    for start in range(0, len(logits), rows):
        cut = slice(start, start + rows)
        _slice_statistics(logits[cut], targets[cut, None], sampling, buffers, found[:, cut])
    return found


def _slice_statistics(logits: Tensor, target: Tensor, sampling: Sampling, buffers: Tensor, found: Tensor) -> None:
    """The statistics of a slice that fits the cache, written to `found` [6, n]."""
    shifted, weight, plain = buffers[:, : len(logits)]
    x = logits if logits.dtype == torch.float32 else plain.copy_(logits)
    groups = group_maxima(x)
    top = groups.amax(dim=1, keepdim=True)
    true = x.gather(1, target)
    torch.sub(x, top, out=shifted)  # at most 0, so that no exponential overflows and the sums keep their digits
    torch.exp(shifted, out=weight)
    total = weight.sum(dim=1)
    shifted.clamp_min_(torch.finfo(torch.float32).min)  # 0 times -inf is no number
    mean = weight.mul_(shifted).sum(dim=1) / total
    square = weight.mul_(shifted).sum(dim=1) / total
    log_total = total.log()
    higher = _count(torch.gt, x, true, weight)
    leads = higher == 0
    tied = (leads & (_count(torch.eq, x, true, weight) > 1)).nonzero()[:, 0]
    if len(tied):  # equal logits are common in bfloat16: only one of them is the first choice
        leads[tied] = x[tied].argmax(dim=1) == target[tied, 0]
    found[0] = (true - top)[:, 0] - log_total
    found[1] = leads
    found[2] = higher
    found[3] = mean - log_total
    found[4] = (square - mean * mean).clamp_min_(0).sqrt_()
    found[5] = _sampled_log_prob(x, groups, true, higher, sampling, weight)


def _count(compare: Callable[..., Tensor], x: Tensor, bound: Tensor, buffer: Tensor) -> Tensor:
    """For how many entries of each row the comparison holds, float32 [n]: exact, and faster than to add up booleans."""
    return compare(x, bound, out=buffer).sum(dim=1)


def group_maxima(x: Tensor) -> Tensor:
    """Maxima of about v / 64 groups of entries, the entries of a group lying evenly spaced [n, groups]."""
    n, v = x.shape
    width = v // _GROUPED
    head = x[:, : width * _GROUPED].view(n, _GROUPED, width).amax(dim=1) if width else x[:, :0]
    return torch.cat([head, x[:, width * _GROUPED :]], dim=1)


def largest(x: Tensor, groups: Tensor, k: int) -> Tensor:
    """The k largest entries of each row [n, k], in falling order.

    They lie in the k groups with the largest maxima, so that only these are searched.
    """
    n, v = x.shape
    width = v // _GROUPED
    if k >= width:
        return x.topk(k, dim=1).values
    at = groups.topk(k, dim=1).indices  # [n, k]
    inside = at.clamp_max(width - 1)[:, :, None] + width * torch.arange(_GROUPED, device=x.device)  # [n, k, 64]
    entries = x.gather(1, inside.flatten(1)).view(n, k, _GROUPED)
    alone = (at >= width)[:, :, None]  # the entries that no group holds are groups of one
    single = torch.full_like(entries, -torch.inf)
    single[:, :, 0] = groups.gather(1, at)
    return torch.where(alone, single, entries).flatten(1).topk(k, dim=1).values


def _sampled_log_prob(
    x: Tensor, groups: Tensor, true: Tensor, higher: Tensor, sampling: Sampling, buffer: Tensor
) -> Tensor:
    """Log-probability of the truth under `sampling` [n]."""
    top_k = x.shape[1] if sampling.top_k is None else min(sampling.top_k, x.shape[1])
    if top_k == x.shape[1]:
        scaled = torch.div(x, sampling.temperature, out=buffer)
        return (true / sampling.temperature)[:, 0] - scaled.logsumexp(dim=1)
    kept = largest(x, groups, top_k)
    # Entries equal to the k-th stay too, however many there are in the row.
    ties = _count(torch.ge, x, kept[:, -1:], buffer) - top_k
    scaled = kept / sampling.temperature
    total = torch.logaddexp(scaled.logsumexp(dim=1), scaled[:, -1] + ties.log())
    return torch.where(higher < top_k, (true / sampling.temperature)[:, 0] - total, -torch.inf)
