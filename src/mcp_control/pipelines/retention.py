"""Removing runs after their time, with their artifacts. Their tasks are the task component's."""

from typing import Final

from msgspec.structs import replace

from mcp_control.artifacts.service import Artifacts
from mcp_control.kernel.changes import Change, Key, Query, Where
from mcp_control.pipelines.records import read_run
from mcp_control.security.model import SYSTEM
from mcp_control.storage.ports import Store

_BATCH: Final = 100


class RunRetention:
    """Removes runs that ended long ago, a bounded batch at once.

    Args:
        keep_ms: how long an ended run is kept.
    """

    def __init__(self, store: Store, artifacts: Artifacts, keep_ms: int) -> None:
        self._store = store
        self._artifacts = artifacts
        self._keep_ms = keep_ms

    async def once(self, now: int) -> int:
        """Remove one batch; returns how many runs that were.

        Artifacts go first: after a crash in between the run is still there, and so is found again.
        """
        ended = (Where("finished", "lt", now - self._keep_ms),)
        rows = await self._store.find("run", Query(where=ended, order="finished", limit=_BATCH))
        removed = 0
        for row in rows:
            await self._artifacts.delete_of_run(replace(SYSTEM, tenant=read_run(row).tenant), row.id)
            (problem,) = await self._store.commit([Change((), [Key("run", row.id, row.version)])])
            removed += problem is None
        return removed
