from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from memorization.evaluated import SECRET, SETTINGS, SPEC, WORDS, every_null, records, trained, value
from torch import nn

from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError
from dpmed.memorization.evaluator import EvaluationSettings, MemorizationEvaluator, units_sample


@pytest.fixture(scope="module")
def sides() -> tuple[Dataset, Dataset]:
    return records(34, 0), records(32, 1)


@pytest.fixture(scope="module")
def memorised(tiny_model, tiny_tokenizer, sides) -> nn.Module:
    return trained(tiny_model("llama"), sides[0], tiny_tokenizer)


def test_a_model_that_learnt_its_records_by_heart_shows_it(memorised, tiny_model, tiny_tokenizer, sides):
    evaluator = MemorizationEvaluator(
        memorised, tiny_tokenizer, base_model=tiny_model("llama"), spec=SPEC, settings=SETTINGS
    )
    result = evaluator.evaluate(*sides)
    memorization, reference = result["memorization"], result["reference"]
    assert value(memorization, "membership_auc") > 0.9
    assert memorization["membership_attack"] == "reference"
    assert memorization["membership_auc"] == memorization["membership"]["reference"]["auc"]
    assert memorization["extraction_rate"] == memorization["extraction"]["p4_n4"]
    assert set(memorization["membership"]) == {"loss", "reference", "min_k", "min_k_plus_plus", "zlib", "ez"}
    for attack in memorization["membership"].values():
        assert value(attack, "auc") > 0.7
    drawn = memorization["probabilistic_extraction"]
    assert set(drawn) == {f"n{n}_p{p}" for n in (1, 10, 100, 1000) for p in ("0.1", "0.5", "0.9")}
    assert value(drawn, "n1000_p0.1") >= value(drawn, "n10_p0.5") >= value(drawn, "n1_p0.9")
    for key in ("extraction_strength", "exact_memorization"):
        assert value(memorization, key) > value(reference, "heldout", key) + 0.03
        assert value(memorization, key) > value(reference, "base_model", "memorization", key) + 0.1
    assert value(drawn, "n100_p0.5") > value(reference, "heldout", "probabilistic_extraction", "n100_p0.5") + 0.2
    assert "fills no masks" in result["not_applicable"]["memorization.fill_mask"]
    own, heldout = value(memorization, "extraction_rate"), value(reference, "heldout", "extraction_rate")
    base = value(reference, "base_model", "memorization", "extraction_rate")
    assert own > heldout + 0.2
    assert own > base + 0.2
    assert set(memorization["identifier_extraction"]) == {"NAME", "DATE"}
    assert memorization["identifier_extraction_rate"]["n"] == 68
    assert value(memorization, "train_perplexity") < 0.5 * value(result, "utility", "perplexity")
    assert value(reference, "base_model", "utility", "perplexity") > 50
    assert 0.3 < value(reference, "base_model", "memorization", "membership_auc") < 0.7
    assert result["counts"]["train"]["extraction"]["p4_n4"] == {"n_eligible": 34, "n_too_short": 0}
    assert result["warnings"] == []


def test_the_result_is_json_and_every_null_has_its_reason(memorised, tiny_model, tiny_tokenizer, sides):
    with_base = MemorizationEvaluator(
        memorised, tiny_tokenizer, base_model=tiny_model("llama"), spec=SPEC, settings=SETTINGS
    ).evaluate(*sides)
    alone = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS).evaluate(*sides)
    for result in (with_base, alone):
        text = json.dumps(result, allow_nan=False)
        assert not any(word in text for word in (SECRET, *WORDS[:4]))
        measured = {k: result[k] for k in ("utility", "memorization", "reference")}
        assert every_null(measured) == set(result["not_applicable"])
        assert all(result["not_applicable"].values())
        assert result["not_applicable"]["memorization.canary_exposure"] == "no canaries were planted"
        assert "memorization.extraction.p4_n90" in result["not_applicable"]  # no record is so long
    assert set(alone["not_applicable"]) >= {"reference.base_model", "memorization.membership.reference"}
    assert alone["memorization"]["membership_auc"] == alone["memorization"]["membership"]["loss"]["auc"]
    assert "reference.base_model.memorization.membership.reference" in with_base["not_applicable"]


def test_the_same_call_gives_the_same_result(memorised, tiny_tokenizer, sides):
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS)
    assert evaluator.evaluate(*sides) == evaluator.evaluate(*sides)


def test_the_base_model_is_run_once_for_all_runs_of_a_grid(
    memorised, tiny_model, tiny_tokenizer, sides, tmp_path: Path
):
    stages: list[str] = []

    def evaluate(base: nn.Module, train: Dataset = sides[0]) -> dict[str, Any]:
        stages.clear()
        return MemorizationEvaluator(
            memorised,
            tiny_tokenizer,
            base_model=base,
            spec=SPEC,
            settings=SETTINGS,
            base_scores=tmp_path / "base",
            progress=lambda stage, done, total: stages.append(stage),
        ).evaluate(train, sides[1])

    first = evaluate(tiny_model("llama"))
    assert list(dict.fromkeys(stages)) == ["train", "heldout", "base train", "base heldout"]
    assert evaluate(tiny_model("llama")) == first
    assert list(dict.fromkeys(stages)) == ["train", "heldout"]
    evaluate(tiny_model("llama", seed=3))
    assert "base heldout" in stages
    evaluate(tiny_model("llama"), sides[0].select(range(32)))
    assert "base train" in stages and "base heldout" not in stages


def test_a_model_that_saw_its_records_often_gives_them_all_away(tiny_model, tiny_tokenizer, sides):
    model = trained(tiny_model("llama"), sides[0], tiny_tokenizer, steps=120)
    evaluator = MemorizationEvaluator(
        model, tiny_tokenizer, base_model=tiny_model("llama"), spec=SPEC, settings=SETTINGS
    )
    memorization = evaluator.evaluate(*sides)["memorization"]
    for name in ("loss", "reference", "min_k", "min_k_plus_plus", "ez"):
        assert value(memorization, "membership", name, "auc") >= 0.99, name
    assert value(memorization, "extraction_rate") > 0.7


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_an_untouched_model_every_interval_covers_chance(tiny_model, tiny_tokenizer, sides, kind: str):
    evaluator = MemorizationEvaluator(
        tiny_model(kind), tiny_tokenizer, base_model=tiny_model(kind), spec=SPEC, settings=SETTINGS
    )
    result = evaluator.evaluate(*sides)
    for name, attack in result["memorization"]["membership"].items():
        assert attack["auc"]["low"] <= 0.5 <= attack["auc"]["high"], name
        assert attack["tpr_at_fpr_0.1"]["low"] <= 0.1, name
    heldout = result["reference"]["heldout"]
    for key in ("extraction_rate", "identifier_extraction_rate", "extraction_strength", "exact_memorization"):
        own, floor = result["memorization"][key], heldout[key]
        assert own["low"] <= floor["high"] and floor["low"] <= own["high"], key
    same = result["reference"]["base_model"]["memorization"]
    assert same["extraction_strength"] == result["memorization"]["extraction_strength"]


class Killed(Exception):
    pass


def test_a_killed_evaluation_goes_on_where_it_stopped(
    memorised, tiny_tokenizer, sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dpmed.memorization.scoring.PART_SECONDS", 0.0)
    settings = EvaluationSettings(prefix_tokens=[4], suffix_tokens=[4], bootstrap=50, batch_tokens=200)
    whole = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=settings).evaluate(*sides)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "heldout" and done * 2 > total:
            raise Killed

    def evaluate(progress: Any) -> dict[str, Any]:
        return MemorizationEvaluator(
            memorised,
            tiny_tokenizer,
            spec=SPEC,
            settings=settings,
            scores_dir=tmp_path / "scores",
            progress=progress,
        ).evaluate(*sides)

    with pytest.raises(Killed):
        evaluate(kill)
    names = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert [name for name in names if ".part-" in name and name.startswith("heldout-")]
    assert [".part-" in name for name in names if name.startswith("train-")] == [False]
    windows: list[int] = []
    hook = memorised.register_forward_pre_hook(
        lambda _m, _a, kwargs: windows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert evaluate(None) == whole
    hook.remove()
    assert 1 < sum(windows) < len(sides[1]) / 2 + 1  # what was left of the second side
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_a_masked_model_has_identifiers_and_membership_but_no_continuation(tiny_model, tiny_tokenizer, sides):
    spec = TaskSpec("masked_lm", max_length=48)
    base = tiny_model("bert", seed=1)
    evaluator = MemorizationEvaluator(tiny_model("bert"), tiny_tokenizer, base_model=base, spec=spec, settings=SETTINGS)
    result = evaluator.evaluate(*sides)
    assert result["memorization"]["extraction_rate"] is None
    for key in ("memorization.extraction_rate", "memorization.extraction", "reference.heldout.extraction"):
        assert "does not continue" in result["not_applicable"][key]
    assert value(result["memorization"], "identifier_extraction_rate") < 0.2
    for name in ("min_k", "min_k_plus_plus", "zlib", "ez"):
        assert value(result["memorization"], "membership", name, "auc") > 0
    for key in ("probabilistic_extraction", "extraction_strength"):
        assert "does not continue" in result["not_applicable"][f"memorization.{key}"]
    filled = result["memorization"]["fill_mask"]
    assert value(filled, "privacy") == 1 - value(filled, "identifiers", "top_1") > 0.8
    assert value(filled, "utility") == value(filled, "other_words", "top_1")
    assert value(filled, "other_words", "top_5") >= value(filled, "other_words", "top_1")
    assert value(result["reference"], "base_model", "memorization", "fill_mask", "privacy") > 0.8
    assert value(result["reference"], "heldout", "fill_mask", "utility") < 0.5
    assert result["memorization"]["membership_attack"] == "reference"


def test_a_classifier_has_membership_from_its_losses_alone(tiny_model, tiny_tokenizer, sides):
    spec = TaskSpec("classification", labels=("x", "y", "z"), max_length=48)
    labelled = [
        side.add_column("label", ["xyz"[i % 3] for i in range(len(side))], new_fingerprint=f"labelled{i}")
        for i, side in enumerate(sides)
    ]
    evaluator = MemorizationEvaluator(
        tiny_model("bert", "classification"), tiny_tokenizer, spec=spec, settings=SETTINGS
    )
    result = evaluator.evaluate(*labelled)
    assert 0 < value(result["memorization"], "membership", "loss", "auc") < 1
    assert result["memorization"]["membership_auc"] == result["memorization"]["membership"]["loss"]["auc"]
    for name in ("margin", "modified_entropy"):
        assert 0 < value(result["memorization"], "membership", name, "auc") < 1
    assert set(result["not_applicable"]) >= {
        "utility.perplexity",
        "utility.other_words_accuracy",
        "memorization.probabilistic_extraction",
        "memorization.extraction_strength",
        "memorization.exact_memorization",
        "memorization.fill_mask",
        "memorization.membership.ez",
        "memorization.membership.min_k_plus_plus",
        "reference.heldout.exact_memorization",
        "memorization.extraction_rate",
        "memorization.identifier_extraction_rate",
        "memorization.membership.min_k",
        "memorization.membership.reference",
        "reference.base_model",
        "reference.heldout.extraction_rate",
    }
    unlabelled = evaluator.evaluate(*sides)
    assert unlabelled["memorization"]["membership_auc"] is None
    for name in ("loss", "margin", "modified_entropy"):
        assert "label" in unlabelled["not_applicable"][f"memorization.membership.{name}"]
    json.dumps([result, unlabelled], allow_nan=False)


def test_few_records_and_other_lengths_are_warned_of(memorised, tiny_tokenizer):
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS)
    warnings = evaluator.evaluate(records(20, 0), records(40, 1, n_words=4))["warnings"]
    assert any("train: only 20 records" in w for w in warnings)
    assert any("differ in length" in w for w in warnings)
    assert not any("heldout: only" in w for w in warnings)
    matching = MemorizationEvaluator(
        memorised, tiny_tokenizer, spec=SPEC, settings=replace(SETTINGS, match_lengths=True)
    )
    with_others = concatenate_datasets([records(30, 1, n_words=4), records(10, 2)])
    matched = matching.evaluate(records(20, 0), with_others)
    assert not any("differ in length" in w for w in matched["warnings"])
    assert matched["memorization"]["membership_auc"]["n"] < 2 * 20


def dated(side: Dataset, *, year: int) -> Dataset:
    return side.add_column("date", [f"{year + i % 3}-05-01" for i in range(len(side))])  # pyright: ignore[reportCallIssue]


def test_other_dates_are_warned_of_and_can_be_matched(memorised, tiny_tokenizer):
    def warned(train: Dataset, heldout: Dataset, **options: bool) -> tuple[bool, Any]:
        evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=replace(SETTINGS, **options))
        result = evaluator.evaluate(train, heldout)
        assert "2019" not in json.dumps(result)  # no date of anybody
        text = (
            "differ in date: membership attacks may tell the two sides apart by that alone; set evaluation.match_dates"
        )
        return any(text in w for w in result["warnings"]), result

    train = dated(records(30, 0), year=2019)
    assert warned(train, dated(records(30, 1), year=2021))[0]  # they share one year of three
    assert not warned(train, dated(records(30, 1), year=2019))[0]
    assert not warned(records(30, 0), records(30, 1))[0]
    told, matched = warned(train, dated(records(30, 1), year=2021), match_dates=True)
    assert not told and matched["memorization"]["membership_auc"]["n"] == 20  # ten of 2021 on each side
    _, none = warned(train, dated(records(30, 1), year=2030), match_dates=True)
    assert none["memorization"]["membership_auc"] is None
    assert "same length or date" in none["not_applicable"]["memorization.membership_auc"]
    with pytest.raises(InputError, match=r"\(data\.date\)"):
        warned(train, records(30, 1), match_dates=True)


def test_an_auc_below_one_half_is_not_called_private(memorised, tiny_tokenizer, sides):
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS)
    warnings = evaluator.evaluate(sides[1], sides[0])["warnings"]  # the sides swapped
    assert any("does not mean more privacy" in w for w in warnings)


def test_at_most_so_many_records_by_whole_patients(memorised, tiny_tokenizer, sides):
    settings = EvaluationSettings(prefix_tokens=[4], suffix_tokens=[4], bootstrap=50, max_records=11)
    result = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=settings).evaluate(*sides)
    for side in ("train", "heldout"):
        assert (result["counts"][side]["n_records"], result["counts"][side]["n_units"]) == (10, 5)


def test_a_sample_of_units_is_whole_random_and_stable():
    units = [f"u{i % 10}" for i in range(50)]
    rows = units_sample(units, 23, seed=0)
    assert len(rows) == 20
    assert rows == sorted(rows) == units_sample(units, 23, seed=0)
    assert {i for i, u in enumerate(units) if u in {units[r] for r in rows}} == set(rows)
    assert rows != units_sample(units, 23, seed=1)
    assert len(units_sample(units, 2, seed=0)) == 5  # one patient at least


def test_rare_words_are_scored_as_indirect_identifiers_when_asked(memorised, tiny_tokenizer, sides):
    rare = Dataset.from_list([*sides[0], {**sides[0][0], "text": "quixotic zephyr", "unit": "u", "identifiers": []}])
    settings = EvaluationSettings(prefix_tokens=[4], suffix_tokens=[4], bootstrap=50, k=2)
    result = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=settings).evaluate(rare, sides[1])
    assert result["memorization"]["identifier_extraction_indirect"]["n"] == 1  # the first word has nothing before it
    assert result["counts"]["train"]["n_identifiers_not_evaluable"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix_tokens": []},
        {"suffix_tokens": [0]},
        {"fpr": [0.0]},
        {"min_k": 0.0},
        {"batch_tokens": 0},
        {"bootstrap": 0},
        {"max_records": 0},
        {"temperature": 0.0},
        {"top_k": 0},
        {"tries": [0]},
        {"tries": []},
        {"probability": [1.0]},
        {"probability": []},
    ],
)
def test_settings_that_measure_nothing_are_refused(tiny_model, tiny_tokenizer, wrong: dict[str, Any]):
    with pytest.raises(InputError, match=f"evaluation.{next(iter(wrong))}"):
        MemorizationEvaluator(tiny_model("gpt2"), tiny_tokenizer, settings=EvaluationSettings(**wrong))


def test_an_empty_side_is_refused(memorised, tiny_tokenizer, sides):
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS)
    with pytest.raises(InputError, match="heldout: no records"):
        evaluator.evaluate(sides[0], sides[1].select([]))


def test_a_text_on_both_sides_is_refused_with_its_count(memorised, tiny_tokenizer, sides):
    evaluator = MemorizationEvaluator(memorised, tiny_tokenizer, spec=SPEC, settings=SETTINGS)
    copies = [{**row, "text": f"  {row['text'].upper()}"} for row in sides[0].select(range(3))]
    with pytest.raises(InputError, match="heldout: 3 of 35 records have a text that is also in train") as caught:
        evaluator.evaluate(sides[0], Dataset.from_list([*sides[1], *copies]))
    assert not any(word in str(caught.value).casefold() for word in ("heart", "lungs", "fever", SECRET.casefold()))


def test_a_context_without_room_for_prefix_and_suffix_is_refused(tiny_model, tiny_tokenizer):
    settings = EvaluationSettings(prefix_tokens=[10, 60], suffix_tokens=[69])
    with pytest.raises(InputError, match=r"prefix_tokens 60 .*suffix_tokens 69 .* context of 128 tokens"):
        MemorizationEvaluator(tiny_model("gpt2"), tiny_tokenizer, settings=settings)
    masked = TaskSpec("masked_lm", max_length=48)
    MemorizationEvaluator(tiny_model("bert"), tiny_tokenizer, spec=masked, settings=settings)  # nothing is continued


def test_windows_longer_than_the_context_are_refused(tiny_model, tiny_tokenizer, sides):
    model = tiny_model("gpt2", n_positions=20)
    settings = EvaluationSettings(prefix_tokens=[4], suffix_tokens=[4], bootstrap=50)
    with pytest.raises(InputError, match=r"data.max_length: a window has \d+ tokens, the model can see 20"):
        MemorizationEvaluator(model, tiny_tokenizer, spec=SPEC, settings=settings).evaluate(*sides)


def test_the_tokenizer_of_another_model_is_refused(memorised, tiny_model, tiny_tokenizer, sides):
    small = tiny_model("llama", vocab_size=290)
    with pytest.raises(InputError, match=r"token id \d+ where the model knows 290 tokens.*another model"):
        MemorizationEvaluator(small, tiny_tokenizer, spec=SPEC, settings=SETTINGS).evaluate(*sides)
    with pytest.raises(InputError, match="where the base model knows 290 tokens"):
        MemorizationEvaluator(memorised, tiny_tokenizer, base_model=small, spec=SPEC, settings=SETTINGS).evaluate(
            *sides
        )
    with pytest.raises(InputError, match="no tokenizer"):
        MemorizationEvaluator(memorised, None, spec=SPEC, settings=SETTINGS)  # pyright: ignore[reportArgumentType]
