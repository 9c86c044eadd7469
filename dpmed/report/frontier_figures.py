"""Utility against epsilon, and utility against leakage. Runs are small, means over seeds large."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt

from dpmed.report.drawing import (
    AXIS_TITLES,
    GREY,
    Row,
    chart_data,
    colour_by_method,
    padded,
    shape_by_method,
    styled,
    utility_title,
)
from dpmed.report.labels import place_labels
from dpmed.report.points import measured_value
from dpmed.report.settings import Setting, Summary, frontier_settings

# Settings that differ in epsilon only are one curve.
_EPSILON_IN_NAME = re.compile(r"eps[0-9.]+")


def f1_against_epsilon(settings: Sequence[Setting], *, utility: str) -> alt.HConcatChart | None:
    """Utility over log-scaled epsilon at the left; settings without a guarantee at the right, on the same axis."""
    known = [(s, figure) for s in settings if (figure := s.summary(f"utility.{utility}")) is not None]
    private = [pair for pair in known if pair[0].epsilon is not None]
    public = [pair for pair in known if pair[0].epsilon is None]
    if not known:
        return None
    scale = alt.Scale(domain=padded([v for _, figure in known for v in _extent(figure)]), nice=False, zero=False)
    panels = []
    if private:
        epsilons = [s.epsilon for s, _ in private if s.epsilon]
        axis = alt.Axis(title="Epsilon (log scale; smaller is more private)", values=_ticks(epsilons), format=".2~r")
        domain = [min(epsilons) / 1.6, max(epsilons) * 1.6]
        x = alt.X("x:Q", axis=axis, scale=alt.Scale(type="log", domain=domain, nice=False))
        y = alt.Y("value:Q", scale=scale, axis=alt.Axis(title=utility_title(utility)))
        panels.append(_epsilon_panel(settings, private, public, x, y, utility).properties(width=360, height=320))
    if public:
        order = [s.name for s, _ in public]
        axis = alt.Axis(title="No privacy guarantee", labelAngle=-35, labelLimit=120, grid=False)
        x = alt.X("x:N", sort=order, axis=axis)
        title = None if private else utility_title(utility)
        # The shared scale lines both panels up; the numbers stand once, at the left.
        y_axis = alt.Axis(title=title, labels=not private, ticks=not private)
        y = alt.Y("value:Q", scale=scale, axis=y_axis)
        panels.append(_marks(settings, public, x, y, utility).properties(width=max(150, 38 * len(order)), height=320))
    return styled(alt.hconcat(*panels, spacing=14))


def _ticks(epsilons: Sequence[float]) -> list[float]:
    """The epsilons measured; without those that would print on top of a neighbour."""
    ticks: list[float] = []
    for epsilon in sorted(epsilons):
        if not ticks or epsilon / ticks[-1] > 1.15:
            ticks.append(float(f"{epsilon:.3g}"))
    return ticks


def _epsilon_panel(
    settings: Sequence[Setting], private: Sequence[Any], public: Sequence[Any], x: Any, y: Any, utility: str
) -> alt.LayerChart | alt.FacetChart:
    rules = [{"value": figure.value, "method": s.method} for s, figure in public]
    means = [
        {"x": s.epsilon, "value": figure.value, "method": s.method, "family": _EPSILON_IN_NAME.sub("", s.name)}
        for s, figure in private
    ]
    tone = colour_by_method(settings)
    line = (
        alt.Chart(chart_data(means))
        .mark_line(strokeWidth=1.5, opacity=0.6)
        .encode(x=x, y=y, color=tone, detail="family:N")
    )
    level = (
        alt.Chart(chart_data(rules)).mark_rule(strokeDash=[5, 3], strokeWidth=1.2, opacity=0.9).encode(y=y, color=tone)
    )
    layers = ([level] if rules else []) + [line, _marks(settings, private, x, y, utility)]
    return alt.layer(*layers)


def _marks(
    settings: Sequence[Setting], pairs: Sequence[Any], x: Any, y: Any, utility: str
) -> alt.LayerChart | alt.FacetChart:
    """Interval bars, means over seeds, and the seeds themselves, small."""
    means, seeds = [], []
    for setting, figure in pairs:
        place = setting.name if setting.epsilon is None else setting.epsilon
        row = {"x": place, "value": figure.value, "low": figure.low, "high": figure.high, "method": setting.method}
        means.append(row)
        for point in setting.points if len(setting.points) > 1 else ():
            seeds.append({"x": place, "value": measured_value(point, f"utility.{utility}"), "method": setting.method})
    tone = colour_by_method(settings)
    shape = shape_by_method(settings)
    base = alt.Chart(chart_data(means)).encode(x=x, color=tone)
    bars = base.transform_filter("datum.low != null").mark_rule(strokeWidth=1.8).encode(y="low:Q", y2="high:Q")
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(y=y, shape=shape)
    layers = [bars, dots]
    if seeds:
        small = alt.Chart(chart_data(seeds)).mark_point(size=34, fill="white", strokeWidth=1.2, opacity=1, xOffset=9)
        layers.append(small.encode(x=x, y=y, color=tone, shape=shape))
    return alt.layer(*layers)


def _extent(figure: Summary) -> list[float]:
    ends = (figure.value, figure.low, figure.high, figure.seed_low, figure.seed_high)
    return [value for value in ends if value is not None]


def f1_against_extraction(settings: Sequence[Setting], *, utility: str, leak: str) -> alt.LayerChart | None:
    """Utility against leakage, intervals on both axes, the non-dominated settings filled and joined."""
    rows: list[Row] = []
    for setting, best in zip(settings, frontier_settings(settings, utility=utility, leak=leak), strict=True):
        useful, leaked = setting.summary(f"utility.{utility}"), setting.summary(f"memorization.{leak}")
        if useful is None or leaked is None:
            continue
        rows.append(_exchange_row(setting, useful, leaked, best))
    if not rows:
        return None
    ends = ("x", "x_low", "x_high"), ("y", "y_low", "y_high")
    levels = _levels(settings, leak)
    x_domain = padded([r[k] for r in rows for k in ends[0] if r[k] is not None] + [v["x"] for v in levels])
    y_domain = padded([r[k] for r in rows for k in ends[1] if r[k] is not None])
    width, height = 620, 380
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=x_domain, nice=False),
        axis=alt.Axis(title=AXIS_TITLES[leak], format="~p", tickCount=8),
    )
    y_scale = alt.Scale(domain=y_domain, nice=False, zero=False)
    y = alt.Y("y:Q", scale=y_scale, axis=alt.Axis(title=utility_title(utility)))
    layers = [_level_layer(levels, x), *_exchange_layers(settings, rows, x, y)]
    layers.append(_seed_layer(settings, utility, leak, x, y))
    layers += _label_layers(rows, x_domain, y_domain, width, height, x, y)
    return styled(
        alt.layer(*layers).properties(
            width=width, height=height, padding={"left": 8, "top": 5, "right": 30, "bottom": 5}
        )
    )


def _exchange_row(setting: Setting, useful: Summary, leaked: Summary, best: bool) -> Row:
    return {
        "label": setting.name,
        "method": setting.method,
        "frontier": best,
        "x": leaked.value,
        "x_low": leaked.low,
        "x_high": leaked.high,
        "y": useful.value,
        "y_low": useful.low,
        "y_high": useful.high,
    }


def _levels(settings: Sequence[Setting], leak: str) -> list[Row]:
    """Leakage of the base model and of held-out patients (the highest of all settings)."""
    heldout = [f.value for s in settings if (f := s.summary(f"reference.heldout.{leak}")) is not None]
    base = [f.value for s in settings if s.method == "base" and (f := s.summary(f"memorization.{leak}")) is not None]
    levels = [{"x": max(heldout), "level": "Held-out patients, highest of all settings"}] if heldout else []
    return levels + ([{"x": base[0], "level": "Base model, not fine-tuned"}] if base else [])


def _level_layer(levels: Sequence[Row], x: Any) -> alt.Chart:
    names = ["Held-out patients, highest of all settings", "Base model, not fine-tuned"]
    dash = alt.StrokeDash(
        "level:N",
        scale=alt.Scale(domain=names, range=[[6, 3], [1, 3]]),
        legend=alt.Legend(title=None, orient="top", symbolStrokeColor=GREY, labelLimit=320, symbolSize=300),
    )
    return alt.Chart(chart_data(levels)).mark_rule(color=GREY, strokeWidth=1.6).encode(x=x, strokeDash=dash)


def _exchange_layers(settings: Sequence[Setting], rows: Sequence[Row], x: Any, y: Any) -> list[alt.Chart]:
    tone = colour_by_method(settings)
    shape = shape_by_method(settings)
    base = alt.Chart(chart_data(rows)).encode(color=tone)
    joined = alt.Chart(chart_data([row for row in rows if row["frontier"]])).mark_line(color="#888888", strokeWidth=1.4)
    return [
        joined.encode(x=x, y=y, order="x:Q"),
        base.transform_filter("datum.x_low != null").mark_rule(opacity=0.75).encode(x="x_low:Q", x2="x_high:Q", y=y),
        base.transform_filter("datum.y_low != null").mark_rule(opacity=0.75).encode(y="y_low:Q", y2="y_high:Q", x=x),
        base.transform_filter("datum.frontier")
        .mark_point(filled=True, size=130, opacity=1)
        .encode(x=x, y=y, shape=shape),
        base.transform_filter("!datum.frontier")
        .mark_point(size=110, fill="white", strokeWidth=2, opacity=1)
        .encode(x=x, y=y, shape=shape),
    ]


def _seed_layer(settings: Sequence[Setting], utility: str, leak: str, x: Any, y: Any) -> alt.Chart:
    seeds = []
    for setting in settings:
        for point in setting.points if len(setting.points) > 1 else ():
            leaked, useful = measured_value(point, f"memorization.{leak}"), measured_value(point, f"utility.{utility}")
            if leaked is not None and useful is not None:
                seeds.append({"x": leaked, "y": useful, "method": setting.method})
    tone = colour_by_method(settings)
    return alt.Chart(chart_data(seeds)).mark_point(filled=True, size=14, opacity=0.7).encode(x=x, y=y, color=tone)


def _label_layers(
    rows: Sequence[Row], x_domain: list[float], y_domain: list[float], width: int, height: int, x: Any, y: Any
) -> list[alt.Chart]:
    """Names beside the marks, set so that they cover neither each other nor a mark; leaders where they stand off."""

    def pixels(row: Row) -> tuple[float, float]:
        across = (row["x"] - x_domain[0]) / (x_domain[1] - x_domain[0]) * width
        return across, (y_domain[1] - row["y"]) / (y_domain[1] - y_domain[0]) * height

    placed = []
    for row, (left, middle) in zip(
        rows, place_labels([(*pixels(r), r["label"]) for r in rows], width=width, height=height), strict=True
    ):
        x_value = x_domain[0] + left / width * (x_domain[1] - x_domain[0])
        y_value = y_domain[1] - middle / height * (y_domain[1] - y_domain[0])
        placed.append({"x": x_value, "y": y_value, "label": row["label"], "to_x": row["x"], "to_y": row["y"]})
        near = math.dist((left, middle), pixels(row)) < 16 or abs(middle - pixels(row)[1]) < 20
        placed[-1]["far"] = not near
    text = alt.Chart(chart_data(placed)).mark_text(align="left", baseline="middle", fontSize=12, color="#222222")
    leaders = alt.Chart(chart_data([p for p in placed if p["far"]])).mark_rule(color="#888888", strokeWidth=0.8)
    halo = alt.Chart(chart_data(placed)).mark_text(
        align="left", baseline="middle", fontSize=12, stroke="white", strokeWidth=4, color="white"
    )
    return [
        leaders.encode(x=x, y=y, x2="to_x:Q", y2="to_y:Q"),
        halo.encode(x=x, y=y, text="label:N"),
        text.encode(x=x, y=y, text="label:N"),
    ]
