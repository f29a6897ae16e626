"""Two servers on one store: any of them may serve any agent and any caller."""

import asyncio
from pathlib import Path

import pytest

from mcp_control.agents.model import AgentState, Beat
from mcp_control.kernel.errors import LeaseSuperseded
from mcp_control.tasks.model import TaskState
from mcp_control.tasks.polling import PollOutbox
from mcp_control.tasks.wire import Report, Started
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, Peer, World, two_servers_at


async def moved(peer: Peer, to: World, *running: str) -> Peer:
    """Return the same instance, connected to another server."""
    there = Peer(to, peer.actor, peer.spec)
    there.instance_id = peer.instance_id
    await there.connect(*running)
    return there


async def test_work_submitted_to_one_server_reaches_the_agent_of_another(tmp_path: Path) -> None:
    """A server tells the others of what waits, and each takes for its own agents."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent()
        task = await one.submit()
        (given,) = await peer.until_given()
        assert given.task_id == task.id
        await peer.done(given)
        assert (await one.tasks.one(ADMIN, task.id)).state is TaskState.COMPLETED


async def test_work_is_found_that_nobody_told_of(tmp_path: Path) -> None:
    """A hint that was lost costs a moment: servers look at the lanes themselves."""
    async with two_servers_at(tmp_path) as (one, two):
        one.peers.lanes = lambda depths: None  # type: ignore[method-assign]  # the hint is lost
        peer = await two.agent()
        await one.submit()
        await two.dispatcher.look()
        await peer.until_given()


async def test_what_is_known_of_lanes_is_set_right(tmp_path: Path) -> None:
    """A server that counted entries which another one took, or counted them twice, learns better when it looks."""
    async with two_servers_at(tmp_path) as (one, two):
        task = await one.submit()
        await one.dispatcher.enqueue([task])  # as when the lanes are filled again
        lane = one.dispatcher.known(task.lane)
        assert lane is not None
        await one.dispatcher.look()
        assert lane.waiting == 1
        peer = await two.agent()
        await two.dispatcher.look()
        await peer.until_given()
        await one.dispatcher.look()
        assert lane.waiting == 0


async def test_a_caller_waits_on_any_server(tmp_path: Path) -> None:
    """Waiting for a task ends when it ends, whichever server its agent is connected to."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent()
        task = await one.submit()
        waiting = asyncio.create_task(one.tasks.wait(ADMIN, task.id, 30))
        (given,) = await peer.until_given()
        await peer.done(given)
        async with asyncio.timeout(5):
            await waiting


async def test_an_instance_takes_its_lease_to_another_server(tmp_path: Path) -> None:
    """What an instance holds stays its own when it reconnects elsewhere; the server it left gives it nothing more."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent(slots=2)
        task = await one.submit()
        (given,) = await peer.until_given()
        await peer.start(given)
        there = await moved(peer, two, task.id)
        assert there.instance_id == peer.instance_id
        await one.until(lambda: _true(one.sessions.get(str(peer.instance_id)) is None))
        assert (await there.done(given)).refused == []
        assert (await one.tasks.one(ADMIN, task.id)).state is TaskState.COMPLETED
        await one.submit()
        await there.until_given()
        assert len(peer.given) == 1


async def test_a_result_is_not_refused_for_what_a_server_remembers(tmp_path: Path) -> None:
    """A server that knew a task under an earlier lease looks again before it refuses a report."""
    async with two_servers_at(tmp_path) as (one, two):
        first = await one.agent("first")
        task = await one.submit()
        (given,) = await first.until_given()
        # The task moves on, all on the other server: given back, and handed to another agent.
        there = await moved(first, two, task.id)
        second = await two.agent("second")
        await two.agents.drain(there.live)
        await there.done(given, "released")
        (again,) = await second.until_given()
        back = await moved(second, one, task.id)
        assert again.fence > given.fence
        assert (await back.done(again)).refused == []
        assert (await two.tasks.one(ADMIN, task.id)).state is TaskState.COMPLETED


async def test_a_cancellation_reaches_the_agent_of_another_server(tmp_path: Path) -> None:
    """Cancelling a running task is told to its agent at once, and again with its next heartbeat."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent()
        task = await one.submit()
        (given,) = await peer.until_given()
        await peer.start(given)
        await one.control.cancel(ADMIN, task.id, "not needed")
        await one.until(lambda: _true(peer.cancelled == [task.id]))
        ack = await two.agents.heartbeat(peer.live, Beat(running=[task.id]))
        assert ack.cancel == [task.id]


async def test_an_assignment_that_went_to_a_dead_connection_is_sent_again(tmp_path: Path) -> None:
    """What the former server handed to an instance after it had left arrives with its first heartbeat at the new one."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent(slots=2)
        one.agents.taken_over = _deaf  # type: ignore[method-assign]  # the former server does not hear of the move
        there = await moved(peer, two)
        task = await one.submit()
        await one.until(lambda: _true(task.id in peer.given))
        await two.agents.heartbeat(there.live, Beat())
        (given,) = await there.until_given()
        assert given.task_id == task.id
        assert there.live.held == {task.id}


async def test_a_session_that_was_ended_elsewhere_is_over_here(tmp_path: Path) -> None:
    """When the leader ends a silent instance, the server it was connected to gives it nothing more and refuses what it says."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent(lease_seconds=2)
        session = peer.live
        task = await one.submit()
        await peer.until_given()
        one.clock.advance(60)  # type: ignore[attr-defined]  # a FakeClock
        assert two.leases.silence() == 1
        assert session.free == 0
        await one.agents.take_back(str(peer.instance_id), one.clock.now())
        await two.until(lambda: _true(two.sessions.get(str(peer.instance_id)) is None))
        with pytest.raises(LeaseSuperseded):
            await two.agents.heartbeat(session, Beat())
        assert (await one.tasks.one(ADMIN, task.id)).state is TaskState.QUEUED


async def test_orders_and_states_of_agents_are_the_same_everywhere(tmp_path: Path) -> None:
    """An agent registered, connected or drained at one server is seen so at the other."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent("there", slots=3)
        shown = one.manager.view(await one.manager.get(ADMIN, peer.actor.id))
        assert (shown.state, shown.free_slots, shown.instances) == (AgentState.ONLINE, 3, 1)
        await one.manager.drain(ADMIN, peer.actor.id)
        await two.until(lambda: _true(not peer.live.accepting))
        await one.manager.resume(ADMIN, peer.actor.id)
        await two.until(lambda: _true(peer.live.accepting))
        there = await moved(peer, one)
        await two.agents.disconnected(peer.live)
        assert there.live.accepting
        agent = await two.manager.registry.fetch(peer.actor.id)
        assert agent is not None
        assert agent.state is AgentState.ONLINE, "the instance went to another server, it did not go away"


async def test_a_polling_agent_may_meet_another_server_with_every_request(tmp_path: Path) -> None:
    """A session without a socket is taken over where the next request arrives, with what it holds."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent()
        task = await one.submit()
        await peer.until_given()
        frames: list[object] = []
        session = await two.agents.resume(peer.actor, str(peer.instance_id), frames.extend)
        assert session.held == {task.id}
        stranger = await one.agent("stranger")
        with pytest.raises(Exception, match="another agent"):
            await two.agents.resume(stranger.actor, str(peer.instance_id), frames.extend)


async def test_work_that_stayed_behind_at_another_server_is_sent_again(tmp_path: Path) -> None:
    """What a polling agent did not fetch before it went elsewhere comes with its session, or when heartbeats show that it is missing."""
    clock = FakeClock()
    async with two_servers_at(tmp_path, clock) as (one, two):
        peer = await one.agent(slots=2)
        await one.submit()
        await peer.until_given()  # put on its way on the first server, and never fetched
        near, away = PollOutbox(), PollOutbox()
        session = await two.agents.resume(peer.actor, str(peer.instance_id), near.send)
        assert (await near.claim(session, two.dispatcher, 1, 0))[0] == [], "it may be on its way still"
        clock.advance(session.instance.lease_ms / 2000)
        await two.agents.heartbeat(session, Beat(tick=1))
        (sent,) = (await near.claim(session, two.dispatcher, 1, 0))[0]
        session = await one.agents.resume(peer.actor, str(peer.instance_id), away.send)
        assert (await away.claim(session, one.dispatcher, 1, 0))[0] == [sent]
        await one.agents.report(
            session, Report(id=1, started=[Started(task_id=sent.task_id, lease_token=sent.lease_token)])
        )
        await one.agents.heartbeat(session, Beat(tick=2, running=[sent.task_id]))
        assert (await away.claim(session, one.dispatcher, 1, 0))[0] == [], "it has come"


async def test_a_long_poll_ends_when_the_session_goes_elsewhere(tmp_path: Path) -> None:
    """The agent asks again, and so reaches the server that has work for it."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent()
        here, there = PollOutbox(), PollOutbox()
        session = await one.agents.resume(peer.actor, str(peer.instance_id), here.send)
        asking = asyncio.create_task(here.claim(session, one.dispatcher, 1, 30))
        await two.agents.resume(peer.actor, str(peer.instance_id), there.send)
        async with asyncio.timeout(5):
            assert await asking == ([], [])


async def _true(condition: bool) -> bool:
    return condition


async def _deaf(ids: object) -> None:
    return None
