"""The ledger: the one place where tasks are read and written.

It keeps recent tasks and their payloads in memory (architecture, section 3, "Identity cache"); every write still carries the version read,
so a stale copy ends in `Conflict` and a reload, never in a lost update. Where several servers share the store a copy may be stale at any
time: what is shown to callers is read anew (`fresh`), and nobody is refused on the ground of a copy (`Settler`).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from mcp_control.kernel.changes import Change, Entity, Fact, Key
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.storage.ports import Store
from mcp_control.tasks.limit_model import HoldChange
from mcp_control.tasks.limiting import settled
from mcp_control.tasks.model import FINAL_STATES, LogLine, Task
from mcp_control.tasks.records import readable, write, write_log

_NOTHING: Final = Change()
_UNREADABLE_MAX: Final = 1000


class Move(msgspec.Struct, frozen=True, gc=False):
    """A task's next value, the facts that go with it, what else is written with it, and the cold parts it brings.

    `taken`: how many of its holds, the last ones, it takes with this move.
    """

    after: Task
    facts: Sequence[Fact] = ()
    payload: bytes | None = None
    result: bytes | None = None
    lines: Sequence[LogLine] = ()
    writes: Sequence[Entity] = ()
    taken: int = 0


Decide = Callable[[Task], Move | None]


class Intent(msgspec.Struct, frozen=True, gc=False):
    """What somebody wants of a task: `decide` looks at it as it is and returns its move, None for no change, or raises a Problem.

    It may be called several times; only the last decision counts.
    """

    task_id: str
    decide: Decide


class Group(msgspec.Struct, frozen=True, gc=False):
    """What is committed together: moves of tasks, and whatever else belongs to it."""

    moves: Sequence[Move]
    writes: Sequence[Entity] = ()
    facts: Sequence[Fact] = ()


class HoldWatcher(Protocol):
    """Hears what became of holds on limits and keys by this server's commits."""

    def changed(self, changes: Sequence[HoldChange]) -> None:
        """Hear of committed changes."""
        ...

    def unsure(self, names: Sequence[str]) -> None:
        """Hear of gates whose holds may have changed, or are not what was thought."""
        ...


Questions = Callable[[Task, str], tuple[Task, Sequence[Entity], Sequence[Fact]]]


def _nobody_asks(task: Task, actor: str) -> tuple[Task, Sequence[Entity], Sequence[Fact]]:
    raise RuntimeError("nobody keeps the questions")


class _Kept(msgspec.Struct, gc=False):
    task: Task
    payload: bytes | None


def _plain(group: Group) -> Move | None:
    """Return the one move of a group that is nothing but that."""
    if len(group.moves) != 1 or group.writes or group.facts:
        return None
    move = group.moves[0]
    after = move.after
    return None if move.lines or move.writes or after.holds or after.asked is not None else move


class Ledger:
    """Reads and writes tasks.

    Attributes:
        finished: called with the id of every task that became final by this server, after the commit.
        drew: called with those among them that draw from budgets.
        joined: called with the group of those among them that are members of one.
        questions: makes of a task with a question what that writes to the inbox and tells, with the actor of its move.
        unreadable: rows that cannot be decoded, by id; to whoever asks for them they are not there, until they are parked.

    Args:
        shared: other servers write tasks too.
    """

    def __init__(
        self, store: Store, capacity: int = 50_000, payload_bytes: int = 128 << 20, shared: bool = False
    ) -> None:
        self._store = store
        self.shared = shared
        self._capacity = capacity
        self._payload_room = payload_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.unreadable: dict[str, Entity] = {}
        self.finished: list[Callable[[str], None]] = []
        self.holds: HoldWatcher | None = None
        self.drew: Callable[[Task], None] = lambda _: None
        self.joined: Callable[[str], None] = lambda _: None
        self.questions: Questions = _nobody_asks

    async def load(self, ids: Sequence[str], *, fresh: bool = False) -> list[Task | None]:
        """Return tasks in the order of the ids, None where there is none. `fresh`: as the store has them, whoever wrote them."""
        if fresh and self.shared:
            return [None if entity is None else self._read(entity) for entity in await self._store.get("task", ids)]
        kept = self._kept
        found: list[Task | None] = [entry.task if (entry := kept.get(task_id)) else None for task_id in ids]
        missing = [place for place, task in enumerate(found) if task is None]
        if missing:
            entities = await self._store.get("task", [ids[place] for place in missing])
            for place, entity in zip(missing, entities, strict=True):
                if entity is not None:
                    found[place] = self._read(entity)
        return found

    async def load_with_payload(
        self, ids: Sequence[str], usable: Callable[[Task], bool] = lambda _: True
    ) -> list[tuple[Task, bytes] | None]:
        """Return tasks with their payloads, None where there is no such task.

        Args:
            usable: on a shared store, a copy in memory that is not usable is taken for stale and read anew.
        """
        kept = self._kept
        found: list[tuple[Task, bytes] | None] = []
        missing: list[int] = []
        for place, task_id in enumerate(ids):
            entry = kept.get(task_id)
            if entry is not None and entry.payload is not None and (not self.shared or usable(entry.task)):
                found.append((entry.task, entry.payload))
            else:
                found.append(None)
                missing.append(place)
        if missing:
            entities = await self._store.get("task", [ids[place] for place in missing], ("payload",))
            for place, entity in zip(missing, entities, strict=True):
                task = None if entity is None else self._read(entity)
                if entity is not None and task is not None:
                    found[place] = (task, entity.cold.get("payload", b"null"))
        return found

    def leased(self, task_id: str, token: str) -> bool:
        """Say whether a task is known in memory to be held under this lease; False also where it is not in memory."""
        entry = self._kept.get(task_id)
        return entry is not None and entry.task.lease is not None and entry.task.lease.opens(token)

    def draws(self, task_id: str) -> bool:
        """Say whether a task may draw from budgets: False only where it is in memory and does not."""
        entry = self._kept.get(task_id)
        return entry is None or bool(entry.task.draws)

    def forget(self, ids: Sequence[str]) -> None:
        """Drop tasks from memory; the next load reads the store."""
        for task_id in ids:
            entry = self._kept.pop(task_id, None)
            if entry is not None and entry.payload is not None:
                self._payload_room += len(entry.payload)

    async def commit(self, groups: Sequence[Group]) -> list[list[Task] | Problem]:
        """Commit groups, each all or nothing and on its own; returns per group its tasks as they are stored now, or why it was refused.

        Raises:
            Problem: the store refused the whole call or its outcome is unknown; nothing is kept in memory then.
        """
        changes: list[Change] = []
        written: list[list[Task]] = []
        held: dict[int, list[HoldChange]] = {}
        for group in groups:
            if (plain := _plain(group)) is not None:  # nearly all: one task, and nothing that goes with it
                task, entity = write(plain.after, plain.payload, plain.result)
                changes.append(Change([entity], (), plain.facts))
                written.append([task])
                continue
            entities: list[Entity] = []
            deletes: list[Key] = []
            facts: list[Fact] = []
            after: list[Task] = []
            for move in group.moves:
                task = move.after
                if move.lines:
                    entities.append(write_log(task, list(move.lines)))
                    task = msgspec.structs.replace(task, log_lines=task.log_lines + len(move.lines))
                if task.holds:
                    task, holds, let_go, became = settled(task, move.taken)
                    entities += holds
                    deletes += let_go
                    held.setdefault(len(changes), []).extend(became)
                if task.asked is not None:
                    task, asked, told = self.questions(task, move.facts[0].actor if move.facts else "system")
                    entities += asked
                    facts += told
                task, entity = write(task, move.payload, move.result)
                entities.append(entity)
                entities += move.writes
                facts += move.facts
                after.append(task)
            entities += group.writes
            facts += group.facts
            changes.append(Change(entities, deletes, facts))
            written.append(after)
        try:
            outcomes = await self._store.commit(changes)
        except BaseException:
            self.forget([task.id for after in written for task in after])
            if self.holds is not None and held:
                self.holds.unsure([one.name for became in held.values() for one in became])
            raise
        results: list[list[Task] | Problem] = []
        for group, after, outcome in zip(groups, written, outcomes, strict=True):
            if outcome is None:
                for task, move in zip(after, group.moves, strict=True):
                    self._keep(task, move.payload)
                results.append(after)
                continue
            if isinstance(outcome, Conflict):
                self.forget([task.id for task in after])
            results.append(outcome)
        if self.holds is not None:
            for place, became in held.items():
                if outcomes[place] is None:
                    self.holds.changed(became)
                else:
                    self.holds.unsure([one.name for one in became])
        return results

    def _keep(self, task: Task, payload: bytes | None) -> None:
        kept = self._kept
        if task.state in FINAL_STATES:
            self.forget((task.id,))
            if task.draws:
                self.drew(task)
            if task.links.group_id is not None:
                self.joined(task.links.group_id)
            for hear in self.finished:
                hear(task.id)
            return
        entry = kept.get(task.id)
        if entry is not None:
            if entry.task.version < task.version:
                entry.task = task
            return
        if task.holds and any(hold.ends == "due" for hold in task.holds):
            payload = None  # a debounced task's payload may be replaced yet, by any server
        if payload is not None:
            if self._payload_room < len(payload):
                payload = None
            else:
                self._payload_room -= len(payload)
        kept[task.id] = _Kept(task, payload)
        while len(kept) > self._capacity:
            self.forget((next(iter(kept)),))

    def _newer(self, task: Task) -> Task:
        """Return the newer of a task just read and the one in memory: a read may have been overtaken by a write."""
        entry = self._kept.get(task.id)
        if entry is None:
            return task
        if entry.task.version > task.version:
            return entry.task
        entry.task = task
        return task

    def readable(self, entities: Sequence[Entity]) -> list[Task]:
        """Return the tasks of entities just read; those that cannot be decoded are left out."""
        return [task for entity in entities if (task := self._read(entity)) is not None]

    def _read(self, entity: Entity) -> Task | None:
        task = readable(entity)
        if task is not None:
            return self._newer(task)
        if len(self.unreadable) < _UNREADABLE_MAX:
            self.unreadable[entity.id] = entity
        return None


class Waiters:
    """Callers that wait for tasks to become final."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def expect(self, task_id: str) -> asyncio.Future[None]:
        """Return a future that is done when the task has become final."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task_id, []).append(future)
        return future

    def abandon(self, task_id: str, future: asyncio.Future[None]) -> None:
        """Stop waiting."""
        futures = self._waiting.get(task_id)
        if futures and future in futures:
            futures.remove(future)
            if not futures:
                del self._waiting[task_id]

    def ended(self, task_id: str) -> None:
        """Tell everybody who waits for this task."""
        for future in self._waiting.pop(task_id, ()):
            if not future.done():
                future.set_result(None)
