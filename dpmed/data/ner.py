"""Identifiers that a named-entity model finds: opt-in, and only with a model that lies in a local folder.

Nothing is fetched, no code of the folder is run, and only safetensors weights are read. What a model finds is a guess:
its spans have the source "ner" and stay out of headline figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline

from dpmed.data.identifier_types import canonical_type
from dpmed.data.identifiers import Span, resolved_spans
from dpmed.errors import InputError

_WORD_PART = re.compile(r"[\w\u0300-\u036f]")
_WIDEST_STRIDE = 64


class EntityTagger:
    """A token-classification model of a folder, ready to tag texts.

    Args:
        folder: what `save_pretrained` of model and tokenizer left: config.json, safetensors weights, a fast tokenizer.
            Its labels (BIO or plain) name types, see `canonical_type`.
        batch_size: windows per forward pass.

    Raises: InputError, in one line, if the folder holds no such model.
    """

    def __init__(self, folder: str | Path, *, batch_size: int = 16) -> None:
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"{folder}: no model folder (no config.json): name the folder of a token-classification model"
            )
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{folder}: holds no safetensors weights: save the model again as safetensors")
        model, tokenizer = _load(path)
        tokenizer.model_max_length = _window(model, tokenizer)
        self._batch_size = batch_size
        self._tag = TokenClassificationPipeline(
            model=model,
            tokenizer=tokenizer,
            aggregation_strategy="simple",
            stride=min(_WIDEST_STRIDE, tokenizer.model_max_length // 4),
            device=0 if torch.cuda.is_available() else -1,
        )

    def spans(self, texts: Sequence[str]) -> list[list[Span]]:
        """The entities of each text, whole words each, as spans of source "ner", sorted, none overlapping.

        A text longer than the model's window is read in overlapping windows.
        """
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of like length share a batch
        found: Any = self._tag([texts[row] for row in order], batch_size=self._batch_size) if order else []
        result: list[list[Span]] = [[] for _ in texts]
        for row, entities in zip(order, found, strict=True):
            spans = [_span(texts[row], entity) for entity in entities]
            result[row] = resolved_spans(texts[row], [span for span in spans if span is not None])
        return result


def _load(path: Path) -> tuple[Any, Any]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = AutoModelForTokenClassification.from_pretrained(
            path, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a token-classification model ({type(error).__name__}): save model and "
            "tokenizer with save_pretrained"
        ) from None
    if info["missing_keys"]:
        raise InputError(f"{path}: its weights hold no token-classification head: name a model that tags entities")
    if all(str(label).startswith("LABEL_") for label in model.config.id2label.values()):
        raise InputError(
            f"{path}: its labels have no names (id2label of config.json): name them after identifier types"
        )
    if not tokenizer.is_fast:
        raise InputError(f"{path}: its tokenizer gives no character offsets: save a fast tokenizer (tokenizer.json)")
    return model.eval(), tokenizer


def _window(model: Any, tokenizer: Any) -> int:
    """Tokens that the model reads at once. RoBERTa's positions begin behind its padding token."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    if "roberta" in model.config.model_type:
        positions -= (model.config.pad_token_id or 0) + 1
    return min(int(tokenizer.model_max_length), int(positions))


def _span(text: str, entity: dict[str, Any]) -> Span | None:
    """The entity widened to whole words; None if it holds no letter or digit."""
    start, end = entity["start"], entity["end"]
    while start < end and not _WORD_PART.match(text[start]):
        start += 1
    while end > start and not _WORD_PART.match(text[end - 1]):
        end -= 1
    if start == end:
        return None
    while start and _WORD_PART.match(text[start - 1]):
        start -= 1
    while end < len(text) and _WORD_PART.match(text[end]):
        end += 1
    return {"start": start, "end": end, "type": canonical_type(entity["entity_group"]), "source": "ner"}
