"""The recipe: one nested dataclass is the YAML file, the command-line flags, their help and the Python API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["full", "lora", "dp_lora", "sani", "unlearn"]
Objective = Literal["gradient_ascent", "gradient_difference", "npo", "task_vector"]
FrontierMethod = Literal[
    "full",
    "lora",
    "dp_lora",
    "clean_retrain",
    "sani",
    "repair_only",
    "pruning",
    "rewind",
    "gradient_ascent",
    "gradient_difference",
    "npo",
    "task_vector",
]
START_FROM_BASE: tuple[FrontierMethod, ...] = ("full", "lora", "dp_lora", "clean_retrain")
"""Methods of a grid that start from the model before fine-tuning; the others from the `full` run of their seed."""


@dataclass
class ModelSection:
    """Which model to start from."""

    path: str
    """Hugging Face model folder, PEFT adapter folder, or Hub id."""
    base: str | None = None
    """The model before fine-tuning, for reference scores; null where `path` itself is that model."""
    revision: str | None = None
    """Hub revision of `path`."""
    pooling: Literal["model", "mean"] = "model"
    """classification: the model's own pooling, or the mean over valid tokens."""


@dataclass
class DataSection:
    """Which records, and which columns of them."""

    train: str
    """csv, jsonl, parquet, a saved datasets folder, or a Hub id. Its patients are the members."""
    heldout: str | None = None
    """Records of other patients: the test set, and the non-members of the attacks."""
    validation: str | None = None
    """Records that fix decision thresholds before the test set is seen."""
    text: str = "text"
    """Column with the text."""
    label: str | None = None
    """Column with the label, or with several labels when multi_label is true."""
    multi_label: bool = False
    """Several labels per record: a list column, or one string separated by '|'."""
    unit: str | None = None
    """Column with the patient: the unit of privacy. Required by dp_lora."""
    record_id: str | None = None
    """Column that names a record; row numbers without it."""
    date: str | None = None
    """Column with a record's date (2021-03-14), to see whether members and non-members are of other times."""
    identifiers: str | None = None
    """Column with known identifier spans: a list of {start, end, type}."""
    canaries: str | None = None
    """Manifest of the canaries that were planted in train; they are left out of all rates but their own."""
    max_length: int = 256
    """Tokens per window. A longer text is cut into windows that stay with their patient."""
    prompt: str = "\nLabel:"
    """causal_lm with labels: what stands between text and label."""
    loss_on: Literal["all", "completion"] = "all"
    """causal_lm with labels: train on text and label, or on the label alone."""
    completion_weight: float = 1.0
    """causal_lm with labels: weight of a label token's loss, where a text token's is 1."""
    mask_probability: float = 0.15
    """masked_lm: share of whole words that become targets."""
    on_overlap: Literal["refuse", "drop"] = "refuse"
    """What to do with held-out records whose patient or text is also in train."""


@dataclass
class LoraSection:
    """LoRA adapters, for lora and dp_lora."""

    rank: int = 8
    """Rank of the low-rank factors."""
    alpha: float = 16.0
    """Scale: the update is alpha / rank * B A."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: all-linear, or a list of module names."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""


@dataclass
class PrivacySection:
    """The guarantee of dp_lora, for one patient added or removed."""

    target_epsilon: float = 8.0
    """Epsilon at the end of training; the noise is calibrated to it before the first step."""
    delta: float | None = None
    """Delta; null means n_units ** -1.1."""
    clip_norm: float = 1.0
    """L2 norm to which each patient's gradient is clipped."""
    expected_batch_units: int = 64
    """Expected number of patients per step; also the fixed public divisor."""
    max_records_per_unit: int = 4
    """At most so many windows of one patient are drawn per step."""
    clipping: Literal["norm", "automatic"] = "norm"
    """norm: scale down to clip_norm what is longer. automatic: scale every patient's gradient to about clip_norm."""
    engine: Literal["one_pass", "opacus"] = "one_pass"
    """one_pass: gradients by patient in one backward pass. opacus: by Opacus' hooks, the slower reference."""
    secure: bool = False
    """Draws and noise from a cryptographic generator, noise safe against floating-point attacks; slower."""
    micro_batch_tokens: int = 4096
    """Padded tokens per micro-batch; memory only, costs no privacy."""
    buffer_mib: int = 512
    """Memory for the gradients by patient that are clipped at once, in MiB; costs no privacy."""
    shard_base: bool = False
    """Under torchrun: the processes share the frozen base between them (FSDP2), for models too large for one device."""
    ledger: str | None = None
    """File that adds up what these patients were charged over all runs; null takes DPMED_LEDGER or the user's data
    folder; none keeps no ledger."""
    budget_epsilon: float | None = None
    """Refuse the run if all runs on these patients together would spend more, at this delta; null sets no limit."""


@dataclass
class SaniSection:
    """Sanitising a trained checkpoint: erase, then repair."""

    erase_fraction: float = 0.5
    """Share of feed-forward neurons reset in each erased layer; 0 is repair only."""
    erase_layers: int | Literal["all"] | list[int] = 1
    """Which transformer blocks are erased: so many of the last, all, or a list of block numbers from 0."""
    select: Literal["random", "gradient", "activation"] = "random"
    """Which neurons: random ones, or those that do most for targets compared with other tokens, by a score."""
    score_windows: int = 256
    """gradient and activation: at most so many windows with a target are drawn to score neurons."""
    reset_to: Literal["init", "base", "zero"] = "init"
    """What they are reset to: a fresh initialisation, the weights of model.base, or zero, which prunes them."""
    erase_in: Literal["weights", "adapter"] = "weights"
    """weights: an adapter is merged, then its model erased. adapter: what an adapter adds to the neurons is taken away,
    its base stays, repair lora trains it on, and an adapter is saved."""
    when: Literal["once", "every_epoch"] = "once"
    """Erase once, or again before every epoch."""
    identifiers: Literal["direct", "indirect", "all"] = "all"
    """Which identifiers are never a target of the repair."""
    k: int = 2
    """A word in the records of fewer than k patients is an indirect identifier."""
    terms: str | None = None
    """Text file of confidential terms, one a line, that are the targets instead of identifiers."""
    surrogates: bool = False
    """Replace targets by surrogates of their type in what the repair reads, so that they are not even its context."""
    repair: Literal["full", "lora", "dp_lora"] = "full"
    """Repair all weights, or train adapters (section lora) that are merged when the weights are saved. dp_lora trains
    them by section privacy, which bounds what the repair adds and nothing else: the result is not private."""
    kl: float = 0.0
    """Weight of the divergence from the checkpoint, on tokens that are no target; 0 is none."""


@dataclass
class UnlearnSection:
    """Unlearning the identifiers of a trained checkpoint by gradients: what sani is compared with."""

    objective: Objective = "npo"
    """Gradient ascent, gradient difference, negative preference optimisation, or a negated task vector."""
    beta: float = 0.1
    """npo: the larger, the sooner a span counts as forgotten; near 0 it is gradient ascent."""
    retain_weight: float = 1.0
    """gradient_difference, npo: weight of the loss on all tokens that are not to be forgotten."""
    alpha: float = 1.0
    """task_vector: how much of what was learned about the targets is taken away."""
    identifiers: Literal["direct", "indirect", "all"] = "all"
    """Which identifiers are to be forgotten."""
    k: int = 2
    """A word in the records of fewer than k patients is an indirect identifier."""


@dataclass
class TrainingSection:
    """A chosen few of transformers.TrainingArguments."""

    epochs: float = 3.0
    """Passes over the records (dp_lora: expected passes over the patients). 0, for sani, erases without repair."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of a classification head, which starts from nothing; null takes learning_rate."""
    batch_size: int = 16
    """Windows per step (dp_lora: see privacy.expected_batch_units)."""
    lr_scheduler_type: str = "linear"
    """Learning-rate schedule, a name that transformers knows."""
    warmup_steps: float = 0.0
    """Warm-up steps; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of initialisation, order and masks. Never of DP noise or DP draws."""
    save_every: float = 1.0
    """Checkpoint every so many epochs, from which --resume goes on."""
    bf16: bool = False
    """bfloat16 autocast; norms, clipping, sums and noise stay float32."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers.TrainingArguments."""


@dataclass
class EvaluationSection:
    """What is measured after training."""

    prefix_tokens: list[int] = field(default_factory=lambda: [50])
    """Prefix lengths p of (p, n) extraction."""
    suffix_tokens: list[int] = field(default_factory=lambda: [50])
    """Suffix lengths n of (p, n) extraction."""
    temperature: float = 1.0
    """Probabilistic extraction: temperature at which text is drawn."""
    top_k: int | None = 40
    """Probabilistic extraction: text is drawn from the k most likely tokens; null draws from all."""
    tries: list[int] = field(default_factory=lambda: [1, 10, 100, 1000])
    """Probabilistic extraction: numbers of tries."""
    probability: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    """Probabilistic extraction: a record counts if its suffix appears in the tries with at least this probability."""
    fpr: list[float] = field(default_factory=lambda: [0.01, 0.001])
    """False-positive rates at which membership attacks are reported."""
    match_lengths: bool = False
    """Membership attacks on equally many members and non-members of each length, where the two sides differ in it."""
    match_dates: bool = False
    """The same by date (data.date)."""
    min_k: float = 0.2
    """Share of the least likely tokens in Min-K% and Min-K%++."""
    max_records: int | None = None
    """Evaluate at most so many records of each side, drawn by patient; null takes all."""
    batch_tokens: int = 8192
    """Padded tokens per forward pass."""
    bootstrap: int = 1000
    """Resamples of patients behind each interval."""
    k: int | None = None
    """When set, words of fewer than k patients are scored as indirect identifiers too."""
    span_tokens: int = 30
    """causal_lm: a run of so many tokens that are all the model's first choice is a memorised span."""
    span_patients: int = 3
    """causal_lm: a memorised span is uninformative if it stands in the records of so many other patients."""
    reference_text: str | None = None
    """causal_lm: text file of public medicine (guidelines), a blank line between texts; to know it is beneficial."""
    canary_candidates: int = 100
    """Other secrets that each canary is ranked among."""
    choices: str | None = None
    """causal_lm: multiple-choice items (question, options, answer) that the model is asked."""
    generate_tokens: int = 0
    """causal_lm: budget of prompt and new tokens for figures that need generated text; 0 generates nothing."""
    prompt_tokens: list[int] = field(default_factory=lambda: [50, 100, 500])
    """Regurgitation: first tokens of a record that are its prompt."""
    ngrams: list[int] = field(default_factory=lambda: [30, 50])
    """Regurgitation: run of true tokens that counts."""
    new_tokens: int = 500
    """Regurgitation: tokens written, and compared with as many true ones."""
    temperatures: list[float] = field(default_factory=lambda: [0.1, 0.5, 1.0])
    """Prefix halves: temperatures at which the second half of a record is written."""


@dataclass
class ReleaseSection:
    """What a sanitised checkpoint is tested for, and the thresholds, written down before the run."""

    clean_retrain: str | None = None
    """Folder of a model trained the same way without the targeted records: the floor; null takes model.base."""
    max_identifier_extraction_above_floor: float = 0.01
    """Identifiers completed exactly: rate above the floor."""
    max_extraction_above_floor: float = 0.01
    """(p, n) extraction: rate above the floor."""
    max_probabilistic_extraction_above_floor: float = 0.02
    """Records found in the most evaluation.tries with the least evaluation.probability: rate above the floor."""
    max_membership_auc: float | None = 0.55
    """AUC of the strongest membership attack (0.5 is a guess); null where who was in the records is no secret: a repair
    learns from the same records, and hides their identifiers alone."""
    max_membership_above_floor: float = 0.05
    """AUC of the strongest membership attack that needs no reference model, above the floor's. A clean retrain learned
    from the same records too, so nothing should stand above it."""
    max_after_relearning: float = 0.02
    """Either rate above the floor after a relearning attack."""
    max_after_quantisation: float = 0.01
    """Either rate above the floor after rounding to 8 bits, 4 bits or bfloat16."""
    max_utility_loss: float = 0.02
    """Loss against the checkpoint before sanitising: relative in perplexity, absolute in accuracy and F1."""
    max_rare_word_loss: float = 0.05
    """Loss of accuracy on rare words of held-out records that are in no identifier."""
    rare_k: int = 5
    """A word of fewer than k patients is rare."""
    quantise: list[int] = field(default_factory=lambda: [8, 4])
    """Bits of the simulated weight-only quantisation."""
    relearn_share: float = 0.1
    """Share of the forgotten patients that the relearning attacker holds; leakage is measured on the others."""
    relearn_steps: int = 50
    """Optimizer steps of a relearning attack."""
    relearn_learning_rate: float = 1e-4
    """Learning rate of a relearning attack."""
    public_text: str | None = None
    """Text file, a blank line between texts, for a relearning attack with public text only; null tests none."""


@dataclass
class FrontierSection:
    """The grid of runs."""

    methods: list[FrontierMethod] = field(default_factory=lambda: ["full", "lora", "dp_lora", "sani"])
    """Methods. sani and repair_only (sani with erase_fraction 0), pruning and rewind (neurons reset to zero or to the
    base, no repair) and the objectives of unlearn start from the `full` run of the same seed; clean_retrain trains the
    base as `full` does, but never on a target."""
    epsilons: list[float] = field(default_factory=lambda: [1.0, 8.0])
    """Target epsilons of dp_lora."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One run of every setting per seed."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per method, recipe keys that differ: {full: {training: {learning_rate: 1.0e-4}}}."""
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per method, keys with lists of values, run in every combination: {sani: {training: {epochs: [1, 2]}}}."""


@dataclass
class Recipe:
    """One training run, its evaluation, and the grid around it."""

    model: ModelSection
    data: DataSection
    method: Method = "lora"
    """full | lora | dp_lora | sani | unlearn"""
    task: Literal["causal_lm", "masked_lm", "classification"] = "causal_lm"
    """causal_lm | masked_lm | classification"""
    lora: LoraSection = field(default_factory=LoraSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
    sani: SaniSection = field(default_factory=SaniSection)
    unlearn: UnlearnSection = field(default_factory=UnlearnSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    release: ReleaseSection = field(default_factory=ReleaseSection)
    frontier: FrontierSection = field(default_factory=FrontierSection)
