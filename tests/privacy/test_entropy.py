"""The keystream is ChaCha20's, no key is used twice, and the numbers are uniform."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpmed.privacy.entropy import KEY_BYTES, EntropyStream, _keystream

FALSE_ALARM = 1e-9
N = 200_000

# RFC 8439, appendix A.1: (key, block, keystream of that block); the nonce is zero in all of them.
RFC_8439 = [
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30),
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


@pytest.mark.parametrize(("key", "block", "expected"), RFC_8439)
def test_the_keystream_is_that_of_the_standard(key, block, expected):
    words = _keystream(key, 8 * (block + 1))
    assert words[8 * block :].tobytes().hex() == expected


def test_bits_and_uniforms_come_from_that_keystream(monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", lambda n: bytes(n))
    words = EntropyStream().bits(8)
    assert words.dtype == np.uint64
    assert words.astype("<u8").tobytes().hex() == RFC_8439[0][2]
    assert EntropyStream().uniforms(8).tolist() == [int(word) // 2**11 / 2**53 for word in words]


def test_every_request_gets_its_own_key_of_256_bits(monkeypatch):
    asked: list[int] = []
    real = EntropyStream().bits(4).tobytes()
    monkeypatch.setattr("secrets.token_bytes", lambda n: asked.append(n) or (real[:31] + bytes([len(asked)])))
    stream = EntropyStream()
    draws = [stream.bits(4).tobytes(), stream.uniforms(4).tobytes(), stream.bits(4).tobytes()]
    assert asked == [KEY_BYTES] * 3 == [32] * 3
    assert len(set(draws)) == 3


def test_nothing_is_stored():
    stream = EntropyStream()
    stream.bits(10)
    assert vars(stream) == {}


def test_requests_of_any_size():
    stream = EntropyStream()
    for n in (0, 1, 7, 8, 9, 100_003):
        assert stream.bits(n).shape == stream.uniforms(n).shape == (n,)


def assert_uniform(numbers: np.ndarray) -> None:
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > FALSE_ALARM
    centred = (numbers - 0.5) * np.sqrt(12)
    bound = stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(len(numbers)) * 1.01
    for lag in (1, 2, 8, len(numbers) // 2):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < bound * np.sqrt(len(numbers) / (len(numbers) - lag))
    scaled = numbers * 2.0**53
    assert np.array_equal(scaled, np.floor(scaled))
    assert (scaled % 2).mean() == pytest.approx(0.5, abs=0.02)  # the 53rd bit is in use


def test_uniforms_are_uniform_and_uncorrelated():
    assert_uniform(EntropyStream().uniforms(N))


@pytest.mark.parametrize(
    "fault",
    [
        lambda u: u**1.03,
        lambda u: np.concatenate([u[: N // 2], u[: N // 2]]),
        lambda u: np.where(np.arange(N) % 2, np.roll(u, 1), u),
        lambda u: u.astype(np.float32).astype(np.float64),
    ],
)
def test_numbers_that_are_not_uniform_are_seen(fault):
    with pytest.raises(AssertionError):
        assert_uniform(fault(EntropyStream().uniforms(N)))


def test_each_of_the_64_bits_is_fair():
    words = EntropyStream().bits(N)
    low, high = stats.binom.ppf([FALSE_ALARM / 64, 1 - FALSE_ALARM / 64], N, 0.5)
    for bit in range(64):
        assert low <= int(((words >> np.uint64(bit)) & np.uint64(1)).sum()) <= high, bit


def test_the_largest_word_is_below_one(monkeypatch):
    monkeypatch.setattr(EntropyStream, "bits", lambda self, n: np.full(n, 2**64 - 1, dtype=np.uint64))
    assert EntropyStream().uniforms(3).tolist() == [1 - 2.0**-53] * 3
