"""Presidio's pattern recognisers beside our own: an extra (`pip install 'dpmed[presidio]'`), offline.

The engine is a blank spaCy pipeline, which cuts words and knows no names: no model is needed or fetched. Presidio's
recognisers of email and web addresses are left out, since they look up a list of domains on the network and ours find
both; so is the one that asks the (blank) entity model.
"""

from __future__ import annotations

import importlib
from typing import Any

from dpmed.data.identifier_types import canonical_type
from dpmed.data.identifiers import Span, resolved_spans
from dpmed.errors import InputError

LEAST_SCORE = 0.4
"""Presidio's own score, below which it is guessing: any nine digits are a "bank number" at 0.05."""

_LEFT_OUT = ("EmailRecognizer", "UrlRecognizer", "SpacyRecognizer")


class PresidioPatterns:
    """Presidio's recognisers for English, ready to search texts.

    Raises: InputError if the extra is not installed.
    """

    def __init__(self) -> None:
        try:  # by name: the extra is none of dpmed's dependencies
            spacy: Any = importlib.import_module("spacy")
            analyzer: Any = importlib.import_module("presidio_analyzer")
            engines: Any = importlib.import_module("presidio_analyzer.nlp_engine")
        except ImportError:
            raise InputError(
                "Presidio is not installed: pip install 'dpmed[presidio]', or leave its patterns out"
            ) from None
        engine = engines.SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "blank"}])
        engine.nlp = {"en": spacy.blank("en")}
        registry = analyzer.RecognizerRegistry()
        registry.load_predefined_recognizers(languages=["en"])
        for name in _LEFT_OUT:
            registry.remove_recognizer(name)
        self._analyzer = analyzer.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def spans(self, text: str) -> list[Span]:
        """What Presidio finds in a text, as spans of source "pattern", sorted, none overlapping."""
        found = self._analyzer.analyze(text, language="en", score_threshold=LEAST_SCORE)
        found.sort(key=lambda result: -result.score)  # of equal length, the surer one names the type
        spans: list[Span] = [
            {"start": one.start, "end": one.end, "type": canonical_type(one.entity_type), "source": "pattern"}
            for one in found
        ]
        return resolved_spans(text, spans)
