"""The trainable weights of a model as one flat vector: which there are, whether each is covered, and back again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpmed.errors import PrivacyError


def uncovered_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters for which no engine has an exact per-record gradient.

    A parameter is covered when every module that owns it is of a layer type with a registered Opacus grad sampler and
    does not keep batch statistics. Bare parameters of containers and models, and layers of unknown type, are not.
    """
    covered: dict[int, bool] = {}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for module in model.modules():
        known = type(module) in GradSampleHooks.GRAD_SAMPLERS and not list(module.buffers(recurse=False))
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                covered[id(parameter)] = covered.get(id(parameter), True) and known
    return [name for key, name in names.items() if not covered.get(key, False)]


def uses_checkpointing(model: nn.Module) -> bool:
    """Whether transformers' gradient (activation) checkpointing is on: parts of the model then run twice."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class FlatParameters:
    """Trainable parameters in a fixed order, a shared one once; the base of both engines.

    Attributes:
        names, parameters: of what is trained.
        layers: the modules that own a trainable parameter.

    Args:
        model: on its final device, with its final set of trainable parameters.

    Guarantee: every trainable parameter has its place in the vector.
    Raises: PrivacyError if a trainable parameter is not covered by per-record gradients, or nothing is trainable.
    """

    def __init__(self, model: nn.Module) -> None:
        uncovered = uncovered_parameters(model)
        if uncovered:
            raise PrivacyError(
                f"{len(uncovered)} trainable parameters have no per-record gradient and would be trained without"
                f" protection: {', '.join(uncovered[:5])}; freeze them or use linear layers"
            )
        self.names, self.parameters = _trainable(model)
        self.layers = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        if not self.parameters:
            raise PrivacyError("no parameter is trainable; pass a peft_config, or unfreeze a layer")

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def check_unchanged(self, model: nn.Module) -> None:
        """Raises PrivacyError if other parameters are trainable than those that were covered."""
        now = [id(p) for p in model.parameters() if p.requires_grad]  # without names, which are slow to make
        if now != [id(p) for p in self.parameters]:
            raise PrivacyError(
                "the trainable parameters changed after the privacy engine was attached; make the trainer anew"
            )

    def write_gradients(self, flat: Tensor) -> None:
        """Make `flat` [p] the gradient of the trainable parameters; whatever stood in `.grad` is gone."""
        for parameter, part in zip(self.parameters, self.split(flat), strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """One piece of `flat` [p] per parameter, [its size] each."""
        return torch.split(flat, [p.numel() for p in self.parameters])

    def snapshot(self) -> list[Tensor]:
        """A copy of the trainable weights."""
        return [p.detach().clone() for p in self.parameters]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Put a snapshot back, bit for bit."""
        with torch.no_grad():
            for parameter, before in zip(self.parameters, snapshot, strict=True):
                parameter.copy_(before)

    def unmoved_since(self, snapshot: Sequence[Tensor]) -> list[str]:
        """Names of trainable parameters whose every weight still has its value of the snapshot."""
        pairs = zip(self.names, self.parameters, snapshot, strict=True)
        return [name for name, now, before in pairs if torch.equal(now.detach(), before)]


def _trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters that require a gradient; a shared parameter once."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]
