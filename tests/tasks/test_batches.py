"""Many tasks at once: submissions, idempotency keys, pages, logs, retention, waiting."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.changes import Query
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import IdempotencyMismatch, Invalid, InvalidCursor, NotFound, PayloadRemoved, Unroutable
from mcp_control.tasks.dead_letters import ReplayEdit
from mcp_control.tasks.janitors import PayloadRetention, Retention
from mcp_control.tasks.listing import TaskFilter
from mcp_control.tasks.model import Failure, LogLine, Origin, TaskSpec, TaskState
from mcp_control.tasks.service import Submitted
from mcp_control.tasks.wire import Logged
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, world_at

ORIGIN = Origin(principal=ADMIN.id)


async def test_a_batch_answers_each_submission_on_its_own(tmp_path: Path) -> None:
    """Invalid and unroutable submissions are refused in their places, the others are accepted."""
    async with world_at(tmp_path) as world:
        specs = [
            TaskSpec(type="echo"),
            TaskSpec(type="echo", priority=101),
            TaskSpec(type="nobody", on_unroutable="reject"),
            TaskSpec(type="nobody"),
        ]
        first, invalid, unroutable, warned = await world.tasks.submit(ADMIN, specs, ORIGIN)
        assert isinstance(first, Submitted)
        assert isinstance(invalid, Invalid)
        assert isinstance(unroutable, Unroutable)
        assert isinstance(warned, Submitted)
        assert warned.warnings
        assert len(await world.store.find("task", Query())) == 2


async def test_one_key_is_one_task_in_one_batch_and_in_parallel(tmp_path: Path) -> None:
    """However often and from wherever a key arrives at once, one task is made and everybody is told of it."""
    async with world_at(tmp_path) as world:
        await world.agent(slots=5)
        spec = TaskSpec(type="echo", idempotency_key="k")
        batches = await asyncio.gather(*(world.tasks.submit(ADMIN, [spec] * 3, ORIGIN) for _ in range(5)))
        results = [result for batch in batches for result in batch]
        assert all(isinstance(result, Submitted) for result in results)
        found = [result for result in results if isinstance(result, Submitted)]
        assert len({result.task.id for result in found}) == 1
        assert sum(result.created for result in found) == 1
        (session,) = world.sessions.all()
        assert len(session.held) == 1, "refused submissions give their slots back"
        (other,) = await world.tasks.submit(ADMIN, [TaskSpec(type="sum", idempotency_key="k")], ORIGIN)
        assert isinstance(other, IdempotencyMismatch)


async def test_pages_show_every_task_once(tmp_path: Path) -> None:
    """Walking the pages shows each task that matches exactly once, newest first, also where a page ends with a full read."""
    async with world_at(tmp_path) as world:
        specs = [TaskSpec(type="echo", labels={"n": "even" if n % 2 == 0 else "odd"}) for n in range(420)]
        results = await world.tasks.submit(ADMIN, specs, ORIGIN)
        ids = [result.task.id for result in results if isinstance(result, Submitted)]
        for labels, limit in (({}, 50), ({"n": "even"}, 7), ({"n": "odd"}, 100)):
            seen, cursor = [], None
            while True:
                page = await world.tasks.list(ADMIN, TaskFilter(labels=labels), cursor=cursor, limit=limit)
                assert len(page.items) <= limit
                seen += [task.id for task in page.items]
                cursor = page.next_cursor
                if cursor is None:
                    break
            wanted = [i for i, s in zip(ids, specs, strict=True) if not labels or s.labels == labels]
            assert seen == sorted(wanted, reverse=True)
        with pytest.raises(InvalidCursor):
            await world.tasks.list(ADMIN, TaskFilter(), cursor="made-up")


async def test_logs_are_read_line_by_line_across_chunks(tmp_path: Path) -> None:
    """Reading on from any line number gives each line once, in order."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit()
        token = peer.given[task.id].lease_token
        for chunk in range(5):
            lines = [LogLine(at=1, message=f"line {chunk * 3 + n}") for n in range(3)]
            await peer.report(logs=[Logged(task_id=task.id, lease_token=token, lines=lines)])
        for step in (1, 2, 4, 100):
            read, after = [], 0
            while chunks := await world.tasks.logs(ADMIN, task.id, after, step):
                assert chunks[0].first == after
                lines = [line.message for chunk in chunks for line in chunk.lines]
                read += lines
                after += len(lines)
            assert read == [f"line {n}" for n in range(15)]


async def test_finished_tasks_go_after_their_time_with_all_their_logs(tmp_path: Path) -> None:
    """Retention removes old finished tasks and every log chunk of them, and nothing that is open."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()
        old = await world.submit()
        token = peer.given[old.id].lease_token
        for _ in range(4):
            lines = [LogLine(at=1, message="x")]
            await peer.report(logs=[Logged(task_id=old.id, lease_token=token, lines=lines)])
        await peer.done(peer.given[old.id])
        waiting = await world.submit("later")
        retention = Retention(world.store, clock, keep_ms=1000)
        assert await retention.once() == 0
        clock.advance(2)
        assert await retention.once() == 1
        assert [entity.id for entity in await world.store.find("task", Query())] == [waiting.id]
        assert await world.store.find("log", Query()) == []
        with pytest.raises(NotFound):
            await world.tasks.one(ADMIN, old.id)


async def test_payloads_go_before_their_tasks_and_a_read_says_when(tmp_path: Path) -> None:
    """What finished is emptied after its time, once, and shows when; it can be repeated only with another payload; the rest stays."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent(slots=9)
        old = await world.submit(payload=msgspec.Raw(msgspec.json.encode("x" * 9000)))
        failed = await world.submit(payload=msgspec.Raw(b'{"a":1}'), retry={"max_attempts": 1})
        waiting = await world.submit("later", payload=msgspec.Raw(b'{"b":2}'))
        await peer.done(peer.given[old.id], result=msgspec.Raw(b'"done"'))
        await peer.done(
            peer.given[failed.id], "failed", failure=Failure(error_class="permanent", code="no", message="no")
        )
        payloads = PayloadRetention(world.store, keep_ms=1000)
        assert await payloads.once(clock.now()) == 0
        clock.advance(2)
        removed_at = clock.now()
        assert await payloads.once(removed_at) == 2
        assert await payloads.once(clock.now()) == 0
        assert await PayloadRetention(world.store, keep_ms=1000).once(clock.now()) == 0, "nor does another server again"
        both = ("payload", "result")
        shown = dict(zip(both, await world.tasks.get(ADMIN, [old.id, waiting.id], both), strict=True))
        gone, kept = shown["payload"], shown["result"]
        assert gone is not None
        assert kept is not None
        assert (gone.state, gone.payload, gone.result) == (TaskState.COMPLETED, msgspec.UNSET, msgspec.UNSET)
        assert gone.payload_removed_at == to_datetime(removed_at)
        assert (kept.payload, kept.payload_removed_at) == (msgspec.Raw(b'{"b":2}'), None)
        letters = world.steering.dead_letters
        with pytest.raises(PayloadRemoved):
            await letters.retry(ADMIN, old.id, Origin())
        edit = ReplayEdit(payload=msgspec.Raw(b'{"a":2}'))
        assert (await letters.replay(ADMIN, failed.id, Origin(), edit)).task.links.retry_of == failed.id


async def test_waiting_ends_with_the_task_or_with_time(tmp_path: Path) -> None:
    """A caller that waits hears of the end at once; without an end, after its seconds; unknown tasks are not found."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit()
        await world.tasks.wait(ADMIN, task.id, 0.01)
        waiting = asyncio.create_task(world.tasks.wait(ADMIN, task.id, 30))
        await peer.done(peer.given[task.id])
        async with asyncio.timeout(5):
            await waiting
        assert (await world.task(task.id)).state is TaskState.COMPLETED
        await world.tasks.wait(ADMIN, task.id, 30)
        with pytest.raises(NotFound):
            await world.tasks.wait(ADMIN, "task_none", 1)
