"""The queue of a server in a cluster: Redis while it can be trusted, else the store, which knows everything and is slower."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final, Literal

import structlog

from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Problem
from mcp_control.storage.ports import RANK_MAX, Depth, Queue, Queued
from mcp_control.storage.redis.link import RedisLink, RedisTrouble, stop
from mcp_control.storage.redis.queue import RedisQueue

_log = structlog.get_logger(__name__)
_TRUSTED_SECONDS: Final = 0.5
_FRESH_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = 0.1
# What stays far below the time limit of one call, however busy the machine is.
_PUSHED_AT_ONCE: Final = 200
_LOOKED_AT_ONCE: Final = 50


class ResilientQueue:
    """A `Queue` that never fails for Redis, only for the store (reliability, section 2, "Redis is a hint").

    What is pushed is in the store already, so a push that fails loses nothing but Redis's completeness: this server then takes from the
    store, tells Redis so as soon as it answers, and so all servers take from the store until the leader has pushed everything again.
    The same goes for a take whose answer did not come. An entry may turn up twice that way, or for a task that waits no more; who
    takes it finds out when it claims the task in the store.

    Attributes:
        doubts: how often something may have been lost in Redis.
        refills: how often this server filled Redis again.
        taken_from_redis: entries.
        taken_from_store: entries.
    """

    def __init__(self, redis: RedisQueue, store: Queue, link: RedisLink, clock: Clock) -> None:
        self._redis = redis
        self._store = store
        self._link = link
        self._clock = clock
        self._complete = False
        self._checked = float("-inf")
        self._unsure = False
        self._telling: asyncio.Task[None] | None = None
        self.doubts = 0
        self.refills = 0
        self.taken_from_redis = 0
        self.taken_from_store = 0

    @property
    def state(self) -> Literal["redis", "store"]:
        """Where takes go at the moment."""
        trusted = self._complete and not self._unsure and self._link.breaker.state == "closed"
        return "redis" if trusted else "store"

    @property
    def incomplete(self) -> bool:
        """Whether Redis may lack something that waits, as far as this server knows."""
        return self._unsure or not self._complete

    async def push(self, entries: Sequence[Queued]) -> None:
        """See `Queue.push`. Trouble with Redis is no error."""
        try:
            for first in range(0, len(entries), _PUSHED_AT_ONCE):
                some = entries[first : first + _PUSHED_AT_ONCE]
                await self._link.call(partial(self._redis.push, some))
        except RedisTrouble:
            self.doubt()

    async def take(self, lane: str, limit: int, ceiling: int = RANK_MAX) -> list[Queued]:
        """See `Queue.take`. Raises StoreUnavailable when neither answers."""
        entries: list[Queued] = []
        if await self._trusted(_TRUSTED_SECONDS):
            try:
                entries = await self._link.call(lambda: self._redis.take(lane, limit, ceiling))
            except RedisTrouble:
                self.doubt()
            else:
                self.taken_from_redis += len(entries)
                # A Redis that was emptied a moment ago would pass for an empty lane.
                if len(entries) >= limit or await self._trusted(_FRESH_SECONDS):
                    return entries
        try:
            more = await self._store.take(lane, limit - len(entries), ceiling)
        except Problem:
            if entries:
                return entries
            raise
        there = {entry.id for entry in entries}
        more = [entry for entry in more if entry.id not in there]
        self.taken_from_store += len(more)
        return [*entries, *more]

    async def remove(self, lane: str, ids: Sequence[str]) -> None:
        """See `Queue.remove`. What could not be removed is found to wait no more by whoever takes it."""
        try:
            await self._link.call(lambda: self._redis.remove(lane, ids))
        except RedisTrouble:
            await self._store.remove(lane, ids)

    async def ahead(self, lane: str, id: str) -> int | None:
        """See `Queue.ahead`."""
        if await self._trusted(_TRUSTED_SECONDS):
            try:
                return await self._link.call(lambda: self._redis.ahead(lane, id))
            except RedisTrouble:
                pass
        return await self._store.ahead(lane, id)

    async def before(self, lane: str, rank: int) -> int:
        """See `Queue.before`."""
        if await self._trusted(_TRUSTED_SECONDS):
            try:
                return await self._link.call(lambda: self._redis.before(lane, rank))
            except RedisTrouble:
                pass
        return await self._store.before(lane, rank)

    async def depths(self) -> list[Depth]:
        """See `Queue.depths`."""
        if await self._trusted(_TRUSTED_SECONDS):
            try:
                found: list[Depth] = []
                lanes = await self._link.call(self._redis.lanes)
                for first in range(0, len(lanes), _LOOKED_AT_ONCE):
                    some = lanes[first : first + _LOOKED_AT_ONCE]
                    found += await self._link.call(partial(self._redis.depths_of, some))
                return found
            except RedisTrouble:
                pass
        return await self._store.depths()

    async def clear(self) -> None:
        """See `Queue.clear`. Redis counts as incomplete afterwards."""
        try:
            await self._link.call(self._redis.clear)
        except RedisTrouble:
            self.doubt()
        self._complete = False

    def doubt(self) -> None:
        """Hear that Redis may lack something: until it is filled again, all servers take from the store."""
        self.doubts += 1
        self._unsure = True
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell(), name="redis-incomplete")

    async def needs_refill(self) -> bool:
        """Say whether Redis answers and is not complete. If so, the caller pushes everything that waits and then calls `refilled`."""
        try:
            if self._unsure or await self._link.call(self._redis.complete):
                return False
            await self._link.call(self._redis.begin_refill)
        except RedisTrouble:
            return False
        self._complete = False
        return True

    async def refilled(self) -> bool:
        """Hear that everything that waits was pushed; False: something was lost meanwhile, and it has to be done again."""
        try:
            done = not self._unsure and await self._link.call(self._redis.mark_complete)
        except RedisTrouble:
            return False
        if done:
            self.refills += 1
            self._checked = float("-inf")
            _log.info("redis-refilled")
        return done

    async def close(self) -> None:
        """Stop telling Redis what it lacks. The link is closed by who made it."""
        await stop(self._telling)

    async def _trusted(self, age: float) -> bool:
        """Say whether Redis answers and holds everything, as of at most so many seconds ago."""
        if self._unsure or self._link.breaker.state != "closed":
            return False
        now = self._clock.monotonic()
        if now - self._checked > age:
            try:
                self._complete = await self._link.call(self._redis.complete)
            except RedisTrouble:
                return False
            self._checked = now
        return self._complete and not self._unsure

    async def _tell(self) -> None:
        """Make Redis, and so every server, know that something may be missing."""
        while self._unsure:
            await self._link.available()
            heard = self.doubts
            try:
                await self._link.call(self._redis.mark_incomplete)
            except RedisTrouble:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._complete = False
            self._unsure = self.doubts != heard
