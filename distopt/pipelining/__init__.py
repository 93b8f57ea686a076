"""Models whose blocks are divided over ranks, one after the other."""
