"""The tasks of one stage: which there are, which have ended, and what their results tell. Pure."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.ids import derived_id
from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.input_model import COMPENSATION, CompensationState
from mcp_control.pipelines.model import Run, StageRun, StageState
from mcp_control.pipelines.plan import Plan, PlannedStage
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import Task, TaskState

_COUNTS_MAX: Final = 64
# Bound once: to look a member up in its class takes nine times as long.
_RUNNING: Final = StageState.RUNNING
_COMPLETED: Final = TaskState.COMPLETED


class Told(msgspec.Struct, gc=False):
    """What an output tells about itself: numbers under `counts`, anything under `summary`."""

    counts: dict[str, object] | None = None
    summary: dict[str, object] | None = None


_told: Final = msgspec.json.Decoder(Told).decode
_NOTHING: Final = Told()


def told_by(output: Raw) -> Told:
    """Return what an output tells; nothing when it is of another shape."""
    try:
        return _told(output)
    except msgspec.MsgspecError:
        return _NOTHING


def numbers(counts: Mapping[str, object] | None) -> dict[str, int]:
    """Return the whole numbers among told counts, at most 64."""
    if not counts:
        return {}
    found = {name: value for name, value in counts.items() if type(value) is int and len(name) <= 64}
    return found if len(found) <= _COUNTS_MAX else dict(list(found.items())[:_COUNTS_MAX])


def task_id(run_id: str, stage: str, item: int | None, round: int) -> str:
    """Return the id of a task of a run; the same work has the same id."""
    return derived_id("task", run_id, stage, "" if item is None else item, round)


def child_id(run_id: str, stage: StageRun, item: int | None) -> str:
    """Return the id of the run that is a stage of a run, or an item of it; a retry of the stage is a retry of that run."""
    return derived_id("run", run_id, stage.id, "" if item is None else item, stage.since)


def outstanding(planned: PlannedStage, stage: StageRun) -> list[int | None]:
    """Return the items of the tasks a running stage waits for."""
    if stage.state is not _RUNNING:
        return []
    started = started_in(planned, stage)
    ended = int.from_bytes(stage.ended, "little")
    if planned.over is None:
        return [] if ended & 1 else [None]
    items = items_in(planned, stage)
    return [-1 if at == items and planned.combine is not None else at for at in range(started) if not ended >> at & 1]


def open_in(planned: PlannedStage, stage: StageRun) -> int:
    """Return how many tasks a running stage waits for."""
    started = started_in(planned, stage)
    return started - (int.from_bytes(stage.ended, "little") & (1 << started) - 1).bit_count()


def needed(at_least: int | str | None, items: int) -> int:
    """Return how many items of a fan-out must complete."""
    if at_least is None:
        return items
    if isinstance(at_least, int):
        return min(at_least, items)
    share = Fraction(at_least.removesuffix("%")) / 100
    return -(-items * share.numerator // share.denominator)


def spoiled(planned: PlannedStage, stage: StageRun) -> bool:
    """Say whether a running stage can no longer complete."""
    if stage.reason:
        return True
    if not stage.failed and not stage.cancelled:
        return False
    fan_out = planned.stage.fan_out
    if fan_out is None or not planned.lenient:
        return True
    items = items_in(planned, stage)
    bad = int.from_bytes(stage.bad, "little")
    return bool(bad >> items) or items - bad.bit_count() < needed(fan_out.at_least, items)


def failure_of(task: Task, index: int) -> bytes:
    """Return what is told of an item that did not complete: index, state, reason, message."""
    failure = task.failure
    told = {
        "index": index,
        "state": task.state.value,
        "reason": failure.code if failure else task.reason,
        "message": (failure.message if failure else task.message)[:500],
    }
    return msgspec.json.encode(told)


def tasks_of(run_id: str, planned: PlannedStage, stage: StageRun, items: Iterable[int | None]) -> list[str]:
    """Return the ids of the tasks among these items of a stage; items that are runs of their own have none."""
    return [task_id(run_id, stage.id, item, stage.round) for item in items if planned.nested is None or item == -1]


def waited_for(run: Run, plan: Plan, limit: int) -> list[str]:
    """Return the ids of the tasks a run waits for, at most `limit`."""
    found: list[str] = []
    for place, stage in enumerate(run.stages):
        if stage.state is _RUNNING and len(found) < limit:
            found += tasks_of(run.id, plan.stages[place], stage, outstanding(plan.stages[place], stage))
    for each in run.compensations:
        if each.state is CompensationState.RUNNING:
            found.append(task_id(run.id, each.stage, COMPENSATION, run.round))
    return found[:limit]


def items_in(planned: PlannedStage, stage: StageRun) -> int:
    """Return how many items a started fan-out has."""
    return stage.total - (planned.combine is not None)


def started_in(planned: PlannedStage, stage: StageRun) -> int:
    """Return how many tasks of a running stage have been created, those that a retry keeps included."""
    if planned.windowed and not stage.combining:
        return stage.begun
    return stage.total if planned.combine is None or stage.combining else stage.total - 1


def count(run_id: str, planned: PlannedStage, stage: StageRun, finished: Finished) -> tuple[StageRun, int] | None:
    """Count the end of a task.

    Returns:
        The stage after it and the task's place in the stage; None when it does not count: another run or round, counted before, or not
        waited for.
    """
    task = finished.task
    links = task.links
    if stage.state is not _RUNNING or links.round != stage.round or links.run_id != run_id:
        return None
    item = links.item
    at = 0 if item is None else stage.total - 1 if item == -1 else item
    ended = int.from_bytes(stage.ended, "little")
    if not 0 <= at < started_in(planned, stage) or ended >> at & 1:
        return None
    size = (stage.total + 7) >> 3
    after = (ended | 1 << at).to_bytes(size, "little")
    if task.state is _COMPLETED:
        counts = stage.counts
        if planned.over is not None and item != -1 and finished.result is not None:
            counts = added(counts, numbers(told_by(finished.result).counts))
        return replace(stage, ended=after, done=stage.done + 1, counts=counts), at
    bad = (int.from_bytes(stage.bad, "little") | 1 << at).to_bytes(size, "little")
    if task.state is TaskState.CANCELLED:
        return replace(stage, ended=after, bad=bad, cancelled=stage.cancelled + 1), at
    reason, message = stage.reason, stage.message
    if not stage.reason and (item == -1 or not planned.lenient):
        failure = task.failure
        reason = (failure.code if failure else task.reason) or f"task-{task.state.value}"
        message = (failure.message if failure else task.message)[:500]
    return replace(stage, ended=after, bad=bad, failed=stage.failed + 1, reason=reason, message=message), at


def added(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Return the sums of told counts, of at most 64 names."""
    if not more:
        return counts
    total = dict(counts)
    for name, number in more.items():
        if name in total or len(total) < _COUNTS_MAX:
            total[name] = total.get(name, 0) + number
    return total
