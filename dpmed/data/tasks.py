"""What a model is trained to do: encode records to token windows, and how an example's tokens count.

Three tasks share one form. `causal_lm` predicts the next token (with labels also prompted classification: a fixed
prompt joins text and label), `masked_lm` predicts masked whole words, `classification` puts a head on pooled tokens.
A text longer than the context is cut into windows; every window stays with its patient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset as TorchDataset

from dpmed.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TaskKind = Literal["causal_lm", "masked_lm", "classification"]
Targets = Literal["direct", "indirect", "all"]
_TEXTS_AT_ONCE = 256
KINDS: tuple[str, ...] = ("causal_lm", "masked_lm", "classification")


@dataclass(frozen=True)
class TaskSpec:
    """Everything that fixes how a record becomes tokens, targets and predictions; saved beside the weights."""

    kind: TaskKind = "causal_lm"
    labels: tuple[str, ...] = ()
    """Label names in the order of the head's outputs; empty where the records have no labels."""
    multi_label: bool = False
    max_length: int = 256
    """Tokens per window, special tokens, prompt and label included."""
    prompt: str = "\nLabel:"
    """causal_lm: joins text and label; the label follows after one space."""
    loss_on: Literal["all", "completion"] = "all"
    """causal_lm: loss over text and label, or over the label alone."""
    completion_weight: float = 1.0
    """causal_lm: weight of a label token's loss, where a text token's is 1."""
    pooling: Literal["model", "mean"] = "model"
    """classification: the model's own pooling, or the mean over valid tokens."""
    mask_probability: float = 0.15
    """masked_lm: share of whole words that become targets."""
    thresholds: tuple[float, ...] | None = None
    """multi-label classification: decision threshold per label, fixed on validation or training records."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"task: {self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if self.kind == "causal_lm" and self.multi_label:
            raise InputError("task causal_lm reads one label per record; use task: classification for several labels")
        if self.kind == "classification" and not self.labels:
            raise InputError("task classification needs labels; name the label column with data.label")
        if self.loss_on == "completion" and not self.labels:
            raise InputError("data.loss_on: completion needs labels; name the label column with data.label")
        if not 0 < self.mask_probability < 1:
            raise InputError(f"mask_probability is {self.mask_probability}; choose a share between 0 and 1")
        if self.completion_weight <= 0:
            raise InputError(f"data.completion_weight is {self.completion_weight}; choose a number above 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """Reads what `to_dict` wrote; lists become tuples again."""
        plain = dict(values)
        for name in ("labels", "thresholds"):
            if plain.get(name) is not None:
                plain[name] = tuple(plain[name])
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """An identifier in token positions of one window, [start, end)."""

    start: int
    end: int
    type: str
    source: str
    whole: bool
    """False where the window's edge cut the identifier; such a span is protected but not scored."""


@dataclass(frozen=True, slots=True)
class Example:
    """One window of one record."""

    record: int
    unit: int
    window: int
    input_ids: list[int]
    text_start: int
    text_end: int
    """Text tokens are input_ids[text_start:text_end]; around them stand special tokens, prompt and label."""
    prompt_end: int
    """causal_lm with labels: label tokens (and the end token) are input_ids[prompt_end:]."""
    spans: tuple[TokenSpan, ...]
    words: tuple[int, ...]
    """Word number of each text token (masked_lm; whole-word masking), else empty."""
    label: int | tuple[int, ...] | None
    """Index of the label, or the indices of all labels (multi-label)."""


def covers(which: Targets, source: str) -> bool:
    """Whether an identifier of this source is among the targets: `indirect` ones come from rarity, all others are
    direct."""
    return which == "all" or (which == "indirect") == (source == "indirect")


class EncodedRecords(TorchDataset[Example]):
    """The windows of all records, in memory only.

    Attributes:
        examples: windows in record order.
        unit_names: unit of dense unit index i.
        n_records: number of records encoded.
        n_records_cut: records that needed more than one window.
    """

    def __init__(self, examples: list[Example], unit_names: list[str], n_records: int) -> None:
        self.examples = examples
        self.unit_names = unit_names
        self.n_records = n_records
        self.n_records_cut = len({e.record for e in examples if e.window > 0})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def content(self) -> Iterator[bytes]:
        """All that training reads of the examples, in order, as bytes: to tell whether two data sets are the same."""
        for e in self.examples:
            plain = (e.record, e.unit, e.window, e.input_ids, e.text_start, e.text_end, e.prompt_end, e.words, e.label)
            yield repr(plain).encode()

    @property
    def unit_of_example(self) -> list[int]:
        return [e.unit for e in self.examples]

    @property
    def lengths(self) -> list[int]:
        return [len(e.input_ids) for e in self.examples]


def label_names(records: Dataset) -> tuple[str, ...]:
    """The sorted label names of the records; () without a label column."""
    if "label" not in records.column_names:
        return ()
    names: set[str] = set()
    for label in records["label"]:
        names.update([label] if isinstance(label, str) else label)
    return tuple(sorted(names))


def label_option_ids(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec) -> list[list[int]]:
    """Token ids of each label as it follows the prompt, in the order of `spec.labels`."""
    options = [tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in spec.labels]
    if len({tuple(ids) for ids in options}) < len(options):
        raise InputError("two labels give the same tokens; rename one so that the model can tell them apart")
    return options


def encode(records: Dataset, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec) -> EncodedRecords:
    """Tokenise records and cut them into windows of at most `spec.max_length` tokens.

    Args:
        records: columns text, unit, optional label and identifiers (see `load_records`).
        tokenizer: a fast tokenizer (identifiers are found by character offsets).
        spec: the task.

    Raises: InputError if the tokenizer is not a fast one, a label is not in `spec.labels`, or no room is left for text.
    """
    if not tokenizer.is_fast:
        raise InputError("the model has no fast tokenizer (tokenizer.json); dpmed needs its character offsets")
    before, after = _special_tokens(tokenizer)
    has_label = bool(spec.labels) and "label" in records.column_names
    prompt = tokenizer(spec.prompt, add_special_tokens=False)["input_ids"] if spec.kind == "causal_lm" else []
    options = label_option_ids(tokenizer, spec) if spec.kind == "causal_lm" and spec.labels else []
    end: list[Any] = [tokenizer.eos_token_id] if spec.kind == "causal_lm" and tokenizer.eos_token_id is not None else []
    longest = max((len(o) for o in options), default=0) + (len(prompt) if options else 0) + len(end)
    budget = spec.max_length - len(before) - len(after) - longest
    if budget < 1:
        raise InputError(f"data.max_length {spec.max_length} leaves no room for text; raise it")
    index = {name: i for i, name in enumerate(spec.labels)}
    unit_names = list(dict.fromkeys(records["unit"]))
    unit_index = {name: i for i, name in enumerate(unit_names)}
    identifiers = records["identifiers"] if "identifiers" in records.column_names else [[]] * len(records)
    labels = records["label"] if has_label else [None] * len(records)
    units = records["unit"]
    examples: list[Example] = []
    for row, (spans, (ids, offsets, words)) in enumerate(zip(identifiers, _tokens(records, tokenizer), strict=True)):
        label = _label_index(labels[row], index, row)
        tail = list(after)
        if options and isinstance(label, int):
            tail = prompt + options[label] + end
        n_windows = max(1, math.ceil(len(ids) / budget))
        for window in range(n_windows):
            cut = slice(window * budget, (window + 1) * budget)
            last = window == n_windows - 1
            suffix = tail if tail or not last else end
            examples.append(
                Example(
                    record=row,
                    unit=unit_index[units[row]],
                    window=window,
                    input_ids=[*before, *ids[cut], *suffix],
                    text_start=len(before),
                    text_end=len(before) + len(ids[cut]),
                    prompt_end=len(before) + len(ids[cut]) + (len(prompt) if options and label is not None else 0),
                    spans=_token_spans(spans, offsets[cut], len(before)),
                    words=tuple(words[cut]) if spec.kind == "masked_lm" else (),
                    label=label,
                )
            )
    return EncodedRecords(examples, unit_names, len(records))


def _tokens(
    records: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """Token ids, character offsets and word numbers (-1 for none) of each text.

    Some records at a time, since a tokenizer's answer takes many times the room of the token ids; and with one object
    for all equal numbers, which takes a quarter of the room of one for each.
    """
    known: dict[int, int] = {}
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        texts = list(records["text"][start : start + _TEXTS_AT_ONCE])
        tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for row in range(len(texts)):
            ids: Any = tokens["input_ids"][row]
            words = [-1 if word is None else word for word in tokens.word_ids(row)]
            same = ([known.setdefault(number, number) for number in numbers] for numbers in (ids, words))
            yield next(same), tokens["offset_mapping"][row], next(same)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after one text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise InputError("the tokenizer changes a text when it adds special tokens; dpmed cannot place identifiers in it")


def _label_index(label: Any, index: Mapping[str, int], row: int) -> int | tuple[int, ...] | None:
    if label is None or not index:
        return None
    names = [label] if isinstance(label, str) else list(label)
    unknown = [name for name in names if name not in index]
    if unknown:
        raise InputError(f"record {row}: its label is not among the {len(index)} labels of the training records")
    return index[label] if isinstance(label, str) else tuple(index[name] for name in names)


def _token_spans(
    spans: Sequence[Mapping[str, Any]], offsets: Sequence[tuple[int, int]], shift: int
) -> tuple[TokenSpan, ...]:
    """Character spans as token spans of one window; a span that a window's edge cuts is kept as not whole."""
    found: list[TokenSpan] = []
    if not offsets:
        return ()
    for span in spans:
        hit = [i for i, (a, b) in enumerate(offsets) if a < span["end"] and b > span["start"]]
        if not hit:
            continue
        whole = offsets[hit[0]][0] <= span["start"] and offsets[hit[-1]][1] >= span["end"]
        found.append(TokenSpan(hit[0] + shift, hit[-1] + 1 + shift, span["type"], span["source"], whole))
    return tuple(found)
