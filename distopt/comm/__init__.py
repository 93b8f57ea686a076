"""The only room that calls collectives: in one order on all ranks, counted, and never from a completion callback."""
