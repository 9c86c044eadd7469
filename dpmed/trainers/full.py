"""Full fine-tuning: every weight trained, no protection. The baseline that shows what a model can memorise."""

from __future__ import annotations

from dataclasses import dataclass

from dpmed.trainers.base import DpmedTrainer, TrainingConfig


@dataclass
class FullTrainingConfig(TrainingConfig):
    """Configuration of `FullTrainer`."""


class FullTrainer(DpmedTrainer):
    """Trains all weights by AdamW on the mean of per-record losses. See `DpmedTrainer` for the arguments."""
