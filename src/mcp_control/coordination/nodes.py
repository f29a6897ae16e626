"""The servers of a cluster: each says that it is there, and clears up after those that are gone."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.coordination.model import NODE_KIND, Node
from mcp_control.kernel.breaker_rules import BreakerStatus
from mcp_control.kernel.changes import Change, Entity, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.storage.ports import Store

_log = structlog.get_logger(__name__)
_MAX: Final = 1000
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Node).decode


class Nodes:
    """Keeps this server's entry alive and reads those of the others.

    Args:
        me: this server, as it is to be seen.
        seconds: how long an entry lives without being renewed; call `once` at least three times in it.
        sessions: returns the ids of the database sessions whose transactions would be left behind by a kill.
        end: ends database sessions of servers that are gone.
        breakers: says how the breakers of this server stand.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        me: Node,
        seconds: float,
        sessions: Callable[[], Sequence[bytes]],
        end: Callable[[Sequence[bytes]], Awaitable[None]],
        breakers: Callable[[], list[BreakerStatus]] = list,
    ) -> None:
        self._store = store
        self._clock = clock
        self._me = me
        self._seconds = seconds
        self._sessions = sessions
        self._end = end
        self._breakers = breakers
        self.heard_at = clock.monotonic()

    @property
    def id(self) -> str:
        """Id of this server."""
        return self._me.id

    @property
    def cut_off(self) -> bool:
        """Whether this server has not reached the store for longer than its entry lives."""
        return self._clock.monotonic() - self.heard_at > self._seconds

    async def once(self) -> None:
        """Say that this server is there. Raises Problem of the store."""
        asked = self._clock.monotonic()
        until = self._clock.now() + round(self._seconds * 1000)
        me = replace(self._me, until=until, sessions=list(self._sessions()), breakers=self._breakers())
        outcome = (await self._store.commit([Change(writes=[_entity(me)])]))[0]
        if isinstance(outcome, Conflict):
            # Taken for gone by the leader, or an earlier write of unknown outcome.
            found = (await self._store.get(NODE_KIND.name, [me.id]))[0]
            self._me = replace(me, version=0 if found is None else found.version)
            return
        if outcome is not None:
            raise outcome
        self._me = replace(me, version=me.version + 1)
        self.heard_at = asked

    async def all(self) -> list[Node]:
        """Return the servers that are there, in the order of their ids."""
        now = self._clock.now()
        found = await self._store.find(
            NODE_KIND.name, Query(where=[Where("until", "ge", now)], order="until", limit=_MAX)
        )
        return sorted((_decode(entity.hot) for entity in found), key=lambda node: node.id)

    async def bury(self) -> int:
        """End what servers left behind that are gone, and their entries; returns how many. Done twice it does no harm."""
        now = self._clock.now()
        found = await self._store.find(
            NODE_KIND.name, Query(where=[Where("until", "lt", now)], order="until", limit=_MAX)
        )
        gone = [_stored(entity) for entity in found if entity.id != self._me.id]
        await self._remove(gone)
        return len(gone)

    async def succeed(self) -> list[str]:
        """End what an earlier process of this server left behind that was killed; returns its ids. For the start, before the first commit.

        Without this it would hold up commits until it counts as gone.
        """
        if not self._me.port:
            return []
        found = await self._store.find(NODE_KIND.name, Query(order="until", limit=_MAX))
        mine = (self._me.name, self._me.port)
        earlier = [node for node in map(_stored, found) if (node.name, node.port) == mine and node.id != self._me.id]
        await self._remove(earlier)
        return [node.id for node in earlier]

    async def _remove(self, gone: Sequence[Node]) -> None:
        if not gone:
            return
        # All of their sessions first: one of the dead may have died while it removed another one's entry, and hold that up.
        await self._end([session for node in gone for session in node.sessions])
        await self._store.commit([Change(deletes=[Key(NODE_KIND.name, node.id, node.version)]) for node in gone])
        for node in gone:
            _log.warning("cluster.node_gone", node=node.name, id=node.id)

    async def leave(self) -> None:
        """Remove this server's entry, as when it stops in good order. Never raises."""
        try:
            await self._store.commit([Change(deletes=[Key(NODE_KIND.name, self._me.id)])])
        except Problem as problem:
            _log.warning("cluster.not_left", code=problem.code)


def _stored(entity: Entity) -> Node:
    return replace(_decode(entity.hot), version=entity.version)


def _entity(node: Node) -> Entity:
    return Entity(NODE_KIND.name, node.id, node.version, {"until": node.until}, _encode(node))
