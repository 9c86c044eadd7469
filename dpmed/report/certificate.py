"""The certificates of private runs (`privacy.json`): what they say, and what in them needs a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpmed.report.points import finite


@dataclass(frozen=True)
class Certificate:
    """One run's certificate."""

    name: str
    content: dict[str, Any]
    epsilon_lower_bound: float | None = None
    """What the canary audit of the same run rejects, if there was one."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that a privacy officer should not overlook; empty if there is none."""
        return [*self._about_the_guarantee(), *self._about_the_numbers()]

    def _about_the_guarantee(self) -> list[str]:
        found = []
        epsilon = finite(self.content.get("epsilon"))
        if self.content.get("private") is False:
            found.append(f"{self.name}: its certificate says that the run is not private.")
        if epsilon is not None and self.epsilon_lower_bound is not None and self.epsilon_lower_bound > epsilon:
            found.append(
                f"{self.name}: the audit shows an epsilon of at least {self.epsilon_lower_bound:.2f}, above the "
                f"certified {epsilon:.2f}. One of the two is wrong: do not release this model before it is explained."
            )
        # Exact words: a column such as `medical_record_number` names the patient.
        if str(self.content.get("unit") or "").lower() in ("record", "records", "record_id"):
            found.append(
                f"{self.name}: the guarantee covers one record, not one patient. "
                "A patient with many records is protected less."
            )
        return found

    def _about_the_numbers(self) -> list[str]:
        found = []
        delta, n_units = finite(self.content.get("delta")), finite(self.content.get("n_units"))
        if delta is not None and n_units and delta * n_units >= 1:
            found.append(
                f"{self.name}: delta {delta:g} is not below 1 / number of units ({1 / n_units:.2g}), "
                "which allows publishing a unit at random. Choose a smaller delta."
            )
        pld, prv = finite(self.content.get("epsilon_pld")), finite(self.content.get("epsilon_prv"))
        if pld is not None and prv is not None and abs(pld - prv) > 0.05 * max(pld, prv):
            found.append(
                f"{self.name}: the two accountants differ by more than 5 % (epsilon {pld:.3g} and {prv:.3g}). "
                "Take the larger one."
            )
        return found


def statements(certificates: Sequence[Certificate], key: str) -> list[str]:
    """What the certificates say under `key`, each text once; a text that not all share names its runs."""
    names: dict[str, list[str]] = {}
    for certificate in certificates:
        content = certificate.content.get(key)
        for text in content if isinstance(content, list) else [content]:
            if text is not None:
                names.setdefault(str(text), []).append(certificate.name)
    return [text if len(runs) == len(certificates) else f"{text} ({', '.join(runs)})" for text, runs in names.items()]
