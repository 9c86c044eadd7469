"""From a recipe to a trainer: the method's config, the privacy plan, the model with what is trained of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from dpmed.errors import InputError
from dpmed.models import load_model
from dpmed.privacy.ledger import PrivacyLedger, ledger_path
from dpmed.trainers import METHODS, DPLoRATrainingConfig
from dpmed.trainers.base import DpmedTrainer, TrainingConfig
from dpmed.trainers.dp_lora import plan_for
from dpmed.trainers.dp_sani import DPSANITrainer, DPSANITrainingConfig
from dpmed.trainers.lora import lora_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpmed.data.tasks import TaskSpec
    from dpmed.privacy.plan import PrivacyPlan
    from dpmed.recipe import Recipe
    from dpmed.splits import Splits


def make_trainer(
    recipe: Recipe,
    args: TrainingConfig,
    spec: TaskSpec,
    plan: PrivacyPlan | None,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
) -> DpmedTrainer:
    """The trainer of a recipe, with its model loaded."""
    torch.manual_seed(recipe.training.seed)  # heads and adapters that are made fresh follow the run's seed
    in_adapter = recipe.method == "sani" and recipe.sani.erase_in == "adapter"
    merge = recipe.method in ("full", "sani", "unlearn") and not in_adapter
    model = load_model(recipe.model.path, spec, revision=recipe.model.revision, merge=merge)
    if isinstance(model, PeftModel):
        model.set_adapter(str(model.active_adapter))  # training goes on from it; a loaded adapter comes frozen
    else:
        model.requires_grad_(True)  # and so does the base that one was merged into
    trainer: Any = DPSANITrainer if _has_dp_repair(recipe) else METHODS[recipe.method][0]
    options: dict[str, Any] = {"spec": spec}
    if recipe.method == "sani" and recipe.sani.reset_to == "base" and not in_adapter:
        options["base_model"] = load_model(recipe.model.base or "", spec, merge=True)  # named: see `_check_sani`
    new_adapter = recipe.method == "sani" and recipe.sani.repair != "full" and not in_adapter
    if recipe.method in ("lora", "dp_lora") or new_adapter:
        lora = recipe.lora
        options["peft_config"] = lora_config(
            model,
            spec.kind,
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=lora.target_modules,
            dropout=lora.dropout,
        )
    if plan is not None and not _has_dp_repair(recipe):
        options["plan"] = plan
    return trainer(model, args, splits.train, None, tokenizer, **options)


def training_arguments(recipe: Recipe, output_dir: Path, *, n_examples: int, n_units: int) -> TrainingConfig:
    """The method's config of a recipe.

    Raises: InputError if `training.extra` names something that transformers.TrainingArguments does not have, or options
        of sani do not go together.
    """
    training, privacy = recipe.training, recipe.privacy
    dp_repair = _has_dp_repair(recipe)
    if recipe.method == "sani":
        _check_sani(recipe)
    config = DPSANITrainingConfig if dp_repair else METHODS[recipe.method][1]
    by_units = dp_repair or recipe.method == "dp_lora"
    per_epoch = n_units / privacy.expected_batch_units if by_units else n_examples / training.batch_size
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "task": recipe.task,
        "unit_column": "unit" if recipe.data.unit else None,
        "label_column": "label" if recipe.data.label else None,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": training.batch_size,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "seed": training.seed,
        "bf16": training.bf16,
        "head_learning_rate": training.head_learning_rate,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": max(1, round(training.save_every * per_epoch)),
        "save_total_limit": 1,
    }
    sections = {"dp_lora": privacy, "sani": recipe.sani, "unlearn": recipe.unlearn}
    if recipe.method in sections:  # a section's keys are its config's fields
        values |= asdict(sections[recipe.method])
    if dp_repair:
        values |= asdict(privacy)
    clash = sorted(set(training.extra) & set(values))
    if clash:
        raise InputError(f"training.extra.{clash[0]} is set by the recipe's own keys; set it there")
    try:
        return config(**values, **training.extra)
    except TypeError:
        unknown = [key for key in training.extra if key not in config.__dataclass_fields__]
        raise InputError(f"training.extra.{unknown[0] if unknown else '?'} is no field of {config.__name__}") from None
    except ValueError as error:
        raise InputError(f"training: {error}".splitlines()[0]) from None


def _check_sani(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows not to work, before a folder is made or a model loaded."""
    sani = recipe.sani
    if sani.repair == "dp_lora" and recipe.data.unit is None:
        raise InputError("sani.repair: dp_lora needs the patient column: set data.unit")
    if sani.erase_in == "adapter" and sani.repair == "full":
        raise InputError("sani.erase_in: adapter leaves the base as it is: set sani.repair to lora")
    if sani.reset_to == "base" and sani.erase_in == "weights" and recipe.model.base is None:
        raise InputError("sani.reset_to: base needs the model before fine-tuning: set model.base")


def _has_dp_repair(recipe: Recipe) -> bool:
    return recipe.method == "sani" and recipe.sani.repair == "dp_lora"


def trainer_steps(trainer: DpmedTrainer) -> int:
    """How many steps the trainer will run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    per_epoch = -(-len(trainer.train_dataset) // trainer.args.train_batch_size)
    return int(-(-per_epoch * trainer.args.num_train_epochs // 1))


def make_plan(recipe: Recipe, args: TrainingConfig, *, n_units: int) -> PrivacyPlan | None:
    """The calibrated plan of a DP run; None for methods without a guarantee.

    Raises: InputError for an impossible budget.
    """
    if not isinstance(args, DPLoRATrainingConfig):
        return None
    return plan_for(args, n_units=n_units, unit=recipe.data.unit or "")


def check_budget(args: TrainingConfig, plan: PrivacyPlan | None, units: Iterable[str]) -> None:
    """Refuse a new run that the units' budget does not allow, before a folder is made or a model loaded.

    Raises: BudgetError.
    """
    if isinstance(args, DPLoRATrainingConfig) and plan is not None and (path := ledger_path(args.ledger)) is not None:
        PrivacyLedger(path).check_new_run(units, plan, budget_epsilon=args.budget_epsilon)
