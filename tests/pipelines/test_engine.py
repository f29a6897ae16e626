"""The engine on the real store, with the real task component."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.changes import Change, Key
from mcp_control.kernel.errors import IdempotencyMismatch, Invalid, InvalidPipeline, InvalidTransition, NotFound
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import Combine, FanOut, Gate, PipelineSpec
from mcp_control.pipelines.model import Run, RunRequest, RunState
from mcp_control.security.model import Actor
from mcp_control.tasks.model import Task, TaskState
from tests.pipelines.world import ANNA, ORIGIN, World, world


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def chain(length: int = 3) -> PipelineSpec:
    p = PipelineBuilder("chain")
    value = p.param("value", "integer", default=1)
    before = None
    for number in range(length):
        needs = [] if before is None else [before]
        before = p.stage(f"s{number}", "work", needs=needs, with_={"x": value if before is None else before.field("x")})
    return p.build()


def fan(**more: object) -> PipelineSpec:
    p = PipelineBuilder("fan")
    parts = p.param("parts", "array")
    each = p.stage(
        "each",
        "work",
        fan_out=FanOut(over=parts, combine=Combine(uses="join")),
        with_={"part": "${{ item }}", "at": "${{ index }}"},
    )
    p.stage("last", "work", needs=[each], with_={"all": each.output})
    return p.build()


def states(run: Run) -> list[str]:
    return [stage.state.value for stage in run.stages]


async def test_a_chain_runs_to_its_end_and_hands_outputs_on(here: World) -> None:
    """Each stage starts when the one before it completed, with its output, and the facts come in order."""
    run = await here.start(chain(), value=5)
    for number in range(3):
        (task,) = await here.tasks(run)
        assert (task.links.stage, task.origin.principal) == (f"s{number}", "user_anna")
        assert await here.payload(task) == {"x": 5 + number}
        await here.finish([task], {"x": 6 + number, "summary": {f"k{number}": 1}})
    ended = await here.run(run)
    assert (ended.state, states(ended)) == (RunState.COMPLETED, ["completed"] * 3)
    assert ended.summary == {"k0": 1, "k1": 1, "k2": 1}
    assert msgspec.json.decode(await here.engine.output(ANNA, run.id, "s2"))["x"] == 8
    steps = [kind for _ in range(3) for kind in ("stage.started", "stage.completed")]
    assert here.told(run) == ["run.created", "run.started", *steps, "run.completed"]


async def test_a_fan_out_combines_results_in_the_order_of_items(here: World) -> None:
    """Items may finish in any order and in any batches; the combine task sees all results in item order."""
    run = await here.start(fan(), parts=["a", "b", "c"])
    tasks = await here.tasks(run)
    assert [await here.payload(task) for task in tasks] == [{"part": p, "at": i} for i, p in enumerate("abc")]

    def result(task: Task) -> object:
        return {"n": task.links.item, "counts": {"rows_in": 10, "rejected": 1}}

    await here.finish([tasks[2]], result)
    middle = await here.run(run)
    assert (middle.stages[0].done, middle.stages[0].counts) == (1, {"rows_in": 10, "rejected": 1})
    await here.finish([tasks[1], tasks[0]], result)
    (combine,) = await here.tasks(run)
    assert (combine.type, combine.links.item) == ("join", -1)
    assert await here.payload(combine) == {"items": [result(task) for task in tasks]}
    await here.finish([combine], {"total": 3})
    (last,) = await here.tasks(run)
    assert await here.payload(last) == {"all": {"total": 3}}
    view = await here.engine.view(ANNA, await here.run(run))
    assert (view.stages[0].rows_in, view.stages[0].rejected, view.stages[0].total, view.progress) == (30, 3, 4, 0.5)


async def test_nothing_is_lost_by_a_restart_in_the_middle(here: World) -> None:
    """A server that knows nothing but the store goes on where the other one was: outputs and item results are read again."""
    run = await here.start(fan(), parts=[1, 2])
    first, second = await here.tasks(run)
    await here.finish([first], {"r": 1})
    here.restart()
    await here.finish([second], {"r": 2})
    here.restart()
    (combine,) = await here.tasks(run)
    assert await here.payload(combine) == {"items": [{"r": 1}, {"r": 2}]}
    await here.finish([combine], "joined")
    here.restart()
    (last,) = await here.tasks(run)
    assert await here.payload(last) == {"all": "joined"}
    await here.finish([last])
    assert (await here.run(run)).state is RunState.COMPLETED


@pytest.mark.parametrize(("size", "more", "within"), [(10, 0, True), (1000, 0, False), (10, 20, False)])
async def test_an_output_is_there_after_a_restart_wherever_it_is_kept(
    here: World, size: int, more: int, within: bool
) -> None:
    """A small one of a run of few stages lies in the run, others beside it; later stages and callers get it either way."""
    p = PipelineBuilder("kept")
    first = p.stage("first", "work")
    second = p.stage("second", "work", needs=[first])
    last = p.stage("last", "work", needs=[second], with_={"x": first.field("x")})
    for number in range(more):
        p.stage(f"more{number}", "work", needs=[last])
    run = await here.start(p.build())
    text = "x" * size
    await here.finish(await here.tasks(run), {"x": text})
    here.restart()
    await here.finish(await here.tasks(run), "second")
    (task,) = await here.tasks(run)
    assert await here.payload(task) == {"x": text}
    here.restart()
    assert msgspec.json.decode(await here.engine.output(ANNA, run.id, "first")) == {"x": text}
    assert bool((await here.run(run)).stages[0].output) is within


async def test_a_fan_out_over_nothing_completes_at_once(here: World) -> None:
    """Without items the combine task gets an empty list; without a combine task the output is one."""
    run = await here.start(fan(), parts=[])
    (combine,) = await here.tasks(run)
    assert await here.payload(combine) == {"items": []}
    p = PipelineBuilder("plain")
    each = p.stage("each", "work", fan_out="[]")
    p.stage("last", "work", needs=[each], with_={"all": each.output})
    (last,) = await here.tasks(await here.start(p.build()))
    assert await here.payload(last) == {"all": []}


async def test_a_gate_that_fails_ends_the_run_and_keeps_the_output(here: World) -> None:
    """The run ends failed with the gate's reason, later stages are skipped, the report stays readable."""
    p = PipelineBuilder("gated")
    score = p.stage("score", "work", gate=Gate(check="output.score >= 0.7", reason="quality-too-low"))
    p.stage("export", "work", needs=[score])
    run = await here.start(p.build())
    await here.finish(await here.tasks(run), {"score": 0.5})
    ended = await here.run(run)
    assert (ended.state, ended.reason, states(ended)) == (RunState.FAILED, "quality-too-low", ["failed", "skipped"])
    assert msgspec.json.decode(await here.engine.output(ANNA, run.id, "score")) == {"score": 0.5}
    assert here.told(run)[-3:] == ["stage.failed", "stage.skipped", "run.failed"]


async def test_a_failure_cancels_the_rest_and_a_retry_keeps_what_is_there(here: World) -> None:
    """One failed item fails the run once the others are stopped; the retry runs only the missing items and combines old and new results."""
    run = await here.start(fan(), parts=["a", "b", "c"])
    a, b, _ = await here.tasks(run)
    await here.finish([a], {"r": "a"})
    await here.fail([b], "no luck")
    await here.settled()
    failed = await here.run(run)
    assert (failed.state, failed.reason, states(failed)) == (RunState.FAILED, "stage-failed", ["failed", "skipped"])
    assert "no luck" in failed.message
    assert not await here.tasks(run)
    with pytest.raises(NotFound):
        await here.engine.output(ANNA, run.id, "each")

    again = await here.engine.retry(ANNA, run.id)
    assert (again.state, again.round, again.stages[0].done) == (RunState.RUNNING, 1, 1)
    tasks = await here.tasks(run)
    assert [(task.links.item, task.links.round) for task in tasks] == [(1, 1), (2, 1)]
    here.restart()
    await here.finish(tasks, lambda task: {"r": "abc"[task.links.item or 0]})
    (combine,) = await here.tasks(run)
    assert await here.payload(combine) == {"items": [{"r": "a"}, {"r": "b"}, {"r": "c"}]}
    await here.finish([combine], {"ok": True})
    await here.finish(await here.tasks(run))
    assert (await here.run(run)).state is RunState.COMPLETED


async def test_a_retry_from_an_earlier_stage_runs_all_after_it_anew(here: World) -> None:
    """Earlier results are kept; the named stage and all after it get new tasks."""
    run = await here.start(chain(3))
    await here.finish(await here.tasks(run), {"x": 10})
    await here.finish(await here.tasks(run), {"x": 20})
    await here.fail(await here.tasks(run))
    again = await here.engine.retry(ANNA, run.id, "s1")
    assert states(again) == ["completed", "running", "pending"]
    (task,) = await here.tasks(run)
    assert await here.payload(task) == {"x": 10}
    await here.finish([task], {"x": 21})
    (task,) = await here.tasks(run)
    assert await here.payload(task) == {"x": 21}
    await here.finish([task], {"x": 22})
    assert (await here.run(run)).state is RunState.COMPLETED
    with pytest.raises(InvalidTransition):
        await here.engine.retry(ANNA, run.id)


async def test_a_paused_run_finishes_what_runs_and_starts_nothing(here: World) -> None:
    """While paused running tasks end and count, the next stage is ready; resume starts it."""
    run = await here.start(chain(2))
    paused = await here.engine.pause(ANNA, run.id, "maintenance")
    assert (paused.state, paused.pause and paused.pause.reason) == (RunState.PAUSED, "maintenance")
    await here.finish(await here.tasks(run), {"x": 1})
    assert states(await here.run(run)) == ["completed", "ready"]
    assert not await here.tasks(run)
    resumed = await here.engine.resume(ANNA, run.id)
    assert (resumed.state, states(resumed)) == (RunState.RUNNING, ["completed", "running"])
    assert len(await here.tasks(run)) == 1


async def test_cancel_ends_tasks_and_run(here: World) -> None:
    """Waiting tasks are cancelled, stages and run end cancelled, and a second cancel is refused with the state."""
    run = await here.start(fan(), parts=[1, 2, 3])
    await here.engine.cancel(ANNA, run.id, "wrong input")
    await here.settled()
    ended = await here.run(run)
    assert (ended.state, states(ended)) == (RunState.CANCELLED, ["cancelled", "cancelled"])
    assert len(await here.tasks(run, states=[TaskState.CANCELLED])) == 3
    with pytest.raises(InvalidTransition) as refused:
        await here.engine.cancel(ANNA, run.id)
    assert refused.value.data == {"state": "cancelled", "allowed": ["rerun_rejected", "retry"]}


async def test_an_expression_that_cannot_be_evaluated_fails_its_stage(here: World) -> None:
    """The reason is `expression-error` and the message says what is not there."""
    run = await here.start(chain(2))
    await here.finish(await here.tasks(run), {"y": 1})
    ended = await here.run(run)
    assert (ended.state, ended.reason, states(ended)) == (RunState.FAILED, "expression-error", ["completed", "failed"])
    assert "there is no `x`" in ended.stages[1].message


async def test_the_deadline_ends_a_run(here: World) -> None:
    """A run that has not ended in time ends failed with `deadline-exceeded`, its tasks cancelled."""
    spec = chain(2)
    late = msgspec.structs.replace(spec, spec=msgspec.structs.replace(spec.spec, deadline_seconds=60))
    run = await here.start(late)
    assert await here.healer.once(here.clock.now()) == 0
    here.clock.advance(61)
    assert await here.healer.once(here.clock.now()) == 1
    await here.settled()
    ended = await here.run(run)
    assert (ended.state, ended.reason, states(ended)) == (
        RunState.FAILED,
        "deadline-exceeded",
        ["cancelled", "skipped"],
    )


async def test_healing_follows_tasks_whose_end_the_run_never_heard_of(here: World) -> None:
    """Where a task ended without its run being told, the next pass of the janitor moves the run on (promise G7)."""
    run = await here.start(chain(2))
    here.settler.follower = None
    await here.finish(await here.tasks(run), {"x": 7})
    here.restart()
    assert states(await here.run(run)) == ["running", "pending"]
    assert await here.healer.once(here.clock.now()) == 1
    (task,) = await here.tasks(run)
    assert await here.payload(task) == {"x": 7}
    assert await here.healer.once(here.clock.now()) == 0


async def test_definitions_are_versioned(here: World) -> None:
    """A changed definition is a new version, an equal one is the one that is there, and runs stay on theirs."""
    first, created = await here.engine.create(ANNA, chain(2))
    assert (first.number, created) == (1, True)
    same, created = await here.engine.create(ANNA, chain(2))
    assert (same.id, created) == (first.id, False)
    second, created = await here.engine.create(ANNA, chain(3))
    assert (second.number, created) == (2, True)
    assert (await here.engine.get(ANNA, "chain")).id == second.id
    assert (await here.engine.get(ANNA, "chain", 1)).id == first.id
    assert (await here.engine.get(ANNA, second.id, 1)).id == first.id
    assert (await here.engine.get(ANNA, first.id)).number == 1
    run, _ = await here.engine.execute(ANNA, "chain", RunRequest(version=1), ORIGIN)
    assert (run.pipeline_number, len(run.stages)) == (1, 2)
    await here.engine.create(ANNA, fan())
    page = await here.engine.list(ANNA, limit=1)
    rest = await here.engine.list(ANNA, limit=1, cursor=page.next_cursor)
    assert [(p.name, p.version) for p in (*page.items, *rest.items)] == [("chain", 2), ("fan", 1)]
    assert rest.next_cursor is None


async def test_an_idempotency_key_starts_one_run(here: World) -> None:
    """The same key and request give the same run; another request under the key is refused."""
    await here.engine.create(ANNA, chain(1))
    request = RunRequest(idempotency_key="k1", labels={"a": "b"})
    run, created = await here.engine.execute(ANNA, "chain", request, ORIGIN)
    again, created_again = await here.engine.execute(ANNA, "chain", request, ORIGIN)
    assert (again.id, created, created_again) == (run.id, True, False)
    with pytest.raises(IdempotencyMismatch):
        await here.engine.execute(ANNA, "chain", RunRequest(idempotency_key="k1"), ORIGIN)


async def test_parameters_are_checked_all_at_once(here: World) -> None:
    """Missing, unknown and wrongly typed parameters are named together, each with its pointer."""
    p = PipelineBuilder("picky")
    p.param("need", "integer")
    p.param("pick", choices=["a", "b"])
    p.stage("s", "work")
    await here.engine.create(ANNA, p.build())
    given = {"pick": msgspec.Raw(b'"c"'), "more": msgspec.Raw(b"1")}
    with pytest.raises(Invalid) as refused:
        await here.engine.execute(ANNA, "picky", RunRequest(params=given), ORIGIN)
    found = {error.pointer: error.code for error in refused.value.errors}
    assert found == {
        "#/params/need": "missing-field",
        "#/params/pick": "out-of-range",
        "#/params/more": "unknown-field",
    }


async def test_another_tenant_sees_nothing(here: World) -> None:
    """Runs and definitions of another tenant read as absent."""
    run = await here.start(chain(1))
    other = Actor(id="user_bob", kind="user", tenant="other", roles=("administrator",))
    for read in (
        here.engine.run(other, run.id),
        here.engine.get(other, "chain"),
        here.engine.output(other, run.id, "s0"),
    ):
        with pytest.raises(NotFound):
            await read
    assert (await here.engine.runs(other)).items == []
    assert (await here.engine.list(other)).items == []


async def test_runs_are_listed_by_state_and_pipeline_in_pages(here: World) -> None:
    """Newest first; pages follow one another without gap or repetition."""
    runs = [await here.start(chain(1)) for _ in range(3)]
    await here.finish(await here.tasks(runs[1]))
    page = await here.engine.runs(ANNA, pipeline="chain", limit=2)
    rest = await here.engine.runs(ANNA, pipeline="chain", limit=2, cursor=page.next_cursor)
    assert sorted(view.id for view in (*page.items, *rest.items)) == sorted(run.id for run in runs)
    assert [view.id for view in (await here.engine.runs(ANNA, state=RunState.COMPLETED)).items] == [runs[1].id]


async def test_waiting_ends_with_the_run(here: World) -> None:
    """A caller that waits for a run gets it as soon as it has ended."""
    run = await here.start(chain(1))
    waiting = asyncio.create_task(here.engine.wait(ANNA, run.id, 30))
    await asyncio.sleep(0)
    await here.finish(await here.tasks(run))
    assert (await waiting).state is RunState.COMPLETED


async def test_a_bad_definition_is_refused_and_a_lonely_one_warned_of(here: World) -> None:
    """Creating runs the validation; task types nobody offers are warnings."""
    p = PipelineBuilder("lonely")
    p.stage("a", "nobody.does.this")
    assert await here.engine.check(ANNA, p.build()) == ["stage `a`: no registered agent offers `nobody.does.this`"]
    p.stage("a", "work")
    with pytest.raises(InvalidPipeline):
        await here.engine.create(ANNA, p.build())


async def test_one_stage_at_a_time_goes_by_priority(here: World) -> None:
    """With `max_running` of 1 stages run one after the other, the more urgent first."""
    p = PipelineBuilder("narrow", max_running=1)
    p.stage("low", "work", priority=10)
    p.stage("high", "work", priority=90)
    run = await here.start(p.build())
    assert states(await here.run(run)) == ["ready", "running"]
    await here.finish(await here.tasks(run))
    assert [task.links.stage for task in await here.tasks(run)] == ["low"]


async def test_reports_and_verbs_at_the_same_time_lose_nothing(here: World) -> None:
    """While twenty items end one by one, the run is paused and resumed again and again: every item counts once and the run completes."""
    run = await here.start(fan(), parts=list(range(20)))
    tasks = await here.tasks(run)

    async def disturb() -> None:
        for _ in range(5):
            await here.engine.pause(ANNA, run.id)
            await here.engine.resume(ANNA, run.id)

    await asyncio.gather(disturb(), *(here.finish([task], lambda task: task.links.item) for task in tasks))
    (combine,) = await here.tasks(run)
    assert await here.payload(combine) == {"items": list(range(20))}
    await here.finish([combine])
    await here.finish(await here.tasks(run))
    ended = await here.run(run)
    assert (ended.state, ended.stages[0].done) == (RunState.COMPLETED, 21)


async def test_progress_is_told_at_most_four_times_a_second(here: World) -> None:
    """Many items in one moment are one `stage.progressed`; the view is exact all the time."""
    run = await here.start(fan(), parts=list(range(12)))
    for number, task in enumerate((await here.tasks(run))[:10]):
        await here.finish([task])
        here.clock.advance(0.05)
        assert (await here.run(run)).stages[0].done == number + 1
    assert here.told(run).count("stage.progressed") == 2


async def test_a_run_that_cannot_be_decided_on_ends_instead_of_blocking(here: World) -> None:
    """Where stored outputs are gone, the task's end is still accepted and the run ends failed with `engine-error`."""
    run = await here.start(fan(), parts=[1, 2])
    first, second = await here.tasks(run)
    await here.finish([first], "r")
    await here.store.commit([Change((), [Key("task", first.id)])])
    here.restart()
    await here.finish([second], "r")
    ended = await here.run(run)
    assert (ended.state, ended.reason) == (RunState.FAILED, "engine-error")
