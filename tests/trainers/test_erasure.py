"""Erasure: exactly the drawn neurons change, to what was asked for, and scores find the neurons that write targets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tiny_models
from dpmed.data.tasks import Example, TaskSpec, TokenSpan
from dpmed.errors import InputError
from dpmed.trainers.erasure import (
    LAYOUTS,
    ResetTo,
    Select,
    chosen_blocks,
    erase_neurons,
    feed_forwards,
    neuron_scores,
    score_batches,
)

N_BLOCKS, WIDTH = 3, 48
GATED = (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.down_proj.weight")
# Written down here once more, and not read from LAYOUTS: block prefix, weights with a row per neuron, the one with a
# column per neuron, biases with an entry per neuron, the bias that belongs to no neuron.
PARTS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...], str | None]] = {
    "bert": (
        "bert.encoder.layer.{}.",
        ("intermediate.dense.weight",),
        "output.dense.weight",
        ("intermediate.dense.bias",),
        "output.dense.bias",
    ),
    "roberta": (
        "roberta.encoder.layer.{}.",
        ("intermediate.dense.weight",),
        "output.dense.weight",
        ("intermediate.dense.bias",),
        "output.dense.bias",
    ),
    "gpt2": ("transformer.h.{}.", ("mlp.c_fc.weight",), "mlp.c_proj.weight", ("mlp.c_fc.bias",), "mlp.c_proj.bias"),
    "gpt_neo": ("transformer.h.{}.", ("mlp.c_fc.weight",), "mlp.c_proj.weight", ("mlp.c_fc.bias",), "mlp.c_proj.bias"),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        ("mlp.dense_h_to_4h.weight",),
        "mlp.dense_4h_to_h.weight",
        ("mlp.dense_h_to_4h.bias",),
        "mlp.dense_4h_to_h.bias",
    ),
    "llama": ("model.layers.{}.", *GATED, (), None),
    "llama with bias": (
        "model.layers.{}.",
        *GATED,
        ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        "mlp.down_proj.bias",
    ),
    "mistral": ("model.layers.{}.", *GATED, (), None),
    "qwen2": ("model.layers.{}.", *GATED, (), None),
    "qwen3": ("model.layers.{}.", *GATED, (), None),
}
COMMON = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 2, "intermediate_size": WIDTH}
RESETS: tuple[ResetTo, ...] = ("init", "base", "zero")


def make(layout: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model with no dropout in which no bias is zero, so that a reset bias shows."""
    kind = layout.split()[0]
    config = {
        "bert": lambda: transformers.BertConfig(**{**COMMON, **SHAPE, **changes}),
        "roberta": lambda: transformers.RobertaConfig(**{**COMMON, **SHAPE, **changes}),
        "gpt2": lambda: transformers.GPT2Config(
            **{**COMMON, "n_embd": 32, "n_layer": N_BLOCKS, "n_head": 2, "n_inner": WIDTH, **changes}
        ),
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            **{
                **COMMON,
                "hidden_size": 32,
                "num_layers": N_BLOCKS,
                "num_heads": 2,
                "intermediate_size": WIDTH,
                "attention_types": [[["global"], N_BLOCKS]],
                **changes,
            }
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**{**COMMON, **SHAPE, **changes}),
        "llama": lambda: transformers.LlamaConfig(
            **{**COMMON, **SHAPE, "mlp_bias": layout == "llama with bias", **changes}
        ),
        "mistral": lambda: transformers.MistralConfig(**{**COMMON, **SHAPE, "num_key_value_heads": 2, **changes}),
        "qwen2": lambda: transformers.Qwen2Config(**{**COMMON, **SHAPE, "num_key_value_heads": 2, **changes}),
        "qwen3": lambda: transformers.Qwen3Config(
            **{**COMMON, **SHAPE, "num_key_value_heads": 2, "head_dim": 16, **changes}
        ),
    }[kind]()
    encoder = kind in ("bert", "roberta")
    auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_rows(layout: str, weight: Tensor) -> Tensor:
    """[outputs, inputs]; GPT-2 stores the transpose."""
    return weight.T if layout == "gpt2" and weight.dim() == 2 else weight


def neurons_of(layout: str, values: dict[str, Tensor], block: int) -> list[Tensor]:
    """All numbers of a block's neurons, one tensor a matrix or bias, neurons first."""
    prefix, ups, down, biases, _ = PARTS[layout]
    prefix = prefix.format(block)
    return [
        *(as_rows(layout, values[prefix + up]) for up in ups),
        as_rows(layout, values[prefix + down]).T,
        *(values[prefix + bias][:, None] for bias in biases),
    ]


def changed_neurons(layout: str, before: dict[str, Tensor], after: dict[str, Tensor], block: int) -> set[int]:
    """The neurons of a block that differ, which must be the same in every one of its matrices, in all their numbers."""
    pairs = zip(neurons_of(layout, before, block), neurons_of(layout, after, block), strict=True)
    found = [set((old != new).all(dim=1).nonzero().flatten().tolist()) for old, new in pairs]
    assert all(neurons == found[0] for neurons in found), "a neuron was reset in one matrix and not in another"
    return found[0]


def restore(layout: str, before: dict[str, Tensor], after: dict[str, Tensor], block: int, neurons: set[int]) -> None:
    """Put the old numbers of these neurons back into `after`, in place."""
    rows = sorted(neurons)
    pairs = zip(neurons_of(layout, before, block), neurons_of(layout, after, block), strict=True)
    for old, new in pairs:
        new[rows] = old[rows]


def test_every_known_layout_is_tested() -> None:
    assert {layout.split()[0] for layout in PARTS} == set(LAYOUTS)


@pytest.mark.parametrize("reset_to", RESETS)
@pytest.mark.parametrize("layout", PARTS)
def test_exactly_the_drawn_neurons_change_and_nothing_else(layout: str, reset_to: ResetTo) -> None:
    model, base = make(layout), make(layout, seed=1)
    before = state(model)
    erased = erase_neurons(model, fraction=0.5, layers=[0, 2], generator=generator(), reset_to=reset_to, base=base)
    after = state(model)
    assert erased == {0: WIDTH // 2, 2: WIDTH // 2}
    for block in erased:
        neurons = changed_neurons(layout, before, after, block)
        assert len(neurons) == WIDTH // 2
        rows = sorted(neurons)
        if reset_to == "zero":
            assert all(bool((part[rows] == 0).all()) for part in neurons_of(layout, after, block))
        if reset_to == "base":
            pairs = zip(neurons_of(layout, state(base), block), neurons_of(layout, after, block), strict=True)
            assert all(torch.equal(new[rows], old[rows]) for old, new in pairs)
        restore(layout, before, after, block, neurons)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", PARTS)
def test_all_neurons_reset_to_base_give_the_base_block_back(layout: str) -> None:
    model, base = make(layout), make(layout, seed=1)
    before, wanted = state(model), state(base)
    assert erase_neurons(model, fraction=1.0, layers=1, generator=generator(), reset_to="base", base=base) == {2: WIDTH}
    prefix, ups, down, biases, out_bias = PARTS[layout]
    own = {prefix.format(2) + name for name in (*ups, down, *biases, *([out_bias] if out_bias else []))}
    for name, value in state(model).items():
        assert torch.equal(value, (wanted if name in own else before)[name]), name
    states = torch.randn(1, 5, 32, generator=generator())
    blocks = [feed_forwards(m)[2] for m in (model, base)]
    through = [block.down(block.ups[-1](states)) for block in blocks]
    assert torch.equal(through[0], through[1])


@pytest.mark.parametrize("layout", PARTS)
def test_fraction_zero_changes_nothing_and_one_resets_all(layout: str) -> None:
    model = make(layout)
    before = state(model)
    assert erase_neurons(model, fraction=0.0, layers="all", generator=generator()) == {0: 0, 1: 0, 2: 0}
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert erase_neurons(model, fraction=1.0, layers=1, generator=generator()) == {2: WIDTH}
    assert len(changed_neurons(layout, before, state(model), 2)) == WIDTH


@pytest.mark.parametrize("layout", PARTS)
def test_reset_neurons_are_as_freshly_initialised(layout: str) -> None:
    """Their spread is that of a model that was just made, in each matrix; GPT-2 starts its output layers smaller."""
    sizes = {"n_inner": 1024} if layout == "gpt2" else {"intermediate_size": 1024}
    model, new = make(layout, initializer_range=0.05, **sizes), make(layout, initializer_range=0.05, seed=1, **sizes)
    erase_neurons(model, fraction=1.0, layers=1, generator=generator())
    prefix, ups, down, biases, _ = PARTS[layout]
    after, fresh = state(model), state(new)
    for name in (*ups, down):
        value, expected = after[prefix.format(2) + name], fresh[prefix.format(2) + name]
        assert abs(float(value.std() / expected.std()) - 1) < 0.04  # 32,768 numbers each: 7 standard errors
        assert abs(float(value.mean())) < 0.05 * 6 / value.numel() ** 0.5
    scale = math.sqrt(2 * N_BLOCKS) if layout == "gpt2" else 1.0
    assert abs(float(after[prefix.format(2) + down].std()) * scale / 0.05 - 1) < 0.03
    assert all(float(after[prefix.format(2) + name].abs().max()) == 0.0 for name in biases)


def test_the_generator_chooses_the_neurons() -> None:
    chosen = []
    for seed in (0, 0, 1):
        model = make("llama")
        before = state(model)
        erase_neurons(model, fraction=0.5, layers=1, generator=generator(seed))
        chosen.append(changed_neurons("llama", before, state(model), 2))
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_highest_scores_are_reset() -> None:
    model = make("gpt2")
    before = state(model)
    scores = {2: torch.randn(WIDTH, generator=generator()).double()}
    erase_neurons(model, fraction=0.25, layers=1, generator=generator(), scores=scores)
    wanted = set(scores[2].topk(WIDTH // 4).indices.tolist())
    assert changed_neurons("gpt2", before, state(model), 2) == wanted


def test_neurons_below_an_adapter_are_reset_and_the_adapter_is_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(target_modules="all-linear", r=2))
    before = state(model)
    erase_neurons(model, fraction=0.5, layers=1, generator=generator())
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {name.split("layers.")[1] for name in moved} == {
        f"2.mlp.{name}.base_layer.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("layers", [1, 2, "all", [1], [2, 0]])
def test_blocks_can_be_the_last_all_or_chosen(layers: Any) -> None:
    wanted = {1: [2], 2: [1, 2], "all": [0, 1, 2]}.get(layers) if not isinstance(layers, list) else sorted(layers)
    assert chosen_blocks(layers, 3) == wanted


@pytest.mark.parametrize("layers", [0, 4, -1, [3], [-1], [1, 1], [], "some"])
def test_blocks_that_the_model_does_not_have_are_refused(layers: Any) -> None:
    with pytest.raises(InputError, match=r"sani\.erase_layers"):
        erase_neurons(make("llama"), fraction=0.5, layers=layers, generator=generator())


def test_an_unknown_layout_is_refused_by_name() -> None:
    model = tiny_models.make_model("albert")
    with pytest.raises(InputError, match=r"'albert'.*known: bert, gpt2, gpt_neo"):
        erase_neurons(model, fraction=0.5, layers=1, generator=generator())


def test_a_base_that_is_missing_or_of_another_shape_is_refused() -> None:
    model = make("llama")
    for base, words in ((None, "set model.base"), (make("llama", intermediate_size=32), "other shapes")):
        before = state(model)
        with pytest.raises(InputError, match=words):
            erase_neurons(model, fraction=0.5, layers=1, generator=generator(), reset_to="base", base=base)
        assert all(torch.equal(before[name], value) for name, value in state(model).items())


# --- Scores -----------------------------------------------------------------------------------------------------------

BYS: tuple[Select, ...] = ("gradient", "activation")


def window(tokens: list[int], spans: list[tuple[int, int]], *, words: bool) -> Example:
    return Example(
        record=0,
        unit=0,
        window=0,
        input_ids=tokens,
        text_start=0,
        text_end=len(tokens),
        prompt_end=len(tokens),
        spans=tuple(TokenSpan(a, b, "NAME", "known", True) for a, b in spans),
        words=tuple(range(len(tokens))) if words else (),
        label=None,
    )


def windows(*, words: bool = False) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for length in (9, 12, 7, 10):
        made.append(window(rng.integers(10, 200, length).tolist(), [(2, 4), (5, 6)], words=words))
    return [*made, window([11, 12, 13], [], words=words)]


def batches(spec: TaskSpec, *, seed: int = 0, n_windows: int = 10, examples: list[Example] | None = None) -> list[Any]:
    found = score_batches(
        examples or windows(words=spec.kind == "masked_lm"),
        tiny_models.make_tokenizer(),
        spec,
        which="all",
        n_windows=n_windows,
        batch_size=2,
        generator=generator(seed),
    )
    return list(found)


def test_batches_to_score_hold_each_drawn_window_twice_with_targets_apart() -> None:
    spec = TaskSpec(kind="causal_lm", max_length=64)
    pairs = batches(spec)
    assert [len(a["input_ids"]) for a, _ in pairs] == [2, 2]  # the window without a target is left out
    for on_targets, others in pairs:
        assert torch.equal(on_targets["input_ids"], others["input_ids"])
        assert not bool((on_targets["weights"] * others["weights"]).any())
        both = on_targets["weights"] + others["weights"]
        assert torch.equal(both[:, 1:], others["attention_mask"][:, 1:].float())
        assert on_targets["weights"].sum(dim=1).tolist() == [3.0, 3.0]
    assert sum(len(a["input_ids"]) for a, _ in batches(spec, n_windows=3)) == 3


def test_batches_of_a_masked_lm_mask_all_targets_and_then_only_others() -> None:
    spec = TaskSpec(kind="masked_lm", max_length=64)
    mask = tiny_models.make_tokenizer().mask_token_id
    for on_targets, others in batches(spec):
        masked = on_targets["input_ids"] == mask
        assert torch.equal(masked, on_targets["weights"] > 0)
        assert masked.sum(dim=1).tolist() == [3, 3]
        assert bool((others["weights"].sum(dim=1) > 0).all())
        assert not bool((others["weights"] * on_targets["weights"]).any())


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_equal_generators_give_equal_scores_and_leave_the_model_alone(by: Select, kind: Any) -> None:
    spec = TaskSpec(kind=kind, max_length=64)
    model = tiny_models.make_model("llama" if kind == "causal_lm" else "bert").train()
    before = state(model)
    first, second = (neuron_scores(model, batches(spec), spec, layers="all", by=by) for _ in range(2))
    other = neuron_scores(model, batches(spec, seed=1, n_windows=2), spec, layers="all", by=by)
    assert list(first) == [0, 1]
    for number in first:
        assert torch.equal(first[number], second[number])
        assert not torch.equal(first[number], other[number])
        assert abs(float(first[number].sum())) < 1e-9 and float(first[number].abs().max()) > 1e-5
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_score_by_gradient_is_that_of_a_slow_loop() -> None:
    """One position at a time: move a neuron a little, by its own value, and see how the loss changes."""
    spec = TaskSpec(kind="causal_lm", max_length=64)
    width = 24
    model = tiny_models.make_model("gpt2", n_inner=width, initializer_range=0.2).double()
    examples = windows()[:1]
    found = neuron_scores(model, batches(spec, examples=examples), spec, layers=[0], by="gradient")[0]
    ids = torch.tensor([examples[0].input_ids])
    down = feed_forwards(model)[0].down
    inside = {i for a, b in ((2, 4), (5, 6)) for i in range(a, b)}
    sides = [sorted(inside), [i for i in range(1, ids.shape[1]) if i not in inside]]

    def losses(place: tuple[int, int] | None, step: float) -> list[float]:
        def moved(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            value = args[0].clone()
            if place is not None:
                value[0, place[0], place[1]] *= 1 + step
            return (value,)

        hook = down.register_forward_pre_hook(moved)
        with torch.no_grad():
            each = -model(input_ids=ids).logits[0].log_softmax(dim=1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        hook.remove()
        return [float(each[[i - 1 for i in side]].sum()) for side in sides]

    slow = torch.zeros(2, width, dtype=torch.float64)
    for neuron in range(width):
        for position in range(ids.shape[1]):
            up, low = losses((position, neuron), 1e-3), losses((position, neuron), -1e-3)
            slow[:, neuron] += torch.tensor([a - b for a, b in zip(up, low, strict=True)]).abs().double() / 2e-3
    shares = slow / slow.sum(dim=1, keepdim=True)
    assert torch.allclose(found, shares[0] - shares[1], atol=1e-5, rtol=0)
    assert float(found.abs().max()) > 1e-3
    assert int(found.argmax()) == int((shares[0] - shares[1]).argmax())


@pytest.mark.parametrize("by", BYS)
def test_a_neuron_that_writes_the_targets_alone_has_the_highest_score(by: Select) -> None:
    """One neuron is made to fire before token 50 only, and to write token 50; 50 is the identifier in every window."""
    model: Any = tiny_models.make_model("gpt2", n_layer=1)
    block = feed_forwards(model)[0]
    states: list[Tensor] = []
    hook = model.transformer.h[0].mlp.c_fc.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 40, 50, 8, 9]]))
        hook.remove()
        seen = states[0][0, 1]  # what the block sees at the token before the identifier
        block.ups[0].weight[:, 5] = 4 * seen / seen.norm() ** 2  # pyright: ignore[reportIndexIssue]
        block.ups[0].bias[5] = -2.0  # pyright: ignore[reportIndexIssue]
        block.down.weight[5] = model.get_output_embeddings().weight[50]  # pyright: ignore[reportIndexIssue]
    examples = [window([7, 40, 50, 8 + i, 9 + i], [(2, 3)], words=False) for i in range(4)]
    spec = TaskSpec(kind="causal_lm", max_length=64)
    scores = neuron_scores(model, batches(spec, examples=examples), spec, layers=1, by=by)[0]
    assert int(scores.argmax()) == 5


def test_scores_of_a_bfloat16_model_lose_no_digits_of_their_products() -> None:
    """Activations and gradients are rounded by the model; their products and sums are not rounded again."""
    model: Any = tiny_models.make_model("gpt2", n_layer=1)
    model = model.to(dtype=torch.bfloat16)
    spec = TaskSpec(kind="causal_lm", max_length=64)
    found = neuron_scores(model, batches(spec), spec, layers=1, by="gradient")[0]
    kept: list[Tensor] = []
    sides = []
    for side in zip(*batches(spec), strict=True):
        total = torch.zeros(128, dtype=torch.float64)
        for batch in side:
            kept.clear()
            hook = feed_forwards(model)[0].down.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            hook.remove()
            counted = batch["weights"][:, 1:] > 0
            loss = torch.nn.functional.cross_entropy(logits[counted], batch["targets"][:, 1:][counted], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, kept)
            total += (kept[0].detach().double() * gradient.double()).abs().sum(dim=(0, 1))
        sides.append(total / total.sum())
    assert gradient.dtype is torch.bfloat16
    assert torch.allclose(found, sides[0] - sides[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by", BYS)
def test_records_without_a_target_to_predict_are_refused(by: Select) -> None:
    spec = TaskSpec(kind="causal_lm", max_length=64)
    first = [window([20, 21, 22], [(0, 1)], words=False)]
    with pytest.raises(InputError, match="no target to score"):
        neuron_scores(tiny_models.make_model("gpt2"), batches(spec, examples=first), spec, layers=1, by=by)
