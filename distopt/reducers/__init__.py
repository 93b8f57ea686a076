"""Reducers: how a list of gradients becomes its average over a process group. One a file."""
