"""The first screen: what the figures say, in sentences that follow from the data by fixed rules.

The rule: among settings with a guarantee, the one with the best utility whose leakage is not distinguishable from
held-out patients. "Not distinguishable" is decided per run: the lower 95 % limit on training records is not above the
upper limit on held-out records, for every seed. Averaging first would let one leaking seed hide behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpmed.report.points import Point, finite, lookup
from dpmed.report.settings import Setting, Summary, chosen_leak, chosen_utility
from dpmed.report.wording import (
    LEAK_NAMES,
    LEAK_SENTENCES,
    METHOD_NAMES,
    UTILITY_NAMES,
    duration,
    epsilon_text,
    in_text,
    number,
    value_with_interval,
)

WEAK_EPSILON = 10.0
"""Above this the bound e^epsilon on the odds says little; common practice, not a theorem."""

STANDING_LIMITS = (
    "The guarantee covers the unit named in the certificate and nothing wider. "
    "It does not cover anyone whose facts stand in other units' records.",
    "The base model's pre-training is not covered: what it had memorised before stays outside the guarantee.",
    "Choosing hyper-parameters, the setting or the seed by looking at results on the same patients spends "
    "privacy that epsilon does not count.",
    "Measured attacks are lower bounds. An attack that fails here does not show that no attack works.",
    "A setting without a guarantee is judged by these attacks alone, whatever its figures.",
    "Encoder and masked models cannot continue a text, so they cannot leak by generation; "
    "membership and fill-in attacks still apply to them.",
    "Overlapping intervals mean that a difference was not seen with this many records, not that there is none.",
)


@dataclass(frozen=True)
class Card:
    """One answer on the first screen."""

    question: str
    answer: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    headline: str
    chosen: Setting | None
    cards: list[Card]
    lines: list[str]
    utility: str
    leak: str


def like_heldout(point: Point, leak: str) -> bool | None:
    """Whether a run's leakage is not distinguishable from held-out patients; None if that was not measured."""
    low = finite(lookup(point, f"memorization.{leak}.low"))
    high = finite(lookup(point, f"reference.heldout.{leak}.high"))
    return None if low is None or high is None else low <= high


def setting_like_heldout(setting: Setting, leak: str) -> bool | None:
    """`like_heldout` of all seeds: False if one run leaks, None if one was not measured."""
    answers = [like_heldout(point, leak) for point in setting.points]
    if False in answers:
        return False
    return None if None in answers else True


def decide(settings: Sequence[Setting]) -> Verdict:
    """Apply the rule to all settings and word the answers."""
    utility, leak = chosen_utility(settings), chosen_leak(settings)
    private = [setting for setting in settings if setting.epsilon is not None]
    eligible = [setting for setting in private if setting_like_heldout(setting, leak)]
    chosen = best_utility(eligible, utility)
    fine_tuned = next((s for name in ("full", "lora") for s in settings if s.method == name), None)
    base = next((s for s in settings if s.method == "base"), None)
    shown = chosen or best_utility(private, utility)
    return Verdict(
        headline=_headline(chosen, private, utility, leak),
        chosen=chosen,
        cards=_cards(chosen, shown, fine_tuned, base, utility, leak),
        lines=_lines(settings, chosen, fine_tuned, base, utility, leak),
        utility=utility,
        leak=leak,
    )


def best_utility(settings: Sequence[Setting], utility: str) -> Setting | None:
    """The setting with the best mean utility; on a draw the smaller epsilon. None if none was measured."""

    def rank(setting: Setting) -> tuple[float, float]:
        figure = setting.summary(f"utility.{utility}")
        assert figure is not None
        good = -figure.value if figure.higher_is == "worse" else figure.value
        return good, -(setting.epsilon or 0.0)

    measured = [setting for setting in settings if setting.summary(f"utility.{utility}") is not None]
    return max(measured, key=rank, default=None)


def _headline(chosen: Setting | None, private: Sequence[Setting], utility: str, leak: str) -> str:
    leak_name, utility_name = LEAK_NAMES[leak].lower(), in_text(UTILITY_NAMES[utility])
    if chosen is not None:
        return (
            f"{chosen.name} is the private setting with the best {utility_name} whose {leak_name} is not "
            "distinguishable from held-out patients (the 95 % intervals overlap)."
        )
    if not private:
        return "No setting here has a privacy guarantee, so none can be named. The attacks below are all there is."
    answers = [setting_like_heldout(setting, leak) for setting in private]
    if False in answers:
        return f"No private setting kept its {leak_name} down to the level of held-out patients, so none is named."
    return (
        f"No private setting can be named: {leak_name} or {utility_name} was not measured, on training records "
        "or on held-out patients."
    )


def _cards(
    chosen: Setting | None,
    shown: Setting | None,
    fine_tuned: Setting | None,
    base: Setting | None,
    utility: str,
    leak: str,
) -> list[Card]:
    """Which method, which epsilon, what leaks, what it costs."""
    method = Card("Which method?", METHOD_NAMES.get(chosen.method, chosen.method) if chosen else "None qualifies")
    if shown:
        method.details.append(f"Setting {shown.name}" if chosen else f"Shown here: {shown.name}, the best private one")
        method.details.append(
            f"{UTILITY_NAMES[utility]} {value_with_interval(shown.summary(f'utility.{utility}'), utility)}"
        )
    epsilon = Card("Which epsilon?", epsilon_text(shown.epsilon) if shown else "No guarantee")
    if shown and shown.epsilon is not None:
        delta = finite(shown.first("delta"))
        epsilon.details.append(f"delta {delta:g}" if delta is not None else "delta not recorded")
        epsilon.details.append(f"for one unit ({shown.first('unit') or 'not named'}) added or removed")
    return [method, epsilon, _leak_card(shown, fine_tuned, base, leak), _cost_card(shown, fine_tuned, utility)]


def _leak_card(shown: Setting | None, fine_tuned: Setting | None, base: Setting | None, leak: str) -> Card:
    subject = shown or fine_tuned or base
    figure = subject.summary(f"memorization.{leak}") if subject else None
    card = Card("What leaks?", number(figure.value, leak) if figure else "Not measured")
    if subject is None or figure is None:
        return card
    card.details.append(f"{LEAK_SENTENCES[leak]}, {value_with_interval(figure, leak)}, by {subject.name}")
    heldout = subject.summary(f"reference.heldout.{leak}")
    card.details.append(f"held-out patients: {value_with_interval(heldout, leak)}")
    if base:
        card.details.append(f"base model: {value_with_interval(base.summary(f'memorization.{leak}'), leak)}")
    if fine_tuned and fine_tuned is not subject:
        leaked = fine_tuned.summary(f"memorization.{leak}")
        card.details.append(f"{in_text(METHOD_NAMES[fine_tuned.method])}: {value_with_interval(leaked, leak)}")
    return card


def _cost_card(shown: Setting | None, fine_tuned: Setting | None, utility: str) -> Card:
    here = shown.summary(f"utility.{utility}") if shown else None
    there = fine_tuned.summary(f"utility.{utility}") if fine_tuned else None
    if shown is None or fine_tuned is None or here is None or there is None:
        return Card("What does it cost?", "Cannot be said", ["no private and no ordinary fine-tuning to compare"])
    worse = there.higher_is == "worse"
    lost = here.value - there.value if worse else there.value - here.value
    name = in_text(UTILITY_NAMES[utility])
    answer = f"{abs(lost):.3f} {name} {'lost' if lost >= 0 else 'gained'}"
    if worse:
        answer = f"{name} {abs(lost):.3f} {'higher' if lost >= 0 else 'lower'}"
    details = [
        f"against {in_text(METHOD_NAMES[fine_tuned.method])} at {value_with_interval(there, utility)}; "
        f"{_overlap_text(here, there)}"
    ]
    ours, theirs = shown.cost("seconds"), fine_tuned.cost("seconds")
    if ours is not None and theirs:
        details.append(f"training {duration(ours)} against {duration(theirs)} (×{ours / theirs:.2g})")
    return Card("What does it cost?", answer, details)


def overlap(first: Summary, second: Summary) -> bool | None:
    """Whether two 95 % intervals share a point; None if one has no limits."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return None
    return first.low <= second.high and second.low <= first.high


def _overlap_text(first: Summary, second: Summary) -> str:
    answer = overlap(first, second)
    if answer is None:
        return "no intervals to compare"
    return "the intervals overlap" if answer else "the intervals do not overlap"


def _lines(
    settings: Sequence[Setting],
    chosen: Setting | None,
    fine_tuned: Setting | None,
    base: Setting | None,
    utility: str,
    leak: str,
) -> list[str]:
    lines = [_leak_line(setting, leak) for setting in (fine_tuned, chosen) if setting is not None]
    lines += _other_leak_line(chosen, leak)
    lines += _best_without_guarantee(settings, utility, leak)
    lines += _learned_line(chosen, base, utility)
    lines += _membership_line(chosen or fine_tuned, fine_tuned)
    if chosen is not None and chosen.epsilon is not None and chosen.epsilon > WEAK_EPSILON:
        lines.append(f"An epsilon of {epsilon_text(chosen.epsilon)} is a weak guarantee, whatever the attacks find.")
    return lines


def _leak_line(setting: Setting, leak: str) -> str:
    figure = setting.summary(f"memorization.{leak}")
    heldout = setting.summary(f"reference.heldout.{leak}")
    start = f"{setting.name} reproduces {value_with_interval(figure, leak)} {LEAK_SENTENCES[leak]}"
    if figure is None:
        return f"{setting.name}: {LEAK_NAMES[leak].lower()} was not measured."
    beside = f"{start}, against {value_with_interval(heldout, leak)} in held-out patients' records: "
    answer = setting_like_heldout(setting, leak)
    if answer is None:
        return f"{start}; whether that is more than for held-out patients was not measured."
    if not answer:
        return beside + "it leaks."
    limit = f"; rates above {number(figure.high, leak)} are unlikely" if figure.high is not None else ""
    return beside + f"no leak is seen{limit}."


def _other_leak_line(chosen: Setting | None, leak: str) -> list[str]:
    """The measure of leakage that the rule did not use, so that a pass on one cannot hide a leak on the other."""
    others = [key for key in LEAK_SENTENCES if key != leak]
    if chosen is None:
        return []
    return [_leak_line(chosen, key) for key in others if chosen.summary(f"memorization.{key}") is not None]


def _best_without_guarantee(settings: Sequence[Setting], utility: str, leak: str) -> list[str]:
    candidates = [s for s in settings if s.epsilon is None and s.method != "base" and setting_like_heldout(s, leak)]
    best = best_utility(candidates, utility)
    if best is None:
        return ["No fine-tuned setting without a guarantee was at the level of held-out patients."]
    figure = value_with_interval(best.summary(f"utility.{utility}"), utility)
    return [
        f"Without a guarantee, {best.name} also passes this one attack, at {in_text(UTILITY_NAMES[utility])} {figure}: "
        "that is a measurement, not a promise."
    ]


def _learned_line(chosen: Setting | None, base: Setting | None, utility: str) -> list[str]:
    here = chosen.summary(f"utility.{utility}") if chosen else None
    before = base.summary(f"utility.{utility}") if base else None
    if chosen is None or here is None or before is None or overlap(here, before) is None:
        return []
    name = in_text(UTILITY_NAMES[utility])
    if overlap(here, before):
        return [
            f"{chosen.name} is not distinguishable from the base model in {name}: "
            "no benefit of training is shown at this epsilon."
        ]
    gained = (here.value > before.value) == (here.higher_is != "worse")
    verb = "is better than" if gained else "is worse than"
    return [
        f"On {name}, {chosen.name} {verb} the base model: "
        f"{value_with_interval(here, utility)} against {value_with_interval(before, utility)}."
    ]


def _membership_line(setting: Setting | None, fine_tuned: Setting | None) -> list[str]:
    key = "memorization.membership_auc"
    figure = setting.summary(key) if setting else None
    if setting is None or figure is None:
        return []
    line = f"Membership attack on {setting.name}: AUC {value_with_interval(figure, key)}, where 0.5 is chance"
    if figure.low is not None:
        line += ": it tells training patients apart" if figure.low > 0.5 else ": not seen to beat chance"
    other = fine_tuned.summary(key) if fine_tuned and fine_tuned is not setting else None
    if fine_tuned and other:
        line += f"; on {fine_tuned.name}: {value_with_interval(other, key)}"
    below = " An AUC below 0.5 is not more private: an attacker may turn the answer round."
    return [line + "." + (below if figure.value < 0.5 else "")]
