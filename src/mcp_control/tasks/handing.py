"""Handing out: giving new and queued tasks to agents, and finding those again whose commit is in doubt."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Final, Protocol

import structlog

from mcp_control.agents.reserving import load_of
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.background import Background
from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.tasks.budget_model import Over
from mcp_control.tasks.budgets import CODE, opening
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.gating import gated
from mcp_control.tasks.ledger import Group, Ledger, Move
from mcp_control.tasks.limit_model import Gate
from mcp_control.tasks.model import Task, TaskSpec, TaskState
from mcp_control.tasks.ranking import ORDER_SHIFT, ORDER_STEP, POINT_MS, Expected, rank_of, unknown
from mcp_control.tasks.records import assignment, task_fact
from mcp_control.tasks.submission import new_task
from mcp_control.tasks.transitions import assign
from mcp_control.tasks.wire import Cancel, Tasks

_log = structlog.get_logger(__name__)
_PAUSE_SECONDS: Final = 0.2
GiveBack = Callable[[str, Sequence[str]], Coroutine[None, None, None]]
Created = tuple[Task, bytes, Session | None, Move]


class Gates(Protocol):
    """What stands before the lanes: limits (`limits.py`)."""

    def applying(self, tenant: str, spec: TaskSpec) -> list[Gate]:
        """Return the limits of a new task."""
        ...

    def wake(self, task: Task) -> None:
        """Look at a blocked task soon: it was committed by this server just now."""
        ...


class Budgets(Protocol):
    """What must be asked before a task is given out that draws from budgets (`spending.py`)."""

    async def begin(self, moves: Sequence[Move]) -> list[Task | Over | Problem]:
        """Commit new attempts as far as something is left; returns each as it is now, or why not."""
        ...

    async def refuse(self, over: Mapping[str, Over]) -> None:
        """Keep waiting tasks from being given out that have nothing left."""
        ...


class Handing:
    """Creates tasks, assigns them, sends them.

    Attributes:
        background: for what happens beside the calls; its owner closes it.

    Args:
        give_back: queues tasks again that an instance will not come back for.
        generation: of the fences of new tasks. The id of a stage's task is derived from its run, so after a restore it may name a task
            that had a holder in the history that was lost.
        point_ms: what a point of priority is worth, in milliseconds of waiting.
        expected: how long tasks of a type usually take.
    """

    def __init__(
        self,
        ledger: Ledger,
        sessions: Sessions,
        dispatcher: Dispatcher,
        clock: Clock,
        ids: IdSource,
        give_back: GiveBack,
        generation: int = 1,
        point_ms: int = POINT_MS,
        expected: Expected = unknown,
    ) -> None:
        self._ledger = ledger
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._clock = clock
        self._ids = ids
        self._give_back = give_back
        self._generation = generation
        self._point_ms = point_ms
        self._expected = expected
        self._order = 0
        self.background = Background("handing")
        self.gates: Gates | None = None
        self.budgets: Budgets | None = None

    def order(self, now: int) -> int:
        """Return the next place in line: grows with time and from call to call."""
        self._order = max(self._order + ORDER_STEP, now << ORDER_SHIFT)
        return self._order

    def rank(self, task: Task) -> int:
        """Return the rank a task has with its priority and deadline."""
        expected_ms = 0 if task.deadline_at is None else self._expected(task.tenant, task.type)
        return rank_of(task.order, task.priority, task.deadline_at, expected_ms, self._point_ms)

    def create(
        self, new: NewTask, now: int, tenant: str = "default", actor: str = "system", *, place: bool = True
    ) -> tuple[Task, bytes, Session | None, Move]:
        """Build a new task, given to an idle agent at once where one is free; the caller commits the move and then calls `begin`."""
        payload = bytes(new.spec.payload)
        task = new_task(
            new.spec,
            task_id=new.id,
            tenant=tenant,
            origin=new.origin,
            now=now,
            order=self.order(now),
            links=new.links,
            draws=new.draws,
            generation=self._generation,
            expected_ms=0 if new.spec.deadline is None else self._expected(tenant, new.spec.type),
            point_ms=self._point_ms,
        )
        if self.gates is not None and (gates := self.gates.applying(tenant, new.spec)):
            task = gated(task, gates, now)
        facts = [task_fact(f"task.{task.state}", task, actor, now)]
        # What draws from a budget is looked at before it is given out.
        session = self._dispatcher.place(task) if place and task.state is TaskState.QUEUED and not task.draws else None
        if session is not None:
            task = assign(task, session.agent.id, session.instance.id, self._ids.secret(), now)
            facts.append(task_fact("task.assigned", task, "system", now))
        opened = [] if new.spec.budget is None else [opening(task, new.spec.budget)]
        return task, payload, session, Move(task, facts, payload=payload, writes=opened)

    def blocked(self, task: Task) -> None:
        """Hear of a committed task; one that waits for its limits is looked at soon."""
        if task.state is TaskState.BLOCKED and self.gates is not None:
            self.gates.wake(task)

    async def begin(self, started: Sequence[tuple[Task, bytes, Session | None]]) -> None:
        """Send committed tasks to the sessions chosen for them, put the others in their lanes."""
        frames: dict[Session, list[tuple[Task, bytes]]] = {}
        queued: list[Task] = []
        for task, payload, session in started:
            if session is not None:
                frames.setdefault(session, []).append((task, payload))
            elif task.state is TaskState.QUEUED:
                queued.append(task)
            else:
                self.blocked(task)
        for chosen, tasks in frames.items():
            # The instance may have reconnected while this was committed: its present session gets the frame.
            session = self._sessions.get(chosen.instance.id)
            if session is not None:
                for task, _ in tasks:
                    if task.id not in session.held:
                        session.hold(task.id, load_of(task.needs.slots, task.needs.resources), task.type)
                session.send([Tasks(tasks=[assignment(task, payload) for task, payload in tasks])])
            elif chosen.leaving:
                # It left while this was committed and will not come back for them.
                self.background.begin(self._give_back(chosen.instance.id, [task.id for task, _ in tasks]))
        if queued:
            await self._dispatcher.enqueue(queued)

    async def launch(
        self,
        created: Sequence[tuple[Task, bytes, Session | None, Move]],
        writes: Sequence[Entity] = (),
        facts: Sequence[Fact] = (),
    ) -> None:
        """Commit new tasks in one change with what belongs to them, and start them.

        Raises:
            Problem: they were not accepted; after OutcomeUnknown they may have been.
        """
        started = [(task, payload, session) for task, payload, session, _ in created]
        try:
            outcome = (await self._ledger.commit([Group([move for *_, move in created], writes, facts)]))[0]
        except BaseException:
            self.doubt(
                [task.id for task, _, _ in started], [(session, task.id) for task, _, session in started if session]
            )
            raise
        if isinstance(outcome, Problem):
            for task, _, session in started:
                if session is not None:
                    self._dispatcher.unreserve(session, task.id)
            raise outcome
        await self.begin(started)

    async def hand_out(self, pairs: list[tuple[str, Session]]) -> None:
        """Assign queued tasks to the sessions whose slots were reserved for them, and send them. Does not raise."""
        now = self._clock.now()
        try:
            loaded = await self._ledger.load_with_payload([task_id for task_id, _ in pairs], lambda task: task.waits)
            moves: list[Move] = []
            given: list[tuple[Task, bytes, Session | None]] = []
            drawing: list[tuple[Move, bytes, Session]] = []
            for (task_id, session), found in zip(pairs, loaded, strict=True):
                if found is None or not found[0].waits:
                    self._dispatcher.unreserve(session, task_id)
                    if found is not None:
                        self.resend(*found)
                    continue
                task = assign(found[0], session.agent.id, session.instance.id, self._ids.secret(), now)
                move = Move(task, [task_fact("task.assigned", task, "system", now)])
                if task.draws:
                    drawing.append((move, found[1], session))
                    continue
                moves.append(move)
                given.append((task, found[1], session))
            if drawing:
                self.background.begin(self._hand_out_drawing(drawing))
            outcomes = await self._ledger.commit([Group([move]) for move in moves]) if moves else []
        except Exception as error:
            _log.warning("tasks.hand_out_failed", error=repr(error), tasks=len(pairs))
            self.doubt([task_id for task_id, _ in pairs], [(session, task_id) for task_id, session in pairs])
            return
        lost: list[tuple[Session, str]] = []
        sent: list[tuple[Task, bytes, Session | None]] = []
        for item, outcome in zip(given, outcomes, strict=True):
            if not isinstance(outcome, Problem):
                sent.append(item)
            elif item[2] is not None:
                lost.append((item[2], item[0].id))
        await self.begin(sent)
        for session, task_id in lost:
            self._dispatcher.unreserve(session, task_id)
        self.doubt([task_id for _, task_id in lost])

    async def _hand_out_drawing(self, items: list[tuple[Move, bytes, Session]]) -> None:
        """Assign tasks that draw from budgets, as far as something is left of them."""
        ids = [move.after.id for move, _, _ in items]
        try:
            if self.budgets is None:
                raise RuntimeError("nobody keeps the budgets")
            outcomes = await self.budgets.begin([move for move, _, _ in items])
        except Exception as error:
            _log.warning("tasks.hand_out_failed", error=repr(error), tasks=len(items))
            self.doubt(ids, [(session, move.after.id) for move, _, session in items])
            return
        sent = [(each, item[1], item[2]) for each, item in zip(outcomes, items, strict=True) if isinstance(each, Task)]
        await self.begin(sent)
        over: dict[str, Over] = {}
        lost: list[str] = []
        for each, (move, _, session) in zip(outcomes, items, strict=True):
            if not isinstance(each, Task):
                self._dispatcher.unreserve(session, move.after.id)
                if isinstance(each, Over):
                    over[move.after.id] = each
                else:
                    lost.append(move.after.id)
        self.doubt(lost)
        if over:
            try:
                await self.budgets.refuse(over)
            except Problem as problem:
                _log.warning("tasks.refusing_failed", code=problem.code, tasks=len(over))
                self.doubt(list(over))

    def doubt(self, ids: Sequence[str], reserved: Sequence[tuple[Session, str]] = ()) -> None:
        """Look tasks up again whose commit failed or may have failed, once the store answers; they must not be forgotten.

        Slots reserved for them stay so until then: the agent may hold them after all.
        """
        if ids:
            self.background.begin(self._recover(list(ids), list(reserved)))

    async def _recover(self, ids: list[str], reserved: list[tuple[Session, str]]) -> None:
        while True:
            await asyncio.sleep(_PAUSE_SECONDS)
            self._ledger.forget(ids)
            try:
                found = await self._ledger.load_with_payload(ids)
            except Problem:
                continue
            break
        for session, task_id in reserved:
            self._dispatcher.unreserve(session, task_id)
        queued: list[Task] = []
        for entry in found:
            if entry is None:
                continue
            self.free_slot(entry[0])
            if entry[0].waits:
                queued.append(entry[0])
            else:
                self.blocked(entry[0])
                self.resend(*entry)
        if queued:
            await self._dispatcher.enqueue(queued)

    def resend(self, task: Task, payload: bytes) -> None:
        """Send an assignment that was committed although nobody was told so."""
        session = None if task.lease is None else self._sessions.get(task.lease.instance_id)
        if session is None or task.id in session.held:
            return
        session.hold(task.id, load_of(task.needs.slots, task.needs.resources), task.type)
        if task.state is TaskState.ASSIGNED:
            session.send([Tasks(tasks=[assignment(task, payload)])])

    def free_slot(self, task: Task) -> None:
        """Free the slot of a lease that has ended."""
        if task.lease is None and task.attempts:
            session = self._sessions.get(task.attempts[-1].instance_id)
            if session is not None and task.id in session.held:
                self._dispatcher.unreserve(session, task.id)
                if task.attempts[-1].outcome == "budget":
                    session.send([Cancel(task_ids=[task.id], reason=CODE)])
