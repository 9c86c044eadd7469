"""Faults that break the privacy guarantee, each as one small change of the source, and the tests that must notice it.

A mutant that no test notices is a hole in the suite. `harness.py` plants them in copies of the package.
"""

from __future__ import annotations

from mutants.faults_of_runs import FAULTS_OF_RUNS
from mutants.faults_of_steps import FAULTS_OF_STEPS
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*FAULTS_OF_STEPS, *FAULTS_OF_RUNS)
