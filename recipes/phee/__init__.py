"""PHEE: pharmacovigilance event sentences."""
