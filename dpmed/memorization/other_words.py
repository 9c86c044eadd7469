"""What the model is good for: how well it predicts held-out words that are in no identifier.

A model that has learned identifiers by heart is no better at the medicine of other patients, and one that has forgotten
them should be no worse. Perplexity over all words mixes both: a model is punished for each held-out identifier that it
does not know, which is as it should be. (Utility as accuracy on the other words: arXiv 2501.02407.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dpmed.data.tasks import EncodedRecords, TaskSpec, TokenSpan
from dpmed.memorization.extraction import Figure
from dpmed.memorization.fill_mask import NO_OTHER_WORD, masked_words
from dpmed.memorization.intervals import Measure, NotApplicable, bootstrap_ratio, dense_units, rate_by_unit
from dpmed.memorization.statistics import TokenScores, record_units, text_starts


def other_tokens(encoded: EncodedRecords, spec: TaskSpec) -> np.ndarray:
    """Which text tokens are in no identifier of any source, bool [t].

    Of a masked_lm, words of which a part was masked together with an identifier do not count either.
    """
    if spec.kind == "masked_lm":
        return masked_words(encoded).is_other
    return ~span_tokens(encoded, lambda span: True)


def span_tokens(encoded: EncodedRecords, counts: Callable[[TokenSpan], bool]) -> np.ndarray:
    """Which text tokens are in a span that counts, bool [t]."""
    starts, total = text_starts(encoded)
    found = np.zeros(total, dtype=bool)
    for example, start in zip(encoded, starts, strict=True):
        for span in filter(counts, example.spans):
            found[start + span.start - example.text_start : start + span.end - example.text_start] = True
    return found


def other_word_figures(
    scores: TokenScores, encoded: EncodedRecords, spec: TaskSpec, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Accuracy and perplexity on the tokens in no identifier.

    Args:
        scores: of the records, from one pass.
        encoded: the records that were scored.
        spec: the task.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: `other_words_accuracy`, the share of these tokens that are the model's first choice, and
    `other_words_perplexity`, exp of their mean negative log-likelihood; n counts tokens.
    """
    chosen = other_tokens(encoded, spec) & scores.scored
    if not chosen.any():
        return dict.fromkeys(("other_words_accuracy", "other_words_perplexity"), NotApplicable(NO_OTHER_WORD))
    units = record_units(encoded)[scores.record]
    loss = -scores.log_prob[chosen].astype(np.float64)
    bounds = bootstrap_ratio(loss, np.ones(len(loss)), units[chosen], bootstrap, seed)
    if dense_units(units[chosen])[1] < 2:
        bounds = (math.nan, math.nan)  # one patient tells nothing about another
    value, low, high = np.exp(np.minimum([loss.mean(), *bounds], 700.0))  # exp(710) overflows
    return {
        "other_words_accuracy": rate_by_unit(scores.is_argmax[chosen], units[chosen], "better", bootstrap, seed),
        "other_words_perplexity": Measure(float(value), float(low), float(high), len(loss), "worse"),
    }
