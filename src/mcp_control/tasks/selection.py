"""Which tasks are meant: conditions that people give, and whether a task fulfils them. Pure."""

from datetime import datetime
from typing import Final

import msgspec

from mcp_control.kernel.changes import Where
from mcp_control.kernel.clock import to_millis
from mcp_control.kernel.errors import FieldError
from mcp_control.kernel.ids import make_id
from mcp_control.kernel.text import label_errors, text_errors
from mcp_control.tasks.model import ErrorClass, Task, TaskState

_STATES_MAX: Final = 11
_TEXT_MAX: Final = 256


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which tasks: all conditions given must hold.

    Attributes:
        state: any of these; none given are all that the verb can do something with.
        run: of this run.
        group: a member of this group.
        agent: held, or last held, by the agent of this id.
        created_after, created_before: RFC 3339 with a zone; the bounds are left out.
        ended_after, ended_before: when it became final.
        code, error_class: of the failure that it ended with, or that its last attempt ended with.
        priority_min, priority_max: the bounds are meant, too.
    """

    state: list[TaskState] = []
    type: str | None = None
    run: str | None = None
    group: str | None = None
    agent: str | None = None
    labels: dict[str, str] = {}
    created_after: datetime | None = None
    created_before: datetime | None = None
    ended_after: datetime | None = None
    ended_before: datetime | None = None
    code: str | None = None
    error_class: ErrorClass | None = None
    priority_min: int | None = None
    priority_max: int | None = None


EVERYTHING: Final = Selection()


def selection_errors(pointer: str, wanted: Selection) -> list[FieldError]:
    """Return what is wrong with conditions."""
    found = label_errors(f"{pointer}/labels", wanted.labels)
    if len(wanted.state) > _STATES_MAX:
        found.append(FieldError(pointer=f"{pointer}/state", code="limit-exceeded", detail="more states than there are"))
    for name, text in (
        ("type", wanted.type),
        ("run", wanted.run),
        ("group", wanted.group),
        ("agent", wanted.agent),
        ("code", wanted.code),
    ):
        if text is not None:
            found += text_errors(f"{pointer}/{name}", text, _TEXT_MAX)
    for name, moment in (
        ("created_after", wanted.created_after),
        ("created_before", wanted.created_before),
        ("ended_after", wanted.ended_after),
        ("ended_before", wanted.ended_before),
    ):
        if moment is not None and (moment.tzinfo is None or not 1971 <= moment.year <= 9000):
            found.append(
                FieldError(
                    pointer=f"{pointer}/{name}", code="invalid-timestamp", detail="a time with a zone, since 1971"
                )
            )
    return found


def conditions(wanted: Selection, tenant: str, before: int) -> list[Where]:
    """Return what the index can tell of tasks made before a moment (wall milliseconds); `matches` tells the rest."""
    if wanted.created_before is not None:
        before = min(before, to_millis(wanted.created_before))
    where = [Where("tenant", "eq", tenant), Where("id", "lt", make_id("task", max(0, before), bytes(16)))]
    if wanted.run is not None:
        where.append(Where("run", "eq", wanted.run))
    if wanted.group is not None:
        where.append(Where("group_id", "eq", wanted.group))
    if wanted.agent is not None:
        where.append(Where("agent", "eq", wanted.agent))
    if wanted.type is not None:
        where.append(Where("type", "eq", wanted.type))
    if len(wanted.state) == 1:  # of several, the order of ids is worth more than the index
        where.append(Where("state", "eq", wanted.state[0].value))
    return where


def matches(wanted: Selection, task: Task) -> bool:
    """Say whether a task of the right tenant fulfils all conditions."""
    lease = task.lease or task.last_lease
    failure = task.failure
    return (
        (not wanted.state or task.state in wanted.state)
        and wanted.type in (None, task.type)
        and wanted.run in (None, task.links.run_id)
        and wanted.group in (None, task.links.group_id)
        and (wanted.agent is None or (lease is not None and lease.agent_id == wanted.agent))
        and all(task.labels.get(name) == value for name, value in wanted.labels.items())
        and _between(task.created_at, wanted.created_after, wanted.created_before)
        and (
            (wanted.ended_after is None and wanted.ended_before is None)
            or (task.finished_at is not None and _between(task.finished_at, wanted.ended_after, wanted.ended_before))
        )
        and (wanted.code is None or (failure is not None and failure.code == wanted.code))
        and (wanted.error_class is None or (failure is not None and failure.error_class == wanted.error_class))
        and (wanted.priority_min is None or task.priority >= wanted.priority_min)
        and (wanted.priority_max is None or task.priority <= wanted.priority_max)
    )


def _between(moment: int, after: datetime | None, before: datetime | None) -> bool:
    return (after is None or moment > to_millis(after)) and (before is None or moment < to_millis(before))
