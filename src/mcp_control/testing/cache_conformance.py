"""What every `Cache` promises, as tests.

An adapter's test module provides the fixture `cache_factory`, a callable that returns a fresh cache and an awaitable function that lets
a number of seconds pass for it (awaitable), and imports all of this: `from mcp_control.testing.cache_conformance import *`.
"""

from collections.abc import Awaitable, Callable

from mcp_control.storage.ports import Cache

Pass = Callable[[float], Awaitable[None]]
CacheFactory = Callable[[], Awaitable[tuple[Cache, Pass]]]


async def test_a_value_lives_until_its_time_is_over(cache_factory: CacheFactory) -> None:
    """A value is there before its time to live is over and gone after it."""
    cache, wait = await cache_factory()
    await cache.set("k", b"v", 2)
    await wait(1)
    assert await cache.get("k") == b"v"
    await wait(1.5)
    assert await cache.get("k") is None


async def test_setting_again_replaces_value_and_time(cache_factory: CacheFactory) -> None:
    """The last set decides the value and how long it lives."""
    cache, wait = await cache_factory()
    await cache.set("k", b"old", 1)
    await cache.set("k", b"new", 5)
    await wait(2)
    assert await cache.get("k") == b"new"


async def test_deleting_forgets(cache_factory: CacheFactory) -> None:
    """A deleted value is gone; deleting what is absent does nothing."""
    cache, _ = await cache_factory()
    await cache.set("k", b"v", 10)
    await cache.delete("k")
    await cache.delete("absent")
    assert await cache.get("k") is None


async def test_a_counter_lives_from_its_first_addition(cache_factory: CacheFactory) -> None:
    """Additions sum up and do not prolong the counter's life; after it the count begins anew."""
    cache, wait = await cache_factory()
    assert await cache.add("hits", 1, 2) == 1
    await wait(1.5)
    assert await cache.add("hits", 2, 2) == 3
    await wait(1)
    assert await cache.add("hits", 5, 2) == 5


async def test_keys_do_not_touch_each_other(cache_factory: CacheFactory) -> None:
    """Values and counters under other keys stay as they are."""
    cache, _ = await cache_factory()
    await cache.set("a", b"1", 10)
    await cache.add("b", 7, 10)
    await cache.delete("c")
    assert await cache.get("a") == b"1"
    assert await cache.add("b", 0, 10) == 7
