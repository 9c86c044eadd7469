"""Progress on stderr: a bar on a terminal, else a plain line now and then. Never text from records."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SECONDS = 10.0  # no two lines closer than this
_LONG_SECONDS = 60.0  # after so long, a line even without a tenth of the way
_SHARE = 0.1

_active: RichProgress | None = None
"""The bars on screen: a bar within a bar joins them, since two live displays would overwrite each other."""


class Progress(Protocol):
    """What `progress` gives. Call one of these after each piece of work."""

    def advance(self, n: float = 1) -> None:
        """Count `n` more."""

    def update(self, done: float, total: float) -> None:
        """Say how much of how much is done, where the callee knows the total; also moves to a new total."""

    def update_stage(self, stage: str, done: float, total: float) -> None:
        """The same for work in several stages; `stage` is a fixed word."""


class PlainProgress:
    """Lines such as `evaluate: 30 of 100 (30 %), 12 s`, rare enough for a log file."""

    def __init__(
        self, description: str, total: float, *, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._stage, self._total = description, "", total
        self._stream, self._clock = stream, clock
        self._done = self._shown_done = 0.0
        self._start = self._shown_at = clock()

    def advance(self, n: float = 1) -> None:
        self.update_stage(self._stage, self._done + n, self._total)

    def update(self, done: float, total: float) -> None:
        self.update_stage(self._stage, done, total)

    def update_stage(self, stage: str, done: float, total: float) -> None:
        """Write a line if the last is long enough ago."""
        self._stage, self._done, self._total = stage, done, total
        waited = self._clock() - self._shown_at
        far = abs(done - self._shown_done) >= _SHARE * total  # a new stage starts again at 0
        if waited >= _LONG_SECONDS or (waited >= _SECONDS and far):
            self._write()

    def close(self) -> None:
        """Write a last line, unless the work was too short for any, or the last line said it all."""
        if self._clock() - self._start >= _SECONDS and self._done != self._shown_done:
            self._write()

    def _write(self) -> None:
        name = f"{self._name}, {self._stage}" if self._stage else self._name
        share = f" of {self._total:g} ({100 * self._done / self._total:.0f} %)" if self._total > 0 else ""
        print(f"{name}: {self._done:g}{share}, {self._clock() - self._start:.0f} s", file=self._stream, flush=True)
        self._shown_done, self._shown_at = self._done, self._clock()


class _Bar:
    def __init__(self, bars: RichProgress, description: str, total: float) -> None:
        from rich.markup import escape

        self._bars, self._name = bars, escape(description)
        self.task = bars.add_task(self._name, total=total or None)

    def advance(self, n: float = 1) -> None:
        self._bars.advance(self.task, n)

    def update(self, done: float, total: float) -> None:
        self._bars.update(self.task, completed=done, total=total)

    def update_stage(self, stage: str, done: float, total: float) -> None:
        self._bars.update(self.task, completed=done, total=total, description=f"{self._name}, {stage}")


@contextmanager
def progress(description: str, total: float) -> Iterator[Progress]:
    """Show how far a piece of work is: `with progress("train", n_steps) as bar: ...; bar.advance()`.

    Args:
        description: a fixed phrase, with names of methods or splits at most.
        total: in any unit; 0 means unknown.

    Guarantee: writes to stderr only; on anything but a terminal at most one line per 10 s, none for shorter work.
    """
    if not sys.stderr.isatty():
        plain = PlainProgress(description, total, stream=sys.stderr)
        yield plain
        plain.close()
        return
    with _bars() as bars:
        bar = _Bar(bars, description, total)
        try:
            yield bar
        finally:
            bars.remove_task(bar.task)


@contextmanager
def _bars() -> Iterator[RichProgress]:
    """The bars on screen, or new ones that vanish with the outermost piece of work."""
    global _active
    if _active is not None:
        yield _active
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    with RichProgress(console=Console(stderr=True), transient=True) as bars:
        _active = bars
        try:
            yield bars
        finally:
            _active = None
