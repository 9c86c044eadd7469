"""Proof by trial, before the first private step: the engine's rows against plain autograd, one unit at a time.

A test suite cannot know a user's model. A layer that mixes records (batch statistics, experts with a shared capacity, a
sequence-first layout), padding that leaks into a record's gradient, or a weight used behind the engine's back would all
make the clipped sum wrong without an error. A few records of random tokens show each of them, and cost no privacy.
Gradients are compared without dropout; what layers do in training mode alone is shown by losses under equal masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpmed.errors import PrivacyError
from dpmed.privacy.flat import FlatParameters

if TYPE_CHECKING:
    from dpmed.privacy.one_pass import OnePassEngine
    from dpmed.privacy.opacus_engine import OpacusEngine

    Engine = OnePassEngine | OpacusEngine

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 0.1
"""Relative, for trainable weights of fewer bits, whose rounding alone makes about 1 %."""
SAME = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Relative, of a loss computed twice in batches of one shape; 1e-2 for weights of fewer bits."""


def prove(
    attach: Callable[[], Engine],
    model: nn.Module,
    losses: Callable[[Sequence[int]], Tensor],
    *,
    truth: Callable[[Sequence[int]], Tensor],
    units: Sequence[int],
) -> Engine:
    """Attach the engine, and show on public records that its rows are what a loop over single units gives.

    Args:
        attach: makes the engine on `model`.
        model: on its final device. Its trainable weights are moved a little for the trial (fresh LoRA factors of zero
            would prove nothing of their partners) and are put back bit for bit. A frozen base of fewer bits is made
            float32 for the trial, since its rounding would hide a small influence of one record on another.
        losses: per-record losses [b] of the public records with these indices, padded and computed as in training.
        truth: the same, computed in the plainest way there is.
        units: the unit of each public record; at least one unit with several records, and records of several lengths.

    Returns: the engine, attached.
    Raises: PrivacyError if a unit's row differs: its gradient depends on other records, or a weight is not covered; or
        if in training mode a record's loss depends on other records, or a buffer takes up what it sees.
    """
    flat = FlatParameters(model)
    with _trial(model, flat), _wide_base(model):
        _check_training_mode(model, flat, losses, len(units))
        _without_dropout(model, flat)
        alone = _one_by_one(flat, truth, units)
        engine = attach()
        try:
            engine.begin(units, flat.parameters[0].device)
            engine.backward(losses(range(len(units))))
            for row, (unit, gradients) in zip(engine.unit_gradients(), alone.items(), strict=True):
                engine.write_gradients(row)
                _compare(flat, gradients, unit)
        except BaseException:
            engine.detach()
            raise
        finally:
            model.zero_grad()
    return engine


def _one_by_one(
    flat: FlatParameters, losses: Callable[[Sequence[int]], Tensor], units: Sequence[int]
) -> dict[int, list[Tensor]]:
    """Unit -> gradient of each parameter by plain autograd, each record in a batch of its own, without padding."""
    found: dict[int, list[Tensor]] = {}
    for record, unit in enumerate(units):
        gradients = torch.autograd.grad(losses([record]).sum(), flat.parameters, allow_unused=True)
        rows = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, flat.parameters, strict=True)]
        before = found.get(unit)
        found[unit] = rows if before is None else [a + b for a, b in zip(before, rows, strict=True)]
    return found


def _compare(flat: FlatParameters, alone: Sequence[Tensor], unit: int) -> None:
    """Compare `.grad` with the truth, relative to the unit's whole gradient."""
    size = torch.stack([g.float().norm() for g in alone]).norm()
    if not bool(torch.isfinite(size)) or float(size) == 0:
        raise PrivacyError(
            "the model gives no finite gradient on public trial records, so nothing can be proven of it: check that its"
            " weights are whole"
        )
    for name, parameter, truth in zip(flat.names, flat.parameters, alone, strict=True):
        got = torch.zeros_like(truth) if parameter.grad is None else parameter.grad
        difference = float((got.float() - truth.float()).norm() / size)
        if not difference <= TOLERANCE.get(parameter.dtype, COARSE):
            raise PrivacyError(
                f"{name}: on public trial records its gradient for one unit differs by {difference:.1%} from that unit"
                " alone: records influence each other in this model, or the weight is used outside its layer; freeze it"
            )


def _check_training_mode(
    model: nn.Module, flat: FlatParameters, losses: Callable[[Sequence[int]], Tensor], n: int
) -> None:
    """Each record's loss beside one set of others and beside another one, and the buffers before and after.

    All records come both times, so shapes and padding are the same and with them the masks of dropout; the record that
    comes twice differs.
    """
    model.train()
    before, found = _buffers(model), []
    for repeated in (0, n - 1):
        with torch.no_grad(), torch.random.fork_rng([d] if (d := flat.parameters[0].device).type == "cuda" else []):
            torch.manual_seed(0)
            found.append(losses([*range(n), repeated])[:n].float())
    now = dict(model.named_buffers())
    changed = [name for name, old in before.items() if not torch.equal(now[name], old)]
    if changed:
        raise PrivacyError(
            f"{changed[0]}: this buffer takes up statistics of the records in training mode, which no noise covers, and"
            " by which records influence each other: replace its layer, e.g. by a LayerNorm or GroupNorm"
        )
    tolerance = max(SAME.get(p.dtype, 1e-2) for p in model.parameters())
    if not torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance):
        raise PrivacyError(
            f"{type(model).__name__}: in training mode a record's loss depends on the other records of its batch, so no"
            " gradient is one unit's own: replace the layer that mixes them"
        )


def _without_dropout(model: nn.Module, flat: FlatParameters) -> None:
    model.eval()
    for layer in flat.layers:
        layer.train()  # Opacus' hooks work in training mode only; none of these layers has dropout


@contextmanager
def _wide_base(model: nn.Module) -> Iterator[None]:
    """Frozen bfloat16 and float16 weights as float32, and back, which loses nothing; a sharded base stays as it is."""
    before = {p: p.dtype for p in model.parameters() if not p.requires_grad and p.dtype in (torch.bfloat16, torch.half)}
    before = {p: dtype for p, dtype in before.items() if type(p.data) is Tensor}
    try:
        for parameter in before:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the buffers that hold numbers, not masks or counts."""
    found = {name: b for name, b in model.named_buffers() if b.is_floating_point() and b.element_size() > 1}
    return {name: b.detach().clone() for name, b in found.items()}


@contextmanager
def _trial(model: nn.Module, flat: FlatParameters) -> Iterator[None]:
    """Trainable weights a little off their start; they, the buffers and the modes are put back afterwards."""
    before, training = flat.snapshot(), {m: m.training for m in model.modules()}
    buffers = {b: b.detach().clone() for b in model.buffers() if b.element_size() > 1}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in flat.parameters:
                parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
        yield
    finally:
        flat.restore(before)
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for module, mode in training.items():
            module.training = mode
