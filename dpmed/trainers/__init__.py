"""The methods, one file each: configuration and trainer, to be read from top to bottom."""

from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.dp_sani import DPSANITrainer, DPSANITrainingConfig
from dpmed.trainers.full import FullTrainer, FullTrainingConfig
from dpmed.trainers.lora import LoRATrainer, LoRATrainingConfig
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig
from dpmed.trainers.unlearn import UnlearnTrainer, UnlearnTrainingConfig

METHODS = {
    "full": (FullTrainer, FullTrainingConfig),
    "lora": (LoRATrainer, LoRATrainingConfig),
    "dp_lora": (DPLoRATrainer, DPLoRATrainingConfig),
    "sani": (SANITrainer, SANITrainingConfig),
    "unlearn": (UnlearnTrainer, UnlearnTrainingConfig),
}

__all__ = [
    "METHODS",
    "DPLoRATrainer",
    "DPLoRATrainingConfig",
    "DPSANITrainer",
    "DPSANITrainingConfig",
    "FullTrainer",
    "FullTrainingConfig",
    "LoRATrainer",
    "LoRATrainingConfig",
    "SANITrainer",
    "SANITrainingConfig",
    "UnlearnTrainer",
    "UnlearnTrainingConfig",
]
