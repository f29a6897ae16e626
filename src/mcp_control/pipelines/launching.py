"""Starting stages whose needs are met, and the combining tasks of fan-outs. Pure."""

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from mcp_control.pipelines.closing import complete, items_of
from mcp_control.pipelines.draft import OPEN, Draft
from mcp_control.pipelines.expressions import ExpressionError, elements, join
from mcp_control.pipelines.model import RunState, StageState

ITEMS_MAX: Final = 10_000


def combine_all(draft: Draft, places: Iterable[int]) -> None:
    """Start the combine task of every fan-out among these stages whose items are all completed."""
    for place in places:
        stage = draft.stages[place]
        if stage.state is StageState.RUNNING and not stage.combining:
            planned = draft.plan.stages[place]
            if planned.combine is not None and stage.done == stage.total - 1 and draft.run.ending is None:
                try:
                    start_combine(draft, place)
                except ExpressionError as error:
                    draft.fail(place, str(error))


def start_all(draft: Draft, places: list[int]) -> None:
    """Start what may start among these stages; a fan-out over nothing ends at once, so those after it may follow in the same breath."""
    plan, run = draft.plan, draft.run
    width = plan.spec.spec.max_running
    if len(places) > 1:
        places.sort(key=lambda place: plan.stages[place].rank)
    for place in places:  # grows while it is gone through
        stage = draft.stages[place]
        if stage.state not in OPEN or not needs_met(draft, place):
            continue
        if run.state is RunState.PAUSED or (width is not None and draft.running() >= width):
            if stage.state is StageState.PENDING:
                draft.stages[place] = replace(stage, state=StageState.READY)
            continue
        try:
            start_stage(draft, place)
        except ExpressionError as error:
            draft.fail(place, str(error))
        if draft.run.ending is not None:
            return
        if draft.stages[place].state is StageState.COMPLETED:
            places += plan.stages[place].after


def needs_met(draft: Draft, place: int) -> bool:
    """Say whether all that a stage needs is completed."""
    stages = draft.stages
    for need in draft.plan.stages[place].needs:  # noqa: SIM110  twice as fast as `all`, on the path of every task
        if stages[need].state is not StageState.COMPLETED:
            return False
    return True


def start_stage(draft: Draft, place: int) -> None:
    """Start the tasks of a stage. Raises ExpressionError, Missing."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    if planned.over is None:
        payload = planned.payload.render(draft.scope())
        draft.stages[place] = replace(stage, state=StageState.RUNNING, started_at=draft.now, total=1, since=stage.round)
        draft.add(planned, None, stage.round, payload)
        return
    stage = replace(stage, state=StageState.RUNNING, started_at=draft.now)
    items = elements(planned.over.raw(draft.scope()))
    if len(items) > ITEMS_MAX:
        raise ExpressionError(f"a fan-out has at most {ITEMS_MAX} items, this one {len(items)}")
    total = len(items) + (planned.combine is not None)
    kept = int.from_bytes(stage.ended, "little") if stage.total == total else 0
    if not kept:
        stage = replace(stage, total=total, done=0, ended=b"", counts={}, since=stage.round)
    explicit = bool(planned.payload.roots & {"item", "index"})
    for index, item in enumerate(items):
        if kept >> index & 1:
            continue
        scope = draft.scope(item=item, index=index)
        beside = None if explicit else {"item": item, "index": str(index).encode()}
        draft.add(planned, index, stage.round, planned.payload.render(scope, beside))
    draft.stages[place] = stage
    if stage.done == len(items):
        if planned.combine is not None:
            start_combine(draft, place)
        else:
            complete(draft, place, join(items_of(draft, place)))


def start_combine(draft: Draft, place: int) -> None:
    """Start the combining task of a fan-out. Raises ExpressionError, Missing."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    assert planned.combine is not None
    items = items_of(draft, place)
    beside = None if "items" in planned.combine.roots else {"items": join(items)}
    payload = planned.combine.render(draft.scope(items=items), beside)
    draft.stages[place] = replace(stage, combining=True)
    draft.add(planned, -1, stage.round, payload)
