"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    name: str
    file: str
    """Path in the repository."""
    old: str
    """Exact text, which the file has once."""
    new: str
    why: str
    """How it breaks the guarantee."""
    tests: tuple[str, ...]
    """Node ids; each of them must fail, or one of its variants where the id names no variant."""
    also: tuple[tuple[str, str], ...] = ()
    """Further (old, new) in the same file, where a second line of defence would stop the fault."""

    @property
    def edits(self) -> tuple[tuple[str, str], ...]:
        return ((self.old, self.new), *self.also)
