from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.intervals import Measure, NotApplicable, figures_json, wilson
from dpmed.memorization.kinds import KINDS, memorized_spans, span_kinds
from dpmed.memorization.persistence import MemorizedSet, persistence_figures, records_fingerprint
from dpmed.memorization.scoring import score_records
from dpmed.memorization.statistics import TokenScores

SPEC = TaskSpec(max_length=64)
PAIRS = [(2, 3), (1, 4)]
SECRET = "Zebulon"


def dataset(units: Sequence[str] = ("a", "b", "b", "c"), first: str = "The lungs are clear on day 7.") -> Dataset:
    name = {"start": 8, "end": 15, "type": "NAME", "source": "known"}
    guess = {"start": 16, "end": 19, "type": "DATE", "source": "pattern"}
    texts = [first, f"Patient {SECRET} has a cough.", f"Patient {SECRET} was seen.", "No acute abnormality."]
    spans = [[], [name], [guess, name], []]
    return Dataset.from_dict({"text": texts, "unit": list(units), "record_id": list("0123"), "identifiers": spans})


@pytest.fixture(scope="module")
def encoded(tiny_tokenizer) -> EncodedRecords:
    return encode(dataset(), tiny_tokenizer, SPEC)


def scores_of(encoded: EncodedRecords, right: np.ndarray) -> TokenScores:
    lengths = [e.text_end - e.text_start for e in encoded]  # one window a record
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    log_prob = np.full(offsets[-1], -1.0, dtype=np.float32)
    log_prob[offsets[:-1]] = np.nan  # nothing stands before the first token
    return TokenScores(
        record=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        log_prob=log_prob,
        is_argmax=right & np.isfinite(log_prob),
        offsets=offsets,
        first_window=np.array(lengths, dtype=np.int32),
    )


def n_tokens(encoded: EncodedRecords) -> int:
    return sum(e.text_end - e.text_start for e in encoded)


def collected(
    encoded: EncodedRecords, right: np.ndarray, *, min_tokens: int = 3, k: int | None = 1, pairs=PAIRS
) -> MemorizedSet:
    scores = scores_of(encoded, right)
    spans = memorized_spans(scores, encoded, min_tokens=min_tokens)
    kinds = None if k is None else span_kinds(spans, encoded, k=k)
    return MemorizedSet.of(scores, encoded, spans, pairs=pairs, kinds=kinds, k=k)


def random_flags(encoded: EncodedRecords, seed: int, share: float = 0.8) -> np.ndarray:
    return np.random.default_rng(seed).random(n_tokens(encoded)) < share


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_figures_equal_sets_of_cases(encoded: EncodedRecords, first: int, second: int) -> None:
    flags = [random_flags(encoded, seed) for seed in (first, second)]
    before, after = (collected(encoded, right) for right in flags)
    figures = persistence_figures(before, after, bootstrap=20)
    for c, (p, n) in enumerate(PAIRS):
        _same_as_sets(figures["extraction"][f"p{p}_n{n}"], before.extracted[c], after.extracted[c], before.eligible[c])
    direct = before.identifier_direct
    _same_as_sets(figures["identifiers"], before.identifier_hit, after.identifier_hit, direct)
    every = np.ones(n_tokens(encoded), dtype=bool)
    _same_as_sets(figures["tokens"], _slow_tokens(before), _slow_tokens(after), every)
    by_kind = figures["tokens_by_kind"]
    for key in ("n_before", "n_both", "n_forgotten"):
        assert sum(by_kind[name][key] for name in KINDS) == figures["tokens"][key]
    assert all(by_kind[name]["n_new"] == 0 for name in KINDS)


def _slow_tokens(one: MemorizedSet) -> np.ndarray:
    spans = list(zip(one.span_start, one.span_end, strict=True))
    return np.array([any(a <= t < b for a, b in spans) for t in range(one.offsets[-1])], dtype=bool)


def _same_as_sets(figure: dict, before: np.ndarray, after: np.ndarray, among: np.ndarray) -> None:
    first, second = (set(np.flatnonzero(flags & among).tolist()) for flags in (before, after))
    counts = (len(first), len(second), len(first & second), len(second - first), len(first - second))
    assert tuple(figure[f"n_{key}"] for key in ("before", "after", "both", "new", "forgotten")) == counts
    assert figure["n_cases"] == among.sum()
    if first:
        assert figure["persistence"].value == pytest.approx(len(first & second) / len(first))
        assert figure["persistence"].n == len(first)
        assert figure["persistence"].higher_is == "worse"
    else:
        assert isinstance(figure["persistence"], NotApplicable)


def test_the_same_evaluation_persists_fully(encoded: EncodedRecords) -> None:
    one = collected(encoded, np.ones(n_tokens(encoded), dtype=bool))
    figures = persistence_figures(one, one)
    found = figures["extraction"]["p2_n3"]
    assert (found["persistence"].value, found["n_new"], found["n_forgotten"]) == (1.0, 0, 0)
    assert isinstance(found["newly_memorized_rate"], NotApplicable)
    rate = figures["identifiers"]["persistence"]
    assert (rate.value, rate.low, rate.high, rate.n) == (1.0, *wilson(1, 1), 2)  # two identifiers of one patient
    assert figures["identifiers"]["n_cases"] == 2  # what a pattern found is none for sure
    tree, reasons = figures_json(figures)
    assert tree["tokens"]["persistence"]["value"] == 1.0
    assert "extraction.p2_n3.newly_memorized_rate" in reasons


def test_intervals_are_wilsons_where_each_patient_has_one_record(tiny_tokenizer) -> None:
    encoded = encode(dataset(units="abcd"), tiny_tokenizer, SPEC)
    right = np.ones(n_tokens(encoded), dtype=bool)
    less = right.copy()
    less[: len(encoded[0].input_ids)] = False  # the first record is forgotten
    found = persistence_figures(collected(encoded, right), collected(encoded, less))["extraction"]["p2_n3"]
    rate = found["persistence"]
    assert isinstance(rate, Measure)
    assert (rate.value, rate.low, rate.high, rate.n) == (0.75, *wilson(3, 4), 4)


def test_nothing_memorised_before_has_no_persistence(encoded: EncodedRecords) -> None:
    nothing = collected(encoded, np.zeros(n_tokens(encoded), dtype=bool))
    all_of_it = collected(encoded, np.ones(n_tokens(encoded), dtype=bool))
    figures = persistence_figures(nothing, all_of_it)
    for figure in (figures["extraction"]["p2_n3"], figures["identifiers"], figures["tokens"]):
        assert isinstance(figure["persistence"], NotApplicable)
        assert figure["newly_memorized_rate"].value > 0.8
    assert isinstance(figures["tokens_by_kind"]["harmful"]["persistence"], NotApplicable)


def test_without_kinds_the_rest_is_compared(encoded: EncodedRecords) -> None:
    plain = collected(encoded, random_flags(encoded, 1), k=None)
    figures = persistence_figures(plain, collected(encoded, random_flags(encoded, 2)))
    assert isinstance(figures["tokens_by_kind"], NotApplicable)
    assert figures["tokens"]["n_before"] > 0
    other_way = persistence_figures(collected(encoded, random_flags(encoded, 2)), plain)
    assert set(other_way["tokens_by_kind"]) == set(KINDS)


@pytest.mark.parametrize("k", [1, None])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_a_file_gives_back_what_was_saved(encoded: EncodedRecords, tmp_path: Path, k: int | None, share: float) -> None:
    one = collected(encoded, random_flags(encoded, 3, share), k=k)
    path = tmp_path / "run" / "memorized.safetensors"
    one.save(path)
    again = MemorizedSet.load(path)
    for field in fields(MemorizedSet):
        a, b = getattr(one, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["memorized.safetensors"]
    content = path.read_bytes()
    assert SECRET.encode() not in content and b"lungs" not in content
    for example in encoded:  # and no token ids in any width
        for kind in (np.int16, np.int32, np.int64):
            assert np.array(example.input_ids[:6], dtype=kind).tobytes() not in content


def test_a_missing_damaged_or_older_file_is_one_line(encoded: EncodedRecords, tmp_path: Path) -> None:
    path = tmp_path / "memorized.safetensors"
    with pytest.raises(InputError, match="is missing"):
        MemorizedSet.load(path)
    one = collected(encoded, random_flags(encoded, 3))
    one.save(path)
    whole = path.read_bytes()
    for broken, message in (
        (whole[:-5], "cannot be read"),
        (b"", "cannot be read"),
        (whole.replace(b'"version":"1"', b'"version":"0"'), "another version"),
        (whole.replace(b"span_kind", b"spam_kind"), "cannot be read"),
    ):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message) as caught:
            MemorizedSet.load(path)
        assert "\n" not in str(caught.value)


def test_other_records_tokenizers_and_settings_are_refused(encoded: EncodedRecords, tiny_tokenizer) -> None:
    one = collected(encoded, random_flags(encoded, 1))

    def of(records: Dataset, spec: TaskSpec = SPEC) -> MemorizedSet:
        other = encode(records, tiny_tokenizer, spec)
        return collected(other, np.ones(n_tokens(other), dtype=bool))

    swapped = dataset(first="The lungs are clear on day 8.")
    untagged = dataset().remove_columns("identifiers")
    cases = {
        "records": of(dataset().select(range(3))),
        "token counts": of(dataset(first="The lungs are not clear on day 7.")),
        "token ids": of(swapped),
        "patients": of(dataset(units="abcd")),
        "identifiers": of(untagged),
        "prefix_tokens": collected(encoded, random_flags(encoded, 1), pairs=[(2, 3)]),
        "spans of 4 tokens": collected(encoded, random_flags(encoded, 1), min_tokens=4),
        "of 2 other patients": collected(encoded, random_flags(encoded, 1), k=2),
    }
    for reason, other in cases.items():
        with pytest.raises(InputError, match=reason) as caught:
            persistence_figures(other, one)
        assert "\n" not in str(caught.value)
    persistence_figures(replace(one, k=None), one)  # kinds on one side only


def test_the_fingerprint_is_of_the_records_alone(encoded: EncodedRecords, tiny_tokenizer) -> None:
    again = encode(dataset(), tiny_tokenizer, SPEC)
    assert records_fingerprint(encoded) == records_fingerprint(again)
    others = [dataset(units="abbb"), dataset(first="The lungs are clear on day 8."), dataset().select([1, 0, 2, 3])]
    prints = {records_fingerprint(encode(records, tiny_tokenizer, SPEC)) for records in others}
    prints.add(records_fingerprint(encode(dataset(), tiny_tokenizer, TaskSpec(max_length=10))))
    assert len(prints) == 4 and records_fingerprint(encoded) not in prints


def test_a_real_pass_over_cut_records(tiny_model, tiny_tokenizer) -> None:
    """Scores of a model, records of several windows: flags, spans and offsets stay in step."""
    spec = TaskSpec(max_length=10)
    encoded = encode(dataset(), tiny_tokenizer, spec)
    assert encoded.n_records_cut > 0
    sets = []
    for seed in (0, 1):
        scores = score_records(tiny_model("gpt2", seed=seed), encoded, spec, tiny_tokenizer)
        spans = memorized_spans(scores, encoded, min_tokens=1)
        sets.append(MemorizedSet.of(scores, encoded, spans, pairs=[(1, 1)], kinds=span_kinds(spans, encoded), k=3))
        np.testing.assert_array_equal(sets[-1].token_flags(), scores.is_argmax)
    figures = persistence_figures(*sets)
    assert figures["tokens"]["n_cases"] == n_tokens(encoded)
