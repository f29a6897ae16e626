"""What the HTTP and WebSocket servers do not do by themselves: limits on headers, refusals as problem documents, closing at once.

Thin subclasses of uvicorn's protocols. They use `on_message_begin`, `on_headers_complete`, `data_received` and `send_400_response`,
which have been stable for years; the raw-socket tests show it if a new version moves them.
"""

import asyncio
from typing import Any, Final

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from mcp_control.api.problem import MEDIA_TYPE, problem_bytes
from mcp_control.kernel.errors import Problem

EXCHANGE: Final = "mcp-control.exchange"
HEADERS_MAX: Final = 16 * 1024
HEADERS_SECONDS: Final = 10.0
_LINGER: Final = 5.0


class BadRequest(Problem):
    """The request is not the HTTP that RFC 9112 allows, e.g. Content-Length together with Transfer-Encoding."""

    code, status, title = "malformed-request", 400, "Malformed request"


class HeadersTooLarge(Problem):
    """Request line and headers are over 16 KiB."""

    code, status, title = "headers-too-large", 431, "Request headers too large"


class HeadersTimeout(Problem):
    """Request line and headers did not arrive in time."""

    code, status, title, retryable = "headers-timeout", 408, "Request headers too slow", True


class Exchange:
    """A request and its answer in one step each, where all of the body is there and the peer takes all of the answer.

    An extension of the scope: the same as ASGI's `receive` and `send`, for a third of their time.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def body(self) -> bytes | None:
        """Take the whole body; None where it has not all come yet, or was taken."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or not cycle.message_event.is_set():
            return None
        cycle.message_event.clear()
        cycle.flow.resume_reading()
        body = bytes(cycle.body)
        cycle.body = bytearray()
        return body

    def answer(self, status: int, head: bytes, body: bytes) -> bool:
        """Write a whole answer; False where the peer is behind with reading or has gone.

        Args:
            head: header lines, each with its end, that name the length of the body.
        """
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
            return False
        if not cycle.keep_alive or b"connection: " in head:  # what ends the connection is left to `send`
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        parts = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (head, b"\r\n") if cycle.scope["method"] == "HEAD" else (head, b"\r\n", body)
        cycle.transport.write(b"".join(parts))
        cycle.message_event.set()
        cycle.on_response()
        return True


class ControlHttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with at most 16 KiB of request line and headers, complete or not, which arrive within 10 s."""

    def __init__(
        self, *args: Any, headers_max: int = HEADERS_MAX, headers_seconds: float = HEADERS_SECONDS, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._headers_max = headers_max
        self._headers_seconds = headers_seconds
        self._patience: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._arriving = 0
        self._refusal: Problem | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        """Expect the first head."""
        super().connection_made(transport)
        self._expect_head()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._head_came()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._patience = self.loop.call_later(self._headers_seconds, self._too_slow)

    def _head_came(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        self._patience = None
        if self.transport.is_closing():
            return
        if self._in_head:
            self._refuse(HeadersTimeout(f"the headers took longer than {self._headers_seconds:g} s"))
        else:
            self.transport.close()

    @override
    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the head has grown beyond its limit without an end."""
        if self._refusal is not None:
            return
        self._arriving = len(data)
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            if self._patience is None:
                self._expect_head()
            self._head_bytes += len(data)
            if self._head_bytes > self._headers_max:
                self._refuse(HeadersTooLarge(f"at most {self._headers_max} bytes of headers"))

    @override
    def on_message_begin(self) -> None:
        """A request begins: count its head from here."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        """The head is there: let it through when it is within its limit."""
        self._in_head = False
        self._head_came()
        if self._head_bytes + self._arriving > self._headers_max:  # all that came bounds the head, and is seldom more
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self._headers_max:
                self._refusal = HeadersTooLarge(f"at most {self._headers_max} bytes of headers")
                raise ValueError("headers too large")  # the parser reports it, and the refusal below answers
        super().on_headers_complete()
        if self.cycle is not None:  # an upgrade has none
            self.scope["extensions"] = {EXCHANGE: Exchange(self.cycle)}  # type: ignore[dict-item]  # ours is not in the typed list

    @override
    def send_400_response(self, msg: str) -> None:
        """Answer what could not be parsed."""
        self._refuse(self._refusal or BadRequest("the request is not valid HTTP/1.1"))

    def _refuse(self, problem: Problem) -> None:
        self._refusal = problem
        self._in_head = False
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever its annotation says
        if cycle is not None and not cycle.response_complete:
            # An earlier request of this connection is being answered; its answer must not be mixed with this one.
            self.transport.close()
            return
        body = problem_bytes(problem, "unparsed")
        head = [STATUS_LINE[problem.status]]
        for name, value in self.server_state.default_headers:
            head += [name, b": ", value, b"\r\n"]
        head += [
            b"content-type: ",
            MEDIA_TYPE,
            b"\r\ncontent-length: %d\r\nconnection: close\r\nx-content-type-options: nosniff\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join((*head, body)))
        self.transport.close()


def wire_text(payload: bytes) -> bytes:
    """Return a text message as a server sends it, the same for every peer (RFC 6455, section 5.2: not masked)."""
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


class ControlSocketProtocol(WebSocketsSansIOProtocol):
    """WebSocket whose `send` waits for a peer that reads nothing, and that offers two ways that do not: `close_now` and `write_now`."""

    @override
    def handle_connect(self, event: Any) -> None:
        """Hand the application the ways to close and to write at once, as an extension of its scope."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions: dict[str, dict[str, object]] = self.scope["extensions"]  # type: ignore[assignment]  # ours is not in the typed list
            extensions["mcp-control.at-once"] = {"close": self.close_now, "write": self.write_now}

    def write_now(self, wire: bytes) -> bool:
        """Write what is framed already (`wire_text`); False when the peer is behind with reading or the socket is about to close."""
        if self.close_sent or not self.writable.is_set() or self.transport.is_closing():
            return False
        self.transport.write(wire)
        return True

    def close_now(self, code: int, reason: str) -> None:
        """Put a close frame behind what is buffered, and drop the connection if that is not taken within 5 s."""
        if self.close_sent or self.transport.is_closing():
            return
        self.stop_keepalive()
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.writable.set()
        self.transport.close()
        asyncio.get_running_loop().call_later(_LINGER, self.transport.abort)
