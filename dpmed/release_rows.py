"""From figures to verdicts: what the release gate makes of an evaluation.

A verdict is decided on a 95 % interval: `pass` if its upper limit is within the threshold, `fail` if its lower limit
exceeds it, else `not_shown`, which is not a pass. What could not be tested is `not_tested`, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import norm

from dpmed.evidence import Row
from dpmed.memorization.intervals import Z_95, Measure, NotApplicable, independent_difference
from dpmed.memorization.prompt_probes import PROBES

NO_FLOOR = "no floor was given: name the model before fine-tuning (model.base) or a clean retrain"
NO_INTERVAL = "too few patients for an interval"
NO_ATTACK = "no attack could be made"
NO_LIMIT = "release.max_membership_auc is null"
ROW_KEYS = ("extraction_rate", "identifier_extraction")


def decide(stage: str, check: str, figure: Measure | Mapping[str, Any] | NotApplicable, threshold: float) -> Row:
    """The verdict on one figure of which more is worse.

    Args:
        stage: what was done to the model first.
        check: what was measured.
        figure: a `Measure`, or its JSON; a bound that is not finite, or null, shows nothing.
        threshold: the most that is allowed.
    """
    row: Row = {"stage": stage, "check": check, "threshold": threshold, "reason": None}
    if isinstance(figure, NotApplicable):
        return {**row, **dict.fromkeys(("value", "low", "high", "n")), "verdict": "not_tested", "reason": figure.reason}
    found = figure.to_json() if isinstance(figure, Measure) else figure
    low, high = found["low"], found["high"]
    verdict = "not_shown"
    if high is not None and high <= threshold:
        verdict = "pass"
    elif low is not None and low > threshold:
        verdict = "fail"
    elif low is None or high is None:
        row["reason"] = NO_INTERVAL
    return {**row, **{key: found[key] for key in ("value", "low", "high", "n")}, "verdict": verdict}


def leak_rows(
    stage: str,
    found: Mapping[str, Any],
    limits: tuple[float, float],
    max_auc: float | None,
    max_auc_above_floor: float,
    max_in_tries: float,
) -> list[Row]:
    """The verdicts on one evaluation: both rates above the floor and above held-out records, and membership.

    Args:
        stage: what was done to the model first.
        found: result of `MemorizationEvaluator.evaluate` with the floor as base model.
        limits: thresholds of (p, n) extraction and of identifier extraction.
        max_auc: threshold of the strongest membership attack; None does not test it.
        max_auc_above_floor: threshold of the strongest one above the floor's, of those that need no reference model.
        max_in_tries: threshold of the records that are found in many tries, above the floor.
    """
    memorization, heldout = found["memorization"], found["reference"]["heldout"]
    reasons, above, rows = found["not_applicable"], memorization["minus_base"], list[Row]()
    for name, limit in zip(ROW_KEYS, limits, strict=True):
        figure = None if above is None else above[name] if name == "extraction_rate" else above[name]["all"]
        key = "memorization.minus_base" + ("" if above is None else f".{name}")
        why = NO_FLOOR if above is None else reasons.get(key) or reasons.get(f"{key}.all", "")
        rows.append(decide(stage, f"{name}_above_floor", figure or NotApplicable(why), limit))
        rate = name if name == "extraction_rate" else "identifier_extraction_rate"
        why = reasons.get(f"memorization.{rate}") or reasons.get(f"reference.heldout.{rate}", "")
        difference = unpaired_difference(memorization[rate], heldout[rate])
        rows.append(decide(stage, f"{name}_above_heldout", difference or NotApplicable(why), limit))
    areas = {name: attack["auc"] for name, attack in memorization["membership"].items() if attack}
    base = found["reference"]["base_model"]
    of_floor = {} if base is None else base["memorization"]["membership"]
    rows.append(tries_row(stage, memorization, base, reasons, max_in_tries))
    above_floor = {
        name: unpaired_difference(area, of_floor[name]["auc"]) for name, area in areas.items() if of_floor.get(name)
    }
    return [
        *rows,
        decide(stage, "membership_auc", NotApplicable(NO_LIMIT), 1.0)
        if max_auc is None
        else membership_row(stage, areas, max_auc),
        membership_row(stage, above_floor, max_auc_above_floor, check="membership_auc_above_floor", floor=base),
    ]


def tries_row(
    stage: str,
    memorization: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    reasons: Mapping[str, str],
    limit: float,
) -> Row:
    """The verdict on records that stand in the most tries with the least probability that the recipe names.

    What greedy text no longer shows may still be likely: a model that only lowers what it knows below the first place
    gives it to an attacker who draws often. The difference is taken as if the two models had different records, which
    widens the interval.
    """
    check, own = "probabilistic_extraction_above_floor", memorization.get("probabilistic_extraction")
    if own is None:
        why = reasons.get("memorization.probabilistic_extraction", "no record is long enough")
        return decide(stage, check, NotApplicable(why), limit)
    if base is None:
        return decide(stage, check, NotApplicable(NO_FLOOR), limit)
    strictest = max(own, key=_tries)
    figure = unpaired_difference(own[strictest], base["memorization"]["probabilistic_extraction"][strictest])
    why = reasons.get(f"memorization.probabilistic_extraction.{strictest}", "no record is long enough")
    return decide(stage, check, figure or NotApplicable(why), limit) | {"tries": strictest}


def _tries(name: str) -> tuple[int, float]:
    """(tries, -probability) of a key such as n1000_p0.1."""
    tries, _, probability = name.removeprefix("n").partition("_p")
    return int(tries), -float(probability)


def membership_row(
    stage: str,
    areas: Mapping[str, Mapping[str, Any] | None],
    max_auc: float,
    *,
    check: str = "membership_auc",
    floor: object = True,
) -> Row:
    """The verdict on the strongest of several membership attacks.

    Args:
        areas: JSON of each attack's AUC with its 95 % interval, or of its difference from the floor's.
        max_auc: threshold.
        check: name of the row.
        floor: None says that there is none to compare with.

    Returns: `value` is the largest AUC, which errs upwards, since it was chosen. The interval is of the AUC of the
    attack that is strongest in truth. Its upper limit is the largest of all upper limits: every attack must pass, and
    the one that is strongest in truth is among them, so nothing is to be corrected. Its lower limit is the largest of
    the lower limits of m attacks, each at a level of 1 - 0.05 / m (Bonferroni): one of six attacks that are no better
    than allowed exceeds its own 95 % limit far more often than one attack. Those limits are the 95 % ones, stretched
    by the ratio of the normal quantiles, since the resamples are not kept.
    Guarantee: if the intervals given hold and are about normal, no attack better than allowed in truth, the verdict is
    fail with a probability of at most 2.5 %, however the attacks depend on each other.
    """
    known = {name: area for name, area in areas.items() if area is not None}
    if not known:
        return decide(stage, check, NotApplicable(NO_FLOOR if floor is None else NO_ATTACK), max_auc)
    strongest = max(known, key=lambda name: known[name]["value"])
    stretch = float(norm.ppf(1 - 0.025 / len(known))) / Z_95
    lows = [a["value"] - stretch * (a["value"] - a["low"]) for a in known.values() if a["low"] is not None]
    highs = [a["high"] for a in known.values()]
    figure = {
        "value": known[strongest]["value"],
        "low": max(lows) if lows else None,
        "high": None if None in highs else max(highs),
        "n": known[strongest]["n"],
    }
    return decide(stage, check, figure, max_auc) | {"attack": strongest, "n_attacks": len(known)}


def prompt_rows(
    stage: str, figures: Mapping[str, Mapping[str, Any]] | NotApplicable, counts: Mapping[str, Any], limit: float
) -> list[Row]:
    """Identifiers that the model writes after prompts for them, above decoys.

    Args:
        stage: what was done to the model first.
        figures: of `prompt_figures`, or why there are none.
        counts: of `prompt_figures`.
        limit: threshold of each row.
    """
    rows = list[Row]()
    for probe in PROBES:
        figure: Mapping[str, Any] | NotApplicable
        if isinstance(figures, NotApplicable):
            figure = figures
        else:
            own, decoys = (figures[side][probe]["rate"] for side in ("memorization", "heldout"))
            missing = next((rate for rate in (own, decoys) if isinstance(rate, NotApplicable)), None)
            figure = missing or unpaired_difference(own.to_json(), decoys.to_json()) or NotApplicable(NO_INTERVAL)
        row = decide(stage, f"{probe}_prompts_above_decoys", figure, limit)
        rows.append(row | {"counts": dict(counts)} if probe == "paraphrased" and counts else row)
    return rows


def unpaired_difference(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One figure minus another of other patients, from their JSON; None if one was not measured.

    See `independent_difference`; without all bounds there is no interval.
    """
    if first is None or second is None:
        return None
    a, b = ((figure["value"], figure["low"], figure["high"]) for figure in (first, second))
    bounded = None not in (*a, *b)
    value, low, high = independent_difference(a, b) if bounded else (a[0] - b[0], None, None)
    return {"value": value, "low": low, "high": high, "n": min(first["n"], second["n"])}
