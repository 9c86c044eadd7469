"""Gaussian noise that nobody who knows the recipe can compute again."""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch
from torch import Tensor

from dpmed.errors import InputError, PrivacyError


class GaussianNoise:
    """A source of N(0, std^2) noise in float32, seeded by the operating system when it is made.

    Guarantees:
        - Fresh entropy per object: neither the run's seed nor `torch.manual_seed` nor `np.random.seed` has influence,
          and two objects, so also a run and its resumption, never share noise.
        - No state to save: copying and pickling are refused, since a copy would add the same noise to other data.
    On a CPU the numbers come from numpy's PCG64 with 256 bits of entropy, not from a torch.Generator: torch's CPU
    generator uses only the low 32 bits of its seed, so an attacker could try all of its noise streams. On a GPU torch's
    counter-based generator takes 64 bits.
    Not covered: attacks on the last bits of floating-point noise (Mironov 2012); the generators are not cryptographic.

    Args:
        std: standard deviation, >= 0 and finite: noise multiplier times clip norm, for the SUM of clipped gradients.
            0 gives zeros, hence no privacy.
        seed: for tests only: the noise is then the same on every start, and protects nobody.
    """

    def __init__(self, std: float, *, seed: int | None = None) -> None:
        if not (math.isfinite(std) and std >= 0):
            raise InputError(f"noise std must be a finite number >= 0, got {std}: check noise_multiplier and clip_norm")
        self.std = float(std)
        self._seed = seed
        self._cpu = np.random.Generator(np.random.PCG64(secrets.randbits(256) if seed is None else seed))
        self._on_device: dict[torch.device, torch.Generator] = {}

    def draw(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw fresh noise: [n], float32, on `device`. Every call gives new numbers."""
        device = torch.device(device)
        if device.type == "cpu":
            return torch.from_numpy(self._cpu.standard_normal(n, dtype=np.float32)).mul_(self.std)
        return torch.randn(n, generator=self._generator(device), device=device, dtype=torch.float32).mul_(self.std)

    def add_(self, flat: Tensor) -> Tensor:
        """Add noise to every element of `flat`, in place; call it once per logical step, on the sum of all units.

        Raises: PrivacyError unless `flat` is float32 (in bfloat16 most of the noise would be rounded away).
        """
        if flat.dtype != torch.float32:
            raise PrivacyError(f"noise must be added in float32, got {flat.dtype}: keep the clipped sum in float32")
        return flat.add_(self.draw(flat.numel(), flat.device).view(flat.shape))

    def _generator(self, device: torch.device) -> torch.Generator:
        """The device's own generator, made and seeded on first use."""
        if device not in self._on_device:
            generator = torch.Generator(device=device)
            generator.manual_seed(secrets.randbits(63) if self._seed is None else self._seed)
            self._on_device[device] = generator
        return self._on_device[device]

    def __reduce_ex__(self, protocol: object) -> str | tuple:
        raise PrivacyError("a noise source cannot be copied or saved, the copy would repeat its noise: make a new one")
