"""Tests mirror the code; beside them stand a simulation of all ranks in one process, and a harness of real ones."""
