"""One recipe, one run: load records, calibrate, train, save, evaluate. The command line and the frontier both call
this."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from dpmed.data.records import check_labels, data_fingerprint
from dpmed.data.tasks import TaskSpec
from dpmed.environment import device, versions
from dpmed.errors import InputError
from dpmed.evaluation import evaluate_weights, finish_evaluation
from dpmed.models import load_tokenizer, with_thresholds, write_task_card
from dpmed.privacy import ranks
from dpmed.privacy.run_state import STATE_FILE, RunState
from dpmed.progress import Progress, progress
from dpmed.recipe_io import check_recipe, dump_recipe
from dpmed.runs import (
    RUN_FILE,
    check_same_recipe,
    claim_output_dir,
    is_finished,
    last_checkpoint,
    read_json,
    replace_folder,
    write_json,
    write_text,
)
from dpmed.splits import Splits, load_splits, split_counts, task_spec
from dpmed.trainers import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.base import DpmedTrainer, MetricsFile, TrainingConfig
from dpmed.training_setup import check_budget, make_plan, make_trainer, trainer_steps, training_arguments
from dpmed.utility import validation_thresholds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpmed.privacy.plan import PrivacyPlan
    from dpmed.recipe import Recipe


def train(
    recipe: Recipe,
    output_dir: Path,
    *,
    resume: bool = False,
    name: str | None = None,
    setting: str | None = None,
    base_scores: Path | None = None,
    method_name: str | None = None,
    audited_together: int = 1,
) -> dict[str, Any]:
    """Run one recipe into a run folder; see `dpmed.runs` for when it counts as finished.

    Args:
        recipe: what to run.
        output_dir: the run folder; must be empty or new unless `resume`.
        resume: go on from the last checkpoint, or return at once if the run is finished.
        name: of the run, in reports; the folder's name by default.
        setting: runs of one setting differ by seed alone.
        base_scores: folder where the base model's scores of these records are shared between runs.
        method_name: the method in reports, where it is a special case of the recipe's (repair_only of sani).
        audited_together: runs of a grid whose canaries are audited together.

    Returns: what stands in run.json.
    Raises: InputError before anything is written, where the input cannot be used.
    """
    check_recipe(recipe)
    if resume and is_finished(output_dir):
        check_same_recipe(output_dir, dump_recipe(recipe), weights_may_move=True)
        return read_json(output_dir / RUN_FILE)
    if ranks.launched_rank() > 0:
        return _follow(recipe, output_dir)
    splits = load_splits(recipe.data, require_unit=recipe.method == "dp_lora")
    spec = task_spec(recipe, splits.train)
    for part, records in (("heldout", splits.heldout), ("validation", splits.validation)):
        check_labels(records, spec.labels, name=f"data.{part}")  # now, and not after hours of training
    n_units = len(set(splits.train["unit"]))
    args = training_arguments(recipe, output_dir, n_examples=len(splits.train), n_units=n_units)
    plan = make_plan(recipe, args, n_units=n_units)
    if not resume:  # a run that goes on is checked with what it was charged already
        check_budget(args, plan, set(splits.train["unit"]))
    claim_output_dir(output_dir, resume=resume)
    record = _open_run(output_dir, recipe, splits, resume=resume, name=name, setting=setting)
    record["method"] = method_name or recipe.method
    tokenizer = load_tokenizer(recipe.model.path, revision=recipe.model.revision)
    weights = weights_folder(recipe, output_dir)
    if not weights.exists():
        record = _fit(recipe, args, spec, plan, splits, tokenizer, output_dir, weights, record)
    evaluation = evaluate_weights(
        weights,
        recipe,
        splits,
        run_dir=output_dir,
        base_scores=base_scores,
        audited_together=audited_together,
    )
    write_json(output_dir / "evaluation.json", evaluation)
    finish_evaluation(output_dir, evaluation)
    record |= {"status": "finished"}
    write_json(output_dir / RUN_FILE, record)
    return record


def weights_folder(recipe: Recipe, output_dir: Path) -> Path:
    """Where a run's weights end up."""
    in_adapter = recipe.method == "sani" and recipe.sani.erase_in == "adapter"
    return output_dir / ("adapter" if in_adapter or recipe.method in ("lora", "dp_lora") else "model")


def _follow(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    """What ranks above 0 do under torchrun: train with rank 0, write nothing. Rank 0 does all the rest."""
    splits = load_splits(recipe.data, require_unit=recipe.method == "dp_lora")
    n_units = len(set(splits.train["unit"]))
    args = training_arguments(recipe, output_dir, n_examples=len(splits.train), n_units=n_units)
    if weights_folder(recipe, output_dir).exists():  # not before the line above, in which all processes meet
        return {"status": "trained before"}
    plan = make_plan(recipe, args, n_units=n_units)
    tokenizer = load_tokenizer(recipe.model.path, revision=recipe.model.revision)
    trainer = make_trainer(recipe, args, task_spec(recipe, splits.train), plan, splits, tokenizer)
    checkpoint = last_checkpoint(output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return {"status": "trained with rank 0"}


def _fit(
    recipe: Recipe,
    args: TrainingConfig,
    spec: TaskSpec,
    plan: PrivacyPlan | None,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    weights: Path,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Train, save weights and certificate, and drop the checkpoints. Returns the run record."""
    started = time.monotonic()
    checkpoint = last_checkpoint(output_dir)
    if isinstance(args, DPLoRATrainingConfig) and checkpoint is None:
        args.run_id = _stopped_run(output_dir, plan)
    trainer = make_trainer(recipe, args, spec, plan, splits, tokenizer)
    (output_dir / "metrics.jsonl").touch(mode=0o600)
    trainer.add_callback(MetricsFile(output_dir / "metrics.jsonl"))
    with progress(f"train {record['name']}", trainer_steps(trainer)) as bar:
        trainer.add_callback(_ShowSteps(bar, plan if recipe.method == "dp_lora" else None))  # a repair has no epsilon
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    record |= {
        "seconds": record["seconds"] + time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "n_windows": len(trainer.train_dataset),
        "n_records_cut": trainer.train_dataset.n_records_cut,
        "n_steps": trainer.state.global_step,
    }
    if isinstance(trainer, DPLoRATrainer):
        write_json(output_dir / "privacy.json", trainer.privacy_spent())
    if hasattr(trainer, "erased"):
        record["erased_neurons"] = {str(k): v for k, v in trainer.erased.items()}  # pyright: ignore[reportAttributeAccessIssue]
    partial = output_dir / f".{weights.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_weights(partial)
    thresholds, record["thresholds_from"] = _thresholds(trainer, recipe, splits, tokenizer, spec)
    write_task_card(partial, with_thresholds(spec, thresholds))
    write_json(output_dir / RUN_FILE, record)
    replace_folder(partial, weights)
    for folder in output_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return record


def _stopped_run(output_dir: Path, plan: PrivacyPlan | None) -> str | None:
    """Id of the DP run by this plan that stopped here before its first whole checkpoint: its charges still count."""
    if plan is None or not (output_dir / STATE_FILE).is_file():
        return None
    state = RunState.read(output_dir)
    return None if state.plan.differences(plan) else state.run_id


def _thresholds(
    trainer: DpmedTrainer, recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec
) -> tuple[tuple[float, ...] | None, str | None]:
    """Decision thresholds, and which records fixed them.

    Without validation records a DP run keeps 0.5: thresholds of training records would leave without any noise.
    """
    if splits.validation is not None:
        records, source = splits.validation, "validation"
    elif recipe.method != "dp_lora":
        records, source = splits.train, "train"
    else:
        return None, None
    found = validation_thresholds(trainer.model, records, tokenizer, spec, batch_tokens=recipe.evaluation.batch_tokens)
    return found, None if found is None else source


def evaluate(
    recipe: Recipe,
    output_dir: Path,
    *,
    resume: bool = False,
    base_scores: Path | None = None,
    task_given: bool = True,
    name: str | None = None,
    setting: str | None = None,
    method: str | None = None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model that may not be ours: `recipe.model.path` on the recipe's records. Writes a run folder.

    Args:
        recipe: model, data and evaluation are read.
        output_dir: a new folder, or one to resume.
        resume: return at once if the folder is finished.
        base_scores: see `train`.
        task_given: false takes the task from the card beside the weights, where there is one.
        name: of the run, in reports.
        setting: see `train`.
        method: what made the weights, for reports; by default what the run folder around them says.
        before: folder of an earlier evaluation of the same records, to measure persistence.

    Returns: what stands in evaluation.json.
    """
    if resume and is_finished(output_dir):
        check_same_recipe(output_dir, dump_recipe(recipe), weights_may_move=False)
        return read_json(output_dir / "evaluation.json")
    splits = load_splits(recipe.data, require_unit=False)
    claim_output_dir(output_dir, resume=resume)
    record = _open_run(output_dir, recipe, splits, resume=resume, name=name, setting=setting)
    record["method"] = method or "unknown"
    spec = task_spec(recipe, splits.train) if task_given else None
    evaluation = evaluate_weights(
        recipe.model.path, recipe, splits, run_dir=output_dir, base_scores=base_scores, spec=spec, before=before
    )
    evaluation["model"]["method"] = record["method"]
    write_json(output_dir / "evaluation.json", evaluation)
    finish_evaluation(output_dir, evaluation)
    write_json(output_dir / RUN_FILE, record | {"status": "finished", "peak_memory_bytes": peak_memory_bytes()})
    return evaluation


def _open_run(
    output_dir: Path, recipe: Recipe, splits: Splits, *, resume: bool, name: str | None, setting: str | None
) -> dict[str, Any]:
    """Write recipe.yaml and run.json with status "running"; a resumed run must have the same records."""
    fingerprints = {"train": data_fingerprint(splits.train)}
    if splits.heldout is not None:
        fingerprints["heldout"] = data_fingerprint(splits.heldout)
    before: dict[str, Any] = {}
    if resume and (output_dir / RUN_FILE).is_file():
        before = read_json(output_dir / RUN_FILE)
        if before.get("data", {}).get("fingerprints") != fingerprints:
            raise InputError(f"{output_dir}: the records changed since this run was started; use a new --output_dir")
        if last_checkpoint(output_dir) or any((output_dir / name).exists() for name in ("model", "adapter")):
            check_same_recipe(output_dir, dump_recipe(recipe), weights_may_move=True)
    record = before | {  # what training noted stays true where only the evaluation is left to do
        "name": name or output_dir.name,
        "setting": setting or name or output_dir.name,
        "method": recipe.method,
        "task": recipe.task,
        "seed": recipe.training.seed,
        "unit": recipe.data.unit,
        "status": "running",
        "seconds": float(before.get("seconds") or 0.0),
        "peak_memory_bytes": before.get("peak_memory_bytes"),
        "versions": versions(),
        "device": device(),
        "data": {"fingerprints": fingerprints, "n_overlap_dropped": splits.n_overlap, **split_counts(splits)},
    }
    write_text(output_dir / "recipe.yaml", dump_recipe(recipe))
    write_json(output_dir / RUN_FILE, record)
    return record


def peak_memory_bytes() -> int:
    """Most memory that this process held: on the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


class _ShowSteps(TrainerCallback):
    """Moves the progress bar one step at a time, with the epsilon spent and planned; it prints no other values."""

    SECONDS = 10.0  # between two computations of epsilon, which take a fraction of a second

    def __init__(self, bar: Progress, plan: PrivacyPlan | None) -> None:
        self.bar, self.plan = bar, plan
        self.stage, self.computed_at = "", time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.plan is None:
            self.bar.update(state.global_step, state.max_steps)
            return
        if time.monotonic() - self.computed_at > self.SECONDS:
            spent, target = self.plan.epsilon_after(state.global_step), self.plan.target_epsilon
            self.stage = "not private" if spent is None else f"epsilon {spent:.2f} of {target or spent:.2f}"
            self.computed_at = time.monotonic()
        self.bar.update_stage(self.stage, state.global_step, state.max_steps)
