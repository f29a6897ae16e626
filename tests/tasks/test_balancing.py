"""Where tasks go when they, or the server, ask for more than the least loaded agent."""

from pathlib import Path

from mcp_control.agents.balancing import bucket_of, home_of
from mcp_control.tasks.model import TaskState
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState


def _home(key: str, peers: list[Peer]) -> Peer:
    owner = home_of(bucket_of(key), [peer.actor.id for peer in peers])
    return next(peer for peer in peers if peer.actor.id == owner)


async def test_the_fastest_agent_gets_the_work(tmp_path: Path) -> None:
    """Once both are known, tasks that ask for it go to the agent that was faster; others go to the least loaded as ever."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        quick, slow = await world.agent("quick", slots=4), await world.agent("slow", slots=4)
        for peer, seconds in ((quick, 0.1), (slow, 2.0)):
            task = await world.submit(needs={"agent": peer.actor.id})
            await peer.until_given()
            await peer.start(peer.given[task.id])
            clock.advance(seconds)
            await peer.done(peer.given[task.id])
        assert world.speeds.expected([quick.actor.id, slow.actor.id], "echo") == [0.0, 0.0]
        assert await world.speeds.once() == 2
        for _ in range(4):
            await world.submit(needs={"balancing": "fastest"})
        await quick.until_given(5)
        assert (len(quick.given), len(slow.given)) == (5, 1)
        await world.submit(needs={"balancing": "fastest"})
        await slow.until_given(2)


async def test_what_agents_did_is_read_again_after_a_restart(tmp_path: Path) -> None:
    """A server that has just started learns from the store who is fast."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        for name, seconds in (("quick", 0.1), ("slow", 2.0)):
            peer = await world.agent(name, slots=4)
            task = await world.submit(needs={"agent": peer.actor.id})
            await peer.until_given()
            await peer.start(peer.given[task.id])
            clock.advance(seconds)
            await peer.done(peer.given[task.id])
        agents = [world.manager.find(ADMIN, name).id for name in ("quick", "slow")]
    async with world_at(tmp_path, clock) as world:
        assert world.speeds.expected(agents, "echo") == [0.0, 0.0]
        assert await world.speeds.once() == 2
        quick, slow = world.speeds.expected(agents, "echo")
        assert (round(quick, 2), round(slow, 2)) == (0.1, 2.0)
        assert await world.speeds.once() == 0


async def test_tasks_of_a_key_go_to_one_agent(tmp_path: Path) -> None:
    """Soft: elsewhere only while that agent has no room."""
    async with world_at(tmp_path) as world:
        peers = [await world.agent(f"w{number}", slots=3) for number in range(3)]
        home = _home("session-1", peers)
        for number in range(3):
            await world.submit(needs={"sticky": {"key": "session-1"}})
            await home.until_given(number + 1)
        other = await world.submit(needs={"sticky": {"key": "session-1"}})
        assert (await world.task(other.id)).state is S.ASSIGNED
        assert len(home.given) == 3


async def _waiting_for(world: World, key: str, peers: list[Peer]) -> Peer:
    home = _home(key, peers)
    await world.submit(needs={"sticky": {"key": key, "mode": "hard"}})
    await home.until_given()
    return home


async def test_a_hard_wish_waits_and_says_for_whom(tmp_path: Path) -> None:
    """Hard: the task waits for its agent though others are idle; when the agent is gone for good, its keys move."""
    async with world_at(tmp_path) as world:
        peers = [await world.agent(f"w{number}") for number in range(3)]
        home = await _waiting_for(world, "session-2", peers)
        waiting = await world.submit(needs={"sticky": {"key": "session-2", "mode": "hard"}})
        assert (await world.task(waiting.id)).state is S.QUEUED
        why = await world.tasks.explain(ADMIN, waiting.id)
        assert (why.code, why.held_by) == ("sticky-agent", [home.actor.id])
        assert f"{home.spec.name}, which is full" in why.message
        await world.agents.leave(home.live)
        why = await world.tasks.explain(ADMIN, waiting.id)
        assert "which is offline" in why.message
        await world.manager.retire(ADMIN, home.actor.id)
        left = [peer for peer in peers if peer is not home]
        heir = _home("session-2", left)
        world.dispatcher.forget_idle()
        await heir.until_given()


async def test_a_new_agent_takes_over_the_keys_that_are_its_own(tmp_path: Path) -> None:
    """An agent that registers gets what waits for its keys; nothing of the others moves."""
    async with world_at(tmp_path) as world:
        first = await world.agent("w0")
        blocker = await world.submit()
        await first.until_given()
        keys = [f"key-{number}" for number in range(12)]
        tasks = {key: await world.submit(needs={"sticky": {"key": key, "mode": "hard"}}) for key in keys}
        second = await world.agent("w1", slots=12)
        moved = {tasks[key].id for key in keys if _home(key, [first, second]) is second}
        assert 0 < len(moved) < len(keys)
        await second.until_given(len(moved))
        assert set(second.given) == moved
        assert set(first.given) == {blocker.id}
