"""One request and its answer, as the handlers of all routes see them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from mcp_control.api.decode import Body
from mcp_control.api.protocol import EXCHANGE, Exchange
from mcp_control.api.query import Query
from mcp_control.kernel.errors import (
    BodyTimeout,
    FieldError,
    Invalid,
    Overloaded,
    PayloadTooLarge,
    PreconditionRequired,
    UnsupportedMediaType,
    VersionConflict,
)
from mcp_control.security.model import Actor
from mcp_control.tasks.model import Origin

if TYPE_CHECKING:
    from mcp_control.api.services import Services

T = TypeVar("T")
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
encode: Final = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


class Reply:
    """What goes back: bytes at once, or a stream of them."""

    __slots__ = ("body", "headers", "status", "stream")

    def __init__(
        self, status: int, body: bytes = b"", headers: Headers = (), stream: AsyncIterator[bytes] | None = None
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.stream = stream


def reply(value: object, status: int = 200, headers: Headers = ()) -> Reply:
    """Return a JSON answer."""
    return Reply(status, encode(value), (JSON, *headers))


def tagged(value: object, etag: str, status: int = 200) -> Reply:
    """Return a JSON answer with the version that `If-Match` will want."""
    return Reply(status, encode(value), (JSON, (b"etag", b'"' + etag.encode() + b'"')))


NO_CONTENT: Final = Reply(204)

_LARGE_BODY: Final = 16 * 1024  # bytes; from here on decoding takes so long that others must get their turn


class Call:
    """One authenticated request.

    Attributes:
        params: the variable parts of the path, by name.
        headers: by lower-case name; of repeated ones the last.
        body_max: bytes the body may have.
        stall: seconds a body may stand still.
    """

    __slots__ = ("_receive", "actor", "body_max", "headers", "params", "request_id", "scope", "services", "stall")

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        headers: dict[bytes, bytes],
        params: dict[str, str],
        request_id: str,
        actor: Actor,
        services: "Services",
    ) -> None:
        self.scope = scope
        self._receive = receive
        self.headers = headers
        self.params = params
        self.request_id = request_id
        self.actor = actor
        self.services = services
        self.body_max = services.body_max
        self.stall = services.body_stall_seconds

    @property
    def origin(self) -> Origin:
        """Through which door this came, and for whom."""
        actor = self.actor
        return Origin(protocol="rest", request_id=self.request_id, principal=actor.id, on_behalf_of=actor.on_behalf_of)

    def query(self, query: Query[T]) -> T:
        """Return the parameters of the URL. Raises UnknownParameter, Invalid."""
        return query.decode(self.scope["query_string"])

    async def decode(self, body: Body[T]) -> T:
        """Read and decode the body. Raises what `read` and `Body.decode` raise."""
        raw = await self.read()
        if raw or not body.optional:
            check_media_type(self.headers.get(b"content-type"), body.media_types)
        if len(raw) < _LARGE_BODY:
            return body.decode(raw)
        async with self.services.gate.turn:
            return body.decode(raw)

    async def read(self) -> bytes:
        """Return the whole body.

        Raises:
            UnsupportedMediaType: the body is compressed.
            PayloadTooLarge: over `body_max`; the connection will be closed.
            BodyTimeout: it stalled.
        """
        self._check_envelope()
        exchange: Exchange | None = self.scope["extensions"].get(EXCHANGE)
        if exchange is not None and (whole := exchange.body()) is not None:
            if len(whole) > self.body_max:
                raise self._too_large()
            return whole
        parts: list[bytes] = []
        size = 0
        receive = self._receive
        try:
            async with asyncio.timeout(self.stall) as patience:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part: bytes = message["body"]
                    more = message["more_body"]
                    size += len(part)
                    if size > self.body_max:
                        raise self._too_large()
                    if not more:
                        return b"".join((*parts, part)) if parts else part
                    parts.append(part)
                    patience.reschedule(asyncio.get_running_loop().time() + self.stall)
        except TimeoutError:
            raise BodyTimeout("the body stalled") from None

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises what `read` raises."""
        self._check_envelope()
        size = 0
        more = True
        while more:
            try:
                async with asyncio.timeout(self.stall):
                    message = await self._receive()
            except TimeoutError:
                raise BodyTimeout("the body stalled") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message["body"])
            if size > self.body_max:
                raise self._too_large()
            more = message["more_body"]
            if message["body"]:
                yield message["body"]

    def _check_envelope(self) -> None:
        headers = self.headers
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedMediaType("send the body without content encoding")
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self.body_max):
            raise self._too_large()

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body may have at most {self.body_max} bytes", limit=self.body_max)

    def if_match(self) -> str:
        """Return the version the caller's edit is based on.

        Raises:
            PreconditionRequired: there is none.
            VersionConflict: `*` or a list, which name no version.
        """
        value = self.headers.get(b"if-match")
        if value is None:
            raise PreconditionRequired("send If-Match with the ETag of the version this edit is based on")
        text = value.decode("latin-1").strip()
        if len(text) < 3 or text[0] != '"' or text[-1] != '"' or not text[1:-1].isalnum():
            raise VersionConflict("If-Match does not name the current version")
        return text[1:-1]

    async def until_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work, but stop it when the caller hangs up or the server stops. Only after the body has been read.

        Raises:
            ClientGone, Overloaded: so it was.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self.gone())
        ending = asyncio.ensure_future(self.services.ending.wait())
        try:
            await asyncio.wait((task, gone, ending), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise Overloaded("the server is stopping; ask again, another one may answer", retry_after=1)
        finally:
            gone.cancel()
            ending.cancel()
            if not task.done():
                task.cancel()

    async def gone(self) -> None:
        """Return when the caller has hung up."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def expired(self) -> bool:
        """Say whether the credential of this call has ended meanwhile."""
        return self.actor.expires_at is not None and self.services.clock.now() >= self.actor.expires_at


def check_media_type(value: bytes | None, allowed: tuple[str, ...]) -> None:
    """Raise UnsupportedMediaType unless the Content-Type is one of these, in UTF-8."""
    if value == b"application/json" and "application/json" in allowed:
        return
    media_type, _, parameters = (value or b"").decode("latin-1").lower().partition(";")
    charset = parameters.strip()
    if media_type.strip() not in allowed or (
        charset and charset.replace('"', "") not in ("charset=utf-8", "charset=utf8")
    ):
        raise UnsupportedMediaType("this route reads " + " or ".join(allowed), accepted=list(allowed))


def invalid(pointer: str, code: str, detail: str) -> Invalid:
    """Return the problem for one wrong member."""
    return Invalid(detail, errors=(FieldError(pointer=pointer, code=code, detail=detail),))
