"""The evaluator's speed script on a tiny model, in this process: what it writes, never how fast."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("evaluator")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def inputs(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    """A tiny model on disk, and made-up sentences."""
    tiny_model("llama", max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"context": f"Fever and cough on day {i}, then a rash."} for i in range(60)]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--batch_tokens", "400", "--generated", "1"]


def test_records_are_as_long_as_prefix_and_suffix(script: Any, tiny_tokenizer: Any):
    records = script.joined(["Fever and cough.", "A rash."], tiny_tokenizer, 5)
    assert len(records) == 5
    for text in records:
        size = len(tiny_tokenizer(text)["input_ids"])
        assert abs(size - script.PREFIX - script.SUFFIX) <= 1  # a word that is cut may have other tokens
    with pytest.raises(SystemExit, match="no text"):
        script.joined([], tiny_tokenizer, 1)


def in_this_process(script: Any, options: Any, records: int) -> dict[str, float]:
    case = script.Case(options.model, options.data, records, 1, 1, options.batch_tokens, options.device)
    return script.alone(case)


def test_every_ratio_is_written_without_text(
    script: Any, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "in_own_process", functools.partial(in_this_process, script))
    output = tmp_path / "out.json"
    assert script.main([*inputs, "--records", "2", "--repetitions", "2", "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "ever" not in text.replace("never", "") and str(tmp_path) not in text
    document = json.loads(text)
    assert len(document["seconds"]) == 2
    assert set(document["seconds"][0]) == set(script.COLUMNS)
    names = {f"{a}_to_{b}_{clock}" for a, b in script.RATIOS for clock in ("wall", "cpu")}
    assert set(document["ratios"]) == names
    for ratio in document["ratios"].values():
        assert ratio["n"] == 2
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] < math.inf
    assert [run["n_records"] for run in document["scale"]["runs"]] == [2, 20]
    assert document["scale"]["ratios"]["tokens"] == pytest.approx(10, rel=0.3)
    assert document["environment"]["versions"]
