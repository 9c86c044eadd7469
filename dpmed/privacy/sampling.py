"""Poisson sampling of privacy units, and micro-batches cut inside one draw."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.entropy import EntropyStream


class PoissonUnitSampler:
    """Yields, per step, the record indices of one Poisson draw of units: what the accountant assumes.

    Guarantees:
        - Every unit is in a draw independently of all others and of all other draws, with probability `sampling_rate`,
          however many records it has.
        - A drawn unit gives min(its records, `max_records_per_unit`) records, uniformly without replacement.
        - A draw may be empty. It is yielded all the same ([]): the step adds noise, and is charged.
        - Entropy comes from the operating system when the object is made, for `secure` anew for every request and from
          a cryptographic generator; no global seed has influence. Each pass goes on with fresh draws, and copying,
          pickling and, unless `secure`, use in a forked process are refused: a copy would replay them.
        - In data-parallel training every rank makes a sampler of its own over the whole list, and draws only the units
          with index % world_size == rank, at the same rate. Units are drawn independently of each other, so the union
          of the ranks' draws is exactly one Poisson draw of all units, without communication.

    Args:
        unit_of_record: unit index of each record; every index in 0 .. n_units - 1 occurs.
        sampling_rate: in (0, 1].
        max_records_per_unit: >= 1.
        steps_per_pass: draws in one pass of `__iter__`, >= 1; a pass is a number of steps, not a cover of the data.
        secure: draw from `EntropyStream` instead of numpy's PCG64.
        rank: of this process, 0 .. world_size - 1.
        world_size: processes that train together, >= 1.
        seed: for tests only: draws are then known to whoever knows the seed. Not with `secure`.
    Edge cases: with more ranks than units, a rank without a unit yields [] at every step; `n_units` is the total.
    Raises: InputError for values out of range, no records, units without a record, or a seed for secure draws.
    """

    def __init__(
        self,
        unit_of_record: Sequence[int],
        *,
        sampling_rate: float,
        max_records_per_unit: int,
        steps_per_pass: int,
        secure: bool = False,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        units = np.asarray(unit_of_record)
        if units.ndim != 1 or units.size == 0 or not np.issubdtype(units.dtype, np.integer):
            raise InputError(
                "unit_of_record must be a non-empty list of unit indices: check that the training data has records"
            )
        if not 0 < sampling_rate <= 1:
            raise InputError(
                f"sampling_rate must lie in (0, 1], got {sampling_rate}: lower expected_batch_units or use more units"
            )
        if max_records_per_unit < 1 or steps_per_pass < 1:
            raise InputError(
                f"max_records_per_unit {max_records_per_unit} and steps_per_pass {steps_per_pass} must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank must lie in 0 .. world_size - 1, got {rank} of {world_size}: check the launcher")
        if secure and seed is not None:
            raise InputError("a seed makes draws that anyone can compute again: leave out noise_seed, or secure")
        if units.min() < 0 or np.bincount(units).min() == 0:
            raise InputError("unit indices must be dense, 0 .. n_units - 1 with a record each: number the units anew")
        self.n_units = int(units.max()) + 1
        self.sampling_rate = float(sampling_rate)
        self.max_records_per_unit = int(max_records_per_unit)
        self.steps_per_pass = int(steps_per_pass)
        self._rows = np.argsort(units, kind="stable")  # record rows, unit by unit
        self._starts = np.searchsorted(units[self._rows], np.arange(self.n_units + 1))
        self._held = np.arange(rank, self.n_units, world_size)  # the units that this rank draws
        self._uniforms = EntropyStream().uniforms if secure else _fast_uniforms(seed, rank)

    def __len__(self) -> int:
        """Number of draws in one pass."""
        return self.steps_per_pass

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps_per_pass):
            yield self.draw()

    def draw(self) -> list[int]:
        """One Poisson draw: record indices, unit by unit; [] when no unit was drawn."""
        drawn = self._held[self._uniforms(self._held.size) < self.sampling_rate]
        return [int(row) for unit in drawn for row in self._records_of(int(unit))]

    def _records_of(self, unit: int) -> np.ndarray:
        rows = self._rows[self._starts[unit] : self._starts[unit + 1]]
        if len(rows) <= self.max_records_per_unit:
            return rows
        # the k smallest of independent uniforms: every set of k is equally likely
        return rows[np.argpartition(self._uniforms(len(rows)), self.max_records_per_unit)[: self.max_records_per_unit]]

    def __reduce_ex__(self, protocol: object) -> str | tuple:
        raise PrivacyError(
            "a Poisson sampler cannot be copied or saved, the copy would repeat its draws: make a new one"
        )


def _fast_uniforms(seed: int | None, rank: int) -> Callable[[int], np.ndarray]:
    """Numbers in [0, 1) from PCG64: by entropy of the operating system, or for tests by the seed, other for each rank.

    The numbers of a process and of its fork would be the same, so the fork gets a PrivacyError.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(rank,))))
    process = os.getpid()

    def uniforms(n: int) -> np.ndarray:
        if seed is None and os.getpid() != process:
            raise PrivacyError("a Poisson sampler in a forked process repeats its parent's draws: make a new one there")
        return generator.random(n)

    return uniforms


def cut_micro_batches(
    records: Sequence[int],
    *,
    units: Sequence[int],
    lengths: Sequence[int],
    max_tokens: int,
    max_units: int | None = None,
) -> list[list[int]]:
    """Cut one draw into micro-batches that fit in memory.

    Args:
        records: the draw: record indices, or positions in it.
        units: the unit of each of `records`, in the same order.
        lengths: the length of each of `records` in tokens, in the same order.
        max_tokens: padded size (rows x longest record) of a micro-batch, >= 1.
        max_units: units in a micro-batch, at most: each needs a row of the gradient buffer. None does not limit them.

    Returns: the elements of `records`, longest units first (so that memory runs out at once, or not at all).
    Guarantee: each record is in exactly one micro-batch, and all records of a unit are in the same one: a unit in two
        would be clipped twice, with sensitivity 2C. The order within a step does not touch the sum: no privacy cost.
    Edge cases: [] gives []; a unit that is larger than `max_tokens` on its own gets a micro-batch of its own.
    Raises: InputError if max_tokens or max_units < 1; ValueError if the three sequences differ in length.
    """
    for name, limit in (("max_tokens", max_tokens), ("max_units", max_units)):
        if limit is not None and limit < 1:
            raise InputError(f"{name} must be at least 1, got {limit}: set it to what the device's memory holds")
    by_unit: dict[int, list[tuple[int, int]]] = {}
    for record, unit, length in zip(records, units, lengths, strict=True):
        by_unit.setdefault(unit, []).append((record, length))
    longest = {unit: max(length for _, length in rows) for unit, rows in by_unit.items()}

    batches: list[list[int]] = []
    width = n_units = 0  # of the open micro-batch: its first unit has the longest record
    for unit in sorted(by_unit, key=lambda unit: (-longest[unit], unit)):
        rows = [record for record, _ in by_unit[unit]]
        fits = batches and (len(batches[-1]) + len(rows)) * width <= max_tokens
        if fits and (max_units is None or n_units < max_units):
            batches[-1].extend(rows)
            n_units += 1
        else:
            batches.append(rows)
            width, n_units = longest[unit], 1
    return batches


def cut_groups(
    records: Sequence[int],
    *,
    units: Sequence[int],
    lengths: Sequence[int],
    max_tokens: int,
    max_units: int | None = None,
) -> list[list[list[int]]]:
    """Cut one draw into groups of whole units, each to be clipped at once, and each group into micro-batches.

    A unit's short records need not be padded to its longest one: inside a group records go together by length alone,
    and their gradients are added up in their units' rows.

    Args: as `cut_micro_batches`; `max_units` bounds a group, since each of its units needs a row.

    Returns: groups of micro-batches of elements of `records`.
    Guarantee: each record is in exactly one micro-batch, and all records of a unit are in the same group, so that a
        unit is clipped once.
    Edge cases: [] gives []; where every unit has one record, a group is a micro-batch, which needs the fewest rows.
    Raises: as `cut_micro_batches`.
    """
    limits = {"max_tokens": max_tokens, "max_units": max_units}
    if len(set(units)) == len(records):
        return [[batch] for batch in cut_micro_batches(records, units=units, lengths=lengths, **limits)]
    longest: dict[int, int] = {}
    for unit, length in zip(units, lengths, strict=True):
        longest[unit] = max(length, longest.get(unit, 0))
    order = sorted(longest, key=lambda unit: (-longest[unit], unit))
    size = max_units or len(order)
    group_of = {unit: place // size for place, unit in enumerate(order)}
    groups: list[list[int]] = [[] for _ in range(-(-len(order) // size))]
    for at, unit in enumerate(units):
        groups[group_of[unit]].append(at)
    # each record as if it were a unit: nothing but its length counts for the micro-batch that it is in
    cuts = [
        cut_micro_batches(group, units=group, lengths=[lengths[at] for at in group], max_tokens=max_tokens)
        for group in groups
    ]
    return [[[records[at] for at in batch] for batch in group] for group in cuts]
