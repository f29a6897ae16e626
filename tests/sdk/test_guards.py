"""Breakers of handlers: one for each peer in a process, told to the server, and a task that meets an open one is tried later."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mcp_control import Permanent, Unavailable
from mcp_control.kernel.breaker_rules import NAMES_MAX, BreakerStatus
from mcp_control.sdk.agent import Agent
from mcp_control.sdk.context import Context, SyncContext
from mcp_control.sdk.guards import Guarded, Guards
from tests.sdk import handlers_for_tests
from tests.sdk.conftest import Running
from tests.sdk.peer import Peer, until

MakeAgent = Callable[..., Agent]


def _told(peer: Peer) -> list[BreakerStatus]:
    """What the server knows: each report replaces the one before."""
    return next((beat.beat.breakers for beat in reversed(peer.beats) if beat.beat.breakers is not None), [])


async def test_an_open_breaker_puts_tasks_off_and_closes_by_itself(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """Two failures open it; then tasks are told `breaker-open` with when to come back; the first call after the pause closes it."""
    peer.beat_ms = 20
    agent = make_agent()
    well = False

    @agent.task("call", retries=0)
    async def call(payload: Any, ctx: Context) -> str:
        async with ctx.breaker("peer", failures=2, open_for=0.2):
            if not well:
                raise ConnectionError("refused")
            return "answer"

    async with running(agent):
        first, second = await peer.run("call"), await peer.run("call")
        third = await peer.run("call", attempt=7)
        assert [done.failure.code for done in (first, second) if done.failure] == ["ConnectionError"] * 2
        assert third.failure is not None
        assert (third.failure.code, third.failure.error_class) == ("breaker-open", "temporary")
        assert third.failure.retry_after is not None
        assert 0 < third.failure.retry_after <= 0.22
        await until(lambda: [(one.name, one.state, one.failures) for one in _told(peer)] == [("peer", "open", 2)])
        assert _told(peer)[0].error == "ConnectionError"
        well = True

        async def answered() -> bool:
            return (await peer.run("call")).outcome == "completed"

        async with asyncio.timeout(10):
            while not await answered():
                pass
        await until(lambda: [one.state for one in _told(peer)] == ["closed"])
        told = len([beat for beat in peer.beats if beat.beat.breakers is not None])
        beats = len(peer.beats)
        await until(lambda: len(peer.beats) >= beats + 3)
        assert len([beat for beat in peer.beats if beat.beat.breakers is not None]) == told, (
            "told when it changed, only"
        )
        peer.drop()
        await until(lambda: len(peer.hellos) == 2)
        await until(lambda: len([beat for beat in peer.beats if beat.beat.breakers is not None]) == told + 1)


async def test_an_attempt_that_takes_too_long_is_a_failure_of_the_peer_and_a_cancelled_one_is_not(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A peer that hangs shows by the time limit of the attempt."""
    agent = make_agent()
    entered = asyncio.Event()

    @agent.task("hang")
    async def hang(payload: Any, ctx: Context) -> None:
        async with ctx.breaker("peer", failures=1):
            entered.set()
            await asyncio.Event().wait()

    async with running(agent):
        assert agent._session is not None
        guards = agent._session.bench.guards
        assignment = peer.assignment("hang")
        peer.give(assignment)
        await entered.wait()
        agent._session.bench.stop([assignment.task_id], "cancel", grace=0.0)
        await until(lambda: assignment.task_id in peer.done)
        assert [one.state for one in guards.statuses()] == ["closed"]
        await peer.run("hang", timeout_ms=20)
        assert [one.state for one in guards.statuses()] == ["open"]


async def test_threads_share_the_breaker_of_their_process_and_may_fall_back(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A call in a thread goes through the breaker that coroutines use; with a fallback the task completes all the same."""
    agent = make_agent()

    @agent.task("thread")
    def thread(payload: Any, ctx: SyncContext) -> str:
        def ask() -> str:
            raise TimeoutError

        return ctx.breaker("peer", failures=1).call(ask, fallback=lambda: "instead")

    @agent.task("loop")
    async def loop(payload: Any, ctx: Context) -> str:
        async def ask() -> str:
            return "answer"

        return await ctx.breaker("peer", failures=1).call(ask, seconds=5)

    async with running(agent):
        assert bytes((await peer.run("loop")).result) == b'"answer"'
        assert bytes((await peer.run("thread")).result) == b'"instead"'
        assert bytes((await peer.run("thread")).result) == b'"instead"'
        refused = await peer.run("loop")
        assert refused.failure is not None
        assert refused.failure.code == "breaker-open"


async def test_breakers_of_worker_processes_are_seen(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A worker process keeps its own, and tells the agent when they open."""
    peer.beat_ms = 20
    agent = make_agent()
    agent.add(handlers_for_tests.call)
    async with running(agent):
        failed = await peer.run("proc.call")
        assert failed.failure is not None
        assert failed.failure.code == "ConnectionError"
        await until(lambda: [(one.name, one.state) for one in _told(peer)] == [("peer", "open")])
        refused = await peer.run("proc.call")
        assert refused.failure is not None
        assert (refused.failure.code, refused.failure.retry_after is not None) == ("breaker-open", True)


def test_the_handlers_word_on_its_input_is_an_answer_of_the_peer() -> None:
    """`Permanent` counts as an answer, `Unavailable` of another peer as nothing, and `counts` decides on all others."""
    guards = Guards()

    def block(counts: Callable[[Exception], bool] | None = None) -> Any:
        return Guarded(guards.get("peer", 2, 30.0), lambda: "", counts)

    def fail(error: Exception, counts: Callable[[Exception], bool] | None = None) -> None:
        with pytest.raises(type(error)), block(counts):
            raise error

    fail(OSError())
    fail(Permanent("no such thing"))
    fail(OSError())
    fail(Unavailable("another one", retry_after=3))
    fail(ValueError(), lambda error: isinstance(error, OSError))
    fail(OSError())
    assert guards.statuses()[0].failures == 1
    fail(ValueError())
    assert guards.statuses()[0].state == "open"
    with pytest.raises(Unavailable), block():
        pass


def test_an_agent_has_a_bounded_number_of_breakers() -> None:
    """A name made of something that never ends is refused, and so are numbers that make no sense."""
    guards = Guards()
    for number in range(NAMES_MAX):
        guards.get(f"peer {number}", 5, 30.0)
    with pytest.raises(ValueError, match="at most 20"):
        guards.get("one more", 5, 30.0)
    for name, failures, seconds in (("", 5, 30.0), ("x" * 65, 5, 30.0), ("peer 1", 0, 30.0), ("peer 1", 5, 0.0)):
        with pytest.raises(ValueError, match="breaker"):
            guards.get(name, failures, seconds)


def test_of_one_name_in_several_processes_the_worst_is_told() -> None:
    """Open before probing before closed; how often they opened is added up; what a process told ends with it."""
    guards = Guards()
    guards.get("peer", 5, 30.0)
    guards.heard("one", [BreakerStatus(name="peer", state="half_open", opened=2)])
    guards.heard("two", [BreakerStatus(name="peer", state="open", opened=3), BreakerStatus(name="mail")])
    assert [(one.name, one.state, one.opened) for one in guards.statuses()] == [
        ("mail", "closed", 0),
        ("peer", "open", 5),
    ]
    guards.forget("two")
    assert [(one.name, one.state, one.opened) for one in guards.statuses()] == [("peer", "half_open", 2)]
