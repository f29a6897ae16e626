"""The clients against a real server with a real agent: every verb does what it says, blocking and awaited alike."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.model import StageState
from mcp_control.sdk import agents, artifacts, pipelines, runs, tasks
from mcp_control.sdk.agent import Agent, TransportName
from mcp_control.sdk.client import AsyncClient, Client
from mcp_control.sdk.context import Context, SyncContext
from mcp_control.sdk.errors import (
    AccessDenied,
    ApiProblem,
    InvalidRequest,
    Missing,
    Permanent,
    RunFailed,
    TaskFailed,
    WaitTimeout,
)
from mcp_control.sdk.profiles import Profiles
from mcp_control.sdk.submission import SubmitOptions, make_spec
from mcp_control.tasks.model import RetryPolicy, TaskState
from mcp_control.testing.server import RunningServer, running_server
from tests.sdk.peer import until


class Total(msgspec.Struct):
    total: int


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path / "server") as server:
        yield server


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, token=server.admin_token) as client:
        yield client


def make_agent(folder: Path, profiles: Profiles, transport: TransportName = "socket") -> Agent:
    agent = Agent("worker", slots=16, profiles=profiles, transport=transport, cancel_grace=0.2)

    @agent.task("sum")
    async def add(payload: list[int]) -> Total:
        """Add numbers."""
        return Total(sum(payload))

    @agent.task("fail")
    async def fail(payload: Any) -> None:
        raise ValueError("never mind")

    @agent.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    @agent.task("try")
    async def attempt(payload: Any) -> Any:
        if payload["said"]["kind"] == "fail":
            raise Permanent("told to fail")
        return payload

    @agent.task("wait")
    async def wait(payload: Any) -> None:
        await asyncio.Event().wait()

    @agent.task("steps")
    async def steps(payload: int, ctx: Context) -> str:
        for step in range(payload):
            await asyncio.sleep(0.01)
            ctx.log.info("step", n=step)
            ctx.progress(step / payload, f"step {step}")
        return "walked"

    @agent.task("copy")
    async def copy(payload: str, ctx: Context) -> str:
        source = await ctx.artifacts.local(payload, folder)
        made = await ctx.artifacts.upload(source, "copied", role="output", rows=1)
        return made.id

    @agent.task("copy-thread")
    def copy_thread(payload: str, ctx: SyncContext) -> str:
        return ctx.artifacts.upload(ctx.artifacts.read(payload), "copied").id

    return agent


@pytest.fixture
async def unstarted(server: RunningServer, tmp_path: Path) -> Agent:
    environ = {"MCP_CONTROL_ENROLMENT_TOKEN": await server.enrolment_token(), "MCP_CONTROL_URL": server.url}
    return make_agent(tmp_path, Profiles(tmp_path / "agent", environ))


@pytest.fixture
async def agent(unstarted: Agent) -> AsyncIterator[Agent]:
    await unstarted.start()
    yield unstarted
    await unstarted.stop()


async def test_a_task_gives_its_result(client: AsyncClient, agent: Agent) -> None:
    """Submit and wait, or both at once; the result is read as the type that is asked for."""
    task = await client.tasks.submit("sum", [1, 2], labels={"team": "a"}, priority="high")
    assert await task.result(timeout=20) == {"total": 3}
    assert await client.tasks.run("sum", [3, 4], result_type=Total) == Total(7)
    view = await client.tasks.get(task.id)
    assert (view.state, view.priority, view.labels) == (TaskState.COMPLETED, 70, {"team": "a"})
    assert (await client.tasks.explain(task.id)).code == "finished"


async def test_a_failed_task_brings_the_remote_traceback(client: AsyncClient, agent: Agent) -> None:
    """`result` raises TaskFailed with what happened on the agent."""
    with pytest.raises(TaskFailed, match=r"(?s)ValueError: never mind.*Traceback on the agent.*in fail") as caught:
        await client.tasks.run("fail", None, retries=0)
    assert caught.value.task.state is TaskState.FAILED
    again = await client.tasks.handle(caught.value.task.id).retry()
    assert (await again.get()).retry_of == caught.value.task.id


async def test_the_same_key_is_the_same_task(client: AsyncClient, agent: Agent) -> None:
    """Submitting again with an idempotency key returns the first task; with another payload it is refused."""
    first = await client.tasks.submit("sum", [1], key="doc-1")
    assert (await client.tasks.submit("sum", [1], key="doc-1")).id == first.id
    with pytest.raises(InvalidRequest) as caught:
        await client.tasks.submit("sum", [2], key="doc-1")
    assert caught.value.code == "idempotency-mismatch"


async def test_waiting_ends_after_its_time(client: AsyncClient, agent: Agent) -> None:
    """A wait that is over raises WaitTimeout and leaves the task alone; cancelling ends it."""
    task = await client.tasks.submit("wait")
    with pytest.raises(WaitTimeout):
        await task.result(timeout=0.05)
    await until(lambda: task.id in agent.held)
    await task.cancel("not needed")
    assert (await task.wait(timeout=20)).state is TaskState.CANCELLED


async def test_a_task_can_be_watched(client: AsyncClient, unstarted: Agent) -> None:
    """The stream tells states, progress to the last and log lines, ends with the final state, and works for ended tasks too."""
    task = await client.tasks.submit("steps", 3)
    updates = []
    async for update in task.stream():
        if not updates:
            await unstarted.start()
        updates.append(update)
    await unstarted.stop()
    assert (updates[0].state, updates[-1].state) == (TaskState.QUEUED, TaskState.COMPLETED)
    lines = [u.line.fields for u in updates if u.line is not None]
    assert lines == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [u.message for u in updates if u.kind == "progress"][-1:] == ["step 2"]
    late = [update async for update in task.stream()]
    assert [u.kind for u in late] == ["log", "log", "log", "state"]
    assert [line.message async for line in task.logs(follow=True)] == ["step"] * 3


async def test_submissions_at_the_same_time_share_requests(
    client: AsyncClient, agent: Agent, server: RunningServer
) -> None:
    """A hundred concurrent submissions are far fewer requests; each gets its own answer, the refused one its own problem."""
    calls = 0
    send = client.transport.send

    async def counting(call: Any) -> Any:
        nonlocal calls
        calls += 1
        return await send(call)

    client.transport.send = counting  # type: ignore[method-assign]  # counts, and passes on to the real one
    answers = await asyncio.gather(
        *(client.tasks.submit("sum", [n]) for n in range(100)),
        client.tasks.submit("sum", priority=1000),
        return_exceptions=True,
    )
    assert calls <= 3
    assert isinstance(answers[-1], InvalidRequest)
    handles = [answer for answer in answers[:-1] if isinstance(answer, tasks.AsyncTaskHandle)]
    assert [(await handle.result(20))["total"] for handle in handles] == list(range(100))


async def test_many_specs_are_answered_one_by_one(client: AsyncClient, agent: Agent) -> None:
    """`submit_many` gives a handle or a problem for each spec, in order."""
    good = make_spec("sum", [1], SubmitOptions())
    bad = make_spec("sum", [1], SubmitOptions(priority=-1))
    first, second, third = await client.tasks.submit_many([good, bad, make_spec("sum", [2], SubmitOptions())])
    assert isinstance(second, ApiProblem)
    assert isinstance(first, tasks.AsyncTaskHandle)
    assert isinstance(third, tasks.AsyncTaskHandle)
    assert await third.result(20) == {"total": 2}
    listed = {view.id async for view in client.tasks.iter(type="sum", limit=1)}
    assert listed == {first.id, third.id}


async def test_artifacts_go_through_handlers(client: AsyncClient, agent: Agent, tmp_path: Path) -> None:
    """Handlers read artifacts and store their own, which belong to their task; clients get the same bytes."""
    source = tmp_path / "data.bin"
    source.write_bytes(bytes(range(256)) * 9000)
    given = await client.artifacts.upload(source, role="input", rows=5)
    assert (given.name, given.size, given.rows) == ("data.bin", 256 * 9000, 5)
    for handler in ("copy", "copy-thread"):
        made = await client.artifacts.get(await client.tasks.run(handler, given.id))
        assert made.sha256 == given.sha256
        assert made.task_id
    target = await client.artifacts.download(given.id, tmp_path / "copy.bin")
    assert target.read_bytes() == source.read_bytes()
    await client.artifacts.delete(given.id)
    with pytest.raises(Missing):
        await client.artifacts.get(given.id)


async def test_events_resume_after_a_cursor(client: AsyncClient, agent: Agent) -> None:
    """Events of a subject come in order; after a cursor exactly the later ones come."""
    task = await client.tasks.submit("sum", [1])
    await task.wait(20)

    async def until_completed(after: str) -> list[Any]:
        found = []
        async for event in client.events(["task.*"], subject=task.id, after=after):
            found.append(event)
            if event.type == "task.completed":
                break
        return found

    all_events = await until_completed("evt_0")
    assert all_events[0].type == "task.queued"
    assert await until_completed(all_events[0].id) == all_events[1:]


def adding() -> PipelineBuilder:
    pipeline = PipelineBuilder("adding")
    kind = pipeline.param("kind", choices=["echo", "fail"])
    first = pipeline.stage("first", "echo", with_={"kind": kind})
    pipeline.stage("second", "try", needs=[first], with_={"said": first.output}, retry=RetryPolicy(max_attempts=1))
    return pipeline


async def test_a_pipeline_runs(client: AsyncClient, agent: Agent) -> None:
    """A definition from Python is accepted, its run is awaited, and outputs, tasks and a failed run are told."""
    applied = await client.pipelines.apply(adding())
    assert (applied.name, applied.version, applied.stages) == ("adding", 1, ["first", "second"])
    assert (await client.pipelines.apply(adding().build())).version == 1
    run = await client.pipelines.run("adding", {"kind": "echo"}, key="today")
    view = await run.result(timeout=30)
    assert [stage.state for stage in view.stages] == [StageState.COMPLETED] * 2
    assert await run.output("second") == {"said": {"kind": "echo"}}
    assert {task.stage async for task in run.tasks()} == {"first", "second"}
    assert (await client.pipelines.run("adding", {"kind": "echo"}, key="today")).id == run.id
    failing = await client.pipelines.run("adding", {"kind": "fail"})
    with pytest.raises(RunFailed) as caught:
        await failing.result(timeout=30)
    assert caught.value.run.id == failing.id
    assert {view.id async for view in client.runs.iter(pipeline="adding")} == {run.id, failing.id}


async def test_a_wrong_definition_is_refused(client: AsyncClient, tmp_path: Path) -> None:
    """Validation names what is wrong and keeps nothing; YAML comes as text or as a file."""
    text = adding_yaml(needs="[nowhere]")
    with pytest.raises(InvalidRequest) as caught:
        await client.pipelines.validate(text)
    assert caught.value.errors
    path = tmp_path / "adding.yaml"
    await asyncio.to_thread(path.write_text, adding_yaml(needs="[]"))
    assert (await client.pipelines.validate(path))["valid"] is True
    with pytest.raises(Missing):
        await client.pipelines.get("adding")
    with pytest.raises(InvalidRequest, match="malformed-yaml"):
        await client.pipelines.apply("a: [")


def adding_yaml(needs: str) -> str:
    return f"""
apiVersion: mcp-control/v1
kind: Pipeline
metadata: {{name: adding}}
spec:
  stages:
    - {{id: first, uses: echo, needs: {needs}, with: {{}}}}
"""


async def test_an_agent_that_polls_does_the_same_work(
    client: AsyncClient, server: RunningServer, tmp_path: Path
) -> None:
    """Over plain REST tasks are claimed, reported, logged and cancelled, and leaving hands back what is unfinished."""
    environ = {"MCP_CONTROL_ENROLMENT_TOKEN": await server.enrolment_token(), "MCP_CONTROL_URL": server.url}
    agent = make_agent(tmp_path, Profiles(tmp_path / "agent", environ), "poll")
    await agent.start()
    assert await client.tasks.run("sum", [1, 2], wait=20) == {"total": 3}
    steps = await client.tasks.submit("steps", 2)
    assert await steps.result(20) == "walked"
    assert len([line async for line in steps.logs()]) == 2
    cancelled, handed_back = await client.tasks.submit("wait"), await client.tasks.submit("wait")
    await until(lambda: {cancelled.id, handed_back.id} <= set(agent.held))
    await cancelled.cancel()
    assert (await cancelled.wait(20)).state is TaskState.CANCELLED
    await agent.stop()
    assert (await handed_back.get()).state is TaskState.QUEUED


async def test_problems_are_exceptions_with_codes(client: AsyncClient, server: RunningServer) -> None:
    """A problem document becomes an exception of its kind, with code, status and request id."""
    with pytest.raises(Missing) as caught:
        await client.tasks.get("task_none")
    assert (caught.value.code, caught.value.status) == ("not-found", 404)
    assert caught.value.request_id
    async with AsyncClient(server.url, token="mcpt_wrong") as stranger:
        with pytest.raises(AccessDenied) as denied:
            await stranger.tasks.list()
    assert denied.value.code == "invalid-token"


async def test_the_blocking_client_does_the_same(server: RunningServer, agent: Agent, tmp_path: Path) -> None:
    """`Client` gives the same answers from a plain thread."""

    def work() -> None:
        with Client(server.url, token=server.admin_token) as client:
            task = client.tasks.submit("steps", 2)
            updates = list(task.stream())
            assert updates[-1].state is TaskState.COMPLETED
            assert task.result() == "walked"
            assert [line.message for line in task.logs()] == ["step", "step"]
            assert client.tasks.run("sum", [1, 1], result_type=Total) == Total(2)
            made = client.artifacts.upload(b"abc" * 1000, "abc", role="report")
            assert client.artifacts.read(made.id) == b"abc" * 1000
            assert client.artifacts.download(made.id, tmp_path / "abc").read_bytes() == b"abc" * 1000
            handles = client.tasks.submit_many([make_spec("sum", [n], SubmitOptions()) for n in range(3)])
            assert [h.result(20)["total"] for h in handles if isinstance(h, tasks.TaskHandle)] == [0, 1, 2]
            assert client.agents.get("worker").name == "worker"
            assert client.agents.drain("worker", "tea").note == "tea"
            assert "worker" in {view.name for view in client.agents.iter()}
            first = next(client.events(subject=task.id, after="evt_0"))
            assert first.type == "task.queued"

    await asyncio.to_thread(work)


def _verbs(kind: type) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for name, member in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and name not in ("send", "event_lines"):
            yield name, [(p.name, p.default) for p in inspect.signature(member).parameters.values()]


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [
        (Client, AsyncClient),
        (tasks.Tasks, tasks.AsyncTasks),
        (tasks.TaskHandle, tasks.AsyncTaskHandle),
        (runs.Runs, runs.AsyncRuns),
        (runs.RunHandle, runs.AsyncRunHandle),
        (pipelines.Pipelines, pipelines.AsyncPipelines),
        (artifacts.Artifacts, artifacts.AsyncArtifacts),
        (artifacts.TaskArtifacts, artifacts.AsyncTaskArtifacts),
        (agents.Agents, agents.AsyncAgents),
    ],
)
def test_both_clients_have_the_same_verbs(blocking: type, awaited: type) -> None:
    """Every verb of one client is a verb of the other, with the same parameters and defaults."""
    assert dict(_verbs(blocking)) == dict(_verbs(awaited))
