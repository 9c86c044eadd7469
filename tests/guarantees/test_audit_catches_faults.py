"""The audit on real training runs: it stays below epsilon in honest ones, and sees what breaks the guarantee.

The auditor is as strong as the guarantee allows: it knows the weights before and after, all texts and the plan, and
guesses the canaries' coins. The change of the weights is the sum of the clipped gradients of those who were in, plus
noise; a canary's score is the least-squares estimate of its coin from that change. No score sees a coin.

Every patient is in every step, so epsilon is exact and an attack as strong as this one comes near to what it allows.
Noise and coins are from the operating system, in each run anew; the canaries' texts are the same in all runs, so that
their gradients are computed once.
"""

from __future__ import annotations

import functools
import gc
import random
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor

import tiny_models
from dpmed.data import canaries
from dpmed.data.batches import Collator, per_record_loss
from dpmed.data.records import load_records
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import PrivacyError
from dpmed.privacy import clipping, flat
from dpmed.privacy.accounting import calibrate
from dpmed.privacy.audit import AuditResult, audit_epsilon, ceiling
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig

CLAIMED, DELTA = 1.0, 1e-5
N_CANARIES, N_HONEST, N_PATIENTS = 160, 20, 10
GUESSES = 2 * N_CANARIES // 5
CLIP = 0.05  # far below the gradients' norms of 1 and more, so that it matters whether it is done
RATE = 0.1
HEAD = "lm_head"
SURE = 1 - 1e-5
"""Confidence for the bound that is nearly tight here: 20 honest runs then fail once in 5000 times, by its guarantee."""
SPEC = TaskSpec(kind="causal_lm", max_length=80)
TOKENIZER = tiny_models.make_tokenizer()
WORDS = re.findall(
    r"\w+",
    """fever cough effusion metformin stable radiograph admitted discharged twice morning lungs heart clear chest acute
    normal swelling oedema murmur wheeze sodium urea lactate troponin aspirin heparin statin insulin nurse ward pain
    rash fall syncope seizure stroke sepsis biopsy lesion nodule""",
)

Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", autouse=True)
def few_collections() -> Iterator[None]:
    """The trainer collects garbage after each run, which takes longer than the run; what is there now is kept."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def records() -> Dataset:
    rng = random.Random(0)
    texts = [" ".join(rng.sample(WORDS, 12)) for _ in range(N_PATIENTS)]
    return load_records(Dataset.from_dict({"text": texts, "p": [f"u{i}" for i in range(N_PATIENTS)]}), unit="p")


def make_model() -> Any:
    """Factors on two projections and a head that is trained in full; the same weights at each call."""
    base = tiny_models.make_model("llama", initializer_range=0.3, hidden_size=96, num_hidden_layers=1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=[HEAD])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # not zero, so that its partner has a gradient and moves without noise too
                parameter.data.normal_(std=0.05)
    return model


@functools.cache
def noise_multiplier(n_steps: int) -> float:
    return calibrate(target_epsilon=CLAIMED, delta=DELTA, sampling_rate=1.0, n_steps=n_steps)


def make_plan(n_units: int, n_steps: int) -> PrivacyPlan:
    return PrivacyPlan(
        unit="patient",
        n_units=n_units,
        expected_batch_units=n_units,
        max_records_per_unit=16,
        clip_norm=CLIP,
        noise_multiplier=noise_multiplier(n_steps),
        n_steps=n_steps,
        delta=DELTA,
        target_epsilon=CLAIMED,
    )


def trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in trained(model)]).double()


@functools.cache
def clipped_gradients(texts: tuple[str, ...]) -> Tensor:
    """Of each text at the first weights, [texts, p], in double, in the order of `weights`; by the engine unharmed."""
    model = make_model().train()
    encoded = encode(Dataset.from_dict({"text": texts, "unit": list(map(str, range(len(texts))))}), TOKENIZER, SPEC)
    assert len(encoded) == len(texts)
    engine: Any = make_plan(len(texts), 1).attach(model)
    engine.begin(encoded.unit_of_example, torch.device("cpu"))
    batch = Collator(TOKENIZER, SPEC)(list(encoded))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    engine.backward(per_record_loss(logits, batch, SPEC))
    rows = engine.unit_gradients().double()
    engine.write_gradients(torch.arange(rows.shape[1], dtype=torch.float32))  # tells the engine's order of columns
    order = torch.cat([p.grad.reshape(-1).long() for _, p in trained(model) if p.grad is not None])
    norms = rows.norm(dim=1, keepdim=True)
    assert float(norms.min()) > 10 * CLIP
    return (rows * (CLIP / norms))[:, order]


def coin_scores(change: Tensor, rows: Tensor, others: Tensor) -> np.ndarray:
    """Least-squares estimate of each coin, [c], from a noised sum of the rows of who was in.

    Args:
        change: the noised sum, [p].
        rows: what each canary would add, [c, p].
        others: what each ordinary patient adds, [o, p]; estimated too, so that their scale need not be right.
    """
    known = torch.cat([rows, others])
    return torch.linalg.solve(known @ known.t(), known @ change)[: len(rows)].numpy()


@dataclass
class Audited:
    """A run, and what the auditor makes of it."""

    trainer: DPLoRATrainer
    scores: dict[str, np.ndarray]
    """By the weights that the auditor looks at: all of them, or those of the head."""
    included: np.ndarray

    def bounds(self, **changes: Any) -> list[AuditResult]:
        """The audit by each of the scores."""
        how = {"delta": DELTA, "guesses": GUESSES, **changes}
        return [audit_epsilon(scores, self.included, **how) for scores in self.scores.values()]

    def bound(self, **changes: Any) -> float:
        """The larger bound of two attacks that each get half of the error."""
        confidence = 1 - (1 - changes.pop("confidence", 0.95)) / len(self.scores)
        return max(found.lower_bound for found in self.bounds(confidence=confidence, **changes))


def run(
    folder: Path, *, n_steps: int = 1, repeats: int = 1, split: bool = False, fault: Fault | None = None
) -> Audited:
    """Plant canaries, train, score. `split` makes every note a patient of its own."""
    with pytest.MonkeyPatch.context() as patch:
        sources = {"texts": random.Random(0), "coins": secrets.SystemRandom()}
        patch.setattr(canaries, "_generator", lambda seed, purpose: sources[purpose])
        how = {"n": N_CANARIES, "designs": ["random_tokens"], "repeats": [repeats]}
        planted, manifest = canaries.plant_canaries(records(), **how)
    if split:
        planted = planted.remove_columns("unit").rename_column("record_id", "unit")
    rows = clipped_gradients((*manifest.texts, *records()["text"]))
    model, encoded = make_model(), encode(planted, TOKENIZER, SPEC)
    before, plan = weights(model), make_plan(len(encoded.unit_names), n_steps)
    config = DPLoRATrainingConfig(
        output_dir=str(folder),
        use_cpu=True,
        unit_column="unit",
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        ledger="none",
        micro_batch_tokens=8192,
    )
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch)
        trainer = DPLoRATrainer(model, config, encoded, processing_class=TOKENIZER, spec=SPEC, plan=plan)
        trainer.train()
    assert trainer.state.global_step == n_steps
    change = (before - weights(model)) / RATE * plan.divisor / n_steps
    in_head = torch.cat([torch.full((p.numel(),), HEAD in name) for name, p in trained(model)])
    parts = {"all": slice(None), "head": in_head}
    scores = {k: coin_scores(change[at], rows[:N_CANARIES, at], rows[N_CANARIES:, at]) for k, at in parts.items()}
    return Audited(trainer, scores, manifest.included)


# --- Honest runs ------------------------------------------------------------------------------------------------------


def test_so_many_canaries_can_show_more_than_is_claimed() -> None:
    assert ceiling(N_CANARIES, delta=DELTA, guesses=GUESSES) > 3 * CLAIMED
    assert ceiling(N_CANARIES, delta=DELTA, guesses=GUESSES, family="gaussian", confidence=SURE) > 2 * CLAIMED


def test_the_bound_stays_below_epsilon_in_honest_runs(tmp_path: Path) -> None:
    found = [run(tmp_path / str(i), n_steps=2 if i % 4 == 0 else 1) for i in range(N_HONEST)]
    assert max(audited.bound() for audited in found) < CLAIMED
    assert max(audited.bound(family="gaussian", confidence=SURE) for audited in found) < CLAIMED
    for result in (result for audited in found for result in audited.bounds()):
        result.check_against(CLAIMED, delta=DELTA)


# --- Planted faults ---------------------------------------------------------------------------------------------------


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianNoise, "add_", lambda self, total: total)


def a_tenth_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    made = GaussianNoise.__init__
    patch.setattr(GaussianNoise, "__init__", lambda self, std, **options: made(self, std / 10, **options))


def clipping_off(patch: pytest.MonkeyPatch) -> None:
    plain = lambda rows, **_: (rows.sum(dim=0), torch.zeros((), dtype=torch.int64))  # noqa: E731
    patch.setattr(clipping, "clipped_sum", plain)


def head_uncovered(patch: pytest.MonkeyPatch) -> None:
    """The engine is not told of the head, which the optimiser then moves by its plain gradient."""
    trainable, made = flat._trainable, flat.FlatParameters.__init__

    def without_head(model: Any) -> tuple[list[str], list[Any]]:
        pairs = [pair for pair in zip(*trainable(model), strict=True) if HEAD not in pair[0]]
        return [name for name, _ in pairs], [parameter for _, parameter in pairs]

    def init(self: flat.FlatParameters, model: Any) -> None:
        made(self, model)
        known = {id(p) for p in self.parameters}
        self.layers = [m for m in self.layers if known & {id(p) for p in m.parameters(recurse=False)}]

    patch.setattr(flat, "_trainable", without_head)
    patch.setattr(flat.FlatParameters, "__init__", init)
    patch.setattr(flat.FlatParameters, "check_unchanged", lambda self, model: None)  # else the run would stop by itself


def records_as_patients(patch: pytest.MonkeyPatch) -> None:
    """No fault of the code: the column that names the patient names the note."""


FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "no noise": (no_noise, {}),
    "noise / 10": (a_tenth_of_the_noise, {}),
    "noise / 10, two steps": (a_tenth_of_the_noise, {"n_steps": 2}),
    "clipping off": (clipping_off, {}),
    "head uncovered": (head_uncovered, {}),
    "canaries repeated over units": (records_as_patients, {"repeats": 12, "split": True}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_audit_sees_a_planted_fault(name: str, tmp_path: Path) -> None:
    fault, how = FAULTS[name]
    audited = run(tmp_path, fault=fault, **how)
    certificate = audited.trainer.privacy_spent()
    assert certificate["private"] and certificate["epsilon"] <= CLAIMED
    assert audited.bound() > CLAIMED
    assert audited.bound(family="gaussian") > 1.2 * audited.bound()
    found = max(audited.bounds(), key=lambda result: result.lower_bound)
    with pytest.raises(PrivacyError, match="privacy fault"):
        found.check_against(certificate["epsilon"], delta=certificate["delta"], among=2)  # two attacks


def test_many_notes_of_one_patient_are_no_fault(tmp_path: Path) -> None:
    """What the last planted fault is compared with: the same notes under the right unit."""
    assert run(tmp_path, repeats=12).bound() < CLAIMED
