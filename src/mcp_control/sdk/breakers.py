"""Circuit breakers as a client reads them."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from mcp_control.agents.model import BreakerView
from mcp_control.kernel.paging import Page
from mcp_control.sdk.calls import Request, query
from mcp_control.sdk.transport import Call

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client


def listed(**filters: object) -> Request[Page[BreakerView]]:
    """Read a page of breakers."""
    call = Call(path="/breakers", params=query(filters), repeatable=True)
    return Request(call, lambda reply: reply.json(Page[BreakerView]))


class Breakers:
    """`client.breakers`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def iter(self, **filters: Any) -> Iterator[BreakerView]:
        """Yield the breakers of servers and agents by owner and name; `state="open"` those that are open."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))


class AsyncBreakers:
    """`client.breakers` of an `AsyncClient`; see `Breakers`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    def iter(self, **filters: Any) -> AsyncIterator[BreakerView]:
        """Yield the breakers of servers and agents by owner and name; `state="open"` those that are open."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))
