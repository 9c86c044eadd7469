"""Fine-tune medical language models with differential privacy and measure what they memorise.

The public names are loaded when they are first used: importing dpmed loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpmed.data.canaries import plant_canaries
    from dpmed.data.identifiers import tag_identifiers
    from dpmed.data.records import load_records, split_by_unit
    from dpmed.data.tasks import TaskSpec
    from dpmed.frontier import run_frontier
    from dpmed.memorization.evaluator import MemorizationEvaluator
    from dpmed.privacy.audit import audit_epsilon
    from dpmed.privacy.ledger import PrivacyLedger
    from dpmed.privacy.plan import PrivacyPlan
    from dpmed.report.build import build_report
    from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
    from dpmed.trainers.dp_sani import DPSANITrainer, DPSANITrainingConfig
    from dpmed.trainers.full import FullTrainer, FullTrainingConfig
    from dpmed.trainers.lora import LoRATrainer, LoRATrainingConfig
    from dpmed.trainers.sani import SANITrainer, SANITrainingConfig
    from dpmed.trainers.unlearn import UnlearnTrainer, UnlearnTrainingConfig

    __version__: str

_MODULES = {
    "DPLoRATrainer": "dpmed.trainers.dp_lora",
    "DPLoRATrainingConfig": "dpmed.trainers.dp_lora",
    "DPSANITrainer": "dpmed.trainers.dp_sani",
    "DPSANITrainingConfig": "dpmed.trainers.dp_sani",
    "FullTrainer": "dpmed.trainers.full",
    "FullTrainingConfig": "dpmed.trainers.full",
    "LoRATrainer": "dpmed.trainers.lora",
    "LoRATrainingConfig": "dpmed.trainers.lora",
    "MemorizationEvaluator": "dpmed.memorization.evaluator",
    "PrivacyLedger": "dpmed.privacy.ledger",
    "PrivacyPlan": "dpmed.privacy.plan",
    "SANITrainer": "dpmed.trainers.sani",
    "SANITrainingConfig": "dpmed.trainers.sani",
    "TaskSpec": "dpmed.data.tasks",
    "UnlearnTrainer": "dpmed.trainers.unlearn",
    "UnlearnTrainingConfig": "dpmed.trainers.unlearn",
    "audit_epsilon": "dpmed.privacy.audit",
    "build_report": "dpmed.report.build",
    "load_records": "dpmed.data.records",
    "plant_canaries": "dpmed.data.canaries",
    "run_frontier": "dpmed.frontier",
    "split_by_unit": "dpmed.data.records",
    "tag_identifiers": "dpmed.data.identifiers",
}

__all__ = [
    "DPLoRATrainer",
    "DPLoRATrainingConfig",
    "DPSANITrainer",
    "DPSANITrainingConfig",
    "FullTrainer",
    "FullTrainingConfig",
    "LoRATrainer",
    "LoRATrainingConfig",
    "MemorizationEvaluator",
    "PrivacyLedger",
    "PrivacyPlan",
    "SANITrainer",
    "SANITrainingConfig",
    "TaskSpec",
    "UnlearnTrainer",
    "UnlearnTrainingConfig",
    "__version__",
    "audit_epsilon",
    "build_report",
    "load_records",
    "plant_canaries",
    "run_frontier",
    "split_by_unit",
    "tag_identifiers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module 'dpmed' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib import metadata  # half of what importing dpmed would take

    try:
        return metadata.version("dpmed")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a checkout that is not installed


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
