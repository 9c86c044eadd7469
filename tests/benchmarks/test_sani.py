"""The table over the runs of a SANI frontier, and the case of confidential terms on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats

import tiny_models

ROOT = Path(__file__).parents[2] / "benchmarks" / "sani"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sani_{name}", ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = script("table")
terms = script("confidential_terms")


def run(folder: Path, method: str, seed: int, leak: float, words: float, *, masked: bool = False) -> None:
    figure = {"value": leak}
    guessed = {"value": 0.1}
    side = {"identifier_extraction_rate": figure, "extraction_rate": figure, "membership_auc": None, "membership": None}
    if masked:
        side |= {"identifier_extraction_rate": None, "fill_mask": {"identifiers": {"top_1": figure}}}
    heldout = side | {"identifier_extraction_rate": None if masked else guessed}
    if masked:
        heldout |= {"fill_mask": {"identifiers": {"top_1": guessed}}}
    evaluation = {
        "memorization": side,
        "reference": {"heldout": heldout},
        "utility": {"other_words_accuracy": {"value": words}, "other_words_perplexity": {"value": 2.0}},
    }
    path = folder / "runs" / f"{method}-s{seed}"
    path.mkdir(parents=True)
    record = {"setting": method, "method": method, "seed": seed, "versions": {}}
    (path / "run.json").write_text(json.dumps(record))
    (path / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_is_compared_with_the_full_run_of_its_seed(tmp_path: Path, masked: bool) -> None:
    for seed, full, left in ((0, 0.5, 0.1), (1, 0.9, 0.5)):
        run(tmp_path, "full", seed, full, 0.8, masked=masked)
        run(tmp_path, "sani", seed, left, 0.76, masked=masked)
    run(tmp_path, "base", 0, 0.1, 0.2, masked=masked)
    (tmp_path / "runs" / "unfinished").mkdir()
    assert table.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    rows = {row["setting"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    gone = rows["sani"]["gone"]
    assert gone["value"] == pytest.approx((1.0 + 0.5) / 2) and gone["n_seeds"] == 2
    half = stats.t.ppf(0.975, 1) * 0.5 / 2  # the standard error of 1 and .5
    assert (gone["low"], gone["high"]) == pytest.approx((0.75 - half, 0.75 + half))
    left = rows["sani"]["leakage"]
    assert left["value"] == pytest.approx(0.3) and (left["low"], left["high"]) == (0, 1)  # cut at what is possible
    assert rows["sani"]["other_words_change"]["value"] == pytest.approx(-0.05)
    assert rows["full"]["gone"] is None and rows["base"]["leakage"]["low"] is None
    assert "| sani | 2 | 30.0 (0.0 to 100.0) | 10.0 (" in (tmp_path / "out.md").read_text()


def test_nothing_is_gone_where_nothing_had_leaked(tmp_path: Path) -> None:
    for method, leak in (("base", 0.1), ("full", 0.1), ("sani", 0.05)):
        run(tmp_path, method, 0, leak, 0.8)
    runs = [table.read_run(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert [r["gone"] for r in table.compared(runs)] == [None, None, None]


def test_no_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit, match="no finished run"):
        table.main([str(tmp_path), "--output", str(tmp_path / "out")])


def test_the_terms_stand_where_the_spans_say() -> None:
    for templates, name in ((terms.SEEN, "city"), (terms.UNSEEN, "city"), (terms.LANGUAGE, "language")):
        rows, spans = terms.sentences(templates), terms.spans(templates, name)
        wanted = [fact[name] for fact in terms.facts() for _ in templates]
        assert [row["text"][s["start"] : s["end"]] for row, (s,) in zip(rows, spans, strict=True)] == wanted
    assert len(terms.facts()) == len({fact["country"] for fact in terms.facts()}) == 40
    assert not set(terms.SEEN) & set(terms.UNSEEN)


def test_the_case_of_confidential_terms_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_models.make_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_models.make_tokenizer().save_pretrained(tmp_path / "model")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"fever and cough {i}"}) + "\n" for i in range(4)))
    monkeypatch.setattr(terms, "VARIANTS", {"sani": {"sani": {"erase_layers": 1}, "data": {"max_length": 64}}})
    monkeypatch.setattr(terms, "MAX_LENGTH", 64)
    options = ["--model", str(tmp_path / "model"), "--other", str(other), "--n_other", "2", "--seeds", "0"]
    options += ["--output_dir", str(tmp_path / "out")]
    assert terms.main(options) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"before", "sani-s0"}
    assert results["before"]["unseen_wording"]["n"] == 160 and results["before"]["other_text"]["n_tokens"] > 0
    assert results["before"] != results["sani-s0"]
    monkeypatch.setattr(terms, "measure", lambda *_: pytest.fail("a result was made twice"))
    assert terms.main(options) == 0
