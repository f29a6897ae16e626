"""What every `Queue` promises, as tests.

An adapter's test module provides the fixture `queue_factory`, a callable that returns a fresh, empty queue (awaitable), and imports all
of this: `from mcp_control.testing.queue_conformance import *`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_control.storage.ports import RANK_MAX, Depth, Queue, Queued

QueueFactory = Callable[[], Awaitable[Queue]]

_entries = st.lists(
    st.builds(
        Queued,
        st.sampled_from(["a", "b"]),
        st.sampled_from([f"t{n}" for n in range(12)]),
        st.one_of(st.integers(0, 9), st.sampled_from([RANK_MAX - 1, RANK_MAX])),
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


def _rank(entry: Queued) -> tuple[int, str]:
    return (entry.rank, entry.id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_steps)
def test_a_queue_behaves_like_a_sorted_list_per_lane(
    queue_factory: QueueFactory, steps: list[tuple[object, ...]]
) -> None:
    """Any sequence of pushes, takes and removals leaves what a plain model has, in its order: rank, then id."""
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
        for rank in (0, 5, RANK_MAX):
            assert await queue.before(lane, rank) == sum(entry.rank < rank for entry in line)


def _depths(model: dict[tuple[str, str], Queued]) -> list[Depth]:
    found = []
    for lane in sorted({entry.lane for entry in model.values()}):
        line = [entry for entry in model.values() if entry.lane == lane]
        first = min(line, key=_rank)
        found.append(Depth(lane, len(line), first.rank, first.id))
    return found


async def test_the_lowest_rank_comes_first_to_the_last_digit(queue_factory: QueueFactory) -> None:
    """Entries leave by rank, however they were pushed, also where ranks are large and differ by one."""
    queue = await queue_factory()
    await queue.push([Queued("l", "last", RANK_MAX), Queued("l", "first", 7), Queued("l", "second", RANK_MAX - 1)])
    assert [entry.id for entry in await queue.take("l", 10)] == ["first", "second", "last"]
    assert await queue.depths() == []


async def test_a_ceiling_leaves_what_comes_later_waiting(queue_factory: QueueFactory) -> None:
    """Taking with a ceiling returns only what is urgent enough, so that lanes can be served in the order of their ranks."""
    queue = await queue_factory()
    await queue.push([Queued("lane", "late", 90), Queued("lane", "early", 10), Queued("lane", "between", 50)])
    assert [entry.id for entry in await queue.take("lane", 10, 50)] == ["early", "between"]
    assert [entry.id for entry in await queue.take("lane", 10, 50)] == []
    assert [entry.id for entry in await queue.take("lane", 10)] == ["late"]


async def test_concurrent_takes_never_share_an_entry(queue_factory: QueueFactory) -> None:
    """However many take at once, each entry goes to exactly one of them."""
    queue = await queue_factory()
    await queue.push([Queued("l", f"t{n}", n) for n in range(500)])
    taken = await asyncio.gather(*(queue.take("l", 7) for _ in range(100)))
    ids = [entry.id for entries in taken for entry in entries]
    assert sorted(ids) == sorted(f"t{n}" for n in range(500))


async def test_pushing_again_replaces(queue_factory: QueueFactory) -> None:
    """A task is in a lane once; its last push decides where."""
    queue = await queue_factory()
    await queue.push([Queued("l", "a", 1), Queued("l", "b", 2)])
    await queue.push([Queued("l", "a", 3)])
    assert [entry.id for entry in await queue.take("l", 10)] == ["b", "a"]
