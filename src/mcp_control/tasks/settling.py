"""Settling: deciding a task's next value, committing it, and doing what follows.

Every verb that changes a task that is there goes through `Settler.settle`. A conflict means that somebody was faster: load and decide
again. A task of a run that becomes final is committed together with the run's advance (decisions, "Server"), for one run at a time, so
that what finishes while one advance is committed goes into the next one.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, NotFound, OutcomeUnknown, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import Advance, Finished, Follower
from mcp_control.tasks.handing import Handing
from mcp_control.tasks.ledger import Group, Intent, Ledger, Move
from mcp_control.tasks.model import Task
from mcp_control.tasks.peers import Peers
from mcp_control.tasks.ranking import POINT_MS, Expected, unknown
from mcp_control.tasks.verbs import cancelling, releasing
from mcp_control.tasks.wire import Cancel

_TRIES: Final = 20
_PAUSE_SECONDS: Final = 0.004


class _Waiting(msgspec.Struct):
    intent: Intent
    future: asyncio.Future[Task]


class Settler:
    """Commits decisions on tasks, moves runs on, and hands out what came of it."""

    def __init__(
        self,
        ledger: Ledger,
        sessions: Sessions,
        dispatcher: Dispatcher,
        clock: Clock,
        ids: IdSource,
        generation: int = 1,
        peers: Peers | None = None,
        point_ms: int = POINT_MS,
        expected: Expected = unknown,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._peers = peers or Peers(None)
        self._chance = chance
        self._ledger = ledger
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._clock = clock
        self._busy: dict[str, list[_Waiting]] = {}
        self.handing = Handing(
            ledger, sessions, dispatcher, clock, ids, self._take_back, generation, point_ms, expected
        )
        dispatcher.doubt = self.handing.doubt
        self.follower: Follower | None = None

    async def settle(self, intents: Sequence[Intent]) -> list[Task | Problem]:
        """Carry out intents, each on its own; returns the task after it, or the problem, in their order.

        Raises:
            StoreUnavailable, StorageFull, OutcomeUnknown, Overloaded: of the store, for the whole call.
        """
        results: list[Task | Problem] = [NotFound("no such task")] * len(intents)
        left = list(range(len(intents)))
        sure = not self._ledger.shared  # what is in memory is what the store holds
        for tried in range(_TRIES):
            tasks = await self._ledger.load([intents[place].task_id for place in left])
            plain: list[tuple[int, Move]] = []
            runs: dict[str, list[int]] = {}
            for place, task in zip(left, tasks, strict=True):
                if task is None:
                    continue
                try:
                    decided = intents[place].decide(task) if sure else await self._decided(intents[place], task)
                except Problem as problem:
                    results[place] = problem
                    continue
                move = task if decided is None else decided
                if isinstance(move, Task):
                    results[place] = move
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
            if self._ledger.shared:
                # Two servers that go on at once would meet again and again.
                await asyncio.sleep(_PAUSE_SECONDS * tried * self._chance())
        for place in left:
            results[place] = Conflict("too many changes at once")
        return results

    async def _decided(self, intent: Intent, task: Task) -> Move | Task:
        """Return what an intent makes of a task, or the task where nothing is to be done.

        Nobody is refused on the ground of a stale copy.
        """
        try:
            move = intent.decide(task)
        except Problem:
            if not self._ledger.shared:
                raise
            move = None
        if move is not None or not self._ledger.shared:
            return task if move is None else move
        (fresh,) = await self._ledger.load([task.id], fresh=True)
        if fresh is None:
            raise NotFound("no such task")
        move = intent.decide(fresh)
        return fresh if move is None else move

    async def _commit(self, moves: Sequence[tuple[int, Move]], results: list[Task | Problem]) -> list[int]:
        """Commit moves that concern no run; returns the places that conflicted."""
        try:
            outcomes = await self._ledger.commit([Group([move]) for _, move in moves])
        except BaseException:
            # It may have happened all the same: a task that is queued now must not be forgotten, nor a slot that is free.
            self.handing.doubt([move.after.id for _, move in moves])
            raise
        conflicted: list[int] = []
        requeued: list[Task] = []
        for (place, _), outcome in zip(moves, outcomes, strict=True):
            if isinstance(outcome, Conflict):
                conflicted.append(place)
            elif isinstance(outcome, Problem):
                results[place] = outcome
            else:
                (task,) = outcome
                results[place] = task
                self.handing.free_slot(task)
                if task.waits:
                    requeued.append(task)
                else:
                    self.handing.blocked(task)
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
            # Beside the caller: what others leave here meanwhile must not keep it from its next report, or from saying that it lives.
            self.handing.background.begin(self._work_off(mine))
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
                if conflicted and self._ledger.shared:
                    await asyncio.sleep(_PAUSE_SECONDS * tries * self._chance())
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
            # Nobody may wait for ever: whoever left an intent here hears of the failure.
            told = error if isinstance(error, Exception) else OutcomeUnknown()
            for run_id, entries in mine.items():
                _fail([*entries, *self._busy.pop(run_id, [])], told)
            if not isinstance(error, Exception):
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
                    move = await self._decided(entry.intent, task)
                except Problem as problem:
                    _fail([entry], problem)
                    continue
                if isinstance(move, Task):
                    _set(entry.future, move)
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
            self.handing.doubt(
                [task.id for task, _, _ in started_all] + [after.id for _, done, *_ in batch for _, after in done],
                [(session, task.id) for task, _, session in started_all if session],
            )
            raise
        conflicted: set[str] = set()
        for (run_id, done, advance, _, started), outcome in zip(batch, outcomes, strict=True):
            follower.settled(run_id, advance, not isinstance(outcome, Problem))
            if not isinstance(outcome, Problem):
                # First what was reported, then what the run starts.
                for (entry, _), task in zip(done, outcome, strict=False):
                    self.handing.free_slot(task)
                    _set(entry.future, task)
                await self.handing.begin(started)
                if advance.cancel:
                    self.handing.background.begin(self._cancel(advance.cancel))
            else:
                for task, _, session in started:
                    if session is not None:
                        self._dispatcher.unreserve(session, task.id)
                if isinstance(outcome, Conflict):
                    conflicted.add(run_id)
                else:
                    _fail([entry for entry, _ in done], outcome)
        return conflicted

    def _group(
        self, moves: Sequence[Move], advance: Advance, now: int
    ) -> tuple[Group, list[tuple[Task, bytes, Session | None]]]:
        started: list[tuple[Task, bytes, Session | None]] = []
        new_moves: list[Move] = []
        for new in advance.submit:
            task, payload, session, move = self.handing.create(new, now)
            started.append((task, payload, session))
            new_moves.append(move)
        return Group([*moves, *new_moves], advance.writes, advance.facts), started

    async def apply(self, run_id: str, advance: Advance, tenant: str, actor: str) -> None:
        """Commit an advance of a run that no task caused, and start its tasks.

        Raises:
            Conflict: the run was changed meanwhile; the engine decides again.
        """
        now = self._clock.now()
        await self.handing.launch(
            [self.handing.create(new, now, tenant, actor) for new in advance.submit], advance.writes, advance.facts
        )
        if advance.cancel:
            self.handing.background.begin(self._cancel(advance.cancel))

    async def _take_back(self, instance_id: str, ids: Sequence[str]) -> None:
        now = self._clock.now()
        await self.settle([Intent(task_id, releasing(instance_id, now)) for task_id in ids])

    async def _cancel(self, ids: Sequence[str]) -> None:
        """Cancel what a run no longer needs: waiting tasks at once, running ones through their agents."""
        now = self._clock.now()
        await self.settle([Intent(task_id, cancelling("system", "the run no longer needs it", now)) for task_id in ids])
        await self.tell_cancelled(ids)

    async def tell_cancelled(self, ids: Sequence[str]) -> None:
        """Ask the agents that hold these tasks to stop, wherever they are connected."""
        elsewhere = await self.tell_local(ids)
        self._peers.cancel(elsewhere)

    async def tell_local(self, ids: Sequence[str]) -> list[str]:
        """Ask the agents connected here that hold these tasks to stop; returns the tasks whose agents are not."""
        elsewhere: list[str] = []
        for task in await self._ledger.load(ids, fresh=True):
            if task is not None and task.lease is not None and task.cancel is not None:
                session = self._sessions.get(task.lease.instance_id)
                if session is not None:
                    session.send([Cancel(task_ids=[task.id], reason=task.cancel.reason)])
                else:
                    elsewhere.append(task.id)
        return elsewhere


def _set(future: asyncio.Future[Task], task: Task) -> None:
    if not future.done():
        future.set_result(task)


def _fail(entries: Sequence[_Waiting], error: BaseException) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(error)
            # The caller may be gone; an exception nobody fetches is not worth a warning.
            entry.future.exception()
