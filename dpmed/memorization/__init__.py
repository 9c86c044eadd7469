"""The memorisation evaluator: knows models and records, knows no trainer.

`scoring` makes one streamed forward pass, of which `vocabulary` keeps a few numbers per token; `extraction`,
`membership`, `fill_mask` and `leakage` are pure functions of what it keeps; `battery` puts them together; `intervals`
puts an error bar on every figure; `checks` refuses what would mislead; `evaluator` decides what is measured, and in what
order.
"""
