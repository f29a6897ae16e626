"""Following facts: nothing missed, nothing twice, nothing unbounded."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_control.events.backlog import Batch
from mcp_control.events.broadcaster import Broadcaster, Subscription
from mcp_control.events.filters import Filter
from mcp_control.events.retention import EventRetention
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import CursorExpired, Invalid, Overloaded
from tests.events.world import NOW, World, happened, seqs

DAY = 86_400_000


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "data", backlog=20)
    await world.open()
    yield world
    assert world.broken == []
    world.events.close()
    await world.store.close()


async def take(subscription: Subscription, count: int) -> list[StoredFact]:
    """Read until `count` facts came; fails when they do not come soon."""
    found: list[StoredFact] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += (await anext(subscription)).facts
    return found


async def next_batch(subscription: Subscription) -> Batch:
    async with asyncio.timeout(10):
        return await anext(subscription)


async def test_live_facts_come_in_order_from_the_moment_of_subscribing(world: World) -> None:
    """Without a cursor the stream begins with the next fact."""
    await world.tell(happened("task.queued"))
    subscription = await world.events.subscribe()
    await world.tell(happened("task.assigned"), happened("task.started"))
    await world.tell(happened("task.completed"))
    found = await take(subscription, 3)
    assert seqs(found) == [2, 3, 4]
    assert [each.fact.type for each in found] == ["task.assigned", "task.started", "task.completed"]
    assert subscription.after == 4


@pytest.mark.parametrize(
    ("types", "subject", "run", "tenant", "expected"),
    [
        (["task.*"], None, None, None, [1, 2, 5]),
        (["task.completed", "run.*"], None, None, None, [2, 3]),
        (["*"], None, None, None, [1, 2, 3, 4, 5]),
        ([], "task_b", None, None, [2]),
        ([], None, "run_1", None, [1, 3]),
        (["run.*"], None, "run_1", None, [3]),
        ([], "task_a", "run_1", None, [1]),
        ([], None, None, "other", [5]),
        (["task.*"], None, None, "default", [1, 2]),
        (["pipeline.*"], None, None, None, []),
    ],
)
async def test_filters_mean_the_same_live_in_the_past_and_in_pages(
    world: World, types: list[str], subject: str | None, run: str | None, tenant: str | None, expected: list[int]
) -> None:
    """One filter, one meaning, however the facts are read; only facts that match are delivered."""
    live = await world.events.subscribe(types, subject, run, tenant)
    await world.tell(
        happened("task.queued", "task_a", run="run_1"),
        happened("task.completed", "task_b"),
        happened("run.completed", "run_1", run="run_1"),
        happened("agent.online", "agent_1"),
        happened("task.queued", "task_c", tenant="other"),
    )
    past = await world.events.subscribe(types, subject, run, tenant, after=0)
    found, after = await world.events.page(
        Filter(types=tuple(types), subject=subject, run=run, tenant=tenant), None, 50
    )
    assert seqs(found) == expected
    assert after == 5
    for subscription in (live, past):
        assert seqs(await take(subscription, len(expected))) == expected


async def test_past_and_present_join_without_gap_or_duplicate(world: World) -> None:
    """Subscribers that start at any time from any cursor, while commits go on, each see every fact once, in order."""
    total = 3000

    async def write() -> None:
        for at in range(0, total, 5):
            await world.tell(*[happened("task.queued", f"task_{at + n}") for n in range(5)])

    async def follow(after: int) -> list[int]:
        async with await world.events.subscribe(["task.*"], after=after) as subscription:
            return seqs(await take(subscription, total - after))

    async def late(at: int) -> list[int]:
        async with await world.events.subscribe(after=0) as waiting:
            await take(waiting, at)
        return await follow(at // 2)

    writing = asyncio.create_task(write())
    moments = [0, 7, 600, 1300, 2900]
    streams = await asyncio.gather(*[late(moment) for moment in moments])
    await writing
    for moment, stream in zip(moments, streams, strict=True):
        assert stream == list(range(moment // 2 + 1, total + 1))
    assert world.events.subscribers == 0


async def test_cursor_resumes_after_a_restart(tmp_path: Path) -> None:
    """A server that starts anew knows where the facts stand, and goes on from a cursor of before."""
    world = World(tmp_path / "data")
    await world.open()
    for n in range(0, 1200, 10):
        await world.tell(*[happened("task.queued", f"task_{n + m}") for m in range(10)])
    await world.store.close()
    again = World(tmp_path / "data")
    await again.open()
    assert again.events.newest == 1200
    subscription = await again.events.subscribe(after=3)
    await again.tell(happened("task.queued", "task_last"))
    assert seqs(await take(subscription, 1198)) == list(range(4, 1202))
    await again.store.close()


async def test_progress_of_one_thing_is_coalesced_for_who_is_behind(world: World) -> None:
    """Only the newest progress and log notice of each thing wait, in the order of the facts; state changes all wait."""
    subscription = await world.events.subscribe()
    for _ in range(100):
        await world.tell(
            happened("task.progressed", "task_a"),
            happened("task.logged", "task_a"),
            happened("task.progressed", "task_b"),
        )
    await world.tell(happened("task.completed", "task_a"))
    batch = await next_batch(subscription)
    assert not batch.reread
    assert [(each.fact.type, each.fact.subject) for each in batch.facts] == [
        ("task.progressed", "task_a"),
        ("task.logged", "task_a"),
        ("task.progressed", "task_b"),
        ("task.completed", "task_a"),
    ]
    assert seqs(batch.facts) == [298, 299, 300, 301]


async def test_slow_subscriber_is_told_to_read_anew_and_stays_bounded(world: World) -> None:
    """When state changes do not fit the backlog, the subscriber hears of it; afterwards it gets the newest as before."""
    subscription = await world.events.subscribe()
    for n in range(0, 1005, 5):
        await world.tell(*[happened("task.queued", f"task_{n + m}") for m in range(5)])
    batch = await next_batch(subscription)
    assert batch.reread
    assert len(batch.facts) <= 20
    assert seqs(batch.facts)[-1] == batch.after == 1005
    await world.tell(happened("task.completed"))
    batch = await next_batch(subscription)
    assert not batch.reread
    assert seqs(batch.facts) == [1006]


async def test_progress_never_pushes_a_state_change_out(world: World) -> None:
    """A full backlog drops notices of progress, and keeps what changed a state."""
    subscription = await world.events.subscribe()
    for n in range(20):
        await world.tell(happened("task.queued", f"task_{n}"))
    for n in range(100):
        await world.tell(happened("task.progressed", f"task_{n}"))
    batch = await next_batch(subscription)
    assert not batch.reread
    assert seqs(batch.facts) == list(range(1, 21))
    assert batch.after == 120


async def test_cursor_older_than_what_is_kept_is_refused(world: World) -> None:
    """Whoever would miss something is told so: before the stream begins, and in the middle of reading the past."""
    for n in range(10):
        await world.tell(happened("task.queued", f"task_{n}", at=NOW + n * DAY))
    slow = await world.events.subscribe(after=0)
    retention = EventRetention(world.store, keep_ms=5 * DAY, keep_count=1000, batch=2)
    assert await retention.once(NOW + 10 * DAY) == 6
    assert await retention.once(NOW + 10 * DAY) == 6
    for cursor in (0, 4, 11):
        with pytest.raises(CursorExpired):
            await world.events.subscribe(after=cursor)
        with pytest.raises(CursorExpired):
            await world.events.page(Filter(), cursor, 10)
    with pytest.raises(CursorExpired):
        await next_batch(slow)
    assert seqs(await take(await world.events.subscribe(after=5), 5)) == [6, 7, 8, 9, 10]
    assert seqs((await world.events.page(Filter(), None, 2))[0]) == [6, 7]


async def test_retention_by_count_keeps_the_newest(world: World) -> None:
    """No more than the stated number is kept, and the numbering goes on."""
    for n in range(10):
        await world.tell(happened("task.queued", f"task_{n}"))
    assert await EventRetention(world.store, keep_ms=DAY, keep_count=3).once(NOW) == 8
    assert await EventRetention(world.store, keep_ms=DAY, keep_count=3).once(NOW + 2 * DAY) == 11
    with pytest.raises(CursorExpired):
        await world.events.subscribe(after=4)
    subscription = await world.events.subscribe(after=10)
    await world.tell(happened("task.queued"))
    assert seqs(await take(subscription, 1)) == [11]


async def test_closing_ends_the_stream_and_forgets_the_subscriber(world: World) -> None:
    """A closed stream ends at once, also for who waits on it, and costs nothing more."""
    subscription = await world.events.subscribe(["task.*"], run="run_1")
    other = await world.events.subscribe(subject="task_1")
    await world.tell(happened("task.queued"))

    async def drain() -> int:
        return sum([len(batch.facts) async for batch in subscription])

    waiting = asyncio.create_task(drain())
    await asyncio.sleep(0)
    subscription.close()
    subscription.close()
    assert await asyncio.wait_for(waiting, 10) == 0
    assert world.events.subscribers == 1
    await world.tell(happened("task.queued", run="run_1"))
    assert seqs(await take(other, 2)) == [1, 2]
    world.events.close()
    assert [batch async for batch in other] == []


async def test_subscriptions_are_limited_and_checked(world: World) -> None:
    """Bad patterns and too many subscriptions are refused with a reason."""
    for types in (["task"], ["task."], [".x"], ["ta sk.*"], ["task.x.y"], [""], ["task.*"] * 51):
        with pytest.raises(Invalid):
            await world.events.subscribe(types)
    few = Broadcaster(world.store, limit=1)
    await few.subscribe()
    with pytest.raises(Overloaded):
        await few.subscribe()


async def test_store_that_breaks_the_order_is_reported(tmp_path: Path) -> None:
    """A gap or a step back in the numbering is counted as a broken invariant, never passed over."""
    world = World(tmp_path / "data")
    await world.open()
    await world.tell(happened("task.queued"))
    for seq in (2, 4, 4):
        world.events.committed([StoredFact(seq, happened("task.queued"))])
    assert world.broken == ["facts_out_of_order"] * 2
    await world.store.close()


async def test_what_others_recorded_while_a_server_opened_may_be_told_late(world: World) -> None:
    """Facts that are in the store already when the server starts, and are told after that, are in order and reach nobody twice."""
    await world.tell(happened("task.queued"), happened("task.assigned"), happened("task.started"))
    broken: list[str] = []
    late = Broadcaster(world.store, broken=broken.append)
    await late.start()
    subscription = await late.subscribe()
    for seq, kind in ((2, "task.assigned"), (3, "task.started"), (4, "task.completed")):
        late.committed([StoredFact(seq, happened(kind))])
        assert late.newest == max(3, seq)
    assert seqs(await take(subscription, 1)) == [4]
    assert broken == []
    late.committed([StoredFact(6, happened("task.queued"))])
    assert broken == ["facts_out_of_order"]
