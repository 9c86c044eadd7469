"""The noise has the distribution that the accountant assumes, and nobody can draw it again."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.noise import GaussianNoise

FALSE_ALARM = 1e-6
N = 200_000


@pytest.mark.parametrize("std", [0.01, 1.0, 37.5])
def test_noise_is_gaussian_with_mean_zero_and_the_given_std(std):
    noise = GaussianNoise(std).draw(N).double().numpy()
    z = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(noise.mean()) < z * std / math.sqrt(N)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], N)
    assert low < (noise**2).sum() / std**2 < high
    assert stats.kstest(noise, "norm", args=(0, std)).pvalue > FALSE_ALARM


def test_elements_and_successive_draws_are_uncorrelated():
    source = GaussianNoise(1.0)
    first, second = source.draw(N).double(), source.draw(N).double()
    bound = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(N) * 1.01
    assert abs(float((first * second).mean())) < bound
    assert abs(float((first[1:] * first[:-1]).mean())) < bound


def test_draws_are_float32_flat_vectors():
    draw = GaussianNoise(1.0).draw(7)
    assert draw.shape == (7,)
    assert draw.dtype == torch.float32
    assert GaussianNoise(1.0).draw(0).shape == (0,)


def test_add_changes_the_tensor_in_place_by_the_noise_whatever_its_shape():
    flat = torch.full((3, 4), 5.0)
    result = GaussianNoise(2.0, seed=1).add_(flat)
    assert result is flat
    torch.testing.assert_close(flat, 5.0 + GaussianNoise(2.0, seed=1).draw(12).view(3, 4))


def test_every_element_gets_its_own_noise():
    flat = GaussianNoise(1.0).add_(torch.zeros(1000))
    assert flat.unique().numel() > 990
    assert (flat != 0).all()


def test_std_zero_gives_zeros():
    assert torch.equal(GaussianNoise(0.0).draw(100), torch.zeros(100))
    assert torch.equal(GaussianNoise(0.0).add_(torch.ones(5)), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_that_are_not_float32_are_refused(dtype):
    with pytest.raises(PrivacyError, match="float32"):
        GaussianNoise(1.0).add_(torch.zeros(3, dtype=dtype))


def test_two_sources_differ():
    assert not torch.equal(GaussianNoise(1.0).draw(16), GaussianNoise(1.0).draw(16))


def test_global_seeds_have_no_influence():
    def noise_after_seeding() -> torch.Tensor:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return GaussianNoise(1.0).draw(16)

    assert not torch.equal(noise_after_seeding(), noise_after_seeding())


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    GaussianNoise(1.0).draw(100)
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


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_repeat_noise_is_refused(duplicate):
    with pytest.raises(PrivacyError, match="make a new one"):
        duplicate(GaussianNoise(1.0))


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
    assert stats.kstest(first.double().cpu().numpy(), "norm", args=(0, 2.0)).pvalue > FALSE_ALARM
