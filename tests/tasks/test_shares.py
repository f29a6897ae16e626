"""Shares as the dispatcher serves them."""

from pathlib import Path

from mcp_control.kernel.clock import to_datetime
from mcp_control.tasks.control import TaskEdit
from mcp_control.tasks.model import Fairness, Origin, TaskSpec
from mcp_control.tasks.service import Submitted
from tests.tasks.world import ADMIN, Peer, World, world_at


async def _submit(world: World, count: int, spec: TaskSpec) -> set[str]:
    results = await world.tasks.submit(ADMIN, [spec] * count, Origin(principal=ADMIN.id))
    return {result.task.id for result in results if isinstance(result, Submitted)}


def _spec(key: str, weight: float = 1.0, task_type: str = "echo") -> TaskSpec:
    return TaskSpec(type=task_type, fairness=Fairness(key=key, weight=weight))


async def _served(peer: Peer, count: int) -> list[str]:
    """Finish what comes, and return the first so many tasks in their order."""
    finished: set[str] = set()
    while len(peer.given) < count:
        for task_id in list(peer.given):
            if task_id not in finished:
                finished.add(task_id)
                await peer.done(peer.given[task_id])
        await peer.until_given(len(finished) + 1)
    return list(peer.given)[:count]


async def test_the_one_task_of_a_share_starts_in_the_next_pass(tmp_path: Path) -> None:
    """A thousand ready tasks of one share do not hold up the one of another that comes after them."""
    async with world_at(tmp_path) as world:
        await _submit(world, 1000, _spec("big"))
        peer = await world.agent(slots=4)
        assert len(await peer.until_given(4)) == 4
        (one,) = await _submit(world, 1, _spec("small"))
        assert one not in peer.given
        await peer.done(next(iter(peer.given.values())))
        assert one in {given.task_id for given in await peer.until_given(5)}


async def test_shares_that_wait_are_served_by_their_weights(tmp_path: Path) -> None:
    """Three to one means three to one, whatever came first, and across the types of a share."""
    async with world_at(tmp_path) as world:
        light = await _submit(world, 60, _spec("light"))
        heavy = await _submit(world, 40, _spec("heavy", 3.0)) | await _submit(world, 40, _spec("heavy", 3.0, "sum"))
        peer = await world.agent("worker", "echo", "sum", slots=4)
        order = await _served(peer, 80)
        assert abs(sum(task_id in heavy for task_id in order) - 60) <= 4
        assert abs(sum(task_id in light for task_id in order[:40]) - 10) <= 2


async def test_tasks_without_a_key_are_a_share_of_their_own(tmp_path: Path) -> None:
    """What has no key shares with what has one, half and half, and is in the order of its ranks."""
    async with world_at(tmp_path) as world:
        plain = [(await world.submit()).id for _ in range(20)]
        await _submit(world, 20, _spec("a"))
        peer = await world.agent(slots=2)
        order = await _served(peer, 20)
        own = [task_id for task_id in order if task_id in plain]
        assert 9 <= len(own) <= 11
        assert own == plain[: len(own)]


async def test_a_higher_class_of_any_share_comes_first(tmp_path: Path) -> None:
    """Weights count inside a class of priority; a critical task of the smallest share is before all others."""
    async with world_at(tmp_path) as world:
        await _submit(world, 20, _spec("big", 100.0))
        urgent = await _submit(world, 2, TaskSpec(type="echo", priority=90, fairness=Fairness(key="small", weight=0.1)))
        peer = await world.agent()
        assert set(await _served(peer, 2)) == urgent


async def test_a_task_that_is_raised_to_another_class_leaves_its_lane(tmp_path: Path) -> None:
    """Its old place is gone with its new priority: it is given out once, where it belongs now."""
    async with world_at(tmp_path) as world:
        first, second = await world.submit(priority=30), await world.submit(priority=30)
        raised = await world.control.edit(ADMIN, second.id, TaskEdit(priority=90), None)
        assert raised.lane != first.lane
        assert sorted(depth.waiting for depth in await world.queue.depths()) == [1, 1]
        peer = await world.agent()
        assert await _served(peer, 2) == [second.id, first.id]


async def test_weights_that_an_operator_orders_count_at_once(tmp_path: Path) -> None:
    """An ordered weight changes who is served while both wait."""
    async with world_at(tmp_path) as world:
        first = await _submit(world, 60, _spec("a"))
        await _submit(world, 60, _spec("b"))
        peer = await world.agent(slots=2)
        before = await _served(peer, 20)
        assert abs(sum(task_id in first for task_id in before) - 10) <= 2
        world.dispatcher.shares.order("default", "a", 4.0)
        after = (await _served(peer, 70))[22:]
        assert sum(task_id in first for task_id in after) >= 36


# --- explained ----------------------------------------------------------------------------------------------------


async def test_an_explanation_names_who_holds_the_slots_and_when_it_may_begin(tmp_path: Path) -> None:
    """All agents full: the tasks that hold their slots, since when, and the moment at which what is ahead is done."""
    async with world_at(tmp_path) as world:
        for _ in range(10):
            world.history.ran("default", "echo", 10.0, True)
        await world.history.once(world.clock.now())
        peer = await world.agent(slots=2)
        held = [(await world.submit()).id for _ in range(2)]
        taken_at = world.clock.now()
        world.clock.advance(4)  # type: ignore[attr-defined]  # the world of tests has a fake clock
        waiting = [(await world.submit()).id for _ in range(3)]
        told = await world.tasks.explain(ADMIN, waiting[2])
        assert (told.code, sorted(told.held_by), told.ahead) == ("agents-full", sorted(held), 2)
        assert told.since == to_datetime(taken_at + 4000)  # when it began to wait: the slots were full before
        assert told.expected_start is not None
        expected = (told.expected_start - to_datetime(taken_at)).total_seconds()
        assert abs(expected - 20) <= 2  # the statistics are right within 5 %
        assert len(peer.given) == 2


async def test_an_explanation_counts_what_other_lanes_and_shares_have_before(tmp_path: Path) -> None:
    """A task is told the turns of other lanes of its agents: those of its share by rank, those of another by weight."""
    async with world_at(tmp_path) as world:
        await world.agent("worker", "echo", "sum", slots=1)
        await world.submit()
        await _submit(world, 3, TaskSpec(type="sum"))
        last = await world.submit()
        told = await world.tasks.explain(ADMIN, last.id)
        assert (told.code, told.ahead) == ("agents-full", 0)
        await _submit(world, 50, _spec("other", 2.0))
        found = await world.tasks._explainer._elsewhere(
            last, 0, [(agent.id, agent.spec) for agent in world.manager.registry.registered("default")]
        )
        assert sorted(found) == [("echo", 8), ("sum", 3)]
