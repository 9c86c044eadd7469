"""The PRV accountant that we load is Opacus' own, and leaves Opacus alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opacus.accountants import PRVAccountant

from dpmed.errors import PrivacyError
from dpmed.privacy import prv
from dpmed.privacy.prv import opacus_accountant, prv_epsilon

HISTORIES = [
    [(1.5, 256 / 22_000, 860)],
    [(4.0, 1.0, 20)],
    [(0.8, 0.01, 50), (2.0, 0.05, 100), (30.0, 1.0, 3)],
]


@pytest.mark.parametrize("history", HISTORIES)
def test_it_gives_to_the_last_bit_what_opacus_gives(history):
    accountant = PRVAccountant()
    accountant.history = list(history)
    expected = accountant.get_epsilon(1e-5, eps_error=0.02, delta_error=1e-8)
    assert prv_epsilon(history, delta=1e-5, eps_error=0.02, largest_loss=10.0) == (expected, None)


def test_it_is_opacus_file_and_not_a_copy():
    ours, theirs = sys.modules[opacus_accountant().__module__], sys.modules[PRVAccountant.__module__]
    assert ours.__file__ == theirs.__file__


def test_opacus_still_imports_whole_afterwards():
    code = (
        "from dpmed.privacy.prv import opacus_accountant; opacus_accountant();"
        "from opacus import PrivacyEngine; from opacus.accountants import PRVAccountant, create_accountant;"
        "print(isinstance(create_accountant('prv'), PRVAccountant))"
    )
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True"


def test_a_mesh_beyond_memory_is_refused_before_it_is_made():
    value, reason = prv_epsilon([(0.1, 0.5, 1_000)] * 8, delta=1e-5, eps_error=0.01, largest_loss=500.0)
    assert value is None
    assert "mesh" in str(reason)


def test_without_opacus_the_error_names_the_remedy(monkeypatch):
    opacus_accountant.cache_clear()
    monkeypatch.setattr(prv.util, "find_spec", lambda name: None)
    with pytest.raises(PrivacyError, match="pip install 'opacus"):
        opacus_accountant()
    monkeypatch.undo()
    assert opacus_accountant() is not None
