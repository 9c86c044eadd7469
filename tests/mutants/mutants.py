"""Faults that break the privacy guarantee, each as one small change of the source, and the tests that must notice it.

A mutant that no test notices is a hole in the suite. `harness.py` plants them in copies of the package.
`python -m mutants.mutants` in the tests' folder prints them as rows of docs/privacy/pitfalls.md.
"""

from __future__ import annotations

from mutants.faults_of_runs import FAULTS_OF_RUNS
from mutants.faults_of_steps import FAULTS_OF_STEPS
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*FAULTS_OF_STEPS, *FAULTS_OF_RUNS)


def row(mutant: Mutant) -> str:
    """The fault, what it would break, and the tests that fail; without their variants."""
    tests = dict.fromkeys(f"`{test.partition('[')[0]}`" for test in mutant.tests)
    return f"| {mutant.name} | {mutant.why} | {', '.join(tests)} |"


if __name__ == "__main__":
    print("\n".join(map(row, MUTANTS)))
