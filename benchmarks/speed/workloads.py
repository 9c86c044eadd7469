"""Models and records of the rows: built or loaded here, so that every column trains the very same."""

from __future__ import annotations

import importlib
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rows import Job, Row, Settings
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpmed.data.records import load_records
from dpmed.data.tasks import Example, TaskSpec, encode
from dpmed.models import load_model, load_tokenizer
from dpmed.trainers.lora import lora_config, with_adapters

if TYPE_CHECKING:
    from torch import nn

N_LABELS = 14
LABELS = tuple(f"label {i:02d}" for i in range(N_LABELS))
FOLDERS = {"minilm": "minilm-l6", "smollm2": "smollm2-135m"}
SPECIAL = ("[PAD]", "[UNK]")


class NotHere(Exception):
    """A row that this machine cannot measure; the message is the reason that the results give."""


@dataclass
class Workload:
    """What a column trains."""

    model: nn.Module
    """With its adapters."""
    tokenizer: PreTrainedTokenizerBase
    spec: TaskSpec
    examples: list[Example]


def make_workload(job: Job) -> Workload:
    """Build a row's model and records. Raises: NotHere without the model, the data or the device that it needs."""
    row, settings = job.row, job.settings
    if (row.cuda or settings.device == "cuda") and not torch.cuda.is_available():
        raise NotHere("no CUDA device")
    if row.cuda and settings.device != "cuda":
        raise NotHere("needs --device cuda")
    torch.manual_seed(0)
    spec = _spec(row)
    examples: list[Example] = []
    if row.tokens is None:
        examples, spec = _reports(row, settings)
    model, tokenizer = _model(row, spec, settings)
    if row.tokens is not None:
        examples = _random_examples(row, spec, tokenizer, n=job.batch)
    return Workload(_adapted(model, row, spec), tokenizer, spec, examples)


def _spec(row: Row) -> TaskSpec:
    length = row.tokens or row.max_length
    if row.classification:
        return TaskSpec(kind="classification", labels=LABELS, multi_label=True, max_length=length)
    return TaskSpec(kind="causal_lm", max_length=length)


def _model(row: Row, spec: TaskSpec, settings: Settings) -> tuple[Any, PreTrainedTokenizerBase]:
    model: Any
    if row.model in FOLDERS:
        path = _model_folder(row, settings)
        model, tokenizer = load_model(path, spec), load_tokenizer(path)
    else:
        model, tokenizer = _random_model(row, settings), _word_tokenizer(_config(row).vocab_size or 0)
        model.dpmed_fresh_modules = []  # nothing came from a checkpoint; heads are found by their names
    if row.classification:
        model.config.problem_type = "multi_label_classification"  # what tells transformers.Trainer the loss
    return model, tokenizer


def _model_folder(row: Row, settings: Settings) -> Path:
    if settings.models is None:
        raise NotHere("pass --models, the folder that prepare_models.py wrote")
    path = Path(settings.models) / FOLDERS[row.model]
    if not path.is_dir():
        raise NotHere(f"--models holds no {path.name}")
    return path


def _config(row: Row) -> Any:
    """Shapes alone: speed does not hang on the weights."""
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if row.model == "llama-1b":
        return transformers.LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=32000,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_cache=False,
            **ids,
        )
    shapes = {"bert-small": (512, 4, 8, 2048, 30522), "tiny": (32, 2, 2, 64, 100)}
    hidden, layers, heads, inner, vocabulary = shapes[row.model]
    bert: Any = transformers.BertConfig  # its annotations know no num_labels
    return bert(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        pad_token_id=0,
        num_labels=N_LABELS,
    )


def _random_model(row: Row, settings: Settings) -> Any:
    if row.classification:
        return transformers.AutoModelForSequenceClassification.from_config(_config(row))
    with torch.device(settings.device):  # made where it is used: no copy of the weights in main memory
        return transformers.AutoModelForCausalLM.from_config(_config(row), dtype=torch.bfloat16)


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """One made-up word per token id; it pads, which is all that is asked of it here."""
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[1]))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=SPECIAL[0], unk_token=SPECIAL[1])


def _adapted(model: Any, row: Row, spec: TaskSpec) -> nn.Module:
    targets = row.targets if isinstance(row.targets, str) else list(row.targets)
    config = lora_config(model, spec.kind, rank=row.rank, alpha=2 * row.rank, target_modules=targets, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_adapters(model, config)


def _random_examples(row: Row, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, *, n: int) -> list[Example]:
    rng = random.Random(0)
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    length = spec.max_length
    return [
        Example(
            record=i,
            unit=i,
            window=0,
            input_ids=rng.choices(ordinary, k=length),
            text_start=0,
            text_end=length,
            prompt_end=length,
            spans=(),
            words=(),
            label=tuple(rng.sample(range(N_LABELS), k=2)) if row.classification else None,
        )
        for i in range(n)
    ]


def _reports(row: Row, settings: Settings) -> tuple[list[Example], TaskSpec]:
    """The training reports of the IU X-ray recipe, read in memory: nothing of them is written anywhere."""
    from datasets import Dataset

    from dpmed.errors import InputError

    prepare = importlib.import_module("dpmed.recipes.iu_xray.prepare")  # by its installed name
    if settings.data is None:
        raise NotHere("pass --data, the folder with the IU X-ray reports")
    source = Path(settings.data)
    try:
        names = prepare.label_names((source / prepare.LABEL_README).read_text(encoding="utf-8"))
        labels = prepare.read_labels(source / prepare.LABEL_FILE, names)
        texts = {m: prepare.report_text(xml, where=m) for m, xml in prepare.archived_reports(source / prepare.ARCHIVE)}
    except (OSError, InputError) as error:
        raise NotHere(f"--data holds no IU X-ray reports ({type(error).__name__})") from None
    members = [m for m, text in texts.items() if text and m in labels and prepare.split_of(text) == "train"]
    columns = {"text": [texts[m] for m in members], "label": [labels[m] for m in members], "unit": members}
    records = load_records(Dataset.from_dict(columns), label="label", unit="unit", multi_label=True)
    spec = TaskSpec(kind="classification", labels=tuple(names), multi_label=True, max_length=row.max_length)
    encoded = encode(records, load_tokenizer(_model_folder(row, settings)), spec)
    return [e for e in encoded.examples if e.window == 0], spec  # one window a report: a unit is a report
