"""Schedules: work that begins by itself at planned moments, and the record of each such moment."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.limit_model import Limit
from mcp_control.tasks.model import Fairness, Needs, Request, RetryPolicy

Overlap = Literal["allow", "skip", "queue-one", "cancel-previous"]
CatchUp = Literal["none", "last", "all"]
Source = Literal["schedule", "catch-up", "backfill", "manual"]
Outcome = Literal["started", "queued", "skipped", "failed"]
ScheduleState = Literal["active", "paused", "finished"]


class ScheduledRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The run a schedule starts. Strings in `params` may hold `${{ run.slot }}`, `run.local`, `run.date` and `run.schedule`.

    `version` None is the newest at the time of the fire. `no_cache`: take no results of earlier runs.
    """

    pipeline: str
    version: int | None = None
    params: Mapping[str, Any] = {}
    labels: dict[str, str] = {}
    priority: int | None = None
    no_cache: bool = False


class ScheduledTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The task a schedule submits; its fields are those of a submission. `payload` may hold what `ScheduledRun.params` may."""

    type: str
    payload: Any = None
    type_version: str = "*"
    priority: int | str = 50
    fairness: Fairness | None = None
    needs: Needs = Needs()
    labels: dict[str, str] = {}
    limits: list[Limit] = []
    retry: RetryPolicy = RetryPolicy()
    timeout: float | None = None
    budget: Budget | None = None


class ScheduleSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A schedule as a person writes it: when (one of `cron`, `every`, `at`) and what (one of `run`, `task`).

    Attributes:
        cron: minute, hour, day of month, month, day of week, read in `timezone`.
        every: seconds from slot to slot, counted from `starts_at`, else from the moment the schedule was made.
        at: the one moment of a schedule that fires once.
        timezone: an IANA name.
        starts_at, ends_at: slots lie within these, both included.
        overlap: what to do when the work of an earlier slot has not ended.
        catch_up: which of the slots to fire that passed while no server could.
        catch_up_limit: with `all`, the newest so many.
    """

    name: str
    cron: str | None = None
    every: float | None = None
    at: datetime | None = None
    timezone: str = "UTC"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    run: ScheduledRun | None = None
    task: ScheduledTask | None = None
    overlap: Overlap = "skip"
    catch_up: CatchUp = "last"
    catch_up_limit: int = 100
    description: str = ""


class Backfill(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Slots of the past that are being fired.

    Attributes:
        cursor: slots up to this one have been dealt with; `until` is the last.
        width: how many may be at work at once; active: the ids of those that are.
    """

    since: int
    cursor: int
    until: int
    width: int
    active: list[str] = []
    fired: int = 0
    failed: int = 0
    by: str = ""


class Schedule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored schedule. Moments are wall milliseconds; a slot is a planned moment.

    Attributes:
        anchor: what an interval counts from.
        position: every slot up to it has been dealt with; it never moves back.
        queued: the slot that waits for earlier work to end.
        active: ids of runs or tasks it started lately that had not ended when last looked at.
        records: fires that are kept.
        forgotten: spans whose slots were fired, but whose fires are no longer kept.
        fired: how often it started something; missed: slots that passed without a fire, at least.
        finished_at: since when there is nothing left to do.
        deleted: it is being removed.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    spec: ScheduleSpec
    digest: str
    created_at: int
    created_by: str = ""
    anchor: int
    position: int
    pause: Request | None = None
    queued: int | None = None
    active: list[str] = []
    backfill: Backfill | None = None
    records: int = 0
    forgotten: list[tuple[int, int]] = []
    fired: int = 0
    missed: int = 0
    last_slot: int | None = None
    last_target: str = ""
    finished_at: int | None = None
    deleted: bool = False
    schema: int = 1


class Fire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one slot, or of one trigger by hand (`source` is `manual`, `slot` its moment)."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    schedule_id: str
    slot: int
    at: int
    source: Source
    outcome: Outcome
    target: str = ""
    reason: str = ""
    message: str = ""
    by: str = ""


class BackfillRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"since": "from"}):
    """Fire the slots from `from` to `to`, both included, that were not fired; `width` of them may be at work at once."""

    since: datetime
    to: datetime
    width: int = 1
    dry_run: bool = False


class BackfillView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"since": "from"}):
    """A backfill as callers see it; `slots` are those that a new one will fire."""

    since: datetime
    to: datetime
    width: int
    fired: int = 0
    failed: int = 0
    active: list[str] = []
    slots: list[datetime] | None = None


class FireView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A fire as callers see it; `target` is the id of the run or task it started, or tried to."""

    id: str
    slot: datetime
    at: datetime
    source: Source
    outcome: Outcome
    target: str = ""
    reason: str = ""
    message: str = ""
    by: str = ""


class ScheduleView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule as callers see it. `state` is active, paused or finished."""

    id: str
    name: str
    state: ScheduleState
    when: str
    target: str
    next_at: datetime | None = None
    last_slot: datetime | None = None
    last_target: str = ""
    queued: datetime | None = None
    active: list[str] = []
    fired: int = 0
    missed: int = 0
    reason: str = ""
    created_at: datetime
    created_by: str = ""
    backfill: BackfillView | None = None
    spec: ScheduleSpec
    etag: str


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A slot to come: in UTC, and as the clock on the wall shows it in the time zone of the schedule."""

    slot: datetime
    local: str


class Moments(msgspec.Struct, frozen=True, kw_only=True):
    """Slots to come, soonest first."""

    items: list[Moment]


class ScheduleReady(msgspec.Struct, frozen=True, kw_only=True):
    """The schedule would be accepted; the answer to `dry_run`."""

    valid: bool
    next: list[Moment]


SCHEDULE_KIND: Final = Kind(
    name="schedule",
    fields=(Field("name"), Field("due", "int"), Field("finished", "int")),
    indexes=(
        Index("schedule_name", ("name",), unique=True),
        Index("schedule_due", ("due", "id")),
        Index("schedule_finished", ("finished", "id")),
    ),
)
FIRE_KIND: Final = Kind(
    name="fire",
    fields=(Field("schedule"), Field("slot", "int")),
    indexes=(Index("fire_schedule", ("schedule", "slot", "id")),),
)
KINDS: Final = (SCHEDULE_KIND, FIRE_KIND)
