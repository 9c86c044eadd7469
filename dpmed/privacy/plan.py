"""PrivacyPlan: unit, sampler, clip, noise and accountant in one frozen object, so that they cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import accounting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpmed.privacy.clipping import Clipping
    from dpmed.privacy.noise import GaussianNoise
    from dpmed.privacy.proof import Engine
    from dpmed.privacy.sampling import PoissonUnitSampler

EngineName = Literal["one_pass", "opacus"]
RELATION = "add or remove one unit"
ACCOUNTANT = "pld+prv"
NOT_COVERED = (
    "the number of units, and so the sampling rate, is treated as public",
    "hyper-parameter trials, early stopping and the choice of a checkpoint by private data: the ledger adds runs up,"
    " this epsilon is of one",
    "what the model that training starts from, base or adapter, had already seen",
    "labels made from private text by a teacher model",
    "unless secure is true: floating-point attacks on the noise, and generators that are not cryptographic",
    "the names and the number of the labels, which are read from the training records",
    "the count of units whose gradient was not finite, which the certificate states exactly",
)


@dataclass(frozen=True)
class PrivacyPlan:
    """How one DP run samples, clips, adds noise and is charged; every part of the run comes out of this object.

    One step: draw units (Poisson, `sampling_rate`), take at most `max_records_per_unit` records of each, clip each
    unit's gradient to L2 norm `clip_norm`, sum, add noise of standard deviation `noise_multiplier * clip_norm` once,
    divide by `divisor`.

    Guarantee: a run of at most `n_steps` such steps is (epsilon, delta)-DP under adding or removing one unit, with the
        epsilon of `spent`, if `private`; see `NOT_COVERED` for what this does not say.
    Edge cases: `noise_multiplier` 0 (then also `clip_norm` inf) and `noise_seed` are allowed, for tests and
        comparisons; such a plan is not `private` and its certificate says so.
    Raises: InputError when made with values that no run may have; see `calibrated`.
    """

    unit: str
    """What is protected, e.g. the name of the patient column."""
    n_units: int
    """Units in the training data; treated as public."""
    expected_batch_units: int
    """Expected units per draw; fixed and public."""
    max_records_per_unit: int
    """Records of one unit that one step uses at most."""
    clip_norm: float
    """C: the L2 norm to which one unit's gradient is clipped."""
    noise_multiplier: float
    """Noise standard deviation / C."""
    n_steps: int
    """Planned optimizer steps, empty draws included."""
    delta: float
    """Below 1 / n_units."""
    target_epsilon: float | None = None
    """What the noise was calibrated to, if it was."""
    neighbouring_relation: str = RELATION
    accountant: str = ACCOUNTANT
    clipping: Clipping = "norm"
    """norm: scale down to C what is longer; automatic: scale every unit's gradient to nearly C (Bu et al. 2023)."""
    engine: EngineName = "one_pass"
    """What computes the per-unit gradients; no influence on the accounting."""
    secure: bool = False
    """Draws and noise from a cryptographic generator, noise against floating-point attacks; slower."""
    noise_seed: int | None = None
    """For tests only: fixes noise and draws, so the run is not private."""

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_numbers(self)
        if (self.neighbouring_relation, self.accountant) != (RELATION, ACCOUNTANT):
            raise InputError(
                f"only the relation '{RELATION}' and the accountant '{ACCOUNTANT}' exist: leave both at their defaults"
            )
        for name, known in (("clipping", ("norm", "automatic")), ("engine", get_args(EngineName))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is not known: choose one of {', '.join(known)}")
        if self.clipping == "automatic" and math.isinf(self.clip_norm):
            raise InputError("automatic clipping needs a finite clip_norm: set privacy.clip_norm, e.g. 1.0")

    @classmethod
    def calibrated(
        cls,
        *,
        unit: str,
        n_units: int,
        expected_batch_units: int,
        max_records_per_unit: int,
        clip_norm: float,
        target_epsilon: float,
        n_steps: int,
        delta: float | None = None,
        clipping: Clipping = "norm",
        engine: EngineName = "one_pass",
        secure: bool = False,
        noise_seed: int | None = None,
    ) -> PrivacyPlan:
        """The plan whose noise is just enough for `target_epsilon` after `n_steps` steps.

        `delta` None means n_units ** -1.1, which is below 1 / n_units as it must be; it shows n_units, which is treated
        as public anyway. Takes a few seconds; all checks come first.

        Raises: InputError for target_epsilon <= 0, delta not in (0, 1 / n_units), clip_norm not in (0, inf), n_units <
            expected_batch_units, or a count below 1.
        """
        without_noise = cls.without_noise(
            unit=unit,
            n_units=n_units,
            expected_batch_units=expected_batch_units,
            max_records_per_unit=max_records_per_unit,
            clip_norm=clip_norm,
            target_epsilon=target_epsilon,
            n_steps=n_steps,
            delta=delta,
            clipping=clipping,
            engine=engine,
            secure=secure,
            noise_seed=noise_seed,
        )
        noise_multiplier = accounting.calibrate(
            target_epsilon=target_epsilon,
            delta=without_noise.delta,
            sampling_rate=without_noise.sampling_rate,
            n_steps=n_steps,
        )
        return replace(without_noise, noise_multiplier=noise_multiplier)

    @classmethod
    def without_noise(
        cls,
        *,
        unit: str,
        n_units: int,
        expected_batch_units: int,
        max_records_per_unit: int,
        clip_norm: float,
        target_epsilon: float,
        n_steps: int,
        delta: float | None = None,
        clipping: Clipping = "norm",
        engine: EngineName = "one_pass",
        secure: bool = False,
        noise_seed: int | None = None,
    ) -> PrivacyPlan:
        """`calibrated` before its noise: all its checks and none of its cost, to refuse a budget early. Not private."""
        if n_units < 1:
            raise InputError(f"n_units must be at least 1, got {n_units}: the training data holds no unit")
        plan = cls(
            unit=unit,
            n_units=n_units,
            expected_batch_units=expected_batch_units,
            max_records_per_unit=max_records_per_unit,
            clip_norm=clip_norm,
            noise_multiplier=0.0,
            n_steps=n_steps,
            delta=float(n_units) ** -1.1 if delta is None else delta,
            target_epsilon=target_epsilon,
            clipping=clipping,
            engine=engine,
            secure=secure,
            noise_seed=noise_seed,
        )
        if math.isinf(clip_norm):
            raise InputError(
                "clip_norm must be finite, no noise can hide an unclipped gradient: set privacy.clip_norm, e.g. 1.0"
            )
        return plan

    @property
    def sampling_rate(self) -> float:
        """Probability with which a unit is in a draw."""
        return self.expected_batch_units / self.n_units

    @property
    def divisor(self) -> int:
        """What the noised sum is divided by: a fixed public number, never the size of the draw."""
        return self.expected_batch_units

    @property
    def steps_per_pass(self) -> int:
        """Draws that visit each unit about once: n_units / expected_batch_units, rounded up; one epoch."""
        return -(-self.n_units // self.expected_batch_units)

    @property
    def private(self) -> bool:
        """Whether a run by this plan has a guarantee at all."""
        return self.noise_multiplier > 0 and self.noise_seed is None

    def sampler(self, unit_of_record: Sequence[int], *, rank: int = 0, world_size: int = 1) -> PoissonUnitSampler:
        """A new sampler with fresh entropy; `unit_of_record` holds each record's unit, 0 .. n_units - 1.

        With several ranks each draws its own share of the units; together that is one draw.

        Raises: PrivacyError if the data has another number of units than the plan: the sampling rate would be wrong.
        """
        from dpmed.privacy.sampling import PoissonUnitSampler

        sampler = PoissonUnitSampler(
            unit_of_record,
            sampling_rate=self.sampling_rate,
            max_records_per_unit=self.max_records_per_unit,
            steps_per_pass=self.steps_per_pass,
            secure=self.secure,
            seed=self.noise_seed,
            rank=rank,
            world_size=world_size,
        )
        if sampler.n_units != self.n_units:
            raise PrivacyError(
                f"the data has {sampler.n_units} units, the privacy plan {self.n_units}: make the plan from this data"
            )
        return sampler

    def attach(self, model: nn.Module) -> Engine:
        """The engine that computes per-unit gradients of `model`, attached to it; see its `detach`.

        Raises: PrivacyError if a trainable weight is not covered.
        """
        if self.engine == "opacus":
            from dpmed.privacy.opacus_engine import OpacusEngine

            return OpacusEngine(model)
        from dpmed.privacy.one_pass import OnePassEngine

        return OnePassEngine(model)

    def clipped_sum(self, unit_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the units' gradients [u, p], each of L2 norm at most `clip_norm`; and how many were not finite."""
        from dpmed.privacy.clipping import clipped_sum

        return clipped_sum(unit_gradients, clip_norm=self.clip_norm, clipping=self.clipping)

    def noise(self) -> GaussianNoise:
        """A new noise source with fresh entropy, for the sum of clipped gradients: make one per start of a run."""
        from dpmed.privacy.noise import GaussianNoise

        std = self.noise_multiplier * self.clip_norm if self.noise_multiplier > 0 else 0.0  # 0 * inf would be NaN
        return GaussianNoise(std, seed=self.noise_seed, secure=self.secure)

    def epsilon_after(self, n_steps: int) -> float | None:
        """Epsilon of `n_steps` steps by the faster accountant, for progress lines; None without a guarantee."""
        if not self.private:
            return None
        run = {"noise_multiplier": self.noise_multiplier, "sampling_rate": self.sampling_rate, "n_steps": n_steps}
        return accounting.epsilon_curve(**run, deltas=[self.delta])[0][1]

    def spent(self, n_steps: int) -> dict[str, Any]:
        """The certificate after `n_steps` steps: JSON-ready. Without a guarantee, epsilon is None and "why" says why.

        Count a step before its result is released, and steps from before a resumption too.
        """
        why = self._why_not_private()
        report = None
        if why is None:
            report = accounting.epsilon(
                noise_multiplier=self.noise_multiplier,
                sampling_rate=self.sampling_rate,
                n_steps=n_steps,
                delta=self.delta,
            )
            if math.isinf(report.epsilon):
                report, why = None, "the accountants find no finite epsilon at this delta"
        certificate: dict[str, Any] = {
            "epsilon": report and report.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "n_units": self.n_units,
            "sampling_rate": self.sampling_rate,
            "expected_batch_units": self.expected_batch_units,
            "max_records_per_unit": self.max_records_per_unit,
            "clip_norm": self.clip_norm if math.isfinite(self.clip_norm) else None,
            "clipping": self.clipping,
            "noise_multiplier": self.noise_multiplier,
            "n_steps": n_steps,
            "planned_steps": self.n_steps,
            "target_epsilon": self.target_epsilon,
            "neighbouring_relation": self.neighbouring_relation,
            "accountant": self.accountant,
            "epsilon_pld": report and report.epsilon_pld,
            "epsilon_prv": report and report.epsilon_prv,
            "private": why is None,
            "engine": self.engine,
            "secure": self.secure,
            "not_covered": list(NOT_COVERED),
        }
        if why is not None:
            certificate["why"] = why
        if report is not None and report.prv_note is not None:
            certificate["prv_note"] = report.prv_note
        if report is not None:
            certificate |= self._what_it_means(n_steps)
        return certificate

    def _what_it_means(self, n_steps: int) -> dict[str, Any]:
        """The rest of the trade-off beside one (epsilon, delta): other deltas, and what an attacker can reach."""
        from dpmed.privacy.attack_bounds import attack_bounds

        shifted = [float(f"{self.delta * 10.0**exponent:.9g}") for exponent in range(1, -4, -1)]
        deltas = [delta for delta in shifted if delta < 1]
        run = {"noise_multiplier": self.noise_multiplier, "sampling_rate": self.sampling_rate, "n_steps": n_steps}
        curve = accounting.epsilon_curve(**run, deltas=deltas)
        bounds = attack_bounds([(self.noise_multiplier, self.sampling_rate, n_steps)])
        return {
            "epsilon_curve": [{"delta": delta, "epsilon": eps} for delta, eps in curve],
            "attack_bounds": bounds.to_dict(),
        }

    def _why_not_private(self) -> str | None:
        if self.noise_multiplier == 0:
            return "no noise was added (noise_multiplier 0)"
        if self.noise_seed is not None:
            return "noise_seed was set: whoever knows it can subtract the noise"
        return None

    def to_dict(self) -> dict[str, Any]:
        """All fields, by name; JSON-ready except an infinite clip_norm."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """The plan that `to_dict` wrote. Raises: InputError for missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise InputError(
                f"not a privacy plan, missing or unknown fields: {wrong}: was it written by another version of dpmed?"
            )
        return cls(**values)

    def differences(self, other: PrivacyPlan) -> list[str]:
        """Names of the fields that differ; a run resumes only if there is none."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


def _check_counts(plan: PrivacyPlan) -> None:
    for name in ("n_units", "expected_batch_units", "max_records_per_unit", "n_steps"):
        value = getattr(plan, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"{name} must be a whole number of at least 1, got {value}: correct it in the recipe or the data"
            )
    if plan.expected_batch_units > plan.n_units:
        raise InputError(
            f"expected_batch_units {plan.expected_batch_units} exceeds the {plan.n_units} units of the training data "
            f"(a sampling rate above 1): set privacy.expected_batch_units to {plan.n_units} or less"
        )


def _check_numbers(plan: PrivacyPlan) -> None:
    if not (math.isfinite(plan.noise_multiplier) and plan.noise_multiplier >= 0):
        raise InputError(f"noise_multiplier must be a finite number >= 0, got {plan.noise_multiplier}: calibrate it")
    if not plan.clip_norm > 0 or (math.isinf(plan.clip_norm) and plan.noise_multiplier > 0):
        raise InputError(
            f"clip_norm must be a finite number > 0, got {plan.clip_norm}: set privacy.clip_norm, e.g. 1.0"
        )
    if plan.target_epsilon is not None and not (math.isfinite(plan.target_epsilon) and plan.target_epsilon > 0):
        raise InputError(
            f"target_epsilon must be a finite number > 0, got {plan.target_epsilon}: set privacy.target_epsilon, e.g. 8"
        )
    if not 0 < plan.delta < 1 / plan.n_units:
        raise InputError(
            f"delta must lie in (0, 1/n_units = {1 / plan.n_units:.2g}), got {plan.delta}: a larger one lets a run "
            f"publish a whole unit; set privacy.delta to {float(plan.n_units) ** -1.1:.1e} or less"
        )
