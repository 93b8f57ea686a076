"""Looking at a run: what a registration measures, carried to where people read it."""
