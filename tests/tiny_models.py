"""Two-layer models and a tokenizer, made in-process: no test downloads or ships a checkpoint."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["bert", "albert", "gpt2", "llama", "qwen2"]
Head = Literal["causal_lm", "masked_lm", "classification"]

KINDS: tuple[Kind, ...] = ("bert", "albert", "gpt2", "llama", "qwen2")
ENCODERS: tuple[Kind, ...] = ("bert", "albert")
DECODERS: tuple[Kind, ...] = ("gpt2", "llama", "qwen2")

HIDDEN = 32
LAYERS = 2
MAX_POSITIONS = 128

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# Made up; only its letter pairs matter.
TEXT = (
    "The patient was admitted on 3 March with fever and cough. Chest radiograph showed no effusion.",
    "Mrs Example, 64 years old, takes metformin 500 mg twice a day and lisinopril 10 mg in the morning.",
    "She was discharged home in stable condition. Follow-up with the cardiologist in two weeks.",
    "Impression: no acute cardiopulmonary abnormality. The heart is normal in size. The lungs are clear.",
)


def make_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with pad, unk, bos, eos, cls, sep and mask tokens.

    Guarantee: any text survives encode and decode unchanged; nothing is added around a text; padding on the right.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False, **SPECIAL
    )


@functools.cache
def _tokens() -> tuple[int, dict[str, int]]:
    """Return vocabulary size and the ids that configs name, of the default tokenizer."""
    tokenizer = make_tokenizer()
    names = {"pad_token_id": "[PAD]", "bos_token_id": "[BOS]", "eos_token_id": "[EOS]"}
    vocabulary = tokenizer.get_vocab()
    return len(tokenizer), {key: vocabulary[token] for key, token in names.items()}


def make_config(kind: Kind, **changes: Any) -> transformers.PreTrainedConfig:
    """Return the config of a tiny model: 2 layers, hidden 32, 2 heads, 128 positions, no dropout."""
    vocab_size, ids = _tokens()
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    common = {"vocab_size": vocab_size, "max_position_embeddings": MAX_POSITIONS, **ids}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    match kind:
        case "bert":
            return transformers.BertConfig(**{**common, **shape, **still, **changes})
        case "albert":
            return transformers.AlbertConfig(
                **{**common, **shape, **still, "embedding_size": 16, "classifier_dropout_prob": 0.0, **changes}
            )
        case "gpt2":
            still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
            sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": MAX_POSITIONS}
            return transformers.GPT2Config(**{"vocab_size": vocab_size, **ids, **sizes, **still, **changes})
        case "llama":
            return transformers.LlamaConfig(**{**common, **shape, "num_key_value_heads": 2, **changes})
        case "qwen2":
            return transformers.Qwen2Config(**{**common, **shape, "num_key_value_heads": 2, **changes})
    raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")


def make_model(kind: Kind, head: Head | None = None, *, num_labels: int = 3, seed: int = 0, **changes: Any):
    """Return a freshly initialised tiny model in evaluation mode.

    Args:
        kind: the architecture.
        head: default: masked_lm for encoders, causal_lm for decoders.
        num_labels: classes, for the classification head.
        seed: equal seeds give equal weights; the global random state is left as it was.
        changes: config fields to set otherwise, as `num_hidden_layers=1`.
    Raises: ValueError if the architecture has no such head.
    """
    head = head or ("masked_lm" if kind in ENCODERS else "causal_lm")
    if (head == "causal_lm" and kind in ENCODERS) or (head == "masked_lm" and kind in DECODERS):
        raise ValueError(f"{kind} has no {head} head here")
    if head == "classification":
        changes = {"num_labels": num_labels, **changes}
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "masked_lm": transformers.AutoModelForMaskedLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(make_config(kind, **changes))
    return model.eval()
