"""Speed of matching: known identifiers in text, one thread, megabytes of text a second.

    python benchmarks/speed/matching.py                  # 1 million values: results/matching.json
    python benchmarks/speed/matching.py --n_values 1000 --megabytes 1

Values and notes are made up from Faker's lists with a fixed seed. Of every note 5 % are values that are looked for, 5 %
first names (which begin many values) and 5 % numbers, so that the automaton has work to do. Each kind of text is
matched `--repetitions` times, the kinds in turn. Rates are of CPU seconds, which other work on the machine moves least;
those of the wall clock stand beside them. `found_share` must be 1: every value that was put there is found.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmed.data.matching import KnownValues
from dpmed.data.patterns import pattern_spans
from dpmed.environment import versions
from dpmed.runs import write_json

HERE = Path(__file__).resolve().parent
WORDS_A_NOTE = 300
AIM_MEGABYTES_PER_SECOND = 5.0
PROSE = """
    The patient was seen in clinic with a complaint of chest pain and shortness of breath on exertion since two weeks
    ago. No fever, chills or cough; examination normal, plan as before, follow up in one month.
"""
KINDS = {"ascii": (), "line_breaks": ("\n\n", "\n"), "accents_and_signs": ("naïve", "37°C", "—", "“stable”", "Ménière")}
"""Kind of text -> what stands in it among the words."""


def made_up_values(n: int, seed: int = 0) -> list[str]:
    """Names, record numbers, telephone numbers and addresses, all different."""
    from faker.providers.address.en_US import Provider as Streets
    from faker.providers.person.en_US import Provider as Names

    rng = random.Random(seed)
    first, last, suffixes = list(Names.first_names), list(Names.last_names), list(Streets.street_suffixes)
    draws = (
        lambda: f"{rng.choice(first)} {chr(65 + rng.randrange(26))}. {rng.choice(last)}",
        lambda: f"{rng.randrange(10**7, 10**8)}",
        lambda: f"({rng.randrange(200, 999)}) {rng.randrange(200, 999)}-{rng.randrange(10**4):04d}",
        lambda: f"{rng.randrange(1, 9999)} {rng.choice(last)} {rng.choice(suffixes)}",
    )
    values: dict[str, None] = {}
    while len(values) < n:
        values[rng.choice(draws)()] = None
    return list(values)


def made_up_notes(values: Sequence[str], n_bytes: int, extra: Sequence[str], seed: int = 0) -> tuple[list[str], int]:
    """Notes of together at least `n_bytes` in UTF-8, and how many values stand in them."""
    from faker.providers.person.en_US import Provider as Names

    rng = random.Random(seed)
    first, prose = list(Names.first_names), PROSE.split()
    notes: list[str] = []
    size = n_put = 0
    while size < n_bytes:
        words: list[str] = []
        for _ in range(WORDS_A_NOTE):
            share = rng.random()
            if share < 0.05:
                words.append(f"[{rng.choice(values)}]")  # brackets: no neighbour can make a longer value of it
                n_put += 1
            elif share < 0.15:
                words.append(rng.choice(first) if share < 0.1 else str(rng.randrange(1000)))
            else:
                words.append(rng.choice(extra) if extra and share > 0.98 else rng.choice(prose))
        notes.append(" ".join(words))
        size += len(notes[-1].encode())
    return notes, n_put


def measure(n_values: int, megabytes: float, repetitions: int) -> dict[str, Any]:
    """Build the automaton once, match every kind of text `repetitions` times."""
    values = made_up_values(n_values)
    start = time.process_time()
    known = KnownValues(values, ["ID"] * len(values))
    build_seconds = time.process_time() - start
    texts = {kind: made_up_notes(values, int(megabytes * 1e6), extra) for kind, extra in KINDS.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shares: dict[str, float] = {}
    for _ in range(repetitions):
        for kind, (notes, n_put) in texts.items():
            n_bytes = sum(len(note.encode()) for note in notes)
            start, start_wall = time.process_time(), time.perf_counter()
            found = [known.find(note) for note in notes]
            rates[kind].append(n_bytes / 1e6 / (time.process_time() - start))
            wall[kind].append(n_bytes / 1e6 / (time.perf_counter() - start_wall))
            in_brackets = (
                note[match.start - 1] == "[" and note[match.end] == "]"
                for note, matches in zip(notes, found, strict=True)
                for match in matches
                if match.start > 0 and match.end < len(note)
            )
            shares[kind] = sum(in_brackets) / n_put
    notes, _ = texts["ascii"]
    part = notes[: max(1, len(notes) // 10)]
    start = time.process_time()
    for note in part:
        pattern_spans(note)
    patterns = sum(map(len, part)) / 1e6 / (time.process_time() - start)
    return {
        "settings": {"n_values": n_values, "megabytes": megabytes, "repetitions": repetitions, "threads": 1},
        "environment": {"versions": versions(), "cpu_count": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "aim_megabytes_per_second": AIM_MEGABYTES_PER_SECOND,
        "build_cpu_seconds": build_seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "megabytes_per_cpu_second": {kind: _spread(rate) for kind, rate in rates.items()},
        "megabytes_per_wall_second": {kind: _spread(rate) for kind, rate in wall.items()},
        "found_share": shares,
        "patterns_megabytes_per_cpu_second": patterns,
    }


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n_values", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=float, default=10.0, help="of text, for each kind of text")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "matching.json")
    args = parser.parse_args()
    result = measure(args.n_values, args.megabytes, args.repetitions)
    write_json(args.output, result)
    for kind, rate in result["megabytes_per_cpu_second"].items():
        print(f"{kind:18} {rate['median']:.1f} MB a CPU second ({rate['min']:.1f} to {rate['max']:.1f})")


if __name__ == "__main__":
    main()
