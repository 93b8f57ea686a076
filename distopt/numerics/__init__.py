"""Pure tensor functions that the reducers are made of. Nothing here knows of processes or collectives."""
