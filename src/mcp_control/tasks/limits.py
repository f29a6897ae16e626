"""Limits at work: tasks that have some wait before the lanes, `blocked`, until everything they need is free.

The server whose commit frees a number looks at once for the first task that waits for it, whichever server accepted that one: what waits
is found in the store. Nothing is missed, since both sides first commit and then look. What a server that died leaves behind is found by
the sweep of the one that leads. Tasks without limits never come here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Final

import structlog

from mcp_control.agents.sessions import Session
from mcp_control.kernel.changes import Change, Fact, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.loops import Wake
from mcp_control.storage.ports import LANE_END, Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.gating import admit, wait_at
from mcp_control.tasks.handing import Handing
from mcp_control.tasks.ledger import Group, Ledger, Move
from mcp_control.tasks.limit_model import AT_ONCE_MAX, HOLD_KIND, Gate, Hold, HoldChange, Taken
from mcp_control.tasks.limit_rules import Rules
from mcp_control.tasks.limiting import (
    PATIENCE,
    free_number,
    hold_id,
    missing,
    new_hold,
    next_free,
    own_gates,
    read_taken,
    room_of,
)
from mcp_control.tasks.model import Task, TaskSpec, TaskState
from mcp_control.tasks.records import task_fact
from mcp_control.tasks.transitions import assign

_log = structlog.get_logger(__name__)
_PAUSE_SECONDS: Final = 0.2
_GATES: Final = 64
_TASKS: Final = 64
_SWEPT: Final = 100
_KEPT: Final = 20_000
_PAGE: Final = 500
_USED_FOR_MS: Final = 60_000
_AFTER_END: Final = chr(ord(LANE_END) + 1)


class Room:
    """The numbers of a gate that are taken, as far as this server knows."""

    __slots__ = ("taken", "versions")

    def __init__(self) -> None:
        self.taken: dict[int, Taken] = {}
        self.versions: dict[int, int] = {}

    def put(self, number: int, taken: Taken | None, version: int) -> None:
        """Note what became of a number."""
        if taken is None:
            self.taken.pop(number, None)
            self.versions.pop(number, None)
        else:
            self.taken[number] = taken
            self.versions[number] = version


class Limits:
    """Lets blocked tasks through their gates.

    Args:
        rules: the limits that operators set.

    Attributes:
        leaked: holds found whose task had ended without them. A fault of ours; must stay 0.
    """

    def __init__(self, store: Store, clock: Clock, ids: IdSource, ledger: Ledger, rules: Rules) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._ledger = ledger
        self._rules = rules
        self._handing: Handing | None = None
        self._dispatcher: Dispatcher | None = None
        self._dirty: dict[str, None] = {}
        self._wake = Wake()
        self._rooms: OrderedDict[str, Room] = OrderedDict()
        self._looking: list[set[str]] = []
        self._wanted: dict[str, int] = {}
        self._timers: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self._swept = ""
        self.leaked = 0
        ledger.holds = self

    def attach(self, handing: Handing, dispatcher: Dispatcher) -> None:
        """Say who hands out what was let through."""
        self._handing, self._dispatcher = handing, dispatcher
        handing.gates = self

    def applying(self, tenant: str, spec: TaskSpec) -> list[Gate]:
        """Return the limits of a new task: its own, and those of the rules for it."""
        gates = own_gates(spec.limits) if spec.limits else []
        return gates + self._rules.applying(tenant, spec) if self._rules.there else gates

    def wake(self, task: Task) -> None:
        """Look at a blocked task soon: it was committed by this server just now."""
        self._mark(task.waits_at)

    def changed(self, changes: Sequence[HoldChange]) -> None:
        """Hear what became of holds by this server's commits."""
        for change in changes:
            name, taken = change.name, change.taken
            for looking in self._looking:
                looking.add(name)
            room = self._rooms.get(name)
            if room is not None:
                room.put(change.number, taken, change.version)
                if not room.taken:
                    del self._rooms[name]
            if taken is None:
                self._mark(name)
            elif taken.until is not None:
                self._later(name, taken.until)

    def unsure(self, names: Sequence[str]) -> None:
        """Hear of gates whose holds may not be what was thought."""
        for name in names:
            self._rooms.pop(name, None)
            for looking in self._looking:
                looking.add(name)

    def _mark(self, name: str) -> None:
        self._dirty[name] = None
        self._wake.set()

    def _later(self, name: str, at: int) -> None:
        """Look at a gate when time frees one of its numbers."""
        known = self._timers.get(name)
        if known is not None:
            if known[0] <= at:
                return
            known[1].cancel()
        delay = max(0, at - self._clock.now()) / 1000

        def due() -> None:
            del self._timers[name]
            self._mark(name)

        self._timers[name] = (at, asyncio.get_running_loop().call_later(delay, due))

    @property
    def idle(self) -> bool:
        """Whether all that it has heard of is done: what still waits has to."""
        return self._wake.idle

    async def run(self) -> None:
        """Let tasks through until cancelled."""
        try:
            while True:
                await self._wake.wait()
                while self._dirty:
                    names = list(islice(self._dirty, _GATES))
                    for name in names:
                        del self._dirty[name]
                    try:
                        await self._pass(names)
                    except Exception as error:  # whatever it was, what waits must go on
                        _log.warning("limits.pass_failed", error=repr(error), exc_info=not isinstance(error, Problem))
                        self.unsure(names)
                        self._dirty.update(dict.fromkeys(names))
                        await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            for _, timer in self._timers.values():
                timer.cancel()

    async def _pass(self, names: Sequence[str]) -> None:
        """Look at some gates: let through who can go, and send on who must wait elsewhere."""
        rooms: dict[str, Room] = {}
        found, _ = await asyncio.gather(asyncio.gather(*map(self._first, names)), self._look(names, rooms))
        waiting = {task.id: task for tasks, _ in found for task in tasks}
        if not all(map(self._rules.know, waiting.values())):
            await self._rules.load()
        await self._look(sorted({name for task in waiting.values() for name, _ in missing(task)} - rooms.keys()), rooms)
        now = self._clock.now()
        moves: list[Move] = []
        moving: list[Task] = []
        full: set[str] = set()
        for task in waiting.values():
            move = self._decide(task, rooms, full, now)
            if move is not None:
                moves.append(move)
                moving.append(task)
        if moves:
            await self._commit(moving, moves)
        for name, (_, more) in zip(names, found, strict=True):
            if more and name not in full:
                self._wanted[name] = min(_TASKS, self._asked(name) * 4)
                self._mark(name)
            else:
                self._wanted.pop(name, None)

    def _asked(self, name: str) -> int:
        return self._wanted.get(name, 2)

    async def _first(self, name: str) -> tuple[list[Task], bool]:
        """Return the first tasks that wait at a gate, and whether there may be more."""
        asked = self._asked(name)
        query = Query(
            where=[Where("gate", "ge", name + LANE_END), Where("gate", "lt", name + _AFTER_END)],
            order="gate",
            limit=asked,
        )
        rows = await self._store.find("task", query)
        tasks = self._ledger.readable(rows)
        return [task for task in tasks if task.state is TaskState.BLOCKED and task.hold is None], len(rows) >= asked

    async def _look(self, names: Sequence[str], rooms: dict[str, Room]) -> None:
        """Learn what is taken of some gates. One server alone remembers it; of several each must look."""
        unknown: list[str] = []
        for name in names:
            room = self._rooms.get(name)
            if room is None:
                unknown.append(name)
            else:
                self._rooms.move_to_end(name)
                rooms[name] = room
        while unknown:
            touched: set[str] = set()
            self._looking.append(touched)
            try:
                read = await asyncio.gather(*map(self.room, unknown))
            finally:
                self._looking.remove(touched)
            again: list[str] = []
            for name, room in zip(unknown, read, strict=True):
                if name in touched:
                    again.append(name)
                    continue
                rooms[name] = room
                if not self._ledger.shared and room.taken:
                    self._rooms[name] = room
            unknown = again
        while len(self._rooms) > _KEPT:
            self._rooms.popitem(last=False)

    async def room(self, name: str) -> Room:
        """Return what is taken of a gate, as the store has it."""
        room = Room()
        query = Query(where=[Where("gate", "eq", name)], limit=2 * AT_ONCE_MAX)
        for entity in await self._store.find(HOLD_KIND.name, query):
            taken = read_taken(entity)
            room.put(taken.number, taken, entity.version)
        return room

    def _decide(self, task: Task, rooms: dict[str, Room], full: set[str], now: int) -> Move | None:
        """Return how a blocked task goes on, None while it stays where it is."""
        lifted, present = self._rules.present(task)
        holds: list[Hold] = []
        for name, gate in missing(task, lifted):
            gate = present.get(name, gate)
            room = rooms[name]
            number = free_number(room.taken, room_of(gate), now)
            if number is None:
                full.add(name)
                if gate.rate is not None and (at := next_free(room.taken, now)) is not None:
                    self._later(name, at)
                kept = holds if task.passed >= PATIENCE else []
                if name == task.waits_at and not kept:
                    return None
                self._reserve(task, kept, rooms, now)
                return Move(wait_at(task, name, gate, kept), taken=len(kept))
            holds.append(new_hold(name, gate, number, room.versions.get(number, 0)))
        self._reserve(task, holds, rooms, now)
        return Move(admit(task, holds, now), [], taken=len(holds))

    def _reserve(self, task: Task, holds: Sequence[Hold], rooms: dict[str, Room], now: int) -> None:
        for hold in holds:
            taken = Taken(name=hold.name, number=hold.number, holder=task.id, since=now)
            rooms[hold.name].put(hold.number, taken, hold.version + 1)

    async def _commit(self, before: Sequence[Task], moves: Sequence[Move]) -> None:
        """Commit what was decided, with an agent for those that get one at once, and hand them out."""
        handing, dispatcher = self._handing, self._dispatcher
        assert handing is not None
        assert dispatcher is not None
        payloads = await self._ledger.load_with_payload([task.id for task in before])
        now = self._clock.now()
        groups: list[Group] = []
        decided: list[tuple[Task, bytes, Session | None]] = []
        for move, loaded in zip(moves, payloads, strict=True):
            after, payload = move.after, b"null" if loaded is None else loaded[1]
            session: Session | None = None
            facts: list[Fact] = []
            if after.state is TaskState.QUEUED:
                facts.append(task_fact("task.queued", after, "system", now))
                # What draws from a budget is looked at before it is given out.
                session = None if after.draws else dispatcher.place(after)
                if session is not None:
                    after = assign(after, session.agent.id, session.instance.id, self._ids.secret(), now)
                    facts.append(task_fact("task.assigned", after, "system", now))
            groups.append(Group([Move(after, facts, taken=move.taken)]))
            decided.append((after, payload, session))
        try:
            outcomes = await self._ledger.commit(groups)
        except BaseException:
            self.unsure([name for task in before for name, _ in missing(task)])
            handing.doubt(
                [task.id for task, _, _ in decided], [(session, task.id) for task, _, session in decided if session]
            )
            raise
        accepted: list[tuple[Task, bytes, Session | None]] = []
        refused: Problem | None = None
        for was, item, outcome in zip(before, decided, outcomes, strict=True):
            if not isinstance(outcome, Problem):
                accepted.append(item)
                continue
            if item[2] is not None:
                dispatcher.unreserve(item[2], item[0].id)
            # Somebody was faster, with the task or with a number: look again.
            self.unsure([name for name, _ in missing(was)])
            self._mark(was.waits_at)
            refused = refused if isinstance(outcome, Conflict) else outcome
        await handing.begin(accepted)
        if refused is not None:
            raise refused

    async def sweep(self, _: int = 0) -> int:
        """Look at gates that tasks wait at, some at a time and all in turn, for what nobody heard of; returns how many."""
        for looked in range(_SWEPT):
            query = Query(where=[Where("gate", "gt", self._swept)], order="gate", limit=1)
            rows = await self._store.find("task", query)
            if not rows:
                self._swept = ""
                return looked
            name = str(rows[0].index["gate"]).rpartition(LANE_END)[0]
            self._rooms.pop(name, None)
            self._mark(name)
            self._swept = name + _AFTER_END
        return _SWEPT

    async def revisit(self) -> None:
        """Look at all gates that tasks wait at, as when limits were changed."""
        self._swept = ""
        while await self.sweep() >= _SWEPT:
            pass

    async def tidy(self, now: int) -> int:
        """Remove used numbers nobody took again, and holds whose task is gone or ended; returns how many of the latter there were."""
        used = Query(where=[Where("until", "lt", now - _USED_FOR_MS)], order="until", limit=_PAGE)
        rows = await self._store.find(HOLD_KIND.name, used)
        if rows:
            await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in rows])
            self.unsure([str(row.index["gate"]) for row in rows])
        leaked = 0
        after: list[str | int | None] | None = None
        while True:
            query = Query(where=[Where("holder", "gt", "")], order="holder", after=after, limit=_PAGE)
            rows = await self._store.find(HOLD_KIND.name, query)
            tasks = await self._ledger.load([str(row.index["holder"]) for row in rows], fresh=True)
            lost = [
                row
                for row, task in zip(rows, tasks, strict=True)
                if task is None or row.id not in {hold_id(hold.name, hold.number) for hold in task.holds}
            ]
            if lost:
                # One that was let go since it was read is not there any more at this version.
                outcomes = await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in lost])
                names = [str(row.index["gate"]) for row, outcome in zip(lost, outcomes, strict=True) if outcome is None]
                self.unsure(names)
                for name in names:
                    self._mark(name)
                leaked += len(names)
            if len(rows) < _PAGE:
                break
            after = [rows[-1].index["holder"], rows[-1].id]
        if leaked:
            self.leaked += leaked
            _log.error("limits.leaked", holds=leaked)
        return leaked

    async def holding(self, task: Task) -> tuple[list[str], int | None, int | None]:
        """Return who holds what a blocked task waits for (ids of tasks), since when, and when time alone would let it on."""
        now = self._clock.now()
        room = await self.room(task.waits_at)
        used = sorted((one for one in room.taken.values() if one.holder), key=lambda one: one.since)
        return [one.holder for one in used], used[0].since if used else None, next_free(room.taken, now)
