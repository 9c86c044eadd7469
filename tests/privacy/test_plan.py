"""One plan makes sampler, noise and certificate; values that no private run may have are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from dpmed.errors import InputError, PrivacyError
from dpmed.privacy import accounting
from dpmed.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan(
    unit="patient_id",
    n_units=400,
    expected_batch_units=32,
    max_records_per_unit=4,
    clip_norm=0.5,
    noise_multiplier=2.0,
    n_steps=39,
    delta=1e-3,
    target_epsilon=1.0,
)
INPUTS: dict[str, Any] = {
    "unit": "patient_id",
    "n_units": 400,
    "expected_batch_units": 32,
    "max_records_per_unit": 4,
    "clip_norm": 0.5,
    "target_epsilon": 8.0,
    "n_steps": 39,
}


@pytest.fixture
def no_calibration(monkeypatch):
    """Calibration costs seconds; where only the rest of the plan is tested, any noise will do."""
    monkeypatch.setattr(accounting, "calibrate", lambda **inputs: 1.25)


def test_rate_and_divisor_come_from_public_numbers():
    assert PLAN.sampling_rate == 32 / 400
    assert PLAN.divisor == 32
    assert dataclasses.replace(PLAN, n_units=401).steps_per_pass == 13
    assert dataclasses.replace(PLAN, n_units=416).steps_per_pass == 13


def test_a_calibrated_plan_keeps_its_promise():
    plan = PrivacyPlan.calibrated(**{**INPUTS, "target_epsilon": 1.0})
    spent = plan.spent(plan.n_steps)
    assert 0.98 < spent["epsilon"] <= 1.0
    assert plan.private and spent["private"]
    assert plan.target_epsilon == 1.0


def test_calibration_gets_the_numbers_of_the_plan(monkeypatch):
    asked: dict[str, float] = {}
    monkeypatch.setattr(accounting, "calibrate", lambda **inputs: asked.update(inputs) or 1.25)
    plan = PrivacyPlan.calibrated(**INPUTS, delta=1e-4)
    assert plan.noise_multiplier == 1.25
    assert asked == {"target_epsilon": 8.0, "delta": 1e-4, "sampling_rate": 0.08, "n_steps": 39}


@pytest.mark.usefixtures("no_calibration")
def test_delta_by_default_is_n_units_to_the_minus_1_1():
    plan = PrivacyPlan.calibrated(**INPUTS)
    assert plan.delta == pytest.approx(400**-1.1)
    assert plan.delta < 1 / 400


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_epsilon", 0.0, "target_epsilon"),
        ("target_epsilon", -3.0, "target_epsilon"),
        ("target_epsilon", math.nan, "target_epsilon"),
        ("delta", 1 / 400, "delta"),
        ("delta", 0.5, "delta"),
        ("delta", 0.0, "delta"),
        ("delta", math.nan, "delta"),
        ("clip_norm", 0.0, "clip_norm"),
        ("clip_norm", -1.0, "clip_norm"),
        ("clip_norm", math.inf, "clip_norm"),
        ("clip_norm", math.nan, "clip_norm"),
        ("expected_batch_units", 401, "set privacy.expected_batch_units to 400 or less"),
        ("expected_batch_units", 0, "expected_batch_units"),
        ("n_units", 0, "n_units"),
        ("n_units", 400.0, "n_units"),
        ("max_records_per_unit", 0, "max_records_per_unit"),
        ("n_steps", 0, "n_steps"),
        ("n_steps", True, "n_steps"),
    ],
)
def test_a_plan_that_no_run_may_have_is_refused_by_name(name, value, message):
    with pytest.raises(InputError, match=message):
        PrivacyPlan.calibrated(**{**INPUTS, name: value})


def test_checks_come_before_the_slow_calibration(monkeypatch):
    def fail(**inputs: float) -> float:
        raise AssertionError("calibrated before the checks")

    monkeypatch.setattr(accounting, "calibrate", fail)
    with pytest.raises(InputError):
        PrivacyPlan.calibrated(**{**INPUTS, "expected_batch_units": 500})


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 1 / 400},
        {"expected_batch_units": 401},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"clip_norm": math.inf},
        {"neighbouring_relation": "replace one unit"},
        {"accountant": "rdp"},
    ],
)
def test_the_constructor_checks_as_well(change):
    with pytest.raises(InputError):
        dataclasses.replace(PLAN, **change)


def test_the_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.noise_multiplier = 0.1  # pyright: ignore[reportAttributeAccessIssue]


def test_the_certificate_is_charged_for_the_steps_run_at_the_plan_s_own_rate():
    spent = PLAN.spent(10)
    report = accounting.epsilon(noise_multiplier=2.0, sampling_rate=32 / 400, n_steps=10, delta=1e-3)
    assert (spent["epsilon"], spent["epsilon_pld"], spent["epsilon_prv"]) == (
        report.epsilon,
        report.epsilon_pld,
        report.epsilon_prv,
    )
    assert spent["n_steps"] == 10 and spent["planned_steps"] == 39
    assert spent["epsilon"] < PLAN.spent(39)["epsilon"] < PLAN.spent(40)["epsilon"]


def test_the_certificate_names_all_that_it_rests_on_and_is_json():
    spent = json.loads(json.dumps(PLAN.spent(39), allow_nan=False))
    expected = {
        "delta": 1e-3,
        "unit": "patient_id",
        "n_units": 400,
        "sampling_rate": 0.08,
        "expected_batch_units": 32,
        "max_records_per_unit": 4,
        "clip_norm": 0.5,
        "noise_multiplier": 2.0,
        "neighbouring_relation": "add or remove one unit",
        "accountant": "pld+prv",
        "engine": "one_pass",
        "clipping": "norm",
        "secure": False,
        "private": True,
    }
    assert {key: spent[key] for key in expected} == expected
    assert "why" not in spent
    text = " ".join(spent["not_covered"])
    for gap in ("number of units", "hyper-parameter", "checkpoint", "training starts from", "teacher"):
        assert gap in text


def test_nothing_run_costs_nothing():
    assert PLAN.spent(0)["epsilon"] == 0.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"noise_multiplier": 0.0}, "no noise"),
        ({"noise_multiplier": 0.0, "clip_norm": math.inf}, "no noise"),
        ({"noise_seed": 0}, "noise_seed"),
        ({"delta": 1e-19}, "no finite epsilon"),
    ],
)
def test_a_run_without_a_guarantee_says_so_and_shows_no_epsilon(change, why):
    spent = json.loads(json.dumps(dataclasses.replace(PLAN, **change).spent(39), allow_nan=False))
    assert spent["private"] is False
    assert spent["epsilon"] is spent["epsilon_pld"] is spent["epsilon_prv"] is None
    assert why in spent["why"]


def test_private_needs_noise_from_the_operating_system():
    assert PLAN.private
    assert not dataclasses.replace(PLAN, noise_multiplier=0.0).private
    assert not dataclasses.replace(PLAN, noise_seed=0).private


def test_why_prv_did_not_answer_is_in_the_certificate():
    weak = dataclasses.replace(PLAN, noise_multiplier=0.02)
    spent = weak.spent(39)
    assert spent["epsilon_prv"] is None and "PRV" in spent["prv_note"]


def test_the_sampler_draws_at_the_plan_s_rate_and_cap():
    sampler = PLAN.sampler([row // 2 for row in range(800)])
    assert sampler.sampling_rate == PLAN.sampling_rate
    assert sampler.max_records_per_unit == 4
    assert len(sampler) == PLAN.steps_per_pass


@pytest.mark.parametrize("n_units", [399, 401])
def test_data_with_another_number_of_units_is_refused(n_units):
    with pytest.raises(PrivacyError, match=f"{n_units} units, the privacy plan 400"):
        PLAN.sampler(list(range(n_units)))


def test_the_noise_has_the_clip_norm_in_it():
    assert PLAN.noise().std == 2.0 * 0.5
    assert dataclasses.replace(PLAN, noise_multiplier=0.0, clip_norm=math.inf).noise().std == 0.0


def test_every_start_gets_fresh_noise_and_draws():
    units = list(range(400))
    assert not torch.equal(PLAN.noise().draw(8), PLAN.noise().draw(8))
    assert list(PLAN.sampler(units)) != list(PLAN.sampler(units))


def test_the_test_only_seed_fixes_noise_and_draws():
    plan, units = dataclasses.replace(PLAN, noise_seed=5), list(range(400))
    assert torch.equal(plan.noise().draw(8), plan.noise().draw(8))
    assert list(plan.sampler(units)) == list(plan.sampler(units))


def test_a_plan_survives_json():
    assert PrivacyPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_other_dictionaries_are_refused_by_field():
    values = PLAN.to_dict()
    with pytest.raises(InputError, match="missing or unknown fields: sigma"):
        PrivacyPlan.from_dict({**values, "sigma": 1.0})
    del values["delta"]
    with pytest.raises(InputError, match="delta"):
        PrivacyPlan.from_dict(values)


def test_differences_names_the_fields_that_differ():
    assert PLAN.differences(dataclasses.replace(PLAN)) == []
    other = dataclasses.replace(PLAN, n_units=401, noise_multiplier=2.1, unit="admission_id")
    assert PLAN.differences(other) == ["unit", "n_units", "noise_multiplier"]
