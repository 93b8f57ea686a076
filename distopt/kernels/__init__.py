"""Triton editions of the hot paths: the same functions of tensors on a GPU, in one launch where torch needs many."""
