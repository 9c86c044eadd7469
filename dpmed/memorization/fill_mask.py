"""Fill-mask accuracy of a masked language model, on identifiers and on all other words.

The model should restore the words of medicine and fail at a patient's identifiers. Each word is masked as a whole (an
identifier too, however many words it has), so that no part of it gives away the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dpmed.data.tasks import EncodedRecords, Example, TokenSpan
from dpmed.memorization.extraction import Figure
from dpmed.memorization.intervals import HigherIs, NotApplicable, rate_by_unit
from dpmed.memorization.scoring import mask_groups
from dpmed.memorization.statistics import TokenScores, record_units

IDENTIFIER_SOURCES = ("planted", "known")
"""Only these are known to be identifiers. Words of the other sources count on neither side."""
NO_IDENTIFIER = "no known identifier in the records; name data.identifiers"
NO_OTHER_WORD = "no word outside of identifiers"


@dataclass(frozen=True)
class MaskedWords:
    """What each token is part of.

    Shapes: t = text tokens of all records, in the order of `TokenScores`.
    """

    group: np.ndarray
    """Number of the word, or of the identifier, that was masked together with it, int64 [t]."""
    is_identifier: np.ndarray
    """It was masked with a whole planted or known identifier, bool [t]."""
    is_other: np.ndarray
    """It was masked with no identifier of any source, nor a piece of one, bool [t]."""


def masked_words(encoded: EncodedRecords) -> MaskedWords:
    """The words and identifiers of records that were encoded for masked_lm."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    n_groups = 0
    for example in encoded:
        group = mask_groups(example)
        known = _touched(example, group, (s for s in example.spans if s.source in IDENTIFIER_SOURCES))
        cut = _touched(example, group, (s for s in example.spans if not s.whole))
        found.append((group + n_groups, known & ~cut, ~_touched(example, group, example.spans)))
        n_groups += int(group.max(initial=-1)) + 1
    group, identifier, other = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return MaskedWords(group.astype(np.int64), identifier.astype(bool), other.astype(bool))


def _touched(example: Example, group: np.ndarray, spans: Iterable[TokenSpan]) -> np.ndarray:
    """Tokens of the groups that these spans touch, bool [t]."""
    positions = [at - example.text_start for span in spans for at in range(span.start, span.end)]
    return np.isin(group, group[np.array(positions, dtype=np.int64)])


def fill_mask_figures(
    scores: TokenScores, encoded: EncodedRecords, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Figure | dict[str, Figure]]:
    """Accuracy on identifiers and on other words.

    Args:
        scores: of a masked language model.
        encoded: the records that were scored.

    Returns: `identifiers` and `other_words`, each {`top_1`, `top_5`: share of tokens of which the truth is the first
    choice, or among the first five; `whole`: share of identifiers or words of which every token is the first choice};
    `privacy` = 1 - top_1 on identifiers; `utility` = top_1 on other words.
    Raises: ValueError if the scores hold no ranks.
    Reference: arXiv 2501.02407 (privacy and utility as fill-mask accuracies).
    """
    words = masked_words(encoded)
    unit = record_units(encoded)[scores.record]

    def side(chosen: np.ndarray, reason: str, higher_is: HigherIs) -> dict[str, Figure]:
        if not chosen.any():
            return dict.fromkeys(("top_1", "top_5", "whole"), NotApplicable(reason))
        first, units = scores.is_argmax[chosen], unit[chosen]
        _, start, group = np.unique(words.group[chosen], return_index=True, return_inverse=True)
        whole = np.bincount(group, weights=~first) == 0
        hits = {"top_1": (first, units), "top_5": (scores.detail("rank")[chosen] < 5, units)}
        return {
            name: rate_by_unit(hit, of, higher_is, bootstrap, seed)
            for name, (hit, of) in {**hits, "whole": (whole, units[start])}.items()
        }

    chosen = words.is_identifier & scores.scored
    identifiers = side(chosen, NO_IDENTIFIER, "worse")
    others = side(words.is_other & scores.scored, NO_OTHER_WORD, "better")
    return {
        "identifiers": identifiers,
        "other_words": others,
        "privacy": _complement(identifiers["top_1"]),
        "utility": others["top_1"],
    }


def _complement(figure: Figure) -> Figure:
    """1 - a rate that should be low, which should be high."""
    if isinstance(figure, NotApplicable):
        return figure
    return replace(figure, value=1 - figure.value, low=1 - figure.high, high=1 - figure.low, higher_is="better")
