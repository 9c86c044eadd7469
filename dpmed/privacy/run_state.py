"""What makes a resumed DP run the same run: its id, its plan, and fingerprints of data and frozen model."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from torch import nn

STATE_FILE = "privacy_run.json"
_SAMPLED = 64
"""Weights of each frozen tensor that enter the fingerprint, spread over it."""


@dataclass(frozen=True)
class RunState:
    """Identity of a DP run; written when it starts and into every checkpoint.

    Fingerprints are keyed with the run's random id, so that nobody can look a known data set up in them.
    """

    run_id: str
    plan: PrivacyPlan
    data: str
    units: str
    model: str

    @classmethod
    def of(
        cls, plan: PrivacyPlan, *, data: Iterable[bytes], units: Sequence[str], model: nn.Module, run_id: str | None
    ) -> RunState:
        """The state of a run.

        Args:
            plan: the run's guarantee.
            data: all that training reads of the records, in order.
            units: names of the units; only a digest is kept.
            model: with its adapters on; the frozen weights count.
            run_id: of the run that goes on; None starts a new one.
        """
        run_id = run_id or secrets.token_hex(8)
        return cls(
            run_id=run_id,
            plan=plan,
            data=_digest(run_id, data),
            units=_digest(run_id, (name.encode() for name in sorted(units))),
            model=_digest(run_id, _model_parts(model)),
        )

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state beside a checkpoint or in a run folder.

        Raises: PrivacyError if there is none, or it cannot be read.
        """
        file = folder / STATE_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            del values["private"]
            return cls(**{**values, "plan": PrivacyPlan.from_dict(values["plan"])})
        except FileNotFoundError:
            raise PrivacyError(f"{folder.name} has no {STATE_FILE}; it is no DP run, start anew") from None
        except (ValueError, TypeError, KeyError, InputError):
            raise PrivacyError(f"{folder.name}/{STATE_FILE} cannot be read; start anew in another folder") from None

    def to_json(self) -> str:
        """What `read` reads."""
        return json.dumps({**asdict(self), "private": self.plan.private}, indent=1) + "\n"

    def differences(self, other: RunState) -> list[str]:
        """What differs between two states of one run: fields of the plan, "data", "units", "model"."""
        named = [name for name in ("data", "units", "model") if getattr(self, name) != getattr(other, name)]
        return self.plan.differences(other.plan) + named


def _digest(key: str, parts: Iterable[bytes]) -> str:
    mac = hmac.new(key.encode(), digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big") + part)
    return mac.hexdigest()


def _model_parts(model: nn.Module) -> Iterable[bytes]:
    """Names, shapes and a sample of the frozen weights, the same on every device; trained ones come from checkpoints.

    Not the replaced originals of modules that are trained in full: a fresh head's first values have no influence.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"trained {name} {tuple(parameter.shape)}".encode()
        elif "original_module" not in name.split("."):
            gather = getattr(parameter, "full_tensor", None)  # of a base that is sharded over ranks
            flat = (gather() if gather else parameter).detach().reshape(-1)
            n = min(_SAMPLED, len(flat))
            at = torch.arange(n, device=flat.device) * (len(flat) - 1) // max(n - 1, 1)  # whole numbers: exact
            yield f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode()
            yield flat[at].float().cpu().numpy().tobytes()
