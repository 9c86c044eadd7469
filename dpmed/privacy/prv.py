"""The second accountant: Opacus' PRV (Gopi et al. 2021), bounded in memory and loaded without torch."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import machinery, util
from types import ModuleType
from typing import Any

from dpmed.errors import PrivacyError

DELTA_ERROR = 1e-3  # numerical error in delta, relative: Opacus' own default
# Opacus then takes about 1 GB and 10 s; unbounded, some settings ask for a thousand times that: the process is killed.
MAX_POINTS = 2**23


def prv_epsilon(
    history: Sequence[tuple[float, float, int]], *, delta: float, eps_error: float, largest_loss: float
) -> tuple[float | None, str | None]:
    """Opacus' upper bound on epsilon and None, or None and the reason why there is none.

    Args:
        history: (noise_multiplier > 0, sampling_rate, n_steps >= 1) of each run; at least one.
        delta: in (0, 1).
        eps_error: the numerical error asked for, > 0; the bound holds it.
        largest_loss: epsilon at `delta * DELTA_ERROR / 4` by any upper bound; sizes the mesh that is refused if too
            large. Opacus (`compute_safe_domain_size`) sizes its own in the same way.

    Guarantee: the result is an upper bound, up to what Opacus' floating point costs.
    Edge cases: memory is bounded by `MAX_POINTS`; warnings of Opacus are silenced: of RDP orders, which only size its
        mesh, and of log(0) at a sampling rate of 1, where the limit is right.
    """
    n_steps = sum(n_steps for _, _, n_steps in history)
    per_run = math.sqrt(n_steps * math.log(12 / (DELTA_ERROR * delta)) / 2) / eps_error
    points = len(history) * 2 * (max(largest_loss, eps_error) + 3) * per_run
    if not points <= MAX_POINTS:
        return None, f"Opacus' PRV would need a mesh of {points:.1e} points, more than {MAX_POINTS:.1e}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            accountant = opacus_accountant()()
            accountant.history = list(history)
            value = float(accountant.get_epsilon(delta, eps_error=eps_error, delta_error=DELTA_ERROR * delta))
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
            return None, f"Opacus' PRV failed: {type(error).__name__}: {error}"
    return (value, None) if math.isfinite(value) else (None, f"Opacus' PRV gave {value}")


@lru_cache(maxsize=1)
def opacus_accountant() -> Any:
    """Opacus' class `PRVAccountant`, run from Opacus' own files but without the rest of Opacus.

    `import opacus` loads torch and its distributed tensors: 2 s of the 3 that a calibration may take. The files of the
    accountant name each other relatively, so they load under another package name; of their abstract base, the only
    file that knows optimizers, the PRV accountant needs the empty history. The name `opacus` itself is left alone.

    Raises: PrivacyError if Opacus is not installed.
    """
    found = util.find_spec("opacus")
    if found is None or not found.submodule_search_locations:
        raise PrivacyError("no second accountant confirms epsilon: install it with pip install 'opacus>=1.6,<1.7'")
    spec = machinery.ModuleSpec(f"{__name__}_opacus", None, is_package=True)
    spec.submodule_search_locations = [f"{folder}/accountants" for folder in found.submodule_search_locations]
    base = ModuleType(f"{spec.name}.accountant")
    setattr(base, "IAccountant", _Base)  # noqa: B010  a module has no such attribute for the type checker
    sys.modules |= {spec.name: util.module_from_spec(spec), base.__name__: base}
    return importlib.import_module(f"{spec.name}.prv").PRVAccountant


class _Base:
    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []
