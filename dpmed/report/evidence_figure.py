"""The figure of the release evidence: leakage above the floor, stage by stage, with intervals and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from dpmed.report.drawing import GREY, Row, chart_data, padded, styled
from dpmed.report.evidence_rows import EvidenceRow
from dpmed.report.evidence_wording import LEAK_CHECKS, LEAK_NAMES, REFERENCES, WORDS
from dpmed.report.page import inline_svg

NAME = "leaks"
COLOURS = {"passed": "#00568a", "not shown": "#6b5600", "failed": "#b03a00"}
SHAPES = {"passed": "circle", "not shown": "diamond", "failed": "square"}
_THRESHOLD = "#1b1f24"


def draw_leaks(tests: Sequence[EvidenceRow]) -> dict[str, Any] | None:
    """Name, title, caption and SVG of the figure; None if neither rate was measured in any stage."""
    reference = next((r for r in REFERENCES if any(t.value is not None for t in _leaks(tests, r))), None)
    if reference is None:
        return None
    shown = list(_leaks(tests, reference))
    above = REFERENCES[reference]
    caption = (
        f"How much more than {'the floor model' if reference == 'floor' else 'of held-out patients'} the weights give "
        "away. Mark: the value; its shape and colour: the verdict. Line: 95 % interval. Upright bar: the threshold of "
        "that test; a test is passed if the whole line ends left of it. Zero: no more than can be guessed."
    )
    svg = vl_convert.vegalite_to_svg(_chart(shown, reference).to_json())
    return {"name": NAME, "title": f"Leakage {above}, by what was done first", "caption": caption} | {
        "svg": inline_svg(svg, NAME)
    }


def _leaks(tests: Sequence[EvidenceRow], reference: str) -> list[EvidenceRow]:
    wanted = {f"{check}_above_{reference}" for check in LEAK_CHECKS}
    return [test for test in tests if test.check in wanted]


def _chart(tests: Sequence[EvidenceRow], reference: str) -> Any:
    rows: list[Row] = []
    for test in tests:
        name = LEAK_NAMES[test.check.removesuffix(f"_above_{reference}")]
        row = {"measure": name, "stage": test.stage_name, "verdict": WORDS[test.verdict]}
        numbers = {"value": test.value, "low": test.low, "high": test.high, "threshold": test.threshold}
        rows.append(row | {key: None if number is None else 100 * number for key, number in numbers.items()})
    numbers = [row[key] for row in rows for key in ("value", "low", "high", "threshold") if row[key] is not None]
    domain = padded([0.0, *numbers])
    order = list(dict.fromkeys(row["stage"] for row in rows))
    verdicts = list(COLOURS)
    legend = alt.Legend(title=None, orient="top", symbolSize=90)
    tone = alt.Color("verdict:N", scale=alt.Scale(domain=verdicts, range=list(COLOURS.values())), legend=legend)
    shape = alt.Shape("verdict:N", scale=alt.Scale(domain=verdicts, range=list(SHAPES.values())), legend=legend)
    # Readers' fonts are wider than the one measured here: the names keep some room.
    names = alt.Axis(title=None, labelLimit=250, minExtent=220, grid=True, ticks=False, domain=False)
    y = alt.Y("stage:N", sort=order, axis=names)
    axis = alt.Axis(title="Percentage points", tickCount=5, format="+~f")
    x = alt.X("value:Q", scale=alt.Scale(domain=domain, nice=False), axis=axis)
    base = alt.Chart().encode(y=y)
    measured = "isValid(datum.value)"
    chart = alt.layer(
        base.mark_rule(color="#888888", strokeWidth=1).encode(x=alt.datum(0)),
        base.mark_tick(color=_THRESHOLD, thickness=2.5, size=18).encode(x="threshold:Q"),
        base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        .mark_rule(strokeWidth=2)
        .encode(x="low:Q", x2="high:Q", color=tone),
        base.transform_filter(measured)
        .mark_point(filled=True, size=75, opacity=1)
        .encode(x=x, color=tone, shape=shape),
        base.transform_filter(f"!{measured}")
        .mark_text(align="left", dx=8, color=GREY, fontSize=11)
        .encode(x=alt.datum(0), text=alt.value("not tested")),
        data=chart_data(rows),
    ).properties(width=330, height=alt.Step(26))
    header = alt.Header(title=None, labelFontSize=13, labelFontWeight="bold", labelAnchor="start")
    panels = [name for name in LEAK_NAMES.values() if any(row["measure"] == name for row in rows)]
    return styled(chart.facet(column=alt.Column("measure:N", sort=panels, header=header), spacing=18))
