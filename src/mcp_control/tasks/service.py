"""TaskOrchestrator: the verbs for tasks that every door calls (seed, "Task Orchestration Service")."""

import asyncio
import builtins
from collections.abc import Sequence
from typing import Final

import msgspec

from mcp_control.agents.matching import misfit
from mcp_control.agents.service import AgentManager
from mcp_control.agents.sessions import Session
from mcp_control.kernel.changes import Query, StoredFact, Where
from mcp_control.kernel.clock import Clock, to_millis
from mcp_control.kernel.errors import (
    BudgetExhausted,
    Duplicate,
    IdempotencyMismatch,
    NotFound,
    Problem,
    Unroutable,
)
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Queue, Store
from mcp_control.tasks.children import child_of, origin_of
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.explain import explain
from mcp_control.tasks.explaining import Explainer
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.keyed import KeyedSubmission, is_keyed
from mcp_control.tasks.lanes import demand_of, lane_key
from mcp_control.tasks.ledger import Group, Ledger, Waiters
from mcp_control.tasks.listing import TaskFilter, page
from mcp_control.tasks.model import FINAL_STATES, LogChunk, Origin, Task, TaskSpec, TaskState
from mcp_control.tasks.records import key_of, read_log, readable, view
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.spending import NO_LINEAGE, Lineage, Spending
from mcp_control.tasks.submission import check, digest_of, priority_number, share_of
from mcp_control.tasks.view_model import Explanation, TaskView

WAIT_MAX_SECONDS: Final = 60.0
_ENDED: Final = frozenset(f"task.{state.value}" for state in FINAL_STATES)


# Keeps the place of each answer until it is known.
_NOT_YET: Final = NotFound()


class Submitted(msgspec.Struct, frozen=True, gc=False):
    """A submission's task, whether it was created now or by an earlier request with the same key, and warnings."""

    task: Task
    created: bool
    warnings: list[str] = []


class TaskOrchestrator:
    """Accepts tasks and answers questions about them. What changes them on request is `control.TaskControl`."""

    def __init__(
        self,
        store: Store,
        queue: Queue,
        clock: Clock,
        ids: IdSource,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        history: TaskHistory,
        spending: Spending,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._manager = manager
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self._spending = spending
        self._history = history
        self._explainer = Explainer(store, queue, clock, manager, dispatcher, history)
        self._waiters = Waiters()
        self.keyed: KeyedSubmission | None = None
        ledger.finished.append(self._waiters.ended)

    async def submit(
        self, actor: Actor, specs: Sequence[TaskSpec], origin: Origin
    ) -> builtins.list[Submitted | Problem]:
        """Accept submissions, each on its own; durable on return. The order of the answers is that of the submissions.

        A submission whose key was used before returns the task of then; `IdempotencyMismatch` if it asked for something else.

        Raises:
            StoreUnavailable, StorageFull, Overloaded: nothing was accepted.
            OutcomeUnknown: repeat with the same keys.
        """
        allow(actor, "tasks.submit")
        return await self._submit(actor, specs, origin)

    async def submit_child(
        self, actor: Actor, parent_id: str, lease_token: str, spec: TaskSpec, origin: Origin
    ) -> Submitted:
        """Accept a task that an agent submits for one it works on: a level deeper, and paid from the same budgets.

        Raises:
            NotFound: there is no such task.
            LeaseSuperseded: the agent does not hold it under this lease.
            Invalid, BudgetExhausted, Unroutable, IdempotencyMismatch: the child is not accepted.
        """
        allow(actor, "tasks.submit_child", parent_id)
        (parent,) = await self._ledger.load([parent_id], fresh=True)
        if parent is None or parent.tenant != actor.tenant:
            raise NotFound("no such task")
        child = child_of(parent, actor.id, lease_token, spec)
        (found,) = await self._submit(actor, [child], origin_of(parent, origin))
        if isinstance(found, Problem):
            raise found
        return found

    async def _submit(
        self, actor: Actor, specs: Sequence[TaskSpec], origin: Origin
    ) -> builtins.list[Submitted | Problem]:
        now = self._clock.now()
        results: builtins.list[Submitted | Problem] = [_NOT_YET] * len(specs)
        vetted = await self.vet(actor, specs, origin, now)
        started: builtins.list[tuple[Task, bytes, Session | None]] = []
        groups: builtins.list[Group] = []
        places: builtins.list[int] = []
        warnings: builtins.list[builtins.list[str]] = []
        for place, (spec, found) in enumerate(zip(specs, vetted, strict=True)):
            if isinstance(found, Problem):
                results[place] = found
                continue
            above, warned = found
            new = NewTask(id=self._ids.new("task"), spec=spec, links=above.links, origin=origin, draws=above.draws)
            if is_keyed(spec):
                results[place] = await self._submit_keyed(actor, new, warned)
                continue
            task, payload, session, move = self._settler.handing.create(new, now, actor.tenant, actor.id)
            started.append((task, payload, session))
            groups.append(Group([move]))
            places.append(place)
            warnings.append(warned)
        if not groups:
            return results
        try:
            outcomes = await self._ledger.commit(groups)
        except BaseException:
            self._settler.handing.doubt(
                [task.id for task, _, _ in started], [(session, task.id) for task, _, session in started if session]
            )
            raise
        accepted: builtins.list[tuple[Task, bytes, Session | None]] = []
        for place, (task, payload, session), warned, outcome in zip(places, started, warnings, outcomes, strict=True):
            if not isinstance(outcome, Problem):
                accepted.append((outcome[0], payload, session))
                results[place] = Submitted(outcome[0], True, warned)
                continue
            if session is not None:
                self._dispatcher.unreserve(session, task.id)
            results[place] = (
                await self._repeated(actor, specs[place], outcome) if isinstance(outcome, Duplicate) else outcome
            )
        await self._settler.handing.begin(accepted)
        return results

    async def vet(
        self, actor: Actor, specs: Sequence[TaskSpec], origin: Origin, now: int
    ) -> builtins.list[tuple[Lineage, builtins.list[str]] | Problem]:
        """Return for each submission what it inherits from the task it is done for, with warnings, or why it is not accepted."""
        if hurried := {spec.type for spec in specs if spec.deadline is not None}:
            await self._history.learn(actor.tenant, hurried)
        parents = [spec.parent_id for spec in specs if spec.parent_id is not None]
        lineage = await self._spending.lineage(actor.tenant, parents) if parents else {}
        found: builtins.list[tuple[Lineage, builtins.list[str]] | Problem] = []
        for spec in specs:
            above = NO_LINEAGE if spec.parent_id is None else lineage.get(spec.parent_id, NO_LINEAGE)
            try:
                check(spec, now)
                if above.accounts:
                    await self._affordable(actor, spec, origin, above)
                found.append((above, self._routable(actor.tenant, spec) + self._late(actor.tenant, spec, now)))
            except Problem as problem:
                found.append(problem)
        return found

    async def _submit_keyed(self, actor: Actor, new: NewTask, warned: builtins.list[str]) -> Submitted | Problem:
        assert self.keyed is not None
        try:
            kept = await self.keyed.submit(actor, new)
        except Duplicate as duplicate:
            return await self._repeated(actor, new.spec, duplicate)
        except Problem as problem:
            return problem
        return Submitted(kept.task, kept.created, warned)

    async def _affordable(self, actor: Actor, spec: TaskSpec, origin: Origin, above: Lineage) -> None:
        """Raise BudgetExhausted where what is above a task allows none; a submission that was accepted before is repeated all the same."""
        try:
            above.check()
        except BudgetExhausted:
            key = key_of(actor.tenant, origin.principal, spec.idempotency_key)
            if key is None or not await self._store.count("task", [Where("unique_key", "eq", key)], 1):
                raise

    async def _repeated(self, actor: Actor, spec: TaskSpec, duplicate: Duplicate) -> Submitted | Problem:
        found = (await self._ledger.load([str(duplicate.data["existing"])], fresh=True))[0]
        if found is None:
            return duplicate
        if found.digest != digest_of(spec):
            return IdempotencyMismatch("this idempotency key was used for another submission")
        return Submitted(found, False)

    def _routable(self, tenant: str, spec: TaskSpec) -> builtins.list[str]:
        """Return a warning where no registered agent could ever take the task; raise Unroutable if the caller asked for that."""
        lane = lane_key(
            tenant, spec.type, spec.type_version, spec.needs, priority_number(spec.priority) or 0, share_of(spec)
        )
        known = self._dispatcher.known(lane)
        if known is not None and known.sessions:
            return []
        task = _probe(tenant, spec, lane)
        demand = demand_of(task)
        if any(misfit(agent_id, agent, demand) is None for agent_id, agent in self._manager.registry.known(tenant)):
            return []
        message = f"no registered agent can take a task of type {spec.type} with these needs"
        if spec.on_unroutable == "reject":
            raise Unroutable(message)
        return [message]

    def _late(self, tenant: str, spec: TaskSpec, now: int) -> builtins.list[str]:
        """Return a warning where the deadline is nearer than tasks of the type usually take."""
        if spec.deadline is None:
            return []
        expected = self._history.expected(tenant, spec.type)
        begins = now if spec.run_at is None else max(now, to_millis(spec.run_at))
        if begins + expected <= to_millis(spec.deadline):
            return []
        return [f"tasks of type {spec.type} usually take {expected / 1000:.3g} s; the deadline is sooner"]

    async def get(self, actor: Actor, ids: Sequence[str], cold: Sequence[str] = ()) -> builtins.list[TaskView | None]:
        """Return tasks in the order of the ids, None where there is none for this actor; `cold` may name payload and result."""
        allow(actor, "tasks.get")
        now = self._clock.now()
        if not cold:
            tasks = await self._ledger.load(ids, fresh=True)
            return [view(task, now) if task and task.tenant == actor.tenant else None for task in tasks]
        views: builtins.list[TaskView | None] = []
        for entity in await self._store.get("task", ids, cold):
            task = readable(entity) if entity else None
            if entity is None or task is None or task.tenant != actor.tenant:
                views.append(None)
            else:
                views.append(view(task, now, entity.cold.get("payload"), entity.cold.get("result")))
        return views

    async def one(self, actor: Actor, task_id: str) -> Task:
        """Return a task. Raises NotFound, the same for one that is not there and one of another tenant."""
        allow(actor, "tasks.get", task_id)
        task = (await self._ledger.load([task_id], fresh=True))[0]
        if task is None or task.tenant != actor.tenant:
            raise NotFound("no such task")
        return task

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that tasks became final, by whatever server. Called with all facts, on the loop."""
        if self._waiters:
            for stored in facts:
                if stored.fact.type in _ENDED:
                    self._waiters.ended(stored.fact.subject)

    async def wait(self, actor: Actor, task_id: str, seconds: float) -> None:
        """Return when the task is final, or after so many seconds. Raises NotFound."""
        future = self._waiters.expect(task_id)
        try:
            task = await self.one(actor, task_id)
            if not task.final:
                async with asyncio.timeout(min(seconds, WAIT_MAX_SECONDS)):
                    await future
        except TimeoutError:
            return
        finally:
            self._waiters.abandon(task_id, future)

    async def list(
        self, actor: Actor, wanted: TaskFilter, *, cursor: str | None = None, limit: int = 50
    ) -> Page[TaskView]:
        """Return a page of tasks that match, newest first unless asked otherwise; without payloads and results."""
        allow(actor, "tasks.list")
        return await page(self._store, actor.tenant, wanted, self._clock.now(), cursor, limit)

    async def explain(self, actor: Actor, task_id: str) -> Explanation:
        """Return the first reason why a task is not running."""
        allow(actor, "tasks.explain", task_id)
        task = await self.one(actor, task_id)
        if task.waits:
            return await self._explainer.explain(task)
        found = explain(task, demand_of(task), [], None)
        if task.state is not TaskState.BLOCKED or self.keyed is None:
            return found
        return await self._explainer.blocked(task, found, self.keyed.limits)

    async def logs(self, actor: Actor, task_id: str, after: int = 0, limit: int = 1000) -> builtins.list[LogChunk]:
        """Return what a task logged from line number `after` on, about `limit` lines."""
        allow(actor, "tasks.logs", task_id)
        await self.one(actor, task_id)
        chunks: builtins.list[LogChunk] = []
        lines = 0
        # A chunk that begins before `after` may reach beyond it, so the one before counts too.
        before = Query(
            where=[Where("task", "eq", task_id), Where("first", "le", after)], order="first", descending=True, limit=1
        )
        head = await self._store.find("log", before)
        rest = Query(where=[Where("task", "eq", task_id), Where("first", "gt", after)], order="first", limit=200)
        for entity in [*head, *await self._store.find("log", rest)]:
            chunk = read_log(entity)
            kept = chunk.lines[max(0, after - chunk.first) :][: limit - lines]
            if kept:
                chunks.append(LogChunk(task_id=task_id, first=max(after, chunk.first), lines=kept))
                lines += len(kept)
            if lines >= limit:
                break
        return chunks


def _probe(tenant: str, spec: TaskSpec, lane: str) -> Task:
    return Task(
        id="",
        version=0,
        tenant=tenant,
        type=spec.type,
        type_version=spec.type_version,
        state=TaskState.QUEUED,
        state_at=0,
        created_at=0,
        lane=lane,
        order=0,
        needs=spec.needs,
    )
