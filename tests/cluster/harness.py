"""Several servers on one database and one Redis behind a load balancer, with agents and load, all of them real processes."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx2

from mcp_control.testing.server import ServerProcess
from tests.cluster.history import FINAL, History, Seen
from tests.cluster.relay import Balancer, Door, door
from tests.integration.support import (
    API,
    AgentProcess,
    Pace,
    agents_online,
    enrolment,
    started_agents,
    tasks_by_state,
    until,
)

RETRY_SECONDS: Final = 0.1


class Cluster:
    """Servers on one store. Each keeps its own folder and port; clients and agents know `url` alone.

    Args:
        count: how many servers.
        settings: of each of them, by name with `__` for dots.
    """

    def __init__(
        self, folder: Path, mongo_uri: str, redis_url: str | None, *, count: int = 3, **settings: object
    ) -> None:
        self._folder = folder
        given: dict[str, object] = {"mongo__uri": mongo_uri, **settings}
        if redis_url is not None:
            database = urlsplit(mongo_uri).path.strip("/")
            given |= {"redis__url": redis_url, "redis__namespace": database}
        self.servers = [
            ServerProcess(folder / f"server-{place}", node=f"server-{place}", **given) for place in range(count)
        ]
        self.balancer = Balancer(*[self._door(place) for place in range(count)])
        self.agents: list[AgentProcess] = []

    def _door(self, place: int) -> Door:
        async def opened() -> Any:
            url = self.servers[place].url
            if not url:
                raise ConnectionRefusedError
            return await door(port_of(url))()

        return opened

    @property
    def url(self) -> str:
        """Where the load balancer is."""
        return self.balancer.url

    @property
    def headers(self) -> dict[str, str]:
        """The header that authenticates as the administrator, with every server."""
        return self.servers[0].headers

    async def start(self) -> Self:
        """Start the first server, which makes the store, then the others at once, and the balancer."""
        await asyncio.to_thread(self.servers[0].start)
        await asyncio.gather(*[asyncio.to_thread(server.start) for server in self.servers[1:]])
        await self.balancer.start()
        return self

    async def kill(self, place: int) -> None:
        """kill -9 of a server."""
        await asyncio.to_thread(self.servers[place].kill)

    async def restart(self, place: int) -> None:
        """Start a killed server again; it answers when this returns."""
        await asyncio.to_thread(self.servers[place].start)

    async def work(self, names: list[str], **options: object) -> None:
        """Start agents that know the balancer alone, and wait until they are there."""
        async with self.client() as client:
            token = await enrolment(client)
            self.agents += started_agents(self._folder, self.url, token, names, **options)
            await agents_online(client, names, 30)

    def client(self, **options: Any) -> httpx2.AsyncClient:
        """Return a client that is the administrator, connected through the balancer."""
        return self._client(self.url, **options)

    def direct(self, place: int, **options: Any) -> httpx2.AsyncClient:
        """Return a client of one server."""
        return self._client(self.servers[place].url, **options)

    def _client(self, url: str, **options: Any) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=url,
            headers=self.headers,
            timeout=options.pop("timeout", 10.0),
            limits=httpx2.Limits(max_connections=200, max_keepalive_connections=50),
            **options,
        )

    async def close(self) -> None:
        """Kill the agents and stop what runs; an orderly end of each server that lives is part of the test."""
        for agent in self.agents:
            await asyncio.to_thread(agent.kill)
        codes = await asyncio.gather(*[asyncio.to_thread(server.stop) for server in self.servers])
        await self.balancer.close()
        assert codes == [0] * len(codes), codes


@asynccontextmanager
async def running_cluster(
    folder: Path, mongo_uri: str, redis_url: str | None, *, count: int = 3, **settings: object
) -> AsyncIterator[Cluster]:
    """Run a cluster for the time of this block."""
    cluster = Cluster(folder, mongo_uri, redis_url, count=count, **settings)
    try:
        yield await cluster.start()
    finally:
        await cluster.close()


def port_of(url: str) -> int:
    """Return the port of a URL."""
    port = urlsplit(url).port
    assert port is not None
    return port


class Submits:
    """Clients that submit at a rate and repeat, with the same key, whatever they got no answer for.

    Args:
        body: makes the submission, without its key.

    Attributes:
        refused: answers other than success, by the code of the problem; `""` is a connection that broke.
        longest: seconds from the first try of a submit to its acknowledgement, the longest of all.
    """

    def __init__(self, history: History, rate: float, body: Callable[[], Mapping[str, object]]) -> None:
        self._history = history
        self._rate = rate
        self._body = body
        self.made = 0
        self.refused: dict[str, int] = {}
        self.longest = 0.0

    async def run(self, client: httpx2.AsyncClient, ends: asyncio.Event) -> None:
        """Submit until told to end, and then until all of it is acknowledged."""
        pace = Pace(self._rate)
        sending: set[asyncio.Task[None]] = set()
        while not ends.is_set():
            self.made += 1
            one = asyncio.create_task(self.one(client, f"k{self.made}"))
            sending.add(one)
            one.add_done_callback(sending.discard)
            await pace()
        await asyncio.gather(*sending)

    async def one(self, client: httpx2.AsyncClient, key: str, seconds: float = 120.0) -> str:
        """Submit one task, however many tries it takes, and return its id."""
        body = {**self._body(), "idempotency_key": key}
        began = time.monotonic()
        while True:
            try:
                answer = await client.post(f"{API}/tasks", json=body)
                status = answer.status_code
            except (httpx2.TransportError, TimeoutError):
                status, answer = 0, None
            if answer is not None and status in (200, 201):
                task_id: str = answer.json()["id"]
                self._history.acked(key, task_id)
                self.longest = max(self.longest, time.monotonic() - began)
                return task_id
            assert status in (0, 429, 503), (status, answer and answer.text)
            code = "" if answer is None else str(answer.json()["code"])
            self.refused[code] = self.refused.get(code, 0) + 1
            assert time.monotonic() - began < seconds, f"{key} was not taken within {seconds} s: {status}"
            # An overloaded server says when to come back; whoever hears it does not come all at once.
            asked = float(answer.headers.get("Retry-After", 0)) if code == "overloaded" and answer is not None else 0.0
            await asyncio.sleep(max(RETRY_SECONDS, asked * random.uniform(0.5, 1.0)))


class Follower:
    """Reads the event stream and, whenever it breaks, goes on after the last event it has."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._task: asyncio.Task[None] | None = None
        self._last: str | None = None
        self.breaks = 0

    async def start(self, client: httpx2.AsyncClient) -> Self:
        """Begin after the newest event there is; what happens from now on is followed."""
        page: dict[str, Any] = {}
        while not page or page["items"]:
            params = {"limit": 500} | ({"after": page["next"]} if page else {})
            answer = await client.get(f"{API}/events", params=params)
            assert answer.status_code == 200, answer.text
            page = answer.json()
        self._last = page["next"]
        self._task = asyncio.create_task(self._run(client))
        return self

    async def _run(self, client: httpx2.AsyncClient) -> None:
        while True:
            with suppress(httpx2.TransportError, TimeoutError):
                await self._read(client)
            self.breaks += 1
            await asyncio.sleep(RETRY_SECONDS)

    async def _read(self, client: httpx2.AsyncClient) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": self._last or ""}
        async with client.stream("GET", f"{API}/events", headers=headers, timeout=20.0) as answer:
            if answer.status_code != 200:
                assert answer.status_code in (429, 503), answer.status_code
                return
            async for line in answer.aiter_lines():
                if line.startswith("event: reread"):
                    return  # too slow: what was left out is read anew, from the last one seen
                if line.startswith("data: {"):
                    seen = Seen.parsed(line.removeprefix("data: "))
                    self._history.events.append(seen)
                    self._last = f"evt_{seen.seq}"

    async def caught_up(self, client: httpx2.AsyncClient, seconds: float = 15.0) -> None:
        """Wait until it has seen the events of all that was committed before this call.

        Events get their order soon after the commits they belong to. Whatever is committed now comes after all of them, so
        its event is the mark to wait for.
        """
        seen = len(self._history.events)

        async def marked() -> bool:
            try:
                await enrolment(client, uses=1)
            except (httpx2.TransportError, AssertionError):
                return False  # refused while something is broken; asked again
            return True

        def passed() -> bool:
            return any(event.type == "enrolment.created" for event in self._history.events[seen:])

        await until(marked, seconds, "a mark behind all events")
        await until(passed, seconds, "the follower has seen all events")

    async def stop(self) -> None:
        """Stop following. Raises what ended it early."""
        assert self._task is not None
        self._task.cancel()
        (ended,) = await asyncio.gather(self._task, return_exceptions=True)
        if not isinstance(ended, asyncio.CancelledError):
            raise ended or AssertionError("the follower ended")


async def ended(client: httpx2.AsyncClient, seconds: float) -> bool:
    """Wait until every task has its final state; False where that takes longer than so many seconds."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        counts = await tasks_by_state(client)
        if set(counts) <= FINAL:
            return True
        await asyncio.sleep(0.2)
    return False


async def read_tasks(client: httpx2.AsyncClient, history: History) -> None:
    """Read every task there is, as clients do, page by page."""
    cursor: str | None = None
    while True:
        params = {"limit": 500} | ({"cursor": cursor} if cursor else {})
        answer = await client.get(f"{API}/tasks", params=params)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        for task in page["items"]:
            history.read(task)
        cursor = page.get("next_cursor")
        if not cursor:
            return
