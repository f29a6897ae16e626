"""Results that are kept for later runs with the same input."""

from pathlib import Path

import msgspec

from mcp_control.artifacts.service import Artifacts
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.model import Run, RunRequest, RunState, StageState
from mcp_control.pipelines.results import ResultRetention
from mcp_control.pipelines.retention import RunRetention
from mcp_control.storage.local.blobs import FolderBlobs
from tests.pipelines.world import ANNA, KEEP_MS, ORIGIN, World, agent_of, world


def _spec(stage_after: bool = False) -> PipelineSpec:
    p = PipelineBuilder("kept")
    number = p.param("number", "integer")
    first = p.stage("first", "work", with_={"number": number}, cache_seconds=60)
    if stage_after:
        p.stage(
            "each", "work", needs=[first], fan_out=first.field("list"), with_={"of": "${{ item }}"}, cache_seconds=60
        )
    return p.build()


async def _run(here: World, number: int = 1, *, no_cache: bool = False) -> Run:
    request = RunRequest(params={"number": msgspec.Raw(str(number).encode())}, no_cache=no_cache)
    run, _ = await here.engine.execute(ANNA, "kept", request, ORIGIN)
    await here.settled()
    return await here.run(run)


async def _first(here: World, spec: PipelineSpec, result: object = 7) -> Run:
    """Have a result computed and kept."""
    await here.engine.create(ANNA, spec)
    run = await _run(here)
    await here.finish(await here.tasks(run), result)
    await here.settled()
    return run


async def test_the_same_input_is_computed_once_until_the_time_is_over_or_the_code_is_another(tmp_path: Path) -> None:
    """A hit completes the stage at once and starts no task; other input, other code, `no_cache` and time make it computed."""
    async with world(tmp_path) as here:
        await _first(here, _spec())
        hit = await _run(here)
        assert (hit.state, hit.stages[0].cached) == (RunState.COMPLETED, 1)
        assert await here.engine.output(ANNA, hit.id, "first") == b"7"
        assert await here.tasks(hit) == []
        assert (await _run(here, 2)).state is RunState.RUNNING
        assert (await _run(here, no_cache=True)).state is RunState.RUNNING
        here.agent = agent_of("2")
        assert (await _run(here)).state is RunState.RUNNING
        here.agent = agent_of("1")
        here.clock.advance(61)
        assert (await _run(here)).state is RunState.RUNNING


async def test_a_retry_computes_anew_and_what_it_gives_takes_the_place_of_the_old(tmp_path: Path) -> None:
    """`no_cache` keeps the new result, too."""
    async with world(tmp_path) as here:
        await _first(here, _spec())
        anew = await _run(here, no_cache=True)
        await here.fail(await here.tasks(anew))
        await here.engine.retry(ANNA, anew.id)
        await here.finish(await here.tasks(anew), 8)
        await here.settled()
        hit = await _run(here)
        assert await here.engine.output(ANNA, hit.id, "first") == b"8"


async def test_items_take_results_and_keep_them_through_a_restart(tmp_path: Path) -> None:
    """Only new items are computed; the output has all of them in order, though the server forgot all in between."""
    async with world(tmp_path) as here:
        run = await _first(here, _spec(stage_after=True), {"list": [1, 2, 3]})
        one, _, three = await here.tasks(run)
        await here.finish([one, three], lambda task: f"item {task.links.item}")
        await here.settled()
        second = await _run(here)
        assert [stage.cached for stage in second.stages] == [1, 2]
        (left,) = await here.tasks(second)
        assert left.links.item == 1
        here.restart()
        await here.finish([left], "computed")
        ended = await here.run(second)
        assert ended.stages[1].state is StageState.COMPLETED
        assert await here.engine.output(ANNA, ended.id, "each") == b'["item 0","computed","item 2"]'


async def test_the_combining_task_takes_a_result_too_and_only_for_the_same_items(tmp_path: Path) -> None:
    """A fan-out all of whose results are kept ends at once, combined; with one item computed anew and otherwise, so is the combination."""
    p = PipelineBuilder("kept")
    p.param("number", "integer")
    p.stage("each", "work", fan_out="[1, 2]", combine="work", with_={"of": "${{ item }}"}, cache_seconds=60)
    p.stage("after", "work", needs=["each"], with_={"all": "${{ stages.each.output }}"})
    spec = p.build()
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, spec)
        run = await _run(here)
        await here.finish(await here.tasks(run), lambda task: f"item {task.links.item}")
        (combine,) = await here.tasks(run)
        assert combine.links.item == -1
        await here.finish([combine], "joined")
        await here.settled()
        second = await _run(here)
        assert (second.stages[0].state, second.stages[0].cached, second.stages[0].done) == (StageState.COMPLETED, 3, 3)
        assert await here.engine.output(ANNA, second.id, "each") == b'"joined"'
        (after,) = await here.tasks(second)
        assert after.links.stage == "after"
        here.clock.advance(61)
        third = await _run(here)
        first, _ = items = await here.tasks(third)
        await here.finish(items, lambda task: f"item {task.links.item}" if task is first else "other")
        await here.settled()
        (again,) = await here.tasks(third)
        assert again.links.item == -1
        assert (await here.run(third)).stages[0].cached == 0
        here.restart()
        await here.finish([again], "joined anew")
        assert await here.engine.output(ANNA, third.id, "each") == b'"joined anew"'


async def test_the_combining_task_takes_a_result_after_items_that_were_computed(tmp_path: Path) -> None:
    """Items computed anew that give what they gave before need no new combination; what follows starts with the last item."""
    p = PipelineBuilder("kept")
    p.param("number", "integer")
    p.stage("each", "work", fan_out="[1, 2]", combine="work", with_={"of": "${{ params.number }}"}, cache_seconds=60)
    async with world(tmp_path) as here:
        await here.engine.create(ANNA, p.build())
        run = await _run(here, 1)
        await here.finish(await here.tasks(run), "same")
        await here.finish(await here.tasks(run), "joined")
        await here.settled()
        other = await _run(here, 2)
        await here.finish(await here.tasks(other), "same")
        ended = await here.run(other)
        assert (ended.state, ended.stages[0].cached) == (RunState.COMPLETED, 1)
        assert await here.engine.output(ANNA, other.id, "each") == b'"joined"'
        here.restart()
        assert await here.engine.output(ANNA, other.id, "each") == b'"joined"'


async def test_a_run_stays_while_its_results_are_kept_or_were_used(tmp_path: Path) -> None:
    """Runs after it go; it goes when neither its results nor who used them need it."""
    async with world(tmp_path / "store") as here:
        artifacts = Artifacts(here.store, FolderBlobs(tmp_path / "blobs"), here.clock, here.ids, max_bytes=1 << 20)
        runs, results = RunRetention(here.store, artifacts, KEEP_MS), ResultRetention(here.store)
        await _first(here, _spec())
        here.clock.advance(59)
        hit = await _run(here)
        assert hit.final
        here.clock.advance(1.5)
        assert await results.once(here.clock.now()) == 1, "the result itself"
        assert await runs.once(here.clock.now()) == 1, "the one that used it"
        assert await runs.once(here.clock.now()) == 0, "the one that made it is held"
        here.clock.advance(1)
        assert await results.once(here.clock.now()) == 1, "the hold"
        assert await runs.once(here.clock.now()) == 1
