"""`build_evidence_page`: what the release gate found, as one page for who decides on the release.

The page says what was targeted, what was tested, what remains and what was not tested. It holds what stands in
`evidence.json`: types, counts, figures and paths, no text of records and no identifier's value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from dpmed.evidence import CANNOT_SHOW, EVIDENCE, EVIDENCE_PAGE, VERDICTS
from dpmed.recipe import ReleaseSection
from dpmed.recipe_help import attribute_texts
from dpmed.report import evidence_wording as wording
from dpmed.report.evidence_figure import draw_leaks
from dpmed.report.evidence_rows import EvidenceRow, mapping, rows_of
from dpmed.report.page import render
from dpmed.report.points import finite, lookup, read_json
from dpmed.report.verdicts import Card
from dpmed.runs import write_text

_ATTACK = ("relearn_share", "relearn_steps", "relearn_learning_rate")


def build_evidence_page(evidence: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a release gate: one private file that loads nothing and runs no script.

    Args:
        evidence: what `dpmed.release.release_gate` returns, or its JSON.
        path: of the page; a page there is replaced.

    Returns: `path`.
    Raises: InputError if this is no evidence, or if its verdict is not the one that its rows give.
    """
    tests = rows_of(evidence, path)
    write_text(path, _page(evidence, tests))
    return path


def evidence_pages(folders: Sequence[Path], output_dir: Path) -> dict[Path, str]:
    """The page of each folder that holds an `evidence.json`, by the path where it belongs; nothing is written.

    Returns: `evidence.html` for a single one; for several, `evidence-NAME.html` by the folder's name, with a number
        where two have the same.
    Raises: InputError if one cannot be read or is no evidence.
    """
    distinct = {folder.resolve(): folder for folder in folders if (folder / EVIDENCE).is_file()}
    stem, dot, suffix = EVIDENCE_PAGE.partition(".")
    made: dict[Path, str] = {}
    for resolved, folder in distinct.items():
        label = "" if len(distinct) == 1 else f"-{resolved.name}"
        numbers = chain([""], (f"-{n}" for n in count(2)))
        names = (output_dir / f"{stem}{label}{number}{dot}{suffix}" for number in numbers)
        path = next(name for name in names if name not in made)
        evidence = read_json(folder / EVIDENCE)
        made[path] = _page(evidence, rows_of(evidence, folder / EVIDENCE))
    return made


def _page(evidence: Mapping[str, Any], tests: Sequence[EvidenceRow]) -> str:
    counts = Counter(test.verdict for test in tests)
    verdict, settings = str(evidence["verdict"]), mapping(evidence, "thresholds")
    stages = _stages(tests, settings)
    chart = draw_leaks(tests)
    return render(
        "evidence.html.j2",
        verdict=verdict,
        sign=wording.SIGNS[verdict],
        sentence=wording.sentence_of(verdict, counts),
        meaning=wording.MEANING[verdict],
        facts=_facts(evidence),
        cards=_cards(evidence, tests, counts, len(stages)),
        worst=_worst(tests),
        laxer=_laxer(settings),
        limits=[wording.plain_limit(limit) for limit in CANNOT_SHOW],
        chart=chart,
        stages=stages,
        verdicts=[(name, wording.SIGNS[name], wording.WORDS[name], rule) for name, rule in VERDICTS.items()],
        targets=_targets(evidence),
        targeted=mapping(evidence, "targeted"),
        untested=[test for test in tests if test.verdict == "not_tested"],
        models=_models(evidence),
        settings=_settings(settings),
        seeds=sorted((str(name), str(seed)) for name, seed in mapping(evidence, "seeds").items()),
        versions=[(str(name), str(version)) for name, version in mapping(evidence, "versions").items()],
        reading=wording.READING,
    )


def _facts(evidence: Mapping[str, Any]) -> list[str]:
    targeted, heldout = mapping(evidence, "targeted"), mapping(evidence, "n_heldout")
    named = (
        (evidence.get("task"), "task {}"),
        (targeted.get("n_units"), "{} targeted patients"),
        (targeted.get("n_records"), "{} targeted records"),
        (heldout.get("n_units"), "{} held-out patients"),
        (heldout.get("n_records"), "{} held-out records"),
    )
    return [form.format(value) for value, form in named if value is not None]


def _stages(tests: Sequence[EvidenceRow], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages in order; what a measure means stands where it comes first."""
    found, explained = [], set[str]()
    for number, stage in enumerate(dict.fromkeys(test.stage for test in tests), 1):
        mine = [test for test in tests if test.stage == stage]
        name, first = wording.stage_words(stage, settings)
        counts = Counter(test.verdict for test in mine)
        rows = [(test, "" if test.check in explained else test.words.meaning) for test in mine]
        explained |= {test.check for test in mine}
        found.append({"id": f"stage-{number}", "name": name, "first": first, "rows": rows}
                     | {"counts": [(verdict, counts.get(verdict, 0)) for verdict in VERDICTS]})  # fmt: skip
    return found


def _worst(tests: Sequence[EvidenceRow]) -> list[tuple[EvidenceRow, str]]:
    """Of each measure the test that ended worst, and in how many stages it ended so; failed ones first."""
    found = []
    for verdict in ("fail", "not_shown", "pass"):
        for check in dict.fromkeys(test.check for test in tests):
            stages = [test for test in tests if test.check == check and test.verdict == verdict]
            if stages and check not in {test.check for test, _ in found}:
                worst = max(stages, key=_upper)
                where = _in_text(worst.stage_name)
                found.append((worst, where if len(stages) == 1 else f"{len(stages)} stages, worst {where}"))
    return found


def _laxer(settings: Mapping[str, Any]) -> list[str]:
    """Settings that let more pass than the defaults of this version do."""
    defaults = vars(ReleaseSection())
    return [
        f"release.{key} {_plain(value)} (default {_plain(defaults[key])})"
        for key, value in settings.items()
        if key in defaults and _is_laxer(key, value, defaults[key])
    ]


def _is_laxer(key: str, value: Any, default: Any) -> bool:
    """A higher limit, a weaker relearning attack, or a number of bits that is not tried."""
    if isinstance(default, list):
        return not all(item in (value if isinstance(value, list) else []) for item in default)
    here, there = finite(value), finite(default)
    if here is None or there is None:
        return False
    return here > there if key.startswith("max_") else key in _ATTACK and here < there


def _cards(
    evidence: Mapping[str, Any], tests: Sequence[EvidenceRow], counts: Mapping[str, int], n_stages: int
) -> list[Card]:
    """What was targeted, what was tested, what remains, what was not tested."""
    targeted = mapping(evidence, "targeted")
    kinds: Counter[str] = Counter()
    for _, kind, n in _targets(evidence):
        kinds[kind] += n
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(6)) + (" …" if len(kinds) > 6 else "")
    where = f"in {targeted.get('n_records', '?')} records of {targeted.get('n_units', '?')} patients"
    made, left = len(tests) - counts.get("not_tested", 0), counts.get("not_tested", 0)
    ended = [f"{counts.get(name, 0)} {wording.WORDS[name]}" for name in ("pass", "fail", "not_shown")]
    missing = Counter(test.stage_name for test in tests if test.verdict == "not_tested")
    return [
        Card("What was targeted?", f"{sum(kinds.values())} spans", [text for text in (listed, where) if text]),
        Card("What was tested?", f"{wording.counted(made, 'test')}, {wording.counted(n_stages, 'stage')}", ended),
        _remaining(tests),
        Card("What was not tested?", wording.counted(left, "test"), [f"{name}: {n}" for name, n in missing.items()]),
    ]


def _remaining(tests: Sequence[EvidenceRow]) -> Card:
    """The largest upper limit of each measure of leakage over all stages; the first that was measured is the answer."""
    card = Card("What remains?", "Not measured")
    for check in ("identifier_extraction", "extraction_rate"):
        for reference in ("floor", "heldout"):
            found = [t for t in tests if t.check == f"{check}_above_{reference}" and t.value is not None]
            if found:
                worst = max(found, key=_upper)
                if not card.details:
                    card = Card(card.question, f"{worst.shown} at worst" if worst.high is None else _up_to(worst))
                card.details.append(f"{worst.words.name}: {worst.figure}, n {worst.n}; {_in_text(worst.stage_name)}")
                break
    return card


def _upper(test: EvidenceRow) -> float:
    return float("inf") if test.high is None else test.high


def _up_to(test: EvidenceRow) -> str:
    digits = wording.digits_for(test.threshold, (test.low, test.high), test.words.unit)
    assert test.high is not None
    return (
        f"up to {wording.figure(test.high, digits, test.words.unit, signed=True)}{wording.unit_text(test.words.unit)}"
    )


def _in_text(name: str) -> str:
    return name[0].lower() + name[1:]


def _targets(evidence: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(how it was found, type, number of spans), most first."""
    found = []
    for source, kinds in mapping(mapping(evidence, "targeted"), "identifiers").items():
        for kind, n in (kinds if isinstance(kinds, Mapping) else {}).items():
            count = finite(n)
            if count is not None:
                found.append((wording.SOURCES.get(str(source), str(source)), str(kind), int(count)))
    return sorted(found, key=lambda row: (-row[2], row))


def _models(evidence: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(role, path, SHA-256) of the three models."""
    retrain = lookup(dict(evidence), "thresholds.clean_retrain")
    floor = "Floor: clean retrain" if retrain else "Floor: before fine-tuning"
    weights, others = mapping(evidence, "weights"), mapping(evidence, "sha256")
    before, of_floor = (str(others.get(role) or "not recorded") for role in ("before", "floor"))
    return [
        ("Sanitised weights", str(weights.get("path", "not recorded")), str(weights.get("sha256", "not recorded"))),
        ("Checkpoint before sanitising", str(evidence.get("before") or "not recorded"), before),
        (floor, str(evidence.get("floor") or "none was given"), of_floor),
    ]


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, meaning) of the recipe's release section."""
    texts = attribute_texts()
    return [(f"release.{key}", _plain(value), texts.get(f"release.{key}", "")) for key, value in settings.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
