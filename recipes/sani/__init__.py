"""Sanitising over-trained models of the synthetic hospital."""
