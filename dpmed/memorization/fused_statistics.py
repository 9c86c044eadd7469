"""The statistics of `vocabulary` in one reading of the logits, for a GPU: no copy in float32, no pass per figure.

A Triton program takes a row. The shift of the exponentials and the k-th largest entry come from the maxima of groups,
which torch finds in one reading more. Importing this needs Triton, which comes with torch's CUDA builds alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dpmed.memorization.vocabulary import Sampling, group_maxima, largest

_BLOCK = 2048
"""Entries read at a time: with 8 warps, 16 bytes of bfloat16 a thread. A power of two."""


def fused_statistics(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """What `vocabulary.measured` returns [6, n], of logits [n, v] of any floating type and targets [n].

    A row with a NaN or an infinite logit gives NaN in all four log-probabilities.
    """
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    groups = group_maxima(logits)
    top = groups.amax(dim=1)
    k = v if sampling.top_k is None else min(sampling.top_k, v)
    least = torch.full_like(top, -torch.inf) if k == v else largest(logits, groups, k)[:, -1].contiguous()
    found = torch.empty(6, n, device=logits.device)
    if n:
        with torch.cuda.device_of(logits):  # Triton starts its programs on the current device
            programs: Any = _row_statistics
            programs[(n,)](
                logits,
                targets.contiguous(),
                top,
                least,
                found,
                n,
                logits.stride(0),
                1 / sampling.temperature,
                SCALED=sampling.temperature != 1,
                V=v,
                BLOCK=_BLOCK,
                num_warps=8,
            )
    return found


# The arguments named here would otherwise each give one more compilation when a batch's size changes.
@triton.jit(do_not_specialize=["n", "targets", "top", "least", "found"])
def _row_statistics(
    logits,
    targets,
    top,
    least,
    found,
    n,
    row_stride,
    inverse_temperature,
    SCALED: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a row's six figures to its column of `found` [6, n]."""
    row = tl.program_id(0).to(tl.int64)  # rows times their length may pass 2^31
    entries = logits + row * row_stride
    target = tl.load(targets + row)
    true = tl.load(entries + target).to(tl.float32)
    target = target.to(tl.int32)
    highest = tl.load(top + row).to(tl.float32)
    bound = tl.load(least + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first_moment = tl.zeros([BLOCK], tl.float32)
    second_moment = tl.zeros([BLOCK], tl.float32)
    drawn = tl.zeros([BLOCK], tl.float32)
    higher = tl.zeros([BLOCK], tl.int32)
    equal_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(entries + at, mask=at < V, other=float("-inf")).to(tl.float32)
        shifted = x - highest  # at most 0, so that no exponential overflows and the sums keep their digits
        weight = tl.exp(shifted)
        finite = tl.maximum(shifted, -3.0e38)  # 0 times -inf is no number
        moment = weight * finite
        total += weight
        first_moment += moment
        second_moment += moment * finite
        if SCALED:
            drawn += tl.where(x >= bound, tl.exp(shifted * inverse_temperature), 0.0)
        else:
            drawn += tl.where(x >= bound, weight, 0.0)
        higher += (x > true).to(tl.int32)
        equal_before += ((x == true) & (at < target)).to(tl.int32)
    mass = tl.sum(total)
    log_mass = tl.log(mass)
    mean = tl.sum(first_moment) / mass
    variance = tl.sum(second_moment) / mass - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays
    rank = tl.sum(higher)
    drawn_log_prob = (true - highest) * inverse_temperature - tl.log(tl.sum(drawn))
    drawn_log_prob = tl.where(true >= bound, drawn_log_prob, float("-inf"))
    tl.store(found + row, true - highest - log_mass)
    tl.store(found + n + row, ((rank == 0) & (tl.sum(equal_before) == 0)).to(tl.float32))
    tl.store(found + 2 * n + row, rank.to(tl.float32))
    tl.store(found + 3 * n + row, mean - log_mass)
    tl.store(found + 4 * n + row, tl.sqrt(variance))
    tl.store(found + 5 * n + row, tl.where(mass == mass, drawn_log_prob, mass))
