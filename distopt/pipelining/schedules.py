"""In which order a rank goes through its micro-batches, and how long it has to wait meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import PipelineStage

from distopt.errors import SettingError

ScheduleName: TypeAlias = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved")

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Action(NamedTuple):
    """One piece of work of a rank."""

    kind: Literal["forward", "backward"]
    stage: int
    microbatch: int
    begin: float = 0.0
    """Seconds of ``time.perf_counter``, on the host."""
    end: float = 0.0


def check_schedule(schedule: ScheduleName, ranks: int, stages: int, microbatches: int) -> None:
    """Refuse what a schedule cannot do.

    Args:
        schedule: its name.
        ranks: of the pipeline.
        stages: a multiple of ``ranks``.
        microbatches: at least 1.

    Raises:
        SettingError: with one line that says what it needs.
    """
    if schedule == "interleaved":
        if ranks == 1:
            raise SettingError("schedule", schedule, "'1f1b' or 'gpipe' where a pipeline has one rank")
        if stages % ranks != 0 or stages == ranks:
            raise SettingError("stages", stages, f"a multiple of the {ranks} ranks of the pipeline, at least twice it")
        rounds = max(1, microbatches // ranks)
        if microbatches % rounds != 0:
            raise SettingError("microbatches", microbatches, f"a multiple of {rounds}, in as many rounds it goes")
    elif stages != ranks:
        raise SettingError("stages", stages, f"the number of ranks of the pipeline, which is {ranks}, for {schedule!r}")
    if schedule == "1f1b" and microbatches < stages:
        raise SettingError("microbatches", microbatches, f"at least the number of stages, which is {stages}")


def build(
    schedule: ScheduleName, stages: list[PipelineStage], microbatches: int, loss_fn: Loss | None, mean: bool
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """Torch's schedule of that name for the stages of one rank.

    Args:
        schedule: its name.
        stages: one, or several if it is interleaved.
        microbatches: how many a step has.
        loss_fn: of output and target of a micro-batch; ``None`` for forward only.
        mean: whether the loss of a batch is the mean of its micro-batches' losses; the sum otherwise.
    """
    if schedule == "interleaved":
        # torch's annotation asks for lists of its own base class.
        return ScheduleInterleaved1F1B([*stages], microbatches, loss_fn=loss_fn, scale_grads=mean)
    kind = ScheduleGPipe if schedule == "gpipe" or loss_fn is None else Schedule1F1B
    return kind(stages[0], microbatches, loss_fn=loss_fn, scale_grads=mean)


def bubble_share(schedule: ScheduleName, ranks: int, stages: int, microbatches: int) -> float:
    """Share of its time that a rank waits, if all stages take as long and sending takes no time.

    Args:
        schedule: its name.
        ranks: of the pipeline.
        stages: in all.
        microbatches: in a step.

    Example:
        >>> bubble_share("1f1b", 4, 4, 8), bubble_share("interleaved", 4, 8, 8)
        (0.2727272727272727, 0.15789473684210525)

    Source: Huang et al. 2019 (arXiv:1811.06965), section 2.3; Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    each = stages // ranks if schedule == "interleaved" else 1
    return (ranks - 1) / (microbatches * each + ranks - 1)


def idle_shares(actions: Sequence[Sequence[Action]], costs: Mapping[str, float] | None = None) -> list[float]:
    """Play what ranks do, each in its order, with fixed times; tell which share of the whole each one waits.

    Args:
        actions: of each rank, in the order in which it goes through them.
        costs: how long ``"forward"`` and ``"backward"`` of a stage take; 1 and 2 if ``None``.

    Raises:
        ValueError: if the ranks would wait for each other for ever.

    Example:
        >>> one, two = [Action("forward", i, 0) for i in (0, 1)]
        >>> idle_shares([[one], [two]])
        [0.5, 0.5]
    """
    costs = costs or {"forward": 1.0, "backward": 2.0}
    stages = 1 + max(action.stage for row in actions for action in row)
    done: dict[tuple[str, int, int], float] = {}
    clocks, busy = [0.0] * len(actions), [0.0] * len(actions)
    left = [list(row) for row in actions]
    while any(left):
        before = sum(map(len, left))
        for rank, row in enumerate(left):
            while row and all(need in done for need in _needs(row[0], stages)):
                action = row.pop(0)
                begin = max([clocks[rank], *(done[need] for need in _needs(action, stages))])
                clocks[rank] = done[action[:3]] = begin + costs[action.kind]
                busy[rank] += costs[action.kind]
        if sum(map(len, left)) == before:
            raise ValueError("the ranks wait for each other")
    return [1 - mine / max(clocks) for mine in busy]


def _needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What has to be done before."""
    kind, stage, microbatch = action[:3]
    if kind == "forward":
        return [("forward", stage - 1, microbatch)] if stage > 0 else []
    last = stage == stages - 1
    return [("forward", stage, microbatch), *([] if last else [("backward", stage + 1, microbatch)])]
