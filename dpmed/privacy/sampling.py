"""Poisson sampling of privacy units, and micro-batches cut inside one draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dpmed.errors import InputError, PrivacyError


class PoissonUnitSampler:
    """Yields, per step, the record indices of one Poisson draw of units: what the accountant assumes.

    Guarantees:
        - Every unit is in a draw independently of all others and of all other draws, with probability `sampling_rate`,
          however many records it has.
        - A drawn unit gives min(its records, `max_records_per_unit`) records, uniformly without replacement.
        - A draw may be empty. It is yielded all the same ([]): the step adds noise, and is charged.
        - Entropy comes from the operating system when the object is made; no global seed has influence. Each pass goes
          on with fresh draws, and copying and pickling are refused: a copy would replay them.

    Args:
        unit_of_record: unit index of each record; every index in 0 .. n_units - 1 occurs.
        sampling_rate: in (0, 1].
        max_records_per_unit: >= 1.
        steps_per_pass: draws in one pass of `__iter__`, >= 1; a pass is a number of steps, not a cover of the data.
        seed: for tests only: draws are then known to whoever knows the seed.
    Raises: InputError for values out of range, no records, or units without a record.
    """

    def __init__(
        self,
        unit_of_record: Sequence[int],
        *,
        sampling_rate: float,
        max_records_per_unit: int,
        steps_per_pass: int,
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
        if units.min() < 0 or np.bincount(units).min() == 0:
            raise InputError("unit indices must be dense, 0 .. n_units - 1 with a record each: number the units anew")
        self.n_units = int(units.max()) + 1
        self.sampling_rate = float(sampling_rate)
        self.max_records_per_unit = int(max_records_per_unit)
        self.steps_per_pass = int(steps_per_pass)
        self._rows = np.argsort(units, kind="stable")  # record rows, unit by unit
        self._starts = np.searchsorted(units[self._rows], np.arange(self.n_units + 1))
        # SeedSequence(None) reads OS entropy
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def __len__(self) -> int:
        """Number of draws in one pass."""
        return self.steps_per_pass

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps_per_pass):
            yield self.draw()

    def draw(self) -> list[int]:
        """One Poisson draw: record indices, unit by unit; [] when no unit was drawn."""
        drawn = np.flatnonzero(self._rng.random(self.n_units) < self.sampling_rate)
        return [int(row) for unit in drawn for row in self._records_of(int(unit))]

    def _records_of(self, unit: int) -> np.ndarray:
        rows = self._rows[self._starts[unit] : self._starts[unit + 1]]
        if len(rows) <= self.max_records_per_unit:
            return rows
        return self._rng.choice(rows, size=self.max_records_per_unit, replace=False, shuffle=False)

    def __reduce_ex__(self, protocol: object) -> str | tuple:
        raise PrivacyError(
            "a Poisson sampler cannot be copied or saved, the copy would repeat its draws: make a new one"
        )


def cut_micro_batches(
    records: Sequence[int], *, units: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Cut one draw into micro-batches that fit in memory.

    Args:
        records: the draw: record indices, or positions in it.
        units: the unit of each of `records`, in the same order.
        lengths: the length of each of `records` in tokens, in the same order.
        max_tokens: padded size (rows x longest record) of a micro-batch, >= 1.

    Returns: the elements of `records`, longest units first (so that memory runs out at once, or not at all).
    Guarantee: each record is in exactly one micro-batch, and all records of a unit are in the same one: a unit in two
        would be clipped twice, with sensitivity 2C. The order within a step does not touch the sum: no privacy cost.
    Edge cases: [] gives []; a unit that is larger than `max_tokens` on its own gets a micro-batch of its own.
    Raises: InputError if max_tokens < 1; ValueError if the three sequences differ in length.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}: set it to what the device's memory holds")
    by_unit: dict[int, list[tuple[int, int]]] = {}
    for record, unit, length in zip(records, units, lengths, strict=True):
        by_unit.setdefault(unit, []).append((record, length))
    longest = {unit: max(length for _, length in rows) for unit, rows in by_unit.items()}

    batches: list[list[int]] = []
    width = 0  # of the open micro-batch: its first unit has the longest record
    for unit in sorted(by_unit, key=lambda unit: (-longest[unit], unit)):
        rows = [record for record, _ in by_unit[unit]]
        if batches and (len(batches[-1]) + len(rows)) * width <= max_tokens:
            batches[-1].extend(rows)
        else:
            batches.append(rows)
            width = longest[unit]
    return batches
