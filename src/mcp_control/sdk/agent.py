"""`Agent`: task handlers by name, and the process that does them.

agent = Agent("cleaner", slots=4)

@agent.task("text.clean")
async def clean(data: CleanIn, ctx: Context) -> CleanOut: ...

if __name__ == "__main__":
    agent.run()
"""

import asyncio
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any, Literal, ParamSpec, TypeVar

import structlog

from mcp_control.agents.model import AgentSpec, Capability, Resources
from mcp_control.sdk.errors import SdkError
from mcp_control.sdk.handlers import Executor, Handler
from mcp_control.sdk.profiles import Profiles
from mcp_control.sdk.runtime.enrolment import Enrolment
from mcp_control.sdk.runtime.links import Link, LinkRefused, SocketLink
from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.runtime.polling import PollLink
from mcp_control.sdk.runtime.processes import ProcessPool
from mcp_control.sdk.runtime.session import Session
from mcp_control.sdk.runtime.workbench import Workbench
from mcp_control.tasks.wire import Hello

P = ParamSpec("P")
R = TypeVar("R")
TransportName = Literal["auto", "socket", "poll"]

log = structlog.get_logger("mcp_control.agent")


class Agent:
    """A worker: what it can do, and how much of it at once. Making one costs nothing; `run` or `serve` connects."""

    def __init__(
        self,
        name: str,
        *,
        slots: int = 1,
        limits: Mapping[str, int] | None = None,
        labels: Mapping[str, str] | None = None,
        resources: Resources | None = None,
        lease_seconds: float = 30.0,
        description: str = "",
        version: str = "",
        url: str | None = None,
        transport: TransportName = "auto",
        drain_seconds: float = 30.0,
        cancel_grace: float = 10.0,
        profiles: Profiles | None = None,
    ) -> None:
        """Describe the agent.

        Args:
            name: its identity; starting the same name again resumes it. Several processes may run under one name on one machine.
            slots: attempts at once.
            limits: of some task types, how many attempts at once, fewer than there are slots. The same as `limit` at a handler.
            labels: what tasks may ask for by `needs.labels`.
            resources: what the agent has, for tasks that ask for it.
            lease_seconds: how long the server waits for a sign of life before it gives the work to others, 2 to 3,600.
            description: one sentence for people.
            version: of this agent's software.
            url: the server; by default `MCP_CONTROL_URL`, the default profile, or this machine.
            transport: `auto` uses the WebSocket and falls back to polling where it cannot be opened.
            drain_seconds: how long SIGTERM lets attempts in hand go on.
            cancel_grace: seconds between telling a handler to stop and stopping it.
            profiles: where tokens and credentials are kept.
        """
        self.name = name
        self.slots = slots
        self.limits = dict(limits or {})
        self.labels = dict(labels or {})
        self.resources = resources or Resources()
        self.lease_seconds = lease_seconds
        self.description = description
        self.version = version
        self.url = url
        self.drain_seconds = drain_seconds
        self.handlers: dict[str, Handler[Any, Any]] = {}
        self._transport: TransportName = transport
        self._cancel_grace = cancel_grace
        self._profiles = profiles
        self._session: Session | None = None
        self._serving: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    def task(
        self,
        name: str,
        *,
        version: str = "1",
        executor: Executor | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        limit: int | None = None,
        description: str = "",
    ) -> Callable[[Callable[P, R]], Handler[P, R]]:
        """Register a function `(payload)` or `(payload, ctx)` as the handler of a task type.

        The payload has the type of its annotation (msgspec struct, dataclass, TypedDict, any JSON); what does not fit fails for good as
        `invalid-payload`. The decorated function is still a plain function when called.

        Args:
            name: the task type, also the capability's name.
            version: version of the capability.
            executor: `async` for coroutines; `thread` (the default for plain functions) or `process` (for CPU-heavy work).
            timeout: seconds one attempt may take, where the task itself has no limit.
            retries: attempts after the first one at most, where the task's own policy allows more.
            limit: attempts of this type at once, in each process of the agent; the server sends no more.
            description: by default the first line of the docstring.

        Raises:
            ValueError: the agent has a handler for this type already.
            TypeError: the function cannot be a handler in that executor.
        """

        def register(function: Callable[P, R]) -> Handler[P, R]:
            handler = Handler(
                function,
                name=name,
                version=version,
                executor=executor,
                timeout=timeout,
                retries=retries,
                description=description,
            )
            added = self.add(handler)
            if limit is not None:
                self.limits[name] = limit
            return added

        return register

    def add(self, handler: Handler[P, R]) -> Handler[P, R]:
        """Register a handler that was made elsewhere. Raises ValueError where its type has one already."""
        if handler.name in self.handlers:
            raise ValueError(f"{self.name} has a handler for {handler.name} already")
        self.handlers[handler.name] = handler
        return handler

    @property
    def spec(self) -> AgentSpec:
        """What the agent says of itself when it registers."""
        return AgentSpec(
            name=self.name,
            capabilities=[
                Capability(name=h.name, version=h.version, description=h.description, limit=self.limits.get(h.name))
                for h in self.handlers.values()
            ],
            labels=self.labels,
            resources=self.resources,
            slots=self.slots,
            lease_seconds=self.lease_seconds,
            description=self.description,
            version=self.version,
        )

    @property
    def held(self) -> list[str]:
        """Ids of the tasks in hand."""
        return [] if self._session is None else list(self._session.bench.works)

    def run(self) -> None:
        """Serve until told to end: the first SIGTERM or SIGINT drains, the second one ends at once.

        Raises:
            SdkError: the server does not accept this agent.
            SystemExit: status 1 after the second signal.
        """
        if not structlog.is_configured():
            structlog.configure(
                processors=[
                    structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso", utc=True),
                    # As the server writes: for people on a terminal, else one JSON object per line.
                    *(
                        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
                        if sys.stderr.isatty()
                        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
                    ),
                ],
                wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            )
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        signals = 0
        forced = False

        def told_to_end() -> None:
            nonlocal signals, forced
            signals += 1
            if signals == 1:
                self._ending = asyncio.create_task(self.drain())
            elif not forced:
                forced = True
                if self._ending is not None:
                    self._ending.cancel()
                self._ending = asyncio.create_task(self._abort())

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told_to_end)
        try:
            await self.serve()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        if forced:
            raise SystemExit(1)

    async def start(self) -> None:
        """Begin to serve in the background of the running loop and return once connected. Raises what `serve` raises before that."""
        self._serving = asyncio.create_task(self.serve())
        await asyncio.sleep(0)  # its first step makes the session
        if self._session is not None:
            connected = asyncio.create_task(self._session.connected.wait())
            await asyncio.wait({connected, self._serving}, return_when=asyncio.FIRST_COMPLETED)
            connected.cancel()
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace: float = 0.0) -> None:
        """End what `start` began: finish within `grace` seconds, hand back the rest, leave."""
        await self.drain(grace)
        if self._serving is not None:
            await self._serving

    async def drain(self, grace: float | None = None) -> None:
        """Take nothing new, finish, hand back what is not finished in time, and end `serve`."""
        if self._session is not None:
            await self._session.drain(self.drain_seconds if grace is None else grace)

    async def _abort(self) -> None:
        if self._session is not None:
            await self._session.leave(1.0)

    async def serve(self) -> None:
        """Serve on the running loop until drained. For embedding; `run` adds signals.

        Raises:
            SdkError: the server does not accept this agent.
        """
        profiles = self._profiles or Profiles()
        profile = profiles.resolve(self.url)
        enrolment = Enrolment(profiles, profile, self.spec)
        outbox = Outbox()
        session = Session(self.spec, outbox, f"mcp-control-panel/{metadata.version('mcp-control-panel')}")
        clients = _Clients(profile.url, enrolment)
        pools: list[ProcessPool] = []

        def pool() -> ProcessPool:
            if not pools:
                pools.append(ProcessPool(self.slots, profile.url, enrolment.credential, bench.guards))
            return pools[0]

        bench = Workbench(self.handlers, outbox, session.wake, clients, pool, self._cancel_grace)
        session.attach(bench)
        self._session = session
        try:
            await session.run(_Opener(self._transport, profile.url, enrolment, session))
        finally:
            bench.close()
            for made in pools:
                made.close()
            await clients.close()
            self._session = None


class _Opener:
    """Opens connections: enrols first where that is needed, and chooses the transport."""

    def __init__(self, transport: TransportName, url: str, enrolment: Enrolment, session: Session) -> None:
        self._transport = transport
        self._url = url
        self._enrolment = enrolment
        self._session = session

    async def __call__(self, hello: Hello) -> Link:
        credential = await self._enrolment.ensure()
        try:
            return await self._open(credential, hello)
        except LinkRefused as refused:
            if refused.status != 401:
                raise
            # The stored credential is not accepted (any more): once more with what may enrol.
            credential = await self._enrolment.renew()
            return await self._open(credential, hello)

    async def _open(self, credential: str, hello: Hello) -> Link:
        if self._transport != "poll":
            try:
                return await SocketLink.open(self._url, credential, hello)
            except LinkRefused as refused:
                no_socket = 400 <= refused.status < 500 and refused.status not in (401, 403, 408, 429)
                if self._transport == "socket" or not no_socket:
                    raise
                log.warning("socket.not_available", status=refused.status, reason=str(refused), instead="polling")
        return await PollLink.open(self._url, credential, hello, lambda: self._session.free_slots)


class _Clients:
    """The clients of this process, made when a handler first asks for one."""

    def __init__(self, url: str, enrolment: Enrolment) -> None:
        self._url = url
        self._enrolment = enrolment
        self._sync: Any = None
        self._async: Any = None

    def sync(self) -> Any:
        if self._sync is None:
            from mcp_control.sdk.client import Client  # only handlers that use it pay for it

            self._sync = Client(self._url, token=self._enrolment.credential)
        return self._sync

    def asynchronous(self) -> Any:
        if self._async is None:
            from mcp_control.sdk.client import AsyncClient  # only handlers that use it pay for it

            self._async = AsyncClient(self._url, token=self._enrolment.credential)
        return self._async

    async def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        if self._async is not None:
            with suppress(SdkError):
                await self._async.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed: it halves the cost of a small task."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop  # not part of the base install

    return uvloop.new_event_loop
