"""Canaries: one patient each, in by fair coins, in the records' own columns; a manifest that nobody else can read."""

from __future__ import annotations

import itertools
import json
import re
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from dpmed.data import canaries as module
from dpmed.data.canaries import DESIGNS, SPAN_TYPES, Canary, Design, Manifest, plant_canaries
from dpmed.data.hospital import make_hospital
from dpmed.data.records import load_records, normalised_text
from dpmed.errors import InputError

RECORDS = make_hospital(n_patients=40, seed=5)


@pytest.fixture(scope="module")
def planted() -> tuple[Dataset, Manifest]:
    return plant_canaries(RECORDS, n=90, seed=3)


def notes_of(records: Dataset, canary: Canary) -> list[dict[str, Any]]:
    return [row for row in records.to_list() if row["unit"] == canary.unit]


@settings(max_examples=20)
@given(
    n=st.integers(1, 12),
    designs=st.sets(st.sampled_from(DESIGNS), min_size=1),
    repeats=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_what_is_planted_is_what_the_manifest_says_and_the_rest_is_untouched(
    n: int, designs: set[Design], repeats: list[int], seed: int | None
) -> None:
    found, manifest = plant_canaries(RECORDS, n=n, designs=sorted(designs), repeats=repeats, seed=seed)
    assert len(manifest.canaries) == n
    assert found.features == RECORDS.features
    units = set(RECORDS["unit"])
    assert [row for row in found.to_list() if row["unit"] in units] == RECORDS.to_list()
    assert manifest.ordinary(found).to_list() == RECORDS.to_list()
    for canary in manifest.canaries:
        notes = notes_of(found, canary)
        assert len(notes) == (canary.repeats if canary.included else 0)
        assert {note["text"] for note in notes} <= {canary.text}
        assert len({note["record_id"] for note in notes}) == len(notes)
    assert len(found) == len(RECORDS) + sum(c.repeats for c in manifest.canaries if c.included)
    assert len(set(found["record_id"])) == len(found)
    manifest.check_planted(found)


def test_every_canary_is_a_patient_of_its_own_with_a_text_of_its_own(planted: tuple[Dataset, Manifest]) -> None:
    _, manifest = planted
    units = [canary.unit for canary in manifest.canaries]
    texts = [normalised_text(text) for text in manifest.texts]
    assert len(set(units)) == len(set(texts)) == 90
    assert not set(units) & set(RECORDS["unit"])
    assert not set(texts) & set(map(normalised_text, RECORDS["text"]))
    assert not any(unit.startswith("record-") or "canary" in unit.lower() for unit in units)


def test_designs_and_repeats_are_spread_evenly(planted: tuple[Dataset, Manifest]) -> None:
    counts = Counter((canary.design, canary.repeats) for canary in planted[1].canaries)
    assert counts == dict.fromkeys(itertools.product(DESIGNS, (1, 2, 4)), 10)


def test_a_canarys_rows_look_like_all_others_with_the_secret_marked(planted: tuple[Dataset, Manifest]) -> None:
    found, manifest = planted
    labels = set(RECORDS["label"])
    for canary in (c for c in manifest.canaries if c.included):
        for row in notes_of(found, canary):
            assert row["label"] in labels
            values = [row["text"][s["start"] : s["end"]] for s in row["identifiers"]]
            assert sorted(values) == sorted(canary.secret.values())
            assert {s["source"] for s in row["identifiers"]} == {"planted"}
            assert {s["type"] for s in row["identifiers"]} == {SPAN_TYPES[field] for field in canary.secret}


def test_a_canarys_dates_are_those_of_the_records() -> None:
    days = [f"20{i % 7 + 10}-01-0{i % 9 + 1}" for i in range(len(RECORDS))]
    dated = RECORDS.add_column("date", days)  # pyright: ignore[reportCallIssue]
    found, manifest = plant_canaries(dated, n=60, seed=3)
    notes = [note for canary in manifest.canaries for note in notes_of(found, canary)]
    drawn = [note["date"] for note in notes]
    assert len(set(drawn)) > 10 and set(drawn) <= set(days)
    assert manifest.ordinary(found)["date"][:] == days


def test_notes_stand_among_the_others_and_not_behind_them(planted: tuple[Dataset, Manifest]) -> None:
    found, _ = planted
    places = np.flatnonzero(~np.isin(found["unit"], RECORDS["unit"])) / len(found)
    assert places.min() < 0.1 and places.max() > 0.9 and 0.35 < places.mean() < 0.65


# --- Coins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 11])
def test_coins_are_fair_and_independent_of_design_repeats_and_each_other(seed: int | None) -> None:
    _, manifest = plant_canaries(RECORDS, n=1800, seed=seed)
    coins = manifest.included
    assert binomtest(int(coins.sum()), 1800).pvalue > 1e-6
    assert binomtest(int((coins[1:] == coins[:-1]).sum()), 1799).pvalue > 1e-6
    for column in ("design", "repeats"):
        groups = np.array([getattr(c, column) for c in manifest.canaries])
        z = [(coins[groups == g].sum() - 300) / 150**0.5 for g in np.unique(groups)]  # 600 canaries a group
        assert chi2.sf(sum(x * x for x in z), 3) > 1e-6


def test_a_seed_repeats_everything_and_without_one_nothing_repeats() -> None:
    (first, a), (second, b) = (plant_canaries(RECORDS, n=60, seed=7) for _ in range(2))
    assert first.to_list() == second.to_list() and a == b and a.seed == 7
    (_, c), (_, d) = (plant_canaries(RECORDS, n=60) for _ in range(2))
    assert c.seed is None
    assert not set(c.texts) & set(d.texts) and not np.array_equal(c.included, d.included)


# --- Designs ----------------------------------------------------------------------------------------------------------


def side_by_side(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return set(itertools.pairwise(words))


def of_design(manifest: Manifest, design: Design) -> list[Canary]:
    return [canary for canary in manifest.canaries if canary.design == design]


def test_random_tokens_are_words_of_the_records(planted: tuple[Dataset, Manifest]) -> None:
    words = set(re.findall(r"[^\W\d_]+", " ".join(RECORDS["text"]).casefold()))
    for canary in of_design(planted[1], "random_tokens"):
        drawn = canary.secret["words"].split()
        assert len(drawn) == 8 and set(drawn) <= words


def test_pairs_of_rare_bigrams_are_common_words_that_no_note_has_side_by_side(
    planted: tuple[Dataset, Manifest],
) -> None:
    seen = set().union(*map(side_by_side, RECORDS["text"]))
    words = {word for pair in seen for word in pair}
    for canary in of_design(planted[1], "rare_bigrams"):
        drawn = canary.secret["words"].split()
        pairs = set(zip(drawn[::2], drawn[1::2], strict=True))
        assert len(drawn) == 8 and set(drawn) <= words and not pairs & seen


def test_no_pool_holds_a_patients_identifier() -> None:
    rows = RECORDS.to_list()
    values = {r["text"][s["start"] : s["end"]] for r in rows for s in r["identifiers"] if s["type"] == "NAME"}
    _, manifest = plant_canaries(RECORDS, n=9, seed=0)
    words = {word for pool in manifest.pools.values() for entry in pool for word in entry.split()}
    assert not words & {part.casefold() for value in values for part in value.split()}


def test_a_word_of_one_patient_alone_is_in_no_pool_even_where_nothing_is_tagged() -> None:
    texts = [f"{' '.join(f'word{chr(97 + i)}' for i in range(26))} unique{chr(97 + p)}name" for p in range(5)]
    records = load_records(Dataset.from_dict({"text": texts, "p": [f"u{i}" for i in range(5)]}), unit="p")
    _, manifest = plant_canaries(records, n=4, designs=["random_tokens", "rare_bigrams"], seed=0)
    assert not [entry for pool in manifest.pools.values() for entry in pool if "unique" in entry]
    assert "wordb worda" in manifest.pools["rare_bigrams"]
    assert "worda wordb" not in manifest.pools["rare_bigrams"]


def test_made_up_identifiers_are_nobodys_in_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two first and three last names, five of six taken, every canary would often get a taken one."""
    monkeypatch.setattr(module, "_names", lambda: (("Ada", "Bob"), ("Hill", "Lake", "Marsh")))
    taken = [f"{a} {b}" for a, b in itertools.product(("Ada", "BOB"), ("Hill", "Lake", "Marsh"))][:5]
    texts = [f"Seen: {name}, 1234567{i}." for i, name in enumerate(taken)]
    records = load_records(Dataset.from_dict({"text": texts}))
    _, manifest = plant_canaries(records, n=1, designs=["identifiers"], seed=1)
    assert manifest.canaries[0].secret["name"] == "Bob Marsh"
    with pytest.raises(InputError, match="ask for fewer"):
        plant_canaries(records, n=2, designs=["identifiers"], seed=1)


@pytest.mark.parametrize("label", [None, "single", "multi"])
def test_labels_are_drawn_from_those_present(label: str | None, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"text": [f"note {i} about a cough" for i in range(8)]}
    if label is not None:
        columns["y"] = [["a", "b"], ["c"]] * 4 if label == "multi" else ["a", "b"] * 4
    source = Dataset.from_dict(columns)
    records = load_records(source, label=None if label is None else "y", multi_label=label == "multi")
    found, manifest = plant_canaries(records, n=40, designs=["identifiers"], seed=0)
    assert found.features == manifest.records.features == records.features
    if label is not None:
        assert {str(x) for x in manifest.records["label"]} == {str(x) for x in records["label"]}
    manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json").records.to_list() == manifest.records.to_list()


def test_what_an_attack_scores_are_the_notes_themselves_and_those_that_were_out(
    planted: tuple[Dataset, Manifest],
) -> None:
    found, manifest = planted
    rows = manifest.records.to_list()
    assert [row["text"] for row in rows] == manifest.texts
    for row, canary in zip(rows, manifest.canaries, strict=True):
        assert (row in found.to_list()) == canary.included


# --- Candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_candidates_are_other_secrets_of_the_same_format(design: Design, planted: tuple[Dataset, Manifest]) -> None:
    _, manifest = planted
    canary = of_design(manifest, design)[0]
    found = manifest.candidates(canary, 200, seed=0)
    assert len(set(found)) == 200 and canary.text not in found
    fields = {"words": r"\w+( \w+){7}", "name": r"[A-Z]\w+ [A-Z]\w+", "mrn": r"\d{8}", "birth_date": r"\d\d/\d\d/\d{4}"}
    parts = re.split(r"(\{\w+\})", canary.carrier)
    pattern = "".join(f"({fields[p[1:-1]]})" if p.startswith("{") else re.escape(p) for p in parts)
    assert [text for text in [canary.text, *found] if not re.fullmatch(pattern, text)] == []
    if design == "rare_bigrams":
        pairs = set(manifest.pools[design])
        drawn = [re.fullmatch(pattern, text) for text in found]
        words = [m.group(1).split() for m in drawn if m]
        assert all({f"{a} {b}" for a, b in zip(w[::2], w[1::2], strict=True)} <= pairs for w in words)


def test_candidates_depend_on_the_seed_and_the_canary(planted: tuple[Dataset, Manifest]) -> None:
    _, manifest = planted
    one, other = of_design(manifest, "random_tokens")[:2]
    assert manifest.candidates(one, 20, 0) == manifest.candidates(one, 20, 0)
    assert not set(manifest.candidates(one, 20, 0)) & set(manifest.candidates(one, 20, 1))
    secrets = [{re.sub(r"^[^:]*", "", text) for text in manifest.candidates(c, 20, 0)} for c in (one, other)]
    assert not secrets[0] & secrets[1]


def test_the_space_is_counted_by_its_words(planted: tuple[Dataset, Manifest]) -> None:
    _, manifest = planted
    small = replace(manifest, pools={"random_tokens": ("a", "b"), "rare_bigrams": ("a b",) * 4})
    tokens, pairs, made_up = (of_design(manifest, d)[0] for d in ("random_tokens", "rare_bigrams", "identifiers"))
    assert (small.space_bits(tokens), small.space_bits(pairs)) == (8, 8)
    assert small.space_bits(made_up) == pytest.approx(np.log2(120 * 250 * 365 * 80 * 1e8))
    with pytest.raises(ValueError, match="too few"):
        small.candidates(tokens, 129, 0)
    assert len(set(small.candidates(tokens, 128, 0))) == 128


# --- The manifest -----------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_and_only_its_owner_can_read_it(
    tmp_path: Path, planted: tuple[Dataset, Manifest]
) -> None:
    found, manifest = planted
    path = tmp_path / "private" / "manifest.json"
    manifest.save(path)
    loaded = Manifest.load(path)
    assert loaded == manifest
    assert loaded.candidates(loaded.canaries[0], 5, 1) == manifest.candidates(manifest.canaries[0], 5, 1)
    loaded.check_planted(found)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["canaries"][0]["text"] == manifest.canaries[0].text


def flip_a_coin(values: dict[str, Any]) -> None:
    values["canaries"][0]["included"] ^= True


def drop_a_canary(values: dict[str, Any]) -> None:
    del values["canaries"][-1]


def drop_the_checksum(values: dict[str, Any]) -> None:
    del values["checksum"]


def other_version(values: dict[str, Any]) -> None:
    values["version"] += 1


@pytest.mark.parametrize("damage", [flip_a_coin, drop_a_canary, drop_the_checksum, other_version])
def test_a_manifest_that_was_changed_is_refused(damage: Any, tmp_path: Path, planted: tuple[Dataset, Manifest]) -> None:
    path = tmp_path / "m.json"
    planted[1].save(path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"another version|was changed") as e:
        Manifest.load(path)
    assert "\n" not in str(e.value)
    assert not any(text in str(e.value) for text in planted[1].texts)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"canaries": ', "\udcff"])
def test_what_is_no_manifest_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"m\.json is not a manifest"):
        Manifest.load(path)
    with pytest.raises(InputError, match="is missing"):
        Manifest.load(tmp_path / "none.json")


def test_records_of_another_planting_are_refused(planted: tuple[Dataset, Manifest]) -> None:
    found, manifest = planted
    other, _ = plant_canaries(RECORDS, n=90, seed=4)
    for records in (RECORDS, other, found.select(range(len(found) - 1))):
        with pytest.raises(InputError, match="not of these records"):
            manifest.check_planted(records)


# --- Bad input --------------------------------------------------------------------------------------------------------

FEW = load_records(Dataset.from_dict({"text": ["fever and cough", "cough and fever"]}))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0"),
    ({"designs": []}, "designs must be"),
    ({"designs": ["random_tokens", "random_tokens"]}, "designs must be"),
    ({"designs": ["haiku"]}, "designs must be"),
    ({"repeats": ()}, "repeats must be"),
    ({"repeats": (1, 0)}, "repeats must be"),
    ({"records": RECORDS.remove_columns("unit")}, "load_records"),
    ({"records": RECORDS.rename_column("label", "diagnosis")}, "load_records"),
    ({"records": FEW, "designs": ["random_tokens"]}, "hold 3 words"),
    ({"records": FEW, "designs": ["rare_bigrams"]}, "pairs of words"),
]


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[named for _, named in BAD])
def test_bad_input_is_one_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as e:
        plant_canaries(**{"records": RECORDS, "n": 3, "seed": 0, **changes})
    assert "\n" not in str(e.value)


def test_few_words_are_enough_for_made_up_identifiers() -> None:
    found, manifest = plant_canaries(FEW, n=20, designs=["identifiers"], repeats=(2,), seed=0)
    assert len(found) == 2 + 2 * manifest.included.sum()
