"""The queue that servers share: per lane a sorted set of ids by rank."""

import secrets
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from redis.asyncio import RedisCluster

from mcp_control.storage.ports import RANK_MAX, Depth, Queued
from mcp_control.storage.redis.connection import RedisClient
from mcp_control.storage.redis.script import Script

_AT_ONCE: Final = 1000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[str]).decode


class RedisQueue:
    """A `Queue` on Redis. It raises what redis-py raises; `ResilientQueue` is what goes on without it.

    An entry takes about 130 bytes in Redis. Beside the entries it keeps the names of the lanes, and a mark that says that everything
    that waits is in here. The mark names the Redis processes it was made on: it is void when one of them was started anew or
    another has taken its place, so that neither an empty Redis nor one that fell back to older data passes for a complete one.

    Args:
        client: see `connect`.
        namespace: what all keys begin with.
    """

    def __init__(self, client: RedisClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._lanes = f"{namespace}:ranked"
        self._mark = f"{{{namespace}:queue}}:ranked"
        self._refill = f"{{{namespace}:queue}}:refill"
        self._token = ""
        self._push, self._take = Script("push"), Script("take")
        self._depth, self._complete = Script("depth"), Script("complete")

    async def push(self, entries: Sequence[Queued]) -> None:
        """See `Queue.push`. One round trip for up to a thousand entries."""
        for first in range(0, len(entries), _AT_ONCE):
            await self._push_some(entries[first : first + _AT_ONCE])

    async def _push_some(self, entries: Sequence[Queued]) -> None:
        lanes: dict[str, dict[str, Queued]] = {}
        for entry in entries:
            lanes.setdefault(entry.lane, {})[entry.id] = entry
        calls = [
            ((self._line(lane),), (_encode([part for entry in line.values() for part in (entry.rank, entry.id)]),))
            for lane, line in lanes.items()
        ]
        # The names after the entries: `depths`, which forgets the names of empty lanes and looks again, cannot miss one so.
        await self._push.run_all(self._client, calls, ("SADD", self._lanes, *lanes))

    async def take(self, lane: str, limit: int, ceiling: int = RANK_MAX) -> list[Queued]:
        """See `Queue.take`. One round trip. When its answer is lost, what it took is lost to the queue."""
        if limit <= 0:
            return []
        answer = await self._take.run(self._client, (self._line(lane),), limit, ceiling)
        if not answer:
            return []
        found = _decode(answer)
        return [Queued(lane, member, _rank(score)) for member, score in zip(found[::2], found[1::2], strict=True)]

    async def remove(self, lane: str, ids: Sequence[str]) -> None:
        """See `Queue.remove`."""
        for first in range(0, len(ids), _AT_ONCE):
            await self._client.execute_command("ZREM", self._line(lane), *ids[first : first + _AT_ONCE])

    async def ahead(self, lane: str, id: str) -> int | None:
        """See `Queue.ahead`. Does not scan."""
        answer: int | None = await self._client.execute_command("ZRANK", self._line(lane), id)
        return answer

    async def before(self, lane: str, rank: int) -> int:
        """See `Queue.before`. Does not scan."""
        answer: int = await self._client.execute_command("ZCOUNT", self._line(lane), "-inf", f"({rank}")
        return answer

    async def depths(self) -> list[Depth]:
        """See `Queue.depths`. The cost is that of the lanes, whatever waits in them."""
        return await self.depths_of(await self.lanes())

    async def lanes(self) -> list[str]:
        """Return the lanes there are, some of which may have become empty."""
        return sorted(name.decode() for name in await self._client.execute_command("SMEMBERS", self._lanes))

    async def depths_of(self, lanes: Sequence[str]) -> list[Depth]:
        """Return those of these lanes that are not empty, and forget the others."""
        found = await self._look(lanes)
        empty = [lane for lane in lanes if lane not in found]
        if empty:
            await self._client.execute_command("SREM", self._lanes, *empty)
            # Somebody may have pushed since; that one's name was there already and has just gone.
            back = await self._look(empty)
            if back:
                await self._client.execute_command("SADD", self._lanes, *back)
                found |= back
        return [*found.values()]

    async def clear(self) -> None:
        """See `Queue.clear`."""
        lanes = await self.lanes()
        for lane in lanes:
            await self._client.execute_command("UNLINK", self._line(lane))
        await self._client.execute_command("DEL", self._mark, self._refill)
        await self._client.execute_command("DEL", self._lanes)

    async def complete(self) -> bool:
        """Say whether everything that waits is in here, as far as Redis can know."""
        mark: bytes | None = await self._client.execute_command("GET", self._mark)
        return mark is not None and mark.decode() == await self._processes()

    async def mark_incomplete(self) -> None:
        """Say that something may be missing. A refill under way no longer counts."""
        await self._client.execute_command("DEL", self._mark, self._refill)

    async def begin_refill(self) -> None:
        """Begin to push everything that waits. Of several refills the one begun last counts."""
        self._token = secrets.token_hex(8)
        await self._client.execute_command("SET", self._refill, self._token)

    async def mark_complete(self) -> bool:
        """Say that everything was pushed since `begin_refill`; False: something was lost meanwhile, or another refill was begun."""
        processes = await self._processes()
        answer = await self._complete.run(self._client, [self._mark, self._refill], self._token, processes)
        return bool(answer)

    async def _look(self, lanes: Sequence[str]) -> dict[str, Depth]:
        answers = await self._depth.run_all(self._client, [((self._line(lane),), ()) for lane in lanes])
        return {lane: _depth(lane, answer) for lane, answer in zip(lanes, answers, strict=True) if answer is not None}

    async def _processes(self) -> str:
        """Return the run ids of the Redis process, or of all masters of the cluster."""
        if isinstance(self._client, RedisCluster):
            answers: dict[str, dict[str, Any]] = await self._client.info("server", target_nodes=RedisCluster.PRIMARIES)
            if "run_id" not in answers:
                return ",".join(sorted(str(answer["run_id"]) for answer in answers.values()))
            return str(answers["run_id"])
        return str((await self._client.info("server"))["run_id"])

    def _line(self, lane: str) -> str:
        """Return the key of a lane. What stands in braces decides the hash slot."""
        return f"{{{self._namespace}:lane:{lane}}}:ranked"


def _rank(score: str) -> int:
    return int(float(score))  # exact: see RANK_MAX


def _depth(lane: str, answer: list[Any]) -> Depth:
    waiting, first, score = answer
    return Depth(lane, waiting, _rank(score.decode()), first.decode())
