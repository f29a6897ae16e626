"""Operations: one verb for all tasks that fulfil conditions."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.changes import Change
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import Invalid, InvalidTransition, SelectionTooLarge
from mcp_control.tasks.bulk import meant, narrowed
from mcp_control.tasks.model import FINAL_STATES, Failure, Origin, Request, Task, TaskSpec, TaskState
from mcp_control.tasks.operation_model import Operation, OperationRequest
from mcp_control.tasks.operation_records import new_operation, read_operation, write_operation
from mcp_control.tasks.selection import Selection, matches, selection_errors
from tests.tasks.test_transitions import NOW, a_task
from tests.tasks.world import ADMIN, Peer, World, two_servers_at, world_at

S = TaskState


def _wanted(**fields: Any) -> Selection:
    return msgspec.convert(fields, Selection)


async def _fail(peer: Peer, place: int, code: str = "broken", error_class: str = "permanent") -> str:
    assignment = (await peer.until_given(place + 1))[place]
    failure = Failure(error_class=error_class, code=code, message="it is broken")  # type: ignore[arg-type]
    await peer.done(assignment, "failed", failure=failure)
    return assignment.task_id


async def _done(world: World, **request: Any) -> Operation:
    operation = await world.steering.operations.start(ADMIN, msgspec.convert(request, OperationRequest))
    await world.steering.operations.once(0)
    return await world.steering.operations.get(ADMIN, operation.id)


# --- conditions ---------------------------------------------------------------------------------------------------


MOMENTS = st.integers(NOW - 10**9, NOW + 10**9).map(to_datetime)


def _task_at(**fields: Any) -> Task:
    created = fields.pop("created_at", NOW)
    return msgspec.structs.replace(a_task(**fields), created_at=created)


@given(
    st.sampled_from(TaskState),
    MOMENTS,
    MOMENTS,
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from("xyz"),
)
def test_every_condition_narrows(
    state: TaskState, created: datetime, bound: datetime, priority: int, least: int, label: str
) -> None:
    """A task fulfils conditions together when it fulfils each of them alone, and each one as it reads."""
    task = _task_at(state=state, created_at=round(created.timestamp() * 1000), priority=priority, labels={"a": "x"})
    single = {
        "created_after": to_datetime(task.created_at) > bound,
        "created_before": to_datetime(task.created_at) < bound,
        "priority_min": priority >= least,
        "priority_max": priority <= least,
        "labels": label == "x",
        "state": state in (S.QUEUED, S.FAILED),
    }
    given = {
        "created_after": bound,
        "created_before": bound,
        "priority_min": least,
        "priority_max": least,
        "labels": {"a": label},
        "state": [S.QUEUED, S.FAILED],
    }
    for name, expected in single.items():
        assert matches(Selection(**{name: given[name]}), task) is expected, name
    assert matches(Selection(**given), task) is all(single.values())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "verb", ["cancel", "pause", "resume", "reprioritize", "reassign", "retry", "replay", "discard"]
)
@pytest.mark.parametrize("state", sorted(TaskState))
def test_a_verb_is_for_states_it_can_do_something_with(verb: Any, state: TaskState) -> None:
    """What a verb is for is among the states that the conditions are narrowed to, and is final exactly for what tries again."""
    request = OperationRequest(verb=verb, where=Selection(), priority=10, agent="agent_1")
    for hold in (None, Request(at=NOW, by="u")):
        if meant(request, a_task(state, hold=hold)):
            assert state in narrowed(verb, Selection()).state
            assert (state in FINAL_STATES) is (verb in ("retry", "replay", "discard"))


def test_wrong_conditions_are_all_named() -> None:
    """Every wrong condition is told with its place."""
    wrong = Selection(
        type="\u202e",
        run="r",
        labels={"": "x"},
        created_after=to_datetime(NOW).replace(tzinfo=None),
        code="x" * 300,
    )
    places = {error.pointer for error in selection_errors("#/where", wrong)}
    assert places == {
        "#/where/type",
        "#/where/labels/",
        "#/where/created_after",
        "#/where/code",
    }


# --- operations ---------------------------------------------------------------------------------------------------


async def test_cancel_by_conditions_ends_what_matches_and_nothing_else(tmp_path: Path) -> None:
    """Waiting tasks end at once, the agent of a running one is told, others stay; the counts are exact over many batches."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("worker", "a")
        running = await world.submit("a", labels={"team": "x"})
        await peer.until_given(1)
        mine = [await world.submit("a", labels={"team": "x"}) for _ in range(450)]
        others = [await world.submit("a", labels={"team": "y"}), await world.submit("b")]
        where = {"type": "a", "labels": {"team": "x"}}
        preview = await world.steering.operations.preview(
            ADMIN, msgspec.convert({"verb": "cancel", "where": where}, OperationRequest)
        )
        assert (preview.matched, preview.more, len(preview.first)) == (451, False, 20)
        found = await _done(world, verb="cancel", where=where, expected_at_most=451, reason="wrong input")
        assert (found.state, found.matched, found.changed, found.refused) == ("completed", 451, 451, 0)
        assert peer.cancelled == [running.id]
        assert (await world.task(running.id)).cancel is not None
        for task in mine[::50]:
            after = await world.task(task.id)
            assert (after.state, after.message) == (S.CANCELLED, "wrong input")
        for task in others:
            assert (await world.task(task.id)).state is S.QUEUED
        again = await _done(world, verb="cancel", where=where)
        assert (again.state, again.matched) == ("completed", 0)


async def test_more_than_expected_is_refused_before_anything_happens(tmp_path: Path) -> None:
    """`expected_at_most` is the number that was shown: one task more, and nothing is done."""
    async with world_at(tmp_path) as world:
        tasks = [await world.submit() for _ in range(3)]
        with pytest.raises(SelectionTooLarge) as refused:
            await _done(world, verb="cancel", where={"type": "echo"}, expected_at_most=2)
        assert refused.value.data["expected_at_most"] == 2
        assert [(await world.task(task.id)).state for task in tasks] == [S.QUEUED] * 3
        for wrong in (
            {"verb": "cancel", "where": {}},
            {"verb": "cancel", "where": {"state": ["completed"]}},
            {"verb": "reprioritize", "where": {"type": "echo"}},
            {"verb": "reprioritize", "where": {"type": "echo"}, "priority": 101},
            {"verb": "reassign", "where": {"type": "echo"}},
            {"verb": "cancel", "where": {"type": "echo"}, "priority": 1},
        ):
            with pytest.raises(Invalid):
                await _done(world, **wrong)


async def test_pause_resume_reprioritize_and_reassign_by_conditions(tmp_path: Path) -> None:
    """Held back, nothing is given out; let go with other priorities and on one agent, it goes there, the higher first."""
    async with world_at(tmp_path) as world:
        low, high = await world.submit(labels={"n": "1"}), await world.submit(labels={"n": "2"})
        paused = await _done(world, verb="pause", where={"type": "echo"}, reason="wait")
        assert (paused.changed, await world.queue.depths()) == (2, [])
        peer = await world.agent("one")
        other = await world.agent("two")
        assert (await _done(world, verb="reprioritize", where={"labels": {"n": "2"}}, priority="high")).changed == 1
        moved = await _done(world, verb="reassign", where={"type": "echo"}, agent="one")
        assert (moved.changed, moved.refused) == (2, 0)
        assert (await _done(world, verb="resume", where={"type": "echo"})).changed == 2
        assert (await peer.until_given(1))[0].task_id == high.id
        assert other.given == {}
        assert (await world.task(low.id)).needs.agent == peer.actor.id
        nobody = await world.agent("three", "other")
        refused = await _done(world, verb="reassign", where={"state": ["queued"]}, agent="three")
        assert (refused.changed, refused.refused, refused.problems[0].code) == (0, 1, "unroutable")
        assert nobody.given == {}


async def test_an_operation_cut_off_anywhere_is_done_once_and_counted_once(tmp_path: Path) -> None:
    """The server dies between doing a batch and writing it down: whoever goes on does it again, and the counts are as if nothing was."""
    async with two_servers_at(tmp_path) as (one, two):
        for _ in range(5):
            await one.submit()
        peer = await one.agent()
        failed = [await _fail(peer, place) for place in range(5)]
        request = msgspec.convert({"verb": "replay", "where": {"code": "broken"}}, OperationRequest)
        operation = await one.steering.operations.start(ADMIN, request)
        await one.steering.operations._step(operation)
        chosen = await one.steering.operations.get(ADMIN, operation.id)
        assert (sorted(chosen.pending), chosen.changed) == (sorted(failed), 0)
        await one.steering.operations._apply(chosen)  # and dies before it is written down
        await two.steering.operations.once(0)
        ended = await two.steering.operations.get(ADMIN, operation.id)
        assert (ended.state, ended.matched, ended.changed, ended.refused) == ("completed", 5, 5, 0)
        again = {(await two.task(task_id)).retried_as for task_id in failed}
        assert len(again) == 5
        made = [fact.fact.subject for fact in two.facts if fact.fact.type == "task.queued"]
        assert len(made) == len(set(made)) == 10


async def test_a_cancelled_operation_does_no_more(tmp_path: Path) -> None:
    """What was done stays done; the rest is left alone; a complete one cannot be cancelled."""
    async with world_at(tmp_path) as world:
        task = await world.submit()
        request = msgspec.convert({"verb": "cancel", "where": {"type": "echo"}}, OperationRequest)
        operation = await world.steering.operations.start(ADMIN, request)
        stopped = await world.steering.operations.cancel(ADMIN, operation.id)
        assert stopped.state == "cancelled"
        await world.steering.operations.once(0)
        assert (await world.task(task.id)).state is S.QUEUED
        complete = await _done(world, verb="cancel", where={"type": "echo"})
        with pytest.raises(InvalidTransition):
            await world.steering.operations.cancel(ADMIN, complete.id)
        assert {one.id for one in (await world.steering.operations.list(ADMIN)).items} == {operation.id, complete.id}
        moment = round((datetime.now(UTC) + timedelta(days=400)).timestamp() * 1000)
        assert await world.steering.operations.forget(moment) == 2


def test_an_operation_is_read_as_it_was_written() -> None:
    """Conditions with times and states survive the store."""
    operation = Operation(
        id="op_1",
        version=0,
        verb="cancel",
        where=_wanted(state=["queued"], created_after="2026-01-01T00:00:00Z", labels={"a": "b"}),
        created_at=NOW,
        created_by="u",
        pending=["task_1"],
    )
    stored = msgspec.structs.replace(write_operation(operation), version=1)
    assert read_operation(stored) == msgspec.structs.replace(operation, version=1)


async def test_an_operation_leaves_alone_what_it_makes_itself(tmp_path: Path) -> None:
    """A task that an operation had tried again, and that failed again at once, is not tried again by that same operation."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        operation_id = world.ids.new("op")
        own = Origin(protocol="operation", request_id=operation_id, principal=ADMIN.id)
        for origin in (Origin(principal=ADMIN.id), own):
            await world.tasks.submit(ADMIN, [TaskSpec(type="echo")], origin)
        for place in (0, 1):
            await _fail(peer, place)
        request = OperationRequest(verb="retry", where=narrowed("retry", _wanted(type="echo")))
        begun = new_operation(operation_id, ADMIN, request, world.clock.now())
        assert await world.store.commit([Change([write_operation(begun)])]) == [None]
        await world.steering.operations.once(0)
        ended = await world.steering.operations.get(ADMIN, operation_id)
        assert (ended.state, ended.matched, ended.changed) == ("completed", 1, 1)
