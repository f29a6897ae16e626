"""The session of an agent when things go wrong: lost connections, lost leases, drains, and servers without WebSocket."""

import asyncio
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcp_control.sdk.agent import Agent
from mcp_control.sdk.context import Context
from mcp_control.sdk.profiles import Profiles
from mcp_control.sdk.runtime.links import LinkRefused
from mcp_control.sdk.runtime.session import LONGEST_DELAY, reconnect_delay
from mcp_control.tasks.wire import Order, Trouble
from tests.sdk import handlers_for_tests
from tests.sdk.conftest import Running
from tests.sdk.peer import Peer, until

MakeAgent = Callable[..., Agent]


async def test_work_goes_on_over_a_lost_connection(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """After a server restart the same instance resumes with its tasks, and their results count."""
    agent = make_agent()
    go_on = asyncio.Event()

    @agent.task("long")
    async def long(payload: Any) -> str:
        await go_on.wait()
        return "done"

    async with running(agent):
        assignment = peer.assignment("long")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.started)
        peer.drop(1012)
        await until(lambda: len(peer.hellos) == 2 and peer.connected)
        go_on.set()
        await until(lambda: assignment.task_id in peer.done)
    first, second = peer.hellos
    assert first.instance_id is None
    assert second.instance_id == "inst_1"
    assert second.beat.running == [assignment.task_id]
    assert bytes(peer.done[assignment.task_id].result) == b'"done"'


async def test_an_unacknowledged_result_is_told_again(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A result whose report was not acknowledged is sent again after a reconnect, and its task is not run again."""
    agent = make_agent()
    runs = 0

    @agent.task("once")
    async def once(payload: Any) -> int:
        nonlocal runs
        runs += 1
        return runs

    async with running(agent):
        peer.ack_reports = False
        assignment = peer.assignment("once")
        peer.give(assignment)
        await until(lambda: bool(peer.reports))
        peer.ack_reports = True
        peer.drop(1012)
        await until(lambda: len(peer.hellos) == 2 and peer.connected)
        peer.give(assignment)  # the server does not know of the result yet and hands the held task out again
        await until(lambda: assignment.task_id in peer.done)
    assert peer.hellos[1].beat.running == [assignment.task_id]
    assert runs == 1
    assert bytes(peer.done[assignment.task_id].result) == b"1"


async def test_work_of_a_session_that_is_over_is_stopped(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A task the server does not name as resumed belongs to somebody else: it is stopped and nothing is told of it."""
    agent = make_agent()
    stopped = asyncio.Event()

    @agent.task("long")
    async def long(payload: Any, ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with running(agent):
        assignment = peer.assignment("long")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.started)
        peer.forget_on_reconnect.add(assignment.task_id)
        peer.drop(1012)
        await asyncio.wait_for(stopped.wait(), 10)
        await until(lambda: len(peer.hellos) == 2 and peer.connected)
    assert assignment.task_id not in peer.done


@pytest.mark.parametrize("how", ["coroutine", "process"])
async def test_work_whose_lease_cannot_be_renewed_is_stopped(
    peer: Peer, make_agent: MakeAgent, running: Running, how: str
) -> None:
    """Without answers to heartbeats, work stops before the lease can have been given to others, and is handed back afterwards."""
    agent = make_agent(cancel_grace=60.0)
    stopped = asyncio.Event()

    @agent.task("coroutine")
    async def long(payload: Any, ctx: Context) -> None:
        ctx.progress(0.1)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    agent.add(handlers_for_tests.stubborn)
    async with running(agent):
        name = "coroutine" if how == "coroutine" else "proc.stubborn"
        assignment = peer.assignment(name)
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        peer.lease_ms = 400
        peer.drop(1012)  # the next welcome names the short lease
        await until(lambda: len(peer.hellos) == 2 and peer.connected)
        peer.answer_beats = False
        peer.refuse_upgrade = 503
        await until(lambda: len(agent.held) == 0, 10)
        peer.answer_beats, peer.refuse_upgrade = True, 0
        await until(lambda: assignment.task_id in peer.done)
    assert peer.done[assignment.task_id].outcome == "released"
    assert stopped.is_set() == (how == "coroutine")


async def test_a_task_that_is_gone_is_stopped(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """A task named `gone` in the answer to a heartbeat is stopped, and nothing is told of it."""
    peer.lease_ms = 300
    agent = make_agent()
    stopped = asyncio.Event()

    @agent.task("long")
    async def long(payload: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with running(agent):
        assignment = peer.assignment("long")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.started)
        peer.gone_by_beat = [assignment.task_id]
        await asyncio.wait_for(stopped.wait(), 10)
    assert assignment.task_id not in peer.done


async def test_a_superseded_instance_starts_anew(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """After close code 4409 the agent comes back as a new instance and without its old work."""
    agent = make_agent()

    @agent.task("long")
    async def long(payload: Any) -> None:
        await asyncio.Event().wait()

    async with running(agent):
        assignment = peer.assignment("long")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.started)
        peer.drop(4409)
        await until(lambda: len(peer.hellos) == 2 and peer.connected)
        assert peer.hellos[1].instance_id is None
        assert peer.hellos[1].beat.running == []


async def test_heartbeats_tell_figures_and_progress_of_the_loop(
    peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A heartbeat goes out at least every third of the lease, with resource figures and a tick that grows."""
    peer.lease_ms = 300
    async with running(make_agent()):
        await until(lambda: len(peer.beats) >= 3)
    ticks = [beat.beat.tick for beat in peer.beats]
    assert ticks == sorted(set(ticks))
    assert peer.beats[-1].beat.memory_mb > 1
    assert peer.beats[-1].beat.free_slots == 8


async def test_a_refused_report_holds_up_no_other(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """When the server does not understand a report, its results are sent one by one; the bad one fails, the others count."""
    agent = make_agent()

    @agent.task("value")
    async def value(payload: str) -> str:
        return payload

    async with running(agent):
        good, bad = peer.assignment("value", "good"), peer.assignment("value", "bad")
        peer.not_understood = b"bad"
        peer.give(good, bad)
        await until(lambda: len(peer.done) == 2)
    assert peer.done[good.task_id].outcome == "completed"
    failure = peer.done[bad.task_id].failure
    assert failure is not None
    assert (failure.error_class, failure.code) == ("permanent", "result-refused")


@pytest.mark.parametrize("beating", [True, False])
async def test_trouble_of_the_server_never_turns_a_result_into_a_failure(
    beating: bool, peer: Peer, make_agent: MakeAgent, running: Running
) -> None:
    """A frame that could not be handled for a passing reason says nothing against a report that is under way."""
    agent = make_agent()
    peer.beat_ms = 50 if beating else 10_000
    peer.answer_beats = peer.ack_reports = False

    @agent.task("value")
    async def value(payload: str) -> str:
        return payload

    async with running(agent):
        task = peer.assignment("value", "good")
        peer.give(task)
        await until(lambda: bool(peer.reports) and any(report.done for report in peer.reports))
        await until(lambda: bool(peer.beats) or not beating)
        peer.answer_beats = peer.ack_reports = True
        peer.send(Trouble(code="store-unavailable", detail="no primary"))
        peer.drop()
        await until(lambda: len(peer.done) == 1)
    assert peer.done[task.task_id].outcome == "completed"


async def test_without_websocket_the_agent_polls(peer: Peer, make_agent: MakeAgent, running: Running) -> None:
    """Where the upgrade is refused, the same work is done over REST: claim, report, heartbeat, leave."""
    peer.refuse_upgrade = 404
    peer.lease_ms = 600
    agent = make_agent()

    @agent.task("sum")
    async def add(payload: list[int]) -> int:
        return sum(payload)

    async with running(agent):
        assignment = peer.assignment("sum", [2, 3])
        peer.give_poll(assignment)
        await until(lambda: assignment.task_id in peer.done)
        await until(lambda: bool(peer.beats))
    assert bytes(peer.done[assignment.task_id].result) == b"5"
    assert peer.byes == ["leave"]


async def test_an_agent_enrols_once(peer: Peer, tmp_path: Path) -> None:
    """The one-time token buys a credential, which is stored readable by the user alone and used from then on."""
    environ = {"MCP_CONTROL_ENROLMENT_TOKEN": "mcpe_once", "MCP_CONTROL_URL": peer.url}
    for turn in range(2):
        profiles = Profiles(tmp_path, environ if turn == 0 else {"MCP_CONTROL_URL": peer.url})
        agent = Agent("worker", slots=3, profiles=profiles)
        await agent.start()
        await agent.stop()
    ((authorization, spec),) = peer.registered
    assert authorization == "Bearer mcpe_once"
    assert (spec["name"], spec["slots"]) == ("worker", 3)
    assert peer.tokens == ["Bearer mcpa_made"] * 2
    (stored,) = (tmp_path / "agents").iterdir()
    assert stored.stat().st_mode & 0o777 == 0o600


async def test_an_agent_without_any_credential_says_so(peer: Peer, tmp_path: Path) -> None:
    """With neither credential nor token, start fails with what to do."""
    agent = Agent("worker", url=peer.url, profiles=Profiles(tmp_path, {}))
    with pytest.raises(LinkRefused, match="MCP_CONTROL_ENROLMENT_TOKEN"):
        await agent.start()


@pytest.mark.parametrize(
    ("failures", "chance", "options", "seconds"),
    [
        (0, 1.0, {}, 0.1),
        (3, 0.5, {}, 0.4),
        (60, 1.0, {}, LONGEST_DELAY),
        (60, 1.0, {"max_delay": 0.5}, 0.5),
        (0, 1.0, {"close_code": 1013}, 1.0),
        (0, 0.0, {"retry_after": 7.0}, 7.0),
        (0, 1.0, {"retry_after": 7.0}, 10.5),
    ],
)
def test_reconnects_back_off(failures: int, chance: float, options: dict[str, Any], seconds: float) -> None:
    """Waits grow exponentially under full jitter, are longer for an overloaded server and never shorter than asked for."""
    assert reconnect_delay(failures, chance, **options) == pytest.approx(seconds)


PROGRAM = """
import asyncio
from mcp_control import Agent, Context

agent = Agent("worker", slots=4, drain_seconds=20.0, lease_seconds=5)

@agent.task("wait")
async def wait(payload: dict, ctx: Context) -> str:
    ctx.progress(0.5)
    await asyncio.sleep(payload["seconds"])
    return "finished"

agent.run()
"""


def _spawn(peer: Peer, tmp_path: Path) -> subprocess.Popen[bytes]:
    environ = {
        "MCP_CONTROL_URL": peer.url,
        "MCP_CONTROL_TOKEN": "mcpt_user",
        "MCP_CONTROL_CONFIG_DIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


async def test_a_welcome_alone_does_not_end_the_back_off(
    peer: Peer, make_agent: MakeAgent, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that welcomes and closes at once is left in peace for longer each time; after a report it took, waits begin anew."""
    monkeypatch.setattr("random.random", lambda: 1.0)  # the longest wait each time
    peer.close_after_welcome = 1011
    agent = make_agent()
    agent.task("short")(_short)
    async with running(agent):
        await until(lambda: len(peer.hellos) == 5)
        gaps = [later - earlier for earlier, later in itertools.pairwise(peer.hello_times)]
        assert all(gap >= wait for gap, wait in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=True))
        peer.close_after_welcome = 0
        await until(lambda: len(peer.hellos) == 6 and peer.connected)
        await peer.run("short")
        dropped_at = time.monotonic()
        peer.drop(1011)
        await until(lambda: len(peer.hellos) == 7)
    assert peer.hello_times[-1] - dropped_at < 1.6  # it would be 3.2 s


async def _short(payload: Any) -> None:
    pass


async def test_sigterm_lets_work_finish(peer: Peer, tmp_path: Path) -> None:
    """SIGTERM: nothing new is taken, what runs is finished and told, what comes late is handed back, and the exit code is 0."""
    process = _spawn(peer, tmp_path)
    try:
        await until(lambda: peer.connected)
        assignment, late = peer.assignment("wait", {"seconds": 0.5}), peer.assignment("wait", {"seconds": 0})
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        process.send_signal(signal.SIGTERM)
        await until(lambda: "drain" in peer.byes)
        peer.give(late)
        code = await asyncio.to_thread(process.wait, 20)
    finally:
        process.kill()
        output = process.communicate()[0]
    assert code == 0, output.decode()
    assert peer.done[assignment.task_id].outcome == "completed"
    assert peer.done[late.task_id].outcome == "released"
    assert peer.byes == ["drain", "leave"]


async def test_a_second_sigterm_ends_at_once(peer: Peer, tmp_path: Path) -> None:
    """The second SIGTERM hands unfinished work back and ends with status 1."""
    process = _spawn(peer, tmp_path)
    try:
        await until(lambda: peer.connected)
        assignment = peer.assignment("wait", {"seconds": 3600})
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        process.send_signal(signal.SIGTERM)
        await until(lambda: "drain" in peer.byes)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 20)
    finally:
        process.kill()
        output = process.communicate()[0]
    assert code == 1, output.decode()
    assert peer.done[assignment.task_id].outcome == "released"


async def test_a_retired_agent_finishes_and_ends(peer: Peer, make_agent: MakeAgent) -> None:
    """An order to retire drains the agent and ends it."""
    agent = make_agent()

    @agent.task("value")
    async def value(payload: int) -> int:
        return payload

    serving = asyncio.create_task(agent.serve())
    await until(lambda: peer.connected)
    assert (await peer.run("value", 1)).outcome == "completed"
    peer.send(Order(order="retire"))
    await asyncio.wait_for(serving, 10)
    assert peer.byes == ["drain", "leave"]


async def test_a_server_that_does_not_want_the_agent_ends_it(peer: Peer, make_agent: MakeAgent) -> None:
    """A refusal that trying again would not change is raised."""
    peer.greeting = Trouble(code="out-of-range", detail="slots: 1 to 10000")
    with pytest.raises(LinkRefused, match="out-of-range"):
        await make_agent().start()


def test_decorated_functions_stay_functions() -> None:
    """A handler can be called in a test like the function it was, with a context or without."""
    assert handlers_for_tests.double({"n": 3})["n"] == 6
    assert handlers_for_tests.double.name == "proc.double"
