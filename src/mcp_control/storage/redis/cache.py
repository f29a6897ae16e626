"""The cache that servers share. Without Redis it holds nothing, and counts on this server alone."""

from typing import Any

from redis.exceptions import ResponseError

from mcp_control.storage.ports import Cache
from mcp_control.storage.redis.link import RedisLink, RedisTrouble
from mcp_control.storage.redis.script import Script


class RedisCache:
    """A `Cache` on Redis that never fails for it.

    Args:
        link: see `RedisLink`.
        namespace: what all keys begin with.
        local: counts while Redis is away, so that limits go on to hold, on each server for itself.

    Attributes:
        missed: calls that Redis did not answer.
    """

    def __init__(self, link: RedisLink, namespace: str, local: Cache) -> None:
        self._link = link
        self._prefix = f"{namespace}:cache:"
        self._local = local
        self._add = Script("add")
        self.missed = 0

    async def get(self, key: str) -> bytes | None:
        """See `Cache.get`. None when Redis does not answer."""
        found: bytes | None = await self._try("GET", key)
        return found

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """See `Cache.set`. Without Redis nothing is kept, and what it holds comes back with it, for the rest of its time."""
        if ttl > 0:
            await self._try("SET", key, value, "PX", _millis(ttl))
        else:
            await self.delete(key)

    async def delete(self, key: str) -> None:
        """See `Cache.delete`. Without Redis nothing happens: what must not be seen again needs a version in its key."""
        await self._try("UNLINK", key)

    async def add(self, key: str, amount: int, ttl: float) -> int:
        """See `Cache.add`. Adding to a value that is no number raises ValueError."""
        try:
            total: int | None = await self._link.call(lambda: self._count(key, amount, ttl))
        except RedisTrouble:
            self.missed += 1
            return await self._local.add(key, amount, ttl)
        if total is None:
            raise ValueError("the value under this key is no counter")
        return total

    async def _count(self, key: str, amount: int, ttl: float) -> int | None:
        try:
            total: int = await self._add.run(self._link.client, [self._prefix + key], amount, _millis(ttl))
        except ResponseError as error:
            if "not an integer" in str(error):
                return None
            raise
        return total

    async def _try(self, command: str, key: str, *arguments: str | bytes | int) -> Any:
        async def work() -> Any:
            return await self._link.client.execute_command(command, self._prefix + key, *arguments)

        try:
            return await self._link.call(work)
        except RedisTrouble:
            self.missed += 1
            return None


def _millis(seconds: float) -> int:
    return max(1, round(seconds * 1000))
