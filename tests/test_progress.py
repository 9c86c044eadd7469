"""Progress: plain lines are rare and say how far; on a terminal bars share one display."""

from __future__ import annotations

import io
import sys

import pytest

from dpmed import progress as module
from dpmed.progress import PlainProgress, progress


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(seconds_per_step: float, *, total: int = 100) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    plain = PlainProgress("train", total, stream=stream, clock=clock)
    for _ in range(total):
        clock.now += seconds_per_step
        plain.advance()
    plain.close()
    return stream.getvalue().splitlines()


def test_short_work_is_silent() -> None:
    assert run(0.09) == []


def test_a_line_needs_ten_seconds_and_a_tenth_of_the_way() -> None:
    lines = run(0.25)
    assert lines == [
        "train: 40 of 100 (40 %), 10 s",
        "train: 80 of 100 (80 %), 20 s",
        "train: 100 of 100 (100 %), 25 s",
    ]
    assert len(run(2.0)) == 10


def test_long_work_reports_every_minute() -> None:
    assert run(30.0, total=10_000)[:2] == ["train: 2 of 10000 (0 %), 60 s", "train: 4 of 10000 (0 %), 120 s"]


def test_stages_and_totals_known_later() -> None:
    stream, clock = io.StringIO(), Clock()
    plain = PlainProgress("evaluate", 0, stream=stream, clock=clock)
    clock.now = 11
    plain.update_stage("train", 50, 200)
    clock.now = 22
    plain.update(10, 40)
    plain.close()
    assert stream.getvalue() == "evaluate, train: 50 of 200 (25 %), 11 s\nevaluate, train: 10 of 40 (25 %), 22 s\n"


def test_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 2) as bar:
        bar.advance()
        bar.update(2, 2)
        bar.update_stage("stage", 1, 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_bars_nest_in_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("outer [red]", 2) as outer:
        display = module._active
        assert display is not None
        with progress("inner", 3) as inner:
            assert module._active is display
            inner.advance(2)
            outer.update(1, 2)
            assert [(task.completed, task.total) for task in display.tasks] == [(1, 2), (2, 3)]
            inner.update_stage("second", 0, 9)
            assert display.tasks[1].description == "inner, second"
        assert len(display.tasks) == 1
    assert module._active is None


def test_an_exception_closes_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError, match="planned"), progress("work", 1):
        raise ValueError("planned")
    assert module._active is None
