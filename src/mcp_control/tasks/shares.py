"""ShareManager: the weights of shares, and what each was served, in the store."""

import builtins
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, Fact, IndexValue, Key, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict, Duplicate, Invalid
from mcp_control.kernel.ids import make_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import name_errors, range_errors
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Queue, Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.figures import TaskFigures
from mcp_control.tasks.share_model import SHARE_KIND, ShareOrder, ShareRecord, ShareView

KEY_MAX: Final = 64
WEIGHT_MIN: Final = 0.1
WEIGHT_MAX: Final = 100.0
_UPDATED: Final = "share.updated"
_KEEP_MS: Final = 90 * 86_400_000
_BATCH: Final = 500
_TRIES: Final = 20
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(ShareRecord).decode


class _Ordered(msgspec.Struct):
    key: str
    weight: float | None


_decode_ordered: Final = msgspec.json.Decoder(_Ordered).decode


class ShareManager:
    """Keeps what operators said of shares, tells it the dispatcher, and adds up what was served.

    Every server hears what all of them give out; the one that leads writes the sums.
    """

    def __init__(self, store: Store, clock: Clock, queue: Queue, dispatcher: Dispatcher, figures: TaskFigures) -> None:
        self._store = store
        self._clock = clock
        self._queue = queue
        self._dispatcher = dispatcher
        self._figures = figures

    async def start(self) -> None:
        """Read the weights that operators gave."""
        after: builtins.list[IndexValue] | None = None
        while True:
            query = Query(where=[Where("ordered", "eq", 1)], after=after, limit=_BATCH)
            rows = await self._store.find(SHARE_KIND.name, query)
            for record in (_decode(row.hot) for row in rows):
                self._dispatcher.shares.order(record.tenant, record.key, record.weight)
            if len(rows) < _BATCH:
                return
            after = [rows[-1].id]

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear of weights that were given at any server."""
        for stored in facts:
            if stored.fact.type == _UPDATED:
                found = _decode_ordered(stored.fact.data)
                self._dispatcher.shares.order(stored.fact.tenant, found.key, found.weight)

    async def set(self, actor: Actor, order: ShareOrder) -> ShareView:
        """Give a share a weight, or leave it to its tasks again. It counts at once. Raises Invalid."""
        allow(actor, "shares.set")
        errors = name_errors("#/key", order.key, KEY_MAX) if order.key else []
        if order.weight is not None:
            errors += range_errors("#/weight", order.weight, WEIGHT_MIN, WEIGHT_MAX)
        if errors:
            raise Invalid(errors[0].detail, errors=errors)
        now = self._clock.now()
        for _ in range(_TRIES):
            record = await self._record(actor.tenant, order.key)
            after = replace(record, weight=order.weight, updated_at=now)
            told = fact(
                _UPDATED, record.id, actor.id, now, {"key": order.key, "weight": order.weight}, tenant=actor.tenant
            )
            if await self._written(after, [told]):
                self._dispatcher.shares.order(actor.tenant, order.key, order.weight)
                return self._view(after, (await self._waiting(actor.tenant)).get(order.key, 0))
        raise Conflict("too many changes at once")

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[ShareView]:
        """Return a page of shares, by key."""
        allow(actor, "shares.list")
        after = None if cursor is None else decode_cursor("shares", cursor, 2)
        where = [Where("name", "ge", _name(actor.tenant, "")), Where("name", "lt", actor.tenant + "\x20")]
        rows = await self._store.find(SHARE_KIND.name, Query(where=where, order="name", after=after, limit=limit + 1))
        waiting = await self._waiting(actor.tenant)
        shown = rows[:limit]
        items = [self._view(record, waiting.get(record.key, 0)) for record in (_decode(row.hot) for row in shown)]
        more = len(rows) > limit
        return Page(
            items=items,
            next_cursor=encode_cursor("shares", [shown[-1].index["name"], shown[-1].id]) if more else None,
        )

    async def once(self, now: int, *, leading: bool = True) -> int:
        """Write what was served since, or drop it on a server that does not lead; returns how many shares were written."""
        served = self._figures.take_served()
        if not leading:
            return 0
        for share in self._dispatcher.shares.unrecorded():
            served.setdefault((share.tenant, share.key), 0)
            share.recorded = True
        written = 0
        for (tenant, key), count in served.items():
            record = await self._record(tenant, key)
            if not count and record.version:
                continue
            # Another server that leads, too, or an operator was faster: the count is not worth a second attempt.
            written += await self._written(replace(record, served=record.served + count, updated_at=now))
        return written

    async def forget(self, now: int) -> int:
        """Remove shares without a weight of their own that nobody has used for 90 days, a bounded batch; returns how many."""
        query = Query(where=[Where("unused", "lt", now - _KEEP_MS)], order="unused", limit=_BATCH)
        rows = await self._store.find(SHARE_KIND.name, query)
        if rows:
            await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in rows])
        return len(rows)

    async def _record(self, tenant: str, key: str) -> ShareRecord:
        identifier = make_id("share", 0, blake2b(_name(tenant, key).encode(), digest_size=16).digest())
        (row,) = await self._store.get(SHARE_KIND.name, [identifier])
        if row is None:
            return ShareRecord(id=identifier, version=0, tenant=tenant, key=key)
        return replace(_decode(row.hot), version=row.version)

    async def _written(self, record: ShareRecord, facts: Sequence[Fact] = ()) -> bool:
        index: dict[str, IndexValue] = {"name": _name(record.tenant, record.key)}
        index["ordered" if record.weight is not None else "unused"] = (
            1 if record.weight is not None else record.updated_at
        )
        entity = Entity(SHARE_KIND.name, record.id, record.version, index, _encode(record))
        (problem,) = await self._store.commit([Change([entity], (), facts)])
        if problem is not None and not isinstance(problem, (Conflict, Duplicate)):
            raise problem
        return problem is None

    async def _waiting(self, tenant: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for depth in await self._queue.depths():
            lane = self._dispatcher.known(depth.lane)
            if lane is not None and lane.tenant == tenant:
                found[lane.line.share.key] = found.get(lane.line.share.key, 0) + depth.waiting
        return found

    def _view(self, record: ShareRecord, waiting: int) -> ShareView:
        asked = self._dispatcher.shares.weight(record.tenant, record.key)
        return ShareView(
            key=record.key,
            weight=asked if record.weight is None else record.weight,
            ordered=record.weight is not None,
            waiting=waiting,
            served=record.served,
            updated_at=to_datetime(record.updated_at),
        )


def _name(tenant: str, key: str) -> str:
    return f"{tenant}\x1f{key}"
