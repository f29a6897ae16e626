"""Cores, memory, GPUs and weighted slots, and whether what is counted is what the leases say."""

from pathlib import Path

import msgspec
import pytest

from mcp_control.agents.model import Resources
from mcp_control.agents.reserving import Load
from mcp_control.kernel.errors import Invalid
from mcp_control.tasks.drift import DriftKeeper
from mcp_control.tasks.model import Task, TaskState
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, World, world_at

S = TaskState


async def _given(world: World, tasks: list[Task]) -> list[bool]:
    return [(await world.task(task.id)).state is S.ASSIGNED for task in tasks]


@pytest.mark.parametrize(
    ("needs", "at_once"),
    [
        ({"slots": 3}, 2),
        ({"slots": 8}, 1),
        ({"resources": {"cpu": 1.5}}, 2),
        ({"resources": {"memory_mb": 400}}, 5),
        ({"resources": {"gpu": 1}}, 1),
        ({"slots": 2, "resources": {"cpu": 0.1, "memory_mb": 900}}, 2),
    ],
)
async def test_an_agent_gets_what_fits_and_the_next_when_that_ends(
    needs: dict[str, object], at_once: int, tmp_path: Path
) -> None:
    """As many tasks run as slots and resources allow; each that ends makes room for one more; explain says what is short."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=8, resources=Resources(cpu=4, memory_mb=2000, gpu=1))
        tasks = [await world.submit(needs=needs) for _ in range(at_once + 2)]
        await peer.until_given(at_once)
        assert await _given(world, tasks) == [True] * at_once + [False] * 2
        why = await world.tasks.explain(ADMIN, tasks[at_once].id)
        if not (at_once == 1 and needs == {"slots": 8}):
            assert why.code == "resources-short"
            assert set(why.held_by) == {task.id for task in tasks[:at_once]}
        for number in range(2):
            await peer.done(peer.given[tasks[number].id])
            await peer.until_given(at_once + number + 1)
        for task in tasks[2:]:
            await peer.done(peer.given[task.id])
        assert peer.live.taken == 0
        assert (await world.task(tasks[-1].id)).state is S.COMPLETED


async def test_what_nobody_has_at_all_is_said_at_submission(tmp_path: Path) -> None:
    """A task that takes more slots than any agent has can never run, which its explanation says."""
    async with world_at(tmp_path) as world:
        await world.agent(slots=2)
        task = await world.submit(needs={"slots": 3})
        why = await world.tasks.explain(ADMIN, task.id)
        assert why.code == "no-capable-agent"
        assert "has 2 slots, wanted 3" in why.message


async def test_a_reconnect_keeps_what_is_reserved(tmp_path: Path) -> None:
    """An instance that comes back holds its resources still, whether this server saw it before or not."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=4, resources=Resources(gpu=1))
        task = await world.submit(needs={"slots": 2, "resources": {"gpu": 1}})
        await peer.until_given()
        await peer.connect(task.id)
        assert (peer.live.free, peer.live.room(Load(gpu=1), "echo")) == (2, 0)
        await world.agents.disconnected(peer.live)
        await peer.connect(task.id)
        assert (peer.live.free, peer.live.room(Load(gpu=1), "echo")) == (2, 0)
        await peer.done(peer.given[task.id])
        assert (peer.live.free, peer.live.room(Load(gpu=1), "echo")) == (4, 1)


async def test_an_agent_gets_no_more_of_a_type_than_it_says_and_other_work_beside(tmp_path: Path) -> None:
    """Two of the limited type run, the third waits and says why; what has no limit takes the other slots, and an end makes room."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("worker", "t", "other", slots=4, limits={"t": 2})
        tasks = [await world.submit("t") for _ in range(4)]
        others = [await world.submit("other") for _ in range(2)]
        await peer.until_given(4)
        assert await _given(world, tasks) == [True, True, False, False]
        assert await _given(world, others) == [True, True]
        await peer.done(peer.given[others[0].id])
        why = await world.tasks.explain(ADMIN, tasks[2].id)
        assert (why.code, set(why.held_by)) == ("agents-full-for-type", {task.id for task in tasks[:2]})
        assert "takes 2 at once" in why.message
        await peer.connect(*(task.id for task in tasks[:2]), others[1].id)
        assert await _given(world, tasks) == [True, True, False, False], "also after a reconnect"
        await peer.done(peer.given[tasks[0].id])
        await peer.until_given(5)
        assert await _given(world, tasks[1:]) == [True, True, False]
        await peer.done(peer.given[tasks[1].id])
        await peer.until_given(6)
        for task in tasks[2:]:
            await peer.done(peer.given[task.id])
        assert peer.live.free == 3


async def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    """A registration that limits a type to none at all is refused with its place."""
    async with world_at(tmp_path) as world:
        with pytest.raises(Invalid) as refused:
            await world.agent("worker", "t", limits={"t": 0})
        assert [error.pointer for error in refused.value.errors] == ["#/capabilities/0/limit"]


def _keeper(world: World, broken: list[str]) -> DriftKeeper:
    return DriftKeeper(
        world.store,
        world.clock,
        world.sessions,
        world.ledger,
        world.dispatcher,
        world.settler.handing,
        broken=broken.append,
    )


async def test_slots_counted_wrongly_are_found_and_healed(tmp_path: Path) -> None:
    """A slot that is taken for nothing, and a lease that nobody counts, are seen in two looks, set right, and counted."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        broken: list[str] = []
        keeper = _keeper(world, broken)
        peer = await world.agent(slots=2, resources=Resources(gpu=1))
        task = await world.submit(needs={"resources": {"gpu": 1}})
        await peer.until_given()
        clock.advance(61)
        assert await keeper.once() == 0, "nothing is wrong"
        assert await keeper.once() == 0
        peer.live.let_go(task.id)
        peer.live.hold("task_ghost", Load(gpu=1))
        other = await world.submit(needs={"resources": {"gpu": 1}})
        clock.advance(61)
        assert await keeper.once() == 0, "one look proves nothing"
        clock.advance(1)
        assert await keeper.once() == 0, "nor does a second one right after"
        clock.advance(15)
        assert (await world.task(other.id)).state is S.QUEUED
        assert await keeper.once() == 2
        assert (keeper.drift, keeper.healed, broken) == (2, 2, ["slot_drift"])
        assert peer.live.held == {task.id} == peer.live.counted()
        clock.advance(61)
        assert await keeper.once() == 0
        assert (keeper.drift, keeper.healed) == (0, 2)
        await peer.done(peer.given[task.id])
        await peer.until_given(2)
        assert peer.live.held == {other.id}


async def test_an_agent_that_drains_itself_is_draining(tmp_path: Path) -> None:
    """From its word on it shows `draining`, and `offline` once it has left; a new instance makes it `online` again."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        await world.submit()
        await peer.until_given()
        await world.agents.drain(peer.live)
        agent = await world.manager.get(ADMIN, peer.actor.id)
        shown = world.manager.view(agent)
        assert (shown.state, shown.free_slots, shown.running) == ("draining", 0, 1)
        await world.agents.leave(peer.live)
        assert world.manager.view(await world.manager.get(ADMIN, peer.actor.id)).state == "offline"
        peer.instance_id = None
        await peer.connect()
        assert world.manager.view(await world.manager.get(ADMIN, peer.actor.id)).state == "online"


async def test_a_poller_says_with_its_heartbeat_that_it_drains(tmp_path: Path) -> None:
    """Without a socket the heartbeat carries it; it counts after a reconnect, too."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        beat = msgspec.structs.replace(peer.live.instance.beat, tick=3, draining=True)
        await world.agents.heartbeat(peer.live, beat)
        assert world.manager.view(await world.manager.get(ADMIN, peer.actor.id)).state == "draining"
        assert not peer.live.accepting
