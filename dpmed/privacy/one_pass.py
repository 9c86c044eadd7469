"""Per-unit gradients in one backward pass, at the cost of the batch gradient that they replace.

A trainable linear layer computes its batch weight gradient as one product over all tokens, `g^T x`. Stopping that sum
at each record gives the per-record gradients for the same multiply-adds. `_PerRecordLinear` does so while the backward
pass is there, writes the result into the unit's row of one float32 buffer [units, parameters], and returns no weight
gradient at all: no second pass, no copy of activations, nothing raw in `.grad`.

Since the backward of each use of a layer runs once, whatever ran in the forward, sums are exact for weights that are
used several times (ALBERT) and under gradient checkpointing of both kinds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.flat import FlatParameters, uses_checkpointing


@dataclass
class _Slot:
    """Where a parameter's gradient stands in a unit's row."""

    name: str
    shape: tuple[int, ...]
    start: int
    transposed: bool
    """Tall weights [o, i] stand as [i, o]: the product is then long and thin the way that BLAS is fast at."""
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    """View of the buffer for this group: [u, *shape], or [u, i, o]."""
    written: bool = False
    """Whether its rows hold anything of this group."""
    reached: bool = False
    """Whether the backward pass of this micro-batch came by."""

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


class OnePassEngine(FlatParameters):
    """Per-unit gradients of linear layers by a custom backward; of other covered layers by Opacus' grad samplers.

    Use: `begin(units)`, a forward pass, `backward(losses)`, `unit_gradients()`; or `open_group(units)` first, and then
    several micro-batches whose records are added up in their units' rows.

    Guarantees:
        - The rows equal those of a loop over single units, up to rounding: records of one unit are added up in its row.
        - Every trainable parameter is written in each micro-batch, or `unit_gradients` raises and names it.
        - No trainable linear weight gets a gradient from anything but this engine: one that is used outside its own
          layer (tied by a functional call, say) raises.
        - The buffer is float32 whatever the forward pass computed in.

    Args:
        model: on its final device, with its final set of trainable parameters.

    Raises: PrivacyError as `FlatParameters`; and for layers other than linear ones under gradient checkpointing, where
        Opacus' hooks would count them twice.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        linear = [m for m in self.layers if type(m) is nn.Linear]
        others = [m for m in self.layers if type(m) is not nn.Linear]
        elsewhere = {id(p) for m in others for p in m.parameters(recurse=False)}
        names = {id(p): name for name, p in zip(self.names, self.parameters, strict=True)}
        if others and uses_checkpointing(model):
            hooked = [names[id(p)] for m in others for p in m.parameters(recurse=False) if id(p) in names]
            raise PrivacyError(
                f"gradient checkpointing runs layers twice, which Opacus' hooks count wrongly, and {hooked[0]} needs"
                " them: freeze it, or switch checkpointing off"
            )
        self._slots: dict[int, _Slot] = {}
        start = 0
        for p in self.parameters:
            tall = p.dim() == 2 and p.shape[0] > p.shape[1] and id(p) not in elsewhere
            self._slots[id(p)] = _Slot(names[id(p)], tuple(p.shape), start, tall)
            start += p.numel()
        self._hooked = [p for p in self.parameters if id(p) in elsewhere]
        self._hooks = [GradSampleHooks(m, loss_reduction="sum", strict=False) for m in others]
        self._width = -(-start // 64) * 64  # rows start at aligned addresses
        self._buffer = torch.empty(0)
        self._row_of: dict[int, int] | None = None  # of the open group
        self._positions: Tensor | None = None
        self._n_records = self._n_units = 0
        for layer in linear:
            layer.forward = self._forward_of(layer)

    def open_group(self, units: Iterable[int], device: torch.device) -> None:
        """Announce the distinct units whose records the next micro-batches hold; the buffer grows where it has to."""
        self._row_of = {unit: row for row, unit in enumerate(units)}
        self._n_units, self._n_records = len(self._row_of), 0
        if self._buffer.shape[0] < self._n_units or self._buffer.device != device:
            self._buffer = torch.empty(0)  # freed before the larger one is made
            self._buffer = torch.empty(self._n_units, self._width, device=device)
        for slot in self._slots.values():
            rows = self._buffer[: self._n_units, slot.start : slot.start + slot.size]
            shape = slot.shape[::-1] if slot.transposed else slot.shape
            slot.rows, slot.written = rows.view(self._n_units, *shape), False

    def begin(self, units: Sequence[int], device: torch.device) -> None:
        """Announce a micro-batch. Without an open group its units are one.

        Args:
            units: unit index of each record, [b].
            device: where the model is.
        """
        for parameter in self.parameters:
            parameter.grad = None  # whatever stands there after the backward pass then came from it
        if self._row_of is None:
            self.open_group(dict.fromkeys(units), device)
        elif self._n_records:
            self._end_micro_batch()
        positions = [(self._row_of or {})[unit] for unit in units]
        self._n_records = len(units)
        in_place = positions == list(range(self._n_units))  # one record of each unit, in the order of the rows
        self._positions = None if in_place else torch.tensor(positions, device=device)
        for slot in self._slots.values():
            slot.reached = False

    def backward(self, losses: Tensor) -> None:
        """Back-propagate the records' losses [b]. Their sum, so that each record's gradient is its own."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()

    def unit_gradients(self) -> Tensor:
        """What the backward passes of the group wrote: [u, p], float32, a view that the next group overwrites.

        Units in the order of `open_group`, or of first appearance; columns in the engine's own order, which
        `write_gradients` undoes.
        Raises: PrivacyError if a parameter was not reached, or got a gradient that did not come from here.
        """
        self._end_micro_batch()
        self._row_of = None
        return self._buffer[: self._n_units, : self.n_parameters]

    def _end_micro_batch(self) -> None:
        """Check that the backward pass reached every parameter, and none but through this engine."""
        for parameter in self._hooked:
            self._take_hooked(parameter)
        missing = [slot.name for slot in self._slots.values() if not slot.reached]
        if missing or not self._n_records:
            raise PrivacyError(
                f"{missing[0] if missing else 'the model'}: the backward pass left no gradient per record; freeze it,"
                " or leave its layer out of lora.target_modules"
            )
        raw = [name for name, p in zip(self.names, self.parameters, strict=True) if p.grad is not None]
        if raw:
            raise PrivacyError(
                f"{raw[0]} got a gradient outside its own layer, which cannot be clipped: freeze it, or untie it"
            )
        self._n_records = 0

    def write_gradients(self, flat: Tensor) -> None:
        """Make `flat` [p], in the engine's order of columns, the gradient of the trainable parameters."""
        for parameter, part in zip(self.parameters, self.split(flat), strict=True):
            slot = self._slots[id(parameter)]
            shaped = part.view(slot.shape[::-1]).t() if slot.transposed else part.view(slot.shape)
            parameter.grad = shaped.to(parameter.dtype).contiguous()

    def detach(self) -> None:
        """Take everything off the model; it is a plain one again."""
        for module in self.layers:
            if type(module) is nn.Linear:
                module.__dict__.pop("forward", None)
        for hooks in self._hooks:
            hooks.cleanup()
        self._buffer = torch.empty(0)

    def write_product(self, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        """Add left^T right of each record to the unit's row of a weight: [b, t, l], [b, t, r] to [b, l, r].

        The first use of a layer by single records goes straight into the buffer, where types allow it.
        """
        slot = self._slots[id(parameter)]
        straight = self._positions is None and not slot.written and left.dtype == right.dtype == slot.rows.dtype
        if straight:
            torch.bmm(left.transpose(1, 2), right, out=slot.rows)
            slot.written = slot.reached = True
        else:
            self.write(parameter, torch.bmm(left.transpose(1, 2), right.to(left.dtype)))

    def write(self, parameter: nn.Parameter, record_rows: Tensor) -> None:
        """Add one use's per-record gradients [b, *the slot's shape] to the units' rows."""
        slot = self._slots[id(parameter)]
        new = record_rows.reshape(self._n_records, -1)  # bfloat16 under autocast: made float32 on its way into the rows
        target = slot.rows.view(self._n_units, -1)
        if self._positions is not None:
            (target if slot.written else target.zero_()).index_add_(0, self._positions, new.float())
        elif slot.written:
            target.add_(new)
        else:
            target.copy_(new)
        slot.written = slot.reached = True

    def is_transposed(self, parameter: nn.Parameter) -> bool:
        """Whether the slot of a weight [o, i] is laid out as [i, o]."""
        return self._slots[id(parameter)].transposed

    def check_records(self, parameter: nn.Parameter, n: int) -> None:
        """Raises PrivacyError where a layer's input does not have one row for each record of the micro-batch."""
        if n != self._n_records:
            raise PrivacyError(
                f"{self._slots[id(parameter)].name}: its layer saw {n} rows for {self._n_records} records, so their"
                " gradients cannot be told apart; freeze it, or leave its layer out of lora.target_modules"
            )

    def _take_hooked(self, parameter: nn.Parameter) -> None:
        """Move what Opacus' hooks left at a parameter into the buffer; its raw gradient is dropped."""
        sample: Any = getattr(parameter, "grad_sample", None)
        if isinstance(sample, Tensor):
            self.check_records(parameter, len(sample))
            self.write(parameter, sample.detach())
        parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = None

    def _forward_of(self, layer: nn.Linear) -> Any:
        """The layer's forward, whose backward writes to this engine. Without gradients it is the plain one."""

        def forward(input: Tensor) -> Tensor:  # the name that nn.Linear gives it
            trains = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
            if not (trains and torch.is_grad_enabled()):
                return F.linear(input, layer.weight, layer.bias)
            return _PerRecordLinear.apply(input, layer.weight, layer.bias, self)  # pyright: ignore[reportReturnType]

        return forward


class _PerRecordLinear(torch.autograd.Function):
    """`F.linear` that gives its weight's gradient to the engine, record by record, and none to autograd.

    Shapes: b = records, t = positions of one record (all inner dimensions together), i = inputs, o = outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, engine: OnePassEngine) -> Tensor:
        ctx.engine, ctx.weight, ctx.bias, ctx.input_dtype = engine, weight, bias, x.dtype
        if torch.is_autocast_enabled(x.device.type):  # what autocast does for F.linear, spelled out for the backward
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        engine: OnePassEngine = ctx.engine
        parameter = ctx.weight if ctx.weight.requires_grad else ctx.bias
        engine.check_records(parameter, x.shape[0])
        g = gradient.reshape(x.shape[0], -1, gradient.shape[-1])  # [b, t, o]
        if ctx.weight.requires_grad:
            inputs = x.reshape(x.shape[0], -1, x.shape[-1])  # [b, t, i]
            left, right = (inputs, g) if engine.is_transposed(ctx.weight) else (g, inputs)
            engine.write_product(ctx.weight, left, right)
        if ctx.bias is not None and ctx.bias.requires_grad:
            engine.write(ctx.bias, g.float().sum(dim=1))
        back = (gradient @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None
