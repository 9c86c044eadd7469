"""All that a privacy guarantee rests on: plan, sampling, clipping, noise, accounting, ledger, audit."""
