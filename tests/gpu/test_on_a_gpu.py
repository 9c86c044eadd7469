"""The same on a GPU as on a CPU, in float32 and with bfloat16 weights; without a GPU the CPU cases run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

import tiny_models
from dpmed.data.tasks import EncodedRecords, TaskSpec, encode
from dpmed.errors import PrivacyError
from dpmed.memorization.generation import generate
from dpmed.memorization.scoring import score_records
from dpmed.memorization.vocabulary import Sampling, TokenStatistics, token_statistics
from dpmed.privacy.clipping import clipped_sum
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.lora import lora_config

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SPEC = TaskSpec(kind="causal_lm", max_length=64)
UNITS = (0, 1, 0, 2, 3, 3, 3, 4, 5)
WORDS = ("fever", "cough", "effusion", "metformin", "stable", "radiograph", "cardiologist", "admitted", "twice")


def encoded() -> EncodedRecords:
    texts = [f"Patient {i} " + " ".join(WORDS[: 1 + (3 * i) % 9]) + "." for i in range(len(UNITS))]
    return encode(
        Dataset.from_dict({"text": texts, "unit": [f"p{u}" for u in UNITS]}), tiny_models.make_tokenizer(), SPEC
    )


def make_trainer(folder: Path, model: nn.Module, device: str, *, engine: Any, bf16: bool) -> DPLoRATrainer:
    plan = PrivacyPlan(
        unit="patient",
        n_units=6,
        expected_batch_units=6,
        max_records_per_unit=4,
        clip_norm=0.01,
        noise_multiplier=0.0,
        n_steps=2,
        delta=0.01,
        engine=engine,
        noise_seed=0,
    )
    args = DPLoRATrainingConfig(
        output_dir=str(folder),
        task="causal_lm",
        unit_column="unit",
        max_steps=2,
        learning_rate=1e-2,
        ledger="none",
        use_cpu=device == "cpu",
        bf16=bf16,
        micro_batch_tokens=64,
    )
    config = lora_config(model, "causal_lm", rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    return DPLoRATrainer(
        model, args, encoded(), None, tiny_models.make_tokenizer(), peft_config=config, plan=plan, spec=SPEC
    )


def trained(folder: Path, device: str, dtype: torch.dtype, engine: str = "one_pass") -> torch.Tensor:
    model: Any = tiny_models.make_model("llama")
    model = model.to(dtype)
    torch.manual_seed(0)
    trainer = make_trainer(folder, model, device, engine=engine, bf16=dtype == torch.bfloat16)
    trainer.train()
    weights = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert {(w.device.type, w.dtype) for w in weights} == {(device, torch.float32)}  # adapters stay float32
    return torch.cat([w.cpu().flatten() for w in weights])


@DEVICES
@TYPES
@pytest.mark.parametrize("engine", ["one_pass", "opacus"])
def test_dp_lora_trains_a_base_of_any_type(tmp_path: Path, device: str, dtype: torch.dtype, engine: str):
    plain = trained(tmp_path / "a", "cpu", torch.float32)
    here = trained(tmp_path / "b", device, dtype, engine)
    # Adam's first steps are about the learning rate, whatever a gradient's size: signs of tiny ones differ in bfloat16.
    assert float((plain - here).abs().mean()) < (1e-4 if dtype == torch.float32 else 2e-3)


class _Mixing(nn.Module):
    """Adds a little of the batch's mean: each record sees the others, by about as much as bfloat16 rounds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + 0.1 * out.mean(dim=(0, 1), keepdim=True)


@DEVICES
def test_a_layer_that_mixes_records_is_refused_over_a_bfloat16_base_too(tmp_path: Path, device: str):
    model: Any = tiny_models.make_model("llama")
    model = model.to(torch.bfloat16)
    torch.manual_seed(0)  # of the fresh adapters
    layer = model.model.layers[1]
    layer.mlp.down_proj = nn.Sequential(_Mixing(layer.mlp.down_proj))
    trainer = make_trainer(tmp_path, model, device, engine="one_pass", bf16=True)
    with pytest.raises(PrivacyError, match=r"other records|one unit"):
        trainer.train()


@DEVICES
@TYPES
def test_statistics_equal_those_of_float64(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 3000, generator=generator)).to(dtype)
    targets = torch.randint(3000, (64,), generator=generator)
    targets[::2] = logits[::2].float().argmax(dim=1)
    found = token_statistics(logits.to(device), targets.to(device), Sampling())
    log_p = logits.double().log_softmax(dim=1)
    p, true = log_p.exp(), log_p.gather(1, targets[:, None])
    mean = (p * log_p).sum(1)
    np.testing.assert_allclose(found.log_prob, true[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.deviation, (p * (log_p - mean[:, None]) ** 2).sum(1).sqrt(), rtol=1e-3, atol=1e-3)
    assert found.rank.tolist() == (log_p > true).sum(1).tolist()
    assert found.is_argmax.tolist() == (logits.float().argmax(1) == targets).tolist()
    least = log_p.topk(40).values[:, -1:]
    kept = torch.where(log_p >= least, log_p, -torch.inf)
    sampled = torch.where(true >= least, true - kept.logsumexp(1, keepdim=True), -torch.inf)[:, 0]
    np.testing.assert_allclose(found.sampled, sampled, rtol=1e-4, atol=1e-4)


@DEVICES
@TYPES
def test_the_one_pass_is_the_same_everywhere(device: str, dtype: torch.dtype):
    records, tokenizer = encoded(), tiny_models.make_tokenizer()
    model: Any = tiny_models.make_model("llama")
    wanted = score_records(model, records, SPEC, tokenizer)
    found = score_records(model.to(device, dtype), records, SPEC, tokenizer)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for name in ("log_prob", "mean", "deviation"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=tolerance, atol=tolerance)
    assert {field: getattr(found, field).dtype for field in ("rank", "log_prob")} == {
        "rank": np.uint16,
        "log_prob": np.float32,
    }
    assert TokenStatistics.empty(1).rank.dtype == found.rank.dtype  # pyright: ignore[reportOptionalMemberAccess]


@DEVICES
def test_greedy_text_and_draws_do_not_hang_on_the_global_seed(device: str):
    tokenizer = tiny_models.make_tokenizer()
    model: Any = tiny_models.make_model("llama")
    model = model.to(device)
    prompts = [[5, 9, 12], [7, 30, 31, 32, 33]]
    greedy = [g.tolist() for g in generate(model, tokenizer, prompts, new_tokens=6)]
    alone = [generate(model, tokenizer, [p], new_tokens=6)[0].tolist() for p in prompts]
    assert greedy == alone
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append([g.tolist() for g in generate(model, tokenizer, prompts, new_tokens=6, temperature=1.0, seed=3)])
    assert drawn[0] == drawn[1]


@DEVICES
def test_no_row_of_the_clipped_sum_is_longer_than_the_clip_norm(device: str):
    rows = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e3]])
    for row in rows:
        total, bad = clipped_sum(row[None].to(device), clip_norm=0.5)
        assert total.device.type == device and int(bad) == 0
        assert float(total.double().norm()) <= 0.5 * (1 + 1e-6)
    spoilt = rows.clone()
    spoilt[1, 7] = torch.nan
    total, bad = clipped_sum(spoilt.to(device), clip_norm=0.5)
    alone = clipped_sum(rows[[0, 2]], clip_norm=0.5)[0]
    assert int(bad) == 1
    torch.testing.assert_close(total.cpu(), alone, rtol=1e-5, atol=1e-6)
