"""Schedules and their fires to and from the store and the wire: encoding, index values, ids, facts, views."""

from hashlib import blake2b, sha256
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact, IndexValue
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.ids import derived_id, make_id
from mcp_control.pipelines.records import scoped
from mcp_control.pipelines.schedule_model import (
    FIRE_KIND,
    SCHEDULE_KIND,
    Backfill,
    BackfillView,
    Fire,
    FireView,
    Moment,
    Outcome,
    Schedule,
    ScheduleSpec,
    ScheduleState,
    ScheduleView,
    Source,
)
from mcp_control.pipelines.schedules import due, finished, following, local, stored

# JSON and not MessagePack: what a person gave as JSON stays what it is.
_encode: Final = msgspec.json.Encoder().encode
_sorted: Final = msgspec.json.Encoder(order="deterministic").encode
_decode: Final = msgspec.json.Decoder(Schedule).decode
_decode_fire: Final = msgspec.json.Decoder(Fire).decode
_SHOWN: Final = 500


def digest_of(spec: ScheduleSpec) -> str:
    """Return the SHA-256 of a spec, to tell a repetition from another one."""
    return sha256(_sorted(spec)).hexdigest()


def size_of(spec: ScheduleSpec) -> int:
    """Return how many bytes a spec takes in the store."""
    return len(_encode(spec))


def target_id(schedule: Schedule, slot: int, key: str = "") -> str:
    """Return the id of the run or task of a slot: always the same, so that it is made once; `key` tells triggers by hand apart."""
    seed = "\x1f".join((schedule.id, str(slot), key)).encode()
    return make_id("run" if schedule.spec.run is not None else "task", slot, blake2b(seed, digest_size=16).digest())


def fire_id(schedule_id: str, slot: int, key: str = "") -> str:
    """Return the id of the record of a slot; of a trigger by hand its key alone decides, so that it can be repeated."""
    return derived_id("fire", schedule_id, *(("manual", key) if key else (slot,)))


def new_fire(
    schedule: Schedule,
    slot: int,
    now: int,
    source: Source,
    outcome: Outcome,
    *,
    known: Fire | None = None,
    target: str = "",
    reason: str = "",
    message: str = "",
    by: str = "",
    key: str = "",
) -> Fire:
    """Return the record of a slot; `known` is the one that is there already."""
    return Fire(
        id=fire_id(schedule.id, slot, key),
        version=0 if known is None else known.version,
        tenant=schedule.tenant,
        schedule_id=schedule.id,
        slot=slot,
        at=now,
        source=source if known is None or source == "backfill" else known.source,
        outcome=outcome,
        target=target,
        reason=reason,
        message=message[:_SHOWN],
        by=by,
    )


def write_schedule(schedule: Schedule, now: int) -> tuple[Schedule, Entity, list[Fact]]:
    """Return the schedule as it is after this write, the entity that writes it, and the fact that it has finished if it did so."""
    facts: list[Fact] = []
    after = replace(schedule, version=schedule.version + 1)
    index: dict[str, IndexValue] = {"name": None, "due": None, "finished": 0}
    if not after.deleted:
        upcoming = following(stored(after), after.position)
        ended = finished(after, upcoming)
        if ended and after.finished_at is None:
            after = replace(after, finished_at=now)
            facts.append(schedule_fact("schedule.finished", after, "system", now))
        elif not ended:
            after = replace(after, finished_at=None)
        index = {
            "name": scoped(after.tenant, after.spec.name),
            "due": due(after, upcoming),
            "finished": after.finished_at,
        }
    return after, Entity(SCHEDULE_KIND.name, after.id, schedule.version, index, _encode(after)), facts


def read_schedule(entity: Entity) -> Schedule:
    """Return the schedule in a stored entity."""
    return replace(_decode(entity.hot), version=entity.version)


def write_fire(fire: Fire) -> Entity:
    """Return the entity that writes a record."""
    index: dict[str, IndexValue] = {"schedule": fire.schedule_id, "slot": fire.slot}
    return Entity(FIRE_KIND.name, fire.id, fire.version, index, _encode(fire))


def read_fire(entity: Entity) -> Fire:
    """Return the record in a stored entity."""
    return replace(_decode_fire(entity.hot), version=entity.version)


def schedule_fact(kind: str, schedule: Schedule, actor: str, now: int, **more: object) -> Fact:
    """Return the fact that `kind` happened to a schedule."""
    return fact(kind, schedule.id, actor, now, {"name": schedule.spec.name, **more}, tenant=schedule.tenant)


def fire_fact(schedule: Schedule, fire: Fire, actor: str, now: int) -> Fact:
    """Return the fact of a fire: `schedule.fired`, `.queued`, `.skipped` or `.failed`."""
    kind = {
        "started": "schedule.fired",
        "queued": "schedule.queued",
        "skipped": "schedule.skipped",
        "failed": "schedule.failed",
    }[fire.outcome]
    data = {"slot": to_datetime(fire.slot), "source": fire.source}
    found = {name: value for name in ("target", "reason", "message") if (value := getattr(fire, name))}
    run = fire.target if fire.outcome == "started" and schedule.spec.run is not None else ""
    return replace(schedule_fact(kind, schedule, actor, now, **data, **found), run=run)


# --- views --------------------------------------------------------------------------------------------------------


def when_of(spec: ScheduleSpec) -> str:
    """Return when a schedule fires, in a few words."""
    if spec.cron is not None:
        return f"{spec.cron} {spec.timezone}"
    if spec.every is not None:
        return f"every {spec.every:g} s"
    return "" if spec.at is None else f"at {spec.at.isoformat()}"


def moments(schedule: Schedule, slots: list[int]) -> list[Moment]:
    """Return slots as callers see them."""
    return [Moment(slot=to_datetime(slot), local=local(slot, schedule.spec.timezone)) for slot in slots]


def backfill_view(backfill: Backfill, slots: list[int] | None = None) -> BackfillView:
    """Return a backfill as callers see it."""
    return BackfillView(
        since=to_datetime(backfill.since),
        to=to_datetime(backfill.until),
        width=backfill.width,
        fired=backfill.fired,
        failed=backfill.failed,
        active=backfill.active,
        slots=None if slots is None else [to_datetime(slot) for slot in slots],
    )


def fire_view(fire: Fire) -> FireView:
    """Return a record as callers see it."""
    return FireView(
        id=fire.id,
        slot=to_datetime(fire.slot),
        at=to_datetime(fire.at),
        source=fire.source,
        outcome=fire.outcome,
        target=fire.target,
        reason=fire.reason,
        message=fire.message,
        by=fire.by,
    )


def schedule_view(schedule: Schedule) -> ScheduleView:
    """Return a schedule as callers see it."""
    spec = schedule.spec
    state: ScheduleState = "active"
    if schedule.pause is not None:
        state = "paused"
    elif schedule.finished_at is not None:
        state = "finished"
    following_slot = None if schedule.pause is not None else following(stored(schedule), schedule.position)
    return ScheduleView(
        id=schedule.id,
        name=spec.name,
        state=state,
        when=when_of(spec),
        target=spec.run.pipeline if spec.run is not None else spec.task.type if spec.task is not None else "",
        next_at=None if following_slot is None else to_datetime(following_slot),
        last_slot=None if schedule.last_slot is None else to_datetime(schedule.last_slot),
        last_target=schedule.last_target,
        queued=None if schedule.queued is None else to_datetime(schedule.queued),
        active=schedule.active,
        fired=schedule.fired,
        missed=schedule.missed,
        reason="" if schedule.pause is None else schedule.pause.reason,
        created_at=to_datetime(schedule.created_at),
        created_by=schedule.created_by,
        backfill=None if schedule.backfill is None else backfill_view(schedule.backfill),
        spec=spec,
        etag=str(schedule.version),
    )
