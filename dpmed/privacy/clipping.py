"""Per-unit gradients, proof that they cover every trainable weight, and their clipped sum.

The engine here is Opacus' GradSample hooks, attached without wrapping the model. What leaves this file is a flat
float32
vector per micro-batch whose sensitivity to one unit is at most the clip norm; what enters the optimiser is written
back by `write_gradients`, so that `.grad` never holds a raw gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpmed.errors import PrivacyError


def clipped_sum(unit_gradients: Tensor, *, clip_norm: float) -> tuple[Tensor, int]:
    """Sum the units' gradients, each scaled to an L2 norm of at most `clip_norm`.

    Shapes: u = units, p = trainable parameters.

    Args:
        unit_gradients: one gradient per privacy unit, [u, p], float32.
        clip_norm: C > 0.

    Returns: the sum [p], and how many units were not finite.
    Guarantee: adding or removing one row changes the sum by at most C in L2 (up to float32 rounding).
    Edge cases: u = 0 gives zeros; a row that holds inf or nan, or whose norm overflows, counts as zero.
    Raises: ValueError if C <= 0.
    Reference: Abadi et al. 2016, algorithm 1.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}; it must be above 0")
    norms = unit_gradients.norm(dim=1)  # [u]
    finite = torch.isfinite(norms)
    scale = torch.where(norms > clip_norm, clip_norm / norms, 1.0)  # also right for an infinite clip_norm
    rows = torch.where(finite.unsqueeze(1), unit_gradients, 0.0)  # 0 * nan would be nan
    return torch.where(finite, scale, 0.0) @ rows, int((~finite).sum())


def sum_by_unit(record_gradients: Tensor, units: Tensor) -> Tensor:
    """Add up the gradients of the records of each unit.

    Shapes: b = records, u = distinct units, p = parameters.

    Args:
        record_gradients: [b, p].
        units: unit index of each record, [b].

    Returns: [u, p], in ascending order of unit index.
    """
    distinct, position = torch.unique(units, return_inverse=True)
    total = record_gradients.new_zeros(len(distinct), record_gradients.shape[1])
    return total.index_add_(0, position, record_gradients)


def uncovered_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters for which the engine has no exact per-record gradient.

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


class OpacusEngine:
    """Per-record gradients by Opacus' hooks, flattened and summed by unit.

    Guarantee: every trainable parameter of the model has its place in the flat vector, or construction is refused; a
    parameter that a backward pass did not reach raises instead of keeping a raw gradient.

    Args:
        model: on its final device, with its final set of trainable parameters (hooks made before `.to()` go stale).

    Raises: PrivacyError if a trainable parameter is not covered, nothing is trainable, or gradient checkpointing is on.
    """

    def __init__(self, model: nn.Module) -> None:
        uncovered = uncovered_parameters(model)
        if uncovered:
            raise PrivacyError(
                f"{len(uncovered)} trainable parameters have no per-record gradient and would be trained without"
                f" protection: {', '.join(uncovered[:5])}; freeze them or use linear layers"
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise PrivacyError(
                "gradient checkpointing runs parts of the model twice, which the hooks would count wrongly; call"
                " model.gradient_checkpointing_disable()"
            )
        self.names, self.parameters = _trainable(model)
        if not self.parameters:
            raise PrivacyError("no parameter is trainable; pass a peft_config, or unfreeze a layer")
        self._model = model
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def check_unchanged(self, model: nn.Module) -> None:
        """Raises PrivacyError if other parameters are trainable than those that were hooked."""
        _, now = _trainable(model)
        if [id(p) for p in now] != [id(p) for p in self.parameters]:
            raise PrivacyError(
                "the trainable parameters changed after the privacy engine was attached; make the trainer anew"
            )

    def unit_gradients(self, units: Tensor) -> Tensor:
        """Take the per-record gradients of the last backward pass and sum them by unit.

        Shapes: b = records, u = units, p = trainable parameters.

        Args:
            units: unit of each record of the micro-batch, [b].

        Returns: [u, p], float32.
        Raises: PrivacyError if a parameter got no gradient, or one that does not have a row per record.
        """
        rows: list[Tensor] = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            sample: Tensor | list[Tensor] | None = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor) or sample.shape != (len(units), *parameter.shape):
                raise PrivacyError(
                    f"{name}: the backward pass left no gradient per record; freeze it, or leave its layer out of"
                    " lora.target_modules"
                )
            rows.append(sample.detach().reshape(len(units), -1).float())
            parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
            parameter.grad = None
        return sum_by_unit(torch.cat(rows, dim=1), units)

    def write_gradients(self, flat: Tensor) -> None:
        """Make `flat` [p] the gradient of the trainable parameters; whatever stood in `.grad` is gone."""
        for parameter, part in zip(self.parameters, self._split(flat), strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)

    def snapshot(self) -> list[Tensor]:
        """A copy of the trainable weights."""
        return [p.detach().clone() for p in self.parameters]

    def unmoved_since(self, snapshot: Sequence[Tensor]) -> list[str]:
        """Names of trainable parameters whose every weight still has its value of the snapshot."""
        pairs = zip(self.names, self.parameters, snapshot, strict=True)
        return [name for name, now, before in pairs if torch.equal(now.detach(), before)]

    def detach(self) -> None:
        """Remove the hooks; the model is a plain one again."""
        self._hooks.cleanup()

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, [p.numel() for p in self.parameters])


def _trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters that require a gradient; a shared parameter once."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]
