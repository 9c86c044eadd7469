"""Presidio's recognisers, where the extra is installed: offline, and only what it is sure of."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from dpmed.data.presidio import PresidioPatterns
from dpmed.errors import InputError


@pytest.fixture(scope="module")
def presidio() -> PresidioPatterns:
    pytest.importorskip("presidio_analyzer", reason="pip install 'dpmed[presidio]'")
    return PresidioPatterns()  # sockets are disabled in tests: a look-up on the network would fail here


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("paid by 4111 1111 1111 1111.", [("ACCOUNT", "4111 1111 1111 1111")]),
        ("SSN 219-09-9999", [("SSN", "219-09-9999")]),
        ("from 192.0.2.17 again", [("IP", "192.0.2.17")]),
        ("call 415-555-0142", [("PHONE", "415-555-0142")]),
        ("on 03/04/2021, again on 03/05/2021", [("DATE", "03/04/2021"), ("DATE", "03/05/2021")]),
        ("number 123456789 and John Smith in Boston", []),
        ("to a@example.org, www.example.org", []),
        ("", []),
    ],
)
def test_finds(presidio: PresidioPatterns, text: str, expected: list[tuple[str, str]]) -> None:
    spans = presidio.spans(text)
    assert [(span["type"], text[span["start"] : span["end"]]) for span in spans] == expected
    assert {span["source"] for span in spans} <= {"pattern"}


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "presidio_analyzer", missing)
    with pytest.raises(InputError, match=r"pip install 'dpmed\[presidio\]'"):
        PresidioPatterns()
