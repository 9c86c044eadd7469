"""Ways in which DP training goes wrong silently: each check passes on the trainer, and fails on the planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.dp_runs import N_UNITS, TOKENIZER, UNITS, make_plan, make_records, make_trainer, weights, with_lora
from torch import Tensor
from transformers import TrainerCallback

import tiny_models
from dpmed.data.batches import Batch, Collator, per_record_loss
from dpmed.data.head_losses import record_losses
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import flat
from dpmed.privacy.noise import GaussianNoise
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.plan import PrivacyPlan
from dpmed.privacy.sampling import PoissonUnitSampler
from dpmed.trainers import base, dp_lora
from dpmed.trainers.base import MetricsFile
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig, LogicalBatch

# --- A trainable weight that is not covered -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["norm"]}, r"norm\.modules_to_save"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
    ids=["RMSNorm", "DoRA", "embedding factors"],
)
def test_trainable_weights_without_per_record_gradients_are_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, model=with_lora(tiny_models.make_model("llama"), "causal_lm", **changes))
    before = weights(trainer)
    with pytest.raises(PrivacyError, match=named):
        trainer.train()
    assert torch.equal(weights(trainer), before)


def test_without_that_refusal_a_bare_parameter_is_still_stopped_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "uncovered_parameters", lambda model: [])
    model = with_lora(tiny_models.make_model("llama"), "causal_lm", target_modules=["embed_tokens"])
    trainer = make_trainer(tmp_path, model=model)
    before = weights(trainer)
    with pytest.raises((PrivacyError, RuntimeError, NotImplementedError, ValueError)):
        trainer.train()
    assert torch.equal(weights(trainer), before)


class UnfreezesLater(TrainerCallback):
    """A callback that unfreezes a layer in the middle of training (gradual unfreezing)."""

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_(True)


def test_a_weight_that_becomes_trainable_later_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="trainable parameters changed"):
        make_trainer(tmp_path, callbacks=[UnfreezesLater()]).train()


# --- Weights never move ---------------------------------------------------------------------------------------------


class OptimizesCopies(DPLoRATrainer):
    """The fault of stale tensors: the optimiser holds copies of the weights."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        copies = [p.detach().clone().requires_grad_() for p in self.model.parameters() if p.requires_grad]
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        self.optimizer = torch.optim.SGD(copies, lr=0.1)
        return self.optimizer


class MovesOnlyHalf(DPLoRATrainer):
    """The optimiser forgets the last weights."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        some = [p for p in self.model.parameters() if p.requires_grad][:-1]
        self.optimizer = torch.optim.SGD(some, lr=0.1)
        return self.optimizer


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("faulty", [OptimizesCopies, MovesOnlyHalf])
def test_weights_that_do_not_move_stop_the_run(faulty: type[DPLoRATrainer], n_steps: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_plan(n_steps=n_steps), trainer=faulty)
    with pytest.raises(PrivacyError, match="did not move"):
        trainer.train()


def test_without_that_proof_the_run_would_end_as_if_it_had_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPLoRATrainer, "_prove_movement", lambda self, engine: None)
    trainer = make_trainer(tmp_path, trainer=OptimizesCopies)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert torch.equal(weights(trainer), before)


def test_a_warm_up_that_starts_at_rate_zero_is_no_false_alarm(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    trainer.train()
    assert trainer._moved


# --- The loss couples records ---------------------------------------------------------------------------------------


def token_mean_of_the_batch(logits: Tensor, batch: Batch, spec: TaskSpec) -> Tensor:
    """What Hugging Face does with num_items_in_batch: each record's loss divided by the tokens of all."""
    own = per_record_loss(logits, batch, spec)
    return own * batch["weights"].sum(dim=1) / batch["weights"].sum()


def in_batch_negatives(logits: Tensor, batch: Batch, spec: TaskSpec) -> Tensor:
    return per_record_loss(logits - logits.mean(dim=0, keepdim=True), batch, spec)


def couples_records(loss: Callable[[Tensor, Batch, TaskSpec], Tensor]) -> bool:
    """Whether the loss of record 0, or its gradient, depends on the other records; or the others' logits move it."""
    spec = TaskSpec(kind="causal_lm", max_length=64)
    examples = list(encode(make_records(), TOKENIZER, spec))
    whole = Collator(TOKENIZER, spec)(examples)
    logits = torch.randn(*whole["input_ids"].shape, len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    value = loss(logits, whole, spec)[0]
    (gradient,) = torch.autograd.grad(value, logits)
    alone = {key: tensor[:1] for key, tensor in whole.items()}
    first = logits.detach()[:1].clone().requires_grad_()
    value_alone = loss(first, alone, spec)[0]
    (gradient_alone,) = torch.autograd.grad(value_alone, first)
    same = torch.allclose(value, value_alone) and torch.allclose(gradient[:1], gradient_alone)
    return not same or bool((gradient[1:] != 0).any())


def test_no_record_has_a_say_in_the_loss_of_another() -> None:
    assert not couples_records(per_record_loss)


@pytest.mark.parametrize("faulty", [token_mean_of_the_batch, in_batch_negatives])
def test_the_coupling_check_sees_losses_that_couple(faulty: Callable[[Tensor, Batch, TaskSpec], Tensor]) -> None:
    assert couples_records(faulty)


# --- Noise: once per step, also for an empty draw, of the right size ------------------------------------------------


class CountsNoise(GaussianNoise):
    """Counts draws; replaces the trainer's noise."""

    def __init__(self, std: float) -> None:
        super().__init__(std)
        self.sizes: list[int] = []

    def add_(self, flat: Tensor) -> Tensor:
        self.sizes.append(flat.numel())
        return super().add_(flat)


def noise_sizes(trainer: DPLoRATrainer) -> list[int]:
    """Train, and return how many numbers each draw of noise gave."""
    noise = CountsNoise(trainer._noise.std)
    trainer._noise = noise
    trainer.train()
    return noise.sizes


class NoisePerMicroBatch(DPLoRATrainer):
    def _clipped(self, model: Any, engine: Any, group: Any) -> tuple[Tensor, Tensor]:
        total, nonfinite = super()._clipped(model, engine, group)
        for _ in group:
            self._noise.add_(total)
        return total, nonfinite


class SkipsEmptyDraws(DPLoRATrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return super().training_step(model, inputs) if inputs else torch.zeros(())


def n_trainable(trainer: DPLoRATrainer) -> int:
    return sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_noise_is_added_once_per_step_however_many_micro_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, micro_batch_tokens=1)
    assert noise_sizes(trainer) == [n_trainable(trainer)] * 3


def test_the_count_sees_noise_per_micro_batch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer=NoisePerMicroBatch, micro_batch_tokens=1)
    assert len(noise_sizes(trainer)) == 3 * (1 + len(UNITS))


def test_empty_draws_add_noise_step_and_are_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonUnitSampler, "draw", lambda self: [])
    trainer = make_trainer(tmp_path, make_plan(expected_batch_units=1))
    before = weights(trainer)
    assert noise_sizes(trainer) == [n_trainable(trainer)] * 3
    assert float((weights(trainer) != before).float().mean()) > 0.9
    assert trainer.privacy_spent()["n_steps"] == 3


def test_the_check_sees_a_trainer_that_skips_empty_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonUnitSampler, "draw", lambda self: [])
    monkeypatch.setattr(DPLoRATrainer, "_prove_movement", lambda self, engine: None)
    assert noise_sizes(make_trainer(tmp_path, make_plan(expected_batch_units=1), trainer=SkipsEmptyDraws)) == []


class KeepsGradients(TrainerCallback):
    """What the optimiser was given at each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.others: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.seen.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.requires_grad]))
        self.others += [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("faulty", [False, True], ids=["right", "noise per micro-batch"])
def test_the_noise_has_the_size_that_the_accountant_was_told(
    faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise alone reaches the optimiser here: std must be noise_multiplier * clip_norm / divisor."""
    monkeypatch.setattr(PrivacyPlan, "clipped_sum", lambda self, rows: (torch.zeros(rows.shape[1]), torch.tensor(0)))
    kept = KeepsGradients()
    plan = make_plan(noise_multiplier=3.0, clip_norm=0.2, expected_batch_units=N_UNITS, n_steps=4)
    cls = NoisePerMicroBatch if faulty else DPLoRATrainer
    make_trainer(tmp_path, plan, trainer=cls, callbacks=[kept], micro_batch_tokens=1).train()
    numbers = torch.cat(kept.seen)
    assert len(numbers) > 8_000  # relative standard error of the std below 0.8 %
    assert (abs(float(numbers.std()) / (3.0 * 0.2 / N_UNITS) - 1) < 0.04) is not faulty
    if not faulty:
        assert abs(float(numbers.mean())) < 6 * 0.1 / len(numbers) ** 0.5


def test_the_optimizer_sees_only_what_the_engine_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Tensor] = []
    write = OnePassEngine.write_gradients

    def spy(engine: OnePassEngine, flat: Tensor) -> None:
        write(engine, flat)
        written.append(torch.cat([p.grad.reshape(-1).clone() for p in engine.parameters if p.grad is not None]))

    monkeypatch.setattr(OnePassEngine, "write_gradients", spy)
    kept = KeepsGradients()
    make_trainer(tmp_path, callbacks=[kept], max_grad_norm=0.1).train()  # a norm that would otherwise cut the noise
    assert len(written[-3:]) == len(kept.seen) == 3  # those before belong to the trial
    assert all(torch.equal(a, b) for a, b in zip(written[-3:], kept.seen, strict=True))
    assert kept.others == []


# --- A patient split over micro-batches; sampler and accountant -----------------------------------------------------


def units_of_steps(trainer: DPLoRATrainer, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Train, and return step -> group -> units that were clipped there."""
    steps: list[list[list[int]]] = []
    clipped, step = DPLoRATrainer._clipped, DPLoRATrainer.training_step

    def spy_step(self: Any, model: Any, inputs: Any, *args: Any) -> Tensor:
        steps.append([])
        return step(self, model, inputs, *args)

    def spy_clipped(self: Any, model: Any, engine: Any, group: Any) -> tuple[Tensor, Tensor]:
        steps[-1].append(sorted({example.unit for examples in group for example in examples}))
        return clipped(self, model, engine, group)

    monkeypatch.setattr(DPLoRATrainer, "training_step", spy_step)
    monkeypatch.setattr(DPLoRATrainer, "_clipped", spy_clipped)
    trainer.train()
    return steps


def splits_a_unit(steps: list[list[list[int]]]) -> bool:
    return any(len(flat) != len(set(flat)) for step in steps if (flat := [u for micro in step for u in micro]))


def test_no_patient_is_clipped_twice_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows = {"micro_batch_tokens": 1, "buffer_mib": 0.01}  # one patient's gradient fits
    steps = units_of_steps(make_trainer(tmp_path, **few_rows), monkeypatch)
    assert [len(step) for step in steps] == [N_UNITS] * 3
    assert not splits_a_unit(steps)


def test_the_check_sees_a_cut_that_splits_a_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPLoRATrainer, "_cut", lambda self, examples: LogicalBatch([[[e]] for e in examples]))
    assert splits_a_unit(units_of_steps(make_trainer(tmp_path), monkeypatch))


def test_each_step_trains_on_one_draw_of_the_plans_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[list[int]] = []
    draw = PoissonUnitSampler.draw
    monkeypatch.setattr(PoissonUnitSampler, "draw", lambda self: draws.append(draw(self)) or draws[-1])
    plan = make_plan(expected_batch_units=3, n_steps=5)
    steps = units_of_steps(make_trainer(tmp_path, plan), monkeypatch)
    trained = [sorted(u for micro in step for u in micro) for step in steps]
    assert trained == [sorted({UNITS[row] for row in rows}) for rows in draws[:5]]
    assert len(draws) <= 6  # at most one draw ahead


# --- Gradient checkpointing, several devices, precision -------------------------------------------------------------


def test_several_devices_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPLoRATrainingConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="torchrun"):
        make_trainer(tmp_path)


def test_under_bfloat16_norm_clip_sum_and_noise_stay_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    clip, write = PrivacyPlan.clipped_sum, OnePassEngine.write_gradients

    def spy_clip(self: PrivacyPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        result = clip(self, rows)
        seen.extend([rows.dtype, result[0].dtype])
        return result

    monkeypatch.setattr(PrivacyPlan, "clipped_sum", spy_clip)
    monkeypatch.setattr(OnePassEngine, "write_gradients", lambda s, flat: seen.append(flat.dtype) or write(s, flat))
    trainer = make_trainer(tmp_path, make_plan(n_steps=2), bf16=True)
    activations: list[torch.dtype] = []
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("lora_B.default"))
    layer.register_forward_hook(lambda module, inputs, output: activations.append(output.dtype))
    attach = trainer._attach
    trainer._attach = lambda: (attach(), activations.clear())[0]  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert set(activations) == {torch.bfloat16}  # it was at work
    assert set(seen) == {torch.float32}
    assert bool(torch.isfinite(weights(trainer)).all())


# --- NaN in one record ----------------------------------------------------------------------------------------------


@pytest.fixture
def nan_in_unit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(model: Any, batch: Batch, spec: TaskSpec, head: Any) -> Tensor:
        bad = (batch["unit"] == 2) & in_training[0]
        return record_losses(model, batch, spec, head) * torch.where(bad, torch.nan, 1.0)

    def attach(self: DPLoRATrainer) -> Any:
        engine = attach_proven(self)
        in_training[0] = True  # the trial before the first step has public records, which give no NaN
        return engine

    in_training, attach_proven = [False], DPLoRATrainer._attach
    monkeypatch.setattr(DPLoRATrainer, "_attach", attach)
    monkeypatch.setattr(base, "record_losses", loss)


@pytest.mark.usefixtures("nan_in_unit_2")
def test_a_record_that_gives_nan_counts_as_zero_and_the_run_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, micro_batch_tokens=10_000)  # all patients in one micro-batch
    trainer.train()
    assert trainer.privacy_spent()["n_nonfinite_units"] == 3
    assert trainer.privacy_spent()["n_steps"] == 3
    assert bool(torch.isfinite(weights(trainer)).all())


@pytest.mark.usefixtures("nan_in_unit_2")
def test_a_sum_without_that_care_would_end_in_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: PrivacyPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        return (self.clip_norm / rows.norm(dim=1)).clamp(max=1.0) @ rows, torch.tensor(0)

    monkeypatch.setattr(PrivacyPlan, "clipped_sum", careless)
    trainer = make_trainer(tmp_path, micro_batch_tokens=10_000)
    trainer.train()
    assert not bool(torch.isfinite(weights(trainer)).any())


# --- Logs -----------------------------------------------------------------------------------------------------------


def private_keys(folder: Path, trainer: DPLoRATrainer) -> set[str]:
    """Keys in any log of the run that are functions of private records."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    states = [json.loads(f.read_text())["log_history"] for f in folder.rglob("trainer_state.json")]
    assert lines and states and trainer.state.log_history
    keys = {key for log in (lines, trainer.state.log_history, *states) for line in log for key in line}
    assert "learning_rate" in keys
    return {key for key in keys if "grad" in key or ("loss" in key and not key.startswith("eval_"))}


@pytest.mark.parametrize("faulty", [False, True], ids=["right", "logs as transformers does"])
def test_no_log_holds_training_loss_or_gradient_norms(
    faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if faulty:
        monkeypatch.setattr(dp_lora, "PRIVATE_LOGS", ())
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(MetricsFile(tmp_path / "metrics.jsonl"))
    output = trainer.train()
    assert output.training_loss == 0.0
    assert bool(private_keys(tmp_path, trainer)) is faulty
