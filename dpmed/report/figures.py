"""The four figures of a report: which are drawn, how each is to be read, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

from dpmed.report.attack_figures import extraction_by_prefix, membership_roc
from dpmed.report.frontier_figures import f1_against_epsilon, f1_against_extraction
from dpmed.report.settings import Setting
from dpmed.report.verdicts import Verdict
from dpmed.report.wording import LEAK_NAMES, UTILITY_NAMES


def all_charts(settings: Sequence[Setting], verdict: Verdict) -> dict[str, Any]:
    """The charts by file name; None where nothing was measured."""
    return {
        "f1_against_epsilon": f1_against_epsilon(settings, utility=verdict.utility),
        "f1_against_extraction": f1_against_extraction(settings, utility=verdict.utility, leak=verdict.leak),
        "extraction_by_prefix": extraction_by_prefix(settings),
        "membership_roc": membership_roc(settings),
    }


def captions(settings: Sequence[Setting], verdict: Verdict) -> dict[str, dict[str, str]]:
    """Name, title and how to read it, for each figure in `all_charts`."""
    utility, leak = UTILITY_NAMES[verdict.utility], LEAK_NAMES[verdict.leak].lower()
    seeds = "Small hollow marks: single seeds. " if any(len(s.points) > 1 for s in settings) else ""
    texts = {
        "f1_against_epsilon": (
            f"{utility} against epsilon",
            "Left: private settings, epsilon on a log scale, more private to the left. Right: settings without a "
            "guarantee; the dashed lines carry their level across. The nearer the private curve comes to the line of "
            f"full fine-tuning, the less privacy costs. {seeds}Bars: 95 % intervals.",
        ),
        "f1_against_extraction": (
            f"{utility} against {leak}",
            f"Best is the {'lower' if verdict.utility == 'perplexity' else 'upper'} left: useful and without leak. "
            "Filled and joined: settings that no other beats on both axes (means over seeds). Hollow: beaten by "
            "another. What lies on or left of the held-out line is not seen to leak; the base model's line is what "
            f"was known before. {seeds.replace('hollow marks', 'dots')}Bars: 95 % intervals on both axes.",
        ),
        "extraction_by_prefix": (
            "Record extraction by length of the prompt",
            "Share of records that the model continues exactly after being shown their first tokens, one panel a "
            "setting. Solid: training records; dashed and hollow: held-out records. Only the gap between both is "
            "leakage from training. Where several continuation lengths were tried, the shortest is drawn.",
        ),
        "membership_roc": (
            "Membership attack: who is found at how many false alarms",
            "Both axes are logarithmic: the left end is an attacker who accuses hardly anyone wrongly. On the dotted "
            "diagonal the attack is chance; above it, training patients can be told from others. The attack is the "
            "one with the base model as reference where there is one, else the loss. Thick: mean over seeds; thin: "
            "single seeds. A curve starts where the attack first finds anyone.",
        ),
    }
    return {name: {"name": name, "title": title, "caption": text} for name, (title, text) in texts.items()}


def write_figures(charts: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write `<name>.svg` and `<name>.png` (twice the size) of each chart that is not None.

    Returns: the SVG text by name, for the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    for name, chart in charts.items():
        if chart is None:
            continue
        drawn[name] = vl_convert.vegalite_to_svg(chart.to_json())
        (folder / f"{name}.svg").write_text(drawn[name], encoding="utf-8")
        (folder / f"{name}.png").write_bytes(vl_convert.svg_to_png(drawn[name], scale=2))
    return drawn
