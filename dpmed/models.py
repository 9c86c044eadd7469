"""Models in and out: any Hugging Face folder or PEFT adapter, the task card beside it, and a mean-pooling classifier.

A saved model or adapter carries `dpmed_task.json` (labels, prompt, pooling, thresholds), so that `dpmed evaluate`
reads it as it was trained. Everything else in the folder is plain transformers / peft.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dpmed.data.tasks import TaskSpec
from dpmed.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_CARD = "dpmed_task.json"


class MeanPoolingConfig(PreTrainedConfig):
    """Configuration of `MeanPoolingClassifier`: the backbone's own configuration, nested."""

    model_type = "dpmed_mean_pooling"

    def __init__(self, backbone: dict[str, Any] | None = None, **kwargs: Any) -> None:  # transformers' own protocol
        self.backbone = backbone or {}
        super().__init__(**kwargs)


class MeanPoolingClassifier(PreTrainedModel):
    """A backbone, the mean over its valid tokens, and one linear layer.

    For encoders that were trained with mean pooling (sentence encoders), whose [CLS] vector says little.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MeanPoolingConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            nested = dict(config.backbone)
            backbone = AutoModel.from_config(AutoConfig.for_model(nested.pop("model_type"), **nested))
        body: Any = backbone
        if getattr(body, "pooler", None) is not None:
            body.pooler = None  # it would never receive a gradient
        self.backbone = body
        self.classifier = nn.Linear(body.config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "classifier", None):
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Logits [b, labels] for input_ids, attention_mask [b, t]."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [b, t, d]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)  # [b, d]
        return SequenceClassifierOutput(logits=self.classifier(pooled))  # pyright: ignore[reportArgumentType]


AutoConfig.register(MeanPoolingConfig.model_type, MeanPoolingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier, exist_ok=True)


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder, or of a Hub id.

    Raises: InputError if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {path}: pass a Hugging Face model folder or Hub id") from error


def load_model(path: str | Path, spec: TaskSpec, *, revision: str | None = None, merge: bool = False) -> nn.Module:
    """Load a model folder, a Hub id or a PEFT adapter for a task, float32, on the CPU.

    Args:
        path: folder or Hub id. A folder with `adapter_config.json` is loaded on top of the base model that it names.
        spec: the task; its labels and pooling shape the head where the checkpoint has none.
        revision: Hub revision.
        merge: fold an adapter into its base and return a plain model.

    Raises: InputError if there is no model, or its weights are not safetensors.
    """
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        if not (Path(path) / "adapter_model.safetensors").is_file():  # peft would fall back to a pickle
            raise InputError(f"{path} holds an adapter without safetensors weights: save it again as safetensors")
        base_path = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = load_model(base_path, spec, revision=revision)
        model = PeftModel.from_pretrained(base, str(path), use_safetensors=True)
        return model.merge_and_unload() if merge else model  # pyright: ignore[reportCallIssue]
    try:
        return _load_plain(str(path), spec, revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no {spec.kind} model with safetensors weights at {path}: pass a Hugging Face model folder, a PEFT adapter"
            " folder, or a Hub id while online"
        ) from error


def _load_plain(path: str, spec: TaskSpec, revision: str | None) -> nn.Module:
    options: dict[str, Any] = {"revision": revision or "main", "use_safetensors": True, "dtype": torch.float32}
    if spec.kind == "causal_lm":
        return _with_fresh_modules(AutoModelForCausalLM, path, options)
    if spec.kind == "masked_lm":
        return _with_fresh_modules(AutoModelForMaskedLM, path, options)
    config = AutoConfig.from_pretrained(path, revision=revision or "main")
    if spec.pooling == "mean" and not isinstance(config, MeanPoolingConfig):
        backbone = AutoModel.from_pretrained(path, **options)
        nested = MeanPoolingConfig(backbone=backbone.config.to_dict(), num_labels=len(spec.labels), name_or_path=path)
        return MeanPoolingClassifier(nested, backbone)  # an adapter on it names `path` as its base
    model = _with_fresh_modules(AutoModelForSequenceClassification, path, {**options, "num_labels": len(spec.labels)})
    if not isinstance(model, MeanPoolingClassifier) and model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id  # decoders pool at the last token that is not padding
    return model


def _with_fresh_modules(auto: Any, path: str, options: dict[str, Any]) -> Any:
    """Load a model and note on it which modules the checkpoint did not hold, for `fresh_modules`."""
    model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    model.dpmed_fresh_modules = sorted({name.rpartition(".")[0] for name in info["missing_keys"]})
    return model


def fresh_modules(model: nn.Module) -> list[str]:
    """Names of the modules that `load_model` had to initialise at random: a new head, a pooler.

    An adapter must hold them in full: the next load of the base model would draw other values.
    """
    return list(getattr(model, "dpmed_fresh_modules", []))


def write_task_card(folder: Path, spec: TaskSpec) -> None:
    """Put the task card beside the weights."""
    (folder / TASK_CARD).write_text(json.dumps(spec.to_dict(), indent=1) + "\n", encoding="utf-8")


def read_task_card(folder: str | Path) -> TaskSpec | None:
    """The task card of a model or adapter folder; None for a model that dpmed did not write."""
    card = Path(folder) / TASK_CARD
    return TaskSpec.from_dict(json.loads(card.read_text(encoding="utf-8"))) if card.is_file() else None


def with_thresholds(spec: TaskSpec, thresholds: tuple[float, ...] | None) -> TaskSpec:
    """The same task with its decision thresholds fixed."""
    return replace(spec, thresholds=thresholds)
