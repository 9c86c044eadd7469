"""The noise has the distribution that the accountant assumes, and nobody can draw it again."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import noise as module
from dpmed.privacy.entropy import EntropyStream
from dpmed.privacy.noise import GaussianNoise

FALSE_ALARM = 1e-9  # probability with which right noise fails one of these tests
N = 200_000
BOTH = pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])


def normal_bound(n: int) -> float:
    return float(stats.norm.isf(FALSE_ALARM / 2)) / math.sqrt(n)


# --- Distribution -----------------------------------------------------------------------------------------------------


def assert_gaussian(numbers: Tensor, std: float) -> None:
    """Mean, variance, kurtosis, shape and tails of N(0, std^2), each by a test at FALSE_ALARM."""
    values = numbers.double().numpy() / std
    n = len(values)
    assert abs(values.mean()) < normal_bound(n)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    assert low < (values**2).sum() < high
    assert abs((values**4).mean() - 3) < normal_bound(n) * math.sqrt(96) * 1.2  # the fourth power is skewed
    assert stats.kstest(values, "norm").pvalue > FALSE_ALARM
    for tail in (2.0, 3.0, 3.5, 4.0):
        for side in (values, -values):
            low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n, stats.norm.sf(tail))
            assert low <= (side > tail).sum() <= high, tail


def assert_uncorrelated(draws: list[Tensor]) -> None:
    """Between neighbours and halves of a draw, between draws, and of their sizes too."""
    first, second = (draw.double().numpy() / draw.double().std().item() for draw in draws)
    for change in (lambda x: x, lambda x: x**2 - 1):
        scale = math.sqrt((change(first) ** 2).mean() * (change(second) ** 2).mean())
        for one, other in ((first, second), *((first[lag:], first[:-lag]) for lag in (1, 2, N // 2))):
            assert abs((change(one) * change(other)).mean()) < normal_bound(len(one)) * scale * 1.05


@BOTH
@pytest.mark.parametrize("std", [0.01, 1.0, 37.5])
def test_noise_is_gaussian_with_mean_zero_and_the_given_std(std, secure):
    assert_gaussian(GaussianNoise(std, secure=secure).draw(N), std)


@BOTH
def test_elements_and_successive_draws_are_uncorrelated(secure):
    source = GaussianNoise(1.0, secure=secure)
    assert_uncorrelated([source.draw(N), source.draw(N)])


@pytest.mark.parametrize(
    "fault",
    [
        lambda z: z * 1.03,
        lambda z: z / 1.03,
        lambda z: z + 0.02,
        lambda z: z.clamp(-3.5, 3.5),
        lambda z: z.abs(),
        lambda z: torch.where(z.abs() > 2.5, z * 1.2, z),
        lambda z: (z * 4).round() / 4,
    ],
    ids=["std +3 %", "std -3 %", "shifted", "cut tails", "one side", "heavy tails", "coarse"],
)
def test_noise_of_another_distribution_is_seen(fault):
    with pytest.raises(AssertionError):
        assert_gaussian(fault(GaussianNoise(1.0, secure=True).draw(N)), 1.0)


@pytest.mark.parametrize(
    "fault",
    [
        lambda a, b: [a, a],
        lambda a, b: [a, -a],
        lambda a, b: [torch.cat([a[: N // 2], a[: N // 2]]), b],
        lambda a, b: [a + 0.05 * a.roll(1), b],
        lambda a, b: [a, b * a.abs()],
    ],
    ids=["same draw", "its negative", "same halves", "neighbours", "sizes"],
)
def test_correlated_noise_is_seen(fault):
    source = GaussianNoise(1.0, secure=True)
    with pytest.raises(AssertionError):
        assert_uncorrelated(fault(source.draw(N), source.draw(N)))


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63])
def test_the_extreme_words_give_finite_noise_that_reaches_beyond_nine_std(monkeypatch, word):
    monkeypatch.setattr(EntropyStream, "bits", lambda self, n: np.full(n, word, dtype=np.uint64))
    values = GaussianNoise(1.0, secure=True).draw(4)
    assert torch.isfinite(values).all()
    if word == 0:
        assert 9 < values.abs().max() < 14


@BOTH
def test_every_number_of_a_long_draw_is_fresh(secure):
    n = 3 * module.CHUNK + 1  # several requests for entropy, and an odd number
    values = GaussianNoise(1.0, secure=secure).draw(n)
    assert values.shape == (n,)
    assert_fresh([part.numpy() for part in values.split(module.CHUNK)])


@BOTH
def test_draws_are_float32_flat_vectors(secure):
    draw = GaussianNoise(1.0, secure=secure).draw(7)
    assert draw.shape == (7,)
    assert draw.dtype == torch.float32
    assert GaussianNoise(1.0, secure=secure).draw(0).shape == (0,)


# --- Adding -----------------------------------------------------------------------------------------------------------


def test_add_changes_the_tensor_in_place_by_the_noise_whatever_its_shape():
    flat = torch.full((3, 4), 5.0)
    result = GaussianNoise(2.0, seed=1).add_(flat)
    assert result is flat
    torch.testing.assert_close(flat, 5.0 + GaussianNoise(2.0, seed=1).draw(12).view(3, 4))


@pytest.mark.parametrize("shape", [(N,), (1000, N // 1000)])
def test_secure_noise_is_added_in_place_to_every_element(shape):
    flat = torch.linspace(-40.0, 40.0, N).view(shape)
    before = flat.clone()
    result = GaussianNoise(2.0, secure=True).add_(flat)
    assert result is flat
    assert_gaussian((flat.double() - before.double()).flatten(), 2.0)
    columns = torch.zeros(50, 4).T  # not contiguous
    assert (GaussianNoise(1.0, secure=True).add_(columns) != 0).all()


@BOTH
def test_every_element_gets_its_own_noise(secure):
    flat = GaussianNoise(1.0, secure=secure).add_(torch.zeros(1000))
    assert flat.unique().numel() > 990


@BOTH
def test_std_zero_gives_zeros(secure):
    noise = GaussianNoise(0.0, secure=secure)
    assert torch.equal(noise.draw(100), torch.zeros(100))
    assert torch.equal(noise.add_(torch.tensor([1.0, 0.1])), torch.tensor([1.0, 0.1]))
    assert noise.grid == 0.0


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_that_are_not_float32_are_refused(dtype, secure):
    with pytest.raises(PrivacyError, match="float32"):
        GaussianNoise(1.0, secure=secure).add_(torch.zeros(3, dtype=dtype))


@BOTH
def test_a_sum_that_is_not_finite_shows(secure):
    flat = GaussianNoise(1.0, secure=secure).add_(torch.tensor([math.nan, math.inf, 0.0]))
    assert flat.isnan().tolist() == [True, False, False] and flat.isinf().tolist() == [False, True, False]


# --- The grid of the secure path --------------------------------------------------------------------------------------


def assert_on_grid(noise: GaussianNoise) -> None:
    """What comes out are multiples of the grid, whatever the last bits of what went in; no zero has a sign."""
    sums = torch.randn(N, generator=torch.Generator().manual_seed(0)) * noise.std
    out = noise.add_(sums).double() / noise.grid
    assert out.abs().max() < 2**24  # here float32 holds each multiple exactly
    assert torch.equal(out, out.round())
    assert out.remainder(2).mean().item() == pytest.approx(0.5, abs=0.02)  # it uses the grid, not a coarser one
    assert not (out[out == 0].signbit()).any()


@pytest.mark.parametrize("std", [1e-6, 0.37, 1.0, 2.0, 1000.0])
def test_secure_sums_lie_on_a_grid_that_does_not_depend_on_the_data(std):
    noise = GaussianNoise(std, secure=True)
    assert std * 2**-21 < noise.grid <= std * 2**-20
    assert math.log2(noise.grid) == int(math.log2(noise.grid))
    assert_on_grid(noise)


def test_small_sums_and_zeros_of_either_sign_cannot_be_told_apart_by_the_sign_of_zero(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "_normals", lambda self, n: torch.zeros(n, dtype=torch.float64))
    out = GaussianNoise(1.0, secure=True).add_(torch.tensor([-1e-8, 1e-8, -0.0, 0.0]))
    assert torch.equal(out, torch.zeros(4)) and not out.signbit().any()


class RoundsTheNoiseOnly(GaussianNoise):
    def add_(self, flat: Tensor) -> Tensor:
        return flat + super().add_(torch.zeros_like(flat))


class RoundsAfterFloat32(GaussianNoise):
    def add_(self, flat: Tensor) -> Tensor:
        return flat.add_(self._normals(flat.numel()).float() * self.std)


@pytest.mark.parametrize("faulty", [RoundsTheNoiseOnly, RoundsAfterFloat32])
def test_sums_off_the_grid_are_seen(faulty):
    with pytest.raises(AssertionError):
        assert_on_grid(faulty(1.0, secure=True))


# --- Freshness --------------------------------------------------------------------------------------------------------


def assert_fresh(draws: list[np.ndarray]) -> None:
    """No four numbers in a row occur twice, in one draw or in two: by chance that has probability below 1e-12."""
    seen = np.concatenate([draw[: len(draw) // 4 * 4].reshape(-1, 4) for draw in draws])
    assert len(np.unique(seen, axis=0)) == len(seen)


def drawn_by_a_fork(source: GaussianNoise, n: int) -> np.ndarray:
    """What a forked copy of the source draws; fewer numbers if it fails."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, source.draw(n).numpy().tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(content, dtype=np.float32)


def drawn_after_a_restart(n: int) -> np.ndarray:
    code = (
        "import sys; from dpmed.privacy.noise import GaussianNoise;"
        f"sys.stdout.buffer.write(GaussianNoise(1.0, secure=True).draw({n}).numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return np.frombuffer(done.stdout, dtype=np.float32)


def draws_of_all_kinds(n: int = 400) -> list[np.ndarray]:
    source = GaussianNoise(1.0, secure=True)
    source.draw(4)
    forked = [drawn_by_a_fork(source, n) for _ in range(2)]
    assert [len(draw) for draw in forked] == [n, n]
    here = [source.draw(n), source.draw(n), GaussianNoise(1.0, secure=True).draw(n)]
    return [*(draw.numpy() for draw in here), *forked]


def test_no_secure_noise_repeats_over_draws_objects_forks_and_restarts():
    assert_fresh([*draws_of_all_kinds(), drawn_after_a_restart(400), drawn_after_a_restart(400)])


def test_a_key_that_is_used_twice_is_seen(monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", lambda n: bytes(n))
    with pytest.raises(AssertionError):
        assert_fresh(draws_of_all_kinds())


def test_a_forked_fast_source_refuses_to_repeat_its_parent():
    source = GaussianNoise(1.0)
    assert len(drawn_by_a_fork(source, 8)) == 0
    assert source.draw(8).shape == (8,)
    source._process = -1
    with pytest.raises(PrivacyError, match="forked"):
        source.draw(8)


@BOTH
def test_two_sources_differ(secure):
    first, second = (GaussianNoise(1.0, secure=secure).draw(4000).numpy() for _ in range(2))
    assert_fresh([first, second])


@BOTH
def test_global_seeds_have_no_influence(secure):
    def noise_after_seeding() -> Tensor:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return GaussianNoise(1.0, secure=secure).draw(16)

    assert not torch.equal(noise_after_seeding(), noise_after_seeding())


@BOTH
def test_drawing_leaves_the_global_generators_alone(secure):
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    GaussianNoise(1.0, secure=secure).draw(100)
    assert torch.equal(torch.rand(4), expected)


def test_the_seed_space_is_larger_than_32_bits():
    # torch's CPU generator fails this: it drops all but the low 32 bits of its seed
    assert not torch.equal(GaussianNoise(1.0, seed=5).draw(16), GaussianNoise(1.0, seed=5 + (1 << 32)).draw(16))


def test_fresh_sources_are_seeded_with_256_bits(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("secrets.randbits", lambda bits: asked.append(bits) or 7)
    source = GaussianNoise(1.0)
    assert asked == [256]
    assert torch.equal(source.draw(4), GaussianNoise(1.0, seed=7).draw(4))


def test_the_test_only_seed_repeats_noise():
    assert torch.equal(GaussianNoise(1.0, seed=3).draw(8), GaussianNoise(1.0, seed=3).draw(8))


def test_the_test_only_seed_has_no_place_in_secure_noise():
    with pytest.raises(InputError, match="leave out noise_seed, or secure"):
        GaussianNoise(1.0, secure=True, seed=3)


@BOTH
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_repeat_noise_is_refused(duplicate, secure):
    with pytest.raises(PrivacyError, match="make a new one"):
        duplicate(GaussianNoise(1.0, secure=secure))


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_wrong_std_is_refused(std):
    with pytest.raises(InputError, match="std"):
        GaussianNoise(std)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_is_gaussian_fresh_and_not_seeded_by_torch():
    torch.manual_seed(0)
    first = GaussianNoise(2.0).draw(N, "cuda")
    torch.manual_seed(0)
    second = GaussianNoise(2.0).draw(N, "cuda")
    assert first.device.type == "cuda"
    assert not torch.equal(first, second)
    assert_gaussian(first.cpu(), 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_secure_noise_on_a_gpu_is_gaussian_and_on_the_grid():
    noise = GaussianNoise(2.0, secure=True)
    flat = noise.add_(torch.zeros(N, device="cuda"))
    assert flat.device.type == "cuda"
    assert_gaussian(flat.cpu(), 2.0)
    multiples = flat.double() / noise.grid
    assert torch.equal(multiples, multiples.round())
