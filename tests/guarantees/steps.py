"""One real DP step of a tiny model, and the slow truth: each unit alone, by plain autograd, clipped by hand."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

import tiny_models
from dpmed.data.batches import Batch, Collator, per_record_loss
from dpmed.data.tasks import Example, TaskKind, TaskSpec, encode
from dpmed.privacy.clipping import STABILITY, Clipping
from dpmed.privacy.plan import EngineName, PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.lora import lora_config, with_adapters

LABELS = ("acute", "chronic", "none")
TOKENIZER = tiny_models.make_tokenizer()
WORDS = ("fever", "cough", "effusion", "metformin", "stable", "radiograph", "cardiologist", "admitted", "twice", "no")
ENGINES: tuple[EngineName, ...] = ("one_pass", "opacus")
MAX_LENGTH = 64


@dataclass(frozen=True)
class Case:
    """What is trained: architecture and task."""

    kind: tiny_models.Kind
    task: TaskKind
    multi_label: bool = False

    @property
    def spec(self) -> TaskSpec:
        labels = LABELS if self.task == "classification" else ()
        return TaskSpec(kind=self.task, labels=labels, multi_label=self.multi_label, max_length=MAX_LENGTH)

    def __str__(self) -> str:
        return f"{self.kind}-{self.task}{'-several' if self.multi_label else ''}"


CASES: list[Case] = [
    *(Case(kind, "classification", multi) for kind in tiny_models.KINDS for multi in (False, True)),
    *(Case(kind, "masked_lm") for kind in tiny_models.ENCODERS),
    *(Case(kind, "causal_lm") for kind in tiny_models.DECODERS),
]


@dataclass(frozen=True)
class Draw:
    """Units of one step and how the step is cut and clipped."""

    sizes: tuple[int, ...]
    """Records of each unit."""
    seed: int = 0
    """Of words, labels and the order of the records."""
    micro_batch_tokens: int = 90
    buffer_units: int = 100
    """Units for which the gradient buffer has room."""
    clipping: Clipping = "norm"
    clip_factor: float = 1.0
    """Clip norm / the median norm of the units."""

    def records(self, case: Case) -> Dataset:
        """Texts of ragged lengths; the records of a unit stand apart from each other."""
        rng = random.Random(self.seed)
        units = [unit for unit, size in enumerate(self.sizes) for _ in range(size)]
        rng.shuffle(units)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 11))) for _ in units]
        columns: dict[str, Any] = {"text": texts, "unit": [f"p{u}" for u in units], "identifiers": [[] for _ in units]}
        if case.multi_label:
            columns["label"] = [rng.sample(LABELS, k=rng.randint(1, 3)) for _ in units]
        elif case.task == "classification":
            columns["label"] = rng.choices(LABELS, k=len(units))
        return Dataset.from_dict(columns)


def adapted(case: Case, *, dropout: float = 0.0, **changes: Any) -> Any:
    """A tiny PEFT model: factors on all linear layers, and a head. B is not zero, so that A has a gradient too."""
    model = tiny_models.make_model(case.kind, case.task, initializer_range=0.1, **changes)
    config = lora_config(model, case.task, rank=3, alpha=6, target_modules="all-linear", dropout=dropout)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # peft on Conv1D
        torch.manual_seed(0)
        found = with_adapters(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return found


def make_plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "unit": "patient",
        "n_units": 6,
        "expected_batch_units": 3,
        "max_records_per_unit": 4,
        "clip_norm": 1.0,
        "noise_multiplier": 0.0,
        "n_steps": 3,
        "delta": 1e-3,
    }
    return PrivacyPlan(**{**values, **changes})


class FixedBatches:
    """Collates once, so that the trainer and the slow loop see the same masked words; rows are cut from it."""

    def __init__(self, collator: Callable[[list[Example]], Batch], examples: list[Example]) -> None:
        self.rows = {id(e): i for i, e in enumerate(examples)}
        self.lengths = [len(e.input_ids) for e in examples]
        self.whole = collator(examples)

    def __call__(self, examples: list[Example]) -> Batch:
        rows = [self.rows[id(e)] for e in examples]
        longest = max(self.lengths[row] for row in rows)
        per_token = {"input_ids", "attention_mask", "weights"} | ({"targets"} if "weights" in self.whole else set())
        return {k: v[rows][:, :longest] if k in per_token else v[rows] for k, v in self.whole.items()}


@dataclass
class Scene:
    """A trainer in front of its first step, and the records of that step."""

    trainer: DPLoRATrainer
    examples: list[Example]

    @property
    def cuts(self) -> list[list[Example]]:
        return self.cuts_of(self.examples)

    def cuts_of(self, examples: list[Example]) -> list[list[Example]]:
        """The micro-batches of a step, where the buffer does not limit them."""
        return [cut for group in self.trainer._cut(examples) for cut in group]

    def fix_batches(self) -> None:
        """Collate the records once and for all."""
        self.trainer.data_collator = FixedBatches(Collator(TOKENIZER, self.trainer.spec), self.examples)

    @property
    def clip_norm(self) -> float:
        return self.trainer.plan.clip_norm

    def plan(self, **changes: Any) -> None:
        """Change the plan of the steps to come."""
        self.trainer.plan = replace(self.trainer.plan, **changes)
        self.trainer._noise = self.trainer.plan.noise()


def make_scene(folder: Path, case: Case, draw: Draw, model: Any = None, **changes: Any) -> Scene:
    """The scene of a draw; the clip norm is set among the norms of its units."""
    model = model if model is not None else adapted(case)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "unit_column": "unit",
        "learning_rate": 1e-3,
        "ledger": "none",
        "micro_batch_tokens": draw.micro_batch_tokens,
        "buffer_mib": draw.buffer_units * 4 * n_trained / 2**20,  # a fraction of a MiB, since the models are tiny
    }
    n_units = len(draw.sizes)
    trainer = DPLoRATrainer(
        model,
        DPLoRATrainingConfig(**{**values, **changes}),
        encode(draw.records(case), TOKENIZER, case.spec),
        processing_class=TOKENIZER,
        spec=case.spec,
        plan=make_plan(n_units=n_units, expected_batch_units=max(1, n_units // 2), clipping=draw.clipping),
    )
    trainer._moved = True  # no optimiser steps here, so nothing has to move between two calls
    scene = Scene(trainer, list(trainer.train_dataset))
    scene.fix_batches()
    norms = sorted(unit_gradients(scene).values(), key=lambda g: float(g.norm()))
    scene.plan(clip_norm=draw.clip_factor * float(norms[len(norms) // 2].norm()))
    return scene


def step_sum(scene: Scene, examples: Sequence[Example] | None = None, *, engine: EngineName = "one_pass") -> Tensor:
    """What one real training step leaves in `.grad`, times the divisor: the clipped sum, if the plan has no noise."""
    trainer = scene.trainer
    trainer.plan = replace(trainer.plan, engine=engine)
    trainer._run = trainer._open(None, n_seen=0)
    trainer._engine = trainer.plan.attach(trainer.model)
    try:
        loss = trainer.training_step(
            trainer.model, trainer._cut(list(scene.examples if examples is None else examples))
        )
    finally:
        trainer._engine.detach()
        trainer._engine = None
    assert float(loss) == 0.0  # the private loss is not told
    return flat_gradient(trainer.model) * trainer.plan.divisor


def unit_gradients(scene: Scene, examples: Sequence[Example] | None = None) -> dict[int, Tensor]:
    """Gradient of each unit by plain autograd, one record at a time, without padding; float64."""
    trainer, chosen = scene.trainer, scene.examples if examples is None else examples
    model: Any = trainer.model.train()
    found: dict[int, Tensor] = {}
    for unit in sorted({e.unit for e in chosen}):
        model.zero_grad()
        for example in (e for e in chosen if e.unit == unit):
            batch = trainer.data_collator([example])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            per_record_loss(logits, batch, trainer.spec)[0].backward()
        found[unit] = flat_gradient(model).double()
    model.zero_grad()
    return found


def slow_sum(scene: Scene, examples: Sequence[Example] | None = None) -> Tensor:
    """The sum over units, each clipped by the formula of its mode."""
    clip, automatic = scene.clip_norm, scene.trainer.plan.clipping == "automatic"
    total: Tensor | None = None
    for gradient in unit_gradients(scene, examples).values():
        norm = float(gradient.norm())
        clipped = gradient * (clip / (norm + STABILITY) if automatic else min(1.0, clip / norm))
        total = clipped if total is None else total + clipped
    assert total is not None
    return total


def flat_gradient(model: Any) -> Tensor:
    """`.grad` of all trainable weights, each of which must have one."""
    found = [p.grad.reshape(-1) for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return torch.cat(found)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
