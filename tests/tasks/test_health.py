"""What follows when agents get nothing done: tasks move on, agents are kept from work, and come back by a probe."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from mcp_control.agents.health import Rules
from mcp_control.agents.model import Agent, Beat
from mcp_control.agents.verdicts import Verdicts
from mcp_control.tasks.health import HealthKeeper
from mcp_control.tasks.model import Failure, LogLine, TaskState
from mcp_control.tasks.statistics import Times
from mcp_control.tasks.wire import Logged, Progress
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState


class Watched:
    """A world in which tasks of type `echo` are known to take a tenth of a second."""

    def __init__(self, world: World, **switches: bool) -> None:
        self.world = world
        rules = Rules(stuck_seconds=30, silent_seconds=20)
        self.verdicts = Verdicts(world.clock, world.manager.registry, rules)
        self.keeper = HealthKeeper(
            world.clock,
            world.sessions,
            world.ledger,
            world.settler,
            world.dispatcher,
            self.verdicts,
            self._times,
            rules,
            **switches,
        )
        world.sessions.greeting.append(self.keeper.connected)
        world.agents.tried = self.keeper.ended
        world.leases.lost = self.keeper.lost

    async def _times(self, _: str, types: Iterable[str]) -> dict[str, Times]:
        return {name: Times(count=500, p50=0.05, p90=0.08, p99=0.1) for name in types if name == "echo"}

    async def look(self) -> int:
        """Judge everybody, and give those their probe whose time has come."""
        now = self.world.clock.now()
        await self.verdicts.once(now)
        return await self.keeper.once(now)

    async def agent(self, peer: Peer) -> Agent:
        """Return an agent as it is stored."""
        return await self.world.manager.get(ADMIN, peer.actor.id)


async def _beat(world: World, peer: Peer, tick: int, *running: str) -> None:
    await world.agents.heartbeat(peer.live, Beat(tick=tick, running=list(running)))


async def test_a_task_that_stands_still_goes_to_somebody_else(tmp_path: Path) -> None:
    """The agent beats, the task does not move: it is fenced, runs elsewhere, the late result is refused; the agent is quarantined."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        one = await world.agent("one")
        task = await world.submit()
        (given,) = await one.until_given()
        await one.start(given)
        await watched.look()
        clock.advance(5)
        assert await watched.look() == 1
        assert (await watched.agent(one)).health.verdict == "slow"
        assert one.live.last
        clock.advance(20)
        await _beat(world, one, 2, task.id)
        two = await world.agent("two")
        clock.advance(10)
        await _beat(world, one, 3, task.id)
        await _beat(world, two, 1)
        assert await watched.look() == 1
        (again,) = await two.until_given()
        assert again.task_id == task.id
        stuck = await watched.agent(one)
        assert (stuck.health.verdict, stuck.state) == ("stuck", "quarantined")
        assert stuck.quarantine is not None
        assert "stand still" in stuck.quarantine.note
        ack = await one.done(given)
        assert [refusal.code for refusal in ack.refused] == ["lease-superseded"]
        await two.done(again)
        found = await world.task(task.id)
        assert (found.state, [a.outcome for a in found.attempts]) == (S.COMPLETED, ["lost", "completed"])
        assert watched.keeper.fenced == 1
        kinds = [stored.fact.type for stored in world.facts if stored.fact.subject == one.actor.id]
        assert kinds[-2:] == ["agent.judged", "agent.quarantined"]


async def test_a_sign_of_life_keeps_a_task(tmp_path: Path) -> None:
    """Progress and log lines count: a task that tells of itself is never taken away, however long it takes."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent()
        task = await world.submit()
        (given,) = await peer.until_given()
        await peer.start(given)
        lease = {"task_id": task.id, "lease_token": given.lease_token}
        for step in range(10):
            clock.advance(25)
            await _beat(world, peer, step + 2, task.id)
            if step % 2:
                await peer.report(progress=[Progress(**lease, fraction=step / 10)])
            else:
                await peer.report(logs=[Logged(**lease, lines=[LogLine(at=1, message="still here")])])
            await watched.look()
            assert (await world.task(task.id)).state is S.RUNNING
        assert (await watched.agent(peer)).health.verdict == "slow"
        await peer.done(given)
        await watched.look()
        clock.advance(11)
        await watched.look()
        assert (await watched.agent(peer)).health.verdict == "ok"


async def test_a_time_in_which_nobody_could_report_counts_for_nothing(tmp_path: Path) -> None:
    """After a reconnect, as after a restart of the server, what stands still is counted from then on."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(lease_seconds=3600)
        task = await world.submit()
        (given,) = await peer.until_given()
        await peer.start(given)
        await watched.look()
        await world.agents.disconnected(peer.live)
        await watched.look()
        clock.advance(1000)
        await peer.connect(task.id)
        await watched.look()
        assert (await world.task(task.id)).state is S.RUNNING
        clock.advance(31)
        await watched.look()
        assert (await world.task(task.id)).state is S.QUEUED


async def test_what_may_be_started_once_is_never_taken_away(tmp_path: Path) -> None:
    """A task with a single attempt stays where it is, whatever the verdict on its agent."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent()
        task = await world.submit(retry={"max_attempts": 1})
        (given,) = await peer.until_given()
        await peer.start(given)
        await watched.look()
        clock.advance(29)
        await _beat(world, peer, 2, task.id)
        clock.advance(29)
        await watched.look()
        assert (await world.task(task.id)).state is S.RUNNING
        assert (await watched.agent(peer)).health.verdict == "stuck"
        await peer.done(given)
        assert (await world.task(task.id)).state is S.COMPLETED


async def test_switched_off_verdicts_are_only_shown(tmp_path: Path) -> None:
    """With fencing and quarantine off nothing is taken from anybody."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world, fence=False, quarantine=False)
        peer = await world.agent()
        task = await world.submit()
        (given,) = await peer.until_given()
        await peer.start(given)
        await watched.look()
        clock.advance(29)
        await _beat(world, peer, 2, task.id)
        clock.advance(29)
        await watched.look()
        shown = world.manager.view(await watched.agent(peer))
        assert (shown.health.verdict, shown.state) == ("stuck", "busy")
        assert (await world.task(task.id)).state is S.RUNNING


async def _stuck(watched: Watched, clock: FakeClock, peer: Peer) -> None:
    """Let an agent sit on a task until it is quarantined."""
    world = watched.world
    before = set(peer.given)
    task = await world.submit()
    await peer.until_given(len(before) + 1)
    given = peer.given[task.id]
    await peer.start(given)
    await watched.look()
    for _ in range(2):
        clock.advance(20)
        await _beat(world, peer, peer.live.instance.beat.tick + 1, task.id)
    await watched.look()
    assert (await watched.agent(peer)).quarantine is not None
    await world.control.cancel(ADMIN, task.id)


async def test_an_agent_comes_back_by_a_probe(tmp_path: Path) -> None:
    """After its time it gets one task: success restores it, failure keeps it away for twice as long."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(slots=4)
        await _stuck(watched, clock, peer)
        waiting = [await world.submit(retry={"max_attempts": 1}) for _ in range(3)]
        clock.advance(20)
        await _beat(world, peer, 50)
        assert peer.live.free == 0
        clock.advance(41)
        await _beat(world, peer, 51)
        await watched.look()
        trial = await watched.agent(peer)
        assert (trial.quarantine, trial.health.probing, trial.state) == (None, True, "online")
        given = await peer.until_given(2)
        assert len(peer.live.held) == 1, "one task at a time"
        # It fails on trial: away again, for twice as long.
        failed = Failure(cause="timeout", code="timeout", message="too long")
        await peer.done(given[-1], "failed", failure=failed)
        again = await watched.agent(peer)
        assert again.quarantine is not None
        assert (again.health.trips, (again.health.until or 0) - clock.now()) == (2, 120_000)
        clock.advance(121)
        await _beat(world, peer, 52)
        await watched.look()
        given = await peer.until_given(3)
        await peer.done(given[-1])
        back = await watched.agent(peer)
        assert (back.health.verdict, back.health.probing, back.quarantine) == ("ok", False, None)
        await peer.until_given(4)
        assert set(peer.given) >= {task.id for task in waiting}
        kinds = [stored.fact.type for stored in world.facts if stored.fact.subject == peer.actor.id]
        assert [kind for kind in kinds if kind in ("agent.probing", "agent.restored")] == [
            "agent.probing",
            "agent.probing",
            "agent.restored",
        ]


async def test_a_probe_that_says_nothing_is_repeated(tmp_path: Path) -> None:
    """A task that fails for its own reasons neither restores the agent nor condemns it: it gets another one."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(slots=4)
        await _stuck(watched, clock, peer)
        clock.advance(61)
        await _beat(world, peer, 50)
        await watched.look()
        await world.submit(retry={"max_attempts": 1})
        await world.submit()
        given = await peer.until_given(2)
        await peer.done(given[-1], "failed", failure=Failure(code="own-fault"))
        assert (await watched.agent(peer)).health.probing
        assert peer.live.free == 0
        await watched.look()
        given = await peer.until_given(3)
        await peer.done(given[-1])
        assert (await watched.agent(peer)).health.verdict == "ok"


async def test_an_operators_quarantine_is_lifted_by_nobody_else(tmp_path: Path) -> None:
    """Where an operator orders it, time does not lift it; resume does, and forgets the verdict."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent()
        await _stuck(watched, clock, peer)
        await world.manager.quarantine(ADMIN, peer.actor.id, "looked at")
        clock.advance(10_000)
        await watched.look()
        kept = await watched.agent(peer)
        assert kept.quarantine is not None
        assert kept.quarantine.note == "looked at"
        freed = await world.manager.resume(ADMIN, peer.actor.id)
        assert (freed.quarantine, freed.health.verdict, freed.health.trips) == (None, "ok", 0)


async def test_an_agent_that_asks_for_nothing_is_silent(tmp_path: Path) -> None:
    """It polls no more although it beats, and work waits: silent; as soon as it asks again it is well."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent()
        peer.live.allowance = 0
        await world.submit()
        await watched.look()
        clock.advance(21)
        await _beat(world, peer, 2)
        await watched.look()
        shown = world.manager.view(await watched.agent(peer)).health
        assert (shown.verdict, shown.until) == ("silent", None)
        assert "took no work" in shown.reason
        peer.live.asked += 1
        await watched.look()
        clock.advance(11)
        await _beat(world, peer, 3)
        peer.live.asked += 1
        await watched.look()
        assert world.manager.view(await watched.agent(peer)).health.verdict == "ok"


async def test_an_agent_that_never_begins_is_silent_and_loses_its_tasks(tmp_path: Path) -> None:
    """It was given tasks and beats without them: they go to others, and it gets no more."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(slots=2)
        task = await world.submit()
        await peer.until_given()
        await watched.look()
        clock.advance(21)
        await _beat(world, peer, 2)
        await watched.look()
        silent = await watched.agent(peer)
        assert (silent.health.verdict, silent.state) == ("silent", "quarantined")
        assert (await world.task(task.id)).state is S.QUEUED
        other = await world.agent("other")
        await other.done((await other.until_given())[0])
        assert (await world.task(task.id)).state is S.COMPLETED


async def test_a_loop_that_stands_still_is_stuck(tmp_path: Path) -> None:
    """Heartbeats come, their tick does not move: everything it holds is taken from it."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(slots=2, lease_seconds=5)
        tasks = [await world.submit("echo"), await world.submit("echo")]
        await peer.until_given(2)
        for given in peer.given.values():
            await peer.start(given)
        for _ in range(6):
            clock.advance(4)
            await _beat(world, peer, 7, *peer.given)
        await watched.look()
        assert (await watched.agent(peer)).health.verdict == "stuck"
        assert [(await world.task(task.id)).state for task in tasks] == [S.QUEUED, S.QUEUED]


async def test_too_many_lost_leases_are_flapping(tmp_path: Path) -> None:
    """An agent whose leases end again and again is kept from work, also when it is not connected at that moment."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        watched = Watched(world)
        peer = await world.agent(lease_seconds=2)
        for _ in range(8):
            clock.advance(3)
            await world.leases.once()
            clock.advance(6)
            peer.instance_id = None
            await world.leases.once()
            if (await watched.agent(peer)).quarantine is None:
                await peer.connect()
        flapping = await watched.agent(peer)
        assert (flapping.health.verdict, flapping.state) == ("flapping", "quarantined")
        assert "8 leases lost" in flapping.health.reason


async def test_a_few_reconnects_are_nothing_many_are_flapping(tmp_path: Path) -> None:
    """Five are forgiven; sixty within the window are not."""
    async with world_at(tmp_path, FakeClock()) as world:
        watched = Watched(world)
        peer = await world.agent()
        for _ in range(5):
            await peer.connect()
        await watched.look()
        assert (await watched.agent(peer)).health.verdict == "ok"
        for _ in range(55):
            await peer.connect()
        await watched.look()
        assert (await watched.agent(peer)).health.verdict == "flapping"
        assert msgspec.structs.asdict((await watched.agent(peer)).health)["trips"] == 1
