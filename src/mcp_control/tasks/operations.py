"""Operations: one verb for all tasks that fulfil conditions, in bounded batches, carried on by whichever server leads."""

import asyncio
import builtins
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog
from msgspec.structs import replace

from mcp_control.agents.model import Agent
from mcp_control.agents.service import AgentManager
from mcp_control.kernel.changes import Change, Fact, Key, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import (
    Conflict,
    FieldError,
    Invalid,
    InvalidTransition,
    NotFound,
    Problem,
    SelectionTooLarge,
)
from mcp_control.kernel.ids import IdSource, derived_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import text_errors
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.bulk import deciding, meant, narrowed
from mcp_control.tasks.control import REASON_MAX, TaskControl
from mcp_control.tasks.dead_letters import DeadLetters
from mcp_control.tasks.ledger import Intent, Ledger, Waiters
from mcp_control.tasks.model import Origin, Task
from mcp_control.tasks.operation_model import (
    OPERATION_KIND,
    OPERATION_TRANSITIONS,
    SHOWN,
    Operation,
    OperationRequest,
    OperationView,
    Preview,
    Refused,
)
from mcp_control.tasks.operation_records import (
    new_operation,
    operation_fact,
    read_operation,
    view_operation,
    write_operation,
)
from mcp_control.tasks.selection import EVERYTHING, Selection, conditions, matches, selection_errors
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.submission import priority_number

_log = structlog.get_logger(__name__)
_KIND: Final = OPERATION_KIND.name
_BATCH: Final = 200
_PAGE: Final = 1000
_COUNTED: Final = 10_000
_SCANNED: Final = 200_000
_RUNNING: Final = 50
WAIT_MAX_SECONDS: Final = 60.0
_ENDED: Final = frozenset({"operation.completed", "operation.cancelled"})


class Operations:
    """Starts operations, shows them, stops them, and carries them on (`once`, on the server that leads)."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        control: TaskControl,
        dead_letters: DeadLetters,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._manager = manager
        self._ledger = ledger
        self._settler = settler
        self._control = control
        self._dead_letters = dead_letters
        self._waiters = Waiters()

    # --- asking -------------------------------------------------------------------------------------------------------

    async def preview(self, actor: Actor, request: OperationRequest) -> Preview:
        """Say what an operation would be done with, without doing it. Counts up to 10,000. Raises Invalid, NotFound."""
        allow(actor, f"tasks.{request.verb}")
        return await self._preview(actor.tenant, self._checked(actor, request), _COUNTED)

    async def start(self, actor: Actor, request: OperationRequest) -> Operation:
        """Begin an operation; durable on return. It is carried on until it is complete, whatever server dies.

        It is done with tasks that are there now; later ones are left alone.

        Raises:
            Invalid, NotFound: the request.
            SelectionTooLarge: more tasks match than were expected; nothing was done.
        """
        allow(actor, f"tasks.{request.verb}")
        checked = self._checked(actor, request)
        limit = request.expected_at_most
        if limit is not None:
            found = await self._preview(actor.tenant, checked, limit)
            if found.more or found.matched > limit:
                raise SelectionTooLarge(
                    f"more tasks match than the {limit} that were expected", expected_at_most=limit, first=found.first
                )
        now = self._clock.now()
        operation = new_operation(self._ids.new("op"), actor, checked, now)
        await self._store.commit(
            [
                Change(
                    [write_operation(operation)], facts=[operation_fact("operation.started", operation, actor.id, now)]
                )
            ]
        )
        return replace(operation, version=1)

    def _checked(self, actor: Actor, request: OperationRequest) -> OperationRequest:
        """Return the request with the priority as a number, the agent's id, and the states that the verb is for."""
        errors = selection_errors("#/where", request.where) + text_errors("#/reason", request.reason, REASON_MAX)
        if request.where == EVERYTHING:
            errors.append(FieldError(pointer="#/where", code="required", detail="at least one condition"))
        where = narrowed(request.verb, request.where)
        if not where.state:
            errors.append(
                FieldError(
                    pointer="#/where/state", code="invalid-value", detail=f"no task in these states can {request.verb}"
                )
            )
        priority = None if request.priority is None else priority_number(request.priority)
        if (request.verb == "reprioritize") != (request.priority is not None) or (
            request.priority is not None and priority is None
        ):
            detail = "0 to 100, or critical, high, medium, low; for reprioritize alone"
            errors.append(FieldError(pointer="#/priority", code="out-of-range", detail=detail))
        if (request.verb == "reassign") != (request.agent is not None):
            errors.append(FieldError(pointer="#/agent", code="required", detail="for reassign alone"))
        if errors:
            raise Invalid(errors[0].detail, errors=errors)
        agent = None if request.agent is None else self._manager.find(actor, request.agent).id
        return replace(request, where=where, priority=priority, agent=agent)

    async def _preview(self, tenant: str, request: OperationRequest, most: int) -> Preview:
        """Count what fulfils the conditions, no further than one beyond `most`, looking at a bounded number of tasks."""
        first: builtins.list[str] = []
        matched = scanned = 0
        cursor = ""
        before = self._clock.now() + 1
        while True:
            tasks, following = await self._page(tenant, request.where, before, cursor)
            for task in tasks:
                if meant(request, task) and matches(request.where, task):
                    matched += 1
                    if len(first) < SHOWN:
                        first.append(task.id)
            scanned += _PAGE
            if following is None:
                return Preview(matched=matched, more=False, first=first)
            if matched > most or scanned >= _SCANNED:
                return Preview(matched=matched, more=True, first=first)
            cursor = following

    async def _page(
        self, tenant: str, wanted: Selection, before: int, cursor: str
    ) -> tuple[builtins.list[Task], str | None]:
        """Return some tasks that may be meant, in the order of their ids, and where to go on; None at the end."""
        rows = await self._store.find(
            "task",
            Query(where=conditions(wanted, tenant, before), after=[cursor] if cursor else None, limit=_PAGE),
        )
        return self._ledger.readable(rows), rows[-1].id if len(rows) == _PAGE else None

    # --- seeing and stopping ------------------------------------------------------------------------------------------

    async def get(self, actor: Actor, operation_id: str) -> Operation:
        """Return an operation. Raises NotFound."""
        allow(actor, "operations.get", operation_id)
        found = (await self._store.get(_KIND, [operation_id]))[0]
        operation = None if found is None else read_operation(found)
        if operation is None or operation.tenant != actor.tenant:
            raise NotFound("no such operation")
        return operation

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[OperationView]:
        """Return a page of operations, newest first."""
        allow(actor, "operations.list")
        after = None if cursor is None else decode_cursor("operations", cursor, 1)
        rows = await self._store.find(
            _KIND, Query(where=[Where("tenant", "eq", actor.tenant)], descending=True, after=after, limit=limit + 1)
        )
        shown = rows[:limit]
        more = len(rows) > limit
        return Page(
            items=[view_operation(read_operation(row)) for row in shown],
            next_cursor=encode_cursor("operations", [shown[-1].id]) if more else None,
        )

    async def wait(self, actor: Actor, operation_id: str, seconds: float) -> Operation:
        """Return an operation when it has ended, or as it is after so many seconds, at most 60. Raises NotFound."""
        future = self._waiters.expect(operation_id)
        try:
            if (await self.get(actor, operation_id)).state == "running":
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(seconds, WAIT_MAX_SECONDS)):
                        await future
            return await self.get(actor, operation_id)
        finally:
            self._waiters.abandon(operation_id, future)

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that operations ended, by whatever server. Called with all facts, on the loop."""
        if self._waiters:
            for stored in facts:
                if stored.fact.type in _ENDED:
                    self._waiters.ended(stored.fact.subject)

    async def cancel(self, actor: Actor, operation_id: str) -> Operation:
        """Do it with no more tasks; what was done stays done. Raises NotFound, InvalidTransition."""
        allow(actor, "operations.cancel", operation_id)
        while True:
            operation = await self.get(actor, operation_id)
            if operation.state == "cancelled":
                return operation
            if operation.state not in OPERATION_TRANSITIONS["cancel"]:
                raise InvalidTransition("the operation is complete", state=operation.state, allowed=[])
            now = self._clock.now()
            after = replace(operation, state="cancelled", finished_at=now, pending=[])
            if await self._write(after, operation_fact("operation.cancelled", after, actor.id, now)):
                return replace(after, version=after.version + 1)

    async def _write(self, operation: Operation, *facts: Fact) -> bool:
        (problem,) = await self._store.commit([Change([write_operation(operation)], facts=facts)])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
        return problem is None

    # --- doing --------------------------------------------------------------------------------------------------------

    async def once(self, _: int) -> int:
        """Carry on all operations, a batch of each in turn, until none is left; returns how many batches were done."""
        batches = 0
        while rows := await self._store.find(
            _KIND, Query(where=[Where("running", "gt", 0)], order="running", limit=_RUNNING)
        ):
            for row in rows:
                await self._step(read_operation(row))
                batches += 1
        return batches

    async def _step(self, operation: Operation) -> None:
        """Do what is pending, choose what comes next, and write both down."""
        problems = await self._apply(operation) if operation.pending else []
        now = self._clock.now()
        pending, cursor = await self._next(operation)
        done = not pending and cursor is None
        after = replace(
            operation,
            cursor=cursor or operation.cursor,
            pending=pending,
            matched=operation.matched + len(pending),
            changed=operation.changed + len(operation.pending) - len(problems),
            refused=operation.refused + len(problems),
            first=(operation.first + operation.pending)[:SHOWN],
            problems=(operation.problems + problems)[:SHOWN],
            state="completed" if done else "running",
            finished_at=now if done else None,
        )
        facts = [operation_fact("operation.completed", after, operation.created_by, now)] if done else []
        await self._write(after, *facts)

    async def _next(self, operation: Operation) -> tuple[builtins.list[str], str | None]:
        """Return the next tasks, and up to where all were looked at; (nothing, None) at the end."""
        room = _BATCH if operation.limit is None else min(_BATCH, operation.limit - operation.matched)
        pending: builtins.list[str] = []
        cursor = operation.cursor
        while room > 0:
            tasks, following = await self._page(operation.tenant, operation.where, operation.created_at + 1, cursor)
            for task in tasks:
                # What it makes itself is not there when it begins, however its id sorts.
                mine = task.origin.request_id == operation.id
                if not mine and meant(operation, task) and matches(operation.where, task):
                    pending.append(task.id)
                    if len(pending) == room:
                        return pending, task.id
            if following is None:
                break
            cursor = following
            if pending:
                return pending, cursor
        return pending, pending[-1] if pending else None

    async def _apply(self, operation: Operation) -> builtins.list[Refused]:
        """Do it with the pending tasks; returns those with which it could not be done."""
        if operation.verb in ("retry", "replay", "discard"):
            outcomes = await asyncio.gather(*(self._anew(operation, task_id) for task_id in operation.pending))
        else:
            outcomes = await self._settle(operation)
        return [
            Refused(id=task_id, code=outcome.code, detail=outcome.detail[:200])
            for task_id, outcome in zip(operation.pending, outcomes, strict=True)
            if outcome is not None
        ]

    async def _settle(self, operation: Operation) -> builtins.list[Problem | None]:
        agent = None if operation.agent is None else self._agent(operation)
        decide = deciding(operation, agent, self._clock.now(), self._settler.handing.rank)
        before = await self._ledger.load(operation.pending)
        results = await self._settler.settle([Intent(task_id, decide) for task_id in operation.pending])
        after = [task for task in results if isinstance(task, Task)]
        if operation.verb == "cancel":
            await self._settler.tell_cancelled([task.id for task in after if not task.final])
        lanes = {task.id: task.lane for task in after if not task.final and task.hold is None}
        await self._control.withdrawn(
            [task for task in before if task is not None and task.waits and lanes.get(task.id) != task.lane]
        )
        return [result if isinstance(result, Problem) else None for result in results]

    def _agent(self, operation: Operation) -> Agent | None:
        found = self._manager.registry.by_id(operation.agent or "")
        return found if found is not None and found.tenant == operation.tenant else None

    async def _anew(self, operation: Operation, task_id: str) -> Problem | None:
        actor = Actor(id=operation.created_by, kind="user", tenant=operation.tenant)
        try:
            if operation.verb == "discard":
                await self._dead_letters.discarded(actor, task_id, operation.reason, since=operation.created_at)
                return None
            origin = Origin(protocol="operation", request_id=operation.id, principal=operation.created_by)
            # The same task for the same operation: done again after a crash, it is there already.
            new_id = derived_id("task", operation.id, task_id)
            await self._dead_letters.again(
                actor, task_id, origin, new_id, dead=operation.verb == "replay", rejoin=operation.rejoin
            )
        except Problem as problem:
            if problem.status >= 500:
                raise
            return problem
        return None

    async def forget(self, before: int) -> int:
        """Remove operations that ended before a moment, a bounded batch; returns how many."""
        rows = await self._store.find(
            _KIND, Query(where=[Where("finished", "lt", before)], order="finished", limit=_BATCH)
        )
        if rows:
            await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in rows])
        return len(rows)
