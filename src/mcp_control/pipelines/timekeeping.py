"""What time brings about for schedules: the leader's work. Harmless when two servers do it."""

import asyncio
from collections.abc import Coroutine
from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.changes import Change, Entity, Fact, IndexValue, Key, Query, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict
from mcp_control.pipelines.firing import Firing
from mcp_control.pipelines.schedule_model import FIRE_KIND, SCHEDULE_KIND, Fire, Schedule
from mcp_control.pipelines.schedule_records import new_fire, read_fire, read_schedule, schedule_fact, write_schedule
from mcp_control.pipelines.schedules import (
    ACTIVE_MAX,
    HISTORY_MAX,
    PRUNED,
    Turn,
    between,
    covered,
    decide,
    following,
    remember,
    stored,
)
from mcp_control.security.model import SYSTEM
from mcp_control.storage.ports import Store

_PAGE: Final = 100
_TURNS_MAX: Final = 50
_TAKEN: Final = frozenset({"started", "queued"})


class ScheduleKeeper:
    """Fires what is due, works off backfills, bounds the history.

    Args:
        history: fires that are kept of one schedule.
    """

    def __init__(self, store: Store, clock: Clock, firing: Firing, history: int = HISTORY_MAX) -> None:
        self._store = store
        self._clock = clock
        self._firing = firing
        self._history = history
        self._batch = min(PRUNED, history)

    async def once(self, now: int) -> int:
        """Look at every schedule that is due; returns how many those were.

        Raises:
            StoreUnavailable and the like: of a schedule that could not be served; the others were.
        """
        seen = 0
        after: list[IndexValue] | None = None
        while True:
            query = Query(where=[Where("due", "le", now)], order="due", after=after, limit=_PAGE)
            page = await self._store.find(SCHEDULE_KIND.name, query)
            await _all([self._serve(row, now) for row in page])
            seen += len(page)
            if len(page) < _PAGE:
                return seen
            after = [page[-1].index["due"], page[-1].id]

    async def _serve(self, row: Entity, now: int) -> None:
        schedule: Schedule | None = read_schedule(row)
        for _ in range(_TURNS_MAX):
            if schedule is None:
                return  # somebody else moves it; it is looked at again
            active, busy = schedule.active, False
            if schedule.spec.overlap != "allow":
                active = await self._firing.alive(schedule.active)
                busy = bool(active)
            turn = decide(replace(schedule, active=active[-ACTIVE_MAX:]), now, busy)
            if turn is None:
                break
            schedule = await self._take(turn, now)
        if schedule is not None and schedule.pause is None:
            if schedule.queued is not None and schedule.spec.overlap == "cancel-previous":
                await self._firing.cancel(schedule)
            if schedule.backfill is not None:
                schedule = await self._backfill(schedule, now)
        if schedule is not None and schedule.records > self._history + self._batch:
            await self._prune(schedule, now)

    async def _take(self, turn: Turn, now: int) -> Schedule | None:
        after = turn.after
        wanted = [*turn.skipped, *([] if turn.queue is None else [turn.queue])]
        named = [*wanted, *([] if turn.start is None else [turn.start])]
        known = dict(zip(named, await self._firing.records(after, named), strict=True))
        facts: list[Fact] = []
        if turn.missed is not None:
            told = {"first": to_datetime(turn.missed.first), "last": to_datetime(turn.missed.last)}
            facts.append(schedule_fact("schedule.missed", after, SYSTEM.id, now, count=turn.missed.count, **told))
        fires = [
            new_fire(after, slot, now, turn.source, "skipped", known=known[slot], reason="overlap")
            if slot in turn.skipped
            else new_fire(after, slot, now, turn.source, "queued", known=known[slot], reason="overlap")
            for slot in wanted
        ]
        after = replace(after, records=after.records + sum(known[slot] is None for slot in wanted))
        if turn.start is None:
            return await self._firing.commit(after, fires, facts)
        there = known[turn.start]
        if there is not None and there.outcome == "started":
            return await self._firing.commit(after, fires, facts)
        done = await self._firing.start(after, turn.start, turn.source, beside=fires, facts=facts, known=there)
        return None if done is None else done[0]

    async def _backfill(self, schedule: Schedule, now: int) -> Schedule | None:
        """Fire missed slots of the past, as many at once as the backfill is wide."""
        plan = schedule.backfill
        assert plan is not None
        plan = replace(plan, active=await self._firing.alive(plan.active))
        for _ in range(_TURNS_MAX):
            if len(plan.active) >= plan.width:
                return schedule
            slots = between(stored(schedule), plan.cursor, plan.until, _PAGE)
            known = await self._firing.records(schedule, slots)
            free = [(slot, one) for slot, one in zip(slots, known, strict=True) if unfired(schedule, slot, one)]
            if not free:
                if len(slots) == _PAGE:
                    plan = replace(plan, cursor=slots[-1])
                    continue
                if plan.active:
                    return schedule
                fact = schedule_fact(
                    "schedule.backfilled", schedule, SYSTEM.id, now, fired=plan.fired, failed=plan.failed
                )
                return await self._firing.commit(replace(schedule, backfill=None), [], [fact])
            slot, one = free[0]
            after = replace(schedule, backfill=replace(plan, cursor=slot))
            done = await self._firing.start(after, slot, "backfill", known=one, by=plan.by, follow=False)
            if done is None:
                return None
            schedule = done[0]
            assert schedule.backfill is not None
            plan = schedule.backfill
        return schedule

    async def _prune(self, schedule: Schedule, now: int) -> None:
        """Forget the oldest fires, but not which slots were fired."""
        query = Query(where=[Where("schedule", "eq", schedule.id)], order="slot", limit=self._batch)
        old = [read_fire(row) for row in await self._store.find(FIRE_KIND.name, query)]
        old = [fire for fire in old if fire.slot != schedule.queued]
        fired = [fire.slot for fire in old if fire.outcome == "started" and fire.source != "manual"]
        when = stored(schedule)
        spans = remember(schedule.forgotten, fired, lambda slot: following(when, slot))
        after = replace(schedule, records=schedule.records - len(old), forgotten=spans)
        _, entity, facts = write_schedule(after, now)
        deletes = [Key(FIRE_KIND.name, fire.id, fire.version) for fire in old]
        (problem,) = await self._store.commit([Change([entity], deletes, facts)])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem


class ScheduleRetention:
    """Removes schedules that were deleted, and those that finished long ago, with their fires; a bounded batch at once.

    Args:
        keep_ms: how long a finished one is kept.
    """

    def __init__(self, store: Store, keep_ms: int) -> None:
        self._store = store
        self._keep_ms = keep_ms

    async def once(self, now: int) -> int:
        """Remove one batch; returns how many schedules that were. Fires go first, so that none stays without its schedule."""
        where = [Where("finished", "lt", now - self._keep_ms)]
        removed = 0
        for row in await self._store.find(SCHEDULE_KIND.name, Query(where=where, order="finished", limit=_PAGE)):
            query = Query(where=[Where("schedule", "eq", row.id)], order="slot", limit=500)
            while fires := await self._store.find(FIRE_KIND.name, query):
                await self._store.commit([Change(deletes=[Key(FIRE_KIND.name, fire.id) for fire in fires])])
            (problem,) = await self._store.commit([Change(deletes=[Key(SCHEDULE_KIND.name, row.id, row.version)])])
            removed += problem is None
        return removed


def unfired(schedule: Schedule, slot: int, known: Fire | None) -> bool:
    """Say whether a backfill may fire a slot of the past."""
    return (known is None or known.outcome not in _TAKEN) and not covered(schedule.forgotten, slot)


async def _all(work: list[Coroutine[None, None, None]]) -> None:
    """Do all of it, and raise the first problem afterwards."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
