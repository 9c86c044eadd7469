"""What tells one DP run from another: each difference is named, and nothing of the data can be looked up in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy.test_charged_run import PLAN, UNITS
from torch import nn

from dpmed.errors import PrivacyError
from dpmed.privacy.run_state import STATE_FILE, RunState


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    made[0].requires_grad_(False)
    return made


def state(run_id: str | None = "a1", **changes: Any) -> RunState:
    values: dict[str, Any] = {"data": [b"one", b"two"], "units": UNITS, "model": model()}
    return RunState.of(PLAN, run_id=run_id, **{**values, **changes})


def other_frozen_weight() -> nn.Module:
    changed = model()
    next(changed[0].parameters()).data[0, 0] += 1e-3
    return changed


def other_trained_weight() -> nn.Module:
    changed = model()
    next(changed[1].parameters()).data += 1
    return changed


def test_the_same_run_differs_in_nothing() -> None:
    assert state().differences(state()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": [b"one", b"too"]}, ["data"]),
        ({"data": [b"onet", b"wo"]}, ["data"]),
        ({"units": [*UNITS[:-1], "p9"]}, ["units"]),
        ({"model": other_frozen_weight()}, ["model"]),
        ({"model": nn.Linear(3, 2)}, ["model"]),
    ],
)
def test_a_change_is_named(change: dict[str, Any], named: list[str]) -> None:
    assert state(**change).differences(state()) == named


def test_a_change_of_the_plan_is_named_by_its_fields() -> None:
    changed = replace(state(), plan=replace(PLAN, clip_norm=2.0, secure=True))
    assert changed.differences(state()) == ["clip_norm", "secure"]


def test_trained_weights_do_not_count_since_a_checkpoint_brings_them() -> None:
    assert state(model=other_trained_weight()).differences(state()) == []


def test_the_replaced_original_of_a_fresh_head_does_not_count() -> None:
    def with_original(seed: int) -> nn.Module:
        made = model()
        torch.manual_seed(seed)
        made.add_module("original_module", nn.Linear(2, 2).requires_grad_(False))
        return made

    assert state(model=with_original(1)).differences(state(model=with_original(2))) == []


def test_two_runs_on_the_same_data_have_nothing_in_common() -> None:
    first, second = state(None), state(None)
    assert first.run_id != second.run_id
    assert {first.data, first.units, first.model}.isdisjoint({second.data, second.units, second.model})


def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(state().to_json())
    assert RunState.read(tmp_path) == state()
    assert json.loads(state().to_json())["private"] is True


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"plan": {"unit": "x"}})])
def test_a_broken_state_is_refused_with_a_remedy(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(PrivacyError, match="cannot be read; start anew"):
        RunState.read(tmp_path)


def test_a_folder_without_a_state_is_no_dp_run(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no DP run"):
        RunState.read(tmp_path)
