"""Routes of `/groups`: tasks that belong together, and what is done when they have ended."""

from collections.abc import Iterable
from typing import Final

import msgspec

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query, WaitQuery
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Nothing, Reason, with_key
from mcp_control.kernel.paging import Page
from mcp_control.tasks.group_model import Added, GroupRequest, GroupState, GroupView, MoreTasks
from mcp_control.tasks.grouping import callbacks


class GroupsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold."""

    state: GroupState | None = None
    name: str | None = None


def _payloads(request: GroupRequest) -> Iterable[bytes]:
    return [bytes(spec.payload) for spec in (*request.tasks, *(spec for _, spec in callbacks(request.on)))]


_REQUEST: Final = Body(GroupRequest, opaque=_payloads)
_MORE: Final = Body(MoreTasks, opaque=lambda more: [bytes(spec.payload) for spec in more.tasks])
_REASON: Final = Body(Reason, optional=True)
_NOTHING: Final = Body(Nothing, optional=True)
_LIST: Final = Query(GroupsQuery)
_WAIT: Final = Query(WaitQuery)


async def create_group(call: Call) -> Reply:
    """Make a group with its first members, all or none of which are accepted; durable when this answers.

    With `wait`, the answer comes when it has ended or the time is over.
    """
    wait = call.query(_WAIT).wait
    request: GroupRequest = with_key(call, await call.decode(_REQUEST))
    groups = call.services.steering.groups
    with call.services.gate.entry(max(1, len(request.tasks))):
        view, created = await groups.create(call.actor, request, call.origin)
    if wait:
        warnings = view.warnings
        view = await call.until_gone(groups.wait(call.actor, view.id, wait))
        view = msgspec.structs.replace(view, warnings=warnings)
    return reply(view, 201 if created else 200)


async def list_groups(call: Call) -> Reply:
    """List groups, newest first; members are counted only in those that have ended."""
    query = call.query(_LIST)
    return reply(
        await call.services.steering.groups.list(
            call.actor, state=query.state, name=query.name, cursor=query.cursor, limit=query.limit
        )
    )


async def get_group(call: Call) -> Reply:
    """Return a group with its members counted by state, waiting for its end when asked to."""
    wait = call.query(_WAIT).wait
    groups, group_id = call.services.steering.groups, call.params["group_id"]
    if wait:
        return reply(await call.until_gone(groups.wait(call.actor, group_id, wait)))
    return reply(await groups.get(call.actor, group_id))


async def add_tasks(call: Call) -> Reply:
    """Add up to 1,000 members, all or none of which are accepted; durable when this answers."""
    more: MoreTasks = with_key(call, await call.decode(_MORE))
    with call.services.gate.entry(len(more.tasks)):
        added, now = await call.services.steering.groups.add(call.actor, call.params["group_id"], more, call.origin)
    return reply(added, 201 if now else 200)


async def seal_group(call: Call) -> Reply:
    """Say that no more tasks come from outside; the group ends when all its members have."""
    await call.decode(_NOTHING)
    return reply(await call.services.steering.groups.seal(call.actor, call.params["group_id"]))


async def cancel_group(call: Call) -> Reply:
    """Cancel all members; the group ends after the last of them."""
    reason = (await call.decode(_REASON)).reason
    return reply(await call.services.steering.groups.cancel(call.actor, call.params["group_id"], reason))


async def retry_group(call: Call) -> Reply:
    """Have the members tried again that did not complete: new tasks take their places."""
    await call.decode(_NOTHING)
    return reply(await call.services.steering.groups.retry(call.actor, call.params["group_id"]))


_ONE: Final = "/groups/{group_id}"
_MEMBER: Final = {"type": "echo", "payload": {"page": 1}}

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/groups", handler=create_group, summary="Make a group", tag="groups", weight="submit", body=_REQUEST,
        query=_WAIT, returns=GroupView, status=201, statuses=(200,),
        example={"name": "import", "tasks": [_MEMBER, {"type": "echo"}], "on": {"ended": {"type": "echo", "payload": "done"}}},
    ),
    Endpoint(
        method="GET", path="/groups", handler=list_groups, summary="List groups", tag="groups", query=_LIST, returns=Page[GroupView],
    ),
    Endpoint(method="GET", path=_ONE, handler=get_group, summary="Get a group", tag="groups", query=_WAIT, returns=GroupView),
    Endpoint(
        method="POST", path=f"{_ONE}/tasks", handler=add_tasks, summary="Add tasks to a group", tag="groups", weight="submit",
        body=_MORE, returns=Added, status=201, statuses=(200,), example={"tasks": [_MEMBER]},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/seal", handler=seal_group, summary="Seal a group", tag="groups", body=_NOTHING, returns=GroupView,
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/cancel", handler=cancel_group, summary="Cancel a group", tag="groups", body=_REASON,
        returns=GroupView, example={"reason": "wrong input"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/retry", handler=retry_group, summary="Retry what failed of a group", tag="groups", body=_NOTHING,
        returns=GroupView,
    ),
)  # fmt: skip
