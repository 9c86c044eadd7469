"""Text that a model writes: batched, reproducible, and resumed after a kill.

Prompts go through `model.generate` in batches of about equal size, padded on the left. Each batch is drawn from its own
seed and, where a folder is given, kept in a file of its own, so that a second run makes only what is missing and still
gives the same tokens. Token ids only; they are the model's words, so the files are private (0600).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dpmed.data.batches import pad_token_id
from dpmed.data.tasks import TaskSpec, encode
from dpmed.errors import InputError
from dpmed.memorization.scoring import evaluating, length_batches
from dpmed.memorization.statistics import weights_fingerprint
from dpmed.runs import write_private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_BY_ONE = ("rwkv", "xlstm")
"""Model types that read padding as text, and mix up the states of a batch: they write one text at a time."""
_VERSION = "1"  # of the part files and of what decides their content


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    batch_tokens: int = 16384,
    seed: int = 0,
    part_dir: Path | None = None,
    weights: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Continue each prompt by at most `new_tokens` tokens.

    The model's own generation settings (penalties, minimal lengths, sampling flags, other end tokens) have no say: they
    would change what is measured.

    Args:
        model: a causal language model of transformers or a PEFT model around one. Put in evaluation mode meanwhile.
        tokenizer: the model's own; names the end and the padding token.
        prompts: token ids, at least one each, special tokens included.
        new_tokens: at least 1; prompt and new tokens must fit into the model's context.
        temperature: 0 is greedy decoding; above, tokens are drawn.
        top_k: draw from the k likeliest tokens only; None is all of them.
        batch_tokens: padded tokens (prompt and new ones) of one batch; bounds the memory of the cache. Part of what a
            drawn text depends on.
        seed: of the draws; each batch has its own, so that a resumed run draws the same.
        part_dir: private folder for finished batches; None keeps nothing.
        weights: `weights_fingerprint(model)` where it is known already; hashing a large model takes seconds.
        progress: called after each batch with (prompts done, prompts in all).

    Returns: new token ids of each prompt, int32, up to and without the end token; may be empty.
    Guarantee: greedy output does not depend on the batches, up to rounding; the global random state stays as it was.
    Raises: InputError if the model cannot generate, a prompt does not fit, the output is not finite, or a part file is
        damaged.
    """
    _check(model, prompts, new_tokens, temperature)
    settings = [_VERSION, new_tokens, temperature, top_k, batch_tokens, seed]
    parts = None
    if part_dir is not None:
        weights = weights or weights_fingerprint(model)
        ends = [tokenizer.eos_token_id, pad_token_id(tokenizer)]
        parts = _Parts(part_dir, _fingerprint(prompts, [*settings, *ends, weights]))
    outputs: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    done = 0
    for index, rows in enumerate(_batches(model, [len(p) + new_tokens for p in prompts], batch_tokens)):
        found = parts.load(index) if parts is not None else None
        if found is None:
            config = _config(tokenizer, new_tokens, temperature, top_k)
            state = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
            found = _batch(model, [prompts[i] for i in rows], config, state)
            if parts is not None:
                parts.save(index, found)
        for row, tokens in zip(rows, found, strict=True):
            outputs[row] = tokens
        done += len(rows)
        if progress is not None:
            progress(done, len(prompts))
    return outputs


def context_size(model: nn.Module) -> int | None:
    """Tokens that the model was made for; None if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text_config, "max_position_embeddings", None)
    return int(size) if size and size > 0 else None  # XLNet says -1


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that stand before every text, as in training; [] for a tokenizer that adds none."""
    example = encode(Dataset.from_dict({"text": ["a"], "unit": ["a"]}), tokenizer, TaskSpec(max_length=64))[0]
    return example.input_ids[: example.text_start]


def _check(model: nn.Module, prompts: Sequence[list[int]], new_tokens: int, temperature: float) -> None:
    if not hasattr(model, "generate"):
        raise InputError(f"a {type(model).__name__} cannot generate text; give a causal language model")
    if new_tokens < 1 or temperature < 0:
        raise InputError(f"new tokens {new_tokens}, temperature {temperature}: give at least 1, and 0 or more")
    empty = [i for i, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise InputError(f"prompt {empty[0]} is empty; a causal model continues at least one token")
    longest, size = max(map(len, prompts), default=0), context_size(model)
    if size is not None and longest + new_tokens > size:
        raise InputError(
            f"a prompt of {longest} tokens and {new_tokens} new ones do not fit into the model's context of {size}; "
            "ask for fewer"
        )


def _config(
    tokenizer: PreTrainedTokenizerBase, new_tokens: int, temperature: float, top_k: int | None
) -> GenerationConfig:
    """The whole recipe of decoding; what is left out has the neutral value of transformers' defaults."""
    # transformers' default is top_k = 50, a truncation that nobody asked for; 0 switches it off.
    drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **(drawing if temperature > 0 else {"do_sample": False}),
    )


def _batches(model: nn.Module, lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of each batch, by their lengths with what is written."""
    if getattr(getattr(model, "config", None), "model_type", "") in ONE_BY_ONE:
        return ([row] for row in range(len(lengths)))
    return length_batches(lengths, batch_tokens)


def _batch(model: nn.Module, prompts: Sequence[list[int]], config: GenerationConfig, seed: int) -> list[np.ndarray]:
    """Generate one batch on the device of the model."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    input_ids = np.full((len(prompts), longest), config.pad_token_id, dtype=np.int64)  # [b, t]
    attention = np.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        attention[row, longest - len(prompt) :] = 1
    generator: Any = model
    cuda = [device] if device.type == "cuda" else []
    with evaluating(model), _own_settings_aside(model), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        sequences = generator.generate(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(attention).to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    new = sequences[:, longest:].cpu().numpy().astype(np.int32)
    return [_until_end(row, config.eos_token_id) for row in new]


def _until_end(tokens: np.ndarray, end: int | None) -> np.ndarray:
    """Tokens before the first end token; behind it stands padding."""
    ends = np.flatnonzero(tokens == end) if end is not None else []
    return tokens[: ends[0]] if len(ends) else tokens


class _Finite(LogitsProcessor):
    """Stops at NaN or infinity: greedy decoding would go on and write nonsense that counts as nothing memorised."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not bool((scores < math.inf).all()):  # NaN compares false; minus infinity is a banned token
            raise InputError("the model's output is not finite: its weights hold NaN or infinity; train it again")
        return scores


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Put neutral generation settings in place of the model's own: `generate` fills whatever is unset from them."""
    holders: list[tuple[Any, Any]] = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    try:
        for module, _ in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in holders:
            module.generation_config = own


def _fingerprint(prompts: Sequence[list[int]], settings: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for prompt in prompts:
        digest.update(np.array([len(prompt), *prompt], np.int64).tobytes())
    return digest.hexdigest()


class _Parts:
    """Finished batches of one job in a private folder, one safetensors file each."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, index: int) -> Path:
        return self.folder / f"{self.fingerprint[:20]}-{index:06d}.safetensors"

    def save(self, index: int, outputs: Sequence[np.ndarray]) -> None:
        """Write at once or not at all, readable by its owner only."""
        offsets = np.cumsum([0, *map(len, outputs)]).astype(np.int64)
        ids = np.concatenate([*outputs, np.empty(0, np.int32)])
        data = save({"ids": ids, "offsets": offsets}, {"fingerprint": self.fingerprint})
        write_private(self.path(index), data)

    def load(self, index: int) -> list[np.ndarray] | None:
        """The outputs of a finished batch; None if it is not finished.

        Raises: InputError if the file is damaged or another job's.
        """
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise InputError(f"{path.name} holds text of another model or other prompts; delete it")
                ids, offsets = file.get_tensor("ids"), file.get_tensor("offsets")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path.name} in the folder of generated text cannot be read; delete it") from error
        return [ids[a:b] for a, b in itertools.pairwise(offsets)]
