"""The report: reads the JSON of run and frontier folders, writes one page, one table and the figures.

And the page on the evidence of a release gate: `evidence.build_evidence_page`.

Knows no model and imports no torch: what it says follows from the recorded numbers alone, so a report can be
rebuilt years later from the JSON files. `build.build_report` is the entrance; `points` holds the frontier point.
"""
