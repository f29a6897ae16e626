"""Leases: agents that go silent, clocks that jump, servers that start again, answers that are lost."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from mcp_control.agents.model import Beat
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import LeaseSuperseded, OutcomeUnknown, Problem, StoreUnavailable
from mcp_control.storage.ports import Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.followers import Advance, NewTask
from mcp_control.tasks.ledger import Group, Intent, Move
from mcp_control.tasks.model import Failure, Links, Origin, Task, TaskSpec, TaskState
from mcp_control.tasks.records import CANCEL_GRACE_MS
from mcp_control.tasks.transitions import assign
from mcp_control.tasks.verbs import losing
from mcp_control.tasks.wire import Done, Progress, Started
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.faulty_store import FaultyStore
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState
SILENCE = 36  # seconds: the default lease of 30, a grace of 5, and one more


def faulty(folder: Path, rates: Mapping[Any, float]) -> FaultyStore:
    """Build a store whose faults follow `rates` as they change."""

    def fatal(problem: Problem) -> None:
        raise problem

    return FaultyStore(SqliteStore(folder, fatal=fatal), rates, Random(5))


async def has_state(world: World, task: Task, state: TaskState) -> None:
    """Wait until a task is in a state."""

    async def reached() -> bool:
        return (await world.task(task.id)).state is state

    await world.until(reached)


async def no_drift(world: World) -> None:
    """Wait until every session holds in memory what it holds in the store."""

    async def agreed() -> bool:
        for session in world.sessions.all():
            if session.held != {task.id for task in await world.agents.held_by(session.instance.id)}:
                return False
        return True

    await world.until(agreed)


# --- silence ------------------------------------------------------------------------------------------------------


async def test_work_of_a_silent_agent_moves_on_and_its_late_result_is_refused(
    tmp_path: Path,
) -> None:
    """An agent that stops for longer than its lease loses its task to another; what it reports on waking changes nothing."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        sleeper = await world.agent("sleeper")
        task = await world.submit()
        (old,) = await sleeper.until_given(1)
        await sleeper.start(old)
        clock.advance(SILENCE)
        assert await world.leases.once() == 1
        assert await world.leases.once() == 0
        lost = await world.task(task.id)
        assert (lost.state, lost.lost, lost.failures, lost.reason) == (S.QUEUED, 1, 0, "lease-lost")
        worker = await world.agent("worker")
        (new,) = await worker.until_given(1)
        assert (new.task_id, new.attempt) == (task.id, 2)
        assert _fence(new.fence) > _fence(old.fence)
        for told in (
            {"started": [Started(task_id=task.id, lease_token=old.lease_token)]},
            {"progress": [Progress(task_id=task.id, lease_token=old.lease_token, fraction=0.9)]},
            {"done": [Done(task_id=task.id, lease_token=old.lease_token, outcome="completed")]},
        ):
            assert [r.code for r in (await sleeper.report(**told)).refused] == [LeaseSuperseded.code]
        with pytest.raises(LeaseSuperseded):
            await world.agents.heartbeat(sleeper.live, Beat())
        assert (await worker.done(new, result=msgspec.Raw(b'"new"'))).refused == []
        assert [r.code for r in (await sleeper.done(old)).refused] == [LeaseSuperseded.code]
        (shown,) = await world.tasks.get(ADMIN, [task.id], ("result",))
        assert shown is not None
        assert (shown.state, bytes(shown.result or b"")) == (S.COMPLETED, b'"new"')


def _fence(fence: str) -> tuple[int, ...]:
    return tuple(map(int, fence.split(".")))


async def test_a_result_after_the_term_counts_while_nobody_took_the_task_back(tmp_path: Path) -> None:
    """Time passing ends no lease, a committed write does: a late result of the holder is accepted."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        clock.advance(3600)
        assert (await peer.done(peer.given[task.id])).refused == []
        assert (await world.task(task.id)).state is S.COMPLETED


async def test_heartbeats_keep_a_lease_for_ever(tmp_path: Path) -> None:
    """An agent that is heard every third of its term never loses its work."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        for tick in range(20):
            clock.advance(10)
            ack = await world.agents.heartbeat(peer.live, Beat(tick=tick, running=[task.id]))
            assert (ack.gone, ack.cancel, ack.drain) == ([], [], False)
            assert await world.leases.once() == 0
        assert (await world.task(task.id)).state is S.ASSIGNED


async def test_a_heartbeat_tells_what_is_gone_what_to_stop_and_to_drain(tmp_path: Path) -> None:
    """The answer to a heartbeat names tasks that are no longer the agent's and those to be cancelled."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        gone, stop = await world.submit(), await world.submit()
        await peer.done(peer.given[gone.id])
        await world.control.cancel(ADMIN, stop.id)
        await world.manager.drain(ADMIN, peer.actor.id)
        ack = await world.agents.heartbeat(peer.live, Beat(running=[gone.id, stop.id, "task_unknown"]))
        assert (ack.gone, ack.cancel, ack.drain) == ([gone.id, "task_unknown"], [stop.id], True)
        assert peer.cancelled == [stop.id]


async def test_three_silent_agents_quarantine_a_task(tmp_path: Path) -> None:
    """A task that takes three agents with it in a row is put aside, not given to a fourth."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        task = await world.submit()
        for number in range(3):
            peer = await world.agent(f"w{number}")
            await peer.until_given(1)
            clock.advance(SILENCE)
            await world.leases.once()
        found = await world.task(task.id)
        assert (found.state, found.reason, found.lost, found.failures) == (S.FAILED, "quarantined", 3, 0)


async def test_agents_that_fall_silent_together_cost_a_task_one_lease(tmp_path: Path) -> None:
    """What is taken from one silent agent is not handed to another one: a healthy task is not quarantined by an outage."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        for number in range(5):
            await world.agent(f"w{number}")
        task = await world.submit()
        clock.advance(SILENCE)
        assert await world.leases.once() == 1
        found = await world.task(task.id)
        assert (found.state, found.lost) == (S.QUEUED, 1)


async def test_a_silent_agent_with_a_cancelled_task_ends_it_cancelled(tmp_path: Path) -> None:
    """Nobody does again what was to be cancelled."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        await world.agent()
        task = await world.submit()
        await world.control.cancel(ADMIN, task.id, "enough")
        clock.advance(CANCEL_GRACE_MS / 1000 - 1)
        assert await world.timekeeper.once() == 0
        clock.advance(1)
        assert await world.timekeeper.once() == 1
        assert (await world.task(task.id)).state is S.CANCELLED
        await no_drift(world)


# --- clocks and restarts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [3600, -3600])
async def test_a_jump_of_the_wall_clock_costs_nobody_their_work(tmp_path: Path, jump: int) -> None:
    """After the wall clock jumped, no lease ends for one full term; then the silent ones do."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        clock.advance(31)
        await world.leases.once()
        clock.set_wall(clock.now() + jump * 1000)
        assert await world.leases.once() == 0
        assert world.leases.holds == 1
        clock.advance(29)
        assert await world.leases.once() == 0
        await world.agents.heartbeat(peer.live, Beat(running=[task.id]))
        clock.advance(2)
        assert await world.leases.once() == 0
        clock.advance(SILENCE)
        assert await world.leases.once() == 1


async def test_a_restart_holds_every_lease_for_one_term(tmp_path: Path) -> None:
    """A server that was away gives its agents a full term to come back before it takes their work."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        await peer.start(peer.given[task.id])
    clock.advance(3600)
    async with world_at(tmp_path, clock) as world:
        assert await world.leases.once() == 0
        clock.advance(29)
        assert await world.leases.once() == 0
        assert (await world.task(task.id)).state is S.RUNNING
        clock.advance(1)
        assert await world.leases.once() == 1
        assert (await world.task(task.id)).state is S.QUEUED


async def test_an_agent_goes_on_across_a_restart(tmp_path: Path) -> None:
    """An instance that comes back after a restart keeps its lease and its result counts."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        await peer.start(peer.given[task.id])
        before = peer.instance_id
    async with world_at(tmp_path, clock) as world:
        peer.world = world
        await peer.connect(task.id)
        assert peer.instance_id == before
        assert (await peer.done(peer.given[task.id])).refused == []
        assert (await world.task(task.id)).state is S.COMPLETED


async def test_queued_and_scheduled_tasks_survive_a_restart(tmp_path: Path) -> None:
    """Lanes are filled again from the store, in the old order, and delayed tasks come when they are due."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        waiting = [await world.submit(priority=priority) for priority in (30, 90, 30)]
        later = await world.submit(run_at=_after(clock, 60))
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        order = []
        for number in range(3):
            given = await peer.until_given(number + 1)
            order.append(given[-1].task_id)
            await peer.done(given[-1])
        assert order == [waiting[1].id, waiting[0].id, waiting[2].id]
        assert await world.timekeeper.once() == 0
        clock.advance(60)
        assert await world.timekeeper.once() == 1
        assert (await peer.until_given(4))[-1].task_id == later.id


def _after(clock: FakeClock, seconds: int) -> Any:
    return to_datetime(clock.now() + seconds * 1000)


# --- reconnecting -------------------------------------------------------------------------------------------------


async def test_a_reconnect_sends_again_what_the_agent_does_not_know_of(tmp_path: Path) -> None:
    """An assignment that was lost with the connection comes again under the same lease; known ones do not."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        known, unknown = await world.submit(), await world.submit()
        token = peer.given[unknown.id].lease_token
        peer.given.clear()
        await world.agents.disconnected(peer.live)
        await peer.connect(known.id)
        assert [one.lease_token for one in await peer.until_given(1)] == [token]
        assert list(peer.given) == [unknown.id]
        assert peer.live.held == {known.id, unknown.id}


async def test_a_connection_that_replaces_another_takes_over_what_it_holds(tmp_path: Path) -> None:
    """A reconnect before the old connection is noticed dead loses no slot and no task, and the old one's end changes nothing."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        task = await world.submit()
        before = peer.live
        await peer.connect(task.id)
        await world.agents.disconnected(before)
        assert world.sessions.get(peer.live.instance.id) is peer.live
        assert (peer.live.held, peer.live.free, before.free) == ({task.id}, 1, 0)
        await peer.done(peer.given[task.id])
        assert peer.live.free == 2


async def test_an_assignment_on_its_way_reaches_the_connection_that_is_there_then(tmp_path: Path) -> None:
    """A task committed to an instance while it reconnects is sent to the new connection and counted there."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        old = peer.live
        await world.agents.disconnected(old)
        old.accepting = True
        task = world.settler.handing.create(_new(world), world.clock.now())
        moved = assign(task[0], old.agent.id, old.instance.id, "token", world.clock.now())
        old.held.add(moved.id)
        await peer.connect()
        await world.ledger.commit([Group([Move(moved, payload=b"1")])])
        await world.settler.handing.begin([(moved, b"1", old)])
        assert moved.id in peer.given
        assert peer.live.held == {moved.id}


async def test_an_assignment_to_an_instance_that_left_meanwhile_is_queued_again(tmp_path: Path) -> None:
    """A task committed to an instance that ended in good order waits for nobody's lease to run out."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        old = peer.live
        await world.agents.leave(old)
        created = world.settler.handing.create(_new(world), world.clock.now())[0]
        moved = assign(created, old.agent.id, old.instance.id, "token", world.clock.now())
        await world.ledger.commit([Group([Move(moved, payload=b"1")])])
        await world.settler.handing.begin([(moved, b"1", old)])
        await has_state(world, moved, S.QUEUED)
        assert await world.reconciler.once() == 0
        other = await world.agent("other")
        await other.until_given(1)


async def test_a_slot_reserved_on_a_replaced_connection_becomes_free_again(tmp_path: Path) -> None:
    """A reservation that comes to nothing is given back on the connection the instance has by then."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        old = peer.live
        old.held.add("task_reserved")
        await peer.connect()
        assert peer.live.free == 0
        world.dispatcher.unreserve(old, "task_reserved")
        assert peer.live.free == 1
        await world.submit()
        await peer.until_given(1)


def _new(world: World) -> NewTask:
    return NewTask(id=world.ids.new("task"), spec=TaskSpec(type="echo"), links=Links(), origin=Origin())


async def test_a_failed_connect_leaves_no_session_behind(tmp_path: Path) -> None:
    """A connection that the store refused gets no work."""
    rates: dict[str, float] = {}
    store = faulty(tmp_path, rates)
    async with world_at(tmp_path, FakeClock(), store) as world:
        peer = await world.agent()
        await world.agents.disconnected(peer.live)
        failing = _FailingWhen(store, lambda: len(world.sessions) > 0, rates)
        world.manager.registry._store = failing  # the registry alone meets the fault
        with pytest.raises(StoreUnavailable):
            await peer.connect()
        rates.clear()
        assert len(world.sessions) == 0
        task = await world.submit()
        assert task.state is S.QUEUED


class _FailingWhen:
    """A store that becomes unavailable once a condition holds."""

    def __init__(self, inner: Store, when: Callable[[], bool], rates: dict[str, float]) -> None:
        self._inner = inner
        self._when = when
        self._rates = rates

    def __getattr__(self, name: str) -> Any:
        if self._when():
            self._rates["unavailable"] = 1.0
        return getattr(self._inner, name)


async def test_a_stale_report_does_not_free_the_slot_of_the_new_lease(tmp_path: Path) -> None:
    """An instance that holds a task again, and reports its old attempt late, still holds it."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit(timeout=1)
        old = peer.given[task.id]
        clock.advance(2)
        await world.timekeeper.once()
        clock.advance(2)
        await world.timekeeper.once()

        async def again() -> bool:
            return peer.given[task.id].attempt == 2

        await world.until(again)
        assert [refused.code for refused in (await peer.done(old)).refused] == [LeaseSuperseded.code]
        assert (peer.live.held, peer.live.free) == ({task.id}, 0)
        ack = await world.agents.heartbeat(peer.live, Beat(running=[task.id]))
        assert ack.gone == []
        assert (await peer.done(peer.given[task.id])).refused == []


# --- repairs ------------------------------------------------------------------------------------------------------


async def test_a_crash_between_taking_tasks_back_and_ending_the_instance_is_repaired(tmp_path: Path) -> None:
    """The instance is still overdue after the crash, and is ended then; nothing is taken back twice."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit()
        clock.advance(SILENCE)
        await world.settler.settle([Intent(task.id, losing(peer.live.instance.id, clock.now()))])
    clock.advance(SILENCE)
    async with world_at(tmp_path, clock) as world:
        clock.advance(SILENCE)
        assert await world.leases.once() == 0
        assert await world.manager.instances.overdue(clock.now()) == []
        found = await world.task(task.id)
        assert (found.state, found.lost) == (S.QUEUED, 1)
        other = await world.agent("other")
        await other.until_given(1)


async def test_tasks_of_an_ended_instance_are_found_and_queued_again(tmp_path: Path) -> None:
    """The reconciler takes back what an ended or unknown instance holds, and counts it as a fault."""
    async with world_at(tmp_path) as world:
        task = await world.submit()
        stored = await world.task(task.id)
        orphan = assign(stored, "agent_x", "inst_gone", "token", world.clock.now())
        ((held,),) = await world.ledger.commit([Group([Move(orphan)])])
        assert held.version == stored.version + 1
        assert await world.reconciler.once() == 1
        assert world.reconciler.orphans == 1
        assert (await world.task(task.id)).state is S.QUEUED
        assert await world.reconciler.once() == 0
        peer = await world.agent()
        await peer.until_given(1)


async def test_a_heartbeat_in_time_keeps_an_instance_whose_tasks_were_just_taken(tmp_path: Path) -> None:
    """An instance heard while its tasks are taken back lives on, knows they are gone and takes new work."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        task = await world.submit(needs={"agent": "worker"})
        clock.advance(SILENCE)
        now = clock.now()
        await world.agents.heartbeat(peer.live, Beat(running=[task.id]))
        assert await world.agents.take_back(peer.live.instance.id, now) >= 1
        assert world.sessions.get(peer.live.instance.id) is peer.live
        await no_drift(world)


Verb = Callable[[World, Peer, Task], Coroutine[Any, Any, Any]]
UNKNOWN: list[tuple[str, Verb]] = [
    ("taken-back", lambda w, p, t: w.agents.take_back(p.live.instance.id, w.clock.now())),
    ("left", lambda w, p, t: w.agents.leave(p.live)),
    ("released", lambda w, p, t: p.done(p.given[t.id], "released")),
    ("retried", lambda w, p, t: p.done(p.given[t.id], "failed", failure=Failure())),
    ("timed-out", lambda w, p, t: w.timekeeper.once()),
]


@pytest.mark.parametrize("fault", ["executed", "lost", "timeout"])
@pytest.mark.parametrize(("name", "verb"), UNKNOWN, ids=[name for name, _ in UNKNOWN])
async def test_a_task_is_not_forgotten_when_the_store_does_not_answer(
    tmp_path: Path, name: str, verb: Verb, fault: str
) -> None:
    """Whatever became of a commit without an answer, the task it would have queued is done by somebody, and no slot is lost."""
    rates: dict[str, float] = {}
    clock = FakeClock()
    async with world_at(tmp_path, clock, faulty(tmp_path, rates)) as world:
        peer = await world.agent()
        task = await world.submit(timeout=20, retry={"first_seconds": 0})
        clock.advance(SILENCE)
        rates[fault] = 1.0
        try:
            ack = await verb(world, peer, task)
            assert ack.retry
        except (OutcomeUnknown, StoreUnavailable):
            pass
        rates.clear()

        async def over() -> bool:
            await world.timekeeper.once()
            await world.leases.once()
            found = await world.task(task.id)
            if found.lease is not None and found.lease.instance_id == peer.instance_id and found.attempt == 1:
                await verb(world, peer, task)
            held = max((w.given[task.id] for w in workers if task.id in w.given), key=lambda given: given.attempt)
            if held.attempt > 1:
                for worker in workers:
                    await worker.done(held)
            return found.final

        workers = [peer, await world.agent("other")]
        await world.until(over, 8)
        found = await world.task(task.id)
        assert found.state is S.COMPLETED
        await no_drift(world)


async def test_a_caller_that_goes_away_takes_nobody_s_report_with_it(tmp_path: Path) -> None:
    """What was reported is settled although the connection is gone, and so is what others left for the same run meanwhile."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        follower = world.settler.follower = _SlowFollower()
        first, second = [await _of_run(world) for _ in range(2)]
        given = {one.task_id: one for one in await peer.until_given(2)}
        gone = asyncio.create_task(peer.done(given[first.id]))
        await follower.entered.wait()
        waiting = asyncio.create_task(peer.done(given[second.id]))
        await asyncio.sleep(0.01)
        gone.cancel()
        for _ in range(2):
            follower.turns.release()
        assert (await waiting).refused == []
        assert [(await world.task(one.id)).state for one in (first, second)] == [S.COMPLETED] * 2


async def test_a_caller_is_answered_although_its_run_stays_busy(tmp_path: Path) -> None:
    """Whoever settles a report does not wait for those that others leave for the same run: its own next frames are due."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        follower = world.settler.follower = _SlowFollower()
        tasks = [await _of_run(world) for _ in range(2)]
        given = {one.task_id: one for one in await peer.until_given(2)}
        first = asyncio.create_task(peer.done(given[tasks[0].id]))
        await follower.entered.wait()
        second = asyncio.create_task(peer.done(given[tasks[1].id]))
        await asyncio.sleep(0.01)
        follower.turns.release()
        assert (await asyncio.wait_for(first, 5)).refused == []
        assert not second.done()
        follower.turns.release()
        assert (await second).refused == []


class _SlowFollower:
    """A follower that follows when it is told to, once for each turn."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.turns = asyncio.Semaphore(0)

    async def follow(self, run_id: str, finished: Any, now: int) -> Advance:
        self.entered.set()
        await self.turns.acquire()
        return Advance()

    def settled(self, run_id: str, advance: Any, ok: bool) -> None:
        """Nothing to keep."""


async def _of_run(world: World) -> Task:
    new = msgspec.structs.replace(_new(world), links=Links(run_id="run_1", stage="s"))
    created = world.settler.handing.create(new, world.clock.now())
    await world.settler.handing.launch([created])
    return created[0]


async def test_a_repeated_report_counts_once(tmp_path: Path) -> None:
    """An agent that says twice that a task is done, as after a lost answer, has completed one task."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        await world.submit()
        (assignment,) = await peer.until_given()
        for _ in range(3):
            assert (await peer.done(assignment, result=msgspec.Raw(b"1"))).refused == []
        await world.manager.registry.restate(peer.live.agent.id)
        assert (await world.manager.get(ADMIN, "worker")).completed == 1
