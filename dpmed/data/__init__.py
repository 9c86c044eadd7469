"""Records in, batches out: loading, splitting, tasks, identifiers, canaries and the synthetic hospital."""
