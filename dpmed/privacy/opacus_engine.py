"""Per-unit gradients by Opacus' hooks: the reference engine, slower and larger than `one_pass`, of other hands."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.flat import FlatParameters, uses_checkpointing


class OpacusEngine(FlatParameters):
    """Per-record gradients by Opacus' hooks, flattened and summed by unit.

    Use: `begin(units)`, a forward pass, `backward(losses)`, `unit_gradients()`; once per micro-batch.

    Guarantee: every trainable parameter of the model has its place in the flat vector, or construction is refused; a
    parameter that a backward pass did not reach raises instead of keeping a raw gradient.

    Args:
        model: on its final device, with its final set of trainable parameters (hooks made before `.to()` go stale).

    Raises: PrivacyError as `FlatParameters`, and if gradient checkpointing is on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if uses_checkpointing(model):
            raise PrivacyError(
                "gradient checkpointing runs parts of the model twice, which Opacus' hooks would count wrongly; set"
                " privacy.engine to one_pass, or call model.gradient_checkpointing_disable()"
            )
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
        self._units: Sequence[int] = ()
        self._row_of: dict[int, int] | None = None  # of the open group
        self._total = torch.empty(0)

    def open_group(self, units: Iterable[int], device: torch.device) -> None:
        """Announce the distinct units whose records the next micro-batches hold."""
        self._row_of = {unit: row for row, unit in enumerate(units)}
        self._total = torch.zeros(len(self._row_of), self.n_parameters, device=device)
        self._units = ()

    def begin(self, units: Sequence[int], device: torch.device) -> None:
        """Announce a micro-batch: the unit of each of its records. Without an open group its units are one."""
        if self._row_of is None:
            self.open_group(dict.fromkeys(units), device)
        elif self._units:
            self._end_micro_batch()
        self._units = units

    def backward(self, losses: Tensor) -> None:
        """Back-propagate the records' losses [b]. Their sum, so that each record's gradient is its own."""
        with warnings.catch_warnings():
            # The first adapters read frozen embeddings, so no input needs a gradient; the hooks use the outputs' alone.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()

    def unit_gradients(self) -> Tensor:
        """Take the per-record gradients of the group's backward passes, summed by unit.

        Returns: [u, p], float32, units in the order of `open_group`, or of first appearance.
        Raises: PrivacyError if a parameter got no gradient, or one that does not have a row per record.
        """
        self._end_micro_batch()
        self._row_of = None
        return self._total

    def _end_micro_batch(self) -> None:
        if self._row_of is None or not self._units:
            raise PrivacyError("unit_gradients() without begin(): no micro-batch was announced")
        rows: list[Tensor] = []
        n = len(self._units)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            sample: Tensor | list[Tensor] | None = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor) or sample.shape != (n, *parameter.shape):
                raise PrivacyError(
                    f"{name}: the backward pass left no gradient per record; freeze it, or leave its layer out of"
                    " lora.target_modules"
                )
            rows.append(sample.detach().reshape(n, -1).float())
            parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
            parameter.grad = None
        positions = torch.tensor([self._row_of[unit] for unit in self._units], device=self._total.device)
        self._total.index_add_(0, positions, torch.cat(rows, dim=1))
        self._units = ()

    def detach(self) -> None:
        """Remove the hooks; the model is a plain one again."""
        self._hooks.cleanup()
