"""DALL-E's sizes on 8 to 16,384 ranks, simulated: the paper's ranks of compression, over links of several rates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from distopt.integrations.dalle.plan import model_of
from torch import nn
from torch.distributed.tensor import Shard

import distopt
from distopt.attach.exemptions import exempt_names
from distopt.planning.outcome import Plan

RANKS = {"paper-2.8b": 512, "paper-5.6b": 640, "paper-12b": 896}
"""Of compression, by preset: Ramesh et al. 2021 (arXiv:2102.12092), table 1. Each of 8 shards has an eighth of them."""
GPUS = 8
WORLDS = [2**power for power in range(3, 15)]
GIGABITS = (25, 100, 400)
TOKENS = 1280
"""Of one pair of picture and caption; a GPU takes one at each step, whatever their number."""
GPU = {"memory_rate": "900GB", "flops_rate": "14T"}
"""A V100's, as the paper had them: bytes read and written, and float32 operations."""
COMPUTED = 0.35 * 125e12
"""Operations a second in the model's own products, in 16 bits: 35 % of what a V100 is said to do."""
OPERATIONS = 8
"""For each parameter and token: two forward, two more for recomputing that, four backward."""


def simulated(
    presets: Sequence[str] = tuple(RANKS), worlds: Sequence[int] = tuple(WORLDS), gigabits: Sequence[int] = GIGABITS
) -> list[dict[str, Any]]:
    """Predict steps: gradients in float16, factors in float16 and in float32, both passes."""
    records: list[dict[str, Any]] = []
    for preset in presets:
        gradients = gradients_of(preset)
        numbers = sum(math.prod(shape) for _, shape, _ in gradients)
        compute = OPERATIONS * numbers * TOKENS / COMPUTED
        for rate in gigabits:
            for world in worlds:
                for wire in ("float16", "float32"):
                    plan = distopt.plan(
                        gradients,
                        world_size=world,
                        bandwidth=f"{rate}Gbit",
                        **GPU,
                        compute_seconds=compute,
                        ranks=RANKS[preset] // GPUS,
                        passes="both",
                        # Factors in float32 for gradients in float16 save too little of some matrices by the default.
                        like=distopt.PowerSGD(wire_dtype=getattr(torch, wire), min_saving=0.0),
                        ranks_a_node=GPUS,
                        sharded=True,
                        shard_placement_fn=_cut,
                        margin=0.0,
                    )
                    facts = {"kind": "simulated", "preset": preset, "gigabits": rate, "world": world, "wire": wire}
                    records.append({**facts, "parameters": numbers, **_figures(plan)})
    return records


def gradients_of(preset: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name the transformer's gradients, those of query, key and value apart, as the paper compresses them."""
    transformer, _ = model_of(preset, GPUS)
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    exempt = exempt_names(transformer)
    for name, parameter in transformer.named_parameters():
        rows, *rest = parameter.shape
        parts = 3 if name.endswith("attention_in.weight") else 1
        # What is sent whole is known by its name, for there are no modules any more.
        kept = "embed." if name in exempt and parameter.dim() > 1 else ""
        found += [(f"{kept}{name}.{i}", (rows // parts, *rest), torch.float16) for i in range(parts)]
    return found


def _cut(parameter: nn.Parameter) -> Shard | None:
    """The second matrix of each MLP along its inputs, all others along their outputs."""
    wide = parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0]
    return Shard(1) if wide else None


def _figures(plan: Plan) -> Mapping[str, Any]:
    ranked = [choice for choice in plan.choices if isinstance(choice.way, int)]
    before = sum(math.prod(choice.shape) for choice in ranked)
    after = sum(sum(choice.shape) * choice.way for choice in ranked if isinstance(choice.way, int))
    others = [estimate for estimate in plan.estimates.values() if has_factors(estimate.scheme.label)]
    best = min(others, key=lambda estimate: estimate.step_seconds, default=plan.plain)
    return {
        "compute_seconds": plan.compute_seconds,
        "plain_seconds": plan.plain.step_seconds,
        "ranked_seconds": best.step_seconds,
        "helps": plan.helps,
        "plan": plan.chosen.scheme.label,
        "matrices_saved": 1 - after / before if before else None,
        "bytes": plan.plain.nbytes,
        "bytes_sent": plan.chosen.nbytes,
    }


def has_factors(label: str) -> bool:
    """Whether a scheme has factors, and nothing else that is compressed, by its label."""
    return label.startswith("rank ") and "16 bits" not in label
