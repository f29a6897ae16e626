"""The ASGI application: every request is identified, checked, authenticated, admitted and answered here, whatever its route.

One table of routes serves REST, its documentation and the hot paths alike (`docs/decisions/0002-hot-routes.md` has the figures that led
here). Handlers raise problems; this is the only place that turns them into answers.
"""

import asyncio
import contextlib
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Final

import structlog

from mcp_control.api.agents import enrolment_of
from mcp_control.api.call import Call, ClientGone, Headers, Receive, Reply, Scope, Send
from mcp_control.api.hosts import Hosts
from mcp_control.api.problem import Internal, problem_bytes, problem_headers
from mcp_control.api.protocol import EXCHANGE, Exchange
from mcp_control.api.query import refuse_credentials
from mcp_control.api.routing import Endpoint, Router
from mcp_control.api.services import Services
from mcp_control.kernel.errors import MethodNotAllowed, NotAcceptable, NotFound, Overloaded, Problem
from mcp_control.security.model import Actor

_log = structlog.get_logger(__name__)
Socket = Callable[[Scope, Receive, Send, str], Awaitable[None]]
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_ANYBODY: Final = Actor(id="anonymous", kind="user", display="anonymous")
_SECURITY: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)
_DISCARD_BYTES: Final = 32 << 20
_DISCARD_SECONDS: Final = 3.0
_HSTS: Final = (b"strict-transport-security", b"max-age=31536000")


class ControlApp:
    """The application.

    Args:
        router: all routes.
        sockets: WebSocket handlers by path; each refuses or accepts the handshake itself.
        services: what handlers call.
    """

    def __init__(self, router: Router, sockets: Mapping[str, Socket], services: Services) -> None:
        self._router = router
        self._sockets = sockets
        self._services = services
        self._gate = services.gate
        self._metrics = services.metrics
        self._hosts = Hosts(services.settings.security.allowed_hosts)
        self._connections_max = services.settings.overload.max_connections
        self._connections = 0
        self._handled = 0
        self._metrics.watch("http_requests_in_flight", "requests being handled", lambda: self._handled)
        self._metrics.watch("sockets", "open WebSocket connections", lambda: self._connections)
        self._prefix = secrets.token_hex(5)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or one socket."""
        if scope["type"] == "http":
            self._handled += 1
            try:
                await self._http(scope, receive, send)
            finally:
                self._handled -= 1
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)

    def _request_id(self, given: bytes | None) -> str:
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given.decode()
        return f"req_{self._prefix}{next(self._numbers):x}"

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self._request_id(headers.get(b"x-request-id"))
        started = self._services.clock.monotonic()
        route = "unmatched"
        try:
            self._hosts.check(headers)
            if scope["query_string"]:
                refuse_credentials(scope["query_string"])
            endpoint, params = self._router.find(scope["method"], scope["path"], scope["raw_path"])
            route = endpoint.full_path
            accept = headers.get(b"accept")
            if accept is not None and accept != b"*/*" and not endpoint.any_media:
                check_accept(accept, endpoint)
            actor = _ANYBODY if endpoint.access == "open" else await self._actor(headers, endpoint)
            answer = await self._admitted(
                endpoint, Call(scope, receive, headers, params, request_id, actor, self._services)
            )
        except Problem as problem:
            if problem.status >= 500:
                _log.warning("refused", code=problem.code, request_id=request_id, route=route)
            answer = refusal(problem, request_id)
        except ClientGone:
            return
        except Exception as error:
            self._metrics.violation("unhandled_exception")
            _log.exception("request failed", request_id=request_id, route=route, error=type(error).__name__)
            answer = refusal(Internal("the server made a mistake; its log has more under this request id"), request_id)
        self._metrics.request(route, scope["method"], answer.status, self._services.clock.monotonic() - started)
        await self._send(scope, receive, send, answer, request_id)

    async def _admitted(self, endpoint: Endpoint, call: Call) -> Reply:
        gate = self._gate
        gate.check(endpoint.weight)
        if endpoint.weight != "submit":
            return await endpoint.handler(call)
        gate.submits += 1
        try:
            return await endpoint.handler(call)
        finally:
            gate.submits -= 1

    async def _actor(self, headers: dict[bytes, bytes], endpoint: Endpoint) -> Actor:
        header = headers.get(b"authorization", b"").decode("latin-1")
        authenticator = self._services.authenticator
        now = self._services.clock.now()
        actor = authenticator.known(header, now)
        if actor is not None:
            return actor
        if endpoint.access == "enrol" and enrolment_of(headers.get(b"authorization")):
            return _ANYBODY  # the handler redeems the token, which is good for this alone
        return await authenticator.authenticate(header, now)

    async def _send(self, scope: Scope, receive: Receive, send: Send, answer: Reply, request_id: str) -> None:
        headers = [*answer.headers, (b"x-request-id", request_id.encode())]
        secured, secured_lines = _secured(tuple([name for name, _ in answer.headers]), scope["scheme"])
        if answer.stream is None:
            if answer.status not in (204, 304):
                headers.append((b"content-length", b"%d" % len(answer.body)))
            # Taken out, since it leads back to the scope: without a cycle all of a request is freed with its answer.
            exchange: Exchange | None = scope["extensions"].pop(EXCHANGE, None)
            if (
                exchange is not None
                and answer.status != 413
                and exchange.answer(answer.status, _head(headers) + secured_lines, answer.body)
            ):
                return
        headers += secured
        if answer.stream is None:
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            if answer.status == 413:
                # Closed with bytes unread, the connection would be reset and the answer lost with it.
                await send({"type": "http.response.body", "body": answer.body, "more_body": True})
                await _discard(receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            await send({"type": "http.response.body", "body": answer.body, "more_body": False})
            return
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if scope["method"] != "HEAD":
            async for chunk in answer.stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self._request_id(headers.get(b"x-request-id"))
        self._connections += 1
        try:
            self._hosts.check(headers)
            if self._connections > self._connections_max:
                self._metrics.shed("connection")
                raise Overloaded("too many connections", retry_after=5)
            refuse_credentials(scope["query_string"])
            handler = self._sockets.get(scope["path"])
            if handler is None:
                raise NotFound("there is no socket at this address")
            await handler(scope, receive, send, request_id)
        except Problem as problem:
            await refuse_socket(send, problem, request_id)
        finally:
            self._connections -= 1


@lru_cache(maxsize=256)
def _secured(given: tuple[bytes, ...], scheme: str) -> tuple[Headers, bytes]:
    """Return the headers that protect every answer but for those it gives itself, and their lines; there are few such sets of names."""
    headers = [pair for pair in _SECURITY if pair[0] not in given]
    if scheme == "https":
        headers.append(_HSTS)
    return headers, _head(headers)


def _head(headers: Headers) -> bytes:
    """Return header lines. Raises ValueError where one would end early and so begin another."""
    head = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers) or b"\0" in head:
        raise ValueError("a header line has an end inside")
    return head


async def _discard(receive: Receive) -> None:
    """Read what the caller still sends of a body that was refused, within bounds."""
    left = _DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message["more_body"]:
                    return
                left -= len(message["body"])


def refusal(problem: Problem, request_id: str) -> Reply:
    """Return the answer for a problem."""
    headers = problem_headers(problem)
    if isinstance(problem, MethodNotAllowed) and isinstance(problem.data.get("allowed"), list):
        headers.append((b"allow", ", ".join(problem.data["allowed"]).encode()))  # type: ignore[arg-type]  # a list of method names
    return Reply(problem.status, problem_bytes(problem, request_id), headers)


async def refuse_socket(send: Send, problem: Problem, request_id: str) -> None:
    """Answer a handshake with a problem document instead of an upgrade."""
    body = problem_bytes(problem, request_id)
    headers = [*problem_headers(problem), (b"x-request-id", request_id.encode()), *_SECURITY]
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def check_accept(accept: bytes, endpoint: Endpoint) -> None:
    """Raise NotAcceptable where the caller accepts nothing that the route answers."""
    wanted = {
        part.split(b";")[0].strip().lower().decode("latin-1")
        for part in accept.split(b",")
        if b"q=0" not in part.replace(b"q=0.", b"")
    }
    offered = {*endpoint.produces, "application/problem+json"}
    if (
        "*/*" in wanted
        or not wanted.isdisjoint(offered)
        or any(f"{media.split('/')[0]}/*" in wanted for media in offered)
    ):
        return
    raise NotAcceptable("this route answers " + ", ".join(endpoint.produces))
