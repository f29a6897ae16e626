"""The dispatcher: brings waiting lanes and free slots together (architecture, section 4, "Assignment is pull with credit").

Agents are compared with lanes, never with tasks, so its cost follows the number of lanes and of agents that just became free; a million
tasks in one lane cost what one task costs.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import structlog

from mcp_control.agents.matching import Demand
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.background import Background
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.loops import Wake
from mcp_control.storage.ports import RANK_MAX, Depth, Queue, Queued
from mcp_control.tasks.choosing import Chooser
from mcp_control.tasks.fairness import Line, Shares, allot, grade_of
from mcp_control.tasks.keeping_free import Keeper
from mcp_control.tasks.lanes import Lane, demand_of
from mcp_control.tasks.model import Task
from mcp_control.tasks.peers import Peers
from mcp_control.tasks.ranking import POINT_MS, ranks
from mcp_control.tasks.records import queued

_log = structlog.get_logger(__name__)
_PAUSE_SECONDS: Final = 0.2
_AT_ONCE: Final = 512
_COMMITS: Final = 4
_NEAR: Final = ranks(1000)  # so close in rank, lanes are served one after the other rather than entry by entry
Lookup = Callable[[str], Awaitable[Task | None]]
HandOut = Callable[[list[tuple[str, Session]]], Awaitable[None]]
"""Assigns the tasks and sends them. Sees to what could not be assigned by itself, and does not raise."""


class Dispatcher:
    """Watches sessions and lanes. `hand_out` is given task ids and the sessions chosen for them, whose slots are already reserved.

    Where several servers share the queue, each takes for its own sessions; `peers` tells the others of new entries, and `look` finds what
    was not heard of. `doubt` is called with tasks of which only the store can say whether they still wait.

    Args:
        lookup: returns a task by id, to learn what a lane asks for that another server filled.
        point_ms: what a point of priority is worth, in milliseconds of waiting.
        monotonic: seconds, for how long shares have waited.
        chooser: says which sessions may take the tasks of a lane, and which do.
    """

    def __init__(
        self,
        queue: Queue,
        sessions: Sessions,
        hand_out: HandOut,
        peers: Peers | None = None,
        lookup: Lookup | None = None,
        point_ms: int = POINT_MS,
        monotonic: Callable[[], float] = time.monotonic,
        chooser: Chooser | None = None,
    ) -> None:
        self.chooser = chooser or Chooser()
        self._sticky = 0
        self._point_ms = point_ms
        self._monotonic = monotonic
        self.shares = Shares()
        self._peers = peers or Peers(None)
        self._lookup = lookup
        self._queue = queue
        self._hand_out = hand_out
        self._sessions = sessions
        self._lanes: dict[str, Lane] = {}
        self._waiting: dict[str, Lane] = {}
        self._free: dict[Session, None] = {}
        self._keeper = Keeper()
        self._wake = Wake()
        self._room = asyncio.Semaphore(_COMMITS)
        self._giving = Background("dispatch")
        self.doubt: Callable[[Sequence[str]], None] = lambda _: None
        sessions.watch(self)

    def opened(self, session: Session) -> None:
        """Match a new session with the lanes there are."""
        self._settle_homes()
        for lane in self._lanes.values():
            if self.chooser.fits(lane, session):
                lane.sessions.add(session)
        self.freed(session)

    def closed(self, session: Session) -> None:
        """Forget a session."""
        self._free.pop(session, None)
        self._keeper.forget(session)
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
        if lane is None:
            share = "" if task.fairness is None else task.fairness.key
            line = self.shares.line(task.tenant, share, grade_of(task.priority))
            lane = self._opened(task.lane, line, demand_of(task))
        if task.fairness is not None:
            lane.line.share.asked = task.fairness.weight
        return lane

    def _opened(self, key: str, line: Line, demand: Demand) -> Lane:
        lane = Lane(key, line, demand)
        if demand.bucket is not None:
            lane.home = self.chooser.home(lane)
            self._sticky += 1
        lane.sessions = {session for session in self._sessions.all() if self.chooser.fits(lane, session)}
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
        and so is a session that a waiting lane could use whose first comes before this task, or that is of another share.
        """
        lane = self.lane(task)
        if lane.waiting or not self._free:
            return None
        share, all_waiting = lane.line.share, self._waiting.values()
        contenders = [other for other in all_waiting if other.rank <= task.rank or other.line.share is not share]
        best = self.chooser.pick(lane, self._free, contenders)
        if best is None or task.id in best.held:  # somebody else is about to begin the same task
            return None
        self._reserve(best, task.id, lane)
        if self.shares.keyed:
            now = self._monotonic()
            self._begin(lane, now)
            self.shares.served(lane.line, 1, now)
        return best

    def _reserve(self, session: Session, task_id: str, lane: Lane) -> None:
        session.hold(task_id, lane.load, lane.demand.type)
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
            if current is not session:
                current.let_go(task_id)
            self.freed(current)

    async def enqueue(self, tasks: Sequence[Task]) -> None:
        """Put queued tasks in their lanes."""
        await self._queue.push([queued(task) for task in tasks])
        for task in tasks:
            lane = self.lane(task)
            if not lane.waiting:
                lane.rank = task.rank
                self._wait(lane)
            lane.waiting += 1
            lane.pushed += 1
            lane.rank = min(lane.rank, task.rank)
        if self._free:
            self._wake.set()
        if not self._peers.alone:
            self._peers.lanes(
                Depth(lane=task.lane, waiting=1, rank=task.rank, first=task.id)
                for task in {task.lane: task for task in sorted(tasks, key=lambda each: -each.rank)}.values()
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
                self._wait(lane)
            lane.waiting = max(lane.waiting, depth.waiting)
            lane.rank = min(lane.rank, depth.rank)
        if depths and self._free:
            self._wake.set()

    async def withdraw(self, *tasks: Task) -> None:
        """Take tasks out of their lanes. The counts of the lanes are left too high; the next take corrects them."""
        for lane in {task.lane for task in tasks}:
            await self._queue.remove(lane, [task.id for task in tasks if task.lane == lane])

    @property
    def idle(self) -> bool:
        """Whether all that it has heard of is done: what still waits has to."""
        return self._wake.idle and not self._giving.busy

    async def run(self) -> None:
        """Dispatch until cancelled."""
        try:
            while True:
                await self._wake.wait()
                try:
                    while await self._pass():
                        pass
                except Problem as problem:
                    _log.warning("tasks.lanes_unavailable", code=problem.code)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    self._wake.set()
        finally:
            self._giving.cancel()

    def _wait(self, lane: Lane) -> None:
        """Note that something waits in a lane in which nothing did."""
        if self.shares.keyed:
            self._begin(lane, self._monotonic())
        self._waiting[lane.key] = lane

    def _begin(self, lane: Lane, now: float) -> None:
        if not any(other.line is lane.line for other in self._waiting.values()):
            self.shares.begin(lane.line, now)

    async def _pass(self) -> bool:
        """Take what fits from every waiting lane, best first; say whether anything was taken."""
        lanes = sorted(self._waiting.values(), key=lambda lane: lane.rank)
        if not self.shares.keyed:
            return await self._in_order(lanes)
        took = False
        for tenant in {lane.tenant: None for lane in lanes}:
            took = await self._fairly([lane for lane in lanes if lane.tenant == tenant]) or took
        return took

    async def _in_order(self, lanes: Sequence[Lane], wanted: int = _AT_ONCE) -> bool:
        """Take what fits from these lanes in the order of the ranks, at most so many in all; say whether anything was taken."""
        took = False
        for place, lane in enumerate(lanes):
            ceiling = min(RANK_MAX, lanes[place + 1].rank + _NEAR) if place + 1 < len(lanes) else RANK_MAX
            found = await self._serve(lane, wanted, ceiling)
            took = took or found is not None
            wanted -= found or 0
        return took

    async def _fairly(self, lanes: Sequence[Lane]) -> bool:
        """Share the free slots out between the shares of a tenant, by their weights."""
        lines: dict[Line, list[Lane]] = {}
        keeper = self._keeper
        for lane in lanes:
            if any(
                session in lane.sessions and lane.room(session) > 0 and (not keeper or keeper.open(lane, session))
                for session in self._free
            ):
                lines.setdefault(lane.line, []).append(lane)
            elif lane.load is not None:
                keeper.passed(lane, self._monotonic())
        if len({line.share for line in lines}) < 2:
            return await self._in_order([lane for lane in lanes if lane.line in lines])
        free = sum(
            session.free
            for session in self._free
            if any(session in each.sessions for its in lines.values() for each in its)
        )
        for line in lines:
            self.shares.catch_up(line)
        waiting = [(line, sum(lane.waiting for lane in its)) for line, its in lines.items()]
        counts = allot(waiting, min(free, _AT_ONCE), self._monotonic(), self._point_ms)
        took = False
        for its, count in zip(lines.values(), counts, strict=True):
            if count:
                took = await self._in_order(its, count) or took
        return took

    async def _serve(self, lane: Lane, wanted: int, ceiling: int) -> int | None:
        """Take what fits from a lane, at most so many, and give it out.

        Returns how many were given out; None where there was no room for any, or nothing waits any more.
        """
        sessions = [session for session in self._free if session in lane.sessions and lane.room(session) > 0]
        if self._keeper:
            sessions = [session for session in sessions if self._keeper.open(lane, session)]
        if not sessions and lane.load is not None:
            self._keeper.passed(lane, self._monotonic())
        wanted = min(wanted, sum(map(lane.room, sessions)))
        if wanted <= 0:
            return None
        entries = await self._queue.take(lane.key, wanted, ceiling)
        self._taken(lane, entries, wanted, ceiling)
        if not entries:
            # Nothing below the ceiling: what waits above it has its turn in the next pass, with the lane's bound corrected.
            return 0 if lane.waiting else None
        await self._room.acquire()
        # Slots may have gone while this waited; those entries go back.
        sessions = [session for session in sessions if lane.room(session) > 0]
        chosen = self.chooser.spread(lane, sessions, len(entries))
        taken = [(entry.id, sessions[at]) for entry, at in zip(entries, chosen, strict=False)]
        # What a session holds already is left over, or reserved by somebody who began the same task and lost: the store knows which.
        if held := [task_id for task_id, session in taken if task_id in session.held]:
            self.doubt(held)
        pairs = [pair for pair in taken if pair[0] not in held]
        for task_id, session in pairs:
            self._reserve(session, task_id, lane)
        if len(chosen) < len(entries):
            await self._put_back(lane, entries[len(chosen) :])
        if lane.load is not None:
            self._keeper.served(lane)
        if self.shares.keyed:
            self.shares.served(lane.line, len(pairs), self._monotonic())
        self._giving.begin(self._give(pairs))
        return len(pairs)

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
        lane = self._lanes.get(lane.key) or self._opened(lane.key, lane.line, lane.demand)
        if not lane.waiting:
            lane.rank = entries[0].rank
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
        self._keeper.tidy(self._lanes.values())
        self._sticky = sum(lane.demand.bucket is not None for lane in self._lanes.values())
        self._settle_homes()
        if self.shares.keyed:
            self.shares.forget({lane.line for lane in self._lanes.values()})

    def _settle_homes(self) -> None:
        """Match lanes anew whose tasks belong elsewhere now."""
        if not self._sticky:
            return
        for lane in self.chooser.moved(self._lanes.values()):
            lane.sessions = {session for session in self._sessions.all() if self.chooser.fits(lane, session)}
            self._wake.set()
