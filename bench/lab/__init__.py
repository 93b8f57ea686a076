"""Several hosts on one machine, with links of a set rate between them, and what a training step costs over those."""
