"""Identifier extraction as rates: by type, and over all of a patient's own identifiers.

The headline counts identifiers that are known to be one: planted ones, and spans that came with the records. What a
pattern found may be none, and a rare word (indirect) is one only together with others; both are reported apart.
"""

from __future__ import annotations

import numpy as np

from dpmed.memorization.extraction import Figure, IdentifierHits
from dpmed.memorization.intervals import NotApplicable, rate_by_unit

DIRECT = ("planted", "known")
"""Sources of identifiers that count in the headline."""


def identifier_figures(hits: IdentifierHits, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, object]:
    """Share of identifiers that the model completes exactly.

    Returns: `identifier_extraction_rate` and `identifier_extraction` {type: rate} over planted and known identifiers;
    `identifier_extraction_pattern` and `identifier_extraction_indirect` for the two other sources.
    Reference: the causal counterpart of arXiv 2501.02407's fill-mask accuracy on identifiers.
    """

    def rate(chosen: np.ndarray, reason: str) -> Figure:
        if not chosen.any():
            return NotApplicable(reason)
        return rate_by_unit(hits.hit[chosen], hits.unit[chosen], "worse", bootstrap, seed)

    direct = np.isin(hits.source, DIRECT)
    types = np.unique(hits.type[direct]).tolist()
    return {
        "identifier_extraction_rate": rate(direct, "no known identifier in the records; name data.identifiers"),
        "identifier_extraction": {name: rate(direct & (hits.type == name), "") for name in types},
        "identifier_extraction_pattern": rate(hits.source == "pattern", "no identifier was found by a pattern"),
        "identifier_extraction_indirect": rate(
            hits.source == "indirect", "no indirect identifier was tagged; set evaluation.k"
        ),
    }


def identifier_counts(hits: IdentifierHits) -> dict[str, int]:
    """How many identifiers were scored, and how many were not and why."""
    return {
        "n_identifiers": len(hits.hit),
        "n_identifiers_not_evaluable": hits.n_not_evaluable,
        "n_identifier_pieces_cut": hits.n_cut,
    }
