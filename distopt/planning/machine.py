"""What a link and a processor take for the parts of a step: a few rates, and the formulas that use them.

The link is the alpha-beta model of collectives: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective
Communication Operations in MPICH", section 4; Patarasuk and Yuan 2009 for the ring. A message takes a latency and its
bytes over the bandwidth. What an all-reduce sends is the same for the ring and for halving and doubling, 2 (p - 1) / p
of its bytes; they differ in how many messages follow one another.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from distopt.errors import SettingError
from distopt.reducers.rehearsal import Asked

Algorithm = Literal["ring", "tree"]


class Wire(NamedTuple):
    """Seconds of a collective: of its bytes, and of its messages whatever they hold.

    Args:
        transfer: until all bytes are there.
        latency: of its messages.
        computing: what of the transfer a rank's processor is busy with.
    """

    transfer: float
    latency: float
    computing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Network:
    """What lies between the ranks.

    Args:
        bandwidth: of a node's way out, in bytes a second; the way in is as wide and as free.
        latency: of one message, in seconds.
        world_size: ranks in all.
        ranks_a_node: ranks that share a node's link; consecutive ones.
        sharded: whether the ranks of a node hold one model together, so that each averages its own part of it with its
            counterparts on the other nodes.
        algorithm: of an all-reduce: ``"tree"`` for 2 log2(p) messages one after another, as NCCL finds them on many
            nodes; ``"ring"`` for 2 (p - 1), as gloo does it.
        cpu_seconds_per_byte: processor time of each rank for each byte that it sends, taking in as many and adding them
            up: over TCP, the processor does all of this; 0 where the network's own devices do.

    Raises:
        SettingError: if the ranks do not divide into nodes.

    Example:
        >>> ring = Network(bandwidth=1.25e9, latency=1e-4, world_size=4, algorithm="ring")
        >>> ring.seconds(Asked("average", 10**9))
        Wire(transfer=1.2, latency=0.0006000000000000001, computing=0.0)
    """

    bandwidth: float
    latency: float
    world_size: int
    ranks_a_node: int = 1
    sharded: bool = False
    algorithm: Algorithm = "tree"
    cpu_seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        for field in ("world_size", "ranks_a_node"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(field, value, "an integer of at least 1")
        if self.world_size % self.ranks_a_node != 0:
            raise SettingError("ranks_a_node", self.ranks_a_node, f"a divisor of the world size, {self.world_size}")
        if self.algorithm not in ("ring", "tree"):
            raise SettingError("algorithm", self.algorithm, "'ring' or 'tree'")

    @property
    def peers(self) -> int:
        """Ranks that average the same gradients."""
        return self.world_size // self.ranks_a_node if self.sharded else self.world_size

    def seconds(self, asked: Asked) -> Wire:
        """What a collective takes, of which each rank hands over ``asked.nbytes``."""
        peers = self.peers
        if peers == 1:
            return Wire(0.0, 0.0)
        doublings = math.ceil(math.log2(peers))
        # A ring that goes through node after node leaves each node once, whatever the number of its ranks; sharded
        # ranks are in rings of their own.
        together = self.ranks_a_node if self.sharded else 1
        messages = doublings if self.algorithm == "tree" else peers - 1
        if asked.kind == "average":
            own = 2 * (peers - 1) / peers * asked.nbytes
            messages *= 2
        elif asked.kind == "gather":
            own = (peers - 1) * asked.nbytes
        else:
            own = (peers - 1) / peers * asked.nbytes
            messages = peers - 1
        crossing = self._swapped(asked.nbytes) if asked.kind == "swap" else own * together
        computing = own * self.cpu_seconds_per_byte
        return Wire(max(crossing / self.bandwidth, computing), messages * self.latency, computing)

    def _swapped(self, nbytes: float) -> float:
        """Every rank sends a piece to every other one, of which those on its node do not leave it."""
        if self.sharded:
            return self.ranks_a_node * nbytes * (self.peers - 1) / self.peers
        near = self.ranks_a_node if self.world_size > self.ranks_a_node else 1
        return near * nbytes * (self.world_size - near) / self.world_size


@dataclasses.dataclass(frozen=True)
class Processor:
    """What computes the compression: a core, or an accelerator.

    Args:
        memory_rate: bytes that it reads and writes in a second, both counted.
        flops_rate: operations of thin matrix products in a second, a multiplication and an addition counted as two.
        bucket_seconds: what a bucket takes besides, whatever its size: the interpreter's work, and launches.
        matrix_seconds: the same of each matrix that is compressed.

    Example:
        >>> Processor(memory_rate=1e10, flops_rate=1e11, bucket_seconds=0.0).seconds(nbytes=5e9, flops=1e10)
        0.6
    """

    memory_rate: float
    flops_rate: float
    bucket_seconds: float
    matrix_seconds: float = 0.0

    def seconds(self, nbytes: float, flops: float) -> float:
        """What reading and writing ``nbytes`` and computing ``flops`` takes, one after the other."""
        return nbytes / self.memory_rate + flops / self.flops_rate
