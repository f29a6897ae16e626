"""Holding tasks back: nobody gets them until they are let go, and they lose nothing by it."""

from pathlib import Path

import pytest

from mcp_control.kernel.errors import InvalidTransition
from mcp_control.tasks.model import TaskState
from tests.tasks.world import ADMIN, two_servers_at, world_at


async def test_a_paused_task_is_passed_over_and_comes_back_at_its_place(tmp_path: Path) -> None:
    """Of three that wait the first is paused: the second goes first; let go, the first goes before the third."""
    async with world_at(tmp_path) as world:
        first, second, third = [await world.submit() for _ in range(3)]
        paused = await world.control.pause(ADMIN, first.id, "wait for the supplier")
        assert (paused.state, paused.hold and paused.hold.reason) == (TaskState.QUEUED, "wait for the supplier")
        explained = await world.tasks.explain(ADMIN, first.id)
        assert (explained.code, explained.held_by) == ("paused", [ADMIN.id])
        peer = await world.agent()
        given = await peer.until_given(1)
        assert given[0].task_id == second.id
        await world.control.resume(ADMIN, first.id)
        await peer.done(given[0])
        assert (await peer.until_given(2))[1].task_id == first.id
        assert (await world.task(third.id)).state is TaskState.QUEUED
        assert [fact.fact.type for fact in world.facts if fact.fact.subject == first.id][:3] == [
            "task.queued",
            "task.paused",
            "task.resumed",
        ]


async def test_pausing_lets_a_running_attempt_go_on_and_holds_what_comes_after(tmp_path: Path) -> None:
    """Paused while it runs it may complete; handed back instead, it waits outside its lane, also after a restart."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        one, two = [await world.submit() for _ in range(2)]
        given = {each.task_id: each for each in await peer.until_given(2)}
        for task in (one, two):
            await world.control.pause(ADMIN, task.id)
        await peer.done(given[one.id], result=b"1")
        await peer.done(given[two.id], "released")
        assert (await world.task(one.id)).state is TaskState.COMPLETED
        assert (await world.task(two.id)).state is TaskState.QUEUED
        with pytest.raises(InvalidTransition):
            await world.control.pause(ADMIN, one.id)
        other = await world.submit()
        assert (await peer.until_given(3))[2].task_id == other.id
    async with world_at(tmp_path) as world:
        peer = await world.agent("other")
        last = await world.submit()
        assert (await peer.until_given(1))[0].task_id == last.id
        assert await world.queue.depths() == []
        assert (await world.task(two.id)).waits is False


async def test_a_scheduled_task_that_is_paused_becomes_due_and_still_waits(tmp_path: Path) -> None:
    """Its time comes while it is held back: it is queued, and given out when it is let go."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent()
        task = await two.submit()
        given = await peer.until_given(1)
        await two.control.pause(ADMIN, task.id)
        await peer.done(given[0], "failed")
        one.clock.advance(120_000)  # type: ignore[attr-defined]  # the worlds of tests have a FakeClock
        await one.timekeeper.once()
        after = await two.task(task.id)
        assert (after.state, after.waits) == (TaskState.QUEUED, False)
        await two.control.resume(ADMIN, task.id)
        again = await peer.until_given(1)
        assert again[0].task_id == task.id

        async def assigned() -> bool:
            return (await two.task(task.id)).attempt == 2

        await one.until(assigned)
