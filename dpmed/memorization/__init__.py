"""The memorisation evaluator: knows models and records, knows no trainer.

`scoring` makes one streamed forward pass; `extraction`, `membership` and `leakage` are pure functions of what it keeps;
`intervals` puts an error bar on every figure; `evaluator` decides what is measured, and in what order.
"""
