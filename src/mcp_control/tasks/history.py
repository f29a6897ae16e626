"""The history of task types: what servers hear of ended attempts, kept in the store by the one that leads."""

import builtins
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

import msgspec

from mcp_control.kernel.changes import Change, Entity, IndexValue, Key, Query, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict
from mcp_control.kernel.ids import make_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.statistics import STATISTIC_KIND, Statistic, Tally, Times, added, quantile, times
from mcp_control.tasks.view_model import StatisticView

_TYPES_MAX: Final = 1000
_DAY_MS: Final = 86_400_000
_KEEP_MS: Final = 90 * _DAY_MS
_BATCH: Final = 500
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Statistic).decode


class TaskHistory:
    """Counts ended attempts in memory, and adds them to what the store keeps, some seconds' worth at once.

    Every server hears of all attempts; the one that leads writes, the others drop what they counted. When the lead changes, or a
    server dies, some seconds are missing or count twice: this is statistics.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._expected: dict[tuple[str, str], int] = {}
        self._asked = False

    def ran(self, tenant: str, task_type: str, seconds: float, completed: bool) -> None:
        """Count an attempt that ended."""
        tally = self._tallies.get((tenant, task_type))
        if tally is None:
            if len(self._tallies) >= _TYPES_MAX:
                return
            tally = self._tallies[(tenant, task_type)] = Tally()
        tally.ran(seconds, completed)

    def expected(self, tenant: str, task_type: str) -> int:
        """Return the median time of a type in milliseconds as it was some seconds ago, 0 while it is not known here."""
        self._asked = True
        found = self._expected.get((tenant, task_type))
        if found is None:
            found = 0
            if len(self._expected) < _TYPES_MAX:
                self._expected[(tenant, task_type)] = 0
        return found

    async def learn(self, tenant: str, types: Iterable[str]) -> None:
        """Read the median times of types that nobody has asked for here yet, so that `expected` knows them."""
        new = [(tenant, name) for name in types if (tenant, name) not in self._expected]
        if new and len(self._expected) < _TYPES_MAX:
            await self._read(new)

    async def _read(self, keys: builtins.list[tuple[str, str]]) -> None:
        rows = await self._store.get(STATISTIC_KIND.name, [_id(*key) for key in keys])
        for key, row in zip(keys, rows, strict=True):
            median = None if row is None else quantile(_decode(row.hot).weights, 0.5)
            self._expected[key] = 0 if median is None else round(median * 1000)

    async def once(self, now: int, *, leading: bool = True) -> int:
        """Write what was counted, or drop it on a server that does not lead; returns how many types were written."""
        if self._asked:
            self._asked = False
            await self._read(list(self._expected))
        tallies, self._tallies = self._tallies, {}
        if not leading or not tallies:
            return 0
        keys = list(tallies)
        rows = await self._store.get(STATISTIC_KIND.name, [_id(*key) for key in keys])
        changes = []
        for (tenant, task_type), row in zip(keys, rows, strict=True):
            before = (
                Statistic(id=_id(tenant, task_type), version=0, tenant=tenant, type=task_type)
                if row is None
                else msgspec.structs.replace(_decode(row.hot), version=row.version)
            )
            changes.append(Change([_written(added(before, tallies[(tenant, task_type)], now))]))
        written = 0
        for problem in await self._store.commit(changes):
            if problem is not None and not isinstance(problem, Conflict):
                raise problem
            written += problem is None  # another server that leads, too, was faster: its count is as good
        return written

    async def forget(self, now: int) -> int:
        """Remove statistics of types that nobody has used for 90 days, a bounded batch; returns how many."""
        old = Query(where=[Where("updated", "lt", now - _KEEP_MS)], order="updated", limit=_BATCH)
        rows = await self._store.find(STATISTIC_KIND.name, old)
        if rows:
            await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in rows])
        return len(rows)

    async def times(self, tenant: str, types: Iterable[str]) -> dict[str, Times]:
        """Return the times of those types of which there is a history."""
        names = sorted(set(types))
        rows = await self._store.get(STATISTIC_KIND.name, [_id(tenant, name) for name in names])
        found = {name: times(_decode(row.hot)) for name, row in zip(names, rows, strict=True) if row is not None}
        return {name: each for name, each in found.items() if each is not None}

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[StatisticView]:
        """Return a page of statistics, by type."""
        allow(actor, "tasks.statistics")
        after = None if cursor is None else decode_cursor("statistics", cursor, 2)
        where = [Where("name", "ge", _name(actor.tenant, "")), Where("name", "lt", actor.tenant + "\x20")]
        rows = await self._store.find(
            STATISTIC_KIND.name, Query(where=where, order="name", after=after, limit=limit + 1)
        )
        shown = rows[:limit]
        items: builtins.list[StatisticView] = [_view(_decode(row.hot)) for row in shown]
        more = len(rows) > limit
        return Page(
            items=items,
            next_cursor=encode_cursor("statistics", [shown[-1].index["name"], shown[-1].id]) if more else None,
        )


def _name(tenant: str, task_type: str) -> str:
    return f"{tenant}\x1f{task_type}"


def _id(tenant: str, task_type: str) -> str:
    return make_id("stat", 0, blake2b(_name(tenant, task_type).encode(), digest_size=16).digest())


def _written(statistic: Statistic) -> Entity:
    index: dict[str, IndexValue] = {"name": _name(statistic.tenant, statistic.type), "updated": statistic.updated_at}
    return Entity(STATISTIC_KIND.name, statistic.id, statistic.version, index, _encode(statistic))


def _view(statistic: Statistic) -> StatisticView:
    found = times(statistic)
    return StatisticView(
        type=statistic.type,
        completed=statistic.completed,
        failed=statistic.failed,
        p50=None if found is None else found.p50,
        p90=None if found is None else found.p90,
        p99=None if found is None else found.p99,
        updated_at=to_datetime(statistic.updated_at),
    )
