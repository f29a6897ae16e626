"""The bus of one server process."""

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator

_BACKLOG = 1024


class _Subscription:
    """The messages of one subscriber; ends when the bus closes and what had arrived is read."""

    def __init__(self, backlog: int) -> None:
        self._messages: deque[bytes] = deque(maxlen=backlog)  # a full one loses its oldest
        self._arrived = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()

    def put(self, message: bytes) -> None:
        self._messages.append(message)
        self._arrived.set()

    def end(self) -> None:
        self._closed = True
        self._arrived.set()


class LocalBus:
    """A `Bus` in memory. A subscription that its reader dropped is forgotten."""

    def __init__(self, backlog: int = _BACKLOG) -> None:
        self._backlog = backlog
        self._topics: dict[str, weakref.WeakSet[_Subscription]] = {}
        self._closed = False

    async def publish(self, topic: str, message: bytes) -> None:
        """See `Bus.publish`."""
        for subscription in [*self._topics.get(topic, ())]:
            subscription.put(message)

    def subscribe(self, topic: str) -> AsyncIterator[bytes]:
        """See `Bus.subscribe`. On a closed bus the iterator ends at once."""
        subscription = _Subscription(self._backlog)
        if self._closed:
            subscription.end()
        else:
            self._topics.setdefault(topic, weakref.WeakSet()).add(subscription)
        return subscription

    async def close(self) -> None:
        """See `Bus.close`."""
        self._closed = True
        for subscriptions in self._topics.values():
            for subscription in [*subscriptions]:
                subscription.end()
        self._topics.clear()
