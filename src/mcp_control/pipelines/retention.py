"""Removing runs after their time, with their artifacts, and deleted definitions after them. Tasks of runs are the task component's."""

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mcp_control.artifacts.service import Artifacts
from mcp_control.kernel.changes import Change, Entity, IndexValue, Key, Query, Where
from mcp_control.kernel.ids import make_id
from mcp_control.pipelines.input_model import APPROVAL_KIND
from mcp_control.pipelines.records import read_pipeline, read_run
from mcp_control.pipelines.results import held
from mcp_control.security.model import SYSTEM
from mcp_control.storage.ports import Store
from mcp_control.tasks.budget_model import BUDGET_KIND

_BATCH: Final = 100
_APPROVALS: Final = 10_000  # more than a run asks
_LATE_MS: Final = 3_600_000  # how long a run may begin after its definition was deleted, at most


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
        """Remove one batch; returns how many runs that were. Those whose results are kept for others stay until they no longer are.

        Artifacts go first: after a crash in between the run is still there, and so is found again.
        """
        ended = (Where("finished", "lt", now - self._keep_ms),)
        removed = 0
        after: list[IndexValue] | None = None
        while not removed:
            query = Query(where=ended, order="finished", after=after, limit=_BATCH)
            rows = await self._store.find("run", query)
            needed = await held(self._store, [row.id for row in rows])
            removed = await self._remove([row for row in rows if row.id not in needed])
            if len(rows) < _BATCH:
                break
            after = [rows[-1].index["finished"], rows[-1].id]
        return removed

    async def _remove(self, rows: Sequence[Entity]) -> int:
        removed = 0
        for row in rows:
            await self._artifacts.delete_of_run(replace(SYSTEM, tenant=read_run(row).tenant), row.id)
            query = Query(where=[Where("run", "eq", row.id)], limit=_APPROVALS)
            keys = [Key(APPROVAL_KIND.name, each.id) for each in await self._store.find(APPROVAL_KIND.name, query)]
            (problem,) = await self._store.commit(
                [Change((), [*keys, Key(BUDGET_KIND.name, row.id), Key("run", row.id, row.version)])]
            )
            removed += problem is None
        return removed


class PipelineRetention:
    """Removes deleted definitions when the last run that began with them is gone, a bounded batch at once.

    Args:
        keep_ms: how long an ended run is kept; before that it is not looked for.
    """

    def __init__(self, store: Store, keep_ms: int) -> None:
        self._store = store
        self._keep_ms = keep_ms

    async def once(self, now: int) -> int:
        """Remove one batch; returns how many definitions that were."""
        deleted = (Where("deleted", "lt", now - self._keep_ms),)
        rows = await self._store.find("pipeline", Query(where=deleted, order="deleted", limit=_BATCH))
        removed = 0
        for row in rows:
            pipeline = read_pipeline(row)
            last = make_id("run", (pipeline.deleted_at or 0) + _LATE_MS, bytes(16))
            old = (Where("pipeline", "eq", pipeline.name), Where("id", "lt", last))
            runs = await self._store.find("run", Query(where=old, limit=_BATCH))
            if len(runs) < _BATCH and not any(read_run(run).pipeline_id == pipeline.id for run in runs):
                (problem,) = await self._store.commit([Change((), [Key("pipeline", row.id, row.version)])])
                removed += problem is None
        return removed
