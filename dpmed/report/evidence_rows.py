"""The rows of the release evidence, checked and with their numbers as text.

A row whose verdict does not follow from its numbers is refused: the page must not repeat what was changed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpmed.errors import InputError
from dpmed.evidence import VERDICTS, overall
from dpmed.report import evidence_wording as wording
from dpmed.report.points import finite

AGAIN = "run `dpmed sanitize` again with --resume"


@dataclass(frozen=True)
class EvidenceRow:
    """One row of the evidence, with its numbers as text."""

    stage: str
    stage_name: str
    check: str
    words: wording.CheckWords
    verdict: str
    value: float | None
    low: float | None
    high: float | None
    threshold: float
    n: str
    reason: str
    note: str
    """Which of several attacks or numbers of tries the figure is of; empty for other measures."""

    @property
    def sign(self) -> str:
        return wording.SIGNS[self.verdict]

    @property
    def verdict_words(self) -> str:
        return wording.WORDS[self.verdict]

    @property
    def shown(self) -> str:
        return "" if self.value is None else self._number(self.value, self.words.is_difference) + self._unit

    @property
    def interval(self) -> str:
        """In brackets; a bound that is not finite is `no limit`, and without any this is the reason."""
        bounds = [
            "no limit" if bound is None else self._number(bound, self.words.is_difference)
            for bound in (self.low, self.high)
        ]
        return f"[{', '.join(bounds)}]" if self.has_interval else self.reason or wording.NO_INTERVAL

    @property
    def limit(self) -> str:
        return self._number(self.threshold, False) + self._unit

    @property
    def figure(self) -> str:
        """`+3.1 points [+1.2, +5.0]`, or why there is none."""
        if self.value is None:
            return f"not measured: {self.reason}"
        return f"{self.shown} {self.interval if self.has_interval else f'({self.interval})'}"

    @property
    def has_interval(self) -> bool:
        return {self.low, self.high} != {None}

    @property
    def _unit(self) -> str:
        return wording.unit_text(self.words.unit)

    def _number(self, value: float, signed: bool) -> str:
        digits = wording.digits_for(self.threshold, (self.low, self.high), self.words.unit)
        return wording.figure(value, digits, self.words.unit, signed=signed)


def rows_of(evidence: Mapping[str, Any], where: Path) -> list[EvidenceRow]:
    """All rows, in the order of the stages. Raises: InputError if they are not what a gate writes."""
    parts = [evidence.get("tested"), evidence.get("not_tested")]
    if not all(isinstance(part, list) for part in parts):
        raise InputError(f"{where}: not the evidence of a release gate: tested or not_tested is no list; {AGAIN}")
    rows = [row for part in parts for row in part or []]
    settings = mapping(evidence, "thresholds")
    tests = [_test(row, settings, where) for row in rows]
    if evidence.get("verdict") != overall([{"verdict": test.verdict} for test in tests]):
        raise InputError(f"{where}: the verdict is not the one that its rows give, so it was changed; {AGAIN}")
    stages, checks = list(dict.fromkeys(test.stage for test in tests)), [*wording.CHECKS]
    checks += dict.fromkeys(test.check for test in tests if test.check not in wording.CHECKS)
    return sorted(tests, key=lambda t: (t.stage == "utility", stages.index(t.stage), checks.index(t.check)))


def _test(row: Any, settings: Mapping[str, Any], where: Path) -> EvidenceRow:
    threshold = finite(row.get("threshold")) if isinstance(row, Mapping) else None
    if threshold is None or not all(isinstance(row.get(key), str) for key in ("stage", "check", "verdict")):
        raise InputError(f"{where}: a row has no stage, check, verdict or threshold; {AGAIN}")
    if row["verdict"] not in VERDICTS:
        raise InputError(f"{where}: a row has a verdict that is none of {', '.join(VERDICTS)}; {AGAIN}")
    value, low, high = (finite(row.get(key)) for key in ("value", "low", "high"))
    if not _follows(row["verdict"], value, low, high, threshold):
        raise InputError(f"{where}: a row's verdict is not the one that its numbers give, so it was changed; {AGAIN}")
    stage, check, n = row["stage"], row["check"], finite(row.get("n"))
    return EvidenceRow(
        stage=stage,
        stage_name=wording.stage_words(stage, settings)[0],
        check=check,
        words=wording.check_words(check),
        verdict=row["verdict"],
        value=value,
        low=low,
        high=high,
        threshold=threshold,
        n="not recorded" if n is None else f"{n:.0f}",
        reason=str(row.get("reason") or ("no reason recorded" if value is None else "")),
        note=_note(row),
    )


def _note(row: Mapping[str, Any]) -> str:
    attack, n_attacks, tries = row.get("attack"), finite(row.get("n_attacks")), row.get("tries")
    if isinstance(attack, str) and n_attacks is not None:
        return f"strongest of {n_attacks:.0f} attacks: {attack.replace('_', ' ')}"
    found = re.fullmatch(r"n(\d+)_p(\d*\.?\d+)", tries) if isinstance(tries, str) else None
    return f"{found[1]} tries, with a probability of at least {found[2]}" if found else ""


def _follows(verdict: str, value: float | None, low: float | None, high: float | None, threshold: float) -> bool:
    """Whether a verdict is what the gate's rule gives for these numbers."""
    if value is None or verdict == "not_tested":
        return value is None and verdict == "not_tested"
    if high is not None and high <= threshold:
        return verdict == "pass"
    return verdict == ("fail" if low is not None and low > threshold else "not_shown")


def mapping(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What stands under `key` if it is a mapping, else an empty one."""
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}
