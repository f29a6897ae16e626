"""What every `Bus` promises, as tests.

An adapter's test module provides the fixture `bus_factory`, a callable that returns a fresh bus (awaitable), and imports all of this:
`from mcp_control.testing.bus_conformance import *`.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mcp_control.storage.ports import Bus

BusFactory = Callable[[], Awaitable[Bus]]


async def test_every_subscriber_of_the_topic_hears_a_message(bus_factory: BusFactory) -> None:
    """A message reaches all subscribers of its topic, this server's own included, and no others."""
    bus = await bus_factory()
    first, second, other = bus.subscribe("wake"), bus.subscribe("wake"), bus.subscribe("else")
    await bus.publish("wake", b"one")
    await bus.publish("else", b"two")
    assert [await _next(first), await _next(second), await _next(other)] == [b"one", b"one", b"two"]
    await bus.close()


async def test_messages_keep_their_order(bus_factory: BusFactory) -> None:
    """A subscriber reads messages in the order they were published."""
    bus = await bus_factory()
    reader = bus.subscribe("wake")
    for number in range(50):
        await bus.publish("wake", b"%d" % number)
    assert [await _next(reader) for _ in range(50)] == [b"%d" % number for number in range(50)]
    await bus.close()


async def test_a_subscription_begins_when_it_is_made(bus_factory: BusFactory) -> None:
    """Nothing published before is heard; what is published before the first read is."""
    bus = await bus_factory()
    await bus.publish("wake", b"before")
    reader = bus.subscribe("wake")
    await bus.publish("wake", b"after")
    assert await _next(reader) == b"after"
    await bus.close()


async def test_a_slow_subscriber_loses_the_oldest_and_stops_nobody(bus_factory: BusFactory) -> None:
    """A backlog is bounded: publishing never waits for a reader, and a slow reader still gets the newest message."""
    bus = await bus_factory()
    slow = bus.subscribe("wake")
    for number in range(20_000):
        await bus.publish("wake", b"%d" % number)
    heard = [await _next(slow)]
    while heard[-1] != b"19999":
        heard.append(await _next(slow))
    assert len(heard) < 20_000
    assert heard == sorted(heard, key=int)
    await bus.close()


async def test_closing_ends_every_subscription(bus_factory: BusFactory) -> None:
    """Readers that wait are released when the bus closes."""
    bus = await bus_factory()
    waiting = asyncio.ensure_future(anext(bus.subscribe("wake")))
    await asyncio.sleep(0)
    await bus.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(_awaited(waiting), 5)


async def _awaited(future: "asyncio.Future[bytes]") -> bytes:
    try:
        return await future
    except StopAsyncIteration as end:
        raise StopAsyncIteration from end


async def _next(reader: object) -> bytes:
    return await asyncio.wait_for(anext(reader), 5)  # type: ignore[call-overload]
