"""The queue as the store itself knows it: for servers whose Redis is away or empty, and for those that have none."""

import random
from collections.abc import Sequence
from typing import Final

from mcp_control.kernel.changes import Entity, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.storage.ports import LANE_END, RANK_MAX, Depth, Queued, Store, waiting_value

_AFTER: Final = chr(ord(LANE_END) + 1)
_SPARE: Final = 16
_AT_ONCE: Final = 500
_PAGES: Final = 4
_HELD_SECONDS: Final = 2.0
_COUNTED: Final = 1000


class StoreQueue:
    """A `Queue` over an index field of what waits (see `waiting_value`).

    The store is the queue, so nothing is pushed or removed: a task that is claimed has left it. `take` therefore only proposes; two
    servers may propose the same, and the store decides between them. Its cost does not depend on how many wait.

    Args:
        store: where the tasks are.
        clock: what was given out is not given out again for 2 s, in which it is normally claimed.
        kind: of the tasks.
        field: the index field.
        random: chooses among those whose ranks differ by at most `near`, so that servers rarely propose the same.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        kind: str = "task",
        field: str = "waiting",
        near: int = 0,
        random: random.Random | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._kind = kind
        self._field = field
        self._near = near
        self._random = random
        self._given: dict[str, float] = {}

    async def push(self, entries: Sequence[Queued]) -> None:
        """Have entries given out again at once, if their tasks still wait."""
        for entry in entries:
            self._given.pop(entry.id, None)

    async def take(self, lane: str, limit: int, ceiling: int = RANK_MAX) -> list[Queued]:
        """See `Queue.take`. Raises StoreUnavailable."""
        if limit <= 0:
            return []
        now = self._clock.monotonic()
        self._forget(now)
        found = await self._candidates(lane, limit, ceiling)
        # Another take of this server may have looked at the same time.
        chosen = self._choose([entry for entry in found if entry.id not in self._given], limit)
        self._given.update((entry.id, now) for entry in chosen)
        return chosen

    async def remove(self, lane: str, ids: Sequence[str]) -> None:
        """Nothing to do: a task that waits no more is not in the index."""

    async def ahead(self, lane: str, id: str) -> int | None:
        """See `Queue.ahead`; counts up to 1000."""
        (entity,) = await self._store.get(self._kind, [id])
        value = None if entity is None else entity.index.get(self._field)
        if not isinstance(value, str) or not value.startswith(lane + LANE_END):
            return None
        before = [Where(self._field, "ge", lane + LANE_END), Where(self._field, "lt", value)]
        beside = [Where(self._field, "eq", value), Where("id", "lt", id)]
        counts = [await self._store.count(self._kind, where, _COUNTED) for where in (before, beside)]
        return min(sum(counts), _COUNTED)

    async def before(self, lane: str, rank: int) -> int:
        """See `Queue.before`; counts up to 1000."""
        where = [Where(self._field, "ge", lane + LANE_END), Where(self._field, "lt", waiting_value(lane, rank))]
        return await self._store.count(self._kind, where, _COUNTED)

    async def depths(self) -> list[Depth]:
        """See `Queue.depths`. Counts up to 1000 in each lane."""
        found: list[Depth] = []
        beyond = ""
        while True:
            query = Query(where=[Where(self._field, "ge", beyond)], order=self._field, limit=1)
            first = await self._store.find(self._kind, query)
            if not first:
                return found
            head = self._queued(first[0])
            beyond = head.lane + _AFTER
            lane = [Where(self._field, "ge", head.lane + LANE_END), Where(self._field, "lt", beyond)]
            waiting = await self._store.count(self._kind, lane, _COUNTED)
            if waiting:  # the last may have been claimed in between
                found.append(Depth(head.lane, waiting, head.rank, head.id))

    async def clear(self) -> None:
        """Forget what was given out."""
        self._given.clear()

    async def _candidates(self, lane: str, limit: int, ceiling: int) -> list[Queued]:
        """Return enough of the first that were not given out lately. A few pages are looked at, whatever is behind them."""
        wanted = min(2 * limit + _SPARE, _AT_ONCE)
        where = [
            Where(self._field, "ge", lane + LANE_END),
            Where(self._field, "le", waiting_value(lane, ceiling)),
        ]
        found: list[Queued] = []
        position: tuple[str, str] | None = None
        for _ in range(_PAGES):
            page = await self._store.find(
                self._kind, Query(where=where, order=self._field, after=position, limit=wanted)
            )
            found += [self._queued(entity) for entity in page if entity.id not in self._given]
            if len(page) < wanted or len(found) >= limit:
                break
            position = (str(page[-1].index[self._field]), page[-1].id)
        return found

    def _choose(self, entries: list[Queued], limit: int) -> list[Queued]:
        """Choose so many of them: all that come clearly before the last there is room for, and some of those near it, in their order."""
        if self._random is None or len(entries) <= limit:
            return entries[:limit]
        last = entries[limit - 1].rank
        above = [entry for entry in entries if entry.rank < last - self._near]
        level = [entry for entry in entries if abs(entry.rank - last) <= self._near]
        some = sorted(self._random.sample(range(len(level)), limit - len(above)))
        return above + [level[at] for at in some]

    def _queued(self, entity: Entity) -> Queued:
        lane, _, rest = str(entity.index[self._field]).rpartition(LANE_END)
        return Queued(lane, entity.id, int(rest))

    def _forget(self, now: float) -> None:
        """Drop what was given out too long ago; the oldest come first."""
        for identifier, at in [*self._given.items()]:
            if now - at < _HELD_SECONDS:
                break
            del self._given[identifier]
