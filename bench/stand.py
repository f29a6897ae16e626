"""What is measured: a server process and agent processes on a fresh data folder; and how much processor time and memory each takes."""

import asyncio
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import apsw
import psutil

from bench.http import Connection, connections
from mcp_control.testing.server import ServerProcess

_READY_SECONDS = 30.0
_SAMPLE_SECONDS = 0.1


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of these processes and their children, those that have ended included."""
    total = 0.0
    for pid in pids:
        for place, process in enumerate(_tree(pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
                if place == 0:
                    total += times.children_user + times.children_system
    return total


def rss_mb(pids: list[int]) -> float:
    """Return the resident memory of these processes and their children, in MiB."""
    total = 0
    for pid in pids:
        for process in _tree(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total / (1 << 20)


@dataclass
class Usage:
    """What a stretch of work took: wall seconds, processor seconds of each side, peak memory in MiB."""

    seconds: float = 0.0
    server_cpu: float = 0.0
    agent_cpu: float = 0.0
    client_cpu: float = 0.0
    server_rss_mb: float = 0.0
    agent_rss_mb: float = 0.0

    def per_task(self, tasks: int) -> dict[str, float]:
        """Return microseconds of processor time per task."""
        return {
            "server_cpu_us": round(self.server_cpu / tasks * 1e6, 1),
            "agent_cpu_us": round(self.agent_cpu / tasks * 1e6, 1),
            "client_cpu_us": round(self.client_cpu / tasks * 1e6, 1),
        }


@dataclass
class Stand:
    """A running server with its agents.

    Attributes:
        url, token: where it is, and an administrator's API token.
        api: a connection for the stand's own questions.
        folder: for files of the measurement.
        name: what the names of its agents begin with.
    """

    url: str
    token: str
    server: int
    api: Connection
    folder: Path
    name: str = ""
    _agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _logs: list[IO[bytes]] = field(default_factory=list)

    @property
    def agents(self) -> list[int]:
        """Process ids of the agents."""
        return [process.pid for process in self._agents]

    async def start_agents(self, kind: str, count: int, slots: int) -> None:
        """Start agent processes and return when all are online."""
        enrolment = await self.api.json("POST", "/agents/enrolment-tokens", {"uses": count})
        already = len(self._agents)
        for number in range(already, already + count):
            name = f"{self.name}{kind}-{number}"
            log = (self.folder / f"agent-{name}.log").open("wb")
            self._logs.append(log)
            environ = {key: value for key, value in os.environ.items() if not key.startswith("MCP_CONTROL_")}
            environ |= {
                "MCP_CONTROL_URL": self.url,
                "MCP_CONTROL_ENROLMENT_TOKEN": enrolment["token"],
                "MCP_CONTROL_CONFIG_DIR": str(self.folder / "config"),
            }
            command = [sys.executable, "-m", "bench.agents", kind, name, str(slots)]
            self._agents.append(_process(command, environ, log))
        end = time.monotonic() + _READY_SECONDS
        while True:
            online = await self.api.json("GET", "/agents?state=online")
            mine = [agent for agent in online["items"] if agent["name"].startswith(f"{self.name}{kind}-")]
            if len(mine) == len(self._agents):
                return
            failed = [process for process in self._agents if process.poll() is not None]
            if failed or time.monotonic() > end:
                raise RuntimeError(f"agents did not come online; see {self.folder}: {self._log_tails()}")
            await asyncio.sleep(0.05)

    def _log_tails(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("agent-*.log"))

    async def completed(self) -> int:
        """Return how many tasks have completed."""
        status = await self.api.json("GET", "/status")
        return int(status["tasks"].get("completed", 0))

    @contextlib.contextmanager
    def metered(self) -> Iterator[Usage]:
        """Fill in a Usage over the block; memory is the end's, see `watched` for the peak."""
        usage = Usage()
        before = cpu_seconds([self.server]), cpu_seconds(self.agents), own_cpu()
        began = time.perf_counter()
        yield usage
        usage.seconds = time.perf_counter() - began
        usage.server_cpu = cpu_seconds([self.server]) - before[0]
        usage.agent_cpu = cpu_seconds(self.agents) - before[1]
        usage.client_cpu = own_cpu() - before[2]
        usage.server_rss_mb = max(usage.server_rss_mb, rss_mb([self.server]))
        usage.agent_rss_mb = max(usage.agent_rss_mb, rss_mb(self.agents))

    @asynccontextmanager
    async def watched(self, usage: Usage) -> AsyncIterator[None]:
        """Note peak memory in `usage` while the block runs."""

        async def look() -> None:
            while True:
                server, agents = await asyncio.to_thread(lambda: (rss_mb([self.server]), rss_mb(self.agents)))
                usage.server_rss_mb = max(usage.server_rss_mb, server)
                usage.agent_rss_mb = max(usage.agent_rss_mb, agents)
                await asyncio.sleep(_SAMPLE_SECONDS)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    def stop_agents(self) -> None:
        """End the agents: first asked, then made to."""
        for process in self._agents:
            process.terminate()
        for process in self._agents:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()
        self._agents.clear()
        self._logs.clear()


def _process(command: list[str], environ: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environ, stdout=log, stderr=log)


def own_cpu() -> float:
    """Return the processor time of this process."""
    times = os.times()
    return times.user + times.system


@asynccontextmanager
async def stand(kind: str = "", *, agents: int = 1, slots: int = 256) -> AsyncIterator[Stand]:
    """Run a server on an empty data folder with agents of this kind; everything is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="mcp-bench-") as name:
        folder = Path(name)
        server = ServerProcess(folder / "server").start()
        try:
            async with connections(server.url, server.admin_token, 1) as (api,):
                made = Stand(server.url, server.admin_token, server.pid, api, folder)
                try:
                    if kind:
                        await made.start_agents(kind, agents, slots)
                    yield made
                finally:
                    made.stop_agents()
        finally:
            server.stop()


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "load": round(os.getloadavg()[0], 2),
    }
