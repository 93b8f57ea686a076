"""Pictures with captions from folders, COCO annotations, tables and tar shards, read while a model trains.

Everything is indexed first; the i-th picture of an epoch is then a pure function of the seed, and the position in the
data is one number, the step. Importing this package, and indexing all but tar shards, does not import torch.
"""
