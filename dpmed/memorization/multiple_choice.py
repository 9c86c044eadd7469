"""Downstream impact: multiple-choice items as they are, with the options shuffled, and with the right one missing.

A model that knows the subject finds the right option wherever it stands. One that has the item by heart falls back when
the options move, and still names the letter of an option that is no longer there. The probes are those of arXiv
2509.08604; the figures and their intervals are ours.

Shapes: i = items, o = options of the item that has most, s = orders of the options (the first is the given one).
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

from dpmed.data.sources import Table, read_table
from dpmed.data.tasks import EncodedRecords, Example, TaskSpec, label_option_ids
from dpmed.errors import InputError
from dpmed.memorization.choice_cells import cell_options, cell_text, right_options
from dpmed.memorization.generation import context_size
from dpmed.memorization.intervals import HigherIs, Measure, bootstrap_ratio, dense_units, rate_by_unit, wilson
from dpmed.memorization.paired import Cases, paired_differences
from dpmed.memorization.scoring import Progress, kept_scores
from dpmed.memorization.statistics import weights_fingerprint
from dpmed.utility import label_scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 2048
"""Tokens that a model is given whose configuration names no context."""
ANSWER = "\nAnswer:"
"""Joins question and answer; an option or a letter follows after one space."""


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice item."""

    question: str
    """What stands before the answer, context included."""
    options: tuple[str, ...]
    """Two or more different options."""
    answer: int
    """Index of the right option."""
    unit: str
    """Items of one unit are drawn together by the bootstrap."""


@dataclass(frozen=True)
class ChoiceScores:
    """What one model says about the items: log-probabilities in nats, -inf where an item has no such option."""

    text: np.ndarray
    """Of the option's text right after the question, options not shown; sum over its tokens, [i, o]."""
    n_tokens: np.ndarray
    """Tokens of each option's text, int64 [i, o]; 1 where there is none."""
    letter: np.ndarray
    """Of the letter that stands before the option, all options shown, [i, s, o]; o counts options, not letters."""
    missing: np.ndarray
    """The same with the right option taken out of the list; the others keep their letters, [i, s, o]."""
    n_items_cut: int
    """Items whose beginning was left out, since the model's context is shorter."""


# --- Items ------------------------------------------------------------------------------------------------------------


def load_items(
    source: str | Path,
    *,
    question: str = "question",
    options: str | Sequence[str] = "options",
    answer: str = "answer",
    context: str | None = None,
    unit: str | None = None,
) -> list[ChoiceItem]:
    """Read multiple-choice items from csv, tsv, json, jsonl or parquet.

    A json file may also hold one object whose values are the items, as PubMedQA's does.

    Args:
        source: the file.
        question: its column.
        options: the column of the options (a list, or a list as JSON in one cell); or the options themselves, where all
            items have the same ones: ("yes", "no", "maybe").
        answer: the column of the right option, see `choice_cells.right_options`.
        context: a column to put before the question: text, or a list of texts.
        unit: the column that names what items have in common (a patient, an abstract); each stands alone by default.

    Raises: InputError, in one line and without a cell, if a column is missing or a row cannot be used.
    """
    table = _items_table(source)
    n = table.n_rows
    fixed = None if isinstance(options, str) else tuple(options)
    listed = [fixed] * n if fixed is not None else [cell_options(cell) for cell in table.values(str(options))]
    where = "the given options are" if fixed is not None else f"'{options}' is"
    few = [row for row, found in enumerate(listed) if found is None or len(found) < 2 or len(set(found)) < len(found)]
    table.reject(few, f"{where} not a list of two or more different texts", 'write ["first", "second"]')
    many = [row for row, found in enumerate(listed) if len(found or ()) > len(string.ascii_uppercase)]
    table.reject(many, f"{where} longer than 26", "options are named by letters: leave some out")
    questions = [cell_text(cell) for cell in table.values(question)]
    table.reject([r for r, q in enumerate(questions) if q is None], f"'{question}' is not text", "fill it in")
    contexts: list[str | None] = [""] * n if context is None else [cell_text(cell) for cell in table.values(context)]
    table.reject([r for r, c in enumerate(contexts) if c is None], f"'{context}' is not text", "fill it in")
    answers, unclear = right_options(table.values(answer), [found or () for found in listed])
    clear = "write its letter, or its text in quotes"
    table.reject(unclear, f"'{answer}' is a number that is both an option and the index of another", clear)
    remedy = "give its text, its letter, or its index from 0"
    table.reject([r for r, a in enumerate(answers) if a is None], f"'{answer}' names none of the options", remedy)
    units = [str(row) for row in range(n)] if unit is None else [cell_text(cell) for cell in table.values(unit)]
    table.reject([r for r, u in enumerate(units) if u is None], f"'{unit}' is missing", "fill it in")
    return [
        ChoiceItem("\n".join(part for part in (c, q) if part), found or (), a or 0, u or "")
        for c, q, found, a, u in zip(contexts, questions, listed, answers, units, strict=True)
    ]


def _items_table(source: str | Path) -> Table:
    """As `read_table`, and one JSON object of objects as the list of its values."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".json" and path.is_file():
        try:
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            whole = None  # read_table says what is wrong, or takes it as one object a line
        rows = list(whole.values()) if isinstance(whole, dict) else []
        if rows and all(isinstance(row, dict) for row in rows):
            names = list(dict.fromkeys(name for row in rows for name in row))
            return Table(str(path), names, len(rows), lambda name: [row.get(name) for row in rows])
    return read_table(source, "train")


# --- Scores -----------------------------------------------------------------------------------------------------------


def option_orders(items: Sequence[ChoiceItem], n_shuffles: int, seed: int) -> list[np.ndarray]:
    """Orders of each item's options, [s, its options]: the given one, then random ones that differ from it.

    orders[i][s][j] is the option that stands at letter j.
    """
    orders: list[np.ndarray] = []
    for number, item in enumerate(items):
        rng = np.random.default_rng([seed, number])
        given = np.arange(len(item.options))
        drawn = [given]
        while len(drawn) <= n_shuffles:
            order = rng.permutation(len(given))
            if not np.array_equal(order, given):
                drawn.append(order)
        orders.append(np.stack(drawn))
    return orders


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    n_shuffles: int = 4,
    seed: int = 0,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> ChoiceScores:
    """Ask a causal language model all items in all forms.

    Args:
        model: a causal language model; put in evaluation mode meanwhile.
        tokenizer: of the model.
        items: from `load_items`.
        n_shuffles: random orders of the options besides the given one.
        seed: of these orders, so that two models are asked the same.
        max_length: tokens that the model may read, its own context by default; longer items lose their beginning.
        batch_tokens: padded tokens per forward pass; memory only.
        folder: private folder for finished batches, so that a killed pass goes on where it stopped; None keeps nothing.
        weights: the model's `weights_fingerprint`, where it was taken already.
        progress: called with (sequences done, all sequences) of each of the three forms.

    Raises: InputError without items, if options and answer alone are longer than the context, if two letters or two
    options of an item give the same tokens, or if the model's output is not finite.
    """
    if not items:
        raise InputError("no multiple-choice items; give a file with at least one")
    limit = max_length or context_size(model) or _CONTEXT
    width = max(len(item.options) for item in items)
    orders = option_orders(items, n_shuffles, seed)
    if folder is not None:
        weights = weights or weights_fingerprint(model)
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "weights": weights, "progress": progress}
    text, n_tokens, cut = _text_scores(model, tokenizer, items, width, limit, folder, how)
    letters = [
        _letter_scores(model, tokenizer, items, orders, width, limit, folder, how, without_answer=without)
        for without in (False, True)
    ]
    n_cut = int((cut | letters[0][1]).sum())
    return ChoiceScores(text, n_tokens, letters[0][0], letters[1][0], n_cut)


def _text_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    width: int,
    limit: int,
    folder: Path | None,
    how: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probability and tokens of each option's text after its question, [i, o]; which items were cut, [i].

    Each option is a record whose text is the option alone: the one forward pass of the evaluator scores it.
    """
    prompts = _token_ids(tokenizer, [item.question + ANSWER for item in items], special=True)
    examples: list[Example] = []
    places: list[tuple[int, int]] = []
    cut = np.zeros(len(items), dtype=bool)
    for row, item in enumerate(items):
        options = _token_ids(tokenizer, [" " + option for option in item.options])
        if len({tuple(ids) for ids in options}) < len(options):
            raise InputError(f"item {row}: two options give the same tokens; change one so that they can be told apart")
        room = limit - max(map(len, options))
        prompt = _last(prompts[row], room, row, limit)
        cut[row] = len(prompt) < len(prompts[row])
        for column, ids in enumerate(options):
            start, end = len(prompt), len(prompt) + len(ids)
            examples.append(Example(len(examples), row, 0, prompt + ids, start, end, end, (), (), None))
            places.append((row, column))
    encoded = EncodedRecords(examples, [str(row) for row in range(len(items))], len(examples))
    scores = kept_scores(model, encoded, TaskSpec(max_length=limit), tokenizer, folder, "choices", **how)
    rows, columns = np.array(places).T
    text, n_tokens = np.full((len(items), width), -np.inf), np.ones((len(items), width), dtype=np.int64)
    text[rows, columns] = scores.per_record(scores.log_prob)
    n_tokens[rows, columns] = np.diff(scores.offsets)
    return text, n_tokens, cut


def _letter_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    orders: Sequence[np.ndarray],
    width: int,
    limit: int,
    folder: Path | None,
    how: dict[str, Any],
    *,
    without_answer: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of the letter of each option, [i, s, o], and which items were cut, [i]."""
    n_orders = len(orders[0])
    prompts = [
        _listed(item, order, without_answer) for item, own in zip(items, orders, strict=True) for order in own.tolist()
    ]
    spec = TaskSpec(labels=tuple(string.ascii_uppercase[:width]), prompt=ANSWER, max_length=limit)
    longest = max(map(len, label_option_ids(tokenizer, spec)))
    room = limit - len(_token_ids(tokenizer, [ANSWER])[0]) - longest
    examples: list[Example] = []
    cut = np.zeros(len(items), dtype=bool)
    for number, ids in enumerate(_token_ids(tokenizer, prompts, special=True)):
        row = number // n_orders
        kept = _last(ids, room, row, limit)
        cut[row] |= len(kept) < len(ids)
        examples.append(Example(number, row, 0, kept, 0, len(kept), len(kept), (), (), None))
    encoded = EncodedRecords(examples, [str(row) for row in range(len(items))], len(examples))
    by_letter = label_scores(model, encoded, tokenizer, spec, folder=folder, **how)
    by_option = np.full((len(items), n_orders, width), -np.inf)
    for row, own in enumerate(orders):
        for s, order in enumerate(own):
            by_option[row, s, order] = by_letter[row * n_orders + s, : len(order)]
    return by_option, cut


def _listed(item: ChoiceItem, order: Sequence[int], without_answer: bool) -> str:
    """The question with its options under letters; a missing option leaves a gap in the letters."""
    lines = [
        f"{letter}. {item.options[option]}"
        for letter, option in zip(string.ascii_uppercase, order, strict=False)
        if not (without_answer and option == item.answer)
    ]
    return "\n".join([item.question, *lines])


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Token ids; `special` puts the special tokens in front that the tokenizer puts before a text, and none behind."""
    found: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    front: list[int] = []
    if special:
        with_special: Any = tokenizer("a", add_special_tokens=True)["input_ids"]
        plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
        front = with_special[: with_special.index(plain[0])]
    return [[*front, *ids] for ids in found]


def _last(ids: list[int], room: int, row: int, limit: int) -> list[int]:
    """The end of a prompt, where options and question stand."""
    if room < 1:
        raise InputError(
            f"item {row}: its answer alone fills the model's context of {limit} tokens; leave the item out"
        )
    return ids[-room:]


# --- Figures ----------------------------------------------------------------------------------------------------------


def choice_figures(
    scores: ChoiceScores,
    items: Sequence[ChoiceItem],
    *,
    base: ChoiceScores | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Accuracy in all forms, how it holds when options move or go, and the paired differences from the base model.

    Args:
        scores: of the model, from `score_choices`.
        items: what it was asked.
        base: of the model before fine-tuning on the same items and orders.
        bootstrap: resamples of units.
        seed: of the resamples.

    Returns: figures (see docs/metrics/kinds.md) and counts. `minus_base` holds the same keys as paired differences.
    Raises: ValueError if the scores are of other items.
    """
    answers = np.array([item.answer for item in items])
    units = dense_units(np.array([item.unit for item in items], dtype=str))[0]
    for one in (scores, base):
        if one is not None and (len(one.text) != len(items) or one.letter.shape != scores.letter.shape):
            raise ValueError("the scores are of other items or orders")
    own = _outcomes(scores, answers)
    figures: dict[str, Any] = {name: _figure(name, own[name], units, bootstrap, seed) for name in own}
    n_options = np.array([len(item.options) for item in items])
    figures["chance"] = float((1 / n_options).mean())
    if base is not None:
        pair = ({n: Cases(v, units, _higher_is(n)) for n, v in of.items()} for of in (own, _outcomes(base, answers)))
        figures["minus_base"] = paired_differences(*pair, bootstrap=bootstrap, seed=seed)
    counts = {
        "n_items": len(items),
        "n_items_cut": scores.n_items_cut,
        "n_shuffles": scores.letter.shape[1] - 1,
        "most_options": int(n_options.max()),
    }
    return figures, counts


_HIGHER_IS_WORSE = ("answer_changes", "missing_letter_chosen", "missing_letter_chosen_shuffled")


def _outcomes(scores: ChoiceScores, answers: np.ndarray) -> dict[str, np.ndarray]:
    """Value of each figure for each item, [i]; flags are bool, shares over the shuffled orders are float."""
    at = np.arange(len(answers))
    chosen, left = _highest(scores.letter), _highest(scores.missing)  # [i, s]
    right, named = chosen == answers[:, None], left == answers[:, None]
    sure, still = (softmax(values, axis=2)[at, :, answers] for values in (scores.letter, scores.missing))  # [i, s]
    found = {
        "accuracy_text": _highest(scores.text) == answers,
        "accuracy_text_per_token": _highest(scores.text / scores.n_tokens) == answers,
        "accuracy": right[:, 0],
        "missing_letter_chosen": named[:, 0],
        "missing_confidence_drop": (sure - still)[:, 0],
    }
    if chosen.shape[1] > 1:
        found |= {
            "accuracy_shuffled": right[:, 1:].mean(axis=1),
            "answer_changes": (chosen != chosen[:, :1]).any(axis=1),
            "missing_letter_chosen_shuffled": named[:, 1:].mean(axis=1),
        }
    return found


def _higher_is(name: str) -> HigherIs:
    return "worse" if name in _HIGHER_IS_WORSE else "better"


def _highest(values: np.ndarray) -> np.ndarray:
    """Index of the highest value along the last axis; of equal ones the first by lot.

    In bfloat16 ties are common, and items often have their right option first. The lot is of item and option: the same
    for all orders and models.
    """
    order = np.random.default_rng(0).permuted(np.tile(np.arange(values.shape[-1]), (len(values), 1)), axis=1)
    order = order.reshape(len(values), *[1] * (values.ndim - 2), -1)  # [i, 1, o] or [i, o]
    place = np.take_along_axis(values, np.broadcast_to(order, values.shape), axis=-1).argmax(axis=-1)
    return np.take_along_axis(np.broadcast_to(order, values.shape), place[..., None], axis=-1)[..., 0]


def _figure(name: str, values: np.ndarray, units: np.ndarray, bootstrap: int, seed: int) -> Measure:
    higher_is = _higher_is(name)
    if values.dtype == bool:
        return rate_by_unit(values, units, higher_is, bootstrap, seed)
    low, high = bootstrap_ratio(values, np.ones(len(values)), units, bootstrap, seed)
    value = float(values.mean())
    if not low < high and 0 <= value <= 1:  # all items alike: as a rate over as many cases as there are units
        n_units = len(np.unique(units))
        low, high = wilson(value * n_units, n_units)
    return Measure(value, min(low, value), max(high, value), len(values), higher_is)
