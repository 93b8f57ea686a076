"""Everything that is to be built, checked and timed on a GPU, in one command."""
