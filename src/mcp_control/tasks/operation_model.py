"""Operations: one verb for all tasks that fulfil conditions, as it is asked for, kept and shown."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.selection import Selection

Verb = Literal["cancel", "pause", "resume", "reprioritize", "reassign", "retry", "replay", "discard"]
OperationState = Literal["running", "completed", "cancelled"]
OPERATION_TRANSITIONS: Final[Mapping[str, Mapping[OperationState, frozenset[OperationState]]]] = {
    "finish": {"running": frozenset({"completed"})},
    "cancel": {"running": frozenset({"cancelled"})},
}
SHOWN: Final = 20


class OperationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to do with which tasks.

    Attributes:
        verb: `cancel`, `pause`, `resume`, `reprioritize` (needs `priority`), `reassign` (needs `agent`), `retry` (what has ended, as new
            tasks), `replay` (dead letters, as new tasks), `discard` (dead letters).
        where: which tasks; at least one condition.
        dry_run: only say how many there are, and the first.
        expected_at_most: do nothing where more than these match; never act on more.
        reason: why, for people.
        priority: 0 to 100, or critical, high, medium, low.
        agent: name or id.
    """

    verb: Verb
    where: Selection
    dry_run: bool = False
    expected_at_most: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] | None = None
    reason: str = ""
    priority: int | str | None = None
    agent: str | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A task with which it could not be done, and why."""

    id: str
    code: str
    detail: str


class Operation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored operation. Times are wall milliseconds.

    Attributes:
        cursor: every task up to this id was looked at.
        pending: what is being done now. It is written down before it is done, so that after a crash it is done, and counted, once.
        matched, changed, refused: tasks it was to be done with, was done with, could not be done with.
        limit: how many it may be done with at most.
        rejoin: what is tried again takes the place of the old task in its group.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    verb: Verb
    where: Selection
    state: OperationState = "running"
    reason: str = ""
    priority: int | None = None
    agent: str | None = None
    limit: int | None = None
    rejoin: bool = False
    created_at: int
    created_by: str
    finished_at: int | None = None
    cursor: str = ""
    pending: list[str] = []
    matched: int = 0
    changed: int = 0
    refused: int = 0
    first: list[str] = []
    problems: list[Refused] = []
    schema: int = 1


class OperationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An operation as callers see it. `first` are the first tasks it was done with, `problems` the first it could not be done with."""

    id: str
    verb: Verb
    state: OperationState
    where: Selection
    matched: int
    changed: int
    refused: int
    first: list[str] = []
    problems: list[Refused] = []
    reason: str = ""
    priority: int | None = None
    agent: str | None = None
    created_at: datetime
    created_by: str
    finished_at: datetime | None = None


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """What an operation would be done with: how many tasks, whether there may be more than were counted, and the first of them."""

    matched: int
    more: bool
    first: list[str]


OPERATION_KIND: Final = Kind(
    name="operation",
    fields=(Field("tenant"), Field("running", "int"), Field("finished", "int")),
    indexes=(
        Index("operation_tenant", ("tenant", "id")),
        Index("operation_running", ("running", "id")),
        Index("operation_finished", ("finished", "id")),
    ),
)
