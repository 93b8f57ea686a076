"""Checkpoints: what is loaded is what was saved, or an error that names the damage."""
