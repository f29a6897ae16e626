"""Routes of `/limits`: rules that say how many tasks of a key may be under way at once, or start in a time."""

from typing import Final

from mcp_control.api.call import NO_CONTENT, Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.paging import Page
from mcp_control.tasks.limit_model import LimitSpec, LimitView

_SPEC: Final = Body(LimitSpec)
_PAGE: Final = Query(PageQuery)


async def list_limits(call: Call) -> Reply:
    """List rules by name."""
    query = call.query(_PAGE)
    return reply(await call.services.limits.list(call.actor, cursor=query.cursor, limit=query.limit))


async def get_limit(call: Call) -> Reply:
    """Return a rule, with its busiest keys, who holds them and how many wait."""
    return reply(await call.services.limits.get(call.actor, call.params["limit"]))


async def set_limit(call: Call) -> Reply:
    """Make a rule what the body says, whether it is there or not. It counts at once; nothing that runs is ended."""
    spec = await call.decode(_SPEC)
    return reply(await call.services.limits.set(call.actor, call.params["limit"], spec))


async def remove_limit(call: Call) -> Reply:
    """Remove a rule; what waited for it goes on."""
    await call.services.limits.remove(call.actor, call.params["limit"])
    return NO_CONTENT


_ONE: Final = "/limits/{limit:name}"
_EXAMPLE: Final = {
    "match": {"type": "report.*"},
    "key": "labels.customer",
    "concurrency": 'labels.tier == "premium" ? 10 : 1',
}

# fmt: off
ENDPOINTS: Final = (
    Endpoint(method="GET", path="/limits", handler=list_limits, summary="List limits", tag="limits", query=_PAGE, returns=Page[LimitView]),
    Endpoint(method="GET", path=_ONE, handler=get_limit, summary="Get a limit and its use", tag="limits", returns=LimitView),
    Endpoint(
        method="PUT", path=_ONE, handler=set_limit, summary="Set a limit", tag="limits", body=_SPEC, returns=LimitView, example=_EXAMPLE,
    ),
    Endpoint(method="DELETE", path=_ONE, handler=remove_limit, summary="Remove a limit", tag="limits", status=204),
)
# fmt: on
