"""What every method promises, one suite for all: it trains, saves plain safetensors, loads again, and tells no text."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, TrainerControl

import tiny_models
from dpmed.data.records import load_records
from dpmed.data.tasks import TaskKind, TaskSpec, encode
from dpmed.errors import InputError
from dpmed.models import TASK_CARD, load_model, load_tokenizer, read_task_card
from dpmed.privacy.plan import PrivacyPlan
from dpmed.trainers import METHODS
from dpmed.trainers.base import DpmedTrainer, MetricsFile
from dpmed.trainers.lora import lora_config

MARKER = "Zanzibarius Quokkenfels"  # planted in every text; no file may hold it
LABELS = ("acute", "chronic", "none")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}
# name of the case -> architecture, task, with labels, several labels, pooling
CASES: dict[str, tuple[tiny_models.Kind, TaskKind, bool, bool, Any]] = {
    "causal": ("llama", "causal_lm", False, False, "model"),
    "causal with label": ("gpt2", "causal_lm", True, False, "model"),
    "masked": ("bert", "masked_lm", False, False, "model"),
    "classification, encoder": ("bert", "classification", True, False, "model"),
    "classification, decoder": ("llama", "classification", True, False, "model"),
    "several labels": ("albert", "classification", True, True, "model"),
    "several labels, mean pooling": ("bert", "classification", True, True, "mean"),
}
SUPPORTED = [
    pytest.param(method, case, id=f"{method}-{case}")
    for method in METHODS
    for case in CASES
    if not (method in ("sani", "unlearn") and CASES[case][1] == "classification")
]
AUTO: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
}


def make_records(*, label: bool, multi_label: bool) -> Dataset:
    texts = [f"The patient {MARKER} has fever {i}" + " and cough" * (i % 3) for i in range(8)]
    span = {"start": 12, "end": 12 + len(MARKER), "type": "NAME", "source": "known"}
    columns: dict[str, Any] = {"text": texts, "unit": [f"p{i // 2}" for i in range(8)], "identifiers": [[span]] * 8}
    if label:
        columns["label"] = [[LABELS[i % 3], "none"][: i % 3] if multi_label else LABELS[i % 3] for i in range(8)]
    return Dataset.from_dict(columns)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models on disk, as an adapter needs its base to load again."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("bert", "albert", "gpt2", "llama"):
        tiny_models.make_model(kind).save_pretrained(folder / kind)
        tiny_models.make_tokenizer().save_pretrained(folder / kind)
    return folder


def make_trainer(method: str, case: str, bases: Path, folder: Path, **changes: Any) -> DpmedTrainer:
    kind, task, label, multi_label, pooling = CASES[case]
    spec = TaskSpec(
        kind=task,
        labels=LABELS if label else (),
        multi_label=multi_label,
        max_length=64,
        pooling=pooling,
        completion_weight=2.0 if task == "causal_lm" and label else 1.0,
    )
    torch.manual_seed(0)
    model: Any = load_model(bases / kind, spec)
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "unit_column": "unit",
        "label_column": "label" if label else None,
        "max_steps": 2,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer, config = METHODS[method]
    options: dict[str, Any] = {"spec": spec, "processing_class": tiny_models.make_tokenizer()}
    if method in ("lora", "dp_lora"):
        options["peft_config"] = lora_config(model, task, rank=2, alpha=4, target_modules="all-linear", dropout=0.0)
    if method == "dp_lora":
        options["plan"] = PrivacyPlan(
            unit="patient",
            n_units=4,
            expected_batch_units=3,
            max_records_per_unit=2,
            clip_norm=1.0,
            noise_multiplier=1.0,
            n_steps=2,
            delta=1e-3,
        )
    args = config(**{**values, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on Conv1D
        return trainer(model, args, make_records(label=label, multi_label=multi_label), **options)


def trainable(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def logits_of(model: Any, trainer: DpmedTrainer) -> Tensor:
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def files_with(folder: Path, *needles: str) -> list[str]:
    """Files that hold one of the strings, as UTF-8 or UTF-16."""
    codes = [needle.encode(code) for needle in needles for code in ("utf-8", "utf-16-le")]
    return [path.name for path in files_under(folder) if any(code in path.read_bytes() for code in codes)]


@pytest.mark.parametrize(("method", "case"), SUPPORTED)
def test_it_trains_saves_loads_again_and_tells_no_text(
    method: str, case: str, bases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(method, case, bases, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    trainer.add_callback(MetricsFile(metrics))
    before = trainable(trainer.model)
    trainer.train()
    saved = trainer.save_weights(tmp_path / "weights")

    assert trainer.state.global_step == 2
    moved = [not torch.equal(a, b) for a, b in zip(before, trainable(trainer.model), strict=True)]
    assert sum(moved) > len(moved) / 3
    assert all(bool(torch.isfinite(p).all()) for p in trainable(trainer.model))

    assert [f.name for f in files_under(saved) if f.suffix in PICKLES] == []
    assert any(f.suffix == ".safetensors" for f in files_under(saved))
    assert not (saved / "README.md").exists()
    assert read_task_card(saved) == trainer.spec

    again = load_model(saved, trainer.spec)
    same_batch = lambda: torch.manual_seed(5)  # masked words are drawn anew at each collation  # noqa: E731
    same_batch()
    expected = logits_of(trainer.model, trainer)
    same_batch()
    assert torch.equal(logits_of(again, trainer), expected)
    assert load_tokenizer(saved).get_vocab() == tiny_models.make_tokenizer().get_vocab()

    assert files_under(tmp_path / "run")  # a checkpoint was written, and is searched too
    assert files_with(tmp_path, *MARKER.split()) == []
    assert not any(word in json.dumps(trainer.state.log_history, default=str) for word in MARKER.split())
    output = capfd.readouterr()
    assert not any(word in output.out + output.err for word in MARKER.split())

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines][:2] == [1, 2]
    assert all(isinstance(value, int | float) for line in lines for value in line.values())
    assert all(("loss" in line) == (method != "dp_lora") for line in lines[:2])


def test_the_search_for_text_sees_a_planted_leak(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.json").write_text(json.dumps({"note": f"about {MARKER}"}))
    (tmp_path / "b.bin").write_bytes(b"\x00" + MARKER.split()[0].encode("utf-16-le"))
    assert sorted(files_with(tmp_path, *MARKER.split())) == ["a.json", "b.bin"]


@pytest.mark.parametrize("case", ["causal", "masked", "classification, encoder"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_transformers_and_peft_load_what_was_saved(method: str, case: str, bases: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    kind, task, label, _, _ = CASES[case]
    trainer = make_trainer(method, case, bases, tmp_path, save_strategy="no")
    trainer.train()
    saved = trainer.save_weights(tmp_path / "weights")
    more = {"num_labels": 3} if label else {}
    if method == "full":
        plain = AUTO[task].from_pretrained(saved, **more)
    else:
        plain = PeftModel.from_pretrained(AUTO[task].from_pretrained(bases / kind, **more), str(saved))
    torch.manual_seed(5)
    expected = logits_of(trainer.model, trainer)
    torch.manual_seed(5)
    assert torch.equal(logits_of(plain, trainer), expected)


@pytest.mark.parametrize(
    ("method", "case"),
    [case for case in SUPPORTED if case.values[1] in ("causal", "masked", "classification, encoder")],
)
def test_training_lowers_the_loss(method: str, case: str, bases: Path, tmp_path: Path) -> None:
    """Twenty steps on eight records; DP with all patients and no noise, which may win on so few."""
    changes: dict[str, Any] = {"save_strategy": "no", "max_steps": 20}
    if case == "classification, encoder":  # a random backbone under a random head learns slowly
        slow = {"full": {"max_steps": 60, "learning_rate": 2e-3}, "lora": {"max_steps": 80, "learning_rate": 1e-2}}
        changes |= slow.get(method, {"learning_rate": 3e-2})
    trainer = make_trainer(method, case, bases, tmp_path, **changes)
    if method == "dp_lora":
        plan = trainer.plan  # pyright: ignore[reportAttributeAccessIssue]
        same = replace(plan, noise_multiplier=0.0, clip_norm=math.inf, n_steps=20, expected_batch_units=4)
        trainer.plan = same  # type: ignore[attr-defined]
        trainer._noise = trainer.plan.noise()  # type: ignore[attr-defined]
        trainer.args.max_steps = 20

    def loss() -> float:
        torch.manual_seed(1)
        trainer.model.eval()
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))))

    before = loss()
    trainer.train()
    assert loss() < before - 0.05


def test_records_given_with_their_own_column_names_need_no_spec(tmp_path: Path) -> None:
    records = Dataset.from_dict({"note": ["fever", "cough", "fever"], "dx": ["a", "b", "a"], "pid": ["1", "2", "1"]})
    trainer, config = METHODS["full"]
    args = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        task="classification",
        text_column="note",
        label_column="dx",
        unit_column="pid",
        max_steps=1,
    )
    model = tiny_models.make_model("bert", "classification", num_labels=2)
    made = trainer(model, args, records, processing_class=tiny_models.make_tokenizer())
    assert made.spec.labels == ("a", "b")
    assert made.train_dataset.unit_names == ["1", "2"]
    made.train()
    assert made.state.global_step == 1


def test_held_out_loss_is_logged_as_a_number(tmp_path: Path, bases: Path) -> None:
    trainer = make_trainer("full", "causal", bases, tmp_path, save_strategy="no")
    heldout = make_records(label=False, multi_label=False)
    trainer.eval_dataset = encode(heldout, tiny_models.make_tokenizer(), trainer.spec)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_the_task_card_stands_beside_the_weights(tmp_path: Path, bases: Path) -> None:
    trainer = make_trainer("full", "causal with label", bases, tmp_path, save_strategy="no")
    saved = trainer.save_weights(tmp_path / "weights")
    card = json.loads((saved / TASK_CARD).read_text(encoding="utf-8"))
    assert (card["kind"], card["labels"], card["completion_weight"]) == ("causal_lm", list(LABELS), 2.0)
    assert saved.stat().st_mode & 0o077 == 0  # the owner's alone


def test_encoded_records_need_their_task(tmp_path: Path) -> None:
    tokenizer = tiny_models.make_tokenizer()
    records = load_records(make_records(label=False, multi_label=False))
    encoded = encode(records, tokenizer, TaskSpec(kind="causal_lm", max_length=64))
    trainer, config = METHODS["full"]
    with pytest.raises(InputError, match="spec="):
        trainer(
            tiny_models.make_model("gpt2"),
            config(output_dir=str(tmp_path), use_cpu=True),
            encoded,
            processing_class=tokenizer,
        )


def test_a_task_with_labels_needs_their_column(tmp_path: Path, bases: Path) -> None:
    """With several labels, all targets would silently be zero."""
    for case in ("several labels", "causal with label"):
        with pytest.raises(InputError, match="label_column"):
            make_trainer("full", case, bases, tmp_path, label_column=None)


@pytest.mark.parametrize("method", ["full", "lora", "dp_lora"])
def test_a_head_may_learn_at_its_own_rate(method: str, tmp_path: Path, bases: Path) -> None:
    case = "several labels, mean pooling"
    trainer = make_trainer(method, case, bases, tmp_path, learning_rate=1e-4, head_learning_rate=5e-2)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert {rate for name, rate in rates.items() if "classifier" in name} == {5e-2}
    assert {rate for name, rate in rates.items() if "classifier" not in name} == {1e-4}


def test_a_head_rate_without_a_head_is_refused(tmp_path: Path, bases: Path) -> None:
    trainer = make_trainer("full", "causal", bases, tmp_path, head_learning_rate=5e-2)
    with pytest.raises(InputError, match="no classification head"):
        trainer.create_optimizer()


def test_a_tokenizer_is_required(tmp_path: Path) -> None:
    trainer, config = METHODS["full"]
    with pytest.raises(InputError, match="processing_class"):
        trainer(
            tiny_models.make_model("gpt2"),
            config(output_dir=str(tmp_path), use_cpu=True),
            make_records(label=False, multi_label=False),
        )


def test_lora_without_adapters_is_refused(tmp_path: Path) -> None:
    trainer, config = METHODS["lora"]
    with pytest.raises(InputError, match="peft_config"):
        trainer(
            tiny_models.make_model("gpt2"),
            config(output_dir=str(tmp_path), use_cpu=True),
            make_records(label=False, multi_label=False),
            processing_class=tiny_models.make_tokenizer(),
        )


def test_the_metrics_file_keeps_numbers_only(tmp_path: Path) -> None:
    args = METHODS["full"][1](output_dir=str(tmp_path), use_cpu=True)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    state: Any = type("State", (), {"global_step": 4})()
    metrics.on_log(args, state, TrainerControl(), {"loss": 0.5, "note": MARKER, "sample": [MARKER], "n": 3})  # type: ignore[dict-item]
    metrics.on_log(args, state, TrainerControl(), None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 4, "loss": 0.5, "n": 3}, {"step": 4}]
