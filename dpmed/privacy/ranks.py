"""Data-parallel training: each rank clips its own units, one sum over all ranks, one noise.

Every rank takes part in every step, whether it drew a unit or not. Without several processes all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dpmed.errors import PrivacyError

if TYPE_CHECKING:
    from dpmed.privacy.noise import GaussianNoise


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def launched_rank() -> int:
    """Rank that torchrun or accelerate gave this process; 0 for a process that was started alone."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def _together() -> Iterator[None]:
    """Where ranks meet. One that is gone makes the others fail there, which is no fault of theirs."""
    try:
        yield
    except RuntimeError as error:  # gloo's, and the base of torch.distributed's own
        raise PrivacyError(
            "this process lost the others that train with it: one of them has stopped, and its own message says why"
        ) from error


def sum_over_ranks_(flat: Tensor) -> Tensor:
    """Replace `flat` on every rank by the sum over ranks, in place; the same bits everywhere."""
    if several():
        with _together():
            dist.all_reduce(flat)
    return flat


def noised_sum_(clipped: Tensor, noise: GaussianNoise) -> Tensor:
    """This rank's clipped sum [p] to the noised sum over all ranks, in place; the same bits everywhere.

    Guarantee: noise is added exactly once, whatever the number of ranks: noise on every rank would be more than was
        accounted for if added up, and less if averaged.
    """
    first = not several() or dist.get_rank() == 0
    if several() and noise.secure:  # it rounds sum + noise, so it comes after the sum
        sum_over_ranks_(clipped)
        if first:
            noise.add_(clipped)
        from_first_rank_([clipped])
        return clipped
    if first:
        noise.add_(clipped)
    return sum_over_ranks_(clipped)


def from_first_rank_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors on every rank by those of rank 0, in place."""
    if several():
        with torch.no_grad(), _together():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def number_from_first_rank(value: int, device: torch.device) -> int:
    """Rank 0's number, on every rank."""
    number = torch.tensor(value, dtype=torch.int64, device=device)
    from_first_rank_([number])
    return int(number)


def most_of_all(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, on every rank."""
    number = torch.tensor(value, dtype=torch.int64, device=device)
    if several():
        with _together():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if several():
        with _together():
            dist.barrier()
