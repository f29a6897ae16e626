"""What a socket still has to send: gathered while the last frame was on its way, bounded, merged where frames can be merged."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from mcp_control.api.call import Send
from mcp_control.tasks.wire import Tasks, encode_frame

BYTES_MAX: Final = 1 << 20
FRAME_BYTES: Final = 256 << 10


class Outbox:
    """Sends frames in order, from one task.

    A peer that lets more gather than `limit`, or takes nothing for `stall` seconds, is cut off with 1013. What it missed is told by the
    truth it reads when it comes back: its leases, or the events after its cursor.

    Args:
        send: of the ASGI socket; it waits while the peer does not read.
        close_now: closes without waiting for the peer.
        limit: encoded bytes that may wait.
        stall: seconds a peer may take nothing.
    """

    __slots__ = (
        "_bytes",
        "_close_now",
        "_closing",
        "_encoded",
        "_idle",
        "_limit",
        "_merged",
        "_merging",
        "_send",
        "_sending",
        "_stall",
        "_task",
        "_wake",
        "closed",
    )

    def __init__(
        self, send: Send, close_now: Callable[[int, str], None], limit: int = BYTES_MAX, stall: float = 30.0
    ) -> None:
        self._send = send
        self._close_now = close_now
        self._limit = limit
        self._stall = stall
        self._encoded: list[bytes] = []
        self._merging: Tasks | None = None
        self._merged = 0
        self._bytes = 0
        self._sending = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        self._task: asyncio.Task[None] | None = None
        self.closed = False

    def start(self) -> None:
        """Begin sending."""
        self._task = asyncio.create_task(self._run())

    def put(self, frames: Sequence[object]) -> None:
        """Put frames on their way; bytes are a frame that is encoded. Never waits, never fails; frames for a closed socket are dropped."""
        if self.closed:
            return
        for frame in frames:
            if isinstance(frame, bytes):
                self._flush()
                self._add(frame)
            elif isinstance(frame, Tasks):
                self._merge(frame)
            else:
                self._flush()
                self._add(encode_frame(frame))
        if self._sending and self._bytes + self._merged > self._limit:
            self._shut(1013, "too slow")
        self._idle.clear()
        self._wake.set()

    def _merge(self, frame: Tasks) -> None:
        if self._merging is None:
            self._merging = Tasks(tasks=list(frame.tasks))
        else:
            self._merging.tasks.extend(frame.tasks)
        # Not encoded yet, but it counts; payloads dominate.
        self._merged += sum(len(memoryview(task.payload)) + 300 for task in frame.tasks)
        if self._merged > FRAME_BYTES:
            self._flush()

    @property
    def idle(self) -> bool:
        """Whether the socket is open and all was handed to the network, so that what is written past the outbox comes in order."""
        return self._idle.is_set() and self._closing is None and not self.closed

    async def drained(self) -> None:
        """Return when everything was handed to the network, or the socket is closed."""
        if not self.closed:
            await self._idle.wait()

    def close(self, code: int, reason: str) -> None:
        """Close after what waits has been sent."""
        if self._closing is None:
            self._closing = (code, reason)
            self._wake.set()

    async def finish(self, code: int, reason: str) -> None:
        """Close after what waits has been sent, and return when that is done or the peer does not take it."""
        self.close(code, reason)
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=self._stall)

    def _flush(self) -> None:
        if self._merging is not None:
            self._add(encode_frame(self._merging))
            self._merging = None
            self._merged = 0

    def _add(self, frame: bytes) -> None:
        self._encoded.append(frame)
        self._bytes += len(frame)

    def _shut(self, code: int, reason: str) -> None:
        self.closed = True
        self._encoded.clear()
        self._merging = None
        self._bytes = self._merged = 0
        self._idle.set()
        self._wake.set()
        self._close_now(code, reason)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self.closed:
                await self._wake.wait()
                self._wake.clear()
                self._flush()
                while self._encoded and not self.closed:
                    patience = loop.call_later(self._stall, self._shut, 1013, "too slow")
                    try:
                        await self._deliver()
                    finally:
                        patience.cancel()
                    self._flush()
                self._idle.set()
                if self._closing is not None and not self.closed:
                    self.closed = True
                    await self._send({"type": "websocket.close", "code": self._closing[0], "reason": self._closing[1]})
        except OSError:  # the server's way of saying that the peer is gone (its class derives from OSError)
            self.closed = True
        finally:
            self._idle.set()

    async def _deliver(self) -> None:
        batch, self._encoded = self._encoded, []
        self._bytes = 0
        self._sending = True
        for frame in batch:
            await self._send({"type": "websocket.send", "text": frame.decode()})
            if self.closed:
                break
        self._sending = False

    async def stop(self) -> None:
        """Stop sending; the socket is gone."""
        self.closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def close_extension(scope: Any) -> Callable[[int, str], None]:
    """Return the way to close a socket at once that `ControlSocketProtocol` offers."""
    close: Callable[[int, str], None] = scope["extensions"]["mcp-control.at-once"]["close"]
    return close


def write_extension(scope: Any) -> Callable[[bytes], bool]:
    """Return `write_now` of `ControlSocketProtocol`."""
    write: Callable[[bytes], bool] = scope["extensions"]["mcp-control.at-once"]["write"]
    return write
