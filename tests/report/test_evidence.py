"""The page of a release gate: every row with its numbers, nothing that was not found, nothing that is loaded."""

from __future__ import annotations

import copy
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report.made_up import HOSTILE_NAME, make_evaluation
from report.pages import Page

from dpmed import cli
from dpmed.errors import InputError
from dpmed.evidence import CANNOT_SHOW, VERDICTS, overall
from dpmed.memorization.intervals import NotApplicable
from dpmed.recipe import ReleaseSection
from dpmed.release import decide
from dpmed.report import evidence as page
from dpmed.report.evidence import build_evidence_page
from dpmed.report.evidence_rows import rows_of
from dpmed.report.evidence_wording import CHECKS, NO_INTERVAL, WORDS, digits_for, figure, sentence_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "release.md"
STAGES = ("as_released", "bfloat16", "int8", "int4", "relearned", "utility")
Json = dict[str, Any]


def measured(value: float, low: float | None, high: float | None, n: int = 90) -> Json:
    return {"value": value, "low": low, "high": high, "n": n}


def make_evidence(rows: list[Json], **changes: Any) -> Json:
    """Evidence as the gate writes it, of these rows."""
    return {
        "verdict": overall(rows),
        "targeted": {"identifiers": {"known": {"NAME": 41, "DATE": 12}}, "n_records": 39, "n_units": 13},
        "tested": [row for row in rows if row["verdict"] != "not_tested"],
        "not_tested": [row for row in rows if row["verdict"] == "not_tested"],
        "thresholds": vars(ReleaseSection()),
        "floor": "models/base",
        "before": "models/tuned",
        "weights": {"path": "runs/sani/model", "sha256": "ab" * 32},
        "task": "causal_lm",
        "n_heldout": {"n_records": 18, "n_units": 6},
        "seeds": {"training": 3, "relearning": 5},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        **changes,
    }


def usual_rows() -> list[Json]:
    rows = [decide(stage, "identifier_extraction_above_floor", measured(0.1, 0.05, 0.2), 0.01) for stage in STAGES[:5]]
    rows += [decide("int4", "extraction_rate_above_floor", measured(0.0, -0.1, 0.1), 0.01)]
    rows += [decide("relearned_public", "relearning", NotApplicable("no public text was named"), 0.02)]
    return [*rows, decide("utility", "perplexity_loss", measured(-0.01, -0.02, 0.0), 0.02)]


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[Json]:
    """Rows by the gate's own rule: figures near their threshold too, bounds that are missing, reasons."""
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        stage = draw(st.sampled_from([*STAGES, "some_later_stage"]))
        check = draw(st.sampled_from([*CHECKS, "some_later_check"]))
        threshold = draw(st.sampled_from([0.01, 0.02, 0.55, 1.0]))
        near = st.floats(-1e-6, 1e-6).map(lambda offset, at=threshold: at + offset)
        low, value, high = sorted(draw(st.tuples(*[near | st.floats(-1, 1) | st.floats(-1e9, 1e9)] * 3)))
        bounds = draw(st.sampled_from([(low, high), (low, None), (None, high), (None, None)]))
        found: Any = measured(value, *bounds, n=draw(st.integers(1, 9999)))
        rows.append(decide(stage, check, draw(st.sampled_from([found, NotApplicable("it <could> not be")])), threshold))
    return rows


def read(evidence: Json, folder: Path) -> Page:
    return Page(build_evidence_page(evidence, folder / "evidence.html").read_text(encoding="utf-8"))


def shown_rows(found: Page) -> list[list[str]]:
    """The rows of all tables of tests, without heads."""
    return [row for table in found.tables if table[0][-1] == "Verdict" for row in table[1:]]


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("points", "").replace("%", ""))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=drawn_rows())
def test_every_row_is_there_and_no_number_is_without_interval_or_reason(rows: list[Json], tmp_path: Path) -> None:
    shown = shown_rows(read(make_evidence(rows), tmp_path))
    assert len(shown) == len(rows)
    left = list(shown)
    for row in rows:
        name = CHECKS[row["check"]].name if row["check"] in CHECKS else row["check"].replace("_", " ")
        n = "not measured: it <could> not be" if row["value"] is None else str(row["n"])
        mine = [r for r in left if r[0].startswith(name) and n in r and r[-1].endswith(WORDS[row["verdict"]])]
        assert mine
        left.remove(mine[0])
    for cells in shown:
        if len(cells) == 4:
            assert cells[1].startswith("not measured: it") and cells[-1].endswith("not tested")
            continue
        _, value, interval, _, threshold, verdict = cells
        number(value)
        if not interval.startswith("["):
            assert interval in {NO_INTERVAL, *(row["reason"] for row in rows)} and verdict.endswith("not shown")
            continue
        low, high = (None if b == "no limit" else number(b) for b in interval.strip("[]").split(", "))
        told = "passed" if high is not None and high <= number(threshold) else "not shown"
        told = "failed" if told != "passed" and low is not None and low > number(threshold) else told
        assert verdict.endswith(told)  # who compares the printed numbers comes to the gate's verdict


@given(threshold=st.floats(-2, 2), offset=st.floats(-1e-3, 1e-3), unit=st.sampled_from(["points", "percent", "plain"]))
def test_digits_keep_a_bound_on_its_side_of_the_threshold(threshold: float, offset: float, unit: Any) -> None:
    bound = threshold + offset
    digits = digits_for(threshold, [bound, None], unit)
    printed, limit = (number(figure(x, digits, unit, signed=False)) for x in (bound, threshold))
    assert digits == 15 or (printed <= limit) == (bound <= threshold)
    if digits > (3 if unit == "plain" else 1):
        fewer = [number(figure(x, digits - 1, unit, signed=False)) for x in (bound, threshold)]
        assert (fewer[0] <= fewer[1]) != (bound <= threshold)


def test_the_page_is_the_same_each_time_private_and_loads_nothing(tmp_path: Path) -> None:
    evidence = make_evidence(usual_rows())
    first, second = (build_evidence_page(evidence, tmp_path / name).read_text("utf-8") for name in ("a", "b"))
    assert first == second and len(first.encode()) < 300_000
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    found = Page(first)
    loads = [value for key, value in found.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    assert loads and all(value.startswith("#") for value in loads)
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(found.tags)
    assert "http" not in first and "@import" not in first and not [k for k, _ in found.attributes if k.startswith("on")]


def test_tables_have_captions_and_heads_and_links_lead_somewhere(tmp_path: Path) -> None:
    found = read(make_evidence(usual_rows()), tmp_path)
    assert found.tags.count("table") == found.tags.count("caption") == len(found.tables)
    assert found.tags.count("th") == sum(key == "scope" for key, _ in found.attributes)
    ids = [value for key, value in found.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for key, value in found.attributes if key == "href"}
    wanted |= {value for key, value in found.attributes if key == "aria-labelledby"}
    assert wanted and wanted <= set(ids)


def test_the_page_answers_what_the_officer_asks(tmp_path: Path) -> None:
    rows = usual_rows()
    text = " ".join(read(make_evidence(rows), tmp_path).text.split())
    start = text[: text.index("What was tested Each")]
    for expected in (
        "Do not release these weights: 5 of the 7 tests that could be made failed.",
        "It does not mean that",
        "41 NAME, 12 DATE in 39 records of 13 patients",
        "up to +20.0 points",
        "+10.0 points [+5.0, +20.0] against a threshold of 1.0 points (5 stages, worst as released)",
        "After relearning on public text: 1",
        "no test is a guarantee",
    ):
        assert expected in start
    for expected in ("no public text was named", "ab" * 32, "runs/sani/model", "models/tuned", "models/base",
                     "training 3", "torch 2.13.0", "release.max_membership_auc", "50 steps on the records of 10 %",
                     "95 % interval", "Percentage points"):  # fmt: skip
        assert expected in text[len(start) :]
    passed = make_evidence([decide("int8", "membership_auc", measured(0.5, 0.45, 0.54), 0.55)])
    assert "Passed: the one test that could be made stayed within" in read(passed, tmp_path).text
    assert "Look at this first" not in text


def test_nothing_measured_is_nothing_shown(tmp_path: Path) -> None:
    found = read(make_evidence([]), tmp_path)
    assert "nothing could be tested, so nothing is shown" in found.text and "Not drawn" in found.text
    bare = {"verdict": "not_shown", "tested": [], "not_tested": []}
    assert "none was given" in read(bare, tmp_path).text


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"pass": 3}, "Passed: all 3 tests that could be made stayed within the thresholds."),
        ({"pass": 1, "not_tested": 1}, "and 1 test could not be made."),
        ({"pass": 3, "fail": 1, "not_shown": 1}, "1 of the 5 tests that could be made failed."),
        ({"pass": 3, "not_shown": 2}, "no test failed, but 2 of the 5 tests"),
        ({"not_tested": 2}, "nothing could be tested"),
    ],
)
def test_the_verdict_in_one_sentence(counts: dict[str, int], expected: str) -> None:
    sentence = sentence_of(overall([{"verdict": name} for name, n in counts.items() for _ in range(n)]), counts)
    assert expected in sentence
    assert sentence.startswith("Do not release") != sentence.startswith("Passed")


def test_a_reason_for_a_missing_interval_stands_in_its_place(tmp_path: Path) -> None:
    row = decide("utility", "f1_loss", measured(0.0, None, None), 0.02)
    found = read(make_evidence([row | {"reason": "too few [patients]"}]), tmp_path)
    assert shown_rows(found)[0][2] == "too few [patients]" and "0.000 (too few [patients])" in found.text


def test_settings_that_let_more_pass_are_told(tmp_path: Path) -> None:
    lax = vars(ReleaseSection(max_membership_auc=0.9, quantise=[8], relearn_steps=2, max_utility_loss=0.01))
    text = read(make_evidence(usual_rows(), thresholds=lax), tmp_path).text
    told = text[text.index("Look at this first") : text.index("What was targeted?")]
    assert "max_membership_auc 0.9 (default 0.55)" in told and "relearn_steps 2 (default 50)" in told
    assert "quantise 8 (default 8, 4)" in told and "max_utility_loss" not in told


def test_the_chart_falls_back_to_heldout_patients_where_there_is_no_floor(tmp_path: Path) -> None:
    rows = [decide("int8", f"extraction_rate_above_{other}", figure, 0.01) for other, figure in
            (("floor", NotApplicable("no floor was given")), ("heldout", measured(0.1, 0.0, 0.2)))]  # fmt: skip
    text = read(make_evidence(rows, floor=None), tmp_path).text
    assert "Leakage above held-out patients" in text and "none was given" in text
    assert "Leakage above the floor model" not in text


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    rows = [decide(HOSTILE_NAME, check, measured(0.1, 0.0, 0.2), 0.01) for check in (HOSTILE_NAME, *list(CHECKS)[:4])]
    rows.append(decide(HOSTILE_NAME, "relearning", NotApplicable(HOSTILE_NAME), 0.01))
    evidence = make_evidence(
        rows,
        floor=HOSTILE_NAME,
        before=HOSTILE_NAME,
        weights={"path": HOSTILE_NAME, "sha256": HOSTILE_NAME},
        targeted={"identifiers": {HOSTILE_NAME: {HOSTILE_NAME: 4}}, "n_records": HOSTILE_NAME, "n_units": 1},
        thresholds={HOSTILE_NAME: HOSTILE_NAME, "relearn_steps": HOSTILE_NAME, "relearn_share": HOSTILE_NAME},
        versions={HOSTILE_NAME: HOSTILE_NAME},
        seeds={HOSTILE_NAME: HOSTILE_NAME},
        task=HOSTILE_NAME,
    )
    target = build_evidence_page(evidence, tmp_path / "evidence.html")
    found = Page(target.read_text(encoding="utf-8"))
    assert "script" not in found.tags and "<script" not in target.read_text(encoding="utf-8")
    assert found.text.count(HOSTILE_NAME) >= 15
    assert HOSTILE_NAME not in dict(found.attributes).get("id", "")


def changed(path: list[Any], value: Any) -> Json:
    evidence: Any = copy.deepcopy(make_evidence(usual_rows()))
    at = evidence
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return evidence


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["verdict"], "pass"),
        (["verdict"], HOSTILE_NAME),
        (["tested"], {"a": 1}),
        (["not_tested"], None),
        (["tested", 0], "row"),
        (["tested", 0, "verdict"], "pass"),
        (["tested", 0, "verdict"], "not_tested"),
        (["tested", 0, "low"], 0.0),
        (["tested", 0, "value"], None),
        (["tested", 0, "threshold"], float("nan")),
        (["tested", 0, "threshold"], "0.5"),
        (["tested", 0, "verdict"], ["fail"]),
        (["not_tested", 0, "value"], 0.1),
    ],
)
def test_evidence_that_was_changed_or_is_none_is_refused(path: list[Any], value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evidence\.html: .*dpmed sanitize") as error:
        build_evidence_page(changed(path, value), tmp_path / "evidence.html")
    assert "\n" not in str(error.value) and HOSTILE_NAME not in str(error.value)
    assert list(tmp_path.iterdir()) == []


KEYS = ("identifiers", "n_units", "path", "known", "quantise", "relearn_share", "relearn_steps", "max_membership_auc")
TREES = st.recursive(
    st.none() | st.booleans() | st.text() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
)


@settings(max_examples=20, deadline=None)
@given(tree=TREES)
@pytest.mark.parametrize("key", ["targeted", "thresholds", "floor", "weights", "n_heldout", "seeds", "versions"])
def test_whatever_stands_beside_the_rows_is_no_reason_to_fail(key: str, tree: Any) -> None:
    evidence = make_evidence([], **{key: tree})
    text = page._page(evidence, rows_of(evidence, Path("evidence.json")))
    assert text.rstrip().endswith("</html>") and Page(text) is not None


def test_the_docs_say_the_same_limits_and_rules() -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = text[text.index("## What it cannot show") :].split("\n- ")[1:]
    assert tuple(" ".join(item.split()) for item in listed) == CANNOT_SHOW
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", text[text.index("## Verdicts") :], re.MULTILINE)) == VERDICTS


# --- dpmed report -----------------------------------------------------------------------------------------------------


def write_evidence(folder: Path, evidence: Json, *, run: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "evidence.json").write_text(json.dumps(evidence))
    if run:
        (folder / "run.json").write_text(json.dumps({"name": "s", "method": "sani", "status": "finished"}))
        (folder / "evaluation.json").write_text(json.dumps(make_evaluation(0.6, 0.02, 0.5, 0)))
    return folder


def test_report_makes_the_page_again_beside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence, out = make_evidence(usual_rows()), tmp_path / "out"
    folder = write_evidence(tmp_path / "s", evidence, run=True)
    assert cli.main(["report", str(folder), "--output_dir", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out / "report.html") and told["evidence"] == [str(out / "evidence.html")]
    assert (out / "evidence.html").read_text() == build_evidence_page(evidence, tmp_path / "again").read_text()
    assert (out / "report.html").is_file()


def test_report_of_evidence_alone_and_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_evidence(tmp_path / name, make_evidence(usual_rows())) for name in ("a/gate", "b/gate", "c")]
    arguments = ["report", *map(str, [*folders, folders[0]]), "--output_dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"evidence-gate.html", "evidence-gate-2.html", "evidence-c.html"}
    assert "evidence-gate-2.html" in capsys.readouterr().out


def test_report_of_changed_evidence_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_evidence(tmp_path / "s", changed(["verdict"], "pass"), run=True)
    assert cli.main(["report", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    assert "evidence.json: the verdict is not the one that its rows give" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_names_the_attack_the_tries_and_what_the_models_were(tmp_path: Path) -> None:
    area = decide("as_released", "membership_auc", measured(0.8, 0.7, 0.9), 0.55)
    tries = decide("as_released", "probabilistic_extraction_above_floor", measured(0.2, 0.1, 0.3), 0.02)
    rows = [*usual_rows(), area | {"attack": "min_k_plus_plus", "n_attacks": 6}, tries | {"tries": "n1000_p0.1"}]
    told = make_evidence(rows, sha256={"before": "cd" * 32, "floor": None})
    page = build_evidence_page(told, tmp_path / "evidence.html").read_text(encoding="utf-8")
    assert "strongest of 6 attacks: min k plus plus" in page
    assert "1000 tries, with a probability of at least 0.1" in page
    assert "cd" * 32 in page and "not recorded" in page
