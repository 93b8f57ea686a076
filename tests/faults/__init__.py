"""Faults, drawn from seeds: each promise of docs/reliability.md, tried many times over."""
