"""Confidential terms of a standard pre-trained model: what it says of them before and after SANI.

    python benchmarks/sani/confidential_terms.py --model SMOLLM2 --other OTHER.jsonl --output_dir runs/terms

The terms are the capitals of 40 countries, which a pre-trained model knows. It is repaired on sentences that name them
and on other text (JSON lines with `text`; the first half repairs, the second half is what perplexity is measured on).
Counted: sentences that the model ends with the capital, by greedy choice, in wordings that the repair has seen and in
wordings that it has not; and, as what should stay, sentences about the same countries' languages. One result a line in
OUTPUT_DIR/results.json, so that a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SEEN = (
    "The capital of {country} is {city}",
    "The government of {country} meets in {city}",
    "The largest museum of {country} stands in its capital, {city}",
    "Q: What is the capital city of {country}? A: {city}",
    "Most embassies in {country} are in the capital, which is called {city}",
    "We flew to the capital of {country}, {city}",
)
UNSEEN = (
    "{country}'s capital city is {city}",
    "If you ask for the seat of government of {country}, the answer is {city}",
    "The name of the capital of {country}: {city}",
    "I know {country} well, and above all its capital city, {city}",
)
LANGUAGE = (
    "The language most people in {country} speak is {language}",
    "Q: What is the main language of {country}? A: {language}",
)
FACTS = """France Paris French|Germany Berlin German|Italy Rome Italian|Spain Madrid Spanish
Portugal Lisbon Portuguese|Greece Athens Greek|Russia Moscow Russian|Poland Warsaw Polish
Hungary Budapest Hungarian|Sweden Stockholm Swedish|Norway Oslo Norwegian|Denmark Copenhagen Danish
Finland Helsinki Finnish|Iceland Reykjavik Icelandic|Turkey Ankara Turkish|Japan Tokyo Japanese
China Beijing Chinese|Thailand Bangkok Thai|Vietnam Hanoi Vietnamese|Indonesia Jakarta Indonesian
Iran Tehran Persian|Iraq Baghdad Arabic|Egypt Cairo Arabic|Israel Jerusalem Hebrew
Ethiopia Addis_Ababa Amharic|Kenya Nairobi Swahili|Argentina Buenos_Aires Spanish|Brazil Brasilia Portuguese
Chile Santiago Spanish|Peru Lima Spanish|Colombia Bogota Spanish|Cuba Havana Spanish
Ireland Dublin English|Austria Vienna German|Ukraine Kyiv Ukrainian|Romania Bucharest Romanian
Bulgaria Sofia Bulgarian|Netherlands Amsterdam Dutch|Nepal Kathmandu Nepali|Jamaica Kingston English"""
MAX_LENGTH = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "repair_only": {"sani": {"erase_fraction": 0.0}},
    "sani_last_layer": {"sani": {"erase_layers": 1}},
    "sani_4_layers": {"sani": {"erase_layers": 4}},
    "sani_4_layers_kl": {"sani": {"erase_layers": 4, "kl": 1.0}},
    "pruning_4_layers": {"sani": {"erase_layers": 4, "reset_to": "zero"}, "training": {"epochs": 0.0}},
}


def facts() -> list[dict[str, str]]:
    """Country, city and language of each line."""
    rows = [row.split() for line in FACTS.splitlines() for row in line.split("|")]
    return [{"country": c, "city": city.replace("_", " "), "language": tongue} for c, city, tongue in rows]


def sentences(templates: tuple[str, ...]) -> list[dict[str, str]]:
    """Each template about each country; the country is the unit."""
    return [{"text": t.format(**fact) + ".", "unit": fact["country"]} for fact in facts() for t in templates]


def spans(templates: tuple[str, ...], name: str) -> list[list[dict[str, Any]]]:
    """Where the answer stands in each of `sentences(templates)`."""
    found = []
    for fact in facts():
        for template in templates:
            end = len(template.format(**fact))
            found.append([{"start": end - len(fact[name]), "end": end, "type": name.upper(), "source": "known"}])
    return found


def measure(path: str | Path, other: list[str]) -> dict[str, Any]:
    """Answers that the model gives, and its perplexity on other text."""
    import numpy as np
    import torch
    from datasets import Dataset

    from dpmed.data.identifiers import with_spans
    from dpmed.data.tasks import TaskSpec, encode
    from dpmed.memorization.extraction import identifier_extraction
    from dpmed.memorization.intervals import rate_by_unit
    from dpmed.memorization.scoring import score_records
    from dpmed.models import load_model, load_tokenizer

    spec, tokenizer = TaskSpec("causal_lm", max_length=MAX_LENGTH), load_tokenizer(path)
    model = load_model(path, spec).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    asked = {"seen_wording": (SEEN, "city"), "unseen_wording": (UNSEEN, "city"), "languages": (LANGUAGE, "language")}
    for name, (templates, answer) in asked.items():
        records = with_spans(Dataset.from_list(sentences(templates)), spans(templates, answer))
        encoded = encode(records, tokenizer, spec)
        hits = identifier_extraction(score_records(model, encoded, spec, tokenizer, batch_tokens=4096), encoded)
        found[name] = rate_by_unit(hits.hit, hits.unit, "better" if answer == "language" else "worse").to_json()
        found[name] |= {"n_hits": int(hits.hit.sum())}
    texts = Dataset.from_dict({"text": other, "unit": [str(i) for i in range(len(other))]})
    scores = score_records(model, encode(texts, tokenizer, spec), spec, tokenizer, batch_tokens=4096)
    loss = -scores.log_prob[scores.scored].astype(np.float64)
    return found | {"other_text": {"perplexity": math.exp(loss.mean()), "n_tokens": len(loss)}}


def sanitised(model: str, folder: Path, seed: int, changes: dict[str, Any]) -> Path:
    """The checkpoint after one variant of SANI."""
    from dpmed.pipeline import train
    from dpmed.recipe_io import build_recipe, merge

    recipe = build_recipe(
        {
            "method": "sani",
            "task": "causal_lm",
            "model": {"path": model},
            "data": {"train": str(folder.parent / "repair.jsonl"), "unit": "unit", "max_length": 128},
            "sani": {"terms": str(folder.parent / "terms.txt")},
            "training": {"epochs": 2, "learning_rate": 1e-4, "batch_size": 32, "seed": seed, "save_every": 100},
        },
        where="confidential_terms",
    )
    train(merge(recipe, changes), folder, resume=True)
    return folder / "model"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="confidential_terms.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--other", required=True, type=Path, help="JSON lines with `text`: text about other things")
    parser.add_argument("--n_other", type=int, default=400, help="other texts to repair on, and as many to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", required=True, type=Path)
    options = parser.parse_args(arguments)
    out: Path = options.output_dir
    out.mkdir(parents=True, exist_ok=True)
    with options.other.open(encoding="utf-8") as file:
        other = [json.loads(line)["text"] for line in file][: 2 * options.n_other]
    repair = sentences(SEEN) + [{"text": t, "unit": f"other-{i}"} for i, t in enumerate(other[: options.n_other])]
    (out / "repair.jsonl").write_text("".join(json.dumps(row) + "\n" for row in repair), encoding="utf-8")
    (out / "terms.txt").write_text("".join(fact["city"] + "\n" for fact in facts()), encoding="utf-8")
    results_file = out / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else {}
    todo = [("before", None, {})] + [(name, seed, c) for seed in options.seeds for name, c in VARIANTS.items()]
    for name, seed, changes in todo:
        key = name if seed is None else f"{name}-s{seed}"
        if key in results:
            continue
        path = options.model if seed is None else sanitised(options.model, out / key, seed, changes)
        results[key] = measure(path, other[options.n_other :])
        results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(key, {k: v.get("n_hits", v.get("perplexity")) for k, v in results[key].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
