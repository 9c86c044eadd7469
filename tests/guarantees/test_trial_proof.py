"""The trial before the first step: it refuses models whose records are not apart, by name, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults.dp_runs import make_plan, make_trainer, weights, with_lora
from guarantees.steps import TOKENIZER, Case, adapted
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

import tiny_models
from dpmed.data import head_losses
from dpmed.errors import PrivacyError
from dpmed.privacy import proof
from dpmed.privacy.flat import FlatParameters
from dpmed.privacy.one_pass import OnePassEngine
from dpmed.privacy.plan import EngineName
from dpmed.trainers.dp_lora import DPLoRATrainer

WIDTH = 16
both_engines = pytest.mark.parametrize("engine", ["one_pass", "opacus"])


class TinyLanguageModel(nn.Module):
    """An embedding, a layer and a head, with one place for a fault: [b, t] tokens to [b, t, v] logits."""

    supports_gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=WIDTH, num_attention_heads=2)
        self.embed = nn.Embedding(len(TOKENIZER), WIDTH).requires_grad_(False)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, len(TOKENIZER), bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> CausalLMOutput:
        hidden = self.between(self.embed(input_ids), attention_mask)  # [b, t, d]
        return CausalLMOutput(logits=self.head(hidden))  # pyright: ignore[reportArgumentType]

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(hidden))


class SubtractsTheBatchMean(TinyLanguageModel):
    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(hidden - hidden.mean(dim=0, keepdim=True)))


class SequenceFirst(TinyLanguageModel):
    """Its layer sees [t, b, d]; rows of the layer are positions, not records."""

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(hidden.transpose(0, 1))).transpose(0, 1)


class SeesThePaddedLength(TinyLanguageModel):
    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(hidden) / mask.shape[1])


class TiedByAFunctionalCall(TinyLanguageModel):
    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(F.linear(self.mix(hidden), self.mix.weight))


class SharedCapacity(TinyLanguageModel):
    """As an expert that takes the first tokens of a batch and no more."""

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        taken = torch.arange(mask.numel()).view(mask.shape) < 20
        return torch.tanh(self.mix(hidden)) * taken.unsqueeze(-1)


class BatchStatistics(TinyLanguageModel):
    """A frozen batch norm: nothing of it is trained, and in evaluation mode it is a plain scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.norm(hidden.transpose(1, 2)).transpose(1, 2)))


class MixesInTrainingAlone(TinyLanguageModel):
    """Without a buffer that would tell."""

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mixed = hidden - 0.1 * hidden.mean(dim=0, keepdim=True).detach() if self.training else hidden
        return torch.tanh(self.mix(mixed))


class RunningStatistics(BatchStatistics):
    """No record influences another within a step; yet what the model has seen stays in a buffer, without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)

    def between(self, hidden: Tensor, mask: Tensor) -> Tensor:
        seen = hidden[:, :2]  # the same positions, whatever the padding
        return torch.tanh(self.mix(hidden)) + self.norm(seen.transpose(1, 2)).sum() * 0


REFUSED: list[tuple[type[TinyLanguageModel], str]] = [
    (SubtractsTheBatchMean, r"mix\.|training mode"),
    (
        SequenceFirst,
        r"mix\.weight: its layer saw 14 rows for 4 records|mix\.weight: the backward pass left no gradient",
    ),
    (SeesThePaddedLength, r"(mix|head)\.weight.*differs by"),
    (TiedByAFunctionalCall, r"mix\.weight"),
    (SharedCapacity, r"(mix|head)\.weight.*differs by"),
    (BatchStatistics, r"norm\.running_mean"),
    (RunningStatistics, r"norm\.running_mean"),
    (MixesInTrainingAlone, r"MixesInTrainingAlone: in training mode"),
]


def trainer_of(folder: Path, model: Any, engine: EngineName = "one_pass") -> DPLoRATrainer:
    return make_trainer(folder, make_plan(engine=engine), model=model)


@pytest.fixture(autouse=True)
def plain_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer wants adapters; here the model's own layers are trained."""
    monkeypatch.setattr("dpmed.trainers.lora.with_adapters", lambda model, config: model)


@both_engines
def test_a_model_whose_records_are_apart_is_trained(engine: EngineName, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TinyLanguageModel(), engine)
    trainer.train()
    assert trainer.state.global_step == 3


@both_engines
@pytest.mark.parametrize(("kind", "named"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_a_model_that_couples_records_is_refused_by_name_before_the_first_step(
    kind: type[TinyLanguageModel], named: str, engine: EngineName, tmp_path: Path
) -> None:
    model = kind()
    trainer = trainer_of(tmp_path, model, engine)
    before = state_of(model)
    with pytest.raises(PrivacyError, match=named):
        trainer.train()
    assert (trainer.state.global_step, trainer.privacy_spent()["n_steps"]) == (0, 0)
    assert_untouched(model, before)
    assert all(not m._forward_hooks and not m._backward_hooks and "forward" not in vars(m) for m in model.modules())


def test_a_sequence_first_model_is_seen_where_positions_are_as_many_as_records(tmp_path: Path) -> None:
    """Four records of four tokens: no shape tells, the numbers do."""
    model = SequenceFirst()
    flat = FlatParameters(model)
    tokens = torch.randint(len(TOKENIZER), (4, 4), generator=torch.Generator().manual_seed(0))

    def losses(records: Any) -> Tensor:
        logits = model(tokens[list(records)], torch.ones(len(records), 4)).logits
        return logits.float().logsumexp(-1).mean(dim=1) - logits[:, :, 5].mean(dim=1)

    before = flat.snapshot()
    with pytest.raises(PrivacyError, match=r"mix\.weight.*differs by"):
        proof.prove(lambda: OnePassEngine(model), model, losses, truth=losses, units=[0, 1, 0, 2])
    assert flat.unmoved_since(before) == flat.names


@both_engines
def test_a_wrong_loss_behind_a_frozen_output_layer_is_seen(
    engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's truth comes from whole logits, not from the shortcut that training takes."""
    take = head_losses._take_losses_

    def forgets_some_targets(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
        losses = take(logits, targets, gradient=gradient)
        logits[0] = 0.0
        return losses

    monkeypatch.setattr(head_losses, "_take_losses_", forgets_some_targets)
    model = adapted(Case("llama", "causal_lm"))
    with pytest.raises(PrivacyError, match="differs by"):
        trainer_of(tmp_path, model, engine).train()


@pytest.mark.parametrize("kind", [SubtractsTheBatchMean, SeesThePaddedLength, SharedCapacity, BatchStatistics])
def test_without_the_trial_such_a_model_would_be_trained_and_certified(
    kind: type[TinyLanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpmed.trainers.dp_lora.prove", lambda attach, *_, **__: attach())
    trainer = trainer_of(tmp_path, kind())
    trainer.train()
    assert trainer.privacy_spent()["private"]


def test_gradients_in_evaluation_mode_would_not_show_a_batch_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_check_training_mode", lambda *_: None)
    trainer_of(tmp_path, BatchStatistics()).train()


# --- No trace ---------------------------------------------------------------------------------------------------------

State = tuple[dict[str, Tensor], dict[str, bool], dict[str, bool]]


def state_of(model: nn.Module) -> State:
    """Weights and buffers, modes, and what is trained."""
    values = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    return values, modes, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: State) -> None:
    values, modes, trained = state_of(model)
    assert values.keys() == before[0].keys()
    assert [name for name, value in values.items() if not torch.equal(value, before[0][name])] == []
    assert (modes, trained) == before[1:]
    assert all(p.grad is None for p in model.parameters())


@both_engines
@pytest.mark.parametrize(
    "case", [Case("bert", "classification"), Case("albert", "masked_lm"), Case("gpt2", "causal_lm")]
)
def test_a_successful_trial_leaves_weights_modes_and_random_numbers_as_they_were(
    case: Case, engine: EngineName
) -> None:
    model = adapted(case, dropout=0.2).train()
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()  # a mode of the user's, inside
    ids = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(0))

    def losses(records: Any) -> Tensor:
        logits = model(input_ids=ids[list(records)], attention_mask=torch.ones(len(records), 9).long()).logits
        return logits.float().logsumexp(-1).reshape(len(records), -1).mean(dim=1)

    before, random = state_of(model), torch.get_rng_state()
    attach = make_plan(engine=engine).attach
    attached = proof.prove(lambda: attach(model), model, losses, truth=losses, units=[0, 1, 0, 2])
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    attached.detach()


def test_the_trial_moves_the_weights_in_between_so_it_has_something_to_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh factors B of zero would give their partners A no gradient, and prove nothing of them."""
    model = with_lora(tiny_models.make_model("llama"), "causal_lm")
    flat, seen = FlatParameters(model), []
    before = flat.snapshot()
    with proof._trial(model, flat):
        seen += flat.unmoved_since(before)
    assert seen == []
    assert flat.unmoved_since(before) == flat.names


def test_the_check_of_traces_sees_a_weight_that_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyLanguageModel()
    before = state_of(model)
    monkeypatch.setattr(FlatParameters, "restore", lambda self, snapshot: None)
    with proof._trial(model, FlatParameters(model)):
        pass
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


def test_the_whole_start_of_a_run_leaves_the_trained_weights_bit_for_bit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    start, seen = weights(trainer), []
    step: Callable[..., Tensor] = trainer.training_step

    def first_step(*arguments: Any, **options: Any) -> Tensor:
        seen.append(weights(trainer))
        return step(*arguments, **options)

    trainer.training_step = first_step  # type: ignore[method-assign]
    trainer.train()
    assert torch.equal(seen[0], start)
