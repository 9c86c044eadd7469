"""The evaluator: what a model memorised of its training records.

One forward pass: `scoring` makes it, `vocabulary` keeps a few numbers per token, and `extraction`, `membership`,
`fill_mask`, `leakage`, `kinds` and `persistence` are pure functions of what it keeps; `battery` puts them together.
Generated text: `generation` writes what `generation_plan` asks for, `regurgitation` and `leak_probes` read it,
`generated_figures` puts them together. Canaries: `exposure`, `canary_figures`. Besides: `multiple_choice`, `paired`.
`intervals` puts an error bar on every figure, `checks` refuses what would mislead, `evaluator` decides what to measure.
"""
