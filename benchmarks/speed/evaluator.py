"""The one-pass battery beside what it replaces: a bare forward pass, and greedy generation of every suffix.

    python benchmarks/speed/evaluator.py --model SMOLLM2 --data PHEE          # results/evaluator_cpu.json
    python benchmarks/speed/evaluator.py --model SMOLLM2 --data PHEE --records 40 --repetitions 1

Records have as many tokens as a prefix and a suffix. Columns: `bare` (the model's forward pass with full logits, in the
battery's batches), `battery` (statistics and all pure metrics), `one_by_one` (generate, a record at a time), `batched`
(generate, many records at a time). They take turns within a repetition; ratios are taken within it, of wall-clock and
of CPU seconds: on a machine that others use the latter are the steadier. `scale`: the battery on ten times the records,
each in its own process; memory is ru_maxrss, start-up and model included, and on a GPU what
torch allocated at most. No text is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PREFIX, SUFFIX = 50, 50
COLUMNS = ("bare", "battery", "one_by_one", "batched")
RATIOS = (("battery", "bare"), ("one_by_one", "battery"), ("batched", "battery"))
Seconds = dict[str, float]


def load_texts(folder: Path) -> list[str]:
    """PHEE's sentences (train.json, JSON lines with `context`), or any JSON lines with `text`."""
    path = folder / "train.json" if folder.is_dir() else folder
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return list(dict.fromkeys(row.get("context") or row["text"] for row in rows))


def joined(texts: Sequence[str], tokenizer: Any, n: int) -> list[str]:
    """n records of sentences that follow each other, cut behind their token number prefix + suffix."""
    records, parts, size = [], [], 0
    for text in itertools.cycle(texts):
        parts.append(text)
        size += len(tokenizer(" " + text)["input_ids"])
        if size > PREFIX + SUFFIX + 5:
            whole = " ".join(parts)
            ends = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            records.append(whole[: ends[PREFIX + SUFFIX - 1][1]])
            parts, size = [], 0
            if len(records) == n:
                return records
    raise SystemExit("the data has no text")


class Case:
    """A model and records, ready for every column.

    Args:
        model: folder of a causal language model.
        data: see `load_texts`.
        records: how many.
        generated: how many of them are generated in batches; their time is scaled up to all.
        singles: how many are generated one by one.
    """

    def __init__(
        self, model: str, data: str, records: int, generated: int, singles: int, batch_tokens: int, device: str
    ) -> None:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dpmed.data.tasks import TaskSpec, encode

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model: Any = loaded.eval().to(device)
        self.texts = joined(load_texts(Path(data)), self.tokenizer, records)
        units = [str(i) for i in range(records)]
        data_set = Dataset.from_dict({"text": self.texts, "unit": units, "record_id": units})
        self.spec = TaskSpec(max_length=256)
        self.encoded = encode(data_set, self.tokenizer, self.spec)
        self.generated, self.singles = min(generated, records), min(singles, generated, records)
        self.batch_tokens = batch_tokens
        self.device = device

    def tokens(self) -> int:
        """Real tokens of all windows."""
        return sum(self.encoded.lengths)

    def bare(self) -> float:
        """The forward pass alone, whole logits, in the battery's batches."""
        import torch

        from dpmed.data.batches import pad_token_id
        from dpmed.memorization.scoring import length_batches, pad

        with torch.inference_mode():
            for chosen in length_batches(self.encoded.lengths, self.batch_tokens):
                ids, attention = pad([self.encoded[i] for i in chosen], pad_token_id(self.tokenizer))
                inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attention)}
                self.model(**{k: v.to(self.device) for k, v in inputs.items()}, use_cache=False).logits[0, 0, 0].item()
        return 1.0

    def battery(self) -> float:
        """One pass and every pure metric of it; the base model's statistics are stood in for by the model's own."""
        from dpmed.memorization import extraction, membership
        from dpmed.memorization.scoring import score_records

        scores = score_records(self.model, self.encoded, self.spec, self.tokenizer, batch_tokens=self.batch_tokens)
        _, log_p = extraction.suffix_log_probability(scores, PREFIX, SUFFIX)
        found = [
            extraction.greedy_extraction(scores, PREFIX, SUFFIX)[1],
            *(extraction.extraction_probability(log_p, tries) for tries in (1, 10, 100, 1000)),
            extraction.extraction_strength(scores),
            extraction.exact_memorization(scores),
            membership.loss_score(scores),
            membership.reference_score(scores, scores),
            membership.ez_score(scores, scores),
            membership.min_k_score(scores, 0.2),
            membership.min_k_plus_plus_score(scores, 0.2),
            membership.zlib_score(scores, membership.zlib_lengths(self.texts)),
        ]
        if {len(each) for each in found} != {self.encoded.n_records}:
            raise SystemExit("a metric lost records")
        return 1.0

    def one_by_one(self) -> float:
        return self._generate(1, self.singles)

    def batched(self) -> float:
        return self._generate(32, self.generated)

    def _generate(self, batch: int, n: int) -> float:
        """Greedy continuations of n records; returns which share of all records they are."""
        import torch

        heads = [e.input_ids[: e.text_start + PREFIX] for e in self.encoded if e.window == 0][:n]
        for start in range(0, len(heads), batch):
            ids = torch.tensor(heads[start : start + batch], device=self.device)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=SUFFIX,
                max_new_tokens=SUFFIX,
                pad_token_id=0,
                eos_token_id=None,
            )
        return n / self.encoded.n_records


def timed(run: Callable[[], float], device: str) -> Seconds:
    """Wall-clock and CPU seconds for all records."""
    import torch

    start, cpu = time.perf_counter(), time.process_time()
    share = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return {"wall": (time.perf_counter() - start) / share, "cpu": (time.process_time() - cpu) / share}


def measure(case: Case, columns: Sequence[str], repetitions: int) -> list[dict[str, Seconds]]:
    """Seconds of every column, for every repetition, in an order that starts elsewhere each time."""
    found: list[dict[str, Seconds]] = []
    for repetition in range(repetitions):
        at = repetition % len(columns)
        found.append({name: timed(getattr(case, name), case.device) for name in [*columns[at:], *columns[:at]]})
        print({name: round(seconds["cpu"], 2) for name, seconds in found[-1].items()}, file=sys.stderr, flush=True)
    return found


def ratios(found: Sequence[dict[str, Seconds]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each ratio over repetitions, of wall-clock and of CPU seconds."""
    spread: dict[str, dict[str, float]] = {}
    for top, bottom in RATIOS:
        for clock in ("wall", "cpu"):
            values = [f[top][clock] / f[bottom][clock] for f in found]
            spread[f"{top}_to_{bottom}_{clock}"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "n": len(values),
            }
    return spread


def in_own_process(options: argparse.Namespace, records: int) -> dict[str, float]:
    """Seconds and peak memory of one battery on so many records."""
    command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--alone"]
    command += [
        "--records",
        str(records),
        "--generated",
        "1",
        "--batch_tokens",
        str(options.batch_tokens),
        "--device",
        options.device,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(case: Case) -> dict[str, float]:
    """What `in_own_process` reads; on a GPU its memory stands beside that of the process."""
    import torch

    if case.device != "cpu":
        case.bare()  # libraries and kernels are loaded on first use
    seconds = timed(case.battery, case.device)
    peaks = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if case.device != "cpu":
        peaks["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"n_records": case.encoded.n_records, "tokens": case.tokens(), **peaks, **seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluator.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model (SmolLM2-135M)")
    parser.add_argument("--data", required=True, help="folder of PHEE, or a file of JSON lines with `text`")
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--generated", type=int, default=32, help="records that are generated; times are scaled up")
    parser.add_argument("--singles", type=int, help="of these, how many are generated one by one; default: all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="default: results/evaluator_DEVICE.json beside this script")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    singles = options.generated if options.singles is None else options.singles
    size = (options.records, options.generated, singles, options.batch_tokens, options.device)
    if options.alone:
        print(json.dumps(alone(Case(options.model, options.data, *size))))
        return 0
    # Before the model is loaded here: a child inherits its parent's peak.
    scale = [in_own_process(options, options.records), in_own_process(options, 10 * options.records)]
    case = Case(options.model, options.data, *size)
    from dpmed.environment import device, versions

    case.bare()  # warm
    if options.device != "cpu":
        case.battery()
    found = measure(case, COLUMNS, options.repetitions)
    document = {
        "settings": {k: getattr(options, k) for k in ("records", "generated", "repetitions", "batch_tokens", "device")}
        | {
            "singles": singles,
            "prefix_tokens": PREFIX,
            "suffix_tokens": SUFFIX,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "model": Path(options.model).name,
        "n_tokens": case.tokens(),
        "seconds": found,
        "ratios": ratios(found),
        "scale": {
            "runs": scale,
            "ratios": {key: scale[1][key] / scale[0][key] for key in scale[0] if key != "n_records"},
        },
        "environment": {
            "device": device(),
            "versions": versions(),
            "cpu_count": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    output = options.output or HERE / "results" / f"evaluator_{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["ratios"] | {"scale": document["scale"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
