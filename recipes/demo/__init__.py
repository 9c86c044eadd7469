"""The demo's frontier on the synthetic hospital."""
