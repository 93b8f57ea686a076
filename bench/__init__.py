"""Benches: one script a question. Run from the repository's root, as ``python -m bench.robustness``."""
