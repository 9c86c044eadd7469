"""SANI with a DP repair: erase, then train adapters by DP-SGD with the patient as unit, never on a target.

The result is not private. Epsilon bounds what the steps of the repair add to the released weights. It says nothing of
the checkpoint, which learned the same records without noise, nor of what the records decide before the first step:
which words are targets, and by scores which neurons are reset. So the certificate's own epsilon is None and `private`
is false; the repair's figures stand below `repair`, and no report shows them as the model's epsilon. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset

from dpmed.data.tasks import EncodedRecords
from dpmed.errors import InputError
from dpmed.trainers.dp_lora import DPLoRATrainer, DPLoRATrainingConfig
from dpmed.trainers.sani import SANITrainer, SANITrainingConfig

if TYPE_CHECKING:
    from torch import nn

WHY = (
    "only the steps of the repair are differentially private, not the model: its checkpoint learned the records without"
    " noise"
)
CHECKPOINT = (
    "the checkpoint that was sanitised: it was trained without this guarantee, and whatever erasure and repair left of"
    " the records in it is still there; epsilon bounds what the repair adds to it"
)
TARGETS = (
    "the choice of targets: the majority vote and the words of fewer than k patients are counted over all records"
    " without noise, so one patient may change what is a target in the notes of another; epsilon holds for targets that"
    " are given"
)
TERMS = "the list of confidential terms, which is treated as public"
SCORES = "the choice of neurons: their scores read the records without noise"
SURROGATES = "surrogates: none equals an identifier of the records, so one patient may change another's"
_GUARANTEES = ("epsilon", "epsilon_pld", "epsilon_prv", "target_epsilon", "sampling_rate")
"""What a reader could take for a claim on the model; an audit reads from a rate of 1 that all of it is Gaussian DP."""
_DETAILS = ("epsilon_curve", "attack_bounds", "ledger", "prv_note")


@dataclass
class DPSANITrainingConfig(SANITrainingConfig, DPLoRATrainingConfig):
    """Configuration of `DPSANITrainer`: that of `SANITrainer`, and that of `DPLoRATrainer` for the repair."""

    repair: Literal["full", "lora", "dp_lora"] = field(default="dp_lora", metadata={"help": "dp_lora"})


class DPSANITrainer(SANITrainer, DPLoRATrainer):
    """Erases when it is made, then repairs adapters by DP-SGD. See the top of the file for what epsilon covers.

    Args: as `SANITrainer`. The plan of the repair follows from `args` and the number of patients.

    Guarantee: given the checkpoint, the targets and the neurons that were reset, the repair's steps are
        (epsilon, delta)-DP under adding or removing one patient, with the epsilon in `repair` of `privacy_spent`.
    Raises: InputError as `SANITrainer`, and for options with which one step would not be one private draw of a loss by
        record that the privacy engine was proven on.
    """

    args: DPSANITrainingConfig
    several_devices = False

    def check_options(self, args: Any, model: nn.Module, records: Dataset | EncodedRecords) -> None:
        """Refuse also what the privacy engine was not proven on."""
        refused = {
            "sani.kl: the engine is proven on the repair's loss alone: set it to 0": args.kl > 0,
            "sani.when: every_epoch would erase between private steps: set it to once": args.when == "every_epoch",
            "privacy.shard_base: a base that is shared between processes cannot be erased: set it to false": (
                args.shard_base
            ),
            "sani.repair is not dp_lora: use SANITrainer": args.repair != "dp_lora",
        }
        for message, wrong in refused.items():
            if wrong:
                raise InputError(message)
        super().check_options(args, model, records)

    def privacy_spent(self) -> dict[str, Any]:
        """The certificate: without an epsilon of its own, and with the repair's under `repair`."""
        return certificate(super().privacy_spent(), self.args)


def certificate(repair: dict[str, Any], args: SANITrainingConfig) -> dict[str, Any]:
    """What a run says of itself whose repair alone has this certificate: that it is not private, why, and the rest."""
    not_covered = [CHECKPOINT, TERMS if args.terms else TARGETS]
    not_covered += [SCORES] if args.select != "random" and args.erase_fraction > 0 else []
    not_covered += [SURROGATES] if args.surrogates else []
    own = {key: value for key, value in repair.items() if key not in _DETAILS}
    return {
        **own,
        **dict.fromkeys(_GUARANTEES),
        "private": False,
        "why": WHY,
        "not_covered": not_covered + repair["not_covered"],
        "repair": {key: repair[key] for key in ("private", *_GUARANTEES, *_DETAILS) if key in repair},
    }
