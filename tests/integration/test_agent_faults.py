"""Agents that die, freeze, lose their connection or are asked to leave (reliability, faults 8, 9 and 11)."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import RunningServer, running_server
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    check_history,
    enrolment,
    in_state,
    journal,
    read_store,
    say,
    submit,
    task,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")

LEASE = 3.0
# The server's grace beyond a lease, the sweep, the hand-out, and room for a machine that is busy with other tests.
GRACE = 5.0 + 1.0 + 4.0


class World:
    """A server in this process, agents as processes of their own."""

    def __init__(self, folder: Path, server: RunningServer, client: httpx2.AsyncClient, token: str) -> None:
        self.folder = folder
        self.server = server
        self.client = client
        self.token = token
        self.agents: list[AgentProcess] = []
        self.journal = folder / "journal"
        self.go = folder / "go"

    async def agent(self, name: str, **options: object) -> AgentProcess:
        """Start an agent and wait until it is there."""
        agent = AgentProcess(self.folder, name, self.server.url, self.token, **{"lease": LEASE, **options}).start()
        self.agents.append(agent)
        await agents_online(self.client, [name])
        return agent

    async def held(self, **more: object) -> str:
        """Submit a task that lasts until `go` is there."""
        return await submit(self.client, "it.hold", {"until": str(self.go), "journal": str(self.journal)}, **more)


@asynccontextmanager
async def world(folder: Path, **settings: object) -> AsyncIterator[World]:
    """Run a server; agents that were started are gone at the end."""
    async with (
        running_server(folder / "server", **{"leases__drift_seconds": 1.0, **settings}) as server,
        admin(server) as client,
    ):
        made = World(folder, server, client, await enrolment(client))
        try:
            yield made
            assert await violations(client) == {}
        finally:
            for agent in made.agents:
                with suppress(ProcessLookupError):
                    agent.send(signal.SIGCONT)
                agent.kill()


def _outcomes(found: dict[str, Any]) -> list[str]:
    return [attempt["outcome"] for attempt in found["attempts"]]


@pytest.mark.parametrize("transport", ["socket", "poll"])
async def test_the_work_of_a_killed_agent_moves_on_within_its_lease(transport: str, tmp_path: Path) -> None:
    """kill -9: no later than lease and grace somebody else has the task, and it ends once; losing an agent is no failure of the task."""
    async with world(tmp_path) as w:
        first = await w.agent("first", slots=1, transport=transport)
        task_id = await w.held()
        await in_state(w.client, task_id, "running")
        await w.agent("second", slots=1, transport=transport)
        first.kill()
        killed = time.monotonic()
        await until(lambda: len(journal(w.journal)) == 2, LEASE + GRACE, "the second agent works on it")
        say(f"{transport}: moved on after {time.monotonic() - killed:.2f} s")
        w.go.touch()
        found = await in_state(w.client, task_id, "completed")
        assert _outcomes(found) == ["lost", "completed"]
        assert found["result"] == "2"
        assert found.get("failure") is None
    check_history(await read_store(tmp_path / "server" / "data"), {})


async def test_an_agent_frozen_for_twice_its_lease_changes_nothing_when_it_wakes(tmp_path: Path) -> None:
    """SIGSTOP: the task moves on, the result of whoever has it now stands, and the agent that slept goes on with new work."""
    async with world(tmp_path) as w:
        first = await w.agent("first", slots=1)
        task_id = await w.held()
        await in_state(w.client, task_id, "running")
        first.send(signal.SIGSTOP)
        await w.agent("second", slots=1)
        await until(lambda: len(journal(w.journal)) == 2, 2 * LEASE + GRACE, "the second agent works on it")
        stopped = time.monotonic()
        w.go.touch()
        found = await in_state(w.client, task_id, "completed")
        await until(lambda: time.monotonic() > stopped + LEASE, 2 * LEASE, "twice the lease is over")
        first.send(signal.SIGCONT)
        await agents_online(w.client, ["first"])
        again = await submit(w.client, "it.echo", 1, needs={"agent": "first"})
        await in_state(w.client, again, "completed")
        after = await task(w.client, task_id)
        assert (after["result"], after["attempts"], after["etag"]) == (
            found["result"],
            found["attempts"],
            found["etag"],
        )
        assert _outcomes(after) == ["lost", "completed"]
    check_history(await read_store(tmp_path / "server" / "data"), {})


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def test_a_late_result_is_refused_with_lease_superseded(tmp_path: Path) -> None:
    """A process stopped for twice its lease reports what it did before: 409, and the task is as the others left it."""
    async with world(tmp_path) as w:
        spec = {"name": "stubborn", "capabilities": [{"name": "it.stubborn"}], "lease_seconds": LEASE}
        made = await w.client.post(f"{API}/agents/register", json=spec, headers={"Authorization": f"Bearer {w.token}"})
        command = ["-m", "tests.integration.stubborn", w.server.url, made.json()["credential"], "stubborn", str(LEASE)]
        process = _started(command)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            task_id = await submit(w.client, "it.stubborn")
            assert (await asyncio.to_thread(process.stdout.readline)).strip() == task_id
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            taken_back = await in_state(w.client, task_id, "queued", LEASE + GRACE)
            await until(lambda: time.monotonic() > stopped + 2 * LEASE, 3 * LEASE, "twice the lease is over")
            process.send_signal(signal.SIGCONT)
            process.stdin.write("go\n")
            process.stdin.flush()
            assert (await asyncio.to_thread(process.stdout.readline)).strip() == "409 lease-superseded"
            after = await task(w.client, task_id)
            assert after["state"] == "queued"
            assert after["etag"] == taken_back["etag"], "a refused report changed the task"
            assert "result" not in after or after["result"] is None
        finally:
            process.kill()
            process.communicate(timeout=30)


async def test_sigterm_lets_work_in_hand_finish(tmp_path: Path) -> None:
    """Drain: what runs is finished and told, nothing new is taken, and the process ends with 0."""
    async with world(tmp_path) as w:
        agent = await w.agent("leaving", slots=2, drain=20)
        task_id = await w.held()
        await in_state(w.client, task_id, "running")
        agent.send(signal.SIGTERM)
        name = f"{API}/agents/leaving"

        async def draining() -> bool:
            shown = (await w.client.get(name)).json()
            return bool((shown["state"], shown["free_slots"]) == ("draining", 0))

        await until(draining, 10, "the server knows that the agent drains")
        later = await submit(w.client, "it.echo", "later")
        w.go.touch()
        assert await asyncio.to_thread(agent.ended, 20) == 0
        found = await in_state(w.client, task_id, "completed")
        assert _outcomes(found) == ["completed"]
        assert (await task(w.client, later))["state"] == "queued"
        assert (await w.client.get(name)).json()["state"] == "offline"


async def test_sigterm_hands_back_what_does_not_finish_in_time(tmp_path: Path) -> None:
    """Drain with little time: the task is queued again at once, without waiting for the lease and without counting as a failure."""
    async with world(tmp_path) as w:
        agent = await w.agent("leaving", slots=1, lease=600, drain=0.2)
        task_id = await w.held()
        await in_state(w.client, task_id, "running")
        await w.agent("staying", slots=1)
        agent.send(signal.SIGTERM)
        assert await asyncio.to_thread(agent.ended, 20) == 0
        await until(lambda: len(journal(w.journal)) == 2, 10, "the other agent has it")
        w.go.touch()
        found = await in_state(w.client, task_id, "completed")
        assert _outcomes(found) == ["released", "completed"]


class Wire:
    """A way to the server that can be cut: every connection on it at once, as often as wanted."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.url = ""
        self.connections = 0

    async def __aenter__(self) -> "Wire":
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> int:
        """Cut everything off, without a goodbye; returns how many ends were open."""
        ends = list(self._open)
        for end in ends:
            end.transport.abort()
        return len(ends)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        other = None
        try:
            back, other = await asyncio.open_connection("127.0.0.1", self._port)
            self._open.add(other)
            await asyncio.gather(self._pour(reader, other), self._pour(back, writer))
        except OSError:
            pass
        finally:
            for end in (writer, other):
                if end is not None:
                    self._open.discard(end)
                    end.transport.abort()

    async def _pour(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while chunk := await source.read(65536):
            target.write(chunk)
            await target.drain()
        target.close()


@pytest.mark.parametrize("transport", ["socket", "poll"])
async def test_five_cuts_in_three_seconds_cost_no_work(transport: str, tmp_path: Path) -> None:
    """Under load the connection breaks again and again: the agent resumes its leases, every task ends once at its first attempt."""
    keys = [f"cut-{number}" for number in range(3000)]
    async with world(tmp_path) as w, Wire(int(w.server.url.rpartition(":")[2])) as wire:
        agent = AgentProcess(tmp_path, "cut", wire.url, w.token, lease=10, slots=20, transport=transport).start()
        w.agents.append(agent)
        await agents_online(w.client, ["cut"])
        held = await w.held()
        await in_state(w.client, held, "running")
        acknowledged: dict[str, str] = {}
        began = time.monotonic()
        cuts = 0
        for start in range(0, len(keys), 500):
            batch = [{"type": "it.echo", "payload": key, "idempotency_key": key} for key in keys[start : start + 500]]
            answer = await w.client.post(f"{API}/tasks/batch", json={"tasks": batch})
            acknowledged |= {
                spec["idempotency_key"]: item["id"] for spec, item in zip(batch, answer.json()["items"], strict=True)
            }
            if cuts < 5:
                seen = wire.connections
                due = began + 0.6 * (cuts + 1)
                await until(lambda due=due: time.monotonic() > due, 5, "it is time to cut")  # type: ignore[misc]
                assert wire.cut() > 0
                cuts += 1
                await until(lambda seen=seen: wire.connections > seen, 10, "the agent is back")  # type: ignore[misc]
        say(f"{transport}: {cuts} cuts in {time.monotonic() - began:.1f} s, {wire.connections} connections")
        w.go.touch()
        assert await all_final(w.client, 40) == {"completed": len(keys) + 1}
        found = await task(w.client, held)
        assert _outcomes(found) == ["completed"], "the lease was not resumed"
        health = (await w.client.get(f"{API}/agents/cut")).json()["health"]
        assert health["verdict"] in ("ok", "slow"), "a few cuts are not flapping"
        assert len(journal(w.journal)) == 1
    found_store = await read_store(tmp_path / "server" / "data")
    check_history(found_store, acknowledged)
