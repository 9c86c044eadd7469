"""Records: the same rows in every format, one-line errors without content, splits that never leak."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import datasets
import polars
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmed.data.records import (
    check_disjoint,
    data_fingerprint,
    drop_overlap,
    load_records,
    normalised_text,
    record_features,
    split_by_unit,
    unit_hash,
    unit_salt,
)
from dpmed.errors import InputError

SECRET = "Zebulon Quark"
SPAN = {"start": 0, "end": 3, "type": "name"}
ROWS: list[dict[str, Any]] = [
    {"note": 'Ann said "hi",\nthen left.', "y": "a", "mrn": "007", "id": "r1", "spans": [SPAN]},
    {"note": 'Émile\u2028 has a 5" wide scar | x', "y": "b", "mrn": "007", "id": "r2", "spans": []},
    {"note": "Bob is well.", "y": "a", "mrn": "8", "id": "r3", "spans": [SPAN | {"source": "planted"}]},
]
COLUMNS: dict[str, Any] = {"text": "note", "label": "y", "unit": "mrn", "record_id": "id", "identifiers": "spans"}


def records(texts: list[str], units: list[str] | None = None) -> Dataset:
    names = units or [f"record-{row}" for row in range(len(texts))]
    ids = [str(row) for row in range(len(texts))]
    columns = {"text": texts, "unit": names, "record_id": ids, "identifiers": [[] for _ in texts]}
    return Dataset.from_dict(columns, features=record_features())


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def flat(rows: list[dict[str, Any]]) -> polars.DataFrame:
    """csv cells hold no lists: spans as JSON, labels joined."""
    cells = [
        {key: "|".join(v) if key == "ys" else json.dumps(v) if key == "spans" else v for key, v in row.items()}
        for row in rows
    ]
    return polars.DataFrame(cells)


def every_format(rows: list[dict[str, Any]], folder: Path) -> dict[str, Path | Dataset]:
    flat(rows).write_csv(folder / "r.csv")
    flat(rows).write_csv(folder / "r.tsv", separator="\t")
    write(folder, "r.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    write(folder, "lines.json", "\r\n".join(json.dumps(row) for row in rows))
    write(folder, "list.json", json.dumps(rows, indent=1))
    polars.from_dicts(rows).write_parquet(folder / "r.parquet")
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder / "splits"))
    names = ["r.csv", "r.tsv", "r.jsonl", "lines.json", "list.json", "r.parquet", "saved", "splits"]
    return {**{name: folder / name for name in names}, "dataset": Dataset.from_list(rows)}


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_all_formats_give_equal_datasets(tmp_path: Path) -> None:
    expected = {
        "text": [row["note"] for row in ROWS],
        "label": ["a", "b", "a"],
        "unit": ["007", "007", "8"],
        "record_id": ["r1", "r2", "r3"],
        "identifiers": [
            [{"start": 0, "end": 3, "type": "NAME", "source": "known"}],
            [],
            [{"start": 0, "end": 3, "type": "NAME", "source": "planted"}],
        ],
    }
    for name, source in every_format(ROWS, tmp_path).items():
        loaded = load_records(source, **COLUMNS)
        assert loaded.to_dict() == expected, name
        assert loaded.features == record_features(label="single"), name
        assert loaded.cache_files == [], f"{name}: records lie in a file"


def test_multi_labels_are_lists_in_every_format(tmp_path: Path) -> None:
    rows = [{"note": "one", "ys": ["a", "b"]}, {"note": "two", "ys": []}, {"note": "three", "ys": ["c"]}]
    for name, source in every_format(rows, tmp_path).items():
        loaded = load_records(source, text="note", label="ys", multi_label=True)
        assert loaded["label"][:] == [["a", "b"], [], ["c"]], name
        assert loaded.features == record_features(label="multi"), name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 4], ["3", "4"]),
        ([3.0, 4.5], ["3", "4.5"]),
        ([True, False], ["true", "false"]),
        (["True", "FALSE"], ["true", "false"]),
        (["250.0", " 001 "], ["250.0", "001"]),  # a code, not a number
    ],
)
def test_single_labels_become_str(values: list[Any], expected: list[str], tmp_path: Path) -> None:
    frame = polars.DataFrame({"text": ["x", "y"], "label": values})
    frame.write_parquet(tmp_path / "r.parquet")
    assert load_records(tmp_path / "r.parquet", label="label")["label"][:] == expected


def test_class_labels_become_their_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    source = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    assert load_records(source, label="label")["label"][:] == ["yes", "no"]


def test_without_columns_each_record_is_its_own_unit(tmp_path: Path) -> None:
    loaded = load_records(write(tmp_path, "r.csv", "\ufefftext\nfirst\nsecond\n"))
    assert loaded.column_names == ["text", "unit", "record_id", "identifiers"]
    assert loaded["unit"][:] == ["record-0", "record-1"]
    assert loaded["record_id"][:] == ["0", "1"]
    assert loaded["identifiers"][:] == [[], []]


def test_cells_longer_than_the_csv_default_load(tmp_path: Path) -> None:
    text = "word " * 40_000
    assert load_records(write(tmp_path, "r.csv", f'text\n"{text}"\n'))["text"][0] == text


def test_a_loaded_dataset_loads_again_unchanged() -> None:
    first = load_records(Dataset.from_list(ROWS), **COLUMNS)
    names: dict[str, Any] = {"label": "label", "unit": "unit", "record_id": "record_id", "identifiers": "identifiers"}
    assert load_records(first, **names).to_dict() == first.to_dict()


def test_a_hub_name_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, split, streaming))
        return Dataset.from_dict({"text": ["from the hub"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("owner/name", split="test")["text"][:] == ["from the hub"]
    assert asked == [("owner/name", "test", True)]


def test_a_mistyped_path_is_never_sent_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("data/train.csv", "/none/of/this", "train.jsonl", Path("data/train.parquet")):
        with pytest.raises(InputError, match="file not found: check the path"):
            load_records(source)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"{SECRET}\nno route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_records("owner/name")
    expect_one_clean_line(caught.value, "file not found here, and not reachable on the Hub (ConnectionError)")


# --- Errors -----------------------------------------------------------------------------------------------------------


def expect_one_clean_line(error: InputError, expected: str) -> None:
    message = str(error)
    assert expected in message
    assert "\n" not in message
    assert SECRET not in message and SECRET.split()[0] not in message
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def as_jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows))


ERRORS: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("r.xlsx", SECRET, {}, "unknown format '.xlsx': use .csv"),
    ("r.csv", "", {}, "the file is empty"),
    ("r.csv", "text\n", {}, "holds no records"),
    ("r.json", "[]", {}, "holds no records"),
    ("r.csv", f"texts,mrn\n{SECRET},1\n", {}, "no column 'text' (did you mean 'texts'?); the columns are: texts, mrn"),
    ("r.csv", f"{SECRET} was seen for a cough and a very high fever,1\nx,2\n", {}, "does not look like a header"),
    ("r.csv", f"{SECRET},123456\nx,2\n", {}, "does not look like a header"),
    ("r.csv", f"text,text\n{SECRET},1\n", {}, "the column 'text' stands 2 times"),
    ("r.csv", f"text,n\n{SECRET},1\n{SECRET},a,b\n", {}, "the record from line 3 has 3 cells, the header 2"),
    ("r.csv", f"text,n\n{SECRET}\n", {}, "the record from line 2 has 1 cells, the header 2"),
    ("r.csv", f'text,n\nx,1\n"{SECRET},1\nx,2\n', {}, "malformed record from line 3: check that every quote"),
    ("r.csv", f"text\n{SECRET} caf\xe9\n".encode("latin-1"), {}, "offset 22): save the file as UTF-8"),
    ("r.jsonl", f'{{"text": "a"}}\n\n{{"text": "{SECRET}\n', {}, "line 3 is not a JSON object"),
    ("r.jsonl", f'{{"text": "a"}}\n"{SECRET}"\n', {}, "line 2 is not a JSON object"),
    ("r.json", f'[{{"text": "a"}},\n{{"text": "{SECRET}"]', {}, "malformed JSON at line 2"),
    ("r.json", f'[{{"text": "a"}}, "{SECRET}"]', {}, "item 1 of the list"),
    ("r.json", f'{{\n"{SECRET}": {{"text": "a"}}\n}}', {}, "line 1 is not a JSON object"),
    ("r.parquet", SECRET, {}, "not a readable parquet file"),
    (
        "r.jsonl",
        as_jsonl({"text": SECRET}, {"text": " "}, {"text": None}, {}),
        {},
        "blank in 3 of 4 records (rows 1, 2, 3,",
    ),
    ("r.jsonl", as_jsonl({"text": SECRET}, {"text": [SECRET]}), {}, "'text' is not text in 1 of 2 records (rows 1,"),
    ("r.jsonl", as_jsonl({"text": SECRET + "\ud800"}), {}, "not valid Unicode"),
    ("r.csv", f"text,y\n{SECRET},\nb,1\nc,\n", {"label": "y"}, "'y' is missing in 2 of 3 records (rows 0, 2,"),
    ("r.jsonl", as_jsonl({"text": SECRET, "y": [SECRET]}), {"label": "y"}, "not a single label (for lists set multi"),
    ("r.jsonl", as_jsonl({"text": "a", "y": {"b": SECRET}}), {"label": "y"}, "'y' is not a single label"),
    ("r.jsonl", as_jsonl({"text": SECRET, "y": None}), {"label": "y", "multi_label": True}, "'y' is missing in 1 of 1"),
    ("r.jsonl", as_jsonl({"text": SECRET, "y": [None]}), {"label": "y", "multi_label": True}, "labels without gaps"),
    ("r.csv", f"text\n{SECRET}\n", {"require_unit": True}, "no unit column is named; differential privacy protects"),
    ("r.csv", f"text\n{SECRET}\n", {"require_unit": True, "unit": "mrn"}, "no column 'mrn'; differential privacy"),
    ("r.csv", f"text\n{SECRET}\n", {"require_unit": True}, "set the recipe key data.unit"),
    ("r.csv", f"text,mrn\n{SECRET},\nb, \nc,7\n", {"unit": "mrn"}, "'mrn' is missing in 2 of 3 records (rows 0, 1,"),
    ("r.csv", f"text,id\n{SECRET},\n", {"record_id": "id"}, "'id' is missing in 1 of 1"),
    ("r.csv", f"text,d\na,3/14/2021\nb,{SECRET}\nc,2021\n", {"date": "d"}, "'d' is not a date such as 2021-03-14 in 2"),
    ("r.csv", f"text,d\n{SECRET},2021-02-30\n", {"date": "d"}, "'d' is not a date such as 2021-03-14 in 1 of 1"),
    ("r.csv", f"text,d\n{SECRET},\n", {"date": "d"}, "'d' is missing in 1 of 1"),
    *[
        (
            "r.jsonl",
            as_jsonl({"text": SECRET, "s": spans}),
            {"identifiers": "s"},
            "'s' does not hold valid spans in 1 of 1",
        )
        for spans in (
            [{"start": 0, "end": len(SECRET) + 1, "type": "NAME"}],
            [{"start": 3, "end": 3, "type": "NAME"}],
            [{"start": -1, "end": 3, "type": "NAME"}],
            [{"start": 0.0, "end": 3, "type": "NAME"}],
            [{"start": True, "end": 3, "type": "NAME"}],
            [{"start": 0, "end": 3, "type": " "}],
            [{"start": 0, "end": 3}],
            [{"start": 0, "end": 3, "type": "NAME", "source": SECRET}],
            [SECRET],
            f"[{SECRET}",
            7,
        )
    ],
]


@pytest.mark.parametrize(("name", "content", "columns", "expected"), ERRORS)
def test_bad_input_is_one_line_without_content(
    name: str, content: str | bytes, columns: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load_records(path, **columns)
    expect_one_clean_line(caught.value, expected)
    assert str(path) in str(caught.value)


def test_a_folder_must_be_saved_and_hold_the_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not one that save_to_disk made"):
        load_records(tmp_path)
    DatasetDict({"fit": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(InputError, match="has no split 'train': choose one of fit"):
        load_records(tmp_path / "splits", text="note")
    assert len(load_records(tmp_path / "splits", text="note", split="fit")) == 3


def test_only_the_first_five_rows_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", "text,y\n" + "a,\n" * 9)
    with pytest.raises(InputError, match=r"in 9 of 9 records \(rows 0, 1, 2, 3, 4, \.\.\., counted from 0\)"):
        load_records(path, label="y")


# --- Fingerprints and hashes ------------------------------------------------------------------------------------------

SHORT = st.text("abc ", min_size=1, max_size=3)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=8), st.randoms())
def test_the_fingerprint_ignores_the_order_only(pairs: list[tuple[str, str]], random: Any) -> None:
    data = records([text for text, _ in pairs], [unit for _, unit in pairs])
    order = random.sample(range(len(pairs)), len(pairs))
    assert data_fingerprint(data.select(order)) == data_fingerprint(data)
    doubled = data.select([*range(len(pairs)), 0])
    changed = records([data["text"][0] + "!", *data["text"][1:]], list(data["unit"]))
    assert len({data_fingerprint(one) for one in (data, doubled, changed)}) == 3


def test_the_fingerprint_keeps_columns_apart() -> None:
    assert data_fingerprint(records(["0b"], ["a"])) != data_fingerprint(records(["b"], ["a0"]))  # both join to a00b


def test_unit_hashes_are_short_and_salted() -> None:
    assert len(unit_hash("7")) == 12 and int(unit_hash("7"), 16) >= 0
    assert len({unit_hash("7"), unit_hash("8"), unit_hash("7", "s"), unit_hash("7", "t")}) == 4


def test_the_salt_follows_the_records() -> None:
    data = records(["one", "two"], ["p1", "p2"])
    assert unit_salt(data) == unit_salt(data.select([1, 0]))
    assert len({unit_salt(data), unit_salt(data.select([0])), data_fingerprint(data)}) == 3


def test_normalised_text() -> None:
    assert normalised_text("  Ｎo\u00a0ACUTE\n\tﬁnding ") == "no acute finding"


# --- Splits -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=40),
    st.integers(0, 5),
    st.sampled_from([{"train": 0.7, "validation": 0.1, "heldout": 0.2}, {"a": 0.5, "b": 0.5}, {"all": 1.0}]),
)
def test_no_unit_or_text_is_in_two_parts(rows: list[tuple[int, int]], seed: int, fractions: dict[str, float]) -> None:
    spellings = ("note {}", "NOTE  {}")
    texts = [spellings[at % 2].format(text) for at, (_, text) in enumerate(rows)]
    data = records(texts, [f"p{unit}" for unit, _ in rows])
    try:
        parts = split_by_unit(data, fractions=fractions, seed=seed)
    except InputError as error:
        assert "would be empty" in str(error) and len(fractions) > 1
        return
    assert list(parts) == list(fractions)
    ids = [[int(row) for row in part["record_id"]] for part in parts.values()]
    assert sorted(row for part in ids for row in part) == list(range(len(rows)))
    assert all(part and part == sorted(part) for part in ids)
    for one in parts.values():
        for other in parts.values():
            if one is not other:
                check_disjoint(one, other)
                assert not set(one["unit"]) & set(other["unit"])
                assert not {*map(normalised_text, one["text"])} & {*map(normalised_text, other["text"])}
    again = split_by_unit(data, fractions=fractions, seed=seed)
    assert [list(part["record_id"]) for part in again.values()] == [[str(row) for row in part] for part in ids]


def test_single_groups_come_within_one_record_and_seeds_differ() -> None:
    data = records([f"note {row}" for row in range(103)])
    fractions = {"train": 0.7, "validation": 0.1, "heldout": 0.2}
    first, second = (split_by_unit(data, fractions=fractions, seed=seed) for seed in (0, 1))
    for name, share in fractions.items():
        assert abs(len(first[name]) - share * 103) < 1
    assert list(first["heldout"]["record_id"]) != list(second["heldout"]["record_id"])


def test_the_order_of_the_rows_does_not_move_a_patient() -> None:
    data = records([f"note {row}" for row in range(40)], [f"p{row % 13}" for row in range(40)])
    fractions = {"train": 0.6, "heldout": 0.4}
    forward, backward = (
        split_by_unit(one, fractions=fractions, seed=3) for one in (data, data.select(range(39, -1, -1)))
    )
    assert set(forward["train"]["unit"]) == set(backward["train"]["unit"])


def test_a_large_patient_goes_where_it_fits() -> None:
    data = records([f"note {row}" for row in range(100)], ["big"] * 60 + [f"p{row}" for row in range(40)])
    for seed in range(10):
        parts = split_by_unit(data, fractions={"train": 0.7, "validation": 0.1, "heldout": 0.2}, seed=seed)
        assert [len(part) for part in parts.values()] == [70, 10, 20]


def test_records_without_patients_that_share_a_text_stay_together() -> None:
    data = records(["No finding.", "no  FINDING."] * 5 + [f"note {row}" for row in range(10)])
    parts = split_by_unit(data, fractions={"train": 0.5, "heldout": 0.5}, seed=0)
    counts = [sum(normalised_text(text) == "no finding." for text in part["text"]) for part in parts.values()]
    assert sorted(counts) == [0, 10]


@pytest.mark.parametrize("shares", [[0.7, 0.2], [1.2, -0.2], [1.0, 0.0], [], [float("nan"), 0.5]])
def test_fractions_must_sum_to_one(shares: list[float]) -> None:
    with pytest.raises(InputError, match="above 0 and sum to 1"):
        split_by_unit(records(["a", "b"]), fractions={str(at): share for at, share in enumerate(shares)}, seed=0)


def test_one_group_cannot_fill_two_parts() -> None:
    with pytest.raises(InputError, match=r"'heldout' would be empty: 3 records form 1 groups .* the largest of 3"):
        split_by_unit(records(["a", "b", "a"], ["p", "p", "q"]), fractions={"train": 0.8, "heldout": 0.2}, seed=0)


# --- Overlap ----------------------------------------------------------------------------------------------------------


def test_shared_units_and_texts_are_named_by_hash_and_count() -> None:
    train = records(["one", "two", SECRET], [SECRET, "p2", "p3"])
    heldout = records(["three", f" {SECRET.upper()}", "four", "five"], [SECRET, "p9", "p3", "p3"])
    with pytest.raises(InputError) as caught:
        check_disjoint(train, heldout, names=("fit", "test"))
    first, second = (unit_hash(unit, unit_salt(train)) for unit in (SECRET, "p3"))
    expected = f"fit and test share 2 units (hashes {first}, {second}) and 1 records of test"
    expect_one_clean_line(caught.value, expected)
    assert "data.on_overlap" in str(caught.value) and "split_by_unit" in str(caught.value)
    for salt in ("", data_fingerprint(train)):  # what a reader of run.json could try every record number with
        assert unit_hash("p3", salt) not in str(caught.value)
    left, dropped = drop_overlap(train, records([*heldout["text"], "new"], [*heldout["unit"], "p4"]))
    assert (list(left["text"]), dropped) == (["new"], 4)
    check_disjoint(train, left)


def test_placeholder_units_of_two_files_are_not_the_same_patient() -> None:
    train, heldout = records(["one", "two"]), records(["three", "four"])
    check_disjoint(train, heldout)
    assert drop_overlap(train, heldout)[1] == 0


@pytest.mark.parametrize("call", [check_disjoint, drop_overlap])
def test_a_heldout_that_is_train_is_refused(call: Callable[[Dataset, Dataset], object]) -> None:
    data = records([SECRET])
    with pytest.raises(InputError) as caught:
        call(data, data)
    expect_one_clean_line(caught.value, "split_by_unit")


@pytest.mark.parametrize(
    ("cell", "day"),
    [
        ("2021-03-14", "2021-03-14"),
        (" 2180-03-14T10:30:00Z ", "2180-03-14"),
        ("2021-03-14 00:00:00", "2021-03-14"),
        (21800506, "2180-05-06"),
        ("2021-03", "2021-03-01"),
        (2021.0, "2021-01-01"),
    ],
)
def test_dates_become_days(tmp_path: Path, cell: Any, day: str) -> None:
    loaded = load_records(write(tmp_path, "r.jsonl", as_jsonl({"text": "a", "when": cell})), date="when")
    assert loaded["date"][:] == [day] and loaded.column_names[-2:] == ["date", "identifiers"]
    assert load_records(loaded, date="date", identifiers="identifiers")[:] == loaded[:]


def test_dates_of_typed_columns_become_days() -> None:
    for day in (datetime(2021, 3, 14, 9), date(2021, 3, 14)):
        typed = Dataset.from_dict({"text": ["a"], "when": [day]})
        assert load_records(typed, date="when")["date"][:] == ["2021-03-14"]
