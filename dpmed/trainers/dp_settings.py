"""Settings of transformers.TrainingArguments with which one optimizer step would not be one private draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpmed.errors import InputError

if TYPE_CHECKING:
    from dpmed.trainers.base import TrainingConfig


def refuse_unsafe(args: TrainingConfig) -> None:
    """Refuse settings under which the guarantee would not hold.

    Raises: InputError that names them and the remedy.
    """
    if not args.unit_column:
        raise InputError("dp_lora needs the patient column: set unit_column (recipe: data.unit)")
    refused = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps != 1,
        "fp16": bool(args.fp16),
        "load_best_model_at_end": bool(args.load_best_model_at_end),
        "auto_find_batch_size": bool(args.auto_find_batch_size),
        "torch_compile": bool(args.torch_compile),
        "dataloader_num_workers": args.dataloader_num_workers > 0,
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,  # scaled by the padded length: couples records
        "use_liger_kernel": bool(args.use_liger_kernel),
    }
    names = [name for name, unsafe in refused.items() if unsafe]
    if names:
        raise InputError(
            f"dp_lora cannot run with {', '.join(names)}: one step is one draw; remove it from training.extra"
        )
