"""Random histories of tasks with limits: never more than was said, nothing leaks, everybody gets in, through losses and restarts."""

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mcp_control.agents.model import AgentSpec, Capability
from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import LeaseSuperseded
from mcp_control.security.model import Actor
from mcp_control.tasks.limit_model import HOLD_KIND, Gate
from mcp_control.tasks.limiting import gate_name, hold_id, read_taken
from mcp_control.tasks.model import FINAL_STATES, HELD_STATES, Failure, Task, TaskState
from mcp_control.tasks.records import read
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, Peer, World, world_at

T = TypeVar("T")
S = TaskState
WINDOW_MS: Final = 10_000
BURST: Final = 2
LIMITS: Final[dict[str, dict[str, object]]] = {
    "a": {"key": "a", "concurrency": 1},
    "b": {"key": "b", "concurrency": 2},
    "c": {"key": "c", "concurrency": 3},
    "r": {"key": "r", "rate": {"count": BURST, "seconds": WINDOW_MS / 1000}},
}
INSIDE: Final = frozenset({S.QUEUED, *HELD_STATES})


class Limited(RuleBasedStateMachine):
    """Everything that can happen to tasks that wait for limits."""

    @initialize()
    def begin(self) -> None:
        """Open a world with one agent on an empty folder."""
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.stack: AsyncExitStack | None = None
        self.peer: Peer | None = None
        self.run(self._open())

    async def _open(self) -> None:
        self.stack = AsyncExitStack()
        self.world: World = await self.stack.enter_async_context(world_at(Path(self.folder.name), self.clock))
        if self.peer is None:
            spec = AgentSpec(name="w", capabilities=[Capability(name="echo")], slots=4)
            agent = (await self.world.manager.register(ADMIN, spec)).agent
            self.peer = Peer(self.world, Actor(id=agent.id, kind="agent", roles=("agent",)), spec)
        self.peer.world = self.world
        await self._connect()

    async def _connect(self) -> None:
        assert self.peer is not None
        try:
            await self.peer.connect(*[task.id for task in await self._held()])
        except LeaseSuperseded:
            self.peer.instance_id = None
            await self.peer.connect()
        await self._calm()

    async def _all(self) -> list[Task]:
        return [read(row) for row in await self.world.store.find("task", Query(limit=1000))]

    async def _held(self) -> list[Task]:
        return [task for task in await self._all() if task.state in HELD_STATES]

    async def _calm(self) -> None:
        """Let what runs in the background come to rest."""
        await self.world.limits.revisit()
        await self.world.until(self._at_rest, 20)

    async def _at_rest(self) -> bool:
        world = self.world
        return world.limits.idle and world.dispatcher.idle and not world.settler.handing.background.busy

    def teardown(self) -> None:
        """Everything that is there gets through in the end, and leaves nothing behind."""
        if not hasattr(self, "runner"):
            return
        try:
            if self.stack is not None:
                self.run(self._finish(), 60)
        finally:
            if self.stack is not None:
                self.run(self.stack.aclose())
            self.runner.close()
            self.folder.cleanup()

    async def _finish(self) -> None:
        open_ones = [task for task in await self._all() if not task.final]
        # One start of the slowest rate at least in each round, so nobody waits longer than there are tasks.
        for _ in range(3 * len(open_ones) + 3):
            for task in await self._held():
                await self._done(task, "completed")
            self.clock.advance(WINDOW_MS / 1000 + 0.1)
            await self._renew()
            await self.world.timekeeper.once()
            await self._calm()
            await self.check()
        assert [task.state for task in await self._all() if not task.final] == []
        assert [row for row in await self.world.store.find(HOLD_KIND.name, Query(limit=9)) if row.index["holder"]] == []
        assert await self.world.limits.tidy(self.clock.now()) == 0

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 20) -> T:
        """Run one step on the loop of this history."""

        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await work

        return self.runner.run(bounded())

    async def _renew(self) -> None:
        assert self.peer is not None
        instance = self.peer.live.instance
        if self.world.sessions.get(instance.id) is None or instance.lease_until < self.clock.now():
            await self.world.leases.once()
            self.peer.instance_id = None
        await self._connect()

    async def _done(self, task: Task, outcome: str) -> None:
        assert self.peer is not None
        given = self.peer.given.get(task.id)
        if given is None or task.lease is None or given.lease_token != task.lease.token:
            return
        more = {"failure": Failure()} if outcome == "failed" else {}
        await self.peer.done(given, outcome, **more)

    @rule(
        keys=st.sets(st.sampled_from(sorted(LIMITS)), min_size=1),
        priority=st.sampled_from([10, 50, 90]),
        ends=st.booleans(),
    )
    def submit(self, keys: set[str], priority: int, ends: bool) -> None:
        """Submit a task with some of the limits."""

        async def go() -> None:
            deadline = to_datetime(self.clock.now() + 25_000) if ends else None
            limits = [LIMITS[key] for key in sorted(keys)]
            retry = {"max_attempts": 2, "first_seconds": 2}
            await self.world.submit(limits=limits, priority=priority, retry=retry, deadline=deadline)
            await self._calm()

        self.run(go())

    @rule(number=st.integers(0, 20), outcome=st.sampled_from(["completed", "completed", "failed", "released"]))
    def report(self, number: int, outcome: str) -> None:
        """An attempt ends."""

        async def go() -> None:
            held = await self._held()
            if held:
                await self._done(held[number % len(held)], outcome)
                await self._calm()

        self.run(go())

    @rule(number=st.integers(0, 20), how=st.sampled_from(["cancel", "pause", "resume"]))
    def control(self, number: int, how: str) -> None:
        """Somebody cancels, holds back or lets go a task."""

        async def go() -> None:
            open_ones = [task for task in await self._all() if not task.final]
            if open_ones:
                task = open_ones[number % len(open_ones)]
                await getattr(self.world.control, how)(ADMIN, task.id)
                if how == "cancel" and task.state in HELD_STATES:
                    await self._done(task, "cancelled")
                elif how == "pause":
                    await self._calm()
                    await self.check()
                    await self.world.control.resume(ADMIN, task.id)
                await self._calm()

        self.run(go())

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0, 26.0]))
    def time(self, seconds: float) -> None:
        """Time goes on; the agent's pulse does, too."""

        async def go() -> None:
            self.clock.advance(seconds)
            await self._renew()
            await self.world.timekeeper.once()
            await self._calm()

        self.run(go())

    @rule()
    def lose(self) -> None:
        """The agent goes silent; what it held is queued again or ends."""

        async def go() -> None:
            self.clock.advance(31)
            await self.world.leases.once()
            await self._calm()
            await self.check()
            await self._renew()

        self.run(go())

    @rule()
    def restart(self) -> None:
        """The server ends and begins again on the same folder."""
        assert self.stack is not None
        self.run(self.stack.aclose())
        self.run(self._open())

    @invariant()
    def holds(self) -> None:
        """What `check` says."""
        if hasattr(self, "runner"):
            self.run(self.check())

    async def check(self) -> None:
        """Never more than a limit inside; every hold belongs to a task that has it; blocked tasks hold at most a part."""
        tasks = await self._all()
        for key, most in (("a", 1), ("b", 2), ("c", 3)):
            name = gate_name("default", Gate(key=key, slots=most))
            inside = [task for task in tasks if task.state in INSIDE and any(gate.key == key for gate in task.gates)]
            assert len(inside) <= most
            assert all(any(hold.name == name for hold in task.holds) for task in inside)
        rows = await self.world.store.find(HOLD_KIND.name, Query(where=[Where("holder", "gt", "")], limit=1000))
        stored = {(row.id, read_taken(row).holder) for row in rows}
        assert stored == {(hold_id(hold.name, hold.number), task.id) for task in tasks for hold in task.holds}
        assert not any(task.holds for task in tasks if task.state in FINAL_STATES)
        starts = sorted(
            attempt.assigned_at
            for task in tasks
            if any(gate.key == "r" for gate in task.gates)
            for place, attempt in enumerate(task.attempts)
            if place == 0 or task.attempts[place - 1].outcome in ("failed", "timeout")
        )
        assert all(later - first >= WINDOW_MS for first, later in zip(starts, starts[BURST:], strict=False))


@pytest.mark.parametrize(
    "examples", [3, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)])], ids=["quick", "long"]
)
def test_limits_hold_in_random_histories(examples: int) -> None:
    """See `Limited`."""
    run_state_machine_as_test(
        Limited,
        settings=settings(
            max_examples=examples, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
