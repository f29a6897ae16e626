"""Dead letters: tasks that failed for good, until somebody has them tried again as new tasks, or discards them.

Final is final: the failed task stays as it was, and says only what became of it (`retried_as`, `discarded`).
"""

import builtins
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Query
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict, Invalid, InvalidTransition, NotFound, PayloadRemoved, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import text_errors
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.bulk import is_dead_letter
from mcp_control.tasks.control import REASON_MAX
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.ledger import Group, Ledger, Move
from mcp_control.tasks.limiting import limits_of
from mcp_control.tasks.model import Links, Needs, Origin, Request, Task, TaskSpec, TaskState
from mcp_control.tasks.narrowing import narrowed
from mcp_control.tasks.records import task_fact, view, write
from mcp_control.tasks.selection import Selection, conditions, matches, selection_errors
from mcp_control.tasks.service import Submitted
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.spending import Spending
from mcp_control.tasks.submission import check
from mcp_control.tasks.view_model import TaskView

_TRIES: Final = 10
_PAGE: Final = 200
_SCANNED_MAX: Final = 5000
_SCOPE: Final = "dead-letters"


class ReplayEdit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be different when a task is tried again; what is not given stays."""

    payload: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    needs: Needs | None = None
    priority: int | str | None = None


_AS_IT_WAS: Final = ReplayEdit()


class DeadLetters:
    """Shows the dead-letter set, has tasks tried again, and takes them out of it."""

    def __init__(
        self, store: Store, clock: Clock, ids: IdSource, ledger: Ledger, settler: Settler, spending: Spending
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._ledger = ledger
        self._settler = settler
        self._spending = spending

    async def list(
        self, actor: Actor, wanted: Selection, *, cursor: str | None = None, limit: int = 50
    ) -> Page[TaskView]:
        """Return a page of dead letters that fulfil the conditions, newest first. A page may come back short, with a cursor."""
        allow(actor, "tasks.list")
        if errors := selection_errors("#", wanted):
            raise Invalid(errors[0].detail, errors=errors)
        wanted = replace(wanted, state=[TaskState.FAILED])
        after = None if cursor is None else decode_cursor(_SCOPE, cursor, 1)
        now = self._clock.now()
        where, _ = await narrowed(self._store, conditions(wanted, actor.tenant, now + 1))
        items: builtins.list[TaskView] = []
        scanned = 0
        while True:
            rows = await self._store.find("task", Query(where=where, descending=True, after=after, limit=_PAGE))
            for task in self._ledger.readable(rows):
                if is_dead_letter(task) and matches(wanted, task):
                    items.append(view(task, now))
                    if len(items) == limit:
                        return Page(items=items, next_cursor=encode_cursor(_SCOPE, [task.id]))
            scanned += len(rows)
            if len(rows) < _PAGE:
                return Page(items=items)
            after = [rows[-1].id]
            if scanned >= _SCANNED_MAX:
                return Page(items=items, next_cursor=encode_cursor(_SCOPE, after))

    async def replay(self, actor: Actor, task_id: str, origin: Origin, edit: ReplayEdit = _AS_IT_WAS) -> Submitted:
        """Have a dead letter tried again, as a new task that names it (`retry_of`), changed where asked for.

        Raises:
            NotFound: no such task.
            InvalidTransition: it is no dead letter, or no more: it did not fail, was tried again, or was discarded.
                Invalid: what was changed.
        """
        allow(actor, "tasks.replay", task_id)
        return await self._tried(actor, task_id, origin, self._ids.new("task"), edit, dead=True)

    async def retry(self, actor: Actor, task_id: str, origin: Origin) -> Submitted:
        """Submit a finished task, however it ended, again as a new one that names the old (`retry_of`).

        Raises:
            NotFound: no such task.
            InvalidTransition: the task is not final yet.
        """
        allow(actor, "tasks.retry", task_id)
        return await self._tried(actor, task_id, origin, self._ids.new("task"), _AS_IT_WAS, dead=False)

    async def again(
        self, actor: Actor, task_id: str, origin: Origin, new_id: str, *, dead: bool, rejoin: bool
    ) -> Submitted:
        """Do what `retry` (or, with `dead`, `replay`) does, for an operation; the id makes it happen once.

        Args:
            rejoin: the new task takes the place of the old one in its group.
        """
        return await self._tried(actor, task_id, origin, new_id, _AS_IT_WAS, dead=dead, rejoin=rejoin)

    async def _tried(
        self,
        actor: Actor,
        task_id: str,
        origin: Origin,
        new_id: str,
        edit: ReplayEdit,
        *,
        dead: bool,
        rejoin: bool = False,
    ) -> Submitted:
        for _ in range(_TRIES):
            (known,) = await self._ledger.load([new_id], fresh=True)
            if known is not None:
                return Submitted(known, False)
            task, payload = await self._ended(actor, task_id)
            if dead:
                _check_dead(task)
            now = self._clock.now()
            if edit.payload is not msgspec.UNSET:
                payload = bytes(edit.payload)
            elif task.emptied_at is not None:
                raise PayloadRemoved("its payload is not kept any more", removed_at=to_datetime(task.emptied_at))
            spec = spec_again(task, payload, await self._spending.own(task), edit)
            check(spec, now)
            links = Links(
                retry_of=task.id,
                root_id=task.links.root_id,
                depth=task.links.depth,
                group_id=task.links.group_id if rejoin else None,
            )
            above = [owner for owner in task.draws if owner != task.id]
            new = NewTask(id=new_id, spec=spec, links=links, origin=origin, draws=above)
            created = self._settler.handing.create(new, now, actor.tenant, actor.id)
            marked = replace(task, retried_as=new_id)
            if rejoin:
                marked = replace(marked, links=replace(task.links, group_id=None))
            fact = task_fact("task.retried", marked, actor.id, now, retried_as=new_id)
            try:
                await self._settler.handing.launch([created], [write(marked)[1]], [fact])
            except Conflict:
                continue  # somebody else did something with the failed task, or this same thing
            return Submitted(replace(created[0], version=1), True)
        raise Conflict("too many changes at once")

    async def discard(self, actor: Actor, task_id: str, reason: str = "") -> Task:
        """Take a task out of the dead-letter set; it stays among the finished tasks. Raises NotFound, InvalidTransition."""
        allow(actor, "tasks.discard", task_id)
        if errors := text_errors("#/reason", reason, REASON_MAX):
            raise Invalid(errors[0].detail, errors=errors)
        return await self.discarded(actor, task_id, reason, since=None)

    async def discarded(self, actor: Actor, task_id: str, reason: str, *, since: int | None) -> Task:
        """Do what `discard` does; one that was discarded since a moment (wall milliseconds) stays so."""
        for _ in range(_TRIES):
            task, _payload = await self._ended(actor, task_id)
            if since is not None and task.discarded is not None and task.discarded.at >= since:
                return task
            _check_dead(task)
            now = self._clock.now()
            marked = replace(task, discarded=Request(at=now, by=actor.id, reason=reason))
            move = Move(marked, [task_fact("task.discarded", marked, actor.id, now)])
            (outcome,) = await self._ledger.commit([Group([move])])
            if not isinstance(outcome, Problem):
                return outcome[0]
            if not isinstance(outcome, Conflict):
                raise outcome
        raise Conflict("too many changes at once")

    async def _ended(self, actor: Actor, task_id: str) -> tuple[Task, bytes]:
        rows = [row for row in await self._store.get("task", [task_id], ("payload",)) if row is not None]
        tasks = self._ledger.readable(rows)
        if not tasks or tasks[0].tenant != actor.tenant:
            raise NotFound("no such task")
        if not tasks[0].final:
            raise InvalidTransition("the task has not ended", state=tasks[0].state.value, allowed=["cancel"])
        return tasks[0], rows[0].cold.get("payload", b"null")


def _check_dead(task: Task) -> None:
    if not is_dead_letter(task):
        why = (
            f"it is {task.state.value}"
            if task.state is not TaskState.FAILED
            else f"it was tried again as {task.retried_as}"
            if task.retried_as
            else "it was discarded"
        )
        raise InvalidTransition(f"the task is no dead letter: {why}", state=task.state.value, allowed=["retry"])


def spec_again(task: Task, payload: bytes, budget: Budget | None, edit: ReplayEdit) -> TaskSpec:
    """Return the submission that makes a task like this one, changed where asked for. Times of the past are left out. Pure."""
    return TaskSpec(
        type=task.type,
        payload=msgspec.Raw(payload),
        type_version=task.type_version,
        priority=task.priority if edit.priority is None else edit.priority,
        fairness=task.fairness,
        limits=limits_of(task.gates),
        needs=task.needs if edit.needs is None else edit.needs,
        labels=task.labels,
        retry=task.retry,
        timeout=None if task.timeout_ms is None else task.timeout_ms / 1000,
        context_id=task.links.context_id,
        parent_id=task.links.parent_id,
        trust=task.trust,
        budget=budget,
    )
