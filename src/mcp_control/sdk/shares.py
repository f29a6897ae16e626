"""Shares as a client reads and weights them."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from mcp_control.kernel.paging import Page
from mcp_control.sdk.calls import Request, query
from mcp_control.sdk.submission import encode_json
from mcp_control.sdk.transport import Call
from mcp_control.tasks.share_model import ShareOrder, ShareView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client


def set_share(key: str, weight: float | None) -> Request[ShareView]:
    """Weight a share."""
    call = Call(method="PUT", path="/shares", body=encode_json(ShareOrder(key=key, weight=weight)), repeatable=True)
    return Request(call, lambda reply: reply.json(ShareView))


def listed(**filters: object) -> Request[Page[ShareView]]:
    """Read a page of shares."""
    call = Call(path="/shares", params=query(filters), repeatable=True)
    return Request(call, lambda reply: reply.json(Page[ShareView]))


class Shares:
    """`client.shares`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def set(self, key: str, weight: float | None) -> ShareView:
        """Give a share a weight whatever its tasks say; None leaves it to them again. Raises InvalidRequest."""
        return self._client.do(set_share(key, weight))

    def iter(self, **filters: Any) -> Iterator[ShareView]:
        """Yield shares by key."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))


class AsyncShares:
    """`client.shares` of an `AsyncClient`; see `Shares`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def set(self, key: str, weight: float | None) -> ShareView:
        """Give a share a weight whatever its tasks say; None leaves it to them again. Raises InvalidRequest."""
        return await self._client.do(set_share(key, weight))

    def iter(self, **filters: Any) -> AsyncIterator[ShareView]:
        """Yield shares by key."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))
