"""Limits: never more at once or in a time than was said, woken when something frees, nothing left behind."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.changes import Change, Entity, Query, Where
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import NotUnique, Throttled
from mcp_control.tasks.limit_model import HOLD_KIND, Gate, Taken
from mcp_control.tasks.limiting import PATIENCE, gate_name, hold_id, read_taken
from mcp_control.tasks.model import Failure, Origin, Task, TaskSpec, TaskState
from mcp_control.tasks.service import Submitted
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, World, two_servers_at, world_at


async def holds(world: World) -> dict[str, list[str]]:
    """Return who holds what: gate to ids of tasks."""
    found: dict[str, list[str]] = {}
    for row in await world.store.find(HOLD_KIND.name, Query(where=[Where("holder", "gt", "")], limit=1000)):
        taken = read_taken(row)
        found.setdefault(taken.name.replace("\x1f", "/"), []).append(taken.holder)
    return found


async def in_state(world: World, *states: TaskState) -> list[Task]:
    """Return the tasks that are in these states in the store."""
    return [task for ids in [await ids_in(world, state) for state in states] for task in ids]


async def ids_in(world: World, state: TaskState) -> list[Task]:
    """Return the tasks in a state."""
    rows = await world.store.find("task", Query(where=[Where("state", "eq", state.value)], limit=1000))
    return world.ledger.readable(rows)


async def test_no_more_tasks_of_a_key_run_than_its_limit(tmp_path: Path) -> None:
    """Two of five tasks with a limit of two are given out; each that ends lets the next in, in the order they came."""
    async with world_at(tmp_path) as world:
        agent = await world.agent(slots=10)
        tasks = [await world.submit(limits=[{"key": "customer-7", "concurrency": 2}]) for _ in range(5)]
        assert {task.state for task in tasks} == {TaskState.BLOCKED}
        given = await agent.until_given(2)
        assert [each.task_id for each in given] == [task.id for task in tasks[:2]]
        for place in range(5):
            given = await agent.until_given(min(5, place + 2))
            assert len(await in_state(world, TaskState.ASSIGNED, TaskState.RUNNING)) <= 2
            await agent.done(given[place])
        assert [each.task_id for each in await agent.until_given(5)] == [task.id for task in tasks]
        assert await holds(world) == {}
        assert await world.limits.tidy(world.clock.now()) == 0


async def test_tasks_without_limits_pass_those_that_wait(tmp_path: Path) -> None:
    """A task that waits for its limit is in nobody's way, and a blocked one says for which key it waits."""
    async with world_at(tmp_path) as world:
        agent = await world.agent(slots=3)
        first, second = [await world.submit(limits=[{"key": "k", "concurrency": 1}]) for _ in range(2)]
        free = await world.submit()
        assert {each.task_id for each in await agent.until_given(2)} == {first.id, free.id}
        waiting = await world.task(second.id)
        assert (waiting.state, waiting.reason) == (TaskState.BLOCKED, "limit-full")
        assert "k (1 at once)" in waiting.message


async def test_several_limits_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    """A task that needs two keys holds neither while one is full, and goes as soon as both are free."""
    async with world_at(tmp_path) as world:
        agent = await world.agent(slots=5)
        await world.submit(limits=[{"key": "b", "concurrency": 1}])
        (holder,) = await agent.until_given(1)
        both = await world.submit(limits=[{"key": "a", "concurrency": 1}, {"key": "b", "concurrency": 1}])

        async def sent_on() -> bool:
            return (await world.task(both.id)).waits_at.endswith("b")

        await world.until(sent_on)
        assert list(await holds(world)) == ["default/slot//b"]
        await agent.done(holder)
        assert [each.task_id for each in await agent.until_given(2)][-1] == both.id
        assert sorted(await holds(world)) == ["default/slot//a", "default/slot//b"]


@pytest.mark.parametrize("way", ["completed", "failed", "retried", "released", "cancelled", "expired", "lost"])
async def test_whatever_ends_an_attempt_lets_the_next_in(tmp_path: Path, way: str) -> None:
    """However a task ends, its slot goes to the next; a task that is queued again after its agent was lost keeps it."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        agent = await world.agent()
        limits = [{"key": "k", "concurrency": 1}]
        retry = {"max_attempts": 2, "first_seconds": 60}
        deadline = to_datetime(clock.now() + 100_000)
        first = await world.submit(limits=limits, retry=retry, deadline=deadline)
        (given,) = await agent.until_given(1)
        second = await world.submit(limits=limits)
        if way == "completed":
            await agent.done(given)
        elif way == "failed":
            await agent.done(given, "failed", failure=Failure(error_class="permanent"))
        elif way == "retried":
            await agent.done(given, "failed", failure=Failure())
        elif way == "released":
            await agent.done(given, "released")
            assert (await agent.until_given(1))[0].task_id == first.id
            assert (await world.task(second.id)).state is TaskState.BLOCKED
            return
        elif way == "cancelled":
            await world.control.cancel(ADMIN, first.id)
            await agent.done(given, "cancelled")
        elif way == "expired":
            clock.advance(101)
            await world.timekeeper.once()
        else:
            clock.advance(31)
            await world.leases.once()
            assert (await world.task(first.id)).holds
            assert (await world.task(second.id)).state is TaskState.BLOCKED
            return
        assert (await agent.until_given(2))[1].task_id == second.id
        assert await holds(world) == {"default/slot//k": [second.id]}


async def test_starts_of_a_rate_come_in_their_time(tmp_path: Path) -> None:
    """Two starts in ten seconds: the third waits until ten seconds after the first, and the message names the rate."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        agent = await world.agent(slots=10)
        tasks = [await world.submit(limits=[{"key": "api", "rate": {"count": 2, "seconds": 10}}]) for _ in range(3)]
        await agent.until_given(2)
        await world.limits.sweep()
        third = await world.task(tasks[2].id)
        assert (third.state, third.reason) == (TaskState.BLOCKED, "rate-limited")
        clock.advance(9.9)
        await world.limits.sweep()
        assert (await world.task(tasks[2].id)).state is TaskState.BLOCKED
        clock.advance(0.2)
        await world.limits.sweep()
        assert [each.task_id for each in await agent.until_given(3)] == [task.id for task in tasks]
        clock.advance(100)
        await world.limits.tidy(clock.now())
        assert await world.store.count(HOLD_KIND.name, [], 10) == 0


async def test_tasks_over_a_rate_that_drops_are_not_accepted(tmp_path: Path) -> None:
    """A throttle answers with a problem and keeps nothing; in the next period it accepts again."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        agent = await world.agent(slots=10)
        spec = {"type": "echo", "limits": [{"key": "api", "rate": {"count": 1, "seconds": 5}, "on_excess": "drop"}]}
        specs = [msgspec.convert(spec, TaskSpec)] * 2
        one, two = await world.tasks.submit(ADMIN, specs, Origin(principal=ADMIN.id))
        assert isinstance(one, Submitted)
        assert isinstance(two, Throttled)
        assert two.code == "throttled"

        await agent.until_given(1)
        once = {"limits": spec["limits"], "idempotency_key": "once"}
        clock.advance(5.1)
        first, again = await submitted(world, **once), await submitted(world, **once)
        assert isinstance(first, Submitted)
        assert isinstance(again, Submitted)
        assert (again.task.id, again.created) == (first.task.id, False)
        await agent.until_given(2)
        clock.advance(5.1)
        assert isinstance((await world.tasks.submit(ADMIN, specs[:1], Origin(principal=ADMIN.id)))[0], Submitted)


async def submitted(world: World, **fields: object) -> object:
    """Submit one task, and return what came of it."""
    spec = msgspec.convert({"type": "echo", **fields}, TaskSpec)
    return (await world.tasks.submit(ADMIN, [spec], Origin(principal=ADMIN.id)))[0]


async def test_a_singleton_is_there_once(tmp_path: Path) -> None:
    """While a task with the key is not final a second is refused, or answered with the first, or takes its place; then it is free."""
    async with world_at(tmp_path) as world:
        first = await world.submit(unique={"key": "nightly"})
        refused = await submitted(world, unique={"key": "nightly"})
        assert isinstance(refused, NotUnique)
        assert refused.data["existing"] == first.id
        same = await submitted(world, unique={"key": "nightly", "on_conflict": "return_existing"})
        assert isinstance(same, Submitted)
        assert (same.task.id, same.created) == (first.id, False)
        new = await submitted(world, unique={"key": "nightly", "on_conflict": "replace"})
        assert isinstance(new, Submitted)
        assert new.created
        assert (await world.task(first.id)).state is TaskState.CANCELLED
        agent = await world.agent()
        (given,) = await agent.until_given(1)
        assert given.task_id == new.task.id
        assert isinstance(await submitted(world, unique={"key": "nightly", "on_conflict": "replace"}), NotUnique)
        await agent.done(given)
        assert isinstance(await submitted(world, unique={"key": "nightly"}), Submitted)


async def test_a_singleton_of_the_queue_is_free_when_it_starts(tmp_path: Path) -> None:
    """With `while: queued` the key is free as soon as an agent is given the task."""
    async with world_at(tmp_path) as world:
        await world.submit(unique={"key": "k", "while": "queued"})
        assert isinstance(await submitted(world, unique={"key": "k", "while": "queued"}), NotUnique)
        agent = await world.agent()
        await agent.until_given(1)
        assert isinstance(await submitted(world, unique={"key": "k", "while": "queued"}), Submitted)


async def test_a_repeated_idempotent_submission_of_a_singleton_returns_it(tmp_path: Path) -> None:
    """The same idempotency key means the same request, and is not refused for the key it holds itself."""
    async with world_at(tmp_path) as world:
        first = await world.submit(unique={"key": "k"}, idempotency_key="once")
        again = await submitted(world, unique={"key": "k"}, idempotency_key="once")
        assert isinstance(again, Submitted)
        assert (again.task.id, again.created) == (first.id, False)


async def test_debounced_submissions_become_one_task_with_the_last_payload(tmp_path: Path) -> None:
    """Each submission begins the wait anew, up to the longest wait; what runs has the last payload."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        agent = await world.agent()
        ids = []
        for number in range(4):
            result = await submitted(
                world,
                payload=msgspec.Raw(b'{"n":%d}' % number),
                debounce={"key": "doc-1", "seconds": 10, "max_seconds": 25},
            )
            assert isinstance(result, Submitted)
            ids.append(result.task.id)
            assert result.created is (number == 0)
            clock.advance(8)
            await world.timekeeper.once()
        assert len(set(ids)) == 1
        (given,) = await agent.until_given(1)
        assert bytes(given.payload) == b'{"n":3}'
        assert await holds(world) == {}
        another = await submitted(world, payload=msgspec.Raw(b"9"), debounce={"key": "doc-1", "seconds": 10})
        assert isinstance(another, Submitted)
        assert another.created


async def test_a_slot_freed_on_one_server_wakes_a_task_accepted_by_another(tmp_path: Path) -> None:
    """Two servers share a limit of one: it holds over both, and what one frees the other's task gets."""
    async with two_servers_at(tmp_path) as (one, two):
        agent = await one.agent(slots=5)
        limits = [{"key": "k", "concurrency": 1}]
        tasks = [await world.submit(limits=limits) for world in (one, two, one, two)]
        for place in range(4):
            given = await agent.until_given(place + 1)
            assert len(given) == place + 1
            await agent.done(given[place])
        assert {each.task_id for each in given} == {task.id for task in tasks}
        assert await holds(one) == {}


async def test_a_task_of_two_keys_cannot_be_overtaken_for_ever(tmp_path: Path) -> None:
    """Whenever one key is free, somebody newer has the other; after some rounds the task keeps what it gets, and goes on."""
    async with world_at(tmp_path) as world:
        agent = await world.agent(slots=50)
        limits = {key: [{"key": key, "concurrency": 1}] for key in ("a", "b")}
        holder = {"b": (await world.submit(limits=limits["b"])).id}
        await agent.until_given(1)
        slow = await world.submit(limits=[*limits["a"], *limits["b"]])
        for _ in range(PATIENCE + 4):

            async def at_rest() -> bool:
                task = await world.task(slow.id)
                return task.state is TaskState.ASSIGNED or task.waits_at[-1:] in holder

            await world.until(at_rest)
            task = await world.task(slow.id)
            if task.state is TaskState.ASSIGNED:
                break
            waits = task.waits_at[-1]
            other = "b" if waits == "a" else "a"
            if not any(hold.name.endswith(other) for hold in task.holds):
                holder[other] = (await world.submit(limits=limits[other])).id
                while holder[other] not in agent.given:
                    await agent.until_given(len(agent.given) + 1)
            await agent.done(agent.given[holder.pop(waits)])
        assert (await world.task(slow.id)).state is TaskState.ASSIGNED
        assert len(agent.given) > PATIENCE


async def test_two_servers_give_a_key_to_one_task(tmp_path: Path) -> None:
    """Submissions of a singleton on two servers at once, again and again: one each time; debounced ones become one task."""
    async with two_servers_at(tmp_path) as servers:
        for round_ in range(5):
            unique = {"key": f"k{round_}", "on_conflict": "return_existing"}
            results = await asyncio.gather(*[submitted(world, unique=unique) for world in servers * 4])
            assert len({result.task.id for result in results if isinstance(result, Submitted)}) == 1
            assert sum(result.created for result in results if isinstance(result, Submitted)) == 1
            debounce = {"key": f"d{round_}", "seconds": 60}
            results = await asyncio.gather(*[submitted(world, debounce=debounce) for world in servers * 4])
            assert len({result.task.id for result in results if isinstance(result, Submitted)}) == 1


async def test_holds_without_their_task_are_found_and_counted(tmp_path: Path) -> None:
    """A hold that a fault left behind is removed, counted, and lets the next task in."""
    async with world_at(tmp_path) as world:
        agent = await world.agent(slots=5)
        name = gate_name("default", Gate(key="k", slots=1))
        left = Taken(name=name, number=0, holder="task_gone")
        index = {"gate": name, "holder": "task_gone"}
        await world.store.commit(
            [Change([Entity(HOLD_KIND.name, hold_id(name, 0), 0, index, msgspec.msgpack.encode(left))])]
        )
        task = await world.submit(limits=[{"key": "k", "concurrency": 1}])
        assert (await world.task(task.id)).state is TaskState.BLOCKED
        assert await world.limits.tidy(world.clock.now()) == 1
        assert world.limits.leaked == 1
        assert (await agent.until_given(1))[0].task_id == task.id


async def test_who_waits_for_a_limit_hears_when_it_may_go_on(tmp_path: Path) -> None:
    """From how long such tasks took, who holds the limit since when, and the place in line; nothing is said without a history."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent(slots=9)
        limits = [{"key": "k", "concurrency": 2}]
        tasks = [await world.submit(limits=limits) for _ in range(2)]
        await peer.until_given(2)
        began = clock.now()
        for assignment in list(peer.given.values()):
            await peer.start(assignment)
        clock.advance(4)
        waiting = [await world.submit(limits=limits) for _ in range(4)]
        assert (await world.tasks.explain(ADMIN, waiting[0].id)).expected_start is None
        for _ in range(10):
            world.history.ran("default", "echo", 10.0, True)
        await world.history.once(clock.now())
        found: list[float] = []
        for task in waiting:
            told = await world.tasks.explain(ADMIN, task.id)
            assert (told.code, set(told.held_by)) == ("limit-full", {held.id for held in tasks})
            assert told.expected_start is not None
            found.append((told.expected_start - to_datetime(began)).total_seconds())
        assert [round(seconds / 10) * 10 for seconds in found] == [10, 10, 20, 20]
