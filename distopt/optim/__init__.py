"""Optimizers and what belongs to them: moments in 16 bits, the average of the iterates, the schedule of DALL-E."""

from distopt.optim.adamw import AdamW as AdamW
from distopt.optim.averaging import IterateAverage as IterateAverage
from distopt.optim.schedule import WarmupThenHalve as WarmupThenHalve
