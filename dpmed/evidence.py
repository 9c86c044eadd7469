"""What `evidence.json` is called, how its verdicts add up, and what no gate can show.

The gate makes the evidence and the report shows it; both hold to what stands here, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""{"stage", "check", "verdict", "threshold", "value", "low", "high", "n", "reason"}; numbers null if not measured."""
EVIDENCE = "evidence.json"
EVIDENCE_PAGE = "evidence.html"
VERDICTS = {
    "pass": "the upper limit of the 95 % interval is within the threshold",
    "fail": "the lower limit exceeds the threshold",
    "not_shown": "neither: too few patients to tell. It is not a pass",
    "not_tested": "it could not be measured; the reason stands beside it",
}
"""The verdicts on a test, with their rules."""
CANNOT_SHOW = (
    "Rounding simulates weight-only quantisation: symmetric, nearest, per output channel (8 bits) or per 64 inputs "
    "(4 bits). Rounded activations, calibrated rounding (GPTQ, AWQ) and other grids (NF4) are not simulated.",
    "The relearning attack trains all weights for `release.relearn_steps` steps. A longer attack may bring back more.",
    "Paraphrased prompts are not made: `not_tested`.",
    "Rare words are measured on held-out records, where a loss is damage. On training records it would be the aim.",
    "The strongest membership attack is chosen by its own value, which errs upwards.",
    "A loss of F1 that is the same in every resample shows nothing: `not_shown`.",
    "The intervals are of single tests: with many tests, one may fail by chance.",
    "A test is an attack that was tried. One that was not tried may find more, and no test is a guarantee.",
)
"""Limits of every gate, also those of docs/release.md."""


def overall(rows: Sequence[Row]) -> str:
    """fail if a test failed; pass if some were made and all passed; else not_shown."""
    verdicts = {row["verdict"] for row in rows}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts - {"not_tested"} == {"pass"} else "not_shown"
