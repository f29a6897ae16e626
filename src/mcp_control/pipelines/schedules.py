"""When schedules fire: slots in time zones, what is done with slots that are due, and what is remembered of the past. Pure.

Cron is that of Debian (`cronsim`). A fixed time of the day (neither minute nor hour begins with `*`) that a change to summer time leaves
out is moved to the first minute after the gap; one that comes twice counts once, the first time. With `*` in minute or hour a schedule
goes by elapsed time: the hour that is left out has no slots, the hour that comes twice has them twice.
"""

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError
from msgspec.structs import replace

from mcp_control.kernel.clock import to_datetime, to_millis
from mcp_control.pipelines.schedule_model import Backfill, Schedule, ScheduleSpec, Source

EVERY_MIN: Final = 1.0
EVERY_MAX: Final = 10 * 366 * 86_400.0
LATE_MS: Final = 30_000
ACTIVE_MAX: Final = 20
FORGOTTEN_MAX: Final = 200
MISSED_MAX: Final = 1000
HISTORY_MAX: Final = 1000
PRUNED: Final = 100
_CRON_MAX: Final = 200
_YEAR_MAX: Final = 3000  # a hundred slots ten years apart are still moments
_HINT_MARGIN_MS: Final = 2 * 3_600_000
_ZONE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_+/-]{0,63}")


class Unusable(ValueError):
    """A time that no schedule can have: the member of the spec, and why."""

    def __init__(self, member: str, why: str) -> None:
        super().__init__(why)
        self.member = member


class Timing(msgspec.Struct, frozen=True):
    """When a schedule has slots: exactly one of `cron`, `every`, `at` (milliseconds), within `first` and `last`, both included."""

    cron: str | None
    every: int | None
    at: int | None
    zone: str
    anchor: int
    first: int | None
    last: int | None


def timing(spec: ScheduleSpec, anchor: int) -> Timing:
    """Return when a spec has slots. Raises Unusable."""
    given = [name for name in ("cron", "every", "at") if getattr(spec, name) is not None]
    if len(given) != 1:
        raise Unusable(given[1] if given else "cron", "a schedule has one of `cron`, `every` and `at`")
    for name in ("at", "starts_at", "ends_at"):
        moment = getattr(spec, name)
        if moment is not None and (moment.tzinfo is None or not 1971 <= moment.year <= _YEAR_MAX):
            raise Unusable(name, "a time needs a zone and a year this clock can wait for, e.g. 2026-11-22T10:00:00Z")
    if spec.every is not None and not EVERY_MIN <= spec.every <= EVERY_MAX:
        raise Unusable("every", f"seconds, from {EVERY_MIN:g} to {EVERY_MAX:g}")
    zone_of(spec.timezone)
    first = None if spec.starts_at is None else to_millis(spec.starts_at)
    last = None if spec.ends_at is None else to_millis(spec.ends_at)
    if first is not None and last is not None and last < first:
        raise Unusable("ends_at", "lies before `starts_at`")
    found = Timing(
        cron=None if spec.cron is None else _checked(spec.cron),
        every=None if spec.every is None else round(spec.every * 1000),
        at=None if spec.at is None else to_millis(spec.at),
        zone=spec.timezone,
        anchor=anchor if first is None else first,
        first=first,
        last=last,
    )
    if following(found, anchor - 1) is None:
        raise Unusable(given[0], "there is no such moment in the future, so it would never fire")
    return found


def stored(schedule: Schedule) -> Timing:
    """Return when a stored schedule has slots; its spec was accepted."""
    spec = schedule.spec
    first = None if spec.starts_at is None else to_millis(spec.starts_at)
    return Timing(
        cron=spec.cron,
        every=None if spec.every is None else round(spec.every * 1000),
        at=None if spec.at is None else to_millis(spec.at),
        zone=spec.timezone,
        anchor=schedule.anchor if first is None else first,
        first=first,
        last=None if spec.ends_at is None else to_millis(spec.ends_at),
    )


def zone_of(name: str) -> tzinfo:
    """Return a time zone by its IANA name. Raises Unusable."""
    if name == "UTC":
        return timezone.utc  # noqa: UP017 - cronsim compares with this very object; the alias is the same, the name says which
    try:
        if _ZONE.fullmatch(name):
            return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise Unusable("timezone", "not the name of a time zone, e.g. UTC or Europe/Berlin")


def _checked(cron: str) -> str:
    if len(cron) > _CRON_MAX or len(cron.split()) != 5:
        raise Unusable(
            "cron", "five fields: minute, hour, day of month, month, day of week; for intervals there is `every`"
        )
    try:
        CronSim(cron, datetime(2026, 1, 1, tzinfo=timezone.utc))  # noqa: UP017 - as above
    except (CronSimError, ValueError) as error:
        raise Unusable("cron", str(error) or "not a cron expression") from None
    return cron


def local(slot: int, zone: str) -> str:
    """Return a slot as the clock on the wall shows it, with its offset (RFC 3339)."""
    return to_datetime(slot).astimezone(zone_of(zone)).isoformat(timespec="seconds")


# --- slots --------------------------------------------------------------------------------------------------------


def slots(when: Timing, after: int) -> Iterator[int]:
    """Yield the slots later than `after`, strictly growing."""
    after = after if when.first is None else max(after, when.first - 1)
    for slot in _unbounded(when, after):
        if when.last is not None and slot > when.last:
            return
        yield slot


def _unbounded(when: Timing, after: int) -> Iterator[int]:
    if when.at is not None:
        if when.at > after:
            yield when.at
    elif when.every is not None:
        slot = when.anchor + ((after - when.anchor) // when.every + 1) * when.every
        while True:
            yield slot
            slot += when.every
    elif when.cron is not None:
        begin = to_datetime(after).astimezone(zone_of(when.zone))
        for moment in CronSim(when.cron, begin):
            slot = to_millis(moment)
            # Two times of the day that one gap leaves out are moved to the same minute.
            if slot > after:
                yield slot
                after = slot


def following(when: Timing, after: int) -> int | None:
    """Return the first slot later than `after`; None where there is none, within fifty years for cron."""
    return next(slots(when, after), None)


def between(when: Timing, after: int, until: int, limit: int) -> list[int]:
    """Return the oldest slots in (after, until], at most `limit`."""
    found: list[int] = []
    for slot in slots(when, after):
        if slot > until or len(found) == limit:
            break
        found.append(slot)
    return found


def newest(when: Timing, after: int, until: int, limit: int) -> list[int]:
    """Return the newest slots in (after, until], at most `limit`, oldest first; the cost does not grow with the time between."""
    if when.last is not None:
        until = min(until, when.last)
    if until <= after:
        return []
    begin = after
    if when.every is not None:
        begin = max(after, until - limit * when.every)
    elif when.cron is not None:
        # Backwards only to find where to begin: what counts is the forward order.
        start = (to_datetime(until) + timedelta(seconds=1)).astimezone(zone_of(when.zone))
        for place, moment in enumerate(CronSim(when.cron, start, reverse=True)):
            begin = max(after, to_millis(moment) - _HINT_MARGIN_MS)
            if place >= limit or begin == after:
                break
        else:
            begin = after
    found: list[int] = []
    for slot in slots(when, begin):
        if slot > until:
            break
        found.append(slot)
    return found[-limit:]


# --- what is due --------------------------------------------------------------------------------------------------


class Missed(msgspec.Struct, frozen=True):
    """Slots that will not be fired by themselves: the first, the last, and how many, at least."""

    first: int
    last: int
    count: int


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a schedule: the schedule after it, and what is to be done in the same change.

    Attributes:
        start: the slot to start now.
        queue: the slot that waits from now on; skipped: slots that are given up because earlier work has not ended.
    """

    after: Schedule
    start: int | None = None
    source: Source = "schedule"
    queue: int | None = None
    skipped: tuple[int, ...] = ()
    missed: Missed | None = None


def decide(schedule: Schedule, now: int, busy: bool) -> Turn | None:
    """Return the next step of a schedule, None when nothing is due.

    Slots up to `position` have been dealt with, whatever the clock says now: one that is set back fires nothing again.

    Args:
        busy: work of an earlier slot has not ended.
    """
    if schedule.pause is not None or schedule.deleted:
        return None
    spec, when = schedule.spec, stored(schedule)
    if schedule.queued is not None and not busy:
        return Turn(after=replace(schedule, queued=None), start=schedule.queued)
    slot = _next_due(when, schedule.position, now, spec.catch_up_limit if spec.catch_up == "all" else 1)
    if slot is None:
        return None
    late = now - slot > LATE_MS
    passed = between(when, schedule.position, slot - 1, MISSED_MAX)
    dropped = spec.catch_up == "none" and late
    if dropped:
        passed.append(slot)
    missed = Missed(passed[0], slot if dropped else max(passed), len(passed)) if passed else None
    after = replace(schedule, position=slot, missed=schedule.missed + len(passed))
    if dropped:
        return Turn(after=after, missed=missed)
    source: Source = "catch-up" if late else "schedule"
    if not busy or spec.overlap == "allow":
        return Turn(after=after, start=slot, source=source, missed=missed)
    if spec.overlap == "skip" or (spec.overlap == "queue-one" and schedule.queued is not None):
        return Turn(after=after, skipped=(slot,), source=source, missed=missed)
    given_up = () if schedule.queued is None else (schedule.queued,)
    return Turn(after=replace(after, queued=slot), queue=slot, skipped=given_up, source=source, missed=missed)


def _next_due(when: Timing, position: int, now: int, limit: int) -> int | None:
    """Return the oldest of the newest `limit` slots that are due."""
    few = between(when, position, now, limit + 1)
    if len(few) > limit:
        few = newest(when, position, now, limit)
    return few[0] if few else None


def due(schedule: Schedule, upcoming: int | None) -> int | None:
    """Return the moment from which a schedule is to be looked at, None for never.

    What waits for work to end, and what has more history than is kept, is looked at always.

    Args:
        upcoming: its first slot after its position.
    """
    if schedule.deleted:
        return None
    if schedule.records > HISTORY_MAX + PRUNED:
        return 1
    if schedule.pause is not None:
        return None
    if schedule.queued is not None or schedule.backfill is not None:
        return 1
    return upcoming


def finished(schedule: Schedule, upcoming: int | None) -> bool:
    """Say whether nothing is left to do, for ever; `upcoming` is its first slot after its position."""
    return upcoming is None and schedule.queued is None and schedule.backfill is None


# --- the past -----------------------------------------------------------------------------------------------------


def remember(
    spans: list[tuple[int, int]], fired: list[int], after: Callable[[int], int | None]
) -> list[tuple[int, int]]:
    """Return the spans with these slots in them; slots that follow one another share a span.

    Above 200 spans the two oldest become one, and what lies between them counts as fired: never twice is worth more than once.

    Args:
        after: gives the slot that follows another.
    """
    found = sorted(spans)
    for slot in fired:
        if covered(found, slot):
            continue
        place = next((place for place, (_, end) in enumerate(found) if end < slot and after(end) == slot), None)
        if place is None:
            found.append((slot, slot))
            found.sort()
        else:
            found[place] = (found[place][0], slot)
    while len(found) > FORGOTTEN_MAX:
        found[:2] = [(found[0][0], max(found[0][1], found[1][1]))]
    return found


def covered(spans: list[tuple[int, int]], slot: int) -> bool:
    """Say whether a slot lies in one of the spans."""
    return any(first <= slot <= last for first, last in spans)


def backfilling(schedule: Schedule, since: int, until: int, width: int, by: str) -> Schedule:
    """Return the schedule with a backfill of the slots from `since` to `until`, as far as they have passed."""
    plan = Backfill(since=since, cursor=since - 1, until=min(until, schedule.position), width=width, by=by)
    return replace(schedule, backfill=plan, finished_at=None)
