"""Links to real Redis servers that close themselves with the event loop they were made in, and a wait for a condition."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from mcp_control.kernel.clock import SystemClock
from mcp_control.storage.redis.connection import connect
from mcp_control.storage.redis.link import RedisLink, breaker

_open: list[AsyncIterator[None]] = []


async def linked(url: str, namespace: str, *, seconds: float = 5.0) -> RedisLink:
    """Return a link with so much patience; the product's is 0.05 s."""
    link = RedisLink(connect(url), namespace, breaker(SystemClock()), seconds=seconds)
    closing = _closing(link)
    await anext(closing)
    _open.append(closing)
    return link


async def _closing(link: RedisLink) -> AsyncIterator[None]:
    """A generator left open: the event loop closes it, and so the link, before it closes itself."""
    try:
        yield
    finally:
        await link.close()


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 15.0) -> float:
    """Wait until a condition holds and return how long that took. Raises TimeoutError that names `what`."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await condition():
        if loop.time() - began > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.01)
    return loop.time() - began
