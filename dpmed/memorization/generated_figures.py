"""All figures that need generated text, of one model: regurgitation, near-verbatim, prefix halves, identifier leakage.

1. Records of both sides are put in a random order of patients, tokenised whole, and turned into jobs: prompts with how
   many tokens to write.
2. Where all jobs together would exceed the budget of tokens, each keeps the same share of its prompts, from the front.
   What is left out is counted.
3. The jobs are generated, resumed where a folder has their parts, and the outputs become figures.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from torch import nn

from dpmed.errors import InputError
from dpmed.memorization.generation import context_size, generate, start_tokens
from dpmed.memorization.generation_plan import (
    GenerationSettings,
    Job,
    Side,
    sampling_jobs,
    side_jobs,
    tokenised_side,
    within_budget,
)
from dpmed.memorization.intervals import NotApplicable
from dpmed.memorization.leak_differences import Leaked
from dpmed.memorization.leak_probes import (
    decoy_values,
    identifier_values,
    leak_figures,
    leaked_values,
    leaks_per_1000,
)
from dpmed.memorization.regurgitation import near_verbatim_figures, prefix_half_figures, regurgitation_figures
from dpmed.memorization.statistics import weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_VALUES = "no known identifier on this side; name data.identifiers"
ALL_SHARED = "all known identifiers of held-out patients stand in training records too"
Progress = Callable[[str, int, int], None]
"""Called with (stage, prompts done, prompts in all)."""


@dataclass(frozen=True, repr=False)  # holds text
class _Written:
    """A job's prompts that were granted and what the model wrote."""

    job: Job
    outputs: list[np.ndarray]


def generation_figures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    members: Dataset,
    others: Dataset,
    settings: GenerationSettings,
    *,
    folder: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Leaked]]]:
    """Measure one model, tuned or base, by what it writes.

    Args:
        model: causal language model, PEFT models included.
        tokenizer: the model's own, a fast one.
        members: all training records (`load_records`): identifiers of any of them are looked for, and decoys must stand
            in none. `settings.max_records` of them give prompts.
        others: records of held-out patients: the same figures, with decoys for identifiers.
        settings: lengths, temperatures, sizes.
        folder: private folder for finished batches; several models may share it. It holds what the models wrote:
            delete it with the records.
        weights: the model's `weights_fingerprint`, where it was taken already.
        progress: called after each batch.

    Returns: figures {"memorization": ..., "heldout": ...}, the same keys for both sides: `regurgitation_rate`,
        `regurgitation` {"p50_n30": rate}, `near_verbatim` {"p50": {score: mean, score_rate: share}}, `prefix_halves`
        {"t0.1": {...}}, `identifier_leak_rate` and `identifier_leakage` {probe: {...}}; leaves are `Measure` or
        `NotApplicable`. Counts: per side and job, and of the budget. No text in either. And which values leaked, by
        side and probe, for differences between sides and models.
    Raises: InputError if a side is empty, the model cannot generate, or its output is not finite.
    Reference: arXiv 2509.08604 (regurgitation), arXiv 2507.21009 (prefix halves), Carlini et al. 2021 (free samples).
    """
    for name, records in (("train", members), ("heldout", others)):
        if len(records) == 0:
            raise InputError(f"{name}: no records to evaluate; check data.{name}")
    start = start_tokens(tokenizer)
    size = context_size(model)
    sides = [
        tokenised_side("train", members, tokenizer, settings, identifier_values(members)),
        tokenised_side("heldout", others, tokenizer, settings, decoy_values(others, members)),
    ]
    own = {side.name: side_jobs(side, start, size, settings) for side in sides}
    wanted = [job for jobs in own.values() for job in jobs] + sampling_jobs(
        tokenizer, start, size, sides[0].values, settings
    )
    granted = within_budget(wanted, settings.budget_tokens)
    if folder is not None and weights is None:
        weights = weights_fingerprint(model)
    written: dict[str, _Written] = {}
    for job in granted:
        written[job.name] = _Written(job, run_job(job, model, tokenizer, settings, folder, weights, progress))
    figures: dict[str, Any] = {}
    leaked: dict[str, dict[str, Leaked]] = {}
    for key, side in zip(("memorization", "heldout"), sides, strict=True):
        figures[key], leaked[key] = _figures(side, written, tokenizer, settings)
    counts: dict[str, Any] = {side.name: _counts(side, written, settings) for side in sides}
    counts["generation"] = {
        "budget_tokens": settings.budget_tokens,
        "n_tokens_wanted": int(sum(job.costs().sum() for job in wanted)),
        "n_tokens_granted": int(sum(job.costs().sum() for job in granted)),
        "n_tokens_written": int(sum(len(o) for w in written.values() for o in w.outputs)),
        "prompts": {
            job.name: {"n_wanted": len(job.prompts), "n_generated": len(written[job.name].outputs)} for job in wanted
        },
    }
    return figures, counts, leaked


def run_job(
    job: Job,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    folder: Path | None,
    weights: str | None,
    progress: Progress | None,
) -> list[np.ndarray]:
    """Generate a job's outputs, those of equal length together."""
    outputs: list[np.ndarray] = [np.empty(0, np.int32)] * len(job.prompts)
    lengths, total, done = np.array(job.new_tokens), len(job.prompts), 0
    for length in sorted(set(job.new_tokens)):
        rows = np.flatnonzero(lengths == length).tolist()
        report = None if progress is None else lambda n, _, before=done: progress(job.name, before + n, total)
        found = generate(
            model,
            tokenizer,
            [job.prompts[i] for i in rows],
            new_tokens=length,
            temperature=job.temperature,
            top_k=job.top_k,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed + zlib.crc32(f"{job.name} {length}".encode()),
            part_dir=folder,
            weights=weights,
            progress=report,
        )
        for row, tokens in zip(rows, found, strict=True):
            outputs[row] = tokens
        done += len(rows)
    return outputs


def _figures(
    side: Side, written: dict[str, _Written], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> tuple[dict[str, Any], dict[str, Leaked]]:
    options: dict[str, Any] = {"bootstrap": settings.bootstrap, "seed": settings.seed}
    regurgitation: dict[str, Any] = {}
    near: dict[str, Any] = {}
    for p in settings.prompt_tokens:
        job, outputs = _of(written, f"{side.name} prefix p{p}")
        if not outputs:
            regurgitation |= {f"p{p}_n{n}": NotApplicable(job.reason) for n in settings.ngrams}
            near[f"p{p}"] = NotApplicable(job.reason)
            continue
        rates = regurgitation_figures(job.truths, outputs, job.units, settings.ngrams, **options)
        regurgitation |= {f"p{p}_{name}": rate for name, rate in rates.items()}
        near[f"p{p}"] = near_verbatim_figures(job.truths, outputs, job.units, **options)
    halves: dict[str, Any] = {}
    for t in settings.temperatures:
        job, outputs = _of(written, f"{side.name} halves t{t:g}")
        halves[f"t{t:g}"] = (
            prefix_half_figures(job.truths, outputs, job.units, **options) if outputs else NotApplicable(job.reason)
        )
    leakage, leaked = _leakage(side, written, tokenizer, settings)
    figures = {
        "regurgitation_rate": next(iter(regurgitation.values())),
        "regurgitation": regurgitation,
        "near_verbatim": near,
        "prefix_halves": halves,
        "identifier_leak_rate": leakage["context"]["rate"],
        "identifier_leakage": leakage,
    }
    return figures, leaked


def _leakage(
    side: Side, written: dict[str, _Written], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> tuple[dict[str, Any], dict[str, Leaked]]:
    """Each probe's rates and which values leaked. In continuations of records only leaks per sample are counted."""
    values, result, found = side.values, {}, {}
    names = {"context": f"{side.name} context", "templates": "templates", "free": "free"}
    names["records"] = f"{side.name} prefix p{settings.prompt_tokens[0]}"
    for probe, name in names.items():
        job, outputs = _of(written, name)
        if not outputs or not len(values):
            none = NotApplicable(ALL_SHARED if values.n_shared and not len(values) else job.reason or NO_VALUES)
            result[probe] = {"per_1000_samples": none} | ({} if probe == "records" else {"rate": none})
            continue
        hits, leaked, tested = leaked_values(values, tokenizer, job.prompts, outputs, job.targets)
        options: dict[str, Any] = {"bootstrap": settings.bootstrap, "seed": settings.seed}
        result[probe] = {"per_1000_samples": leaks_per_1000(hits, job.units, **options)}
        if probe == "records":
            continue
        result[probe] |= leak_figures(values, leaked, tested, **options)
        found[probe] = Leaked(values, leaked, tested)
    return result, found


def _counts(side: Side, written: dict[str, _Written], settings: GenerationSettings) -> dict[str, Any]:
    """What the figures of a side rest on, and what was not tested and why."""
    regurgitation: dict[str, Any] = {}
    for p in settings.prompt_tokens:
        job, outputs = _of(written, f"{side.name} prefix p{p}")
        for n in settings.ngrams:
            long_enough = sum(len(text.ids) >= p + n for text in side.texts)
            tested = sum(len(truth) >= n for truth in job.truths)
            regurgitation[f"p{p}_n{n}"] = {
                "n_tested": tested,
                "n_too_short": len(side.texts) - long_enough,
                "n_not_generated": long_enough - tested,
            }
        regurgitation[f"p{p}"] = {
            "new_tokens": job.new_tokens[0] if job.new_tokens else 0,
            "n_empty_outputs": sum(len(output) == 0 for output in outputs),
        }
    values = side.values
    return {
        "n_records_for_generation": len(side.texts),
        "regurgitation": regurgitation,
        "identifier_values": {
            "n_values": len(values),
            "n_too_short": values.n_too_short,
            "n_also_in_training": values.n_shared,
            "n_with_context": len(_of(written, f"{side.name} context")[0].targets),
        },
    }


def _of(written: dict[str, _Written], name: str) -> tuple[Job, list[np.ndarray]]:
    return written[name].job, written[name].outputs
