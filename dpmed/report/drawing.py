"""What the figures share: colours, shapes, axes and the look.

Colours are Okabe and Ito's, darkened where they must hold on white; every method also has its own shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from dpmed.report.settings import METHOD_ORDER, Setting
from dpmed.report.wording import UTILITY_NAMES

COLOURS = {
    "base": "#6b6b6b",
    "full": "#d55e00",
    "lora": "#b8860b",
    "dp_lora": "#0072b2",
    "sani": "#00795a",
    "repair_only": "#a8457f",
    "clean_retrain": "#3f6f1f",
    "pruning": "#7a5230",
    "rewind": "#4b5d8a",
    "unlearn": "#1f1f1f",
    "gradient_ascent": "#8c2d04",
    "gradient_difference": "#5e3c99",
    "npo": "#2c7c94",
    "task_vector": "#5f6b00",
}
SHAPES = {
    "base": "cross",
    "full": "square",
    "lora": "diamond",
    "dp_lora": "circle",
    "sani": "triangle-up",
    "repair_only": "triangle-down",
    "clean_retrain": "M-1,0L0,-1L1,0L0,1Z",
    "pruning": "M-1,-1L1,1M-1,1L1,-1",
    "rewind": "M-1,-0.5L1,-0.5M-1,0.5L1,0.5",
    "unlearn": "triangle",
    "gradient_ascent": "arrow",
    "gradient_difference": "triangle-left",
    "npo": "triangle-right",
    "task_vector": "stroke",
}
AXIS_TITLES = {
    "identifier_extraction_rate": "Identifier extraction rate (lower is better)",
    "extraction_rate": "Record extraction rate (lower is better)",
}
_FONT = "Roboto, Helvetica, Arial, sans-serif"
GREY = "#4d4d4d"
Row = dict[str, Any]


def colour(method: str) -> str:
    return COLOURS.get(method, "#56b4e9")


def chart_data(rows: Sequence[Row]) -> alt.Data:
    return alt.Data(values=list(rows))


def utility_title(utility: str) -> str:
    direction = "lower" if utility == "perplexity" else "higher"
    return f"{UTILITY_NAMES[utility]} ({direction} is better)"


def padded(values: Sequence[float], *, floor: float | None = None, share: float = 0.08) -> list[float]:
    """An axis domain that holds all values with some air."""
    low, high = min(values), max(values)
    air = share * ((high - low) or abs(high) or 1.0)
    return [low - air if floor is None else max(floor, low - air), high + air]


def colour_by_method(settings: Sequence[Setting]) -> alt.Color:
    methods = _methods(settings)
    return alt.Color("method:N", scale=alt.Scale(domain=methods, range=[colour(m) for m in methods]), legend=None)


def shape_by_method(settings: Sequence[Setting]) -> alt.Shape:
    methods = _methods(settings)
    shapes = [SHAPES.get(method, "wedge") for method in methods]
    return alt.Shape("method:N", scale=alt.Scale(domain=methods, range=shapes), legend=None)


def _methods(settings: Sequence[Setting]) -> list[str]:
    present = {setting.method for setting in settings}
    return [m for m in METHOD_ORDER if m in present] + sorted(present - set(METHOD_ORDER))


def styled(chart: Any) -> Any:
    """White ground, one font, dark text; no aria clutter, since the page describes each figure itself."""
    return (
        chart.configure(background="white", font=_FONT, aria=False)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight="normal",
            labelColor="#222222",
            titleColor="#222222",
            gridColor="#e6e6e6",
            domainColor="#666666",
            tickColor="#666666",
            titlePadding=8,
        )
        .configure_legend(labelFontSize=12, titleFontSize=12, labelColor="#222222", titleColor="#222222")
        .configure_view(stroke="#cccccc")
    )
