"""Scheduler: the verbs for schedules that every door calls."""

import builtins
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice
from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.changes import Change, Entity, Fact, Query, Where
from mcp_control.kernel.clock import Clock, to_millis
from mcp_control.kernel.errors import (
    Conflict,
    Duplicate,
    FieldError,
    Invalid,
    InvalidSchedule,
    InvalidTransition,
    NameTaken,
    NotFound,
    VersionConflict,
)
from mcp_control.kernel.ids import IdSource, is_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import name_errors, range_errors, text_errors
from mcp_control.pipelines.firing import Firing
from mcp_control.pipelines.records import scoped
from mcp_control.pipelines.schedule_model import (
    FIRE_KIND,
    SCHEDULE_KIND,
    BackfillRequest,
    BackfillView,
    FireView,
    Moment,
    Schedule,
    ScheduleSpec,
    ScheduleView,
)
from mcp_control.pipelines.schedule_records import (
    backfill_view,
    digest_of,
    fire_view,
    moments,
    read_fire,
    read_schedule,
    schedule_fact,
    schedule_view,
    size_of,
    write_schedule,
)
from mcp_control.pipelines.schedules import Unusable, backfilling, between, following, slots, stored, timing
from mcp_control.pipelines.timekeeping import unfired
from mcp_control.security.model import SYSTEM, Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import Request
from mcp_control.tasks.submission import check_key

_TRIES: Final = 10
_SIZE_MAX: Final = 64 << 10
NEXT_MAX: Final = 100
BACKFILL_MAX: Final = 1000
WIDTH_MAX: Final = 50
CATCH_UP_MAX: Final = 200
Ask = Callable[[Schedule, int], Schedule]


class Scheduler:
    """Keeps schedules; `ScheduleKeeper` fires them."""

    def __init__(self, store: Store, clock: Clock, ids: IdSource, firing: Firing) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._firing = firing

    async def check(self, actor: Actor, spec: ScheduleSpec) -> builtins.list[Moment]:
        """Return the next fires a schedule would have. Raises what `create` raises, but for its name being taken."""
        allow(actor, "schedules.create")
        made = await self._made(actor, spec, self._clock.now())
        return moments(made, _next(made, made.position, 5))

    async def create(self, actor: Actor, spec: ScheduleSpec) -> tuple[Schedule, bool]:
        """Keep a schedule, and say whether it is new: one that is there already, just so, stays as it is.

        Raises:
            InvalidSchedule: when it fires: no such time, no such zone, or never.
            Invalid: anything else that is wrong.
            NameTaken: there is another one of this name.
        """
        allow(actor, "schedules.create")
        for _ in range(_TRIES):
            now = self._clock.now()
            made = await self._made(actor, spec, now)
            known = await self._named(actor.tenant, spec.name)
            if known is not None:
                if known.digest != made.digest:
                    raise NameTaken(f"there is a schedule {spec.name} already; edit it")
                return known, False
            schedule, entity, facts = write_schedule(made, now)
            created = schedule_fact("schedule.created", schedule, actor.id, now)
            (problem,) = await self._store.commit([_change(entity, [created, *facts])])
            if problem is None:
                return schedule, True
            if not isinstance(problem, Duplicate):
                raise problem
        raise Conflict("too many changes of this schedule at once")

    async def replace(self, actor: Actor, ref: str, spec: ScheduleSpec, version: int) -> Schedule:
        """Give a schedule another spec; slots that have passed stay as they are.

        Raises:
            NotFound, VersionConflict, InvalidSchedule, Invalid.
        """
        allow(actor, "schedules.edit", ref)
        before = await self.get(actor, ref)
        if before.version != version:
            raise VersionConflict("the schedule was changed meanwhile; read it again", current=str(before.version))
        if spec.name != before.spec.name:
            raise _wrong("name", "read-only-field", "a schedule keeps its name")
        now = self._clock.now()
        made = await self._made(actor, spec, now)
        after = replace(
            before,
            spec=spec,
            digest=made.digest,
            anchor=before.anchor if spec.every == before.spec.every else made.anchor,
            position=max(before.position, made.position),
        )
        changed = await self._commit(after, "schedule.updated", actor.id, now)
        if changed is None:
            raise VersionConflict("the schedule was changed meanwhile; read it again")
        return changed

    async def _made(self, actor: Actor, spec: ScheduleSpec, now: int) -> Schedule:
        found = name_errors("#/name", spec.name) + text_errors("#/description", spec.description, 1000)
        found += range_errors("#/catch_up_limit", spec.catch_up_limit, 1, CATCH_UP_MAX)
        if (spec.run is None) == (spec.task is None):
            found.append(
                FieldError(pointer="#/run", code="missing-field", detail="a schedule has one of `run` and `task`")
            )
        if size_of(spec) > _SIZE_MAX:
            found.append(
                FieldError(pointer="#", code="limit-exceeded", detail="at most 64 KiB; pass data as artifacts")
            )
        if found:
            raise Invalid(found[0].detail, errors=found)
        try:
            timing(spec, now)
        except Unusable as wrong:
            raise _no_schedule(wrong.member, str(wrong)) from None
        position = now if spec.at is None else now - 1
        made = Schedule(
            id=self._ids.new("sched"),
            version=0,
            tenant=actor.tenant,
            spec=spec,
            digest=digest_of(spec),
            created_at=now,
            created_by=actor.id,
            anchor=now,
            position=position,
        )
        first = following(stored(made), position)
        if first is None:
            raise _no_schedule("ends_at", "there is no slot before the end, so it would never fire")
        await self._firing.check(replace(SYSTEM, tenant=actor.tenant), spec, first)
        return made

    # --- read -----------------------------------------------------------------------------------------------------

    async def get(self, actor: Actor, ref: str) -> Schedule:
        """Return a schedule by id or name. Raises NotFound, the same for one of another tenant."""
        allow(actor, "schedules.get", ref)
        found: Schedule | None = None
        if ref.startswith("sched_") and is_id(ref):
            row = (await self._store.get(SCHEDULE_KIND.name, [ref]))[0]
            found = None if row is None else read_schedule(row)
        found = found or await self._named(actor.tenant, ref)
        if found is None or found.tenant != actor.tenant or found.deleted:
            raise NotFound("no such schedule")
        return found

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[ScheduleView]:
        """Return a page of schedules, by name."""
        allow(actor, "schedules.list")
        after = None if cursor is None else decode_cursor("schedules", cursor, 2)
        where = [Where("name", "ge", scoped(actor.tenant, "")), Where("name", "lt", actor.tenant + "\x20")]
        query = Query(where=where, order="name", after=after, limit=limit + 1)
        rows = await self._store.find(SCHEDULE_KIND.name, query)
        last = rows[limit - 1] if len(rows) > limit else None
        return Page(
            items=[schedule_view(read_schedule(row)) for row in rows[:limit]],
            next_cursor=None if last is None else encode_cursor("schedules", [last.index["name"], last.id]),
        )

    async def next(self, actor: Actor, ref: str, count: int) -> builtins.list[Moment]:
        """Return the slots to come, at most `count`; a paused schedule has those it would have."""
        schedule = await self.get(actor, ref)
        after = schedule.position
        if schedule.pause is not None:
            after = max(after, self._clock.now())
        return moments(schedule, _next(schedule, after, min(count, NEXT_MAX)))

    async def fires(self, actor: Actor, ref: str, *, cursor: str | None = None, limit: int = 50) -> Page[FireView]:
        """Return a page of what became of slots, newest slot first."""
        schedule = await self.get(actor, ref)
        after = None if cursor is None else decode_cursor("fires", cursor, 2)
        where = [Where("schedule", "eq", schedule.id)]
        query = Query(where=where, order="slot", descending=True, after=after, limit=limit + 1)
        rows = await self._store.find(FIRE_KIND.name, query)
        last = rows[limit - 1] if len(rows) > limit else None
        return Page(
            items=[fire_view(read_fire(row)) for row in rows[:limit]],
            next_cursor=None if last is None else encode_cursor("fires", [last.index["slot"], last.id]),
        )

    async def _named(self, tenant: str, name: str) -> Schedule | None:
        query = Query(where=[Where("name", "eq", scoped(tenant, name))], limit=1)
        rows = await self._store.find(SCHEDULE_KIND.name, query)
        return read_schedule(rows[0]) if rows else None

    # --- change ---------------------------------------------------------------------------------------------------

    async def pause(self, actor: Actor, ref: str, reason: str = "") -> Schedule:
        """Fire nothing until it is resumed; what runs goes on. Raises NotFound."""
        allow(actor, "schedules.pause", ref)
        if errors := text_errors("#/reason", reason, 1000):
            raise Invalid(errors[0].detail, errors=errors)

        def ask(schedule: Schedule, now: int) -> Schedule:
            request = Request(at=now, by=actor.id, reason=reason)
            return schedule if schedule.pause is not None else replace(schedule, pause=request)

        return await self._ask(actor, ref, ask, "schedule.paused")

    async def resume(self, actor: Actor, ref: str) -> Schedule:
        """Fire again, from the next slot on; slots that passed meanwhile are not caught up with. Raises NotFound."""
        allow(actor, "schedules.resume", ref)

        def ask(schedule: Schedule, now: int) -> Schedule:
            if schedule.pause is None:
                return schedule
            return replace(schedule, pause=None, queued=None, position=max(schedule.position, now))

        return await self._ask(actor, ref, ask, "schedule.resumed")

    async def delete(self, actor: Actor, ref: str) -> None:
        """Remove a schedule and its history; what it started goes on. Raises NotFound."""
        allow(actor, "schedules.delete", ref)
        await self._ask(actor, ref, lambda schedule, _: replace(schedule, deleted=True), "schedule.deleted")

    async def trigger(self, actor: Actor, ref: str, key: str | None = None) -> FireView:
        """Start its work now, whatever else runs and even when it is paused; no slot is used up.

        Args:
            key: repeating a trigger with the same key starts nothing again.

        Raises:
            NotFound, IdempotencyKeyInvalid.
        """
        allow(actor, "schedules.trigger", ref)
        check_key(key)
        for _ in range(_TRIES):
            schedule = await self.get(actor, ref)
            now = self._clock.now()
            name = f"{actor.id}\x1f{key}" if key is not None else self._ids.secret()
            known = await self._firing.by_hand(schedule, name)
            if known is not None:
                return fire_view(known)
            done = await self._firing.start(schedule, now, "manual", key=name, by=actor.id)
            if done is not None:
                return fire_view(done[1])
        raise Conflict("the schedule changes too fast; try again")

    async def backfill(self, actor: Actor, ref: str, request: BackfillRequest) -> BackfillView:
        """Fire slots of the past that were not fired; returns them, at most 1,000. Slots still to come are left alone.

        Raises:
            NotFound.
            Invalid: no such time, too wide, or more than 1,000 slots.
            InvalidTransition: another backfill of it is under way.
        """
        allow(actor, "schedules.backfill", ref)
        since, until = _moment("from", request.since), _moment("to", request.to)
        errors = range_errors("#/width", request.width, 1, WIDTH_MAX)
        if until < since:
            errors.append(FieldError(pointer="#/to", code="out-of-range", detail="lies before `from`"))
        if errors:
            raise Invalid(errors[0].detail, errors=errors)
        for _ in range(_TRIES):
            schedule = await self.get(actor, ref)
            if schedule.backfill is not None and not request.dry_run:
                raise InvalidTransition("a backfill of this schedule is under way", state="backfilling", allowed=[])
            now = self._clock.now()
            after = backfilling(schedule, since, until, request.width, actor.id)
            plan = after.backfill
            assert plan is not None
            found = between(stored(schedule), plan.cursor, plan.until, BACKFILL_MAX + 1)
            if len(found) > BACKFILL_MAX:
                raise _wrong("from", "limit-exceeded", f"these are more than {BACKFILL_MAX} slots; take a part of them")
            known = await self._firing.records(schedule, found)
            wanted = [slot for slot, one in zip(found, known, strict=True) if unfired(schedule, slot, one)]
            if request.dry_run or not wanted:
                return backfill_view(plan, wanted)
            if await self._commit(after, "schedule.backfill_requested", actor.id, now) is not None:
                return backfill_view(plan, wanted)
        raise Conflict("the schedule changes too fast; try again")

    async def stop_backfill(self, actor: Actor, ref: str) -> Schedule:
        """Fire no more slots of the past; what runs goes on. Raises NotFound."""
        allow(actor, "schedules.backfill", ref)
        return await self._ask(
            actor, ref, lambda schedule, _: replace(schedule, backfill=None), "schedule.backfill_stopped"
        )

    async def _ask(self, actor: Actor, ref: str, ask: Ask, kind: str) -> Schedule:
        for _ in range(_TRIES):
            before, now = await self.get(actor, ref), self._clock.now()
            after = ask(before, now)
            if after == before:
                return before
            changed = await self._commit(after, kind, actor.id, now)
            if changed is not None:
                return changed
        raise Conflict("the schedule changes too fast; try again")

    async def _commit(self, after: Schedule, kind: str, actor: str, now: int) -> Schedule | None:
        """Write a schedule; None where somebody was faster."""
        written, entity, facts = write_schedule(after, now)
        told = schedule_fact(kind, after, actor, now)
        (problem,) = await self._store.commit([_change(entity, [told, *facts])])
        if isinstance(problem, Conflict):
            return None
        if problem is not None:
            raise problem
        return written


def _change(entity: Entity, facts: Sequence[Fact]) -> Change:
    return Change([entity], (), facts)


def _next(schedule: Schedule, after: int, count: int) -> list[int]:
    return list(islice(slots(stored(schedule), after), count))


def _moment(member: str, value: datetime) -> int:
    if value.tzinfo is None or not 1971 <= value.year <= 9000:
        raise _wrong(member, "invalid-timestamp", "a timestamp needs a zone, e.g. 2026-11-22T10:00:00Z")
    return to_millis(value)


def _wrong(member: str, code: str, detail: str) -> Invalid:
    return Invalid(detail, errors=[FieldError(pointer=f"#/{member}", code=code, detail=detail)])


def _no_schedule(member: str, detail: str) -> InvalidSchedule:
    return InvalidSchedule(detail, errors=[FieldError(pointer=f"#/{member}", code="invalid-schedule", detail=detail)])
