"""`Client` and `AsyncClient`: two thin shells around the same requests (`calls.py`), with the same names.

with Client() as client:
    task = client.tasks.submit("text.clean", {"parts": [...]}, priority="high", key="doc-42")
    print(task.result(timeout=60))
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from mcp_control.events.model import Event
from mcp_control.kernel.paging import Page
from mcp_control.sdk import calls
from mcp_control.sdk.agents import Agents, AsyncAgents
from mcp_control.sdk.approvals import Approvals, AsyncApprovals
from mcp_control.sdk.artifacts import Artifacts, AsyncArtifacts
from mcp_control.sdk.breakers import AsyncBreakers, Breakers
from mcp_control.sdk.calls import Flow, Request
from mcp_control.sdk.errors import NotNow, Unreachable
from mcp_control.sdk.follow import Sign, SseReader
from mcp_control.sdk.groups import AsyncGroups, Groups
from mcp_control.sdk.limits import AsyncLimits, Limits
from mcp_control.sdk.operations import AsyncDeadLetters, AsyncOperations, DeadLetters, Operations
from mcp_control.sdk.pipelines import AsyncPipelines, Pipelines
from mcp_control.sdk.profiles import Profiles
from mcp_control.sdk.runs import AsyncRuns, Runs
from mcp_control.sdk.schedules import AsyncSchedules, Schedules
from mcp_control.sdk.shares import AsyncShares, Shares
from mcp_control.sdk.tasks import AsyncTasks, Tasks
from mcp_control.sdk.transport import AsyncTransport, Transport

T = TypeVar("T")
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


def pause_after(failures: int) -> float:
    """Return the seconds to wait before following a stream again after so many drops in a row."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures, 10))


class Client:
    """The API, blocking. Safe to share between threads; close it, or use it in a `with` block."""

    def __init__(
        self, url: str | None = None, *, token: str | None = None, retry: bool = True, profiles: Profiles | None = None
    ) -> None:
        """Say which server and as whom; by default the environment or the stored profile does.

        Args:
            url: address of the server, or the name of a stored profile.
            token: an API token, a login's token or an agent's credential.
            retry: whether to repeat what may be repeated when the server cannot be reached or asks for patience.
            profiles: where tokens are kept.
        """
        profile = (profiles or Profiles()).resolve(url, token)
        self.url = profile.url
        self.transport = Transport(profile.url, profile.token, retry=retry)
        self.tasks = Tasks(self)
        self.groups = Groups(self)
        self.operations = Operations(self, time.monotonic)
        self.dead_letters = DeadLetters(self)
        self.runs = Runs(self)
        self.approvals = Approvals(self)
        self.pipelines = Pipelines(self)
        self.schedules = Schedules(self)
        self.limits = Limits(self)
        self.shares = Shares(self)
        self.breakers = Breakers(self)
        self.artifacts = Artifacts(self)
        self.agents = Agents(self)

    def do(self, request: Request[T]) -> T:
        """Carry out a request. Raises ApiProblem, Unreachable."""
        return request.read(self.transport.send(request.call))

    def drive(self, flow: Flow[T]) -> T:
        """Carry out a flow of requests and return what it returns."""
        try:
            request = next(flow)
            while True:
                request = flow.send(self.do(request))
        except StopIteration as stop:
            found: T = stop.value
            return found

    def pages(self, ask: Callable[[str | None], Request[Page[T]]]) -> Iterator[T]:
        """Yield the items of all pages."""
        cursor: str | None = None
        while True:
            page = self.do(ask(cursor))
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def event_lines(
        self, types: Sequence[str], subject: str | None, run: str | None, after: str | None
    ) -> Iterator[tuple[Event | Sign, str | None]]:
        """Yield events and signs, each with the cursor after it, over one connection; the first one is `Sign.OPEN`."""
        reader = SseReader(after)
        with self.transport.stream(calls.events_call(types, subject, run, after)) as response:
            yield Sign.OPEN, after
            for line in response.iter_lines():
                if (found := reader.feed(line)) is not None:
                    yield found, reader.cursor

    def events(
        self, types: Sequence[str] = (), *, subject: str | None = None, run: str | None = None, after: str | None = None
    ) -> Iterator[Event]:
        """Yield events for ever, from now or after a cursor; a dropped connection is taken up where it broke.

        Args:
            types: event types, `task.*` for all of a noun; none for all.
            subject: only events about this id.
            run: only events of this run.
            after: id of the last event already known.

        Raises:
            Missing: `cursor-expired`, the events after `after` are no longer kept.
        """
        failures = 0
        while True:
            try:
                for found, position in self.event_lines(types, subject, run, after):
                    failures, after = 0, position
                    if isinstance(found, Event):
                        yield found
            except (Unreachable, NotNow):
                failures += 1
            time.sleep(pause_after(failures))

    def status(self) -> dict[str, Any]:
        """Return the server's state."""
        return self.do(calls.status())

    def close(self) -> None:
        """Close the connections."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The API, awaited. Belongs to one event loop; close it, or use it in an `async with` block.

    Submissions made at the same time travel together: one alone when idle, many under load.
    """

    def __init__(
        self, url: str | None = None, *, token: str | None = None, retry: bool = True, profiles: Profiles | None = None
    ) -> None:
        """Say which server and as whom; the arguments are those of `Client`."""
        profile = (profiles or Profiles()).resolve(url, token)
        self.url = profile.url
        self.transport = AsyncTransport(profile.url, profile.token, retry=retry)
        self.tasks = AsyncTasks(self)
        self.groups = AsyncGroups(self)
        self.operations = AsyncOperations(self, time.monotonic)
        self.dead_letters = AsyncDeadLetters(self)
        self.runs = AsyncRuns(self)
        self.approvals = AsyncApprovals(self)
        self.pipelines = AsyncPipelines(self)
        self.schedules = AsyncSchedules(self)
        self.limits = AsyncLimits(self)
        self.shares = AsyncShares(self)
        self.breakers = AsyncBreakers(self)
        self.artifacts = AsyncArtifacts(self)
        self.agents = AsyncAgents(self)

    async def do(self, request: Request[T]) -> T:
        """Carry out a request. Raises ApiProblem, Unreachable."""
        return request.read(await self.transport.send(request.call))

    async def drive(self, flow: Flow[T]) -> T:
        """Carry out a flow of requests and return what it returns."""
        try:
            request = next(flow)
            while True:
                request = flow.send(await self.do(request))
        except StopIteration as stop:
            found: T = stop.value
            return found

    async def pages(self, ask: Callable[[str | None], Request[Page[T]]]) -> AsyncIterator[T]:
        """Yield the items of all pages."""
        cursor: str | None = None
        while True:
            page = await self.do(ask(cursor))
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def event_lines(
        self, types: Sequence[str], subject: str | None, run: str | None, after: str | None
    ) -> AsyncIterator[tuple[Event | Sign, str | None]]:
        """Yield events and signs, each with the cursor after it, over one connection; the first one is `Sign.OPEN`."""
        reader = SseReader(after)
        async with self.transport.stream(calls.events_call(types, subject, run, after)) as response:
            yield Sign.OPEN, after
            async for line in response.aiter_lines():
                if (found := reader.feed(line)) is not None:
                    yield found, reader.cursor

    async def events(
        self, types: Sequence[str] = (), *, subject: str | None = None, run: str | None = None, after: str | None = None
    ) -> AsyncIterator[Event]:
        """Yield events for ever, from now or after a cursor; a dropped connection is taken up where it broke.

        The arguments and errors are those of `Client.events`.
        """
        failures = 0
        while True:
            try:
                async for found, position in self.event_lines(types, subject, run, after):
                    failures, after = 0, position
                    if isinstance(found, Event):
                        yield found
            except (Unreachable, NotNow):
                failures += 1
            await asyncio.sleep(pause_after(failures))

    async def status(self) -> dict[str, Any]:
        """Return the server's state."""
        return await self.do(calls.status())

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
