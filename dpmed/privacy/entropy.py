"""Uniform random numbers that cannot be predicted from those seen before: ChaCha20 under keys from the system."""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

KEY_BYTES = 32
_COUNTER_AND_NONCE = bytes(16)  # a key is used once, so the nonce may be fixed; the counter starts at block 0


class EntropyStream:
    """Uniform numbers from the keystream of ChaCha20 (RFC 8439), a new key from the operating system per request.

    Guarantees:
        - Cryptographic: whoever tells the numbers from truly uniform ones breaks ChaCha20 or the system's generator.
        - Nothing is stored: no key outlives its request, so no copy, fork, restart or dump of memory replays or
          foretells numbers, and no seed has influence.
    """

    def bits(self, n: int) -> np.ndarray:
        """[n] independent uniform 64-bit words, uint64. Edge cases: 0 gives an empty array."""
        return _keystream(secrets.token_bytes(KEY_BYTES), n)

    def uniforms(self, n: int) -> np.ndarray:
        """[n] independent numbers in [0, 1), float64: the multiples of 2**-53, each equally likely."""
        return (self.bits(n) >> np.uint64(11)) * 2.0**-53


def _keystream(key: bytes, n: int) -> np.ndarray:
    """The first 8n bytes of the keystream as [n] little-endian words; n < 2**35, where the block counter would end."""
    encryptor = Cipher(ChaCha20(key, _COUNTER_AND_NONCE), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * n)), dtype="<u8")
