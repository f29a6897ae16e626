"""Undoing what a failed or cancelled run did, on the real store with the real task component."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import COMPENSATION, Compensate
from mcp_control.pipelines.model import Run, RunState
from mcp_control.tasks.model import RetryPolicy, Task
from tests.pipelines.world import ANNA, World, world


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def booking() -> PipelineSpec:
    p = PipelineBuilder("booking")
    city = p.param("city", default="Rome")
    flight = p.stage("flight", "book", with_={"city": city}, compensate="cancel.flight")
    room = p.stage(
        "room",
        "book",
        needs=[flight],
        compensate=Compensate(
            uses="cancel.room",
            with_={"room": "${{ output.room }}", "city": city},
            retry=RetryPolicy(max_attempts=7),
        ),
    )
    car = p.stage("car", "book", needs=[room], compensate="cancel.car")
    p.stage("pay", "pay", needs=[car])
    return p.build()


async def until_car(here: World) -> Run:
    run = await here.start(booking())
    for number in range(2):
        await here.finish(await here.tasks(run), {"room": number})
        here.clock.advance(1.0)
    return run


async def undoing(here: World, run: Run) -> Task:
    (task,) = await here.tasks(run)
    assert task.links.item == COMPENSATION
    return task


async def test_what_completed_is_undone_the_last_first(here: World) -> None:
    """The failed stage is not undone, the others are, one by one, each with its output; the run ends only after them."""
    run = await until_car(here)
    await here.fail(await here.tasks(run), "no car")
    room = await undoing(here, run)
    assert (room.type, room.retry.max_attempts) == ("cancel.room", 7)
    assert await here.payload(room) == {"room": 1, "city": "Rome"}
    assert (await here.run(run)).state is RunState.RUNNING
    here.restart()
    await here.finish([room])
    flight = await undoing(here, run)
    assert (flight.type, await here.payload(flight)) == ("cancel.flight", {"output": {"room": 0}})
    here.restart()
    await here.finish([flight])
    ended = await here.run(run)
    assert (ended.state, ended.reason) == (RunState.FAILED, "stage-failed")
    assert ended.summary["compensated"] == ["room", "flight"]
    view = await here.engine.view(ANNA, ended)
    assert [(each.stage, each.state.value) for each in view.compensations] == [
        ("room", "completed"),
        ("flight", "completed"),
    ]
    told = [kind for kind in here.told(run) if kind.startswith("compensation") or kind == "run.failed"]
    assert told == ["compensation.started", "compensation.completed"] * 2 + ["run.failed"]


async def test_a_compensation_that_fails_is_told_and_stops_no_other(here: World) -> None:
    """The run says by its reason, its summary and an event what was not undone."""
    run = await until_car(here)
    await here.engine.cancel(ANNA, run.id, "changed my mind")
    await here.settled()
    await here.fail([await undoing(here, run)], "hotel is closed")
    await here.finish([await undoing(here, run)])
    ended = await here.run(run)
    assert (ended.state, ended.reason) == (RunState.CANCELLED, "compensation-failed")
    assert "room" in ended.message
    assert "changed my mind" in ended.message
    assert (ended.summary["compensated"], ended.summary["not_compensated"]) == (["flight"], ["room"])
    assert ended.compensations[0].message == "hotel is closed"
    assert "compensation.failed" in here.told(run)


async def test_what_was_undone_is_done_again_by_a_retry(here: World) -> None:
    """A retry keeps no result that was taken back; a run that completes undoes nothing."""
    run = await until_car(here)
    await here.fail(await here.tasks(run))
    await here.finish([await undoing(here, run)])
    await here.finish([await undoing(here, run)])
    again = await here.engine.retry(ANNA, run.id)
    assert [stage.state.value for stage in again.stages] == ["running", "pending", "pending", "pending"]
    for _ in range(4):
        await here.finish(await here.tasks(run), {"room": 9})
    ended = await here.run(run)
    assert (ended.state, ended.compensations) == (RunState.COMPLETED, [])


async def test_the_healer_takes_up_a_compensation_nobody_heard_the_end_of(here: World) -> None:
    """A run that is undoing goes on though the end of a compensation was not followed."""
    run = await until_car(here)
    await here.fail(await here.tasks(run))
    room = await undoing(here, run)
    follower, here.settler.follower = here.settler.follower, None
    await here.finish([room])
    here.settler.follower = follower
    here.restart()
    assert (await here.tasks(run)) == []
    assert await here.healer.once(here.clock.now()) == 1
    assert (await undoing(here, run)).type == "cancel.flight"


async def test_an_output_that_cannot_be_read_fails_its_compensation_alone(here: World) -> None:
    """An expression that finds nothing in the output is a failed compensation; the others run."""
    run = await here.start(booking())
    await here.finish(await here.tasks(run), {})
    await here.finish(await here.tasks(run), {"no": "room"})
    await here.fail(await here.tasks(run))
    flight = await undoing(here, run)
    assert flight.type == "cancel.flight"
    await here.finish([flight])
    ended = await here.run(run)
    assert (ended.reason, ended.compensations[0].reason) == ("compensation-failed", "expression-error")
