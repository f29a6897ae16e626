"""Routes of `/shares`: whose tasks get which part of the slots while several wait."""

from typing import Final

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.paging import Page
from mcp_control.tasks.share_model import ShareOrder, ShareView

_ORDER: Final = Body(ShareOrder)
_PAGE: Final = Query(PageQuery)


async def list_shares(call: Call) -> Reply:
    """List shares by key: their weights, what waits and what they were served."""
    query = call.query(_PAGE)
    return reply(await call.services.shares.list(call.actor, cursor=query.cursor, limit=query.limit))


async def set_share(call: Call) -> Reply:
    """Give a share a weight that counts whatever its tasks say, or leave it to them again. It counts at once."""
    return reply(await call.services.shares.set(call.actor, await call.decode(_ORDER)))


# fmt: off
ENDPOINTS: Final = (
    Endpoint(method="GET", path="/shares", handler=list_shares, summary="List shares", tag="shares", query=_PAGE, returns=Page[ShareView]),
    Endpoint(
        method="PUT", path="/shares", handler=set_share, summary="Weight a share", tag="shares", body=_ORDER, returns=ShareView,
        example={"key": "customer-7", "weight": 3.0},
    ),
)
# fmt: on
