"""The Triton kernel against float64 and the torch path: in Triton's interpreter on a CPU, and on a GPU.

The interpreter must be asked for before Triton is imported, so that those cases run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpmed.memorization import vocabulary
from dpmed.memorization.vocabulary import Sampling, TokenStatistics, plain_statistics, token_statistics

KERNEL = "dpmed.memorization.fused_statistics"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")
)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs CUDA and Triton")])
DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda t: str(t)[6:])
SAMPLINGS = [Sampling(), Sampling(0.7, None), Sampling(2.0, 1), Sampling(0.5, 40), Sampling(1.0, 60_000)]
SIZES = [7, 64, 1000, 3001, 49_152]


def fused(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    from dpmed.memorization.fused_statistics import fused_statistics

    return fused_statistics(logits, targets, sampling).cpu().double()


def truth(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """The definitions in float64 [6, n]."""
    x, at = logits.double().cpu(), targets.cpu()[:, None]
    log_p = x.log_softmax(1)
    p, true = log_p.exp(), log_p.gather(1, at)
    each = torch.where(p > 0, log_p, 0)
    mean = (p * each).sum(1, keepdim=True)
    deviation = (p * (each - mean) ** 2).sum(1).sqrt()
    k = min(sampling.top_k or x.shape[1], x.shape[1])
    kept = torch.where(x >= x.topk(k).values[:, -1:], x / sampling.temperature, -torch.inf).log_softmax(1)
    rank = (x > x.gather(1, at)).sum(1)
    first = torch.from_numpy(x.numpy().argmax(1)) == at[:, 0]  # NumPy promises the first of equals
    return torch.stack([true[:, 0], first, rank, mean[:, 0], deviation, kept.gather(1, at)[:, 0]])


def assert_same(found: Tensor, wanted: Tensor) -> None:
    for name, tolerance in (("log_prob", 1e-5), ("mean", 1e-4), ("deviation", 1e-4), ("sampled", 1e-5)):
        row = {"log_prob": 0, "mean": 3, "deviation": 4, "sampled": 5}[name]
        # float32 logits near 30 carry an error of 2e-6; a deviation is the root of a difference of squares.
        atol = 1e-3 if name == "deviation" else 5e-6
        np.testing.assert_allclose(found[row], wanted[row], rtol=tolerance, atol=atol, err_msg=name)
    assert found[1].tolist() == wanted[1].tolist()
    assert found[2].tolist() == wanted[2].tolist()


def case(size: int, dtype: torch.dtype, device: str, *, rows: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with peaks, ties and impossible entries; truths that are first, the last of several firsts, impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, size, generator=generator)
    logits[1::4] = logits[1::4].round()
    logits[2::4, 1::3] = -torch.inf
    logits[3::8] *= 8
    logits[4::8] = 1.5  # all equal
    targets = torch.randint(size, (rows,), generator=generator)
    logits = logits.to(dtype)
    targets[::2] = torch.from_numpy(logits[::2].float().numpy().argmax(1))
    last = logits.float().flip(1).numpy().argmax(1)  # of equals, the one with the greatest index
    targets[1::4] = size - 1 - torch.from_numpy(last[1::4])
    targets[6::8] = 1
    return logits.to(device), targets.to(device)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which comes with CUDA builds of torch")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_in_the_interpreter():
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--import-mode=importlib", "--noconftest", "-q", "-k", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@DEVICES
@TYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.temperature}-{s.top_k}")
def test_the_kernel_equals_float64_and_the_torch_path(device: str, dtype: torch.dtype, size: int, sampling: Sampling):
    logits, targets = case(size, dtype, device, rows=8 if size < 10_000 else 5)
    before = logits.clone()
    found = fused(logits, targets, sampling)
    assert torch.equal(logits, before)
    assert_same(found, truth(logits, targets, sampling))
    assert_same(found, plain_statistics(logits, targets, sampling).cpu().double())


@DEVICES
@TYPES
@pytest.mark.parametrize("size", [7, 3001])
@pytest.mark.parametrize("top_k", [1, 40, None])
def test_rows_that_are_not_finite_give_nan_and_leave_others_alone(
    device: str, dtype: torch.dtype, size: int, top_k: int | None
):
    logits, targets = case(size, dtype, device, rows=6)
    sampling = Sampling(1.0, top_k)
    wanted = fused(logits, targets, sampling)
    logits[1, size - 1] = torch.nan
    logits[2, 2] = torch.inf
    logits[4] = -torch.inf
    found = fused(logits, targets, sampling)
    plain = plain_statistics(logits, targets, sampling).cpu()
    for row in (0, 3, 4, 5):
        assert found[row].isnan().tolist() == [False, True, True, False, True, False]
        if row != 5:  # there the torch path says -inf where the finite ones leave the truth out
            assert plain[row].isnan().tolist() == found[row].isnan().tolist()
    assert_same(found[:, [0, 3, 5]], wanted[:, [0, 3, 5]])


@DEVICES
def test_rows_may_lie_anywhere_in_memory(device: str):
    logits, targets = case(1000, torch.float32, device)
    wanted = truth(logits, targets, Sampling())
    wide = torch.full((8, 3003), torch.nan, device=device)
    wide[:, 1:1001] = logits
    assert_same(fused(wide[:, 1:1001], targets, Sampling()), wanted)
    assert_same(fused(logits.T.contiguous().T, targets, Sampling()), wanted)
    same = logits[:1].expand(5, -1)
    assert_same(fused(same, targets[:1].expand(5), Sampling()), wanted[:, :1].expand(-1, 5))
    assert fused(logits[:0], targets[:0], Sampling()).shape == (6, 0)
    for n in (1, 3, 7):
        assert_same(fused(logits[8 - n :], targets[8 - n :], Sampling()), wanted[:, 8 - n :])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs CUDA and Triton")
def test_rows_beyond_two_to_the_31_entries():
    size, rows = 2**16, 2**15 + 3
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    logits = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    end, targets = case(size, torch.bfloat16, "cuda")
    logits[-8:] = end
    found = fused(logits, torch.cat([targets.new_zeros(rows - 8), targets]), Sampling(1.0, None))
    assert_same(found[:, -8:], truth(end, targets, Sampling(1.0, None)))
    np.testing.assert_allclose(found[0, :-8], -np.log(size), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs CUDA and Triton")
@TYPES
def test_a_gpu_takes_the_kernel(dtype: torch.dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = vocabulary.fused_path(torch.device("cuda", 0), dtype, 1000)
    assert path is not None
    logits, targets = case(1000, dtype, "cuda")
    found = token_statistics(logits, targets, Sampling())
    np.testing.assert_allclose(found.log_prob, truth(logits, targets, Sampling())[0], rtol=1e-5, atol=5e-6)


@pytest.fixture
def undecided() -> Iterator[Callable[..., Any]]:
    """`fused_path` before its first decision; nothing that a test makes it decide is kept."""
    vocabulary.fused_path.cache_clear()
    yield vocabulary.fused_path
    vocabulary.fused_path.cache_clear()


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device for `fused_path`, whose tensors are made on a CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    return torch.device("cuda", 0)


def test_a_cpu_never_takes_the_kernel(undecided: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(fused_statistics=pytest.fail))
    assert undecided(torch.device("cpu"), torch.float32, 100) is None
    logits, targets = case(100, torch.float32, "cpu")
    np.testing.assert_allclose(
        token_statistics(logits, targets, Sampling()).mean, truth(logits, targets, Sampling())[3], atol=1e-4
    )


def test_without_triton_the_torch_path_is_taken_silently(
    undecided: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert undecided(on_a_cpu(monkeypatch), torch.float32, 100) is None


def test_a_kernel_that_fails_is_tried_once_and_said_once(
    undecided: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    tried: list[int] = []

    def failing(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
        tried.append(logits.shape[1])
        raise ArithmeticError("no compiler")

    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(fused_statistics=failing))
    device = on_a_cpu(monkeypatch)
    with pytest.warns(UserWarning, match="kernel failed with ArithmeticError") as said:
        assert [undecided(device, torch.float32, 100) for _ in range(3)] == [None] * 3
    assert (len(said), tried) == (1, [100])


def test_a_kernel_that_works_is_taken(undecided: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    shapes: list[tuple[Any, ...]] = []

    def kernel(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
        shapes.append((logits.dtype, *logits.shape))
        return torch.arange(6.0)[:, None].expand(6, len(targets))

    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(fused_statistics=kernel))
    with monkeypatch.context() as patch:
        assert undecided(on_a_cpu(patch), torch.bfloat16, 100) is kernel
    assert shapes == [(torch.bfloat16, 1, 100)]
    monkeypatch.setattr(vocabulary, "fused_path", lambda *_: kernel)
    found = token_statistics(torch.zeros(2, 100), torch.zeros(2, dtype=torch.int64), Sampling())
    assert isinstance(found, TokenStatistics)
    fields = (found.log_prob, found.is_argmax, found.rank, found.mean, found.deviation, found.sampled)
    assert [field.tolist() for field in fields] == [[0.0] * 2, [True] * 2, [2] * 2, [3.0] * 2, [4.0] * 2, [5.0] * 2]
