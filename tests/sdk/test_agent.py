"""The agent runtime against a protocol peer: what handlers may rely on, and what the server may rely on."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest

from mcp_control.sdk.agent import Agent
from mcp_control.sdk.context import Context, SyncContext
from mcp_control.sdk.errors import Critical, Permanent, Temporary
from mcp_control.sdk.handlers import RESULT_LIMIT
from mcp_control.tasks.wire import Cancel
from tests.sdk import handlers_for_tests
from tests.sdk.conftest import Running
from tests.sdk.peer import Peer, until

MakeAgent = Callable[..., Agent]


class Words(msgspec.Struct):
    text: str
    times: int = 1


@dataclass
class Point:
    x: int
    y: int


class Named(TypedDict):
    name: str


async def test_a_result_reaches_the_server(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """What a handler returns is reported as the task's result, with the credential that was stored."""
    agent = make_agent()

    @agent.task("sum")
    async def add(payload: list[int]) -> int:
        return sum(payload)

    async with running(agent):
        done = await peer.run("sum", [1, 2, 3])
    assert (done.outcome, bytes(done.result)) == ("completed", b"6")
    assert peer.tokens == ["Bearer mcpa_stored"]
    assert await add([4, 5]) == 9


async def test_payloads_have_the_type_of_the_annotation(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """Structs, dataclasses, typed dicts and plain JSON arrive as such; results may be any of them."""
    agent = make_agent()

    @agent.task("struct")
    async def struct(payload: Words) -> Words:
        return Words(payload.text * payload.times)

    @agent.task("dataclass")
    def data(payload: Point) -> Point:
        return Point(payload.y, payload.x)

    @agent.task("typed-dict")
    async def typed(payload: Named) -> str:
        return payload["name"]

    @agent.task("any")
    async def anything(payload: Any) -> Any:
        return payload

    async with running(agent):
        assert bytes((await peer.run("struct", {"text": "ab", "times": 2})).result) == b'{"text":"abab","times":1}'
        assert bytes((await peer.run("dataclass", {"x": 1, "y": 2})).result) == b'{"x":2,"y":1}'
        assert bytes((await peer.run("typed-dict", {"name": "n"})).result) == b'"n"'
        assert bytes((await peer.run("any", [None, 1.5])).result) == b"[null,1.5]"


async def test_a_payload_of_the_wrong_type_fails_for_good(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A payload that does not fit the annotation is a permanent failure `invalid-payload`, on the loop and in threads."""
    agent = make_agent()

    @agent.task("loop")
    async def on_loop(payload: Words) -> None: ...

    @agent.task("thread")
    def in_thread(payload: Words) -> None: ...

    async with running(agent):
        for name in ("loop", "thread"):
            failure = (await peer.run(name, {"text": 7})).failure
            assert failure is not None
            assert (failure.error_class, failure.code) == ("permanent", "invalid-payload")
            assert "$.text" in failure.message


@pytest.mark.parametrize(
    ("error", "error_class", "code"),
    [
        (Temporary("later"), "temporary", "error"),
        (Permanent("never", code="bad-file"), "permanent", "bad-file"),
        (Critical("fire"), "critical", "error"),
        (KeyError("k"), "temporary", "KeyError"),
    ],
)
async def test_errors_say_how_the_attempt_failed(
    peer: Peer, make_agent: MakeAgent, running: Running, error: Exception, error_class: str, code: str
) -> None:
    """The exception chooses the error class; an unknown one is temporary and brings its traceback."""
    agent = make_agent()

    @agent.task("fail")
    async def fail(payload: Any) -> None:
        raise error

    async with running(agent):
        done = await peer.run("fail")
    assert done.outcome == "failed"
    assert done.failure is not None
    assert (done.failure.error_class, done.failure.code) == (error_class, code)
    assert ("Traceback" in done.failure.traceback) == isinstance(error, KeyError)


async def test_a_handlers_own_retries_end_a_temporary_failure(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """After `retries` further attempts a temporary failure is reported as permanent."""
    agent = make_agent()

    @agent.task("flaky", retries=1)
    async def flaky(payload: Any) -> None:
        raise Temporary("again")

    async with running(agent):
        classes = []
        for attempt in (1, 2):
            failure = (await peer.run("flaky", attempt=attempt)).failure
            assert failure is not None
            classes.append(failure.error_class)
    assert classes == ["temporary", "permanent"]


async def test_a_result_over_the_limit_fails_for_good(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A result that does not fit a frame is a permanent failure `result-too-large`; one at the limit passes."""
    agent = make_agent()

    @agent.task("big")
    async def big(payload: int) -> str:
        return "x" * payload

    async with running(agent):
        fits = await peer.run("big", RESULT_LIMIT - 2)
        over = await peer.run("big", RESULT_LIMIT - 1)
    assert fits.outcome == "completed"
    assert over.failure is not None
    assert (over.failure.error_class, over.failure.code) == ("permanent", "result-too-large")


async def test_an_attempt_over_its_time_fails_temporarily(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A coroutine over the task's timeout is cancelled and reported as a temporary failure with cause timeout."""
    agent = make_agent()

    @agent.task("slow")
    async def slow(payload: Any) -> None:
        await asyncio.Event().wait()

    async with running(agent):
        done = await peer.run("slow", timeout_ms=30)
    assert done.failure is not None
    assert (done.failure.error_class, done.failure.cause, done.failure.code) == ("temporary", "timeout", "timeout")


@pytest.mark.parametrize("executor", ["async", "thread", "process"])
async def test_progress_and_logs_are_live(peer: Peer, make_agent: MakeAgent, running: Running, executor: str) -> None:
    """Log lines with their fields, and progress, reach the server from coroutines, threads and processes."""
    agent = make_agent()
    agent.add(handlers_for_tests.talk)

    @agent.task("async.talk")
    async def on_loop(payload: dict[str, int], ctx: Context) -> str:
        ctx.log.info("counting", upto=payload["n"])
        async for _ in ctx.track(range(payload["n"])):
            await asyncio.sleep(0)
        return ctx.fence

    @agent.task("thread.talk")
    def in_thread(payload: dict[str, int], ctx: SyncContext) -> str:
        return handlers_for_tests.talk(payload, ctx)

    async with running(agent):
        name = {"async": "async.talk", "thread": "thread.talk", "process": "proc.talk"}[executor]
        assignment = peer.assignment(name, {"n": 3})
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.done)
    done = peer.done[assignment.task_id]
    assert bytes(done.result) == msgspec.json.encode(assignment.fence)
    (line,) = peer.logs[assignment.task_id]
    assert (line.level, line.message, line.fields) == ("info", "counting", {"upto": 3})


async def test_progress_arrives_while_the_attempt_runs(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """Progress is told before the attempt ends, and only the newest of what gathered."""
    agent = make_agent()
    go_on = asyncio.Event()

    @agent.task("steps")
    async def steps(payload: Any, ctx: Context) -> None:
        for step in range(10):
            ctx.progress(step / 10, f"step {step}")
        await go_on.wait()

    async with running(agent):
        assignment = peer.assignment("steps")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        assert peer.progress[assignment.task_id] == [(0.9, "step 9")]
        assert peer.started == [assignment.task_id]
        go_on.set()
        await until(lambda: assignment.task_id in peer.done)


async def test_a_cancelled_coroutine_that_watches_may_clean_up(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A coroutine with a context is told first; it ends `cancelled` by itself, within its grace."""
    agent = make_agent(cancel_grace=30.0)

    @agent.task("watching")
    async def watching(payload: Any, ctx: Context) -> None:
        ctx.progress(0.5)
        while True:
            ctx.check()
            await asyncio.sleep(0.001)

    async with running(agent):
        assignment = peer.assignment("watching")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        peer.cancel_by_beat = []
        peer.send(Cancel(task_ids=[assignment.task_id]))
        await until(lambda: assignment.task_id in peer.done, 5)
    assert peer.done[assignment.task_id].outcome == "cancelled"


async def test_a_cancelled_coroutine_that_does_not_watch_is_stopped(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A coroutine without a context is cancelled at once; one with a context after the grace."""
    agent = make_agent(cancel_grace=0.05)

    @agent.task("blind")
    async def blind(payload: Any) -> None:
        await asyncio.Event().wait()

    @agent.task("deaf")
    async def deaf(payload: Any, ctx: Context) -> None:
        await asyncio.Event().wait()

    async with running(agent):
        for name in ("blind", "deaf"):
            assignment = peer.assignment(name)
            peer.give(assignment)
            await until(lambda: assignment.task_id in peer.started)  # noqa: B023 - awaited in this turn
            peer.send(Cancel(task_ids=[assignment.task_id]))
            await until(lambda: assignment.task_id in peer.done)  # noqa: B023 - awaited in this turn
            assert peer.done[assignment.task_id].outcome == "cancelled"


async def test_a_thread_that_does_not_stop_is_abandoned(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """After the grace the task ends `cancelled`, people are told that a thread runs on, and its slot stays taken until it ends."""
    agent = make_agent(cancel_grace=0.05, lease_seconds=2.0)
    peer.lease_ms = 300
    release = threading.Event()

    @agent.task("thread")
    def deaf(payload: Any, ctx: SyncContext) -> None:
        release.wait(20)

    async with running(agent):
        assignment = peer.assignment("thread")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.started)
        peer.send(Cancel(task_ids=[assignment.task_id]))
        await until(lambda: assignment.task_id in peer.done)
        done = peer.done[assignment.task_id]
        assert done.outcome == "cancelled"
        assert done.failure is not None
        assert done.failure.code == "thread-abandoned"
        assert peer.logs[assignment.task_id][-1].level == "warning"
        beats = len(peer.beats)
        await until(lambda: len(peer.beats) > beats + 1)
        assert peer.beats[-1].beat.free_slots == 7
        release.set()
        await until(lambda: peer.beats[-1].beat.free_slots == 8)


async def test_processes_do_work_and_are_reused(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A process does one attempt after the other; its errors keep their class, and its questions are passed on."""
    agent = make_agent()
    agent.add(handlers_for_tests.double)
    agent.add(handlers_for_tests.refuse)
    agent.add(handlers_for_tests.ask)
    async with running(agent):
        first = msgspec.json.decode((await peer.run("proc.double", {"n": 4})).result)
        second = msgspec.json.decode((await peer.run("proc.double", {"n": 5})).result)
        failure = (await peer.run("proc.refuse", {})).failure
        asked = await peer.run("proc.ask", {})
    assert (asked.outcome, asked.ask and asked.ask.key) == ("asked", "go")
    assert (first["n"], second["n"]) == (8, 10)
    assert first["pid"] == second["pid"]
    assert failure is not None
    assert (failure.error_class, failure.code) == ("permanent", "no-such-thing")


async def test_a_process_that_dies_is_a_temporary_failure(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A crash of a worker process fails that attempt only; the next one gets a new process."""
    agent = make_agent(slots=1)
    agent.add(handlers_for_tests.die)
    agent.add(handlers_for_tests.double)
    async with running(agent):
        failure = (await peer.run("proc.die", {})).failure
        after = await peer.run("proc.double", {"n": 1})
    assert failure is not None
    assert (failure.error_class, failure.cause, failure.code) == ("temporary", "infra", "worker-died")
    assert "code 7" in failure.message
    assert after.outcome == "completed"


@pytest.mark.parametrize("type", ["proc.polite", "proc.stubborn"])
async def test_a_cancelled_process_ends(peer: Peer, make_agent: MakeAgent, running: Running, type: str) -> None:
    """A process is told to stop, and killed after the grace when it does not; others are not touched."""
    agent = make_agent(cancel_grace=0.2)
    agent.add(handlers_for_tests.polite)
    agent.add(handlers_for_tests.stubborn)
    async with running(agent):
        assignment = peer.assignment(type)
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        peer.cancel_by_beat = [assignment.task_id]
        peer.send(Cancel(task_ids=[assignment.task_id]))
        await until(lambda: assignment.task_id in peer.done)
    assert peer.done[assignment.task_id].outcome == "cancelled"


async def test_many_results_share_a_report(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """Sixty-four tasks of one frame that end in one turn are told in one report, without separate starts."""
    agent = make_agent(slots=64)

    @agent.task("noop")
    async def noop(payload: Any) -> None: ...

    async with running(agent):
        batch = [peer.assignment("noop") for _ in range(64)]
        peer.give(*batch)
        await until(lambda: len(peer.done) == 64)
    assert [len(r.done) for r in peer.reports] == [64]
    assert peer.started == []


async def test_a_task_type_without_handler_is_refused(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A task the agent cannot do comes back at once."""
    agent = make_agent()
    async with running(agent):
        failure = (await peer.run("unheard-of")).failure
    assert failure is not None
    assert failure.code == "unknown-type"
