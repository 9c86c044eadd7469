"""Extraction by prompt length, and the ROC of the membership attack."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import altair as alt

from dpmed.report.drawing import GREY, Row, chart_data, colour, colour_by_method, styled
from dpmed.report.points import finite, lookup
from dpmed.report.settings import Setting, Summary

Roc = tuple[list[float], list[float]]

_BLUES = ("#8cc3e6", "#3a8cc4", "#004f80")
_MAX_VERTICES = 80
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])


def extraction_by_prefix(settings: Sequence[Setting]) -> alt.FacetChart | None:
    """Record extraction against the length of the prompt, a panel a setting: training solid, held-out hollow."""
    rows: list[Row] = []
    for setting in settings:
        for source, root in (("training records", "memorization"), ("held-out records", "reference.heldout")):
            for prefix, figure in _by_prefix(setting, root).items():
                name = {"setting": setting.name, "method": setting.method, "source": source}
                rows.append({**name, "p": prefix, "value": figure.value, "low": figure.low, "high": figure.high})
    if not rows:
        return None
    order = [s.name for s in settings if any(row["setting"] == s.name for row in rows)]
    prefixes = sorted({row["p"] for row in rows})
    scale = alt.Scale(type="log", domain=[prefixes[0] / 1.3, prefixes[-1] * 1.3], nice=False)
    x = alt.X(
        "p:Q",
        scale=scale,
        axis=alt.Axis(title="Prefix (tokens)", values=prefixes, grid=False, format="d", labelOverlap="greedy"),
    )
    y = alt.Y("value:Q", axis=alt.Axis(title="Extraction rate", format="~p", tickCount=4))
    tone = colour_by_method(settings)
    sources = ["training records", "held-out records"]
    legend = alt.Legend(title=None, orient="top", labelLimit=200, symbolSize=300, symbolStrokeColor=GREY)
    dash = alt.StrokeDash("source:N", scale=alt.Scale(domain=sources, range=[[1, 0], [4, 3]]), legend=legend)
    hollow = "datum.source == 'held-out records'"
    base = alt.Chart().encode(x=x, color=tone)
    chart = alt.layer(
        base.transform_filter("datum.low != null").mark_rule(opacity=0.5).encode(y="low:Q", y2="high:Q"),
        base.mark_line(strokeWidth=1.6).encode(y=y, strokeDash=dash),
        base.transform_filter(f"!({hollow})").mark_point(size=42, opacity=1, filled=True).encode(y=y),
        base.transform_filter(hollow).mark_point(size=36, opacity=1, fill="white", strokeWidth=1.3).encode(y=y),
        data=chart_data(rows),
    ).properties(width=140, height=120)
    header = alt.Header(title=None, labelFontSize=12, labelFontWeight="bold", labelLimit=150)
    return styled(
        chart.facet(facet=alt.Facet("setting:N", sort=order, header=header), columns=4, spacing=16).resolve_axis(
            x="independent"
        )
    )


def _by_prefix(setting: Setting, root: str) -> dict[int, Summary]:
    """Extraction by prefix length; where several suffix lengths were tried, the shortest, which leaks most."""
    found: dict[int, tuple[int, Summary]] = {}
    for key in {key for point in setting.points for key in lookup(point, f"{root}.extraction") or {}}:
        match = re.fullmatch(r"p(\d+)_n(\d+)", key)
        figure = setting.summary(f"{root}.extraction.{key}") if match else None
        if match and figure:
            prefix, suffix = int(match[1]), int(match[2])
            if prefix not in found or suffix < found[prefix][0]:
                found[prefix] = (suffix, figure)
    return {prefix: figure for prefix, (_, figure) in sorted(found.items())}


def membership_roc(settings: Sequence[Setting]) -> alt.LayerChart | None:
    """ROC of the strongest-by-design attack that was run, both axes logarithmic, with the line of chance."""
    curves = {s.name: [roc for p in s.points if (roc := _roc(p)) is not None] for s in settings}
    named = [s for s in settings if curves[s.name]]
    if not named:
        return None
    floor = _roc_floor([roc for runs in curves.values() for roc in runs])
    means, seeds = [], []
    for setting in named:
        runs = curves[setting.name]
        means += _mean_roc(runs, floor, setting.name)
        for index, run in enumerate(runs if len(runs) > 1 else []):
            seeds += _mean_roc([run], floor, setting.name, run=f"{setting.name}/{index}")
    order = [s.name for s in named]
    tones, dashes = _setting_styles(named)
    legend = alt.Legend(title="Setting", labelLimit=170, symbolStrokeWidth=2.5, symbolSize=300, symbolOpacity=1)
    tone = alt.Color("setting:N", scale=alt.Scale(domain=order, range=tones), sort=order, legend=legend)
    dash = alt.StrokeDash("setting:N", scale=alt.Scale(domain=order, range=dashes), sort=order, legend=legend)
    scale = alt.Scale(type="log", domain=[floor, 1], nice=False, clamp=True)
    ticks = [10.0**power for power in range(round(math.log10(floor)), 1)]
    axis = {"values": ticks, "format": "~%"}
    x = alt.X("fpr:Q", scale=scale, axis=alt.Axis(title="False-positive rate (log scale)", **axis))
    y = alt.Y("tpr:Q", scale=scale, axis=alt.Axis(title="True-positive rate (log scale)", **axis))
    chance = alt.Chart(chart_data([{"fpr": floor, "tpr": floor}, {"fpr": 1, "tpr": 1}]))
    layers = [chance.mark_line(color="#888888", strokeDash=[3, 3], strokeWidth=1.2).encode(x=x, y=y)]
    note = alt.Chart(chart_data([{"fpr": floor * 2.2, "tpr": floor * 1.35, "label": "chance"}]))
    layers.append(note.mark_text(align="left", color="#666666", fontSize=11).encode(x=x, y=y, text="label:N"))
    if seeds:
        thin = alt.Chart(chart_data(seeds)).mark_line(strokeWidth=0.8, opacity=0.35)
        layers.append(thin.encode(x=x, y=y, color=tone, detail="run:N"))
    layers.append(alt.Chart(chart_data(means)).mark_line(strokeWidth=2.2).encode(x=x, y=y, color=tone, strokeDash=dash))
    return styled(alt.layer(*layers).properties(width=470, height=400))


def _roc(point: Row) -> Roc | None:
    """The ROC of the reference attack, else of the loss attack, else of the first that has one."""
    attacks = lookup(point, "memorization.membership") or {}
    for name in ("reference", "loss", *sorted(attacks)):
        roc = lookup(attacks.get(name), "roc")
        if isinstance(roc, dict) and roc.get("fpr") and len(roc["fpr"]) == len(roc.get("tpr") or []):
            pairs = [(finite(f), finite(t)) for f, t in zip(roc["fpr"], roc["tpr"], strict=True)]
            kept = sorted((f, t) for f, t in pairs if f is not None and t is not None)
            if kept:
                return [f for f, _ in kept], [t for _, t in kept]
    return None


def _roc_floor(runs: Sequence[Roc]) -> float:
    """The power of ten below the smallest false-positive rate that was resolved; between 0.0001 and 0.1."""
    smallest = min((f for fprs, _ in runs for f in fprs if f > 0), default=0.01)
    return 10.0 ** min(-1, max(-4, math.floor(math.log10(smallest) + 1e-9)))


def _mean_roc(runs: Sequence[Roc], floor: float, name: str, *, run: str | None = None) -> list[Row]:
    """Vertical average: the mean true-positive rate at each false-positive rate that a run resolved.

    Straight lines between the resolved rates are what an attacker reaches by mixing two thresholds. A rate of zero has
    no place on a log axis and is left out, so a curve starts where the attack first finds anyone.
    """
    resolved = sorted({f for fprs, _ in runs for f in fprs if f >= floor})
    if len(resolved) > _MAX_VERTICES:
        resolved = [floor ** (1 - step / _MAX_VERTICES) for step in range(_MAX_VERTICES + 1)]
    rows = []
    for fpr in resolved:
        tpr = sum(_tpr_at(roc, fpr) for roc in runs) / len(runs)
        if tpr > 0:
            rows.append({"setting": name, "run": run or name, "fpr": fpr, "tpr": max(floor, tpr)})
    return rows


def _tpr_at(roc: Roc, fpr: float) -> float:
    """True-positive rate by linear interpolation; at a vertical step the upper end."""
    below = max(((f, t) for f, t in zip(*roc, strict=True) if f <= fpr), default=(0.0, 0.0))
    above = min(((f, t) for f, t in zip(*roc, strict=True) if f > fpr), default=None)
    if above is None:
        return below[1]
    return below[1] + (above[1] - below[1]) * (fpr - below[0]) / (above[0] - below[0])


def _setting_styles(settings: Sequence[Setting]) -> tuple[list[str], list[list[int]]]:
    """A colour and a dash for each setting: settings of one method share the hue and differ in dash."""
    tones: list[str] = []
    dashes: list[list[int]] = []
    for setting in settings:
        family = [s.name for s in settings if s.method == setting.method]
        ramp = setting.method == "dp_lora" and len(family) > 1
        step = family.index(setting.name) * len(_BLUES) // len(family)
        tone = _BLUES[min(step, len(_BLUES) - 1)] if ramp else colour(setting.method)
        dashes.append(_DASHES[tones.count(tone) % len(_DASHES)])
        tones.append(tone)
    return tones, dashes
