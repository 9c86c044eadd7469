"""A frozen base in shares over two real processes trains as a whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults.dp_runs import make_trainer
from safetensors.torch import load_file
from torch import Tensor

from dpmed.errors import InputError
from dpmed.runs import last_checkpoint

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """Folder of the runs, and what each of the two processes found."""
    target = tmp_path_factory.mktemp("shares")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(TESTS / "trainers" / "shard_worker.py"), str(target)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target, [load_file(str(target / f"rank{rank}.safetensors")) for rank in range(2)]


def test_shares_give_the_weights_of_a_whole_base(found: tuple[Path, list[dict[str, Tensor]]]) -> None:
    _, (first, second) = found
    assert int(first["w.in_shares"]) == 0 and int(first["s.in_shares"]) > 10
    assert torch.allclose(first["s.weights"], first["w.weights"], atol=1e-6)
    assert float(first["w.weights"].norm()) > 1
    assert torch.equal(first["s.weights"], second["s.weights"])


def test_ranks_that_draw_nobody_keep_pace(found: tuple[Path, list[dict[str, Tensor]]]) -> None:
    _, (first, second) = found
    assert torch.equal(first["u.weights"], second["u.weights"])
    assert not torch.equal(first["u.weights"], first["s.weights"])


def test_checkpoints_hold_the_adapter_alone_and_are_whole(found: tuple[Path, list[dict[str, Tensor]]]) -> None:
    checkpoint = last_checkpoint(found[0] / "shared")
    assert checkpoint is not None
    saved = load_file(str(checkpoint / "adapter_model.safetensors"))
    assert saved and all("lora_" in name for name in saved)


def test_one_process_alone_has_nobody_to_share_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchrun"):
        make_trainer(tmp_path, shard_base=True)
