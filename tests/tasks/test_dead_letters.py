"""Dead letters: what failed for good is shown, tried again once, or discarded; what cannot be read is parked."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mcp_control.kernel.changes import Change, Entity
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import InvalidTransition, NotFound
from mcp_control.tasks.dead_letters import ReplayEdit
from mcp_control.tasks.listing import TaskFilter
from mcp_control.tasks.model import Failure, Needs, Origin, TaskState
from mcp_control.tasks.selection import Selection
from tests.tasks.world import ADMIN, Peer, World, two_servers_at, world_at

S = TaskState
ORIGIN = Origin(principal=ADMIN.id)


async def _fail(peer: Peer, place: int, code: str = "broken", **failure: Any) -> str:
    assignment = (await peer.until_given(place + 1))[place]
    await peer.done(assignment, "failed", failure=Failure(error_class="permanent", code=code, **failure))
    return assignment.task_id


async def _letters(world: World, **wanted: Any) -> list[str]:
    page = await world.steering.dead_letters.list(ADMIN, msgspec.convert(wanted, Selection))
    return [one.id for one in page.items]


async def test_what_failed_for_good_is_listed_by_its_failure(tmp_path: Path) -> None:
    """Completed and waiting tasks are no dead letters; code, class and type narrow the list."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("worker", "a", "b")
        await world.submit("a")
        first = await _fail(peer, 0, "x")
        await world.submit("b")
        second = await _fail(peer, 1, "y")
        await world.submit("a")
        await peer.done((await peer.until_given(3))[2])
        assert sorted(await _letters(world)) == sorted([first, second])
        assert await _letters(world, code="x") == [first]
        assert await _letters(world, type="b") == [second]
        assert await _letters(world, error_class="critical") == []


async def test_a_replay_is_a_new_task_that_names_the_old_and_happens_once(tmp_path: Path) -> None:
    """Payload and needs may be changed; the old one stays as it was and leaves the set; a second replay is refused."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await one.agent()
        await one.submit(payload=msgspec.Raw(b'{"wrong":1}'))
        failed = await _fail(peer, 0)
        edit = ReplayEdit(payload=msgspec.Raw(b'{"right":2}'), needs=Needs(agent="worker"))
        again = (await two.steering.dead_letters.replay(ADMIN, failed, ORIGIN, edit)).task
        assert (again.links.retry_of, again.needs.agent, again.failures, again.lost) == (failed, "worker", 0, 0)
        given = (await peer.until_given(2))[1]
        assert (given.task_id, bytes(given.payload)) == (again.id, b'{"right":2}')
        old = await one.task(failed)
        assert (old.state, old.retried_as) == (S.FAILED, again.id)
        assert await _letters(one) == []
        with pytest.raises(InvalidTransition):
            await one.steering.dead_letters.replay(ADMIN, failed, ORIGIN)
        with pytest.raises(NotFound):
            await one.steering.dead_letters.replay(ADMIN, "task_unknown", ORIGIN)


async def test_what_is_discarded_leaves_the_set_and_stays_in_the_history(tmp_path: Path) -> None:
    """Who discarded it and why is kept; it cannot be replayed then, only retried."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        await world.submit()
        failed = await _fail(peer, 0)
        after = await world.steering.dead_letters.discard(ADMIN, failed, "harmless")
        assert after.discarded is not None
        assert (after.discarded.by, after.discarded.reason) == (ADMIN.id, "harmless")
        assert await _letters(world) == []
        assert (await world.task(failed)).state is S.FAILED
        with pytest.raises(InvalidTransition):
            await world.steering.dead_letters.discard(ADMIN, failed)
        with pytest.raises(InvalidTransition):
            await world.steering.dead_letters.replay(ADMIN, failed, ORIGIN)
        assert (await world.steering.dead_letters.retry(ADMIN, failed, ORIGIN)).created


async def test_a_task_that_kills_its_agents_is_a_dead_letter_with_its_reason(tmp_path: Path) -> None:
    """Three leases lost in a row quarantine it; replayed, it begins to count anew."""
    async with world_at(tmp_path) as world:
        task = await world.submit()
        for place in range(3):
            peer = await world.agent(f"worker-{place}", lease_seconds=2.0)
            await peer.until_given(1)
            world.advance(40)
            await world.leases.once()
            world.advance(40)
            await world.leases.once()
        assert await _letters(world, code="quarantined") == [task.id]
        poison = await world.task(task.id)
        assert (poison.reason, [attempt.outcome for attempt in poison.attempts]) == ("quarantined", ["lost"] * 3)
        again = (await world.steering.dead_letters.replay(ADMIN, task.id, ORIGIN)).task
        assert (again.lost, again.state) == (0, S.QUEUED)


async def _spoil(world: World, task_id: str) -> None:
    """Make a stored task one that cannot be decoded."""
    (row,) = await world.store.get("task", [task_id])
    assert row is not None
    assert await world.store.commit([Change([Entity("task", row.id, row.version, row.index, b"\xc1 no")])]) == [None]
    world.ledger.forget([task_id])


async def test_a_row_that_cannot_be_decoded_is_parked_and_stops_nothing(tmp_path: Path) -> None:
    """Lists, the due janitor, a restart and the queue go on; the row is counted, listed, and removed by hand."""
    async with world_at(tmp_path) as world:
        waiting = await world.submit()
        due = await world.submit(deadline=_late(world))
        other = await world.submit(deadline=_late(world))
        for spoilt in (waiting, due):
            await _spoil(world, spoilt.id)
    async with world_at(tmp_path) as world:
        world.advance(7200)
        assert [one.id for one in (await world.tasks.list(ADMIN, TaskFilter())).items] == [other.id]
        await world.steering.parking.once(0)
        handled = await world.timekeeper.once()
        assert handled >= 1
        await world.steering.parking.once(0)
        assert await world.timekeeper.once() == 0
        assert (await world.task(other.id)).state is S.EXPIRED
        parked = await world.steering.parking.list(ADMIN)
        assert {one.id for one in parked} == {waiting.id, due.id}
        assert world.steering.parking.parked == 2
        fresh = await world.submit()
        peer = await world.agent()
        assert (await peer.until_given(1))[0].task_id == fresh.id
        await world.steering.parking.remove(ADMIN, due.id)
        assert [one.id for one in await world.steering.parking.list(ADMIN)] == [waiting.id]
        with pytest.raises(NotFound):
            await world.steering.parking.remove(ADMIN, fresh.id)


def _late(world: World) -> str:
    return to_datetime(world.clock.now() + 3_600_000).isoformat()
