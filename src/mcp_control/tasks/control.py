"""TaskControl: what people ask of tasks that are there: cancel, retry, assign, edit, pause, resume."""

from typing import Final

import msgspec

from mcp_control.agents.matching import misfit
from mcp_control.agents.service import AgentManager
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import FieldError, Invalid, InvalidTransition, Problem, Unroutable
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.text import label_errors, text_errors
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.lanes import demand_of, lane_of
from mcp_control.tasks.ledger import Decide, Intent, Ledger
from mcp_control.tasks.limiting import limits_of
from mcp_control.tasks.model import Links, Origin, Task, TaskSpec
from mcp_control.tasks.service import Submitted, TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.spending import Spending
from mcp_control.tasks.submission import priority_number
from mcp_control.tasks.verbs import cancelling, editing, pausing, pinning, resuming

REASON_MAX: Final = 1000


class TaskEdit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person may change of a task that is not final; what is not given stays."""

    priority: int | str | None = None
    labels: dict[str, str] | None = None


class TaskControl:
    """Changes tasks on request."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        tasks: TaskOrchestrator,
        spending: Spending,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._manager = manager
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._spending = spending

    async def cancel(self, actor: Actor, task_id: str, reason: str = "") -> Task:
        """Cancel a waiting task at once; ask the agent of a running one to stop, and end it by force when the grace is over.

        Raises:
            InvalidTransition: the task is final.
        """
        allow(actor, "tasks.cancel", task_id)
        _check_text("#/reason", reason)
        before = await self._tasks.one(actor, task_id)
        after = await self._one(task_id, cancelling(actor.id, reason, self._clock.now()))
        if after.final:
            await self._dispatcher.withdraw(before)
        else:
            await self._settler.tell_cancelled([task_id])
        return after

    async def retry(self, actor: Actor, task_id: str, origin: Origin) -> Submitted:
        """Submit a finished task again as a new one that names the old (`retry_of`); final is final.

        Raises:
            InvalidTransition: the task is not final yet.
        """
        allow(actor, "tasks.retry", task_id)
        task = await self._tasks.one(actor, task_id)
        if not task.final:
            raise InvalidTransition("the task has not ended", state=task.state.value, allowed=["cancel"])
        entity = (await self._store.get("task", [task_id], ("payload",)))[0]
        payload = b"null" if entity is None else entity.cold.get("payload", b"null")
        spec = TaskSpec(
            type=task.type,
            payload=msgspec.Raw(payload),
            type_version=task.type_version,
            priority=task.priority,
            fairness=task.fairness,
            needs=task.needs,
            labels=task.labels,
            limits=limits_of(task.gates),
            retry=task.retry,
            timeout=None if task.timeout_ms is None else task.timeout_ms / 1000,
            context_id=task.links.context_id,
            parent_id=task.links.parent_id,
            trust=task.trust,
            budget=await self._spending.own(task),
        )
        above = [owner for owner in task.draws if owner != task.id]
        links = Links(retry_of=task.id, root_id=task.links.root_id, depth=task.links.depth)
        new = NewTask(id=self._ids.new("task"), spec=spec, links=links, origin=origin, draws=above)
        started = self._settler.handing.create(new, self._clock.now(), actor.tenant, actor.id)
        await self._settler.handing.launch([started])
        return Submitted(msgspec.structs.replace(started[0], version=1), True)

    async def assign(self, actor: Actor, task_id: str, agent: str) -> Task:
        """Let only this agent take a waiting task.

        Raises:
            NotFound: no such task or agent.
            Unroutable: the agent cannot do it.
            InvalidTransition: an agent already works on it; AlreadyTerminal: it has ended.
        """
        allow(actor, "tasks.assign", task_id)
        task = await self._tasks.one(actor, task_id)
        chosen = self._manager.find(actor, agent)
        needs = msgspec.structs.replace(task.needs, agent=chosen.id)
        reason = misfit(chosen.id, chosen.spec, msgspec.structs.replace(demand_of(task), agent=chosen.id))
        if reason is not None:
            raise Unroutable(f"agent {chosen.spec.name} cannot take it: it {reason}")
        lane = lane_of(msgspec.structs.replace(task, needs=needs))
        after = await self._one(task_id, pinning(actor.id, chosen.id, lane, self._clock.now()))
        if task.lane != lane:
            await self._dispatcher.withdraw(task)
        return after

    async def pause(self, actor: Actor, task_id: str, reason: str = "") -> Task:
        """Hold a task back: it leaves its lane and keeps its place; a running attempt goes on. Raises NotFound, InvalidTransition."""
        allow(actor, "tasks.pause", task_id)
        _check_text("#/reason", reason)
        before = await self._tasks.one(actor, task_id)
        after = await self._one(task_id, pausing(actor.id, reason, self._clock.now()))
        await self.withdrawn(before)
        return after

    async def withdrawn(self, task: Task) -> None:
        """Take a task out of its lane that was held back; whoever let it go meanwhile put it there before this."""
        await self._dispatcher.withdraw(task)
        (now,) = await self._ledger.load([task.id], fresh=True)
        if now is not None and now.waits:
            await self._dispatcher.enqueue([now])

    async def resume(self, actor: Actor, task_id: str) -> Task:
        """Let a task go that was held back: it waits at its old place again. Raises NotFound, InvalidTransition."""
        allow(actor, "tasks.resume", task_id)
        await self._tasks.one(actor, task_id)
        return await self._one(task_id, resuming(actor.id, self._clock.now()))

    async def edit(self, actor: Actor, task_id: str, edit: TaskEdit, version: int | None) -> Task:
        """Change priority or labels. Raises VersionConflict unless `version` is the current one."""
        allow(actor, "tasks.edit", task_id)
        priority = None if edit.priority is None else priority_number(edit.priority)
        errors = [] if edit.labels is None else label_errors("#/labels", edit.labels)
        if edit.priority is not None and priority is None:
            errors.append(
                FieldError(pointer="#/priority", code="out-of-range", detail="0 to 100, or critical, high, medium, low")
            )
        if errors:
            raise Invalid(errors[0].detail, errors=errors)
        before = await self._tasks.one(actor, task_id)
        # Pushing an entry that is there replaces it, so a queued task moves to its new place.
        after = await self._one(
            task_id, editing(actor.id, version, priority, edit.labels, self._clock.now(), self._settler.handing.rank)
        )
        if after.lane != before.lane:
            await self._dispatcher.withdraw(before)
        return after

    async def _one(self, task_id: str, decide: Decide) -> Task:
        result = (await self._settler.settle([Intent(task_id, decide)]))[0]
        if isinstance(result, Problem):
            raise result
        return result


def _check_text(pointer: str, text: str) -> None:
    if errors := text_errors(pointer, text, REASON_MAX):
        raise Invalid(errors[0].detail, errors=errors)
