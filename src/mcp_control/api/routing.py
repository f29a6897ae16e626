"""The table of routes: which method on which path leads to which handler, and what the documentation says of it."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Literal
from urllib.parse import unquote

import msgspec

from mcp_control.api.call import Call, Reply
from mcp_control.api.decode import Body
from mcp_control.api.query import NoQuery, Query
from mcp_control.kernel.errors import MethodNotAllowed, NotFound
from mcp_control.kernel.ids import is_id
from mcp_control.kernel.text import name_errors

Handler = Callable[[Call], Awaitable[Reply]]
Access = Literal["open", "actor", "enrol"]
Weight = Literal["submit", "read", "keep"]
NO_QUERY: Final = Query(NoQuery)
PREFIX: Final = "/api/v1"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path.

    Attributes:
        path: below `/api/v1` unless `absolute`; `{x}` is an id, `{x:name}` an id or a name.
        access: `open`: nobody need say who they are; `actor`: any credential; `enrol`: an enrolment token does as well.
        weight: what overload does to it: `submit` is shed first, `read` later, `keep` (what moves accepted work on) last.
        body, query, returns: the shapes it reads and answers; `returns` None is an empty answer.
        others: by status, a shape it may answer instead of `returns`.
        produces: media types it can answer, the first is the default.
        body_type: media type of a body that is not JSON.
        statuses: answers beside `status` that are no problems.
        example: a body that works.
        any_media: the media type is that of the thing itself, so any `Accept` will do.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    access: Access = "actor"
    weight: Weight = "read"
    body: Body[Any] | None = None
    query: Query[Any] = NO_QUERY
    returns: Any = None
    status: int = 200
    statuses: tuple[int, ...] = ()
    others: dict[int, Any] = {}
    produces: tuple[str, ...] = ("application/json",)
    body_type: str | None = None
    example: Any = None
    absolute: bool = False
    any_media: bool = False

    @property
    def full_path(self) -> str:
        """The path from the root."""
        return self.path if self.absolute else PREFIX + self.path


class _Node:
    __slots__ = ("children", "methods", "variable")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.variable: tuple[str, bool, _Node] | None = None
        self.methods: dict[str, Endpoint] = {}


class Router:
    """Finds the endpoint of a request: one dictionary look-up where the path has no variable part."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._fixed: dict[str, dict[str, Endpoint]] = {}
        self._root = _Node()
        for endpoint in self.endpoints:
            path = endpoint.full_path
            if "{" not in path:
                self._fixed.setdefault(path, {})[endpoint.method] = endpoint
            self._add(endpoint)

    def _add(self, endpoint: Endpoint) -> None:
        node = self._root
        for part in endpoint.full_path.split("/")[1:]:
            if part.startswith("{"):
                name, _, kind = part[1:-1].partition(":")
                if node.variable is None:
                    node.variable = (name, kind == "name", _Node())
                assert node.variable[:2] == (name, kind == "name"), f"two names for one place in {endpoint.full_path}"
                node = node.variable[2]
            else:
                node = node.children.setdefault(part, _Node())
        assert endpoint.method not in node.methods, f"{endpoint.method} {endpoint.full_path} is there twice"
        node.methods[endpoint.method] = endpoint

    def find(self, method: str, path: str, raw_path: bytes) -> tuple[Endpoint, dict[str, str]]:
        """Return the endpoint and the variable parts of the path.

        Raises:
            NotFound: no such path, or a part that can be no id or name.
            MethodNotAllowed: with `allowed`.
        """
        methods = self._fixed.get(path)
        params: dict[str, str] = {}
        if methods is None:
            methods, params = self._walk(raw_path)
        endpoint = methods.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            if not methods:
                raise NotFound("there is nothing at this address")
            raise MethodNotAllowed(f"{method} is not possible here", allowed=self.allowed(methods))
        return endpoint, params

    @staticmethod
    def allowed(methods: Iterable[str]) -> list[str]:
        """Return the methods for an `Allow` header."""
        return sorted({*methods, "HEAD"} if "GET" in methods else set(methods))

    def _walk(self, raw_path: bytes) -> tuple[dict[str, Endpoint], dict[str, str]]:
        node = self._root
        params: dict[str, str] = {}
        for raw in raw_path.decode("latin-1").split("/")[1:]:
            part = unquote(raw, errors="strict") if "%" in raw and _decodable(raw) else raw
            child = node.children.get(part)
            if child is None:
                if node.variable is None:
                    raise NotFound("there is nothing at this address")
                name, named, child = node.variable
                if not (is_id(part) or (named and not name_errors("", part))):
                    raise NotFound("there is no such thing")
                params[name] = part
            node = child
        return node.methods, params


def _decodable(raw: str) -> bool:
    try:
        unquote(raw, errors="strict")
    except UnicodeDecodeError:
        return False
    return True
