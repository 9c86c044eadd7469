"""A made-up frontier: plausible figures of twelve runs, written as the run folders would be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

Json = dict[str, Any]
HOSTILE_NAME = "<script>alert('x')</script>&\"={{7*7}}"

# setting -> (method, seeds, epsilon, weighted F1, identifier extraction, membership AUC, seconds)
_SETTINGS: dict[str, tuple[str, int, float | None, float, float, float, float]] = {
    "base": ("base", 1, None, 0.31, 0.021, 0.50, 0.0),
    "full": ("full", 2, None, 0.742, 0.412, 0.87, 118.0),
    "lora": ("lora", 2, None, 0.728, 0.236, 0.74, 84.0),
    "dp_lora-eps1": ("dp_lora", 1, 0.993, 0.548, 0.023, 0.496, 205.0),
    "dp_lora-eps3": ("dp_lora", 1, 2.991, 0.627, 0.025, 0.511, 207.0),
    "dp_lora-eps8": ("dp_lora", 1, 7.982, 0.668, 0.029, 0.523, 204.0),
    "sani": ("sani", 2, None, 0.694, 0.061, 0.63, 196.0),
    "repair_only": ("repair_only", 2, None, 0.713, 0.118, 0.68, 171.0),
}


def measured(value: float, n: int, higher_is: str, *, half: float | None = None) -> Json:
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / n) if half is None else half
    return {"value": value, "low": max(0.0, value - half), "high": value + half, "n": n, "higher_is": higher_is}


def _roc(auc: float, n: int = 400) -> Json:
    """A binormal curve sampled at every thousandth, then coarser."""
    shift = (auc - 0.5) * 4.2
    fprs = [0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]
    return {"fpr": fprs, "tpr": [0.0 if f == 0 else min(1.0, f ** (1 / (1 + max(shift, -0.3)))) for f in fprs]}


def _attack(auc: float) -> Json:
    roc = _roc(auc)
    return {
        "auc": measured(auc, 400, "worse", half=0.04),
        "tpr_at_fpr_0.01": measured(roc["tpr"][3], 200, "worse"),
        "tpr_at_fpr_0.001": measured(roc["tpr"][1] / 3, 200, "worse"),
        "roc": roc,
    }


def _memorization(leak: float, auc: float, draw: random.Random) -> Json:
    lengths = {f"p{p}_n{n}": 0.8 * leak * math.log2(p) / 6 for p, n in ((10, 20), (20, 20), (50, 50), (100, 50))}
    attack = _attack(auc)
    return {
        "extraction_rate": measured(lengths["p100_n50"], 420, "worse"),
        "extraction": {key: measured(rate * draw.uniform(0.95, 1.05), 420, "worse") for key, rate in lengths.items()},
        "membership_auc": attack["auc"],
        "membership_tpr_at_fpr_0.01": attack["tpr_at_fpr_0.01"],
        "membership_tpr_at_fpr_0.001": attack["tpr_at_fpr_0.001"],
        "membership": {"loss": _attack(0.5 + (auc - 0.5) * 0.6), "reference": attack},
        "identifier_extraction_rate": measured(leak, 1310, "worse"),
        "identifier_extraction": {
            "NAME": measured(leak * 1.1, 700, "worse"),
            "MRN": measured(leak * 0.4, 210, "worse"),
        },
        "canary_exposure": None,
        "identifier_leak_rate": None,
    }


def make_evaluation(f1: float, leak: float, auc: float, seed: int) -> Json:
    draw = random.Random(f"{f1}{leak}{seed}")
    heldout = _memorization(0.022 * draw.uniform(0.85, 1.15), 0.5, draw)
    return {
        "utility": {
            "f1_weighted": measured(f1, 480, "better", half=0.03),
            "f1_macro": measured(f1 - 0.05, 480, "better", half=0.04),
            "f1_micro": measured(f1 + 0.01, 480, "better", half=0.03),
            "accuracy": None,
            "perplexity": measured(4.2 / f1, 480, "worse", half=0.2),
        },
        "memorization": _memorization(leak, auc, draw),
        "reference": {
            "heldout": {
                key: heldout[key]
                for key in ("extraction_rate", "extraction", "identifier_extraction_rate", "identifier_extraction")
            }
        },
        "not_applicable": {
            "memorization.canary_exposure": "no canaries were planted",
            "memorization.identifier_leak_rate": "generation was not asked for",
        },
    }


def make_certificate(epsilon: float) -> Json:
    return {
        "epsilon": epsilon,
        "delta": 1e-5,
        "unit": "patient_id",
        "n_units": 900,
        "sampling_rate": 64 / 900,
        "expected_batch_units": 64,
        "max_records_per_unit": 4,
        "clip_norm": 1.0,
        "noise_multiplier": 0.6 + 1 / epsilon,
        "n_steps": 210,
        "neighbouring_relation": "add or remove one unit",
        "accountant": "PLD and PRV, the larger",
        "epsilon_pld": epsilon,
        "epsilon_prv": epsilon * 0.998,
        "private": True,
        "engine": "one-pass LoRA",
        "not_covered": ["the base model's pre-training"],
        "ledger": {"dataset": "0123456789abcdef", "epsilon_of_all_runs": 11.52, "delta": 1e-5},
        "attack_bounds": {"advantage": 0.41, "tpr_at_fpr": {"0.01": 0.1378}, "gdp_mu": 1.9},
    }


def make_points() -> list[Json]:
    points = []
    for setting, (method, seeds, epsilon, f1, leak, auc, seconds) in _SETTINGS.items():
        for seed in range(seeds):
            draw = random.Random(f"{setting}{seed}")
            evaluation = make_evaluation(f1 + draw.uniform(-0.012, 0.012), leak * draw.uniform(0.9, 1.1), auc, seed)
            point = {"name": f"{setting}-s{seed}", "setting": setting, "method": method, "seed": seed}
            point |= {"epsilon": epsilon, "epsilon_lower_bound": None, "delta": 1e-5 if epsilon else None}
            point |= {"unit": "patient_id" if epsilon else None, **evaluation}
            point |= {"cost": {"seconds": seconds or None, "peak_memory_bytes": 1.3e9}, "on_frontier": False}
            points.append(point)
    return points


def make_meta() -> Json:
    return {
        "versions": {"dpmed": "0.1.0", "torch": "2.13.0"},
        "created": "2025-11-22",
        "task": "causal_lm",
        "model": "a tiny causal model",
        "n_units": 900,
        "n_records": 2100,
        "n_heldout_units": 300,
        "n_heldout_records": 700,
        "failed": [{"name": "sani-s2", "reason": "out of memory"}],
        "cannot_show": ["The hospital is synthetic."],
        "settings": {},
    }


def write_frontier(folder: Path, points: list[Json], meta: Json) -> Path:
    """Write `frontier.json`, and certificates under `runs/`."""
    (folder / "runs").mkdir(parents=True)
    (folder / "frontier.json").write_text(json.dumps({"points": points, "meta": meta}), encoding="utf-8")
    for index, point in enumerate(points):
        if point.get("epsilon") is not None:
            name = point["name"] if "/" not in point["name"] else f"run-{index}"
            (folder / "runs" / name).mkdir()
            content = json.dumps(make_certificate(point["epsilon"]))
            (folder / "runs" / name / "privacy.json").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def points() -> list[Json]:
    return make_points()


@pytest.fixture
def frontier_folder(tmp_path: Path) -> Path:
    return write_frontier(tmp_path / "study", make_points(), make_meta())
