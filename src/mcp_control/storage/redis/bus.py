"""The bus that servers share: Redis publish and subscribe around the bus of this server."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

from mcp_control.storage.ports import Bus
from mcp_control.storage.redis.connection import FAILURES
from mcp_control.storage.redis.link import RedisLink, RedisTrouble, stop

_QUIET_SECONDS: Final = 2.0
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_ORIGIN: Final = 8


class RedisBus:
    """A `Bus` over all servers of a namespace.

    Messages of this server reach its own subscribers directly, whatever Redis does. Those of others come on one connection that is
    made again when it breaks or falls silent; what was said meanwhile is not heard, as with every best effort.

    Args:
        link: publishes; a subscription has its own connection and is not subject to the breaker.
        namespace: what all channels begin with.
        local: the bus of this server; its backlog is the bound.

    Attributes:
        dropped: messages that did not leave this server.
        connects: how often a connection for the messages of others was made.
    """

    def __init__(self, link: RedisLink, namespace: str, local: Bus) -> None:
        self._link = link
        self._prefix = f"{namespace}:bus:"
        self._local = local
        self._origin = secrets.token_bytes(_ORIGIN)
        self._listening: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._closed = False
        self.dropped = 0
        self.connects = 0

    async def publish(self, topic: str, message: bytes) -> None:
        """See `Bus.publish`. Never fails and takes no longer than one call of the link."""
        await self._local.publish(topic, message)
        try:
            await self._link.call(lambda: self._send(topic, self._origin + message))
        except RedisTrouble:
            self.dropped += 1

    async def _send(self, topic: str, frame: bytes) -> None:
        await self._link.client.execute_command("PUBLISH", self._prefix + topic, frame)

    def subscribe(self, topic: str) -> AsyncIterator[bytes]:
        """See `Bus.subscribe`. Other servers are heard from a moment later on, see `connected`."""
        if self._listening is None and not self._closed:
            self._listening = asyncio.create_task(self._listen(), name="redis-bus")
        return self._local.subscribe(topic)

    async def connected(self) -> None:
        """Wait until messages of other servers are heard."""
        await self._heard.wait()

    async def close(self) -> None:
        """See `Bus.close`."""
        self._closed = True
        await stop(self._listening)
        await self._local.close()

    async def _listen(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            subscription: Any = self._link.client.pubsub()
            connects = self.connects
            try:
                async with asyncio.timeout(_QUIET_SECONDS):
                    await subscription.psubscribe(f"{_literal(self._prefix)}*")
                await self._hear(subscription)
            except FAILURES:
                pass
            finally:
                self._heard.clear()
                with suppress(*FAILURES):
                    await subscription.aclose()
            pause = _FIRST_PAUSE if self.connects > connects else min(pause * 2, _LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  spreads servers, is no secret

    async def _hear(self, subscription: Any) -> None:
        """Pass on what comes until the connection breaks or does not answer a ping. Raises what redis-py raises, and TimeoutError."""
        asked = False
        while True:
            message = await subscription.get_message(timeout=_QUIET_SECONDS)
            if message is None:
                if asked:
                    raise TimeoutError
                await subscription.ping()
            elif message["type"] == "psubscribe":
                self.connects += 1
                self._heard.set()
            elif message["type"] == "pmessage" and not message["data"].startswith(self._origin):
                topic = message["channel"].decode().removeprefix(self._prefix)
                await self._local.publish(topic, message["data"][_ORIGIN:])
            asked = message is None


def _literal(text: str) -> str:
    """Escape what means something in a pattern."""
    return "".join(f"\\{letter}" if letter in "*?[]\\" else letter for letter in text)
