"""Run by two processes (see test_sharding.py): the same DP runs with the frozen base whole and in shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DPMED_LEDGER"] = "none"

import torch
from faults.dp_runs import make_plan, make_trainer, weights
from safetensors.torch import save_file

from dpmed.privacy import ranks


def run(folder: Path, *, shard: bool, **plan: Any) -> dict[str, torch.Tensor]:
    """Train, and return the trained weights and how many frozen tensors are in shares."""
    changes = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(folder, make_plan(**plan), shard_base=shard, micro_batch_tokens=30, **changes)
    trainer.train()
    in_shares = sum(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    return {"weights": weights(trainer), "in_shares": torch.tensor(in_shares)}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    rank = ranks.launched_rank()
    quiet: dict[str, Any] = {"noise_multiplier": 0.0, "n_steps": 3}
    whole = run(target / "whole", shard=False, **quiet)
    shared = run(target / "shared", shard=True, **quiet)
    # about one patient a step: ranks draw different numbers of micro-batches, often none
    uneven = run(target / "uneven", shard=True, noise_multiplier=1.0, n_steps=6, expected_batch_units=1)
    found = {f"{name}.{key}": t for name, r in zip("wsu", (whole, shared, uneven), strict=True) for key, t in r.items()}
    save_file(found, str(target / f"rank{rank}.safetensors"))
