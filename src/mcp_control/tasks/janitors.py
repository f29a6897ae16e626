"""The janitors of tasks: what time brings about, one `once` each. The app runs them with `kernel/loops.py`; tests call them."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import structlog
from msgspec.structs import replace

from mcp_control.agents.service import AgentManager
from mcp_control.kernel.changes import Change, Entity, IndexValue, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.ports import Queue, Store
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.asking import KIND as QUESTION_KIND
from mcp_control.tasks.asking import inbox_ids
from mcp_control.tasks.budget_model import BUDGET_KIND
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.ledger import Intent, Ledger
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.records import queued, readable, write
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.verbs import losing, timing

_log = structlog.get_logger(__name__)
_BATCH: Final = 500
_PAGE: Final = 2000
_JUMP_MS: Final = 1000
_USUAL_LEASE_MS: Final = 30_000
_LOGS: Final = 2000
_LOOKS: Final = 20


class Timekeeper:
    """Takes the steps that time asks for: promotion, attempt timeout, forced cancellation, deadline."""

    def __init__(
        self, store: Store, clock: Clock, settler: Settler, chance: Callable[[], float] = random.random
    ) -> None:
        self._store = store
        self._clock = clock
        self._settler = settler
        self._chance = chance

    async def once(self) -> int:
        """Handle everything that is due, in batches; returns how many tasks that were."""
        handled = 0
        while True:
            now = self._clock.now()
            due = await self._store.find("task", Query(where=[Where("due", "le", now)], order="due", limit=_BATCH))
            if not due:
                return handled
            await self._settler.settle([Intent(entity.id, timing(now, self._chance())) for entity in due])
            handled += len(due)
            if len(due) < _BATCH:
                return handled


class LeaseKeeper:
    """Ends the leases of instances that went silent.

    After a start, and whenever the wall clock jumps against the monotonic one, every lease is held for one full term from that moment
    (reliability, section 2, "Clock guard"): a server that was away, or a clock that was wrong, must not cost anybody their work.

    Attributes:
        lost: told of the agent of every lease that was ended.
    """

    def __init__(self, clock: Clock, manager: AgentManager, agents: AgentSessions) -> None:
        self._clock = clock
        self._manager = manager
        self._agents = agents
        self._held_from = clock.now()
        self._wall = self._held_from
        self._monotonic = clock.monotonic()
        self.holds = 0
        self.lost: Callable[[str], Awaitable[None]] | None = None

    def silence(self) -> int:
        """Give nothing new to instances connected here whose lease is over, whoever ends it; returns how many there are."""
        now = self._clock.now()
        silent = [
            session
            for session in self._manager.sessions.all()
            if not session.stalled and session.instance.lease_until < now
        ]
        for session in silent:
            self._agents.silence(session.instance.id)
        return len(silent)

    def hold(self, reason: str) -> None:
        """Let every lease run a full term from now on: nobody could have renewed theirs, or the time cannot be trusted."""
        self._held_from = self._clock.now()
        self.holds += 1
        _log.warning("leases.held", reason=reason)

    async def once(self) -> int:
        """End overdue leases; returns how many tasks were queued again."""
        try:
            return await self._end_overdue()
        except StoreUnavailable:
            self.hold("store-unavailable")
            raise

    async def _end_overdue(self) -> int:
        now = self._guarded()
        taken = 0
        overdue = await self._manager.instances.overdue(now)
        ending = [instance for instance in overdue if self._held_from + instance.lease_ms <= now]
        # All of them first: what is taken from one must not be handed to the next, or a task is lost several times at once.
        for instance in ending:
            self._agents.silence(instance.id)
        for instance in ending:
            taken += await self._agents.take_back(instance.id, now)
            if self.lost is not None:
                await self.lost(instance.agent_id)
            _log.warning("agents.lease_expired", instance=instance.id, agent=instance.agent_id)
        return taken

    @property
    def holding(self) -> bool:
        """Whether the clock jumped so lately that leases of the usual length hold longer for it."""
        return self.holds > 0 and self._clock.now() < self._held_from + _USUAL_LEASE_MS

    def _guarded(self) -> int:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        drift = (now - self._wall) - (monotonic - self._monotonic) * 1000
        self._wall, self._monotonic = now, monotonic
        if abs(drift) > _JUMP_MS:
            self.hold("clock-jumped")
        return now


class Reconciler:
    """Compares what is held and queued in memory with the store. What it finds is a fault of ours; the counters must stay 0.

    Args:
        broken: told `orphaned_task` when it finds any.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._broken = broken
        self._store = store
        self._clock = clock
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self.orphans = 0

    async def rebuild(self) -> int:
        """Fill the lanes from the store, at start; returns how many tasks wait."""
        waiting = 0
        async for tasks in self._queued():
            await self._dispatcher.enqueue(tasks)
            waiting += len(tasks)
        return waiting

    async def refill(self, queue: Queue) -> int:
        """Push everything that waits into a queue that several servers share and that lost something; returns how many tasks wait."""
        waiting = 0
        async for tasks in self._queued():
            await queue.push([queued(task) for task in tasks])
            waiting += len(tasks)
        return waiting

    async def _queued(self) -> AsyncIterator[list[Task]]:
        after: list[str] | None = None
        while True:
            page = await self._store.find(
                "task", Query(where=[Where("state", "eq", TaskState.QUEUED.value)], after=after, limit=_PAGE)
            )
            if page:
                yield [task for task in self._ledger.readable(page) if task.waits]
                after = [page[-1].id]
            if len(page) < _PAGE:
                return

    async def once(self) -> int:
        """Queue tasks again whose holder has ended without them; returns how many were found."""
        now = self._clock.now()
        found = 0
        ended: dict[str, bool] = {}
        for state in (TaskState.ASSIGNED, TaskState.RUNNING):
            after: list[str] | None = None
            while True:
                page = await self._store.find(
                    "task", Query(where=[Where("state", "eq", state.value)], after=after, limit=1000)
                )
                await self._check_holders(page, ended)
                lost = [entity for entity in page if ended.get(str(entity.index["holder"]))]
                self._ledger.forget([entity.id for entity in lost])
                await self._settler.settle(
                    [Intent(entity.id, losing(str(entity.index["holder"]), now)) for entity in lost]
                )
                found += len(lost)
                if len(page) < 1000:
                    break
                after = [page[-1].id]
        if found:
            self.orphans += found
            self._broken("orphaned_task")
            _log.error("tasks.orphans_found", tasks=found)
        self._dispatcher.forget_idle()
        return found

    async def _check_holders(self, page: list[Entity], ended: dict[str, bool]) -> None:
        unknown = sorted({str(entity.index["holder"]) for entity in page} - ended.keys())
        for instance_id, entity in zip(unknown, await self._store.get("instance", unknown), strict=True):
            ended[instance_id] = entity is None or entity.index.get("lease_until") is None


class Retention:
    """Removes finished tasks, their logs, budgets and questions after their time, a bounded batch at once."""

    def __init__(self, store: Store, clock: Clock, keep_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._keep_ms = keep_ms

    async def once(self) -> int:
        """Remove one batch of what is over its time; returns how many tasks that were."""
        before = self._clock.now() - self._keep_ms
        old = await self._store.find(
            "task", Query(where=[Where("finished", "lt", before)], order="finished", limit=_BATCH)
        )
        for task in old:
            logs = Query(where=[Where("task", "eq", task.id)], order="first", limit=_LOGS)
            while len(found := await self._store.find("log", logs)) == _LOGS:
                # More chunks than one change should delete: the task goes with the last of them.
                await self._store.commit([Change(deletes=[Key("log", log.id) for log in found])])
            known = readable(task)
            own = [Key(BUDGET_KIND.name, task.id)] if known is not None and task.id in known.draws else []
            if known is not None:
                own += [Key(QUESTION_KIND, each) for each in inbox_ids(known)]
            logged = [Key("log", log.id) for log in found]
            await self._store.commit([Change(deletes=[Key("task", task.id, task.version), *logged, *own])])
        return len(old)


class PayloadRetention:
    """Empties payloads and results of tasks that finished long ago; the tasks themselves, their attempts and logs stay.

    It goes through them in the order in which they finished, a bounded batch at once, and remembers how far it came; a server that
    begins to lead goes over those again that are emptied already, which costs it a look at each.
    """

    def __init__(self, store: Store, keep_ms: int) -> None:
        self._store = store
        self._keep_ms = keep_ms
        self._after: list[IndexValue] | None = None

    async def once(self, now: int) -> int:
        """Empty one batch of what is over its time; returns how many tasks that were. `now` is wall milliseconds."""
        for _ in range(_LOOKS):
            query = Query(
                where=[Where("finished", "lt", now - self._keep_ms)], order="finished", after=self._after, limit=_BATCH
            )
            found = await self._store.find("task", query)
            due = [task for entity in found if (task := readable(entity)) is not None and task.emptied_at is None]
            changes = [Change([write(replace(task, emptied_at=now), payload=b"", result=b"")[1]]) for task in due]
            outcomes = await self._store.commit(changes) if changes else []
            done = sum(outcome is None for outcome in outcomes)
            if done < len(due):
                return done  # something else happened to one of them: it is looked at again
            if found:
                self._after = [found[-1].index["finished"], found[-1].id]
            if done or len(found) < _BATCH:
                return done
        return 0
