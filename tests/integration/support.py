"""What these tests share: real processes, one way to wait, and the comparison of what clients heard with what the store holds."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
import msgspec

from mcp_control.app import KINDS
from mcp_control.kernel.changes import Query, StoredFact
from mcp_control.kernel.errors import Problem
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.storage.ports import Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.model import FINAL_STATES, Task
from mcp_control.tasks.records import read
from mcp_control.testing.programs import Starter
from mcp_control.testing.server import RunningServer, ServerProcess, databases_for

API = "/api/v1"
FINAL_FACTS = frozenset(f"task.{state.value}" for state in FINAL_STATES)
Server = ServerProcess | RunningServer
T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Ask until the answer is true, and return it; fail with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


async def until(condition: Callable[[], T | Awaitable[T]], seconds: float, what: str) -> T:
    """Ask until the answer is true, and return it; fail with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        answer: Any = await found if isinstance(found, Awaitable) else found
        if answer:
            return answer  # type: ignore[no-any-return]
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


class Pace:
    """Lets a load generator go on at a rate: `await pace()` returns when the next step is due."""

    def __init__(self, per_second: float) -> None:
        self._step = 1 / per_second
        self._next = time.monotonic()

    async def __call__(self) -> None:
        self._next = max(self._next + self._step, time.monotonic() - 1)
        await asyncio.sleep(max(0.0, self._next - time.monotonic()))


class AgentProcess:
    """An agent of `tests/integration/agents.py` as a process; its log is a file beside its credential."""

    def __init__(self, folder: Path, name: str, url: str, enrolment: str, **options: object) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "agent.log"
        self._url = url
        self._enrolment = enrolment
        self._options = options
        self._starter: Starter | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it; it connects by itself, and ends with the process that started it."""
        given = [f"{name}={value}" for name, value in self._options.items()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")}
        environment |= {
            "MCP_CONTROL_CONFIG_DIR": str(self.folder),
            "MCP_CONTROL_URL": self._url,
            "MCP_CONTROL_ENROLMENT_TOKEN": self._enrolment,
        }
        self._starter = Starter(self.name)
        with self.log.open("ab") as log:
            self._process = self._starter.start(
                [sys.executable, "-m", "tests.integration.agents", self.name, *given],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self, seconds: float = 30.0) -> int:
        """Wait for its end and return the exit code."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def kill(self) -> None:
        """kill -9 of the agent and of its workers, and wait until they are gone."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


def started_agents(
    folder: Path, url: str, enrolment: str, names: Iterable[str], **options: object
) -> list[AgentProcess]:
    """Start an agent of each name."""
    return [AgentProcess(folder, name, url, enrolment, **options).start() for name in names]


def admin(server: Server, **options: Any) -> httpx2.AsyncClient:
    """Return a client that is the administrator."""
    return httpx2.AsyncClient(
        base_url=server.url,
        headers=server.headers,
        timeout=options.pop("timeout", 20.0),
        limits=httpx2.Limits(max_connections=400, max_keepalive_connections=400),
        **options,
    )


async def settled(client: httpx2.AsyncClient) -> None:
    """Wait until a server that was just started has filled Redis; nothing to wait for without."""

    async def there() -> bool:
        problems = (await client.get(f"{API}/status")).json()["problems"]
        return not any(problem.startswith("redis:") for problem in problems)

    await until(there, 10, "Redis is filled")


async def enrolment(client: httpx2.AsyncClient, uses: int = 100) -> str:
    """Return a token with which agents enrol."""
    answer = await client.post(f"{API}/agents/enrolment-tokens", json={"uses": uses})
    assert answer.status_code in (200, 201), answer.text
    token: str = answer.json()["token"]
    return token


async def agents_online(client: httpx2.AsyncClient, names: Sequence[str], seconds: float = 20.0) -> None:
    """Wait until these agents can take work."""

    async def online() -> bool:
        items = (await client.get(f"{API}/agents", params={"limit": 500})).json()["items"]
        return set(names) <= {item["name"] for item in items if item["state"] in ("online", "busy")}

    await until(online, seconds, f"{names} online")


async def submit(client: httpx2.AsyncClient, type: str, payload: object = None, **more: object) -> str:
    """Submit a task and return its id."""
    answer = await client.post(f"{API}/tasks", json={"type": type, "payload": payload, **more})
    assert answer.status_code == 201, answer.text
    task_id: str = answer.json()["id"]
    return task_id


async def task(client: httpx2.AsyncClient, task_id: str) -> dict[str, Any]:
    """Return a task as it is."""
    answer = await client.get(f"{API}/tasks/{task_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def in_state(client: httpx2.AsyncClient, task_id: str, state: str, seconds: float = 20.0) -> dict[str, Any]:
    """Wait until a task has this state."""

    async def there() -> dict[str, Any] | None:
        found = await task(client, task_id)
        return found if found["state"] == state else None

    found = await until(there, seconds, f"{task_id} {state}")
    assert found is not None
    return found


async def tasks_by_state(client: httpx2.AsyncClient) -> dict[str, int]:
    """Return how many tasks are in which state."""
    answer = await client.get(f"{API}/status")
    assert answer.status_code == 200, answer.text
    found: dict[str, int] = answer.json()["tasks"]
    return found


async def all_final(client: httpx2.AsyncClient, seconds: float) -> dict[str, int]:
    """Wait until every task has its final state; returns how many have which."""
    final = {state.value for state in FINAL_STATES}

    async def done() -> dict[str, int]:
        counts = await tasks_by_state(client)
        return counts if counts and set(counts) <= final else {}

    return await until(done, seconds, "all tasks final")


async def violations(client: httpx2.AsyncClient) -> dict[str, float]:
    """Return the counters of broken promises that are not 0."""
    text = (await client.get("/metrics")).text
    lines = [
        line.rpartition(" ") for line in text.splitlines() if line.startswith("mcp_control_invariant_violations_total")
    ]
    assert len(lines) >= 3, lines
    return {name: float(value) for name, _, value in lines if float(value)}


class Found(msgspec.Struct):
    """What a store holds."""

    tasks: dict[str, Task]
    facts: list[StoredFact]


def _unexpected(problem: Problem) -> None:
    raise AssertionError(problem)


def _store(data: Path) -> Store:
    if settings := databases_for(data):
        return MongoStore(str(settings["mongo.uri"]), node="reader", fatal=_unexpected)
    return SqliteStore(data, fatal=_unexpected)


async def read_store(data: Path) -> Found:
    """Read a store no server has open; `data` is the folder that the servers were started with."""
    store = _store(data)
    await store.open(KINDS, lambda facts: None)
    try:
        tasks: dict[str, Task] = {}
        after: list[str | int | None] | None = None
        while page := await store.find("task", Query(after=after, limit=5000)):
            tasks |= {entity.id: read(entity) for entity in page}
            after = [page[-1].id]
        facts: list[StoredFact] = []
        while more := await store.facts(facts[-1].seq if facts else 0, 20_000):
            facts += more
        return Found(tasks, facts)
    finally:
        await store.close()


def check_history(found: Found, acknowledged: Mapping[str, str], results: Mapping[str, object] | None = None) -> None:
    """Compare what clients heard (idempotency key to id) with a store in which everything has ended.

    Every acknowledged id is there exactly once, completed with one accepted result; facts have no gap; each task was queued once and
    ended once; fences only grow.
    """
    seqs = [fact.seq for fact in found.facts]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "a gap in the facts"
    assert len(set(acknowledged.values())) == len(acknowledged), "two keys, one task"
    missing = [task_id for task_id in acknowledged.values() if task_id not in found.tasks]
    assert not missing, f"{len(missing)} acknowledged tasks are gone, e.g. {missing[:3]}"
    keys = Counter(one.idempotency_key for one in found.tasks.values() if one.idempotency_key)
    assert not [key for key, times in keys.items() if times > 1], "one key, two tasks"
    wrong = {key: found.tasks[task_id].idempotency_key for key, task_id in acknowledged.items()}
    assert all(key == value for key, value in wrong.items())
    ended: Counter[str] = Counter()
    queued: Counter[str] = Counter()
    for stored in found.facts:
        if stored.fact.type in FINAL_FACTS:
            ended[stored.fact.subject] += 1
        elif stored.fact.type in ("task.queued", "task.scheduled"):
            queued[stored.fact.subject] += 1
    for task_id, one in found.tasks.items():
        assert one.state == "completed", (task_id, one.state, one.reason, one.message)
        assert ended[task_id] == 1, (task_id, ended[task_id])
        assert queued[task_id] >= 1, task_id
        assert [attempt.outcome for attempt in one.attempts].count("completed") == 1, one.attempts
        numbers = [attempt.number for attempt in one.attempts]
        assert numbers == sorted(set(numbers)), one.attempts
        # Two attempts never overlap in the store's own order of times.
        for before, after in zip(one.attempts, one.attempts[1:], strict=False):
            assert before.ended_at <= after.assigned_at, one.attempts
    assert set(ended) <= set(found.tasks)


def say(text: str) -> None:
    """Tell a figure; `pytest -s` and `-rA` show it."""
    sys.stdout.write(text + "\n")


def journal(path: Path) -> list[str]:
    """Return the lines that handlers wrote down."""
    return path.read_text().splitlines() if path.exists() else []
