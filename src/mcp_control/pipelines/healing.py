"""What time brings about for runs, and what their own events failed to: the leader's work. Harmless when two servers do it."""

from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.errors import Problem
from mcp_control.pipelines.counting import waited_for
from mcp_control.pipelines.model import RUN_FINAL, Run, RunState
from mcp_control.pipelines.records import read_run
from mcp_control.pipelines.runs import Plans
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.security.model import SYSTEM
from mcp_control.storage.ports import Store
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.records import read as read_task

_ACTIVE: Final = [state.value for state in RunState if state not in RUN_FINAL]
_HEAL_RUNS: Final = 20
_HEAL_TASKS: Final = 500


class RunHealer:
    """Ends runs whose deadline passed, and follows tasks that ended without their run hearing of it (promise G7)."""

    def __init__(self, store: Store, engine: PipelineEngine) -> None:
        self._store = store
        self._engine = engine
        self._plans = Plans(store)
        self._healed = ""

    async def once(self, now: int) -> int:
        """Look at the runs that are due and at some active ones, round and round. Returns how many runs were changed."""
        changed = 0
        due = await self._store.find("run", Query(where=[Where("due", "le", now)], order="due", limit=_HEAL_RUNS))
        for row in due:
            changed += await self._heal(read_run(row), now)
        where = [Where("state", "in", _ACTIVE)]
        after = [self._healed] if self._healed else None
        rows = await self._store.find("run", Query(where=where, after=after, limit=_HEAL_RUNS))
        seen = {row.id for row in due}
        for row in rows:
            if row.id not in seen:
                changed += await self._heal(read_run(row), now)
        self._healed = rows[-1].id if len(rows) == _HEAL_RUNS else ""
        return changed

    async def _heal(self, stored: Run, now: int) -> bool:
        plan = await self._plans.load(stored.pipeline_id)
        if plan.nested:
            self._engine.moved(stored, plan)
        ids = waited_for(stored, plan, _HEAL_TASKS)
        ended = [
            Finished(task=task, result=entity.cold.get("result"))
            for entity in await self._store.get("task", ids, ("result",))
            if entity is not None and (task := read_task(entity)).final
        ]
        late = any(at is not None and at <= now for at in (stored.deadline_at, stored.stage_due))
        if not ended and not late and stored.ending is None:
            return False
        actor = replace(SYSTEM, tenant=stored.tenant)
        try:
            run = await self._engine.ask(
                actor, stored.id, lambda _plan, run, _now: run, "", finished=ended, insist=True
            )
        except Problem:
            return False  # somebody else moves it; it is looked at again
        return run.version != stored.version
