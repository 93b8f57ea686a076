"""Checkpoints that survive a crash at any moment, for any trainer: all of it is written, or nothing.

`save` writes a checkpoint beside the older ones and makes it current in one atomic step; `load` reads the newest whole
one back into what it was saved from; `latest` tells its step. Nothing that a checkpoint holds is ever executed.
"""

from distopt.checkpoint.loading import latest as latest
from distopt.checkpoint.loading import load as load
from distopt.checkpoint.saving import save as save
from distopt.checkpoint.values import PerRank as PerRank
from distopt.checkpoint.values import Value as Value
