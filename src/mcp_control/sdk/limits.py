"""Limits as a client reads and sets them."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mcp_control.kernel.paging import Page
from mcp_control.sdk.calls import Request, query
from mcp_control.sdk.submission import encode_json
from mcp_control.sdk.transport import Call
from mcp_control.tasks.limit_model import LimitSpec, LimitView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

Spec = LimitSpec | Mapping[str, Any]


def _path(name: str) -> str:
    return f"/limits/{quote(name, safe='')}"


def set_limit(name: str, spec: Spec) -> Request[LimitView]:
    """Make a rule what the spec says."""
    call = Call(method="PUT", path=_path(name), body=encode_json(spec), repeatable=True)
    return Request(call, lambda reply: reply.json(LimitView))


def get(name: str) -> Request[LimitView]:
    """Read a rule and its use."""
    return Request(Call(path=_path(name), repeatable=True), lambda reply: reply.json(LimitView))


def listed(**filters: object) -> Request[Page[LimitView]]:
    """Read a page of rules."""
    call = Call(path="/limits", params=query(filters), repeatable=True)
    return Request(call, lambda reply: reply.json(Page[LimitView]))


def remove(name: str) -> Request[None]:
    """Remove a rule."""
    return Request(Call(method="DELETE", path=_path(name), repeatable=True), lambda reply: None)


class Limits:
    """`client.limits`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def set(self, name: str, spec: Spec) -> LimitView:
        """Make a rule what the spec says, whether it is there or not. Raises InvalidRequest with what is wrong, place by place."""
        return self._client.do(set_limit(name, spec))

    def get(self, name: str) -> LimitView:
        """Read a rule, with its busiest keys."""
        return self._client.do(get(name))

    def iter(self, **filters: Any) -> Iterator[LimitView]:
        """Yield rules by name."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    def remove(self, name: str) -> None:
        """Remove a rule; what waited for it goes on."""
        self._client.do(remove(name))


class AsyncLimits:
    """`client.limits` of an `AsyncClient`; see `Limits`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def set(self, name: str, spec: Spec) -> LimitView:
        """Make a rule what the spec says, whether it is there or not. Raises InvalidRequest with what is wrong, place by place."""
        return await self._client.do(set_limit(name, spec))

    async def get(self, name: str) -> LimitView:
        """Read a rule, with its busiest keys."""
        return await self._client.do(get(name))

    def iter(self, **filters: Any) -> AsyncIterator[LimitView]:
        """Yield rules by name."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    async def remove(self, name: str) -> None:
        """Remove a rule; what waited for it goes on."""
        await self._client.do(remove(name))
