"""What trainers may legally do to a compressed reduction, and who survives it: ``python -m bench.robustness``."""
