"""Task groups: many tasks that belong together, and what is done when they have ended."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.model import Origin, Request, TaskSpec, TaskState

MEMBERS_AT_ONCE: Final = 1000
FAILED_SHOWN: Final = 50


class GroupState(StrEnum):
    """Where a group stands.

    open: tasks may be added · sealed: no more from outside; a member that has not ended may still add some · cancelling: its members are
    being cancelled · completed: all members completed · failed: some did not · cancelled.
    """

    OPEN = "open"
    SEALED = "sealed"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


GROUP_FINAL: Final = frozenset({GroupState.COMPLETED, GroupState.FAILED, GroupState.CANCELLED})
Event = Literal["completed", "first_failure", "ended"]
"""completed: the group is sealed and all members completed · first_failure: the first member ended otherwise, the others go on · ended: the
last member has ended, however."""


class Callbacks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The task that is made once when something happens to a group; its payload is a `CallbackPayload`."""

    completed: TaskSpec | None = None
    first_failure: TaskSpec | None = None
    ended: TaskSpec | None = None


class GroupRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A new group.

    Attributes:
        name: for people; it need not be unique.
        tasks: its first members, all or none of which are accepted.
        on: what is done when members or the group end.
        open: more members will be added; it must be sealed then.
        idempotency_key: repeating a request with the same key returns the first group.
    """

    name: Annotated[str, msgspec.Meta(max_length=128)] = ""
    tasks: Annotated[list[TaskSpec], msgspec.Meta(max_length=MEMBERS_AT_ONCE)] = []
    on: Callbacks = Callbacks()
    open: bool = False
    idempotency_key: str | None = None


class MoreTasks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """More members, all or none of which are accepted.

    Attributes:
        by: id of a member that has not ended; it may add to a sealed group, too.
        idempotency_key: repeating a request with the same key adds nothing and returns the first answer's ids.
    """

    tasks: Annotated[list[TaskSpec], msgspec.Meta(min_length=1, max_length=MEMBERS_AT_ONCE)]
    by: str | None = None
    idempotency_key: str | None = None


class Added(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The ids of new members, in the order of the request; `warnings` say e.g. that no registered agent can take them."""

    ids: list[str]
    total: int
    warnings: list[str] = []


class TaskGroup(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored group. Times are wall milliseconds. What members do is not written here: their number would make it a hot spot.

    Attributes:
        total: how many members it has; one that is tried again is one.
        events: for which of them a callback is kept.
        called: the newest task made for an event.
        round: how often it was begun again.
        first_failure: the first member that was seen to have ended other than completed, in this round.
        operation: what cancels its members, or has them tried again.
        counts: how many members had which state when it ended.
        changed_at: when members were added last.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    name: str = ""
    state: GroupState
    state_at: int
    created_at: int
    changed_at: int
    origin: Origin
    total: int = 0
    events: list[Event] = []
    called: dict[str, str] = {}
    round: int = 0
    first_failure: str = ""
    operation: str = ""
    cancel: Request | None = None
    counts: dict[str, int] = {}
    finished_at: int | None = None
    idempotency_key: str | None = None
    digest: str = ""
    schema: int = 1

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in GROUP_FINAL


class GroupSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a callback is told of its group.

    Attributes:
        counts: members by state.
        failed: the first ids, 50 at most, of members that ended other than completed, oldest first.
        more_failed: there are more; list the tasks of the group by state to see them all.
    """

    id: str
    name: str
    event: Event
    state: GroupState
    round: int
    total: int
    counts: dict[TaskState, int]
    failed: list[str]
    more_failed: bool


class CallbackPayload(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of a callback: what became of the group, and the payload that its spec gave."""

    group: GroupSummary
    payload: msgspec.Raw


class GroupView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A group as callers see it.

    Attributes:
        counts: members by state; when one group is asked for, or when it has ended.
        done: how many members have ended; with `counts`.
        progress: done of total, 0 to 1; with `counts`.
        callbacks: the events that have one, with the id of the task that was made, empty before.
        operation: what cancels its members, or has them tried again.
    """

    id: str
    name: str = ""
    state: GroupState
    state_since: datetime
    created_at: datetime
    created_by: str
    total: int
    counts: dict[TaskState, int] | None = None
    done: int | None = None
    progress: float | None = None
    callbacks: dict[str, str] = {}
    first_failure: str = ""
    round: int = 0
    operation: str = ""
    cancel_reason: str = ""
    finished_at: datetime | None = None
    warnings: list[str] = []


GROUP_KIND: Final = Kind(
    name="group",
    fields=(
        Field("tenant"),
        Field("state"),
        Field("name"),
        Field("unique_key"),
        Field("active", "int"),
        Field("idle", "int"),
        Field("finished", "int"),
    ),
    indexes=(
        Index("group_tenant", ("tenant", "id")),
        Index("group_state", ("tenant", "state", "id")),
        Index("group_name", ("tenant", "name", "id")),
        Index("group_key", ("unique_key",), unique=True),
        Index("group_active", ("active", "id")),
        Index("group_idle", ("idle", "id")),
        Index("group_finished", ("finished", "id")),
    ),
    cold=("callbacks",),
)
