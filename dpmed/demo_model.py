"""The base model of `dpmed demo`: a tokenizer and a tiny causal LM, made on the spot from the public hospital.

It knows how notes are written and how findings go together, and no private patient. Made once per machine and settings,
then found again in the user's cache. The folder is an ordinary Hugging Face one: it loads with plain transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dpmed.data import hospital, hospital_text

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from dpmed.data.batches import Batch

_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")
_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_PAD_ID, _BOS_ID, _EOS_ID = 0, 1, 2  # the tokenizer numbers the special tokens first, in this order


@dataclass(frozen=True)
class DemoModelSettings:
    """Everything that decides what the demo's base model is; part of the name of its cache folder."""

    seed: int = 0
    n_public_patients: int = 1500
    vocab_size: int = 1400
    hidden_size: int = 128
    n_layers: int = 2
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 4e-3
    impression_weight: float = 10.0
    max_position: int = 256


def demo_base_model(
    cache_dir: Path | None = None,
    *,
    seed: int = 0,
    n_public_patients: int = DemoModelSettings.n_public_patients,
    vocab_size: int = DemoModelSettings.vocab_size,
    hidden_size: int = DemoModelSettings.hidden_size,
    n_layers: int = DemoModelSettings.n_layers,
    epochs: int = DemoModelSettings.epochs,
) -> Path:
    """The folder of the demo's base model, trained on the public hospital unless the cache has it.

    Args:
        cache_dir: where the model folder is kept; by default `dpmed` in the user's cache (XDG_CACHE_HOME, ~/.cache).
        seed: of the public hospital, the initial weights and the order of the notes.
        n_public_patients: patients of the public hospital, about three notes each.
        vocab_size: most tokens of the tokenizer.
        hidden_size: width of the model, a multiple of 8.
        n_layers: transformer blocks.
        epochs: passes over the public notes.

    Returns: a folder with a LlamaForCausalLM and a PreTrainedTokenizerFast.
    Guarantee: the folder appears complete or not at all, also when two processes make it at once.
    """
    settings = DemoModelSettings(
        seed=seed,
        n_public_patients=n_public_patients,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        n_layers=n_layers,
        epochs=epochs,
    )
    cache_dir = cache_dir or _user_cache()
    folder = cache_dir / f"demo-{_fingerprint(settings)}"
    if _is_complete(folder):
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename stays on one file system and is atomic.
    temporary = Path(tempfile.mkdtemp(prefix=".demo-", dir=cache_dir))
    try:
        _make(settings, temporary)
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpmed"


def _fingerprint(settings: DemoModelSettings) -> str:
    """Of the settings, the version, and the code that writes the notes: a model from other notes is another model."""
    try:
        version = metadata.version("dpmed")
    except metadata.PackageNotFoundError:
        version = "source"
    digest = hashlib.sha256(json.dumps([asdict(settings), version], sort_keys=True).encode())
    for source in (hospital.__file__, hospital_text.__file__, __file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


def _move_into_place(temporary: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)  # somebody deleted a part of it: a rename needs an empty place
    try:
        os.replace(temporary, folder)
    except OSError:
        if not _is_complete(folder):  # else another process was first, with the same model
            raise


def _make(settings: DemoModelSettings, folder: Path) -> None:
    texts = hospital.make_hospital(n_patients=settings.n_public_patients, seed=settings.seed, public=True)["text"]
    tokenizer = demo_tokenizer(list(texts), vocab_size=settings.vocab_size, max_length=settings.max_position)
    model = _pretrained(tokenizer, list(texts), settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demo_tokenizer(texts: list[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits, so that an identifier is several tokens.

    Guarantee: the offsets of a text's tokens cover it without gap or overlap; no special token is added.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # a token's offsets include its leading space
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=max_length
    )


def _pretrained(tokenizer: PreTrainedTokenizerFast, texts: list[str], settings: DemoModelSettings) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpmed.data.batches import per_record_loss
    from dpmed.data.tasks import TaskSpec

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings.max_position,
        bos_token_id=_BOS_ID,
        eos_token_id=_EOS_ID,
        pad_token_id=_PAD_ID,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    batches = list(_batches(tokenizer, texts, settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, len(batches))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        per_record_loss(logits, batch, TaskSpec()).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _schedule(step: int, n_steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine down to a twentieth."""
    warm_up = max(1, n_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))


def _batches(tokenizer: PreTrainedTokenizerFast, texts: list[str], settings: DemoModelSettings) -> Iterator[Batch]:
    """Right-padded input_ids, attention_mask, targets and weights, [b, t]: all epochs, notes of like length together.

    The impression counts more than its share of the tokens: it is what makes the model read the findings.
    """
    import torch

    rng = random.Random(settings.seed)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    findings = [
        sum(start < text.index(hospital_text.IMPRESSION) for start, _ in offsets)
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]
    for _ in range(settings.epochs):
        # Every other note opens with the start token, so that the model takes notes with and without it.
        notes = [
            ([_BOS_ID] * bos + ids + [_EOS_ID], n + bos)
            for ids, n, bos in zip(encoded["input_ids"], findings, (rng.randrange(2) for _ in texts), strict=False)
        ]
        notes.sort(key=lambda note: (len(note[0]), rng.random()))
        batches = [notes[i : i + settings.batch_size] for i in range(0, len(notes), settings.batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            ids = [torch.tensor(note[: settings.max_position]) for note, _ in batch]
            weights = [torch.ones(len(row)) for row in ids]
            for row, (_, n) in zip(weights, batch, strict=True):
                row[n:] = settings.impression_weight
            input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=_PAD_ID)
            padded = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)  # 0 where there is padding
            yield {
                "input_ids": input_ids,
                "attention_mask": (padded > 0).long(),
                "targets": input_ids,
                "weights": padded,
            }
