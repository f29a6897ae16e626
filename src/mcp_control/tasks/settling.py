"""Settling: deciding a task's next value, committing it, and doing what follows.

Every verb that changes a task that is there goes through `Settler.settle`. A conflict means that somebody was faster: load and decide
again. A task of a run that becomes final is committed together with the run's advance (decisions, "Server"), for one run at a time, so
that what finishes while one advance is committed goes into the next one.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, NotFound, OutcomeUnknown, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import Advance, Finished, Follower, NewTask
from mcp_control.tasks.ledger import Group, Intent, Ledger, Move
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.records import assignment, task_fact
from mcp_control.tasks.submission import new_task
from mcp_control.tasks.transitions import assign
from mcp_control.tasks.verbs import cancelling, releasing
from mcp_control.tasks.wire import Cancel, Tasks

_log = structlog.get_logger(__name__)
ORDER_SHIFT: Final = 20  # a place in line is wall milliseconds, shifted, so that places of one millisecond differ
_TRIES: Final = 20
_PAUSE_SECONDS: Final = 0.2


class _Waiting(msgspec.Struct):
    intent: Intent
    future: asyncio.Future[Task]


class Settler:
    """Commits decisions on tasks, moves runs on, and hands out what came of it."""

    def __init__(self, ledger: Ledger, sessions: Sessions, dispatcher: Dispatcher, clock: Clock, ids: IdSource) -> None:
        self._ledger = ledger
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._clock = clock
        self._ids = ids
        self._busy: dict[str, list[_Waiting]] = {}
        self._order = 0
        self._background: set[asyncio.Task[None]] = set()
        self.follower: Follower | None = None

    def order(self, now: int) -> int:
        """Return the next place in line: grows with time and from call to call."""
        self._order = max(self._order + 1, now << ORDER_SHIFT)
        return self._order

    async def settle(self, intents: Sequence[Intent]) -> list[Task | Problem]:
        """Carry out intents, each on its own; returns the task after it, or the problem, in their order.

        Raises:
            StoreUnavailable, StorageFull, OutcomeUnknown, Overloaded: of the store, for the whole call.
        """
        results: list[Task | Problem] = [NotFound("no such task")] * len(intents)
        left = list(range(len(intents)))
        for _ in range(_TRIES):
            tasks = await self._ledger.load([intents[place].task_id for place in left])
            plain: list[tuple[int, Move]] = []
            runs: dict[str, list[int]] = {}
            for place, task in zip(left, tasks, strict=True):
                if task is None:
                    continue
                try:
                    move = intents[place].decide(task)
                except Problem as problem:
                    results[place] = problem
                    continue
                if move is None:
                    results[place] = task
                elif self.follower is not None and move.after.final and move.after.links.run_id:
                    runs.setdefault(move.after.links.run_id, []).append(place)
                else:
                    plain.append((place, move))
            left = []
            if plain and runs:
                left, _ = await asyncio.gather(self._commit(plain, results), self._follow(runs, intents, results))
            elif plain:
                left = await self._commit(plain, results)
            elif runs:
                await self._follow(runs, intents, results)
            if not left:
                return results
        for place in left:
            results[place] = Conflict("too many changes at once")
        return results

    async def _commit(self, moves: Sequence[tuple[int, Move]], results: list[Task | Problem]) -> list[int]:
        """Commit moves that concern no run; returns the places that conflicted."""
        try:
            outcomes = await self._ledger.commit([Group([move]) for _, move in moves])
        except BaseException:
            # It may have happened all the same: a task that is queued now must not be forgotten, nor a slot that is free.
            self.doubt([move.after.id for _, move in moves])
            raise
        conflicted: list[int] = []
        requeued: list[Task] = []
        for (place, move), outcome in zip(moves, outcomes, strict=True):
            if isinstance(outcome, Conflict):
                conflicted.append(place)
            elif outcome is not None:
                results[place] = outcome
            else:
                results[place] = self._after(move.after)
                if move.after.state is TaskState.QUEUED:
                    requeued.append(move.after)
        if requeued:
            await self._dispatcher.enqueue(requeued)
        return conflicted

    async def _follow(
        self, runs: dict[str, list[int]], intents: Sequence[Intent], results: list[Task | Problem]
    ) -> None:
        """Settle final moves together with their runs' advance; whoever finds a run busy leaves the intent to the one at work."""
        loop = asyncio.get_running_loop()
        waiting: list[tuple[int, asyncio.Future[Task]]] = []
        mine: dict[str, list[_Waiting]] = {}
        for run_id, places in runs.items():
            entries = [_Waiting(intents[place], loop.create_future()) for place in places]
            waiting += [(place, entry.future) for place, entry in zip(places, entries, strict=True)]
            if run_id in self._busy:
                self._busy[run_id] += entries
            else:
                self._busy[run_id] = []
                mine[run_id] = entries
        if mine:
            await self._work_off(mine)
        for place, future in waiting:
            try:
                results[place] = await future
            except Problem as problem:
                if problem.status >= 500:
                    raise
                results[place] = problem

    async def _work_off(self, mine: dict[str, list[_Waiting]]) -> None:
        tries = 0
        try:
            while mine:
                conflicted = await self._advance(mine)
                tries = tries + 1 if conflicted else 0
                following: dict[str, list[_Waiting]] = {}
                for run_id, entries in mine.items():
                    again = entries if run_id in conflicted and tries < _TRIES else []
                    if run_id in conflicted and not again:
                        _fail(entries, Conflict("too many changes at once"))
                    again = [*again, *self._busy[run_id]]
                    if again:
                        self._busy[run_id] = []
                        following[run_id] = again
                    else:
                        del self._busy[run_id]
                mine = following
        except BaseException as error:
            # Nobody may wait for ever: whoever left an intent here hears of the failure too, but is not cancelled with this caller.
            told = error if isinstance(error, Exception) else OutcomeUnknown()
            for run_id, entries in mine.items():
                _fail([*entries, *self._busy.pop(run_id, [])], told)
            raise

    async def _advance(self, mine: dict[str, list[_Waiting]]) -> set[str]:
        """Commit one advance for each of these runs; returns the runs that conflicted."""
        follower = self.follower
        if follower is None:
            raise RuntimeError("no follower")
        now = self._clock.now()
        batch: list[
            tuple[str, list[tuple[_Waiting, Task]], Advance, Group, list[tuple[Task, bytes, Session | None]]]
        ] = []
        for run_id, entries in mine.items():
            tasks = await self._ledger.load([entry.intent.task_id for entry in entries])
            moves: list[Move] = []
            done: list[tuple[_Waiting, Task]] = []
            seen: set[str] = set()
            for entry, task in zip(entries, tasks, strict=True):
                try:
                    if task is None:
                        raise NotFound("no such task")
                    if task.id in seen:
                        # Two intents for one task: the second is decided on what the first leaves.
                        self._busy[run_id].append(entry)
                        continue
                    move = entry.intent.decide(task)
                except Problem as problem:
                    _fail([entry], problem)
                    continue
                if move is None:
                    _set(entry.future, task)
                    continue
                seen.add(task.id)
                moves.append(move)
                done.append((entry, move.after))
            if not moves:
                continue
            finished = [Finished(task=move.after, result=move.result) for move in moves if move.after.final]
            advance = await follower.follow(run_id, finished, now)
            group, started = self._group(moves, advance, now)
            batch.append((run_id, done, advance, group, started))
        if not batch:
            return set()
        started_all = [item for *_, started in batch for item in started]
        try:
            outcomes = await self._ledger.commit([group for *_, group, _ in batch])
        except BaseException:
            for run_id, _, advance, _, _ in batch:
                follower.settled(run_id, advance, False)
            self.doubt(
                [task.id for task, _, _ in started_all] + [after.id for _, done, *_ in batch for _, after in done],
                [(session, task.id) for task, _, session in started_all if session],
            )
            raise
        conflicted: set[str] = set()
        for (run_id, done, advance, _, started), outcome in zip(batch, outcomes, strict=True):
            follower.settled(run_id, advance, outcome is None)
            if outcome is None:
                for entry, after in done:
                    _set(entry.future, self._after(after))
                await self.begin(started)
                if advance.cancel:
                    self._later(self._cancel(advance.cancel))
            else:
                for task, _, session in started:
                    if session is not None:
                        self._dispatcher.unreserve(session, task.id)
                if isinstance(outcome, Conflict):
                    conflicted.add(run_id)
                else:
                    _fail([entry for entry, _ in done], outcome)
        return conflicted

    def _after(self, task: Task) -> Task:
        """Free the slot of a lease that has ended, and return the task with the version it has in the store now."""
        self._free_slot(task)
        return replace(task, version=task.version + 1)

    def _free_slot(self, task: Task) -> None:
        if task.lease is None and task.attempts:
            session = self._sessions.get(task.attempts[-1].instance_id)
            if session is not None and task.id in session.held:
                self._dispatcher.unreserve(session, task.id)

    def _group(
        self, moves: Sequence[Move], advance: Advance, now: int
    ) -> tuple[Group, list[tuple[Task, bytes, Session | None]]]:
        started: list[tuple[Task, bytes, Session | None]] = []
        new_moves: list[Move] = []
        for new in advance.submit:
            task, payload, session, move = self.create(new, now)
            started.append((task, payload, session))
            new_moves.append(move)
        return Group([*moves, *new_moves], advance.writes, advance.facts), started

    def create(
        self, new: NewTask, now: int, tenant: str = "default", actor: str = "system"
    ) -> tuple[Task, bytes, Session | None, Move]:
        """Build a new task, given to an idle agent at once where one is free; the caller commits the move and then calls `begin`."""
        payload = bytes(new.spec.payload)
        task = new_task(
            new.spec, task_id=new.id, tenant=tenant, origin=new.origin, now=now, order=self.order(now), links=new.links
        )
        kind = "task.queued" if task.state is TaskState.QUEUED else "task.scheduled"
        facts = [task_fact(kind, task, actor, now)]
        session = self._dispatcher.place(task) if task.state is TaskState.QUEUED else None
        if session is not None:
            task = assign(task, session.agent.id, session.instance.id, self._ids.secret(), now)
            facts.append(task_fact("task.assigned", task, "system", now))
        return task, payload, session, Move(task, facts, payload=payload)

    async def begin(self, started: Sequence[tuple[Task, bytes, Session | None]]) -> None:
        """Send committed tasks to the sessions chosen for them, put the others in their lanes."""
        frames: dict[Session, list[tuple[Task, bytes]]] = {}
        queued: list[Task] = []
        for task, payload, session in started:
            if session is not None:
                frames.setdefault(session, []).append((task, payload))
            elif task.state is TaskState.QUEUED:
                queued.append(task)
        for chosen, tasks in frames.items():
            # The instance may have reconnected while this was committed: its present session gets the frame.
            session = self._sessions.get(chosen.instance.id)
            if session is not None:
                session.held.update(task.id for task, _ in tasks)
                session.send([Tasks(tasks=[assignment(task, payload) for task, payload in tasks])])
            elif chosen.leaving:
                # It left while this was committed and will not come back for them.
                self._later(self._take_back(chosen.instance.id, [task.id for task, _ in tasks]))
        if queued:
            await self._dispatcher.enqueue(queued)

    async def apply(self, run_id: str, advance: Advance, tenant: str, actor: str) -> None:
        """Commit an advance of a run that no task caused, and start its tasks.

        Raises:
            Conflict: the run was changed meanwhile; the engine decides again.
        """
        now = self._clock.now()
        await self.launch(
            [self.create(new, now, tenant, actor) for new in advance.submit], advance.writes, advance.facts
        )
        if advance.cancel:
            self._later(self._cancel(advance.cancel))

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
        if outcome is not None:
            for task, _, session in started:
                if session is not None:
                    self._dispatcher.unreserve(session, task.id)
            raise outcome
        await self.begin(started)

    async def hand_out(self, pairs: list[tuple[str, Session]]) -> None:
        """Assign queued tasks to the sessions whose slots were reserved for them, and send them. Does not raise."""
        now = self._clock.now()
        try:
            loaded = await self._ledger.load_with_payload([task_id for task_id, _ in pairs])
            moves: list[Move] = []
            given: list[tuple[Task, bytes, Session | None]] = []
            for (task_id, session), found in zip(pairs, loaded, strict=True):
                if found is None or found[0].state is not TaskState.QUEUED:
                    self._dispatcher.unreserve(session, task_id)
                    if found is not None:
                        self._resend(*found)
                    continue
                task = assign(found[0], session.agent.id, session.instance.id, self._ids.secret(), now)
                moves.append(Move(task, [task_fact("task.assigned", task, "system", now)]))
                given.append((task, found[1], session))
            outcomes = await self._ledger.commit([Group([move]) for move in moves]) if moves else []
        except Exception as error:
            _log.warning("tasks.hand_out_failed", error=repr(error), tasks=len(pairs))
            self.doubt([task_id for task_id, _ in pairs], [(session, task_id) for task_id, session in pairs])
            return
        lost: list[tuple[Session, str]] = []
        sent: list[tuple[Task, bytes, Session | None]] = []
        for item, outcome in zip(given, outcomes, strict=True):
            if outcome is None:
                sent.append(item)
            elif item[2] is not None:
                lost.append((item[2], item[0].id))
        await self.begin(sent)
        for session, task_id in lost:
            self._dispatcher.unreserve(session, task_id)
        self.doubt([task_id for _, task_id in lost])

    def doubt(self, ids: Sequence[str], reserved: Sequence[tuple[Session, str]] = ()) -> None:
        """Look tasks up again whose commit failed or may have failed, once the store answers; they must not be forgotten.

        Slots reserved for them stay so until then: the agent may hold them after all.
        """
        if ids:
            self._later(self._recover(list(ids), list(reserved)))

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
            self._free_slot(entry[0])
            if entry[0].state is TaskState.QUEUED:
                queued.append(entry[0])
            else:
                self._resend(*entry)
        if queued:
            await self._dispatcher.enqueue(queued)

    def _resend(self, task: Task, payload: bytes) -> None:
        """Send an assignment that was committed although nobody was told so."""
        session = None if task.lease is None else self._sessions.get(task.lease.instance_id)
        if session is None or task.id in session.held:
            return
        session.held.add(task.id)
        if task.state is TaskState.ASSIGNED:
            session.send([Tasks(tasks=[assignment(task, payload)])])

    async def _take_back(self, instance_id: str, ids: Sequence[str]) -> None:
        now = self._clock.now()
        await self.settle([Intent(task_id, releasing(instance_id, now)) for task_id in ids])

    async def _cancel(self, ids: Sequence[str]) -> None:
        """Cancel what a run no longer needs: waiting tasks at once, running ones through their agents."""
        now = self._clock.now()
        await self.settle([Intent(task_id, cancelling("system", "the run no longer needs it", now)) for task_id in ids])
        await self.tell_cancelled(ids)

    async def tell_cancelled(self, ids: Sequence[str]) -> None:
        """Ask the agents that hold these tasks to stop."""
        for task in await self._ledger.load(ids):
            if task is not None and task.lease is not None and task.cancel is not None:
                session = self._sessions.get(task.lease.instance_id)
                if session is not None:
                    session.send([Cancel(task_ids=[task.id], reason=task.cancel.reason)])

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("tasks.background_failed", error=repr(error))

    async def close(self) -> None:
        """End what runs in the background."""
        for task in list(self._background):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def _set(future: asyncio.Future[Task], task: Task) -> None:
    if not future.done():
        future.set_result(task)


def _fail(entries: Sequence[_Waiting], error: BaseException) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(error)
            # The caller may be gone; an exception nobody fetches is not worth a warning.
            entry.future.exception()
