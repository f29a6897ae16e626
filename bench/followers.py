"""Follows events over many WebSockets: `python -m bench.followers URL COUNT`, the token on the first line of standard input.

Writes `ready` when all are subscribed. At the next line it writes what it got, as JSON: events by socket, and how late they were.
A client of its own, since what it takes of the machine the servers do not have: frames that many sockets get alike are read once.
"""

import asyncio
import base64
import json
import os
import sys
import time
from datetime import datetime
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec
import uvloop
from typing_extensions import override

_TEXT: Final = 0x81
_CLOSE: Final = 0x88
_KNOWN: Final = 256


class _Event(msgspec.Struct):
    time: datetime


class _Frame(msgspec.Struct):
    op: str
    event: _Event | None = None
    events: list[_Event] = []


_decode: Final = msgspec.json.Decoder(_Frame).decode


class Tally:
    """What all sockets got."""

    def __init__(self, count: int) -> None:
        self.all_subscribed = asyncio.Event()
        self._missing = count
        self.reread = 0
        self.lost = 0
        self.late: list[float] = []
        self._known: dict[bytes, list[float]] = {}

    def frame(self, data: bytes) -> int:
        """Take in a frame and return how many events it has."""
        moments = self._known.get(data)
        if moments is None:
            frame = _decode(data)
            if frame.op == "subscribed":
                self._missing -= 1
                if self._missing == 0:
                    self.all_subscribed.set()
                return 0
            if frame.op == "reread":
                self.reread += 1
            events = frame.events if frame.event is None else [frame.event]
            moments = [event.time.timestamp() for event in events]
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[data] = moments
        now = time.time()
        self.late += [now - moment for moment in moments]
        return len(moments)


class _Follower(asyncio.Protocol):
    def __init__(self, tally: Tally, host: str, token: str) -> None:
        self._tally = tally
        self._head = (
            f"GET /ws HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            f"sec-websocket-version: 13\r\nsec-websocket-key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
        ).encode()
        self._buffer = b""
        self._open = False
        self._transport: asyncio.Transport | None = None
        self.events = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._head)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.lost += 1

    @override
    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        at = 0
        if not self._open:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return
            if b" 101 " not in data[:32]:
                raise RuntimeError(data[:300].decode(errors="replace"))
            self._open = True
            at = end + 4
            self._send(b'{"op":"subscribe","id":"s","types":["task.queued"]}')
        size = len(data)
        while size - at >= 2:
            length, start = data[at + 1] & 0x7F, at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
            elif length == 127:
                length, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
            if start > size or start + length > size:
                break
            if data[at] == _TEXT:
                self.events += self._tally.frame(data[start : start + length])
            elif data[at] != _CLOSE:
                self._send(data[start : start + length], 0x8A)  # a ping
            at = start + length
        self._buffer = data[at:]

    def _send(self, payload: bytes, kind: int = _TEXT) -> None:
        assert self._transport is not None
        # Masked with zeros: the bytes stay what they are. All payloads here are short.
        self._transport.write(bytes((kind, 0x80 | len(payload), 0, 0, 0, 0)) + payload)


async def follow(url: str, count: int, token: str) -> dict[str, Any]:
    """Open the sockets, follow until the next line of standard input, and return what came."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    tally = Tally(count)
    loop = asyncio.get_running_loop()
    followers: list[_Follower] = []
    for _ in range(count):
        _, follower = await loop.create_connection(lambda: _Follower(tally, f"{host}:{port}", token), host, port)
        followers.append(follower)
    await tally.all_subscribed.wait()
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    late = sorted(tally.late)
    # A thousandth of them says enough of where they lie.
    return {
        "events": [follower.events for follower in followers],
        "late_ms": [round(each * 1000, 2) for each in late[:: max(1, len(late) // 10_000)]],
        "lost": tally.lost,
        "reread": tally.reread,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(follow(sys.argv[1], int(sys.argv[2]), sys.stdin.readline().strip()))))
