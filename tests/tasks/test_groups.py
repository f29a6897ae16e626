"""Groups: many tasks that belong together, and what is done once when they have ended."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.kernel.changes import Change, Entity, Query, Where
from mcp_control.kernel.errors import IdempotencyMismatch, Invalid, InvalidTransition, NotFound
from mcp_control.security.model import Actor
from mcp_control.tasks import grouping
from mcp_control.tasks.group_model import (
    GROUP_FINAL,
    Added,
    CallbackPayload,
    GroupRequest,
    GroupState,
    GroupView,
    MoreTasks,
    TaskGroup,
)
from mcp_control.tasks.grouping import GROUP_TRANSITIONS, Seen
from mcp_control.tasks.model import Failure, Origin, Request, TaskState
from tests.tasks.world import ADMIN, Peer, World, two_servers_at, world_at

G = GroupState
NOW = 1_790_000_000_000
ORIGIN = Origin(principal=ADMIN.id)


# --- rules --------------------------------------------------------------------------------------------------------


def _group(state: GroupState, **fields: Any) -> TaskGroup:
    return TaskGroup(
        id="group_1", version=1, state=state, state_at=NOW, created_at=NOW, changed_at=NOW, origin=ORIGIN, **fields
    )


def _moved(group: TaskGroup, verb: str, seen: Seen) -> TaskGroup | None:
    match verb:
        case "seal":
            return grouping.sealed(group, NOW)
        case "cancel":
            return grouping.cancelling(group, Request(at=NOW, by="x"), "op_1")
        case "retry":
            return grouping.retried(group, NOW, "op_1")
        case _:
            found = grouping.step(group, seen, NOW)
            return None if found is None or not found.ends else found.after


@settings(deadline=None)  # a busy machine breaks no rule
@given(
    st.sampled_from(GroupState), st.sampled_from(sorted(GROUP_TRANSITIONS)), st.booleans(), st.sampled_from(["", "t"])
)
def test_groups_move_along_the_table_alone(state: GroupState, verb: str, unfinished: bool, spoiled: str) -> None:
    """Each verb leads from where the table says to where it says, and nowhere else."""
    rows = GROUP_TRANSITIONS[verb]
    try:
        after = _moved(_group(state), verb, Seen(unfinished, spoiled))
    except InvalidTransition:
        assert state not in rows
        return
    if after is None:
        assert unfinished or state not in rows
    else:
        assert after.state in rows[state]


_SEEN = st.builds(
    Seen,
    unfinished=st.booleans(),
    spoiled=st.sampled_from(["", "task_1", "task_2"]),
    busy=st.sampled_from([False, True]),
)


@settings(deadline=None)
@given(
    st.sampled_from([G.OPEN, G.SEALED]), st.lists(st.one_of(_SEEN, st.sampled_from(["seal", "cancel"])), max_size=12)
)
def test_each_event_happens_once_and_ended_last(state: GroupState, story: list[Any]) -> None:
    """Whatever is seen in whatever order: an event never comes twice, completed excludes a failure, nothing follows ended."""
    group, events = _group(state), []
    for each in story:
        if isinstance(each, str):
            try:
                moved = _moved(group, each, Seen(True, ""))
            except InvalidTransition:
                continue
            assert moved is not None
            group = moved
            continue
        found = grouping.step(group, each, NOW)
        if found is not None:
            assert not each.busy
            group = found.after
            events += found.events
    assert len(events) == len(set(events))
    assert not {"completed", "first_failure"} <= set(events)
    assert ("ended" in events) == (group.state in GROUP_FINAL)
    assert "ended" not in events[:-1]


# --- on a store ---------------------------------------------------------------------------------------------------


def _specs(count: int, task_type: str = "echo") -> list[dict[str, Any]]:
    return [{"type": task_type, "payload": place} for place in range(count)]


ON = {
    "completed": {"type": "after", "payload": {"say": "all"}},
    "first_failure": {"type": "after", "payload": {"say": "first"}},
    "ended": {"type": "after", "payload": {"say": "end"}},
}


async def _create(world: World, count: int = 2, **fields: Any) -> GroupView:
    request = msgspec.json.decode(msgspec.json.encode({"tasks": _specs(count), "on": ON} | fields), type=GroupRequest)
    view, _ = await world.steering.groups.create(ADMIN, request, ORIGIN)
    return view


async def _add(world: World, group_id: str, count: int, **fields: Any) -> Added:
    request = msgspec.json.decode(msgspec.json.encode({"tasks": _specs(count)} | fields), type=MoreTasks)
    return (await world.steering.groups.add(ADMIN, group_id, request, ORIGIN))[0]


async def _get(world: World, group_id: str) -> GroupView:
    return await world.steering.groups.get(ADMIN, group_id)


async def _until(world: World, group_id: str, *states: GroupState) -> GroupView:
    async def there() -> bool:
        return (await _get(world, group_id)).state in states

    await world.until(there)
    return await _get(world, group_id)


async def _called(world: World) -> dict[str, CallbackPayload]:
    """Return the payloads of all callbacks there are, by what their specs said."""
    found: dict[str, CallbackPayload] = {}
    for row in await world.store.find("task", _all("after")):
        payload = msgspec.json.decode(row.cold["payload"], type=CallbackPayload)
        said = msgspec.json.decode(payload.payload)["say"]
        assert said not in found, "made twice"
        found[said] = payload
    return found


def _all(task_type: str) -> Query:
    return Query(where=[Where("type", "eq", task_type)], limit=10_000, cold=("payload",))


async def _work_off(peer: Peer, count: int, failing: tuple[int, ...] = (), known: Collection[str] = ()) -> set[str]:
    """Do what is given until so many tasks are done, those known included; returns their ids."""
    done = set(known)
    while len(done) < count:
        for assignment in await peer.until_given(len(done) + 1):
            if assignment.task_id in done:
                continue
            done.add(assignment.task_id)
            bad = msgspec.json.decode(assignment.payload) in failing
            failure = Failure(error_class="permanent", code="broken", message="it is broken") if bad else None
            await peer.done(assignment, "failed" if bad else "completed", failure=failure)
            if len(done) == count:
                break
    return done


async def test_the_callback_is_made_once_when_all_have_completed(tmp_path: Path) -> None:
    """Callbacks for completed and ended are made once, with counts and the payload given; none for a failure."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=4)
        group = await _create(world, 5)
        assert (group.state, group.total) == (G.SEALED, 5)
        await _work_off(peer, 5)
        ended = await _until(world, group.id, G.COMPLETED)
        assert (ended.counts, ended.done, ended.progress) == ({TaskState.COMPLETED: 5}, 5, 1.0)
        called = await _called(world)
        assert called.keys() == {"all", "end"}
        told = called["all"].group
        assert (told.id, told.event, told.total, told.counts, told.failed) == (
            group.id,
            "completed",
            5,
            {TaskState.COMPLETED: 5},
            [],
        )
        assert ended.callbacks["completed"] == (await world.tasks.one(ADMIN, ended.callbacks["completed"])).id
        assert ended.callbacks["first_failure"] == ""
        # Looked at again, by whomever: nothing more is made.
        await world.steering.groups.keeper.tend(group.id)
        assert len(await _called(world)) == 2


async def test_the_first_failure_is_told_while_the_others_go_on(tmp_path: Path) -> None:
    """A member that failed for good is told at once, and once; the group ends failed after the last one."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=1)
        group = await _create(world, 4)
        done = await _work_off(peer, 1, failing=(0, 1))

        async def told() -> bool:
            return "first" in await _called(world)

        await world.until(told)
        assert (await _get(world, group.id)).state is G.SEALED
        await _work_off(peer, 4, (0, 1), done)
        ended = await _until(world, group.id, G.FAILED)
        assert ended.counts == {TaskState.COMPLETED: 2, TaskState.FAILED: 2}
        called = await _called(world)
        assert called.keys() == {"first", "end"}
        assert called["end"].group.failed == sorted(called["end"].group.failed)
        assert len(called["end"].group.failed) == 2
        assert called["first"].group.failed == [ended.first_failure]


async def test_an_open_group_waits_to_be_sealed(tmp_path: Path) -> None:
    """All members of an open group may have ended: it ends when it is sealed, an empty one too."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=4)
        group = await _create(world, 2, open=True)
        await _add(world, group.id, 1)
        await _work_off(peer, 3)
        await world.steering.groups.keeper.tend(group.id)
        assert (await _get(world, group.id)).state is G.OPEN
        await world.steering.groups.seal(ADMIN, group.id)
        assert (await _until(world, group.id, G.COMPLETED)).total == 3
        with pytest.raises(InvalidTransition):
            await _add(world, group.id, 1)
        empty = await _create(world, 0, on={})
        assert (await _until(world, empty.id, G.COMPLETED)).total == 0


async def test_a_member_adds_to_a_sealed_group_while_it_has_not_ended(tmp_path: Path) -> None:
    """What a running member adds counts; a stranger, and a member that has ended, add nothing."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=1)
        group = await _create(world, 1)
        (given,) = await peer.until_given()
        await _add(world, group.id, 1, by=given.task_id)
        stranger = await world.submit("nobody")
        for by in (stranger.id, None):
            with pytest.raises(InvalidTransition):
                await _add(world, group.id, 1, by=by)
        await peer.done(given)
        with pytest.raises(InvalidTransition):
            await _add(world, group.id, 1, by=given.task_id)
        await peer.done((await peer.until_given(2))[1])
        assert (await _until(world, group.id, G.COMPLETED)).total == 2


async def test_requests_with_a_key_are_done_once(tmp_path: Path) -> None:
    """Creating and adding again with the same key changes nothing; another request with the key is refused."""
    async with world_at(tmp_path) as world:
        group = await _create(world, 2, open=True, idempotency_key="g")
        assert (await _create(world, 2, open=True, idempotency_key="g")).id == group.id
        with pytest.raises(IdempotencyMismatch):
            await _create(world, 3, open=True, idempotency_key="g")
        first = await _add(world, group.id, 3, idempotency_key="a")
        await world.steering.groups.seal(ADMIN, group.id)
        again = await _add(world, group.id, 3, idempotency_key="a")
        assert (again.ids, again.total) == (first.ids, 5)
        with pytest.raises(IdempotencyMismatch):
            await _add(world, group.id, 2, idempotency_key="a")
        assert (await _get(world, group.id)).counts == {TaskState.QUEUED: 5}


async def test_a_request_is_accepted_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """What is wrong with members and callbacks is said with its place, and nothing is made."""
    async with world_at(tmp_path) as world:
        wrong: list[tuple[dict[str, Any], set[str]]] = [
            ({"tasks": [{"type": "echo"}, {"type": ""}]}, {"#/tasks/1/type"}),
            ({"tasks": [{"type": "echo", "idempotency_key": "k"}]}, {"#/tasks/0/idempotency_key"}),
            ({"tasks": [{"type": "echo", "unique": {"key": "k"}}]}, {"#/tasks/0/unique"}),
            ({"on": {"ended": {"type": "x", "priority": 200}}}, {"#/on/ended/priority"}),
            ({"on": {"ended": {"type": "x", "parent_id": "task_1"}}}, {"#/on/ended/parent_id"}),
        ]
        for fields, places in wrong:
            with pytest.raises(Invalid) as found:
                await _create(world, 1, **fields)
            assert {error.pointer for error in found.value.errors} == places
        assert (await world.steering.groups.list(ADMIN)).items == []
        assert await world.store.find("task", _all("echo")) == []


async def test_cancelling_ends_all_members(tmp_path: Path) -> None:
    """Waiting members are cancelled at once, a running one by its agent; then the group is cancelled and `ended` is told."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=1)
        group = await _create(world, 5)
        (given,) = await peer.until_given()
        asked = await world.steering.groups.cancel(ADMIN, group.id, "wrong input")
        assert (asked.state, asked.cancel_reason) == (G.CANCELLING, "wrong input")
        await world.steering.operations.once(0)
        assert peer.cancelled == [given.task_id]
        assert (await _get(world, group.id)).state is G.CANCELLING
        await peer.done(given, "cancelled")
        ended = await _until(world, group.id, G.CANCELLED)
        assert ended.counts == {TaskState.CANCELLED: 5}
        assert (await _called(world)).keys() == {"end"}
        with pytest.raises(InvalidTransition):
            await world.steering.groups.cancel(ADMIN, group.id)


async def test_a_failed_group_is_tried_again_in_place(tmp_path: Path) -> None:
    """New tasks take the places of those that failed; when they complete the group completes, and says so."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=4)
        group = await _create(world, 4)
        done = await _work_off(peer, 4, failing=(1, 2))
        failed = await _until(world, group.id, G.FAILED)
        with pytest.raises(InvalidTransition):
            await _add(world, group.id, 1)
        again = await world.steering.groups.retry(ADMIN, group.id)
        assert (again.state, again.round, again.total) == (G.SEALED, 1, 4)
        await world.steering.groups.keeper.tend(group.id)  # nothing has been tried again yet: the group must not end
        assert (await _get(world, group.id)).state is G.SEALED
        await world.steering.operations.once(0)
        await _work_off(peer, 6, known=done)
        ended = await _until(world, group.id, G.COMPLETED)
        assert ended.counts == {TaskState.COMPLETED: 4}
        rows = await world.store.find("task", _all("after"))
        told = [msgspec.json.decode(row.cold["payload"], type=CallbackPayload).group for row in rows]
        assert sorted((one.event, one.round) for one in told) == [
            ("completed", 1),
            ("ended", 0),
            ("ended", 1),
            ("first_failure", 0),
        ]
        old = await world.tasks.one(ADMIN, failed.first_failure)
        assert old.links.group_id is None
        assert (await world.tasks.one(ADMIN, old.retried_as)).links.group_id == group.id


async def test_an_end_nobody_noticed_is_found(tmp_path: Path) -> None:
    """The last member ended and the server died before it looked at the group: the next pass over the groups ends it."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        world.ledger.joined = lambda _: None
        group = await _create(world, 2)
        await _work_off(peer, 2)
        assert (await _get(world, group.id)).state is G.SEALED
        spoilt = Entity("group", "group_0", 0, {"active": 1}, b"\xff")  # looked at first, and keeps nobody waiting
        assert await world.store.commit([Change([spoilt])]) == [None]
        await world.steering.groups.keeper.once(0)
        assert (await _get(world, group.id)).state is G.COMPLETED
        assert (await _called(world)).keys() == {"all", "end"}


async def test_of_two_servers_one_ends_a_group(tmp_path: Path) -> None:
    """Both look at the end of the last member at once, and callers wait on the other server: one callback of each kind."""
    async with two_servers_at(tmp_path) as (one, two):
        peer = await two.agent(slots=2)
        group = await _create(one, 6)
        waiting = asyncio.create_task(one.steering.groups.wait(ADMIN, group.id, 30))
        await _work_off(peer, 6, failing=(3,))
        await asyncio.gather(*(world.steering.groups.keeper.tend(group.id) for world in (one, two) for _ in range(4)))
        async with asyncio.timeout(5):
            assert (await waiting).state is G.FAILED
        assert (await _called(one)).keys() == {"first", "end"}


async def test_members_added_on_two_servers_at_once_are_all_counted(tmp_path: Path) -> None:
    """Adding at the same time, to a group that is sealed meanwhile: what was accepted is a member, what was not is none."""
    async with two_servers_at(tmp_path) as (one, two):
        group = await _create(one, 0, open=True)
        adding = [_add(world, group.id, 2) for world in (one, two) * 8]
        found = await asyncio.gather(*adding, one.steering.groups.seal(ADMIN, group.id), return_exceptions=True)
        accepted = [each for each in found if isinstance(each, Added)]
        assert all(isinstance(each, (Added, GroupView, InvalidTransition)) for each in found)
        view = await _get(two, group.id)
        assert view.total == 2 * len(accepted) == sum((view.counts or {}).values())


async def test_groups_are_listed_and_forgotten(tmp_path: Path) -> None:
    """Lists are by state and name, newest first, of one's own tenant; what ended long ago goes, what is idle is sealed."""
    async with world_at(tmp_path) as world:
        groups = world.steering.groups
        done = await _create(world, 0, name="nightly", on={})
        await _until(world, done.id, G.COMPLETED)
        world.advance(1)
        idle = await _create(world, 0, name="nightly", open=True, on={})
        busy = await _create(world, 1, name="other", on={})
        assert {view.id for view in (await groups.list(ADMIN, name="nightly")).items} == {idle.id, done.id}
        assert [view.id for view in (await groups.list(ADMIN, state=G.SEALED)).items] == [busy.id]
        first = await groups.list(ADMIN, limit=2)
        rest = await groups.list(ADMIN, limit=2, cursor=first.next_cursor)
        assert [view.id for view in (*first.items, *rest.items)][-1] == done.id
        stranger = Actor(id="user_x", kind="user", tenant="other", roles=("administrator",))
        assert (await groups.list(stranger)).items == []
        with pytest.raises(NotFound):
            await groups.get(stranger, busy.id)
        world.advance(86_400)
        assert await groups.forget(world.clock.now() - 3_600_000) == 2
        with pytest.raises(NotFound):
            await groups.get(ADMIN, done.id)
        await groups.keeper.once(0)
        assert (await _get(world, idle.id)).state is G.COMPLETED
        assert (await _get(world, busy.id)).state is G.SEALED
