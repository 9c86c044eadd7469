"""Errors that users see. Every message says what, where, and what to do next; none holds record text."""

from __future__ import annotations

import os
import traceback
from pathlib import Path


class DpmedError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the exit status of the command line."""

    exit_code = 1


class InputError(DpmedError):
    """The user's input cannot be used: a file, a recipe key, a value. Nothing was overwritten."""

    exit_code = 2


class PrivacyError(DpmedError):
    """A guarantee would not hold, so the run stopped. Always a reason to look, never to retry."""

    exit_code = 1


class RefutedError(PrivacyError):
    """An audit shows more than a certificate claims: nothing that rests on the same code can be trusted."""


class BudgetError(DpmedError):
    """A gate or a budget said no."""

    exit_code = 3


class GateError(BudgetError):
    """A checkpoint failed a test of its release; what was found is written beside it."""


def fault_line(error: BaseException) -> str:
    """One line for an exception that nobody foresaw: its type and place, without its message, which may quote a
    record."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parent
    ours = [frame for frame in frames if package in Path(frame.filename).resolve().parents]
    frame = (ours or list(frames))[-1]
    path = Path(frame.filename).resolve()
    place = path.relative_to(package.parent).as_posix() if ours else path.name
    # The number's meaning is the system's text ("No space left on device"), never the caller's.
    reason = f" ({os.strerror(error.errno)})" if isinstance(error, OSError) and error.errno else ""
    return f"internal fault: {type(error).__name__}{reason} at {place}:{frame.lineno}; please report"
