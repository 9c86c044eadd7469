"""Gaussian noise that nobody who knows the recipe can compute again."""

from __future__ import annotations

import math
import os
import secrets

import numpy as np
import torch
from torch import Tensor

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.entropy import EntropyStream

GRID_BITS = 20  # secure sums are multiples of about std * 2**-20
# Numbers per request for entropy: so few that torch starts no threads, which on a busy machine wait for each other.
CHUNK = 1 << 14


class GaussianNoise:
    """A source of N(0, std^2) noise for the SUM of clipped gradients, seeded by the operating system when it is made.

    Guarantees:
        - Fresh entropy per object: neither the run's seed nor `torch.manual_seed` nor `np.random.seed` has influence,
          and two objects, so also a run and its resumption, never share noise.
        - No state to save: copying, pickling and, unless `secure`, use in a forked process are refused, since a copy
          would add the same noise to other data.

    Fast path: float32 noise is added in float32. On a CPU the numbers come from numpy's PCG64 with 256 bits of entropy,
    not from a torch.Generator: torch's CPU generator uses only the low 32 bits of its seed, so an attacker could try
    all of its noise streams. On a GPU torch's counter-based generator takes 64 bits. Not covered: the generators are
    not cryptographic, and the last bits of a float32 sum depend on the data (Mironov 2012).

    Secure path: the noise comes from a cryptographic generator (`EntropyStream`), as float64 normals each made of two
    Box-Muller draws, and sum + noise is rounded in float64 to a multiple of `grid` before it becomes float32. What is
    released then shows nothing of the float64 bits below the grid, where the known attacks on floating-point noise
    read (Mironov 2012), and an attacker would have to invert four uniforms per pair of numbers instead of two (Holohan
    and Braghin 2021). Rounding sum + noise is post-processing, so it costs no privacy.
    Not proven: that the rounded numbers are exactly those of rounded real-valued Gaussian noise. Each grid point's
    probability is right up to the rounding of float64 functions, and the tail ends at 13 std; there is no proof as for
    the discrete Gaussian, which is the exact alternative (Canonne, Kamath and Steinke 2020). Timing is not covered.

    Args:
        std: standard deviation, >= 0 and finite: noise multiplier times clip norm. 0 gives zeros, hence no privacy.
        secure: take the secure path; on every device the noise is then made on the CPU.
        seed: for tests only: the noise is then the same on every start, and protects nobody. Not with `secure`.
    Raises: InputError for an std out of range, or a seed for secure noise.
    """

    def __init__(self, std: float, *, secure: bool = False, seed: int | None = None) -> None:
        if not (math.isfinite(std) and std >= 0):
            raise InputError(f"noise std must be a finite number >= 0, got {std}: check noise_multiplier and clip_norm")
        if secure and seed is not None:
            raise InputError("a seed makes noise that anyone can compute again: leave out noise_seed, or secure")
        self.std = float(std)
        self.secure = secure
        self._entropy = EntropyStream()
        self._seed = seed
        self._process = os.getpid()
        self._cpu = np.random.Generator(np.random.PCG64(secrets.randbits(256) if seed is None else seed))
        self._on_device: dict[torch.device, torch.Generator] = {}

    @property
    def grid(self) -> float:
        """What secure sums are multiples of: the power of two in (std * 2**-21, std * 2**-20]; 0 without noise.

        float32 holds such a multiple exactly up to 8 std at least; beyond, it rounds the rounded sum once more.
        """
        return 2.0 ** (math.floor(math.log2(self.std)) - GRID_BITS) if self.std > 0 else 0.0

    def add_(self, flat: Tensor) -> Tensor:
        """Add noise to every element of `flat`, in place; call it once per logical step, on the sum of all units.

        Edge cases: std 0 leaves `flat` as it is; what is not finite stays so.
        Raises: PrivacyError unless `flat` is float32 (in bfloat16 most of the noise would be rounded away), or in a
            forked process.
        """
        if flat.dtype != torch.float32:
            raise PrivacyError(f"noise must be added in float32, got {flat.dtype}: keep the clipped sum in float32")
        if not self.secure:
            return self._add_fast_(flat)
        if self.std == 0:
            return flat
        total = flat.detach().to("cpu", torch.float64).reshape(-1)  # a copy, since the type differs
        for part in total.split(CHUNK):
            part.add_(self._normals(part.numel()), alpha=self.std).div_(self.grid).round_().mul_(self.grid)
            part.add_(0.0)  # turns -0.0 into 0.0: the sign of a zero would tell the side it was rounded from
        return flat.copy_(total.view(flat.shape))

    def draw(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Fresh noise, [n], float32, on `device`: what `add_` makes of zeros. Every call gives new numbers.

        Not for release: secure noise that is added elsewhere is not rounded together with the sum.
        """
        return self.add_(torch.zeros(n, dtype=torch.float32, device=device))

    def _add_fast_(self, flat: Tensor) -> Tensor:
        if self._seed is None and os.getpid() != self._process:
            raise PrivacyError("a noise source in a forked process repeats its parent's noise: make a new one there")
        device = flat.device
        if device.type != "cpu":
            normals = torch.randn(flat.numel(), generator=self._generator(device), device=device, dtype=torch.float32)
            return flat.add_(normals.view(flat.shape), alpha=self.std)
        normals = np.empty(min(CHUNK, flat.numel()), dtype=np.float32)  # stays in the cache
        for part in flat.view(-1).split(CHUNK):
            drawn = normals[: part.numel()]
            self._cpu.standard_normal(out=drawn, dtype=np.float32)
            part.add_(torch.from_numpy(drawn), alpha=self.std)
        return flat

    def _normals(self, n: int) -> Tensor:
        """[n] standard normals, float64: two independent Box-Muller draws added, over sqrt(2)."""
        half = (n + 1) // 2
        # 64 bits, not 53: the smallest uniform, 2**-64, lets a draw reach 9.4; never 0, whose logarithm is infinite
        words = torch.from_numpy(self._entropy.bits(4 * half).astype(np.float64))
        uniforms = words.add_(1.0).mul_(2.0**-64).view(2, 2, half)  # [draw, radius or angle, half]
        radius = uniforms[:, 0].log().neg_().sqrt_()  # Box-Muller's sqrt(2) cancels with that of the sum
        angle = uniforms[:, 1].mul(2 * math.pi)
        return torch.cat([(radius * angle.cos()).sum(0), (radius * angle.sin()).sum(0)])[:n]

    def _generator(self, device: torch.device) -> torch.Generator:
        """The device's own generator, made and seeded on first use."""
        if device not in self._on_device:
            generator = torch.Generator(device=device)
            generator.manual_seed(secrets.randbits(63) if self._seed is None else self._seed)
            self._on_device[device] = generator
        return self._on_device[device]

    def __reduce_ex__(self, protocol: object) -> str | tuple:
        raise PrivacyError("a noise source cannot be copied or saved, the copy would repeat its noise: make a new one")
