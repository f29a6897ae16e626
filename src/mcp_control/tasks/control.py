"""TaskControl: what people ask of tasks that are there: cancel, assign, edit, pause, resume."""

from collections.abc import Sequence
from typing import Final

import msgspec

from mcp_control.agents.service import AgentManager
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import FieldError, Invalid, Problem
from mcp_control.kernel.text import label_errors, text_errors
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.ledger import Decide, Intent, Ledger
from mcp_control.tasks.model import Task
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.submission import priority_number
from mcp_control.tasks.verbs import cancelling, editing, pausing, reassigning, resuming

REASON_MAX: Final = 1000


class TaskEdit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person may change of a task that is not final; what is not given stays."""

    priority: int | str | None = None
    labels: dict[str, str] | None = None


class TaskControl:
    """Changes tasks on request."""

    def __init__(
        self,
        clock: Clock,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        tasks: TaskOrchestrator,
    ) -> None:
        self._clock = clock
        self._manager = manager
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self._tasks = tasks

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
        after = await self._one(task_id, reassigning(actor.id, chosen, self._clock.now()))
        if task.lane != after.lane:
            await self._dispatcher.withdraw(task)
        return after

    async def pause(self, actor: Actor, task_id: str, reason: str = "") -> Task:
        """Hold a task back: it leaves its lane and keeps its place; a running attempt goes on. Raises NotFound, InvalidTransition."""
        allow(actor, "tasks.pause", task_id)
        _check_text("#/reason", reason)
        before = await self._tasks.one(actor, task_id)
        after = await self._one(task_id, pausing(actor.id, reason, self._clock.now()))
        await self.withdrawn([before])
        return after

    async def withdrawn(self, tasks: Sequence[Task]) -> None:
        """Take tasks out of their lanes that wait there no more; whoever let one go meanwhile put it there before this."""
        if not tasks:
            return
        await self._dispatcher.withdraw(*tasks)
        now = await self._ledger.load([task.id for task in tasks], fresh=True)
        if again := [task for task in now if task is not None and task.waits]:
            await self._dispatcher.enqueue(again)

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
