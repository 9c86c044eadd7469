"""The experiment: what is measured (rows) and how it is trained (columns). Data only; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Column = Literal["plain", "lora", "one_pass", "patients", "opacus", "ghost"]
COLUMNS: dict[Column, str] = {
    "plain": "plain LoRA in transformers.Trainer: its own collator, random batches, padded to the longest",
    "lora": "dpmed's LoRATrainer: batches of similar lengths",
    "one_pass": "dpmed's DPLoRATrainer, one_pass engine, one record per unit, noise on",
    "patients": "the same with several records per unit",
    "opacus": "DPLoRATrainer with Opacus' hooks",
    "ghost": "Opacus' ghost clipping in the smallest correct loop, random batches",
}
BASELINE: Column = "plain"


@dataclass(frozen=True)
class Row:
    """One workload. Every step of a column without draws trains `batch` records."""

    name: str
    model: Literal["bert-small", "minilm", "smollm2", "llama-1b", "tiny"]
    rank: int
    targets: str | tuple[str, ...]
    batch: int | None
    """Physical batch; None: the largest that plain LoRA and one_pass both fit in memory."""
    tokens: int | None
    """Tokens of each record, all of them real; None: IU X-ray reports, cut at `max_length`."""
    max_length: int = 256
    draw: int | None = None
    """Expected records of a DP step, in micro-batches of at most `micro_batch_tokens`; None: all `batch` records."""
    micro_batch_tokens: int | None = None
    """None: `batch` records of `tokens`, so that a draw is one micro-batch."""
    records_per_unit: int = 4
    """Of the column `patients`."""
    max_steps: int | None = None
    """Timed DP steps, at most; columns without draws do `draw / batch` times as many."""
    cuda: bool = False
    """Needs a GPU; weights and autocast are then bfloat16."""
    columns: tuple[Column, ...] = ("plain", "one_pass", "opacus", "ghost")

    @property
    def classification(self) -> bool:
        return self.model in ("bert-small", "minilm", "tiny")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        targets = values["targets"]
        frozen = {"targets": targets if isinstance(targets, str) else tuple(targets)}
        return cls(**{**values, **frozen, "columns": tuple(values["columns"])})


QUERY_VALUE = ("query", "value")
ALL: tuple[Column, ...] = ("plain", "lora", "one_pass", "patients", "opacus", "ghost")

ROWS: tuple[Row, ...] = (
    Row("bert-small-t128", "bert-small", 8, QUERY_VALUE, batch=16, tokens=128),
    Row("bert-small-t512", "bert-small", 8, QUERY_VALUE, batch=4, tokens=512),
    Row(
        "minilm-t64",
        "minilm",
        8,
        "all-linear",
        batch=32,
        tokens=64,
        columns=("plain", "one_pass", "patients", "opacus", "ghost"),
    ),
    Row(
        "minilm-reports",
        "minilm",
        8,
        "all-linear",
        batch=32,
        tokens=None,
        draw=256,
        micro_batch_tokens=4096,  # dpmed's default; HF's batches of 32 reach twice as many padded tokens
        records_per_unit=3,
        max_steps=3,
        columns=ALL,
    ),
    Row("smollm2-t128", "smollm2", 16, "all-linear", batch=4, tokens=128),
    Row("llama-1b-t512", "llama-1b", 16, "all-linear", batch=None, tokens=512, cuda=True),
    Row("llama-1b-t2048", "llama-1b", 16, "all-linear", batch=None, tokens=2048, cuda=True),
)


@dataclass(frozen=True)
class Settings:
    """What all measurements of one output file share."""

    steps: int = 5
    warmup: int = 2
    repetitions: int = 5
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    models: str | None = None
    """Folder with minilm-l6 and smollm2-135m; None leaves their rows empty."""
    data: str | None = None
    """Folder with the IU X-ray archive; None leaves their rows empty."""

    def shared(self) -> dict[str, Any]:
        """What must agree before two runs may share an output file; no paths, which are the machine's own."""
        return {"steps": self.steps, "warmup": self.warmup, "threads": self.threads, "device": self.device}


@dataclass(frozen=True)
class Job:
    """One measurement: a column of a row, in one process."""

    row: Row
    column: Column
    repetition: int
    batch: int
    settings: Settings

    @property
    def n_timed(self) -> int:
        """Steps that count: as many records for a column without draws as for one with."""
        n = min(self.settings.steps, self.row.max_steps or self.settings.steps)
        draws = self.column in ("one_pass", "patients", "opacus")
        return n if draws or self.row.draw is None else n * self.row.draw // self.batch

    @property
    def n_steps(self) -> int:
        return self.settings.warmup + self.n_timed

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {**asdict(self), "row": self.row.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "row": Row.from_dict(values["row"]), "settings": Settings(**values["settings"])})
