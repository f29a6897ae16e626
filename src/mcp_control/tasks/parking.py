"""Parking: a stored task that cannot be decoded is taken out of everybody's way, kept as it is, and counted."""

from typing import Final

import structlog

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, NotFound
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.view_model import ParkedTask

_log = structlog.get_logger(__name__)
UNREADABLE: Final = "unreadable"
_BATCH: Final = 500
_LOGS: Final = 2000


class Parking:
    """Parks what the ledger could not read. What is parked is in no lane, is due at no time and has no holder: no janitor meets it again.

    Attributes:
        parked: how many this server has parked.
    """

    def __init__(self, store: Store, clock: Clock, ledger: Ledger) -> None:
        self._store = store
        self._clock = clock
        self._ledger = ledger
        self.parked = 0

    async def once(self, now: int) -> int:
        """Park what was met since; returns how many."""
        found = list(self._ledger.unreadable.values())[:_BATCH]
        if not found:
            return 0
        changes = [
            Change(
                [Entity("task", row.id, row.version, _out_of_the_way(row), row.hot)],
                facts=[
                    fact("task.parked", row.id, "system", now, {"bytes": len(row.hot)}, tenant=_text(row, "tenant"))
                ],
            )
            for row in found
            if row.index.get("state") != UNREADABLE
        ]
        outcomes = await self._store.commit(changes)
        for row in found:
            self._ledger.unreadable.pop(row.id, None)
        parked = sum(outcome is None for outcome in outcomes)
        if parked:
            self.parked += parked
            _log.error("tasks.parked", tasks=parked, first=found[0].id)
        return parked

    async def list(self, actor: Actor) -> list[ParkedTask]:
        """Return parked tasks, at most 500, newest first."""
        allow(actor, "tasks.list")
        where = [Where("tenant", "eq", actor.tenant), Where("state", "eq", UNREADABLE)]
        rows = await self._store.find("task", Query(where=where, descending=True, limit=_BATCH))
        return [
            ParkedTask(id=row.id, type=_text(row, "type"), run_id=_text(row, "run") or None, bytes=len(row.hot))
            for row in rows
        ]

    async def remove(self, actor: Actor, task_id: str) -> None:
        """Remove a parked task for good. Raises NotFound."""
        allow(actor, "tasks.discard", task_id)
        (row,) = await self._store.get("task", [task_id])
        if row is None or row.index.get("state") != UNREADABLE or _text(row, "tenant") != actor.tenant:
            raise NotFound("no such parked task")
        logs = await self._store.find("log", Query(where=[Where("task", "eq", task_id)], order="first", limit=_LOGS))
        gone = fact("task.discarded", task_id, actor.id, self._clock.now(), tenant=actor.tenant)
        deletes = [Key("task", task_id, row.version), *(Key("log", log.id) for log in logs)]
        (problem,) = await self._store.commit([Change((), deletes, [gone])])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem


def _out_of_the_way(row: Entity) -> dict[str, str | int | None]:
    return {name: row.index.get(name) for name in ("tenant", "type", "run")} | {"state": UNREADABLE}


def _text(row: Entity, name: str) -> str:
    return str(row.index.get(name) or "")
