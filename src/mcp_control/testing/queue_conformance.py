"""What every `Queue` promises, as tests.

An adapter's test module provides the fixture `queue_factory`, a callable that returns a fresh, empty queue (awaitable), and imports all
of this: `from mcp_control.testing.queue_conformance import *`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_control.storage.ports import Depth, Queue, Queued

QueueFactory = Callable[[], Awaitable[Queue]]

_entries = st.lists(
    st.builds(
        Queued,
        st.sampled_from(["a", "b"]),
        st.sampled_from([f"t{n}" for n in range(12)]),
        st.integers(0, 3),
        st.integers(0, 9),
    ),
    max_size=12,
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), _entries),
        st.tuples(st.just("take"), st.sampled_from(["a", "b"]), st.integers(0, 5)),
        st.tuples(
            st.just("remove"),
            st.sampled_from(["a", "b"]),
            st.lists(st.sampled_from([f"t{n}" for n in range(14)]), max_size=6),
        ),
        st.tuples(st.just("clear")),
    ),
    max_size=30,
)


def _rank(entry: Queued) -> tuple[int, int, str]:
    return (-entry.priority, entry.order, entry.id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_steps)
def test_a_queue_behaves_like_a_sorted_list_per_lane(
    queue_factory: QueueFactory, steps: list[tuple[object, ...]]
) -> None:
    """Any sequence of pushes, takes and removals leaves what a plain model has, in its order: priority, then order, then id."""
    asyncio.run(_against_model(queue_factory, steps))


async def _against_model(queue_factory: QueueFactory, steps: list[tuple[object, ...]]) -> None:
    queue = await queue_factory()
    model: dict[tuple[str, str], Queued] = {}
    for step in steps:
        match step:
            case ("push", list() as entries):
                await queue.push(entries)
                model.update({(entry.lane, entry.id): entry for entry in entries})
            case ("take", str() as lane, int() as limit):
                expected = sorted((entry for entry in model.values() if entry.lane == lane), key=_rank)[:limit]
                assert await queue.take(lane, limit) == expected
                for entry in expected:
                    del model[lane, entry.id]
            case ("remove", str() as lane, list() as ids):
                await queue.remove(lane, ids)
                for identifier in ids:
                    model.pop((lane, identifier), None)
            case _:
                await queue.clear()
                model.clear()
        assert sorted(await queue.depths(), key=lambda depth: depth.lane) == _depths(model)
    for lane in ("a", "b"):
        line = sorted((entry for entry in model.values() if entry.lane == lane), key=_rank)
        assert [await queue.ahead(lane, entry.id) for entry in line] == [*range(len(line))]
        assert await queue.ahead(lane, "absent") is None


def _depths(model: dict[tuple[str, str], Queued]) -> list[Depth]:
    found = []
    for lane in sorted({entry.lane for entry in model.values()}):
        line = [entry for entry in model.values() if entry.lane == lane]
        first = min(line, key=lambda entry: (-entry.priority, entry.order, entry.id))
        found.append(Depth(lane, len(line), first.priority, min(entry.order for entry in line), first.id))
    return found


async def test_higher_priority_comes_first_then_the_older(queue_factory: QueueFactory) -> None:
    """Entries leave by priority, and within one priority by their order, however they were pushed."""
    queue = await queue_factory()
    await queue.push([Queued("l", "young", 50, 9), Queued("l", "old", 50, 1), Queued("l", "urgent", 90, 10)])
    assert [entry.id for entry in await queue.take("l", 10)] == ["urgent", "old", "young"]
    assert await queue.depths() == []


async def test_a_floor_leaves_lower_priorities_waiting(queue_factory: QueueFactory) -> None:
    """Taking with a floor returns only what is urgent enough, so that lanes can be served in the order of their priorities."""
    queue = await queue_factory()
    await queue.push([Queued("lane", "low", 10, 1), Queued("lane", "high", 90, 2), Queued("lane", "medium", 50, 3)])
    assert [entry.id for entry in await queue.take("lane", 10, 50)] == ["high", "medium"]
    assert [entry.id for entry in await queue.take("lane", 10, 50)] == []
    assert [entry.id for entry in await queue.take("lane", 10)] == ["low"]


async def test_concurrent_takes_never_share_an_entry(queue_factory: QueueFactory) -> None:
    """However many take at once, each entry goes to exactly one of them."""
    queue = await queue_factory()
    await queue.push([Queued("l", f"t{n}", 50, n) for n in range(500)])
    taken = await asyncio.gather(*(queue.take("l", 7) for _ in range(100)))
    ids = [entry.id for entries in taken for entry in entries]
    assert sorted(ids) == sorted(f"t{n}" for n in range(500))


async def test_pushing_again_replaces(queue_factory: QueueFactory) -> None:
    """A task is in a lane once; its last push decides where."""
    queue = await queue_factory()
    await queue.push([Queued("l", "a", 50, 1), Queued("l", "b", 50, 2)])
    await queue.push([Queued("l", "a", 50, 3)])
    assert [entry.id for entry in await queue.take("l", 10)] == ["b", "a"]
