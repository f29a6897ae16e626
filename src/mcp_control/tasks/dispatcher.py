"""The dispatcher: brings waiting lanes and free slots together (architecture, section 4, "Assignment is pull with credit").

Agents are compared with lanes, never with tasks, so its cost follows the number of lanes and of agents that just became free; a million
tasks in one lane cost what one task costs.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import structlog

from mcp_control.agents.balancing import Candidate, least_loaded
from mcp_control.agents.matching import Demand, misfit
from mcp_control.agents.reserving import Load, load_of
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.errors import Problem
from mcp_control.storage.ports import RANK_MAX, Depth, Queue, Queued
from mcp_control.tasks.lanes import demand_of
from mcp_control.tasks.model import Task
from mcp_control.tasks.peers import Peers
from mcp_control.tasks.ranking import ranks

_log = structlog.get_logger(__name__)
_PAUSE_SECONDS: Final = 0.2
_AT_ONCE: Final = 512
_COMMITS: Final = 4
_LOOKED_AT: Final = 16
_NEAR: Final = ranks(1000)  # so close in rank, lanes are served one after the other rather than entry by entry

Lookup = Callable[[str], Awaitable[Task | None]]
HandOut = Callable[[list[tuple[str, Session]]], Awaitable[None]]
"""Assigns the tasks and sends them. Sees to what could not be assigned by itself, and does not raise."""


def _rank(task: Task) -> int:
    return task.rank


def queued(task: Task) -> Queued:
    """Return a task as an entry of its lane."""
    return Queued(task.lane, task.id, task.rank)


class Lane:
    """What is known of a lane: what it asks, who fits, and bounds of what waits in it.

    `waiting` may be too high and `rank`, that of the first, too low; both correct themselves when entries are taken.
    """

    __slots__ = ("demand", "key", "load", "pushed", "rank", "sessions", "tenant", "waiting")

    def __init__(self, key: str, tenant: str, demand: Demand) -> None:
        self.key = key
        self.tenant = tenant
        self.demand = demand
        self.load = load_of(demand.slots, demand.resources)
        self.waiting = 0
        self.pushed = 0
        self.rank = 0
        self.sessions: set[Session] = set()


class Dispatcher:
    """Watches sessions and lanes. `hand_out` is given task ids and the sessions chosen for them, whose slots are already reserved.

    Where several servers share the queue, each takes for its own sessions; `peers` tells the others of new entries, and `look` finds what
    was not heard of.

    Args:
        lookup: returns a task by id, to learn what a lane asks for that another server filled.
    """

    def __init__(
        self,
        queue: Queue,
        sessions: Sessions,
        hand_out: HandOut,
        peers: Peers | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._peers = peers or Peers(None)
        self._lookup = lookup
        self._queue = queue
        self._hand_out = hand_out
        self._sessions = sessions
        self._lanes: dict[str, Lane] = {}
        self._waiting: dict[str, Lane] = {}
        self._free: dict[Session, None] = {}
        self._wake = asyncio.Event()
        self._room = asyncio.Semaphore(_COMMITS)
        self._running: set[asyncio.Task[None]] = set()
        sessions.watch(self)

    def opened(self, session: Session) -> None:
        """Match a new session with the lanes there are."""
        for lane in self._lanes.values():
            if self._fits(lane, session):
                lane.sessions.add(session)
        self.freed(session)

    def closed(self, session: Session) -> None:
        """Forget a session."""
        self._free.pop(session, None)
        for lane in self._lanes.values():
            lane.sessions.discard(session)

    def freed(self, session: Session) -> None:
        """Hear that a session may take more."""
        if session.free > 0:
            self._free[session] = None
            if self._waiting:
                self._wake.set()

    def lane(self, task: Task) -> Lane:
        """Return the lane of a task."""
        lane = self._lanes.get(task.lane)
        return self._opened(task.lane, task.tenant, demand_of(task)) if lane is None else lane

    def _opened(self, key: str, tenant: str, demand: Demand) -> Lane:
        lane = Lane(key, tenant, demand)
        lane.sessions = {session for session in self._sessions.all() if self._fits(lane, session)}
        self._lanes[key] = lane
        return lane

    def known(self, key: str) -> Lane | None:
        """Return the lane of this key if there is one."""
        return self._lanes.get(key)

    def lanes(self) -> Iterable[Lane]:
        """Return the lanes known."""
        return self._lanes.values()

    def place(self, task: Task) -> Session | None:
        """Choose a session for a task that is about to be committed, and reserve the slot; None where it has to queue.

        Saves the commit between `queued` and `assigned` on an idle system. Nobody is overtaken: a lane with waiting tasks is refused,
        and so is a session that a waiting lane could use whose first comes before this task.
        """
        lane = self.lane(task)
        if lane.waiting or not self._free:
            return None
        contenders = [other for other in self._waiting.values() if other.rank <= task.rank]
        best: Session | None = None
        best_load = 2.0
        looked = 0
        for session in self._free:
            if session not in lane.sessions or any(session in other.sessions for other in contenders):
                continue
            free = session.free
            if free <= 0 or (lane.load is not None and not session.room(lane.load)):
                continue
            load = (session.slots - free) / session.slots
            if load < best_load:
                best, best_load = session, load
            looked += 1
            if looked >= _LOOKED_AT:
                break
        if best is not None:
            self._reserve(best, task.id, lane.load)
        return best

    def _reserve(self, session: Session, task_id: str, load: Load | None) -> None:
        session.hold(task_id, load)
        if session.allowance is not None:
            session.allowance -= 1
        # Back to the end of the row: idle sessions take turns.
        self._free.pop(session, None)
        if session.free > 0:
            self._free[session] = None

    def unreserve(self, session: Session, task_id: str) -> None:
        """Give a slot back that was reserved or whose task has ended."""
        session.let_go(task_id)
        # The instance may have reconnected since; its new session has taken over what the old one held.
        current = self._sessions.get(session.instance.id)
        if current is not None:
            current.let_go(task_id)
            self.freed(current)

    async def enqueue(self, tasks: Sequence[Task]) -> None:
        """Put queued tasks in their lanes."""
        await self._queue.push([queued(task) for task in tasks])
        for task in tasks:
            lane = self.lane(task)
            if not lane.waiting:
                lane.rank = task.rank
                self._waiting[lane.key] = lane
            lane.waiting += 1
            lane.pushed += 1
            lane.rank = min(lane.rank, task.rank)
        if self._free:
            self._wake.set()
        if not self._peers.alone:
            self._peers.lanes(
                Depth(lane=task.lane, waiting=1, rank=task.rank, first=task.id)
                for task in {task.lane: task for task in sorted(tasks, key=_rank, reverse=True)}.values()
            )

    async def look(self) -> None:
        """Look at the lanes of the queue, for entries of other servers that nobody told of, and set right what is known of them."""
        before = {lane.key: lane.pushed for lane in self._waiting.values()}
        depths = await self._queue.depths()
        there = {depth.lane: depth.waiting for depth in depths}
        for key, pushed in before.items():
            lane = self._waiting.get(key)
            if lane is None or lane.pushed != pushed:
                continue  # something was pushed meanwhile
            lane.waiting = there.get(key, 0)
            if not lane.waiting:
                del self._waiting[key]
        await self.heard(depths)

    async def heard(self, depths: Sequence[Depth]) -> None:
        """Hear of entries that other servers put in lanes."""
        for depth in depths:
            lane = self._lanes.get(depth.lane)
            if lane is None:
                task = None if self._lookup is None else await self._lookup(depth.first)
                if task is None or task.lane != depth.lane:
                    continue
                lane = self.lane(task)
            if not lane.waiting:
                lane.rank = depth.rank
            self._waiting[lane.key] = lane
            lane.waiting = max(lane.waiting, depth.waiting)
            lane.rank = min(lane.rank, depth.rank)
        if depths and self._free:
            self._wake.set()

    async def withdraw(self, task: Task) -> None:
        """Take a task out of its lane. The lane's count is left too high; the next take corrects it."""
        await self._queue.remove(task.lane, [task.id])

    async def run(self) -> None:
        """Dispatch until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    while await self._pass():
                        pass
                except Problem as problem:
                    _log.warning("tasks.lanes_unavailable", code=problem.code)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    self._wake.set()
        finally:
            for task in self._running:
                task.cancel()

    async def _pass(self) -> bool:
        """Take what fits from every waiting lane, best first; say whether anything was taken."""
        took = False
        lanes = sorted(self._waiting.values(), key=lambda lane: lane.rank)
        for place, lane in enumerate(lanes):
            load = lane.load
            sessions = [session for session in self._free if session in lane.sessions and session.room(load) > 0]
            room = sum(session.room(load) for session in sessions)
            if not room:
                continue
            ceiling = min(RANK_MAX, lanes[place + 1].rank + _NEAR) if place + 1 < len(lanes) else RANK_MAX
            wanted = min(room, _AT_ONCE)
            entries = await self._queue.take(lane.key, wanted, ceiling)
            self._taken(lane, entries, wanted, ceiling)
            # Nothing below the ceiling: what waits above it has its turn in the next pass, with the lane's bound corrected.
            took = took or bool(entries) or lane.waiting > 0
            if not entries:
                continue
            await self._room.acquire()
            # Slots may have gone while this waited; those entries go back.
            sessions = [session for session in sessions if session.room(load) > 0]
            chosen = least_loaded([Candidate(session.slots, session.room(load)) for session in sessions], len(entries))
            # An entry of a task that its session holds already is a leftover; giving its slot back later would free a slot in use.
            pairs = [
                (entry.id, sessions[at])
                for entry, at in zip(entries, chosen, strict=False)
                if entry.id not in sessions[at].held
            ]
            for task_id, session in pairs:
                self._reserve(session, task_id, load)
            if len(chosen) < len(entries):
                await self._put_back(lane, entries[len(chosen) :])
            running = asyncio.create_task(self._give(pairs))
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        return took

    def _taken(self, lane: Lane, entries: Sequence[Queued], wanted: int, ceiling: int) -> None:
        if len(entries) < wanted and ceiling == RANK_MAX:
            lane.waiting = 0
        else:
            lane.waiting = max(1, lane.waiting - len(entries))
            if len(entries) < wanted:
                lane.rank = ceiling + 1
            elif entries:
                lane.rank = entries[-1].rank
        if not lane.waiting:
            self._waiting.pop(lane.key, None)

    async def _put_back(self, lane: Lane, entries: Sequence[Queued]) -> None:
        await self._queue.push(entries)
        # The lane may have been forgotten while it looked empty.
        lane = self._lanes.get(lane.key) or self._opened(lane.key, lane.tenant, lane.demand)
        lane.waiting += len(entries)
        lane.rank = min(lane.rank, entries[0].rank)
        self._waiting[lane.key] = lane
        self._wake.set()

    async def _give(self, pairs: list[tuple[str, Session]]) -> None:
        try:
            await self._hand_out(pairs)
        finally:
            self._room.release()

    def forget_idle(self) -> None:
        """Drop lanes in which nothing waits; called now and then, so that lanes of the past cost nothing."""
        for key in [key for key, lane in self._lanes.items() if not lane.waiting]:
            del self._lanes[key]

    def _fits(self, lane: Lane, session: Session) -> bool:
        agent = session.agent
        return agent.tenant == lane.tenant and misfit(agent.id, agent.spec, lane.demand) is None
