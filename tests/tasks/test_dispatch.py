"""How waiting tasks and free slots find each other."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from mcp_control.agents.model import Agent, AgentSpec, Capability, Instance
from mcp_control.agents.sessions import Frame, Session, Sessions
from mcp_control.kernel.changes import Query
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import Conflict, Problem, StoreUnavailable
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import RANK_MAX, Queued
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.control import TaskEdit
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.model import Failure, Links, Origin, Task, TaskSpec, TaskState
from mcp_control.tasks.polling import PollOutbox
from mcp_control.tasks.records import read
from mcp_control.tasks.service import Submitted
from mcp_control.tasks.wire import UNKNOWN_TYPE, Assignment, Done, Hello
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.faulty_store import FaultyStore
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState


async def _all(world: World) -> list[Task]:
    return [read(entity) for entity in await world.store.find("task", Query(limit=20_000))]


async def _state(world: World, task: Task, state: TaskState) -> None:
    async def reached() -> bool:
        return (await world.task(task.id)).state is state

    await world.until(reached)


async def _calm(world: World) -> None:
    """Wait until the dispatcher has done what it can."""

    async def calm() -> bool:
        return world.dispatcher.idle

    await world.until(calm)


async def _order_of(peer: Peer, count: int) -> list[str]:
    """Take tasks one at a time and finish each; returns their ids in the order in which they came."""
    order: list[str] = []
    for number in range(count):
        given = await peer.until_given(number + 1)
        order.append(given[-1].task_id)
        await peer.done(given[-1])
    return order


# --- order --------------------------------------------------------------------------------------------------------


async def test_priority_wins_across_the_lanes_of_an_agent_and_age_inside(tmp_path: Path) -> None:
    """The highest priority of all lanes comes first; equal ones of a lane come in the order of their submission."""
    async with world_at(tmp_path) as world:
        wanted = [(kind, priority) for priority in (30, 90, 50) for kind in ("a", "b", "a")]
        tasks = [await world.submit(kind, priority=priority) for kind, priority in wanted]
        peer = await world.agent("worker", "a", "b")
        order = await _order_of(peer, len(tasks))
        by_id = {task.id: task for task in tasks}
        assert [by_id[task_id].priority for task_id in order] == sorted((p for _, p in wanted), reverse=True)
        for kind in ("a", "b"):
            for priority in (30, 50, 90):
                same = [t.id for t in tasks if t.type == kind and t.priority == priority]
                assert [task_id for task_id in order if task_id in same] == same


async def test_a_lane_nobody_serves_holds_nobody_up(tmp_path: Path) -> None:
    """Tasks below the priority of an unserved lane still get the slots that are free, even when a better one was withdrawn."""
    async with world_at(tmp_path) as world:
        await world.submit("nobody", priority=50)
        urgent = await world.submit("echo", priority=90)
        plain = await world.submit("echo", priority=10)
        await world.control.cancel(ADMIN, urgent.id)
        peer = await world.agent()
        (given,) = await peer.until_given(1)
        assert given.task_id == plain.id


async def test_a_new_task_never_overtakes_a_waiting_one(tmp_path: Path) -> None:
    """Placing a task at once on a free agent is refused where one of at least its priority waits for that agent."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("worker", "a", "b")
        busy = await world.submit("a")
        await peer.until_given(1)
        waiting = [await world.submit("a"), await world.submit("b")]
        # The slot becomes free and a newcomer arrives before the dispatcher has run.
        done = asyncio.create_task(peer.done(peer.given[busy.id]))
        newcomer = asyncio.create_task(world.submit("b"))
        await asyncio.gather(done, newcomer)
        order = [busy.id, *await _order_of_rest(peer, 3)]
        assert order == [busy.id, waiting[0].id, waiting[1].id, newcomer.result().id]


async def _order_of_rest(peer: Peer, count: int) -> list[str]:
    seen = 1
    order = []
    for _ in range(count):
        given = await peer.until_given(seen + 1)
        order.append(given[-1].task_id)
        await peer.done(given[-1])
        seen += 1
    return order


async def test_an_idle_agent_gets_a_task_with_the_commit_that_accepts_it(tmp_path: Path) -> None:
    """On an idle system a task is assigned in the change that creates it, with both facts."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit()
        assert task.state is S.ASSIGNED
        assert list(peer.given) == [task.id]
        assert [f.fact.type for f in world.facts if f.fact.subject == task.id] == ["task.queued", "task.assigned"]


async def test_a_raised_priority_moves_a_waiting_task_ahead(tmp_path: Path) -> None:
    """Editing the priority of a queued task gives it its new place."""
    async with world_at(tmp_path) as world:
        first, second = await world.submit(), await world.submit()
        await world.control.edit(ADMIN, second.id, TaskEdit(priority="critical"), second.version)
        peer = await world.agent()
        assert await _order_of(peer, 2) == [second.id, first.id]


async def test_the_nearest_deadline_comes_first_and_retried_tasks_keep_their_place(tmp_path: Path) -> None:
    """What must hurry overtakes; a task that an agent handed back is before those that came after it."""
    async with world_at(tmp_path) as world:
        now = world.clock.now()
        plain = await world.submit()
        later = await world.submit(deadline=to_datetime(now + 60_000).isoformat())
        sooner = await world.submit(deadline=to_datetime(now + 30_000).isoformat())
        peer = await world.agent()
        (first,) = await peer.until_given(1)
        assert first.task_id == sooner.id
        await world.manager.drain(ADMIN, peer.actor.id)
        await peer.done(first, "released")
        await world.manager.resume(ADMIN, peer.actor.id)
        peer.given.clear()
        assert await _order_of(peer, 3) == [sooner.id, later.id, plain.id]


async def test_a_low_priority_has_its_turn_while_higher_ones_keep_coming(tmp_path: Path) -> None:
    """A waiting task overtakes those of a higher priority that came later than the difference is worth."""
    async with world_at(tmp_path) as world:
        low = await world.submit(priority=40)
        world.clock.advance(59)  # type: ignore[attr-defined]  # the world of tests has a fake clock
        before = await world.submit(priority=50)
        world.clock.advance(2)  # type: ignore[attr-defined]  # as above
        after = await world.submit(priority=50)
        peer = await world.agent()
        assert await _order_of(peer, 3) == [before.id, low.id, after.id]


async def test_a_deadline_that_cannot_be_met_is_said_at_once(tmp_path: Path) -> None:
    """The answer to a submission warns where tasks of the type usually take longer than there is time."""
    async with world_at(tmp_path) as world:
        for _ in range(10):
            world.history.ran("default", "echo", 20.0, True)
        await world.history.once(world.clock.now())
        await world.agent()
        specs = [
            TaskSpec(type="echo", deadline=to_datetime(world.clock.now() + seconds * 1000)) for seconds in (15, 30)
        ]
        late, in_time = await world.tasks.submit(ADMIN, specs, Origin())
        assert isinstance(late, Submitted)
        assert isinstance(in_time, Submitted)
        assert len(late.warnings) == 1
        assert "usually take" in late.warnings[0]
        assert in_time.warnings == []


# --- who ----------------------------------------------------------------------------------------------------------


async def test_credit_is_never_exceeded(tmp_path: Path) -> None:
    """No instance holds more tasks than it has slots, whatever arrives at once."""
    async with world_at(tmp_path) as world:
        peers = [await world.agent(f"w{n}", slots=n + 1) for n in range(3)]
        specs = [TaskSpec(type="echo")] * 40
        await asyncio.gather(*(world.tasks.submit(ADMIN, specs[n::8], Origin()) for n in range(8)))
        for _ in range(40):
            for peer in peers:
                assert len(peer.live.held) <= peer.live.slots
                assert len(await world.agents.held_by(peer.live.instance.id)) <= peer.live.slots
            held = [(peer, task_id) for peer in peers for task_id in list(peer.live.held) if task_id in peer.given]
            if held:
                peer, task_id = held[0]
                await peer.done(peer.given[task_id])
        assert all(task.state is S.COMPLETED for task in await _all(world))


Order = Callable[[World, Peer], Coroutine[Any, Any, object]]


async def _stall(world: World, peer: Peer) -> None:
    world.clock.advance(20)  # type: ignore[attr-defined]  # the world of tests has a fake clock
    beat = msgspec.structs.replace(peer.live.instance.beat, tick=1, running=["something"])
    await world.agents.heartbeat(peer.live, beat)
    for _ in range(4):
        world.clock.advance(20)  # type: ignore[attr-defined]  # as above
        await world.agents.heartbeat(peer.live, beat)
    assert peer.live.stalled


async def _unstall(world: World, peer: Peer) -> None:
    beat = msgspec.structs.replace(peer.live.instance.beat, tick=2)
    await world.agents.heartbeat(peer.live, beat)


ORDERED_OFF: list[tuple[Order, Order]] = [
    (lambda w, p: w.manager.drain(ADMIN, p.actor.id), lambda w, p: w.manager.resume(ADMIN, p.actor.id)),
    (lambda w, p: w.manager.quarantine(ADMIN, p.actor.id), lambda w, p: w.manager.resume(ADMIN, p.actor.id)),
    (_stall, _unstall),
]


@pytest.mark.parametrize(("off", "on"), ORDERED_OFF, ids=["drained", "quarantined", "stalled"])
async def test_an_agent_that_may_not_work_gets_nothing_until_it_may(tmp_path: Path, off: Order, on: Order) -> None:
    """Drained, quarantined and stalled agents get nothing; what waited comes as soon as they may work again."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        other = await world.agent("other")
        await off(world, peer)
        task = await world.submit()
        assert list(other.given) == [task.id]
        waiting = await world.submit()
        assert (await world.task(waiting.id)).state is S.QUEUED
        assert peer.given == {}
        await on(world, peer)
        (given,) = await peer.until_given(1)
        assert given.task_id == waiting.id


async def test_a_retired_agent_gets_nothing(tmp_path: Path) -> None:
    """After `retire` an agent finishes what it has and gets no more."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        first = await world.submit()
        await world.manager.retire(ADMIN, peer.actor.id)
        second = await world.submit()
        assert list(peer.given) == [first.id]
        assert (await peer.done(peer.given[first.id])).refused == []
        assert (await world.task(second.id)).state is S.QUEUED


async def test_a_pinned_task_waits_for_its_agent(tmp_path: Path) -> None:
    """A task pinned by name or by hand goes to that agent alone, and asking twice for the same agent changes nothing."""
    async with world_at(tmp_path) as world:
        other = await world.agent("other", slots=5)
        named = await world.submit(needs={"agent": "mine"})
        by_hand = await world.submit("echo2")
        spec = AgentSpec(name="mine", capabilities=[Capability(name="echo"), Capability(name="echo2")], slots=2)
        agent = (await world.manager.register(ADMIN, spec)).agent
        for _ in range(2):
            assert (await world.control.assign(ADMIN, by_hand.id, "mine")).state is S.QUEUED
        mine = Peer(world, msgspec.structs.replace(other.actor, id=agent.id), spec)
        await mine.connect()
        assert {given.task_id for given in await mine.until_given(2)} == {named.id, by_hand.id}
        assert other.given == {}


async def test_a_task_is_placed_on_the_least_loaded_agent(tmp_path: Path) -> None:
    """Work spreads: of several free agents the one with the smallest share of used slots gets the next task."""
    async with world_at(tmp_path) as world:
        peers = [await world.agent(f"w{n}", slots=4) for n in range(3)]
        for _ in range(6):
            await world.submit()
        assert [len(peer.given) for peer in peers] == [2, 2, 2]


async def test_waiting_lanes_are_matched_with_an_agent_that_connects_later(tmp_path: Path) -> None:
    """Lanes that no agent served when they began are served by the first that fits."""
    async with world_at(tmp_path) as world:
        tasks = [await world.submit("late", type_version=wanted) for wanted in ("*", "1", ">=1")]
        await world.agent("other", slots=9)
        peer = await world.agent("late", "late", slots=9)
        given = await peer.until_given(3)
        assert {assignment.task_id for assignment in given} == {task.id for task in tasks}


async def test_an_agent_that_learns_something_new_gets_what_waited_for_it(tmp_path: Path) -> None:
    """A changed specification is matched with the lanes at once."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("w", "a")
        task = await world.submit("b")
        spec = msgspec.structs.replace(peer.spec, capabilities=[Capability(name="a"), Capability(name="b")])
        await world.manager.register(ADMIN, spec)
        (given,) = await peer.until_given(1)
        assert given.task_id == task.id


async def test_more_slots_mean_more_tasks_at_once(tmp_path: Path) -> None:
    """Editing the slots of a connected agent changes its credit at once."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        for _ in range(3):
            await world.submit()
        assert len(peer.given) == 1
        await world.manager.register(ADMIN, msgspec.structs.replace(peer.spec, slots=3))
        await peer.until_given(3)


async def test_lanes_of_the_past_are_forgotten_and_come_back(tmp_path: Path) -> None:
    """Lanes in which nothing waits cost nothing and work again when something does."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        await peer.done(peer.given[(await world.submit()).id])
        world.dispatcher.forget_idle()
        assert list(world.dispatcher.lanes()) == []
        first, second = await world.submit(), await world.submit()
        world.dispatcher.forget_idle()
        await peer.done(peer.given[first.id])
        await peer.until_given(3)
        assert second.id in peer.given


# --- pollers ------------------------------------------------------------------------------------------------------


async def test_a_poller_gets_no_more_than_it_asks_for(tmp_path: Path) -> None:
    """An agent without a socket is given tasks only while it asks, at most as many as it asks for."""
    async with world_at(tmp_path) as world:
        spec = AgentSpec(name="poller", capabilities=[Capability(name="echo")], slots=5)
        agent = (await world.manager.register(ADMIN, spec)).agent
        outbox = PollOutbox()
        actor = msgspec.structs.replace(ADMIN, id=agent.id, kind="agent", roles=("agent",))
        session = await world.agents.connect(actor, Hello(agent=spec), outbox.send, allowance=0)
        assert outbox.welcome().instance_id == session.instance.id
        tasks = [await world.submit() for _ in range(6)]
        assert session.held == set()
        given, cancel = await outbox.claim(session, world.dispatcher, 2, 5)
        assert ([one.task_id for one in given], cancel) == ([task.id for task in tasks[:2]], [])
        assert session.free == 0
        given, _ = await outbox.claim(session, world.dispatcher, 100, 5)
        assert [one.task_id for one in given] == [task.id for task in tasks[2:5]]
        given, cancel = await outbox.claim(session, world.dispatcher, 1, 0.01)
        assert (given, cancel) == ([], [])
        await world.control.cancel(ADMIN, tasks[0].id)
        assert await outbox.claim(session, world.dispatcher, 1, 5) == ([], [tasks[0].id])


# --- cost ---------------------------------------------------------------------------------------------------------


class _CountingQueue(LocalQueue):
    """A queue that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = 0

    async def take(self, lane: str, limit: int, ceiling: int = RANK_MAX) -> list[Queued]:
        self.takes += 1
        return await super().take(lane, limit, ceiling)


async def test_dispatch_costs_lanes_not_tasks() -> None:
    """A thousand agents and ten thousand tasks in a lane take a handful of looks at the queue, and none is forgotten."""
    queue, sessions = _CountingQueue(), Sessions()
    given: dict[str, Session] = {}
    everything = asyncio.Event()

    async def hand_out(pairs: list[tuple[str, Session]]) -> None:
        given.update(pairs)
        if len(given) == 10_000:
            everything.set()

    dispatcher = Dispatcher(queue, sessions, hand_out)
    spec = AgentSpec(name="w", capabilities=[Capability(name="echo")], slots=10)
    for n in range(1000):
        agent = Agent(id=f"agent_{n}", version=1, spec=spec, created_at=0)
        instance = Instance(
            id=f"inst_{n}", version=1, agent_id=agent.id, started_at=0, lease_ms=1, lease_until=1, slots=10
        )
        sessions.add(Session(agent, instance, 10, _nowhere, None))
    tasks = [
        Task(
            id=f"task_{n}", version=1, type="echo", state=S.QUEUED, state_at=0, created_at=0, lane="l", order=n, rank=n
        )
        for n in range(10_001)
    ]
    await dispatcher.enqueue(tasks)
    running = asyncio.create_task(dispatcher.run())
    async with asyncio.timeout(20):
        await everything.wait()
    assert set(given) == {f"task_{n}" for n in range(10_000)}, "the oldest first, each once"
    loads = {session.instance.id: len(session.held) for session in sessions.all()}
    assert set(loads.values()) == {10}
    assert queue.takes <= 10_000 // 512 + 2
    takes = queue.takes
    one = next(iter(sessions.all()))
    dispatcher.unreserve(one, next(iter(one.held)))
    async with asyncio.timeout(5):
        while "task_10000" not in given:  # noqa: ASYNC110 - one turn of the loop
            await asyncio.sleep(0)
    assert queue.takes - takes <= 2
    running.cancel()


def _nowhere(_frames: Sequence[Frame]) -> None:
    """Send nothing."""


# --- faults -------------------------------------------------------------------------------------------------------


async def _patiently(verb: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Repeat a call as a caller does who was told to."""
    while True:
        try:
            return await verb()
        except Problem as problem:
            if not problem.retryable:
                raise


class _Worker:
    """An agent that finishes whatever it gets, telling it again until it is heard."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.completed: list[tuple[str, str]] = []
        self._told: set[str] = set()

    async def work(self) -> None:
        while True:
            new = [one for one in self.peer.given.values() if one.lease_token not in self._told]
            if not new:
                await asyncio.sleep(0.002)
                continue
            self._told.update(one.lease_token for one in new)
            await self._finish(new)

    async def _finish(self, new: list[Assignment]) -> None:
        ends = [
            Done(task_id=o.task_id, lease_token=o.lease_token, outcome="completed", result=msgspec.Raw(b"7"))
            for o in new
        ]
        while True:
            try:
                ack = await self.peer.report(done=ends)
            except Problem as problem:
                if problem.status < 500:
                    raise
                continue
            if not ack.retry:
                break
        refused = {refusal.task_id: refusal.code for refusal in ack.refused}
        assert set(refused.values()) <= {"lease-superseded", "conflict"}
        self.completed += [(one.task_id, one.lease_token) for one in new if one.task_id not in refused]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_task_completes_once_over_a_store_that_fails(tmp_path: Path, seed: int) -> None:
    """With a tenth of all store calls failing in every way, each accepted task ends completed exactly once."""
    rates: dict[Any, float] = {}

    def fatal(problem: Problem) -> None:
        raise problem

    store = FaultyStore(SqliteStore(tmp_path, fatal=fatal), rates, Random(seed))
    async with world_at(tmp_path, FakeClock(), store) as world:
        workers = [_Worker(await world.agent(f"w{n}", slots=8)) for n in range(2)]
        rates.update(dict.fromkeys(("timeout", "executed", "lost", "unavailable", "conflict"), 0.1))
        working = [asyncio.create_task(worker.work()) for worker in workers]

        async def submit(start: int) -> list[str]:
            specs = [TaskSpec(type="echo", idempotency_key=f"k{n}") for n in range(start, start + 10)]
            results: list[Submitted | Problem] = await _patiently(lambda: world.tasks.submit(ADMIN, specs, Origin()))
            for place, result in enumerate(results):
                while not isinstance(result, Submitted):
                    assert result.retryable, result
                    (result,) = await _patiently(lambda at=place: world.tasks.submit(ADMIN, [specs[at]], Origin()))
                results[place] = result
            return [result.task.id for result in results if isinstance(result, Submitted)]

        async with asyncio.timeout(60):
            ids = [one for batch in await asyncio.gather(*(submit(n) for n in range(0, 200, 10))) for one in batch]
            assert len(set(ids)) == 200

        async def finished() -> bool:
            try:
                return all(task.state is S.COMPLETED for task in await _all(world))
            except StoreUnavailable:
                return False

        await world.until(finished, 60)
        rates.clear()
        for task in working:
            task.cancel()
        stored = {task.id: task for task in await _all(world)}
        assert set(stored) == set(ids), "none lost, none doubled"
        accepted = [task_id for worker in workers for task_id, _ in worker.completed]
        assert sorted(accepted) == sorted(set(accepted)), "no result was accepted twice"
        facts = [entry.fact for entry in await store.facts(0, 100_000)]
        assert sorted(fact.subject for fact in facts if fact.type == "task.completed") == sorted(ids)

        async def agreed() -> bool:
            return all(peer.live.held == set() for peer in (worker.peer for worker in workers))

        await world.until(agreed)
        assert sum(store.injected.values()) > 50


# --- one task, begun twice at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [True, False], ids=["placed-twice", "placed-and-queued"])
async def test_of_two_that_begin_one_task_at_once_one_does_and_the_task_is_given_out(
    tmp_path: Path, place: bool
) -> None:
    """A run that is moved by two at once names its tasks alike: what the one that lost had reserved does not swallow the task."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("worker", slots=2)
        handing = world.settler.handing
        new = NewTask(
            id="task_one", spec=TaskSpec(type="echo", payload=msgspec.Raw(b"1")), links=Links(), origin=Origin()
        )
        losing = handing.create(new, world.clock.now())
        winning = handing.create(new, world.clock.now(), place=place)
        await handing.launch([winning])
        await _calm(world)
        with pytest.raises(Conflict):
            await handing.launch([losing])
        (given,) = await peer.until_given()
        assert given.task_id == "task_one"
        assert peer.live.held == {"task_one"}
        await peer.done(given)
        assert (await world.task("task_one")).state is S.COMPLETED
        assert peer.live.free == 2


async def test_work_that_an_older_instance_has_no_handler_for_goes_to_a_newer_one(tmp_path: Path) -> None:
    """While a fleet of one name is replaced, the agent has the capabilities of its newest instance: that costs no attempt of a task."""
    async with world_at(tmp_path) as world:
        old = await world.agent("worker", "resize", "crop", slots=4)
        crop = await world.submit("crop")
        (given,) = await old.until_given()
        failure = Failure(cause="infra", code=UNKNOWN_TYPE, retry_after=0.0)
        await old.done(given, "failed", failure=failure)
        world.advance(1)
        await world.timekeeper.once()
        await _calm(world)
        waiting = await world.task(crop.id)
        assert (waiting.state, waiting.failures) == (S.QUEUED, 0)
        new = Peer(world, old.actor, old.spec)
        await new.connect()
        assert [one.task_id for one in await new.until_given()] == [crop.id]
        resize = await world.submit("resize")
        await old.until_given(2)
        assert resize.id in old.given
