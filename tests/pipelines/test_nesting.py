"""Runs inside runs, on a real store: begun, counted, paused, cancelled, retried and healed with the run around them."""

from pathlib import Path

import pytest

from mcp_control.kernel.errors import InvalidPipeline
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import NESTED_MAX, Combine, FanOut, PipelineSpec
from mcp_control.pipelines.healing import RunHealer
from mcp_control.pipelines.model import Run, RunRequest, RunState
from tests.pipelines.world import ANNA, ORIGIN, World, world


def _inner(deadline: float | None = None) -> PipelineSpec:
    p = PipelineBuilder("inner", deadline_seconds=deadline)
    number = p.param("number", "integer")
    first = p.stage("first", "work", with_={"number": number})
    second = p.stage("second", "work", needs=[first], with_={"of": first.output})
    p.output("value", second.output)
    return p.build()


def _outer(**stage: object) -> PipelineSpec:
    p = PipelineBuilder("outer")
    whole = p.stage("whole", "pipeline:inner", with_={"number": 7}, **stage)  # type: ignore[arg-type]  # any of its arguments
    p.stage("after", "work", needs=[whole], with_={"got": whole.field("value")})
    return p.build()


async def _child(here: World, run: Run, stage: str = "whole", at: int = 0) -> Run:
    await here.settled()
    view = await here.engine.view(ANNA, await here.run(run))
    children = next(each.children for each in view.stages if each.name == stage)
    return await here.engine.run(ANNA, children[at])


async def _work(here: World, run: Run, result: object = 1) -> None:
    """Complete what is there to do in a run, once."""
    await here.finish(await here.tasks(run), result)
    await here.settled()


async def test_a_stage_is_a_run_of_another_pipeline_and_its_output_what_that_gives(tmp_path: Path) -> None:
    """Linked both ways, with parameters from `with`, and counted with the rest."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        run = await here.start(_outer())
        child = await _child(here, run)
        assert child.parent is not None
        assert (child.parent.run_id, child.parent.stage, child.parent.depth) == (run.id, "whole", 1)
        (task,) = await here.tasks(child)
        assert await here.payload(task) == {"number": 7}
        await _work(here, child)
        await _work(here, child, {"answer": 42})
        view = await here.engine.view(ANNA, await here.run(child))
        assert view.output is not None
        assert bytes(view.output) == b'{"value":{"answer":42}}'
        assert view.parent is not None
        assert view.parent.run_id == run.id
        (last,) = await here.tasks(run)
        assert await here.payload(last) == {"got": {"answer": 42}}
        await _work(here, run)
        assert (await here.run(run)).state is RunState.COMPLETED


async def test_pause_resume_and_cancel_reach_the_run_inside(tmp_path: Path) -> None:
    """What a person paused inside stays paused when the run around it goes on."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        run = await here.start(_outer())
        child = await _child(here, run)
        await here.engine.pause(ANNA, run.id)
        assert (await _child(here, run)).state is RunState.PAUSED
        await here.engine.resume(ANNA, run.id)
        assert (await _child(here, run)).state is RunState.RUNNING
        await here.engine.pause(ANNA, child.id, "mine")
        await here.engine.pause(ANNA, run.id)
        await here.engine.resume(ANNA, run.id)
        assert (await _child(here, run)).state is RunState.PAUSED
        await here.engine.resume(ANNA, child.id)
        await here.engine.cancel(ANNA, run.id)
        await here.settled()
        assert (await here.run(child)).state is RunState.CANCELLED
        assert (await here.run(run)).state is RunState.CANCELLED
        assert await here.tasks(child) == []


async def test_a_retry_of_the_outer_run_retries_the_inner_one_from_its_failure(tmp_path: Path) -> None:
    """What completed inside is kept; the inner run keeps its id."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        run = await here.start(_outer())
        child = await _child(here, run)
        await _work(here, child, {"kept": True})
        await here.fail(await here.tasks(child))
        await here.settled()
        failed = await here.run(run)
        assert (failed.state, failed.stages[0].reason) == (RunState.FAILED, "stage-failed")
        await here.engine.retry(ANNA, run.id)
        again = await _child(here, run)
        assert (again.id, again.state, again.round) == (child.id, RunState.RUNNING, 1)
        (task,) = await here.tasks(again)
        assert task.links.stage == "second"
        assert await here.payload(task) == {"of": {"kept": True}}
        await _work(here, again)
        await _work(here, run)
        assert (await here.run(run)).state is RunState.COMPLETED
        with pytest.raises(Exception, match="cannot retry"):
            await here.engine.retry(ANNA, run.id)


async def test_each_item_of_a_fan_out_may_be_a_run(tmp_path: Path) -> None:
    """Of bounded width, lenient, and combined in the order of the items."""
    fan_out = FanOut(over="[3, 1, 2]", width=2, at_least=2, combine=Combine(uses="work"))
    p = PipelineBuilder("outer")
    p.stage("whole", "pipeline:inner", with_={"number": "${{ item }}"}, fan_out=fan_out)
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        run = await here.start(p.build())
        await here.settled()
        view = await here.engine.view(ANNA, await here.run(run))
        assert len(view.stages[0].children) == 2
        first = await _child(here, run)
        await here.fail(await here.tasks(first))
        await here.settled()
        for at in (1, 2):
            child = await _child(here, run, at=at)
            await _work(here, child)
            await _work(here, child, f"of {at}")
        (combine,) = await here.tasks(run)
        payload = await here.payload(combine)
        assert isinstance(payload, dict)
        assert payload["items"] == [None, {"value": "of 1"}, {"value": "of 2"}]
        assert [(each["index"], each["state"]) for each in payload["failures"]] == [(0, "failed")]
        await _work(here, run)
        assert (await here.run(run)).state is RunState.COMPLETED


async def test_the_deadline_of_the_outer_stage_holds_inside(tmp_path: Path) -> None:
    """The inner run has the earlier of its own deadline and those around it."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner(deadline=1000))
        run = await here.start(_outer(deadline_seconds=10))
        child = await _child(here, run)
        assert child.deadline_at == (await here.run(run)).stages[0].deadline_at
        here.clock.advance(11)
        await RunHealer(here.store, here.engine).once(here.clock.now())
        await here.settled()
        assert (await here.run(child)).state in (RunState.FAILED, RunState.CANCELLED)
        ended = await here.run(run)
        assert (ended.state, ended.stages[0].reason) == (RunState.FAILED, "deadline-exceeded")


async def test_a_server_that_stops_in_between_loses_no_inner_run(tmp_path: Path) -> None:
    """One that was not begun is begun, and an end that was not told is told, by whoever heals."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        here.engine.moved = lambda _run, _plan: None  # as if the server stopped right after the commit
        run = await here.start(_outer())
        assert (await here.store.get("run", [(await here.engine.view(ANNA, run)).stages[0].children[0]])) == [None]
        here.restart()
        await RunHealer(here.store, here.engine).once(here.clock.now())
        child = await _child(here, run)
        await _work(here, child)
        here.engine.moved = lambda _run, _plan: None
        await here.finish(await here.tasks(child), "end")
        assert (await here.run(child)).state is RunState.COMPLETED
        here.restart()
        await RunHealer(here.store, here.engine).once(here.clock.now())
        await here.settled()
        (last,) = await here.tasks(run, "after")
        assert await here.payload(last) == {"got": "end"}


async def test_an_inner_run_that_cannot_begin_fails_its_stage(tmp_path: Path) -> None:
    """The reason is that of the refusal: here the pipeline was deleted meanwhile."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        pipeline, _ = await here.engine.create(ANNA, _outer())
        await here.catalogue.delete(ANNA, "inner")
        run = await here.engine.begin(ANNA, pipeline, RunRequest(), ORIGIN, here.ids.new("run"))
        await here.settled()
        ended = await here.run(run)
        assert (ended.state, ended.stages[0].reason) == (RunState.FAILED, "not-found")


async def test_what_cannot_be_included_is_refused_with_its_place(tmp_path: Path) -> None:
    """Unknown pipelines and parameters, missing ones, recursion, too many levels, and what has no meaning for a run."""
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, _inner())
        p = PipelineBuilder("outer")
        p.stage("unknown", "pipeline:nothing")
        p.stage("version", "pipeline:inner", version="9", with_={"number": 1})
        p.stage("params", "pipeline:inner", with_={"nubmer": 1})
        p.stage("itself", "pipeline:outer")
        p.stage("odd", "pipeline:inner", with_={"number": 1}, version="^1", timeout=5)
        p.output("value", "${{ stages.nobody.output }}")
        with pytest.raises(InvalidPipeline) as caught:
            await here.engine.create(ANNA, p.build())
        assert {(error.pointer, error.code) for error in caught.value.errors} >= {
            ("#/spec/stages/0/uses", "unknown-reference"),
            ("#/spec/stages/1/uses", "unknown-reference"),
            ("#/spec/stages/2/with/nubmer", "unknown-field"),
            ("#/spec/stages/2/with", "missing-field"),
            ("#/spec/stages/3/uses", "pipeline-recursion"),
            ("#/spec/stages/4/timeout", "invalid-value"),
            ("#/spec/stages/4/version", "invalid-value"),
            ("#/spec/outputs/value", "unknown-reference"),
        }
        before = "inner"
        for level in range(NESTED_MAX):
            p = PipelineBuilder(f"level{level}")
            p.stage("in", f"pipeline:{before}", with_={"number": 1} if before == "inner" else {})
            before = f"level{level}"
            await here.engine.create(ANNA, p.build())
        p = PipelineBuilder("too-deep")
        p.stage("in", f"pipeline:{before}")
        with pytest.raises(InvalidPipeline, match="runs inside runs"):
            await here.engine.create(ANNA, p.build())
        p = PipelineBuilder("inner")
        p.stage("in", "pipeline:level1")
        with pytest.raises(InvalidPipeline, match="inside itself: inner > level1 > level0 > inner"):
            await here.engine.create(ANNA, p.build())
