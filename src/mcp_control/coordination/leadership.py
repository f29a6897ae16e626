"""Leadership by a lease in the store (reliability, section 2, "Leader").

An optimisation, not a lock: what a leader does is guarded by versions, so two of them make conflicts and never duplicates.
"""

from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.coordination.model import LEADER_KIND, Leader
from mcp_control.kernel.changes import Change, Entity
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Problem
from mcp_control.storage.ports import Store

_log = structlog.get_logger(__name__)
_ID: Final = "main"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Leader).decode


class Leadership:
    """Takes, renews and gives up the lease.

    A leader stops by itself before others may take over, by its own monotonic clock: a fifth of the term before the end.

    Args:
        node: id of this server.
        seconds: the term; call `once` at least three times in it.

    Attributes:
        heir_of: ids of servers that are known to be gone, whose term need not end.
    """

    def __init__(self, store: Store, clock: Clock, node: str, seconds: float) -> None:
        self._store = store
        self._clock = clock
        self._node = node
        self._seconds = seconds
        self._deadline = 0.0
        self.term = 0
        self.holder = ""
        self.taken = 0
        self.heir_of: frozenset[str] = frozenset()

    @property
    def leading(self) -> bool:
        """Whether this server leads right now."""
        return self._clock.monotonic() < self._deadline

    async def once(self) -> bool:
        """Renew the lease, or take it where it is free; says whether this server leads.

        Raises:
            Problem: of the store.
        """
        asked = self._clock.monotonic()
        found = (await self._store.get(LEADER_KIND.name, [_ID]))[0]
        leader = Leader() if found is None else replace(_decode(found.hot), version=found.version)
        self.holder, self.term = leader.holder, leader.term
        now = self._clock.now()
        if leader.holder != self._node and leader.holder not in self.heir_of and leader.until > now:
            self._deadline = 0.0
            return False
        new = leader.holder != self._node
        after = replace(leader, holder=self._node, term=leader.term + new, until=now + round(self._seconds * 1000))
        if not await self._write(after):
            return False
        self._deadline = asked + self._seconds * 0.8
        self.holder, self.term = self._node, after.term
        if new:
            self.taken += 1
            _log.info("cluster.leading", term=after.term)
        return True

    async def release(self) -> None:
        """Give the lease up at once, as when the server stops in good order. Never raises."""
        if not self._deadline:
            return
        self._deadline = 0.0
        try:
            found = (await self._store.get(LEADER_KIND.name, [_ID]))[0]
            if found is not None and (leader := _decode(found.hot)).holder == self._node:
                await self._write(replace(leader, version=found.version, holder="", until=0))
        except Problem as problem:
            _log.warning("cluster.not_released", code=problem.code)

    async def _write(self, leader: Leader) -> bool:
        entity = Entity(LEADER_KIND.name, _ID, leader.version, {}, _encode(leader))
        return (await self._store.commit([Change(writes=[entity])]))[0] is None
