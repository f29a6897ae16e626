"""Routes of `/dead-letters`: tasks that failed for good."""

from datetime import datetime
from typing import Final

import msgspec

from mcp_control.api.agents import labels_of
from mcp_control.api.call import NO_CONTENT, Call, Reply, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Reason
from mcp_control.kernel.errors import NotFound
from mcp_control.kernel.paging import Page
from mcp_control.tasks.bulk import is_dead_letter
from mcp_control.tasks.dead_letters import ReplayEdit
from mcp_control.tasks.model import ErrorClass
from mcp_control.tasks.records import view
from mcp_control.tasks.selection import Selection
from mcp_control.tasks.view_model import ParkedTask, TaskView


class DeadLettersQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold. `code` and `error_class` are of the failure."""

    type: str | None = None
    run: str | None = None
    code: str | None = None
    error_class: ErrorClass | None = None
    ended_after: datetime | None = None
    ended_before: datetime | None = None
    label: list[str] = msgspec.field(default_factory=list)


class ParkedTasks(msgspec.Struct, frozen=True, kw_only=True):
    """Stored tasks that cannot be decoded."""

    items: list[ParkedTask]


_LIST: Final = Query(DeadLettersQuery)
_EDIT: Final = Body(
    ReplayEdit,
    optional=True,
    opaque=lambda edit: [] if edit.payload is msgspec.UNSET else [bytes(edit.payload)],
)
_REASON: Final = Body(Reason, optional=True)


async def list_dead_letters(call: Call) -> Reply:
    """List tasks that failed for good and that nobody has had tried again or discarded, newest first."""
    query = call.query(_LIST)
    wanted = Selection(
        type=query.type,
        run=query.run,
        code=query.code,
        error_class=query.error_class,
        ended_after=query.ended_after,
        ended_before=query.ended_before,
        labels=labels_of(query.label),
    )
    letters = call.services.steering.dead_letters
    return reply(await letters.list(call.actor, wanted, cursor=query.cursor, limit=query.limit))


async def get_dead_letter(call: Call) -> Reply:
    """Return a dead letter with its attempts, errors and payload."""
    task_id = call.params["task_id"]
    if not is_dead_letter(await call.services.tasks.one(call.actor, task_id)):
        raise NotFound("there is no such dead letter")
    shown = (await call.services.tasks.get(call.actor, (task_id,), ("payload",)))[0]
    if shown is None:
        raise NotFound("there is no such dead letter")
    return tagged(shown, shown.etag)


async def replay_dead_letter(call: Call) -> Reply:
    """Have a dead letter tried again, as a new task that names it, with another payload or other needs where given."""
    edit = await call.decode(_EDIT)
    letters = call.services.steering.dead_letters
    submitted = await letters.replay(call.actor, call.params["task_id"], call.origin, edit)
    return reply(view(submitted.task, call.services.clock.now()), 201)


async def discard_dead_letter(call: Call) -> Reply:
    """Take a task out of the dead-letter set; it stays among the finished tasks."""
    reason = (await call.decode(_REASON)).reason
    task = await call.services.steering.dead_letters.discard(call.actor, call.params["task_id"], reason)
    return reply(view(task, call.services.clock.now()))


async def list_parked(call: Call) -> Reply:
    """List stored tasks that cannot be decoded; they are out of everybody's way until somebody removes them."""
    return reply(ParkedTasks(items=await call.services.steering.parking.list(call.actor)))


async def remove_parked(call: Call) -> Reply:
    """Remove a stored task that cannot be decoded, for good."""
    await call.services.steering.parking.remove(call.actor, call.params["task_id"])
    return NO_CONTENT


_ONE: Final = "/dead-letters/{task_id}"

ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/dead-letters", handler=list_dead_letters, summary="List dead letters", tag="dead-letters", query=_LIST,
        returns=Page[TaskView],
    ),
    Endpoint(
        method="GET", path="/dead-letters/parked", handler=list_parked, summary="List tasks that cannot be decoded",
        tag="dead-letters", returns=ParkedTasks,
    ),
    Endpoint(
        method="DELETE", path="/dead-letters/parked/{task_id}", handler=remove_parked, summary="Remove a task that cannot be decoded",
        tag="dead-letters", status=204,
    ),
    Endpoint(method="GET", path=_ONE, handler=get_dead_letter, summary="Get a dead letter", tag="dead-letters", returns=TaskView),
    Endpoint(
        method="POST", path=f"{_ONE}/replay", handler=replay_dead_letter, summary="Have it tried again", tag="dead-letters",
        weight="submit", body=_EDIT, returns=TaskView, status=201, example={"payload": {"text": "corrected"}, "priority": "high"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/discard", handler=discard_dead_letter, summary="Discard it", tag="dead-letters", body=_REASON,
        returns=TaskView, example={"reason": "known and harmless"},
    ),
)  # fmt: skip
