"""Starting stages whose needs are met, the next items of fan-outs of bounded width, and their combining tasks. Pure."""

from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.adaptive import allowed
from mcp_control.pipelines.closing import complete, failures_of, items_of
from mcp_control.pipelines.control import as_millis
from mcp_control.pipelines.counting import added, items_in, numbers, open_in, spoiled, told_by
from mcp_control.pipelines.decision import Missing, Start
from mcp_control.pipelines.draft import OPEN, Draft
from mcp_control.pipelines.expressions import Expression, Raw, Scope, elements, join
from mcp_control.pipelines.model import NOT_REACHED, NOT_WANTED, STAGE_FINAL, RunState, StageRun, StageState, Window
from mcp_control.pipelines.plan import PlannedStage
from mcp_control.pipelines.result_model import combine_of, key_of
from mcp_control.pipelines.validate import ITEMS_MAX
from mcp_control.pipelines.waiting import begin

_NEW: Final = Window()
# Bound once: to look a member up in its class takes nine times as long.
_RUNNING: Final = StageState.RUNNING
_COMPLETED: Final = StageState.COMPLETED
_PAUSED: Final = RunState.PAUSED


def go_on(draft: Draft, places: Iterable[int]) -> None:
    """Start the next items of running fan-outs among these stages, and the combining task where all items have ended."""
    for place in places:
        stage = draft.stages[place]
        if stage.state is not _RUNNING or stage.combining:
            continue
        planned = draft.plan.stages[place]
        if draft.run.ending is not None and place not in draft.plan.cleaning:
            continue
        if planned.windowed and not spoiled(planned, stage):
            _refill(draft, place)
            stage = draft.stages[place]
        ready = stage.done + stage.failed + stage.cancelled == stage.total - 1
        if planned.combine is not None and ready and not spoiled(planned, stage):
            try:
                start_combine(draft, place)
            except ExpressionError as error:
                draft.fail(place, str(error))


def start_all(draft: Draft, places: list[int]) -> None:
    """Start what may start among these stages. What ends at once, skipped or without items, lets those after it follow in the same breath.

    In a run that is ending only those stages start that run always.
    """
    plan, run, ending = draft.plan, draft.run, draft.run.ending
    running = draft.running() if plan.choosy else 0
    if len(places) > 1:
        places.sort(key=lambda place: plan.stages[place].rank)
    for place in places:  # grows while it is gone through
        stage = draft.stages[place]
        if stage.state not in OPEN or (ending is not None and place not in plan.cleaning):
            continue
        met = needs_met(draft, place)
        if met is None:
            continue
        planned = plan.stages[place]
        if not met:
            draft.close(place, StageState.SKIPPED, NOT_REACHED, "a stage it needs did not complete")
            places += planned.after
            continue
        if run.state is _PAUSED and ending is None:
            _hold(draft, place)
            continue
        try:
            if planned.when is not None and not _holds(planned.when, draft.scope()):
                draft.close(place, StageState.SKIPPED, NOT_WANTED, f"{planned.when.source} is false"[:500])
                places += planned.after
                continue
            if place in plan.waiting:  # holds no slot, so that it takes no width either
                begin(draft, place)
                running += draft.stages[place].state is _COMPLETED
            elif plan.choosy and not _may_start(draft, planned, running):
                _hold(draft, place)
                continue
            else:
                start_stage(draft, place)
                running += 1
        except ExpressionError as error:
            draft.fail(place, str(error))
        if draft.run.ending is not ending:
            return
        if draft.stages[place].state is _COMPLETED:
            running -= 1
            places += planned.after


def needs_met(draft: Draft, place: int) -> bool | None:
    """Say whether what a stage needs is as it must be; None while that is open."""
    stages, planned = draft.stages, draft.plan.stages[place]
    when = planned.stage.run_when
    if when == "all_completed":
        met: bool | None = True
        for need in planned.needs:
            state = stages[need].state
            if state is not _COMPLETED:
                if state in STAGE_FINAL:
                    return False
                met = None
        return met
    completed = False
    for need in planned.needs:
        state = stages[need].state
        if state not in STAGE_FINAL:
            return None
        completed = completed or state is _COMPLETED
    return completed or when != "any_completed" or not planned.needs


def start_stage(draft: Draft, place: int) -> None:
    """Start the tasks of a stage. Raises ExpressionError, Missing."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    seconds = planned.stage.deadline_seconds
    due = stage.deadline_at if seconds is None else draft.now + as_millis(seconds)
    if planned.over is None:
        made = draft.made(planned, None, stage.round, planned.payload.render(draft.scope()))
        draft.stages[place] = stage = replace(
            stage,
            state=_RUNNING,
            started_at=draft.now,
            deadline_at=due,
            total=1,
            since=stage.since if planned.nested else stage.round,
        )
        if hit := _hits(draft, planned, [made]):
            draft.stages[place] = replace(stage, done=1, ended=b"\x01", cached=1, since=stage.round)
            complete(draft, place, hit[0])
            return
        draft.start.append(made)
        return
    stage = replace(stage, state=_RUNNING, started_at=draft.now, deadline_at=due)
    items = _elements(draft, planned)
    total = len(items) + (planned.combine is not None)
    kept = int.from_bytes(stage.ended, "little") if stage.total == total else 0
    if not kept:
        since = stage.since if planned.nested and stage.total in (0, total) else stage.round
        stage = replace(stage, total=total, done=0, ended=b"", counts={}, since=since)
    if planned.stage.cache is not None and items:
        stage = _taken(draft, planned, stage, items)
        kept = int.from_bytes(stage.ended, "little")
    if planned.windowed:
        draft.stages[place], start = _next(draft, planned, replace(stage, begun=0), items)
    else:
        start = [_item(draft, planned, stage, items, index) for index in range(len(items)) if not kept >> index & 1]
        draft.stages[place] = stage
    draft.start += start
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
    failures = failures_of(draft, place)
    beside = {}
    if "items" not in planned.combine.roots:
        beside["items"] = join(items)
    if failures and "failures" not in planned.combine.roots:
        beside["failures"] = join(failures)
    payload = planned.combine.render(draft.scope(items=items, failures=failures), beside)
    made = draft.made(planned, -1, stage.round, payload)
    if hit := _hits(draft, planned, [made], combining=True):
        ended = int.from_bytes(stage.ended, "little") | 1 << stage.total - 1
        size = (stage.total + 7) >> 3
        draft.stages[place] = replace(
            stage, combining=True, ended=ended.to_bytes(size, "little"), done=stage.done + 1, cached=stage.cached + 1
        )
        complete(draft, place, hit[0])
        return
    draft.start.append(made)
    draft.stages[place] = replace(stage, combining=True)


def _taken(draft: Draft, planned: PlannedStage, stage: StageRun, items: list[msgspec.Raw]) -> StageRun:
    """Return a fan-out that is about to start after it took what results of earlier runs there are. Raises ExpressionError, Missing."""
    if not _takes(draft, stage):
        return stage
    hits = _hits(draft, planned, [_item(draft, planned, stage, items, index) for index in range(len(items))])
    if not hits:
        return stage
    counts = stage.counts
    for result in hits.values():
        counts = added(counts, numbers(told_by(result).counts))
    ended = sum(1 << index for index in hits).to_bytes((stage.total + 7) >> 3, "little")
    draft.results.setdefault(stage.id, {}).update(hits)
    draft.hits[stage.id] = hits
    return replace(stage, ended=ended, done=len(hits), cached=len(hits), counts=counts)


def _takes(draft: Draft, stage: StageRun) -> bool:
    """Say whether a stage takes results of earlier runs: a retry computes anew."""
    return not draft.run.no_cache and not stage.round


def _hits(draft: Draft, planned: PlannedStage, wanted: list[Start], *, combining: bool = False) -> dict[int, Raw]:
    """Return the kept results of tasks about to start, by their place among these. Raises Missing."""
    stage = planned.stage
    if stage.cache is None or not _takes(draft, draft.stages[planned.place]):
        return {}
    known, tenant = draft.material.kept, draft.run.tenant
    asked, name = (stage.uses, stage.version), stage.id
    if combining and stage.fan_out is not None and stage.fan_out.combine is not None:
        asked, name = (stage.fan_out.combine.uses, "*"), combine_of(stage.id)
    codes = draft.material.codes.get(name, ())
    keys = [[key_of(tenant, *asked, code, each.payload) for code in codes] for each in wanted]
    if missing := [key for some in keys for key in some if key not in known]:
        raise Missing(kept=missing)
    hits: dict[int, Raw] = {}
    for at, some in enumerate(keys):
        for key in some:
            if (found := known[key]) is not None:
                hits[at] = found
                draft.used.append(key)
                break
    return hits


def _hold(draft: Draft, place: int) -> None:
    stage = draft.stages[place]
    if stage.state is StageState.PENDING:
        draft.stages[place] = replace(stage, state=StageState.READY)


def _holds(condition: Expression, scope: Scope) -> bool:
    value = condition.value(scope)
    if not isinstance(value, bool):
        raise ExpressionError(f"the condition `{condition.source}` must give true or false")
    return value


def _may_start(draft: Draft, planned: PlannedStage, running: int) -> bool:
    """Say whether one more stage may run beside those that do."""
    plan = draft.plan
    mode = plan.spec.spec.mode
    if mode == "adaptive":
        free = draft.free(planned)
        return running < allowed(draft.run.window or _NEW, open=running, free=free, top=plan.width)
    if plan.width is not None and running >= plan.width:
        return False
    if mode != "priority":
        return True
    # Lower ranks are looked at first, so that what could start before this one runs by now.
    return not any(
        stage.state is _RUNNING and plan.stages[place].rank[0] < planned.rank[0]
        for place, stage in enumerate(draft.stages)
    )


# --- items --------------------------------------------------------------------------------------------------------


def _elements(draft: Draft, planned: PlannedStage) -> list[msgspec.Raw]:
    """Return what a fan-out goes over; kept while its items are started bit by bit."""
    assert planned.over is not None
    known = draft.material.lists.get(planned.stage.id)
    if known is not None:
        return known
    items = elements(planned.over.raw(draft.scope()))
    if len(items) > ITEMS_MAX:
        raise ExpressionError(f"a fan-out has at most {ITEMS_MAX} items, this one {len(items)}")
    if planned.windowed:
        draft.material.lists[planned.stage.id] = items
    return items


def payload_of(draft: Draft, place: int, index: int | None) -> bytes:
    """Return the payload of a stage that has started, or of an item of it. Raises ExpressionError, Missing."""
    planned = draft.plan.stages[place]
    if index is None:
        return planned.payload.render(draft.scope())
    return _item(draft, planned, draft.stages[place], _elements(draft, planned), index).payload


def _item(draft: Draft, planned: PlannedStage, stage: StageRun, items: list[msgspec.Raw], index: int) -> Start:
    item = items[index]
    scope = draft.scope(item=item, index=index)
    explicit = planned.nested is not None or bool(planned.payload.roots & {"item", "index"})
    beside = None if explicit else {"item": item, "index": str(index).encode()}
    priority = None
    if planned.item_rank is not None:
        value = planned.item_rank.value(scope)
        if type(value) is not int or not 0 <= value <= 100:
            raise ExpressionError(f"the rank `{planned.item_rank.source}` must give a whole number from 0 to 100")
        priority = value
    return draft.made(planned, index, stage.round, planned.payload.render(scope, beside), priority)


def _refill(draft: Draft, place: int) -> None:
    planned, stage = draft.plan.stages[place], draft.stages[place]
    if stage.begun >= items_in(planned, stage):
        return
    try:
        after, start = _next(draft, planned, stage, _elements(draft, planned))
    except ExpressionError as error:
        draft.spoil(place, str(error))
        return
    if after.begun != stage.begun:
        draft.stages[place] = after
        draft.start += start


def _next(
    draft: Draft, planned: PlannedStage, stage: StageRun, items: list[msgspec.Raw]
) -> tuple[StageRun, list[Start]]:
    """Return a stage after its next items have been started, as many as its width allows, and these."""
    ended = int.from_bytes(stage.ended, "little")
    busy = open_in(planned, stage)
    limit = _width(draft, planned, stage, busy)
    start: list[Start] = []
    at = stage.begun
    while at < len(items) and (busy < limit or ended >> at & 1):
        if not ended >> at & 1:
            start.append(_item(draft, planned, stage, items, at))
            busy += 1
        at += 1
    return replace(stage, begun=at), start


def _width(draft: Draft, planned: PlannedStage, stage: StageRun, busy: int) -> int:
    fan_out = planned.stage.fan_out
    assert fan_out is not None
    if fan_out.mode == "sequential":
        return 1
    if fan_out.mode == "adaptive":
        free = draft.free(planned)
        return allowed(stage.window or _NEW, open=busy, free=free, top=fan_out.width)
    return ITEMS_MAX if fan_out.width is None else fan_out.width
