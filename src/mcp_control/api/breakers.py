"""Route of `/breakers`: the circuit breakers of servers and agents."""

from typing import Final

from mcp_control.agents.model import BreakerView
from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.breaker_rules import State
from mcp_control.kernel.paging import Page


class BreakersQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those in one state; all of them without."""

    state: State | None = None


_PAGE: Final = Query(BreakersQuery)


async def list_breakers(call: Call) -> Reply:
    """List breakers by owner and name."""
    query = call.query(_PAGE)
    return reply(await call.services.breakers.list(call.actor, query.state, cursor=query.cursor, limit=query.limit))


ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/breakers", handler=list_breakers, summary="List circuit breakers", tag="breakers", query=_PAGE,
        returns=Page[BreakerView],
    ),
)  # fmt: skip
