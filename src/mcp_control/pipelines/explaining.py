"""Runs and stages explained: what the engine knows of them, with the first task of each stage that waits."""

from typing import Final

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.errors import NotFound
from mcp_control.pipelines.explain import explain_run, explain_stage
from mcp_control.pipelines.model import StageState
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.view_model import RunExplanation, StageExplanation
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.records import read
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.view_model import Explanation

_WAITING: Final = (TaskState.BLOCKED, TaskState.QUEUED, TaskState.SCHEDULED, TaskState.INPUT_REQUIRED)
_HELD: Final = (TaskState.ASSIGNED, TaskState.RUNNING)
_LOOKED_AT: Final = 1000


class RunExplainer:
    """Answers why a run is not further. For people: it asks the store more than the engine does."""

    def __init__(self, store: Store, engine: PipelineEngine, tasks: TaskOrchestrator) -> None:
        self._store = store
        self._engine = engine
        self._tasks = tasks

    async def run(self, actor: Actor, run_id: str) -> RunExplanation:
        """Explain a run and its stages that have not ended. Raises NotFound."""
        allow(actor, "runs.explain", run_id)
        run = await self._engine.run(actor, run_id)
        view = await self._engine.view(actor, run)
        chosen = {} if run.final else await self._open_tasks(run_id)
        told: dict[str, Explanation] = {}
        for stage in view.stages:
            if stage.state is StageState.RUNNING and stage.name in chosen:
                told[stage.name] = await self._tasks.explain(actor, chosen[stage.name].id)
        return explain_run(run, view, told)

    async def stage(self, actor: Actor, run_id: str, name: str) -> StageExplanation:
        """Explain a stage. Raises NotFound."""
        allow(actor, "runs.explain", run_id)
        run = await self._engine.run(actor, run_id)
        view = await self._engine.view(actor, run)
        stage = next((each for each in view.stages if each.name == name), None)
        if stage is None:
            raise NotFound(f"the run has no stage {name}")
        task = None
        if stage.state is StageState.RUNNING and name in (chosen := await self._open_tasks(run_id)):
            task = await self._tasks.explain(actor, chosen[name].id)
        return explain_stage(run, view, stage, task)

    async def _open_tasks(self, run_id: str) -> dict[str, Task]:
        """Return a task of each stage that has not ended: one that an agent works on where there is one, else the first that waits."""
        found: dict[str, Task] = {}
        for states in (_HELD, _WAITING):
            for state in states:
                where = [Where("run", "eq", run_id), Where("state", "eq", state.value)]
                for task in map(read, await self._store.find("task", Query(where=where, limit=_LOOKED_AT))):
                    if task.links.stage is not None:
                        found.setdefault(task.links.stage, task)
        return found
