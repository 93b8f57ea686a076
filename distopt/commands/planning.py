"""``distopt plan``: would compressing a model's gradients help on a cluster, and how?"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from distopt.errors import SettingError
from distopt.planning import quantities

_EXAMPLES = """examples:
  distopt plan --model dalle:paper-12b --world 1024 --bandwidth 100Gbit --ranks-a-node 8 --sharded --compute-seconds 2.8
  distopt plan --model torchvision.models:resnet50 --world 16 --bandwidth 10Gbit --compute-seconds 90ms
"""
_DALLE = "dalle:"


def add_to(commands: Any) -> None:
    """Add the command to what `ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "plan",
        help="predict a training step, and say whether compressing gradients would help",
        description="Predict how long a training step takes on a cluster, with and without compressed gradients. "
        "Nothing is trained.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="dalle:PRESET, or package.module:factory, called without arguments")
    add("--world", required=True, type=int, metavar="N", help="ranks of the cluster")
    add("--bandwidth", required=True, metavar="RATE", help="of a node's link: 10Gbit, 1.25GB")
    add("--latency", metavar="TIME", help="of a message: 20us (default)")
    add("--memory-rate", metavar="RATE", help="bytes that a rank reads and writes a second: 3TB; timed here by default")
    add(
        "--flops-rate",
        metavar="RATE",
        help="operations a second in thin matrix products: 50T; 10 a byte of --memory-rate, or timed here, by default",
    )
    add(
        "--compute-seconds",
        metavar="TIME",
        help="of forward and backward of one rank: 120ms; 0 by default",
    )
    add("--ranks", type=int, nargs="+", metavar="R", help="of the factors that are compared; powers of two by default")
    add("--passes", choices=("both", "alternate"), default="both", help="as PowerSGD has it (default: both)")
    add("--wire", choices=("float16", "bfloat16"), help="what factors travel in; float32 by default")
    add("--ranks-a-node", type=int, default=1, metavar="N", help="ranks that share a node's link (default: 1)")
    add("--sharded", action="store_true", help="the ranks of a node hold one model together")
    add("--algorithm", choices=("tree", "ring"), default="tree", help="of all-reduces (default: tree)")
    add("--margin", type=float, default=0.05, metavar="X", help="part of a step that is not worth it (default: 0.05)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    _check(parsed)
    import torch

    from distopt.planning.plan import RANKS, plan
    from distopt.reducers.powersgd import PowerSGD

    model, placement = _model(parsed.model, parsed.ranks_a_node if parsed.sharded else 1)
    found = plan(
        model,
        world_size=parsed.world,
        bandwidth=parsed.bandwidth,
        latency=parsed.latency,
        memory_rate=parsed.memory_rate,
        flops_rate=parsed.flops_rate,
        compute_seconds=parsed.compute_seconds,
        ranks=parsed.ranks or RANKS,
        passes=parsed.passes,
        like=PowerSGD(wire_dtype=getattr(torch, parsed.wire)) if parsed.wire else None,
        ranks_a_node=parsed.ranks_a_node,
        sharded=parsed.sharded,
        shard_placement_fn=placement,
        algorithm=parsed.algorithm,
        margin=parsed.margin,
    )
    print(found)
    return 0


def _check(parsed: argparse.Namespace) -> None:
    """Refuse whatever can be refused without torch."""
    quantities.bytes_per_second("--bandwidth", parsed.bandwidth)
    for field, read in (
        ("latency", quantities.seconds),
        ("memory_rate", quantities.bytes_per_second),
        ("flops_rate", quantities.flops),
        ("compute_seconds", quantities.seconds),
    ):
        if getattr(parsed, field) is not None:
            read("--" + field.replace("_", "-"), getattr(parsed, field))
    for flag, value in (("--world", parsed.world), ("--ranks-a-node", parsed.ranks_a_node)):
        if value < 1:
            raise SettingError(flag, value, "an integer of at least 1")
    if parsed.world % parsed.ranks_a_node != 0:
        raise SettingError("--ranks-a-node", parsed.ranks_a_node, f"a divisor of --world, {parsed.world}")
    if any(rank < 1 for rank in parsed.ranks or ()):
        raise SettingError("--ranks", min(parsed.ranks), "an integer of at least 1")
    if not 0 <= parsed.margin < 1:
        raise SettingError("--margin", parsed.margin, "a number in [0, 1)")
    if not parsed.model.startswith(_DALLE) and not all(parsed.model.partition(":")):
        raise SettingError("--model", parsed.model, "'dalle:PRESET' or 'package.module:factory'")


def _model(text: str, shards: int) -> tuple[Any, Any]:
    """A model without memory, and how its parameters are cut."""
    if text.startswith(_DALLE):
        return _dalle(text.removeprefix(_DALLE), shards)
    import torch

    module, _, factory = text.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        make = getattr(importlib.import_module(module), factory)
        with torch.device("meta"):
            return make(), None
    except Exception as error:  # whatever the user's code raises
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SettingError("--model", text, f"a function that makes a model without arguments ({said})") from error
    finally:
        sys.path.pop(0)


def _dalle(name: str, shards: int) -> tuple[Any, Any]:
    # By name: beside the sources the integrations lie in a folder of their own.
    presets: Sequence[str] = importlib.import_module("distopt.integrations.dalle.settings").PRESETS
    sized = [preset for preset in presets if preset != "paper-dvae"]
    if name not in sized:
        raise SettingError("--model", _DALLE + name, "one of " + ", ".join(_DALLE + preset for preset in sized))
    return importlib.import_module("distopt.integrations.dalle.plan").model_of(name, shards)
