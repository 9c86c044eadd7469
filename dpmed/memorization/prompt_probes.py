"""What a model writes after prompts that ask for identifiers, in the wording of the records and in other words.

A part of `generation_figures` for whoever needs no more: the whole budget of tokens goes to prompts for identifiers.
Besides the true context and the templates, both are asked again in other words (`paraphrase`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import nn

from dpmed.memorization.generated_figures import NO_VALUES, run_job
from dpmed.memorization.generation import context_size, start_tokens
from dpmed.memorization.generation_plan import (
    GenerationSettings,
    Job,
    Side,
    context_room,
    targeted_job,
    template_job,
    text_ids,
    tokenised_side,
    within_budget,
)
from dpmed.memorization.intervals import NotApplicable
from dpmed.memorization.leak_probes import (
    context_prompts,
    decoy_values,
    identifier_values,
    leak_figures,
    leaked_values,
    templates,
)
from dpmed.memorization.paraphrase import paraphrased_contexts, paraphrased_templates
from dpmed.memorization.statistics import weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("context", "paraphrased", "templates", "paraphrased_templates")
NO_CONTEXT = "no known identifier with text in front of it; name data.identifiers"
NO_RULE = "no rule changes a prompt"


def prompt_figures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    members: Dataset,
    others: Dataset,
    settings: GenerationSettings,
    *,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Share of identifier values that the model writes after each kind of prompt.

    Args: as in `generation_figures`. Lengths and samples of `settings` that concern other probes are not read.

    Returns: figures {"memorization": {probe: {"rate": ...}}, "heldout": ...} with `PROBES`, as in
        `identifier_leakage`; decoys of held-out patients stand under "heldout". Counts of the paraphrased contexts:
        {"train": {...}, "heldout": {...}}, see `ParaphrasedPrompts`; `n_generated` is what the budget left of them.
    Raises: InputError if the model cannot generate, or its output is not finite.
    """
    start, size = start_tokens(tokenizer), context_size(model)
    sides = [
        tokenised_side("train", members, tokenizer, settings, identifier_values(members)),
        tokenised_side("heldout", others, tokenizer, settings, decoy_values(others, members)),
    ]
    jobs: list[Job] = []
    counts: dict[str, dict[str, Any]] = {}
    for side in sides:
        own, counts[side.name] = _context_jobs(side, tokenizer, start, size, settings)
        jobs += own
    types = sides[0].values.type.tolist()
    for name, asked in (("templates", templates(types)), ("paraphrased_templates", paraphrased_templates(types))):
        jobs.append(template_job(name, [start + text_ids(tokenizer, text) for text in asked], size, settings))
    granted = {job.name: job for job in within_budget(jobs, settings.budget_tokens)}
    if folder is not None and weights is None:
        weights = weights_fingerprint(model)
    written = {
        name: run_job(job, model, tokenizer, settings, folder, weights, progress) for name, job in granted.items()
    }
    figures: dict[str, dict[str, Any]] = {}
    for key, side in zip(("memorization", "heldout"), sides, strict=True):
        figures[key] = {}
        for probe in PROBES:
            name = probe if "templates" in probe else f"{side.name} {probe}"
            job, outputs = granted[name], written[name]
            if outputs and len(side.values):
                _, *leaked = leaked_values(side.values, tokenizer, job.prompts, outputs, job.targets)
                options: dict[str, Any] = {"bootstrap": settings.bootstrap, "seed": settings.seed}
                figures[key][probe] = leak_figures(side.values, *leaked, **options)
            else:
                figures[key][probe] = {"rate": NotApplicable(job.reason or NO_VALUES)}
        counts[side.name]["n_generated"] = len(written[f"{side.name} paraphrased"])
    return figures, counts


def _context_jobs(
    side: Side, tokenizer: PreTrainedTokenizerBase, start: list[int], size: int | None, settings: GenerationSettings
) -> tuple[list[Job], dict[str, Any]]:
    """The true text in front of every identifier value, and the same in other words, with the counts of those."""
    room = context_room(start, size, settings)
    contexts = context_prompts(side.texts if room > 0 else [], side.values, start, room)
    said = paraphrased_contexts(contexts, side.values, tokenizer, start, room, settings.seed)
    reason = NO_RULE if said.counts["n_unchanged"] else NO_CONTEXT
    jobs = [
        targeted_job(f"{side.name} context", side, contexts.prompts, contexts.value, settings, NO_CONTEXT),
        targeted_job(f"{side.name} paraphrased", side, said.prompts, said.value, settings, reason),
    ]
    return jobs, dict(said.counts)
