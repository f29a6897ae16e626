"""Size: a million queued tasks, a thousand agents, a file of 200 MB under a memory cap. The figures are told (`pytest -s`)."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

import httpx2
import psutil
import pytest

from mcp_control.techdeck.synthetic import generate
from mcp_control.testing.server import ServerProcess
from tests.integration.pipelines import completed, started
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    say,
    tasks_by_state,
    until,
    violations,
    wait_for,
)

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.long_on_cluster]

MEGABYTE = 1 << 20
WINDOW = 10_000


async def _fill(client: httpx2.AsyncClient, count: int) -> float:
    """Queue so many tasks; returns tasks/s."""
    specs = [{"type": "it.scale", "payload": number} for number in range(1000)]
    began = time.monotonic()

    async def fill(batches: int) -> None:
        for _ in range(batches):
            while (await client.post(f"{API}/tasks/batch", json={"tasks": specs})).status_code != 200:
                pass

    await asyncio.gather(*(fill(count // 4000) for _ in range(4)))
    return count / (time.monotonic() - began)


def _window(marks: list[tuple[float, int]], first: int) -> float:
    """Return tasks/s over the window that begins with the first mark at or after so many tasks."""
    start = next(place for place, (_, tasks) in enumerate(marks) if tasks >= first)
    end = next(place for place in range(start, len(marks)) if marks[place][1] >= marks[start][1] + WINDOW * 0.8)
    return (marks[end][1] - marks[start][1]) / (marks[end][0] - marks[start][0])


def _crowd(url: str, token: str, agents: int) -> subprocess.Popen[str]:
    """Start so many agents in one process; they register with a user's token."""
    command = [sys.executable, "-m", "tests.integration.scale", url, token, str(agents), "10"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("count", "agents"), [(20_000, 50), pytest.param(1_000_000, 1000, marks=pytest.mark.long)], ids=["small", "million"]
)
async def test_what_waits_costs_memory_and_not_time(count: int, agents: int, backend: str, tmp_path: Path) -> None:
    """Tasks are handed out as fast from a full lane as from one that is nearly empty, and every one of them ends."""
    if backend == "cluster":
        count //= 10  # a database that shares two cores with all its members takes a tenth of the rate
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server, timeout=120.0) as client:
            memory = psutil.Process(server.pid).memory_info
            before = memory().rss
            rate = await _fill(client, count)
            grown = memory().rss - before
            say(f"{count} tasks queued at {rate:.0f}/s; {grown / count:.0f} bytes of memory per queued task")
            assert grown / count < 1500 + 300 * MEGABYTE / count
            crowd = _crowd(server.url, server.admin_token, agents)
            assert crowd.stdin is not None
            assert crowd.stdout is not None
            marks: list[tuple[float, int]] = []
            began = time.monotonic()
            try:
                while line := await asyncio.to_thread(crowd.stdout.readline):
                    if line.strip() == "connected":
                        say(f"{agents} agents connected after {time.monotonic() - began:.1f} s")
                        if count >= 1_000_000:
                            online = (await client.get(f"{API}/status")).json()["agents"]
                            assert sum(online.values()) == agents
                        continue
                    seconds, done = line.split()
                    marks.append((float(seconds), int(done)))
                    if int(done) > count - 2000:
                        break

                async def ended() -> bool:
                    # Counting stops at 100,000; with no other state left, nothing else is there.
                    return await tasks_by_state(client) == {"completed": min(count, 100_000)}

                await until(ended, 120, "every task ends")
            finally:
                crowd.stdin.close()
                crowd.wait(timeout=60)
                crowd.stdout.close()
            assert crowd.returncode == 0
            first = _window(marks, agents * 20)
            last = _window(marks, count - 2 * WINDOW if count > 4 * WINDOW else count // 2 - WINDOW // 2)
            say(f"first window {first:.0f}/s, last window {last:.0f}/s, server {memory().rss / MEGABYTE:.0f} MiB")
            if count >= 1_000_000:
                assert first > last / 2, "handing out is slower from a full lane"
            assert await violations(client) == {}


@contextmanager
def _memory_group(name: str, limit: int) -> Iterator[Path | None]:
    """Make a control group with a memory limit where that is permitted; None where it is not."""
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            wait_for(partial(_removed, group), 20, "the workers are gone")
        return
    yield None


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_a_file_of_200_megabytes_goes_through_techdeck_under_a_memory_cap(tmp_path: Path) -> None:
    """Two agents may take 1.5 GiB together; the run completes, and memory per row is told."""
    source = tmp_path / "data.jsonl"
    small = generate(source, seed=1, n=2000)
    rows = round(2000 * 200 * MEGABYTE / source.stat().st_size)
    assert small
    generate(source, seed=1, n=rows)
    size = source.stat().st_size
    assert size > 180 * MEGABYTE
    cap = 1536 * MEGABYTE
    with ServerProcess(tmp_path / "server") as server, _memory_group(f"techdeck-{os.getpid()}", cap) as group:
        agents: list[AgentProcess] = []
        try:
            async with admin(server, timeout=300.0) as client:
                token = await enrolment(client)
                for name in ("deck-1", "deck-2"):
                    agent = AgentProcess(tmp_path, name, server.url, token, kind="deck", slots=1).start()
                    agents.append(agent)
                    if group is not None:
                        (group / "cgroup.procs").write_text(str(agent.pid))  # its workers are born into it
                await agents_online(client, ["deck-1", "deck-2"])
                definition = files("mcp_control.techdeck").joinpath("pipeline.yaml").read_bytes()
                await client.post(f"{API}/pipelines", content=definition, headers={"Content-Type": "application/yaml"})
                uploaded = await client.post(
                    f"{API}/artifacts?name=data.jsonl&role=input",
                    content=source.read_bytes(),
                    headers={"Content-Type": "application/octet-stream"},
                )
                assert uploaded.status_code == 201, uploaded.text
                began = time.monotonic()
                params = {"input": uploaded.json()["id"], "quality": {"gate": "warn"}}
                run_id = await started(client, "techdeck", params, "big")
                peak = {"agents": 0, "server": 0}
                watched = [psutil.Process(agent.pid) for agent in agents]

                async def watch() -> None:
                    while True:
                        total = 0
                        for process in watched:
                            for one in (process, *process.children(recursive=True)):
                                try:
                                    total += one.memory_info().rss
                                except psutil.NoSuchProcess:
                                    continue
                        peak["agents"] = max(peak["agents"], total)
                        peak["server"] = max(peak["server"], psutil.Process(server.pid).memory_info().rss)
                        await asyncio.sleep(0.25)

                watching = asyncio.create_task(watch())
                view = await completed(client, run_id, 3000)
                watching.cancel()
                seconds = time.monotonic() - began
                assert view["stages"][0]["rows_in"] == rows
                say(
                    f"{size / MEGABYTE:.0f} MiB, {rows} rows in {seconds:.0f} s ({rows / seconds:.0f} rows/s), cap"
                    f" {'enforced' if group else 'not enforced'}; agents at most {peak['agents'] / MEGABYTE:.0f} MiB"
                    f" ({peak['agents'] / rows:.0f} bytes a row), server at most {peak['server'] / MEGABYTE:.0f} MiB"
                )
                assert peak["agents"] < 1.25 * cap  # resident pages of files count for each process that maps them
                assert await violations(client) == {}
        finally:
            for agent in agents:
                agent.kill()
