"""Firing: what a schedule starts, always in one change with the move of the schedule (one fire per slot, ever).

The change carries the version of the schedule that was read and ids derived from schedule and slot. Of two servers that fire at once, or
one that fires again after it died in between, one is refused; nothing is started twice.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.changes import Change, Entity, Fact
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict, FieldError, Invalid, NotFound, Problem
from mcp_control.pipelines.expressions import Scope
from mcp_control.pipelines.model import RunRequest
from mcp_control.pipelines.params import resolve
from mcp_control.pipelines.records import read_run
from mcp_control.pipelines.schedule_model import FIRE_KIND, Fire, Schedule, ScheduledTask, ScheduleSpec, Source
from mcp_control.pipelines.schedule_records import (
    fire_fact,
    fire_id,
    new_fire,
    read_fire,
    target_id,
    write_fire,
    write_schedule,
)
from mcp_control.pipelines.schedules import ACTIVE_MAX, local
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.starting import Along, check_request
from mcp_control.pipelines.templates import Template
from mcp_control.security.model import SYSTEM, Actor
from mcp_control.storage.ports import Store
from mcp_control.tasks.followers import Advance, NewTask
from mcp_control.tasks.ledger import Intent
from mcp_control.tasks.model import Links, Origin, TaskSpec
from mcp_control.tasks.records import read as read_task
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.submission import check as check_task
from mcp_control.tasks.verbs import cancelling

_log = structlog.get_logger(__name__)
_REASON: Final = "a later slot of its schedule is due"
_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Firing:
    """Starts what schedules ask for, and records every fire."""

    def __init__(self, store: Store, clock: Clock, engine: PipelineEngine, settler: Settler) -> None:
        self._store = store
        self._clock = clock
        self._engine = engine
        self._settler = settler

    async def records(self, schedule: Schedule, slots: Sequence[int]) -> list[Fire | None]:
        """Return the records of slots, in their order, None where there is none."""
        rows = await self._store.get(FIRE_KIND.name, [fire_id(schedule.id, slot) for slot in slots])
        return [None if row is None else read_fire(row) for row in rows]

    async def by_hand(self, schedule: Schedule, key: str) -> Fire | None:
        """Return the record of a trigger by hand, None where there is none."""
        row = (await self._store.get(FIRE_KIND.name, [fire_id(schedule.id, 0, key)]))[0]
        return None if row is None else read_fire(row)

    async def alive(self, ids: Sequence[str]) -> list[str]:
        """Return those runs and tasks that have not ended, in their order."""
        return [name for name, row in await self._found(ids) if row is not None and not _final(row)]

    async def cancel(self, schedule: Schedule) -> None:
        """Ask what a schedule started and has not ended to end; what was asked already is left alone."""
        actor = replace(SYSTEM, tenant=schedule.tenant)
        tasks: list[str] = []
        for name, row in await self._found(schedule.active):
            if row is None or _final(row):
                continue
            if row.kind == "run" and read_run(row).cancel is None:
                try:
                    await self._engine.cancel(actor, name, _REASON)
                except Problem as problem:
                    if problem.status >= 500:
                        raise
            elif row.kind == "task" and read_task(row).cancel is None:
                tasks.append(name)
        if tasks:
            now = self._clock.now()
            await self._settler.settle([Intent(name, cancelling(SYSTEM.id, _REASON, now)) for name in tasks])
            await self._settler.tell_cancelled(tasks)

    async def _found(self, ids: Sequence[str]) -> list[tuple[str, Entity | None]]:
        """Return the stored runs or tasks; a schedule has either, but may have had the other before it was changed."""
        if not ids:
            return []
        return [
            pair
            for kind in ("run", "task")
            if (these := [name for name in ids if name.startswith(f"{kind}_")])
            for pair in zip(these, await self._store.get(kind, these), strict=True)
        ]

    async def commit(self, after: Schedule, fires: Sequence[Fire], facts: Sequence[Fact]) -> Schedule | None:
        """Write a schedule, its records and facts where nothing is started; returns it as stored, None where somebody was faster."""
        now = self._clock.now()
        written, entity, more = write_schedule(after, now)
        told = [*facts, *(fire_fact(after, fire, SYSTEM.id, now) for fire in fires), *more]
        change = Change([entity, *(write_fire(fire) for fire in fires)], (), told)
        (problem,) = await self._store.commit([change])
        if isinstance(problem, Conflict):
            return None
        if problem is not None:
            raise problem
        return written

    async def start(
        self,
        after: Schedule,
        slot: int,
        source: Source,
        *,
        beside: Sequence[Fire] = (),
        facts: Sequence[Fact] = (),
        known: Fire | None = None,
        key: str = "",
        by: str = "",
        follow: bool = True,
    ) -> tuple[Schedule, Fire] | None:
        """Start the work of a slot, in one change with the schedule as it is to be after it.

        What cannot be started because of what it asks for is recorded as failed, and the schedule goes on.

        Args:
            after: the schedule after this fire, at the version it was read at.
            beside, facts: further records and facts of the same change.
            known: the record of the slot that is there already.
            key: tells triggers by hand apart.
            follow: whether later slots look at this work (`overlap`).

        Returns:
            The schedule as stored and the record; None where somebody else was faster and nothing was changed.

        Raises:
            StoreUnavailable, Overloaded and the like: nothing is known to have changed; try again.
        """
        now = self._clock.now()
        target = target_id(after, slot, key)
        fire = new_fire(after, slot, now, source, "started", known=known, target=target, by=by, key=key)
        failed = replace(fire, outcome="failed", target="")
        started = replace(after, fired=after.fired + 1, last_target=target)
        if source != "manual":
            started = replace(started, last_slot=max(slot, after.last_slot or slot))
        if follow:
            started = replace(started, active=[*after.active, target][-ACTIVE_MAX:])
        if after.backfill is not None and source == "backfill":
            plan = after.backfill
            started = replace(started, backfill=replace(plan, fired=plan.fired + 1, active=[*plan.active, target]))
            after = replace(after, backfill=replace(plan, failed=plan.failed + 1))
        started = started if known is not None else replace(started, records=started.records + 1)
        after = after if known is not None else replace(after, records=after.records + 1)
        written, entity, more = write_schedule(started, now)
        told = [*facts, *(fire_fact(after, one, SYSTEM.id, now) for one in (*beside, fire)), *more]
        along = Along([entity, write_fire(fire), *(write_fire(one) for one in beside)], told)
        try:
            await self._begin(after, slot, target, along)
        except Conflict:
            return None
        except Problem as problem:
            if problem.status >= 500:
                raise
            failed = replace(failed, reason=problem.code, message=problem.detail[:500])
        except Exception as error:  # a fault of one target must not keep the others from being fired
            _log.error("schedules.start_failed", schedule=after.id, error=repr(error), exc_info=True)
            failed = replace(failed, reason="internal", message=type(error).__name__)
        else:
            return written, fire
        kept = await self.commit(after, [*beside, failed], facts)
        return None if kept is None else (kept, failed)

    async def _begin(self, schedule: Schedule, slot: int, target: str, along: Along) -> None:
        actor = replace(SYSTEM, tenant=schedule.tenant)
        origin = Origin(protocol="schedule", request_id=schedule.id, principal=schedule.created_by)
        spec = schedule.spec
        if spec.run is not None:
            pipeline = await self._engine.get(actor, spec.run.pipeline, spec.run.version)
            await self._engine.begin(actor, pipeline, run_request(spec, slot), origin, target, along=along)
            return
        new = NewTask(id=target, spec=task_spec(spec, slot), links=Links(), origin=origin)
        check_task(new.spec, self._clock.now())
        await self._settler.apply(
            "", Advance(submit=[new], writes=along.writes, facts=along.facts), schedule.tenant, SYSTEM.id
        )

    async def check(self, actor: Actor, spec: ScheduleSpec, slot: int) -> None:
        """Raise Invalid unless what a schedule asks for could be started for a slot as things are."""
        if spec.run is not None:
            try:
                pipeline = await self._engine.get(actor, spec.run.pipeline, spec.run.version)
            except NotFound:
                detail = "there is no such pipeline, or no such version of it"
                raise Invalid(
                    detail, errors=[FieldError(pointer="#/run/pipeline", code="unknown-reference", detail=detail)]
                ) from None
            request = run_request(spec, slot)
            try:
                check_request(request)
                resolve(pipeline.spec.spec.params, request.params)
            except Invalid as problem:
                raise _inside("run", problem) from None
        elif spec.task is not None:
            for place, limit in enumerate(spec.task.limits):
                if limit.on_excess == "drop":
                    detail = "a slot is fired once, so its task waits for its rate"
                    pointer = f"#/task/limits/{place}/on_excess"
                    raise Invalid(detail, errors=[FieldError(pointer=pointer, code="invalid-value", detail=detail)])
            try:
                check_task(task_spec(spec, slot), self._clock.now())
            except Invalid as problem:
                raise _inside("task", problem) from None


def run_request(spec: ScheduleSpec, slot: int) -> RunRequest:
    """Return what a schedule asks of the engine for a slot. Raises Invalid where an expression cannot be evaluated."""
    run = spec.run
    assert run is not None
    return RunRequest(
        params=_rendered(spec, run.params, slot, "#/run/params"),
        labels={**run.labels, "schedule": spec.name},
        priority=run.priority,
        no_cache=run.no_cache,
    )


def task_spec(spec: ScheduleSpec, slot: int) -> TaskSpec:
    """Return the task of a slot. Raises Invalid where an expression cannot be evaluated."""
    task = spec.task
    assert isinstance(task, ScheduledTask)
    return TaskSpec(
        type=task.type,
        payload=_rendered(spec, {"payload": task.payload}, slot, "#/task")["payload"],
        type_version=task.type_version,
        priority=task.priority,
        fairness=task.fairness,
        needs=task.needs,
        labels={**task.labels, "schedule": spec.name},
        limits=task.limits,
        retry=task.retry,
        timeout=task.timeout,
        budget=task.budget,
    )


def _rendered(spec: ScheduleSpec, value: Mapping[str, object], slot: int, pointer: str) -> dict[str, msgspec.Raw]:
    shown = local(slot, spec.timezone)
    about = {
        "slot": to_datetime(slot).isoformat().replace("+00:00", "Z"),
        "local": shown,
        "date": shown[:10],
        "schedule": spec.name,
    }
    try:
        return _members(Template(value).render(Scope({}, _no_output, about)))
    except ExpressionError as error:
        detail = str(error)
        raise Invalid(detail, errors=[FieldError(pointer=pointer, code="expression-invalid", detail=detail)]) from None


def _no_output(_: str) -> bytes:
    raise ExpressionError("a schedule has no stages; it knows run.slot, run.local, run.date and run.schedule")


def _inside(member: str, problem: Invalid) -> Invalid:
    """Return a problem of the target as one of the schedule: its places lie in this member."""
    errors = [
        error if error.pointer.startswith(f"#/{member}/") else replace(error, pointer=f"#/{member}{error.pointer[1:]}")
        for error in problem.errors
    ]
    return Invalid(problem.detail, errors=errors)


def _final(row: Entity) -> bool:
    return read_run(row).final if row.kind == "run" else read_task(row).final
