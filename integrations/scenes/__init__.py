"""Drawn data: two coloured shapes and a relation, as captions and pictures, and an exact reader of such pictures."""
