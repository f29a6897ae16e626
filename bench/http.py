"""A lean HTTP/1.1 client, so that the load generator takes little of the machine: keep-alive, one request in flight per connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec
from typing_extensions import override

encode: Final = msgspec.json.Encoder().encode
_HEAD_END: Final = b"\r\n\r\n"


class Refused(Exception):
    """An answer that is not 2xx."""


class Connection(asyncio.Protocol):
    """One connection. `request` sends and waits; never call it twice at once."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._address = host, port
        self._fixed = f"host: {host}:{port}\r\nauthorization: Bearer {token}\r\n".encode()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._buffer = b""
        self._wanted = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the base class

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._wanted:
            end = self._buffer.find(_HEAD_END)
            if end < 0:
                return
            head = self._buffer[:end].lower()
            place = head.find(b"content-length:")
            length = 0 if place < 0 else int(head[place + 15 :].split(b"\r\n", 1)[0])
            self._wanted = end + 4 + length
        if len(self._buffer) >= self._wanted and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._buffer)

    async def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return the body of the answer. Raises Refused for one that is not 2xx, ConnectionResetError."""
        assert self._transport is not None
        if self._transport.is_closing():  # the server ends connections that were idle for seconds
            await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
        self._buffer, self._wanted = b"", 0
        self._answer = asyncio.get_running_loop().create_future()
        head = b"%s /api/v1%s HTTP/1.1\r\n%scontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
            method.encode(),
            path.encode(),
            self._fixed,
            len(body),
        )
        self._transport.write(head + body)
        answer = await self._answer
        if answer[9:10] != b"2":
            raise Refused(f"{method} {path}: {answer.decode(errors='replace')[:600]}")
        return answer[answer.find(_HEAD_END) + 4 : self._wanted]

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """Send and read JSON."""
        return msgspec.json.decode(await self.request(method, path, b"" if body is None else encode(body)))

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.close()


@asynccontextmanager
async def connections(url: str, token: str, count: int) -> AsyncIterator[list[Connection]]:
    """Open so many connections and close them at the end."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    opened: list[Connection] = []
    try:
        for _ in range(count):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(host, port, token), host, port
            )
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()
