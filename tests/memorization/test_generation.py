from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

import tiny_models
from dpmed.errors import InputError
from dpmed.memorization.generation import context_size, generate, start_tokens
from dpmed.memorization.statistics import weights_fingerprint

DECODERS = list(tiny_models.DECODERS)


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, of very different lengths, so that batches are padded."""
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 390, size=rng.integers(1, 30)).tolist() for _ in range(n)]


def spiky(kind: tiny_models.Kind, **changes: Any) -> nn.Module:
    """A model with larger weights, whose first choices depend on its whole context and seldom repeat."""
    model = tiny_models.make_model(kind, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def one_by_one(model: Any, tokenizer: Any, asked: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy output of a bare loop: no padding, no cache, no batch."""
    written: list[list[int]] = []
    for prompt in asked:
        ids = list(prompt)
        for _ in range(new_tokens):
            with torch.inference_mode():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        written.append(ids[len(prompt) :])
    return written


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_output_equals_one_record_at_a_time_without_padding(tiny_tokenizer, kind: tiny_models.Kind):
    model, asked = spiky(kind), prompts(12)
    found = generate(model, tiny_tokenizer, asked, new_tokens=16, batch_tokens=200)
    assert [f.tolist() for f in found] == one_by_one(model, tiny_tokenizer, asked, 16)
    for prompt, tokens in zip(asked, found, strict=True):  # and transformers' own, alone
        out = model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=16
        )
        own = out[0, len(prompt) :].tolist()
        assert [t for t in own if t != tiny_tokenizer.eos_token_id] == tokens.tolist()
    assert len({tuple(f.tolist()) for f in found}) > 6  # the model does not write the same to everybody


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_and_order_change_nothing(tiny_tokenizer, kind: tiny_models.Kind):
    model, asked = spiky(kind), prompts(10)
    padded = generate(model, tiny_tokenizer, asked, new_tokens=12, batch_tokens=10_000)
    alone = generate(model, tiny_tokenizer, asked[::-1], new_tokens=12, batch_tokens=1)[::-1]
    for a, b in zip(padded, alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_that_would_read_padding_writes_one_text_at_a_time(tiny_tokenizer):
    """RWKV pays no heed to the attention mask, and mixes up the states of a batch."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, context_length=64)
    model = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    asked = prompts(6) + [p[::-1] for p in prompts(6)]  # also of one length
    found = generate(model, tiny_tokenizer, asked, new_tokens=10, batch_tokens=10_000)
    assert [f.tolist() for f in found] == one_by_one(model, tiny_tokenizer, asked, 10)
    assert len({tuple(f.tolist()) for f in found}) > 6


def test_the_end_token_ends_and_is_not_part_of_the_output(tiny_tokenizer):
    model, asked = spiky("llama"), prompts(8)
    free = generate(model, tiny_tokenizer, asked, new_tokens=12)
    end = int(free[0][4])  # what the model writes anyway becomes the end
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    for before, after in zip(free, generate(model, tokenizer, asked, new_tokens=12), strict=True):
        cut = before.tolist().index(end) if end in before else len(before)
        assert after.tolist()[:cut] == before.tolist()[:cut]
        assert end not in after
    assert len(generate(model, tokenizer, asked, new_tokens=12)[0]) <= 4


def test_the_models_own_generation_settings_have_no_influence(tiny_tokenizer):
    asked = prompts(8)
    expected = generate(spiky("gpt2"), tiny_tokenizer, asked, new_tokens=12)
    drawn = generate(spiky("gpt2"), tiny_tokenizer, asked, new_tokens=12, temperature=1.0)
    model: Any = spiky("gpt2")
    own = model.generation_config
    own.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12, do_sample=True, temperature=9.0)
    own.update(top_p=0.1, suppress_tokens=[int(expected[0][0])], max_length=20)
    for a, b in zip(expected, generate(model, tiny_tokenizer, asked, new_tokens=12), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(drawn, generate(model, tiny_tokenizer, asked, new_tokens=12, temperature=1.0), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_a_peft_model_generates_with_its_adapter_and_keeps_its_settings(tiny_tokenizer):
    base, asked = spiky("llama"), prompts(6)
    plain = [f.tolist() for f in generate(base, tiny_tokenizer, asked, new_tokens=8)]
    own = base.generation_config
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    tuned = [f.tolist() for f in generate(model, tiny_tokenizer, asked, new_tokens=8)]
    assert tuned != plain
    assert tuned == one_by_one(model, tiny_tokenizer, asked, 8)
    assert base.generation_config is own


def test_draws_follow_temperature_and_top_k(tiny_tokenizer):
    model: Any = spiky("gpt2")
    prompt, n = prompts(1)[0][:5], 20_000
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]

    def wanted(temperature: float, top_k: int | None) -> np.ndarray:
        scaled = logits / temperature
        if top_k is not None:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
        return scaled.softmax(dim=0).numpy()

    cases = [(1.0, None), (0.5, None), (1.0, 50), (1.0, 3)]
    for case in cases:
        found = generate(model, tiny_tokenizer, [prompt] * n, new_tokens=1, temperature=case[0], top_k=case[1])
        ends = tiny_tokenizer.eos_token_id
        drawn = np.bincount([int(f[0]) if len(f) else ends for f in found], minlength=len(logits)) / n
        away = [np.abs(drawn - wanted(*other)).sum() / 2 for other in cases]
        assert away[cases.index(case)] == min(away) < 0.08
        # Above all: without top_k, transformers' silent default of 50 is off.
        assert sorted(away)[1] > 0.12


def test_draws_are_seeded_and_the_global_state_stays(tiny_tokenizer):
    model, asked = spiky("qwen2"), prompts(6)

    def draw(seed: int) -> list[list[int]]:
        return [f.tolist() for f in generate(model, tiny_tokenizer, asked, new_tokens=8, temperature=1.0, seed=seed)]

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert draw(0) == first
    assert draw(1) != first
    model.train()
    draw(0)
    assert model.training


def test_equal_prompts_of_different_batches_get_different_draws(tiny_tokenizer):
    model = spiky("llama")
    found = generate(model, tiny_tokenizer, [[11, 12]] * 12, new_tokens=8, temperature=2.0, batch_tokens=20)
    assert len({tuple(f.tolist()) for f in found}) > 6


class Killed(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_resumes_with_the_same_tokens_and_makes_no_batch_twice(
    tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    model: Any = spiky("llama")
    asked, folder = prompts(9), tmp_path / "parts"
    options: dict[str, Any] = {"new_tokens": 8, "temperature": temperature, "batch_tokens": 100}
    whole = generate(model, tiny_tokenizer, asked, **options)
    made: list[int] = []
    real = model.generate

    def counted(**given: Any) -> Any:
        made.append(len(given["input_ids"]))
        return real(**given)

    monkeypatch.setattr(model, "generate", counted)

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        generate(model, tiny_tokenizer, asked, part_dir=folder, progress=kill, **options)
    assert len(made) == 1
    seen: list[tuple[int, int]] = []
    resumed = generate(
        model,
        tiny_tokenizer,
        asked,
        part_dir=folder,
        progress=lambda done, total: seen.append((done, total)),
        **options,
    )
    assert sum(made) == len(asked) and len(made) > 2
    assert seen[-1] == (9, 9)
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.dtype == np.int32
    made.clear()
    generate(model, tiny_tokenizer, asked, part_dir=folder, **options)
    assert made == []


def test_parts_are_private_and_belong_to_one_job(tiny_tokenizer, tmp_path: Path):
    model, asked, folder = spiky("gpt2"), prompts(4), tmp_path / "a" / "parts"
    base: dict[str, Any] = {"new_tokens": 6, "part_dir": folder}
    generate(model, tiny_tokenizer, asked, **base)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    n_files = 1
    for change in ({"new_tokens": 7}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"top_k": 4}):
        generate(model, tiny_tokenizer, asked, **{**base, **change})
        n_files += 1
        assert len(list(folder.iterdir())) == n_files
    generate(model, tiny_tokenizer, prompts(4, seed=1), **base)
    generate(spiky("gpt2", seed=1), tiny_tokenizer, asked, **base)
    assert len(list(folder.iterdir())) == n_files + 2
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        generate(model, tiny_tokenizer, asked, **base)


def test_the_weights_are_hashed(tiny_tokenizer):
    first = weights_fingerprint(tiny_models.make_model("gpt2"))
    assert weights_fingerprint(tiny_models.make_model("gpt2")) == first
    others = [tiny_models.make_model("gpt2", seed=1), tiny_models.make_model("gpt2", layer_norm_epsilon=1e-3)]
    assert len({first, *map(weights_fingerprint, others)}) == 3


def test_what_cannot_be_generated_is_refused_in_one_line(tiny_tokenizer):
    model = tiny_models.make_model("gpt2")
    assert context_size(model) == 128
    assert generate(model, tiny_tokenizer, [], new_tokens=5) == []
    for asked, new, message in (
        ([[5], []], 5, "prompt 1 is empty"),
        ([[5] * 100], 29, "do not fit into the model's context of 128"),
        ([[5]], 0, "at least 1"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            generate(model, tiny_tokenizer, asked, new_tokens=new)
        assert "\n" not in str(caught.value)
    assert len(generate(model, tiny_tokenizer, [[5] * 100], new_tokens=28)[0]) <= 28
    with pytest.raises(InputError, match="cannot generate"):
        generate(nn.Linear(2, 2), tiny_tokenizer, [[5]], new_tokens=1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tiny_tokenizer, bad: float):
    model: Any = tiny_models.make_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(bad)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="not finite"):
            generate(model, tiny_tokenizer, [[5]], new_tokens=2, temperature=temperature)


def test_start_tokens_are_those_of_training(tiny_tokenizer):
    assert start_tokens(tiny_tokenizer) == []
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.make_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", bos)])
    assert start_tokens(tokenizer) == [bos]
