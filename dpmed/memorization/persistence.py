"""What was memorised before a second fine-tuning and still is after it.

Two evaluations of the same records are compared from files, so the models need not be there at the same time. Our
definition: persistence = |before and after| / |before|, with the same records, prompts and lengths. arXiv 2509.08604
reports such a share without its formula.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dpmed.data.tasks import EncodedRecords
from dpmed.errors import InputError
from dpmed.memorization.extraction import greedy_extraction, identifier_extraction
from dpmed.memorization.intervals import Measure, NotApplicable, rate_by_unit
from dpmed.memorization.kinds import KINDS, MemorizedSpans, SpanKinds
from dpmed.memorization.leakage import DIRECT
from dpmed.memorization.statistics import TokenScores, record_units
from dpmed.runs import write_private

MEMORIZED_FILE = "memorized.safetensors"
"""Name of the file in an evaluation's folder."""
_VERSION = "1"
_ARRAYS = ("units", "offsets", "eligible", "extracted", "identifier_record", "identifier_direct", "identifier_hit")
_ARRAYS += ("span_start", "span_end", "span_kind")
NO_KIND = -1


@dataclass(frozen=True)
class MemorizedSet:
    """Which records, identifiers and tokens of one side a model has memorised: flags and positions, no text.

    Private all the same: with the records beside it, it says what can be extracted of whom.

    Shapes: r = records, c = pairs of lengths, i = identifiers, s = memorised spans.
    """

    fingerprint: str
    """Of the records as token ids, with their units, windows and identifiers; not of the model."""
    pairs: tuple[tuple[int, int], ...]
    """(prefix tokens, suffix tokens) of each pair, c of them."""
    min_tokens: int
    """The fewest tokens of a memorised span."""
    k: int | None
    """Of the rule behind the kinds; None where spans have no kind."""
    units: np.ndarray
    """Dense unit index of each record, int64 [r]."""
    offsets: np.ndarray
    """Text tokens of record j are offsets[j]:offsets[j + 1], int64 [r + 1]."""
    eligible: np.ndarray
    """Whether a record is long enough for a pair, bool [c, r]."""
    extracted: np.ndarray
    """Whether greedy decoding extracts it, bool [c, r]."""
    identifier_record: np.ndarray
    """Record of each identifier that could be scored, int64 [i]."""
    identifier_direct: np.ndarray
    """Whether it is surely one (planted or known), bool [i]."""
    identifier_hit: np.ndarray
    """Whether the model completes it, bool [i]."""
    span_start: np.ndarray
    """First token of each memorised span, int64 [s]."""
    span_end: np.ndarray
    """One behind its last token, int64 [s]."""
    span_kind: np.ndarray
    """Index into `KINDS`, or -1, int8 [s]."""

    @classmethod
    def of(
        cls,
        scores: TokenScores,
        encoded: EncodedRecords,
        spans: MemorizedSpans,
        *,
        pairs: Sequence[tuple[int, int]],
        kinds: SpanKinds | None = None,
        k: int | None = None,
    ) -> MemorizedSet:
        """Collect what one evaluation of one side found.

        Args:
            scores: of a causal language model.
            encoded: the records that were scored.
            spans: from `memorized_spans`.
            pairs: (p, n) of greedy extraction.
            kinds: from `span_kinds`, if asked for.
            k: what `span_kinds` was given.
        """
        hits = identifier_extraction(scores, encoded)
        found = [greedy_extraction(scores, p, n) for p, n in pairs]
        n_records = encoded.n_records
        return cls(
            fingerprint=records_fingerprint(encoded),
            pairs=tuple((int(p), int(n)) for p, n in pairs),
            min_tokens=spans.min_tokens,
            k=None if kinds is None else k,
            units=record_units(encoded),
            offsets=np.asarray(scores.offsets, dtype=np.int64),
            eligible=np.array([e for e, _ in found], dtype=bool).reshape(len(found), n_records),
            extracted=np.array([x for _, x in found], dtype=bool).reshape(len(found), n_records),
            identifier_record=hits.record,
            identifier_direct=np.isin(hits.source, DIRECT),
            identifier_hit=hits.hit,
            span_start=spans.start,
            span_end=spans.end,
            span_kind=np.full(len(spans.start), NO_KIND, dtype=np.int8) if kinds is None else kinds.kind,
        )

    def save(self, path: Path) -> None:
        """Write to a safetensors file that only its owner can read, at once or not at all."""
        about = {"pairs": self.pairs, "min_tokens": self.min_tokens, "k": self.k, "kinds": KINDS}
        metadata = {"version": _VERSION, "fingerprint": self.fingerprint, "settings": json.dumps(about)}
        data = save({name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}, metadata)
        write_private(path, data)

    @classmethod
    def load(cls, path: Path) -> MemorizedSet:
        """Read what `save` wrote.

        Raises: InputError if the file is missing, damaged or of another version.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; evaluate that model again, with the same records, to compare with it")
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("version") != _VERSION:
                    raise InputError(f"{path} is of another version of dpmed; evaluate that model again")
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            settings = json.loads(about["settings"])
            pairs = tuple((int(p), int(n)) for p, n in settings["pairs"])
            return cls(about["fingerprint"], pairs, settings["min_tokens"], settings["k"], **arrays)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise InputError(f"{path} cannot be read ({kind}); evaluate that model again") from None

    def token_flags(self, kind: int | None = None) -> np.ndarray:
        """Which text tokens stand in a memorised span (of one kind), bool [t]."""
        chosen = np.ones(len(self.span_start), dtype=bool) if kind is None else self.span_kind == kind
        steps = np.zeros(int(self.offsets[-1]) + 1, dtype=np.int64)
        np.add.at(steps, self.span_start[chosen], 1)
        np.add.at(steps, self.span_end[chosen], -1)
        return np.cumsum(steps[:-1]) > 0


def records_fingerprint(encoded: EncodedRecords) -> str:
    """A hash of the records as they were scored: token ids, windows, units and identifiers. No model is in it."""
    digest = hashlib.sha256(f"{_VERSION} {encoded.n_records}".encode())
    for e in encoded:
        at = [e.record, e.unit, e.window, e.text_start, e.text_end, len(e.input_ids), *e.input_ids, len(e.spans)]
        digest.update(np.array(at + [edge for s in e.spans for edge in (s.start, s.end, int(s.whole))]).tobytes())
        digest.update(json.dumps([(s.type, s.source) for s in e.spans]).encode())
    return digest.hexdigest()


def persistence_figures(
    before: MemorizedSet, after: MemorizedSet, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How much of what the first model memorised the second still has, on the same records.

    Args:
        before: of the first model.
        after: of the model that was trained on from it.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: {"extraction": {"p50_n50": ...}, "identifiers": ..., "tokens": ..., "tokens_by_kind": {kind: ...}}, each
    {"persistence", "newly_memorized_rate", "n_cases", "n_before", "n_after", "n_both", "n_new", "n_forgotten"}. Cases
    are records, identifiers or text tokens; `tokens` are those in memorised spans. By kind: those of the first model's
    spans of that kind, against all memorised tokens of the second; so nothing is new there. Intervals are over units.
    Raises: InputError if the two are of other records, tokenizers or settings.
    """
    check_comparable(before, after)
    figures: dict[str, Any] = {"extraction": {}}
    for c, (p, n) in enumerate(before.pairs):
        at = before.eligible[c]
        figures["extraction"][f"p{p}_n{n}"] = _overlap(
            before.extracted[c][at], after.extracted[c][at], before.units[at], bootstrap, seed
        )
    direct = before.identifier_direct
    figures["identifiers"] = _overlap(
        before.identifier_hit[direct],
        after.identifier_hit[direct],
        before.units[before.identifier_record[direct]],
        bootstrap,
        seed,
    )
    units = np.repeat(before.units, np.diff(before.offsets))
    still = after.token_flags()
    figures["tokens"] = _overlap(before.token_flags(), still, units, bootstrap, seed)
    if before.k is None:
        figures["tokens_by_kind"] = NotApplicable("the evaluation before gave its memorised spans no kinds")
        return figures
    figures["tokens_by_kind"] = {}
    for code, name in enumerate(KINDS):
        flags = before.token_flags(code)
        figures["tokens_by_kind"][name] = _overlap(flags[flags], still[flags], units[flags], bootstrap, seed)
    return figures


def check_comparable(before: MemorizedSet, after: MemorizedSet) -> None:
    """Refuse to compare evaluations that did not ask the same.

    Raises: InputError, in one line, naming what differs.
    """
    if len(before.units) != len(after.units):
        reason = f"has {len(before.units)} records, this one {len(after.units)}"
    elif not np.array_equal(before.offsets, after.offsets):
        reason = "has other token counts: other records, another tokenizer, or another data.max_length"
    elif before.fingerprint != after.fingerprint:
        reason = "has other token ids, patients or identifiers: other records, or another tokenizer"
    elif before.pairs != after.pairs:
        reason = "used other evaluation.prefix_tokens or suffix_tokens"
    elif before.min_tokens != after.min_tokens:
        reason = f"counts spans of {before.min_tokens} tokens as memorised, this one of {after.min_tokens}"
    elif before.k is not None and after.k is not None and before.k != after.k:
        reason = f"counts text of {before.k} other patients as uninformative, this one of {after.k}"
    else:
        return
    raise InputError(f"the evaluation before {reason}; evaluate both models on the same records with the same settings")


def _overlap(before: np.ndarray, after: np.ndarray, units: np.ndarray, bootstrap: int, seed: int) -> dict[str, Any]:
    """Persistence of flagged cases and its counts."""
    persistence: Measure | NotApplicable = NotApplicable("nothing was memorised before")
    new: Measure | NotApplicable = NotApplicable("everything was memorised before, or there is no case")
    if before.any():
        persistence = rate_by_unit(after[before], units[before], "worse", bootstrap, seed)
    if not before.all():
        new = rate_by_unit(after[~before], units[~before], "worse", bootstrap, seed)
    return {
        "persistence": persistence,
        "newly_memorized_rate": new,
        "n_cases": len(before),
        "n_before": int(before.sum()),
        "n_after": int(after.sum()),
        "n_both": int((before & after).sum()),
        "n_new": int((~before & after).sum()),
        "n_forgotten": int((before & ~after).sum()),
    }
