"""Whether what sessions are counted to hold is what the leases in the store say. On every server, for the sessions it has."""

from collections.abc import Callable
from typing import Final

import structlog

from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.storage.ports import Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.handing import Handing
from mcp_control.tasks.ledger import Ledger

_log = structlog.get_logger(__name__)
_PAGE: Final = 1000
_SETTLED: Final = 15.0  # seconds after which nothing that was on its way can still be, however busy the store is


class DriftKeeper:
    """Finds and heals the difference between counted and real: a slot that stays taken for nothing, or a lease nobody counts.

    A difference counts only when it is there in two looks, seconds apart: between them, what was on its way has arrived.

    Args:
        seconds: between two looks at all sessions; those with a difference are looked at again with the next `once`.
        broken: told `slot_drift` when there is any.

    Attributes:
        drift: what the last look at all sessions found and healed; must be 0.
        healed: the same since the start.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        sessions: Sessions,
        ledger: Ledger,
        dispatcher: Dispatcher,
        handing: Handing,
        seconds: float = 60.0,
        broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sessions = sessions
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._handing = handing
        self._seconds = seconds
        self._broken = broken
        self._suspects: dict[str, tuple[float, frozenset[str]]] = {}
        self._looked_at = clock.monotonic()
        self.drift = 0
        self.healed = 0

    async def once(self) -> int:
        """Look, and heal what was different the last time too; returns how many slots that were."""
        now = self._clock.monotonic()
        if now - self._looked_at >= self._seconds:
            self._looked_at, self.drift = now, 0
            looked = list(self._sessions.all())
        else:
            looked = [one for one in map(self._sessions.get, self._suspects) if one is not None]
        before, self._suspects = self._suspects, {}
        found = 0
        for session in looked:
            instance_id = session.instance.id
            since, suspected = before.get(instance_id, (now, frozenset[str]()))
            different = await self._different(session)
            still = different & suspected
            if still and now - since < _SETTLED:
                self._suspects[instance_id] = (since, still)
            elif still and self._sessions.get(instance_id) is session:
                await self._heal(session, still)
                found += len(still)
            elif different:
                self._suspects[instance_id] = (now, different)
        if found:
            self.drift += found
            self.healed += found
            self._broken("slot_drift")
        return found

    async def _different(self, session: Session) -> frozenset[str]:
        """Return the tasks that only one of the two sides says the instance holds."""
        before = session.counted()
        real: set[str] = set()
        after: list[str | int | None] | None = None
        while True:
            where = [Where("holder", "eq", session.instance.id)]
            page = await self._store.find("task", Query(where=where, after=after, limit=_PAGE))
            real.update(entity.id for entity in page)
            if len(page) < _PAGE:
                break
            after = [page[-1].id]
        counted = session.counted()
        return frozenset(((before & counted) - real) | (real - before - counted))

    async def _heal(self, session: Session, ids: frozenset[str]) -> None:
        _log.error("agents.slot_drift", agent=session.agent.id, instance=session.instance.id, tasks=sorted(ids)[:20])
        self._ledger.forget(list(ids))
        for task_id, found in zip(ids, await self._ledger.load_with_payload(list(ids)), strict=True):
            lease = None if found is None else found[0].lease
            if found is not None and lease is not None and lease.instance_id == session.instance.id:
                self._handing.resend(*found)
            else:
                self._dispatcher.unreserve(session, task_id)
