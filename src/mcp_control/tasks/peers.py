"""What the servers of a cluster tell each other in passing, over the bus: hints that save a wait, never the truth.

Each of them may be lost. Lanes are looked at from time to time, cancellations travel with heartbeats, and a session that was taken over
by another server ends with its next frame.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import msgspec
import structlog

from mcp_control.kernel.errors import Problem
from mcp_control.storage.ports import Bus, Depth

_log = structlog.get_logger(__name__)
_TOPIC: Final = "peers"


class Hint(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message.

    Attributes:
        sender: id of the server that sends it.
        lanes: lanes that got entries.
        cancel: ids of tasks that somebody asked to cancel.
        opened: ids of instances whose session the sender has now, or has ended.
    """

    sender: str
    lanes: list[Depth] = []
    cancel: list[str] = []
    opened: list[str] = []


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Hint).decode


class Peers:
    """Sends hints in natural batches and hears those of the others. Without a bus, for a single server, it does nothing.

    Args:
        bus: None on a single server.
        me: id of this server.
    """

    def __init__(self, bus: Bus | None, me: str = "") -> None:
        self._bus = bus
        self._me = me
        self._lanes: dict[str, Depth] = {}
        self._cancel: dict[str, None] = {}
        self._opened: dict[str, None] = {}
        self._sending: asyncio.Task[None] | None = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to tell."""
        return self._bus is None

    def lanes(self, depths: Iterable[Depth]) -> None:
        """Tell that lanes got entries."""
        if self._bus is None:
            return
        for depth in depths:
            known = self._lanes.get(depth.lane)
            self._lanes[depth.lane] = depth if known is None or depth.rank < known.rank else known
        self._send()

    def cancel(self, ids: Sequence[str]) -> None:
        """Tell that somebody asked to cancel tasks that agents of other servers may hold."""
        if self._bus is not None and ids:
            self._cancel.update(dict.fromkeys(ids))
            self._send()

    def opened(self, instance_id: str) -> None:
        """Tell that an instance has its session here now, or that its lease has ended."""
        if self._bus is not None:
            self._opened[instance_id] = None
            self._send()

    def _send(self) -> None:
        if self._sending is None:
            self._sending = asyncio.create_task(self._publish())

    async def _publish(self) -> None:
        try:
            while self._bus is not None and (self._lanes or self._cancel or self._opened):
                hint = Hint(self._me, list(self._lanes.values()), list(self._cancel), list(self._opened))
                self._lanes, self._cancel, self._opened = {}, {}, {}
                await self._bus.publish(_TOPIC, _encode(hint))
        finally:
            self._sending = None

    async def run(self, heard: Callable[[Hint], Awaitable[None]]) -> None:
        """Pass on what the others say, until cancelled or the bus closes."""
        if self._bus is None:
            return
        async for message in self._bus.subscribe(_TOPIC):
            try:
                hint = _decode(message)
                if hint.sender != self._me:
                    await heard(hint)
            except (msgspec.MsgspecError, Problem) as error:
                _log.debug("cluster.hint_ignored", error=repr(error))
