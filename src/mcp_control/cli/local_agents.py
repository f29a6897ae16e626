"""Agents of `mcpctl up`: child processes, started again when they crash, drained before the server ends."""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mcp_control.api.services import Services
from mcp_control.cli.errors import DENIED, USAGE
from mcp_control.cli.tether import Tether
from mcp_control.configuration.groups import Log
from mcp_control.kernel.errors import NotFound, Problem
from mcp_control.sdk.profiles import ENROLMENT_VARIABLE, FOLDER_VARIABLE, URL_VARIABLE, Profiles
from mcp_control.security.model import Actor

_log = structlog.get_logger("mcp_control.cli")
_POLL_SECONDS: Final = 0.05
_FIRST_BACKOFF: Final = 0.5
_LONGEST_BACKOFF: Final = 30.0
_STEADY_SECONDS: Final = 60.0
DRAIN_SECONDS: Final = 5.0


class LocalAgent(msgspec.Struct, frozen=True):
    """One child: the agent's name and what it runs (`module:agent`)."""

    name: str
    target: str


class LocalAgents:
    """All children of one server. Belongs to the server's event loop.

    Args:
        folder: where the children keep their credentials, so that neither a new port nor the person's own profile matters to them.
        log: how they log; as the server does.
    """

    def __init__(self, agents: Sequence[LocalAgent], services: Services, url: str, folder: Path, log: Log) -> None:
        self._agents = agents
        self._services = services
        self._url = url
        self._folder = folder
        self._log = log
        self._tether = Tether()
        self._ending = False
        self._processes: dict[str, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to keep all of them running."""
        self._keepers = [asyncio.create_task(self._keep(agent)) for agent in self._agents]

    async def connected(self, timeout: float) -> bool:
        """Wait until every agent has a live session; false when the time is over before."""
        admin = await self._services.accounts.administrator()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                for agent in self._agents:
                    while not self._ending and not await self._live(admin, agent.name):  # noqa: ASYNC110 - nothing to wait on: sessions tell nobody
                        await asyncio.sleep(_POLL_SECONDS)
                return True
        return False

    async def _live(self, admin: Actor, name: str) -> bool:
        try:
            agent = await self._services.agents.get(admin, name)
        except NotFound:
            return False
        return self._services.agents.view(agent).instances > 0

    async def drain(self) -> None:
        """Tell all to finish and leave, and wait until they did; what does not is killed."""
        await self._let_go()
        for process in self._living():
            process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * DRAIN_SECONDS):
                await asyncio.gather(*(process.wait() for process in self._processes.values()))
        await self.kill()

    async def kill(self) -> None:
        """End all at once."""
        await self._let_go()
        for process in self._living():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in self._processes.values()))
        self._tether.cut()

    async def _let_go(self) -> None:
        """Start none again."""
        self._ending = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def _living(self) -> list[Process]:
        return [process for process in self._processes.values() if process.returncode is None]

    async def _keep(self, agent: LocalAgent) -> None:
        crashes = 0
        while True:
            began = time.monotonic()
            code: int | None = None
            try:
                code = await (await self._spawn(agent)).wait()
            except (OSError, Problem) as error:
                _log.error("a local agent could not be started", agent=agent.name, error=str(error))
            if code in (DENIED, USAGE):
                _log.error("a local agent ended and is not started again", agent=agent.name, exit_code=code)
                return
            crashes = 0 if time.monotonic() - began > _STEADY_SECONDS else crashes + 1
            pause = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(crashes - 1, 10)) if crashes else 0.0
            _log.warning("a local agent ended and is started again", agent=agent.name, exit_code=code, pause=pause)
            await asyncio.sleep(pause)

    async def _spawn(self, agent: LocalAgent) -> Process:
        token = await self._admission(agent.name)
        more = {URL_VARIABLE: self._url, FOLDER_VARIABLE: str(self._folder)}
        if token:
            more[ENROLMENT_VARIABLE] = token
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "mcp_control.cli.main", "agents", "start", agent.target),
            *("--name", agent.name, "--drain-seconds", f"{DRAIN_SECONDS:g}"),
            *("--log-level", self._log.level, "--log-format", self._log.format),
            stdin=DEVNULL,
            stdout=sys.stderr.fileno(),
            env=self._tether.environ(**more),
            pass_fds=(self._tether.fd,),
            start_new_session=True,  # Ctrl-C is for the server, which then drains its agents
        )
        self._processes[agent.name] = process
        return process

    async def _admission(self, name: str) -> str:
        """See to it that the child can prove who it is; returns a one-time token where it has to enrol."""
        services = self._services
        admin = await services.accounts.administrator()
        profiles = Profiles(self._folder, environ={})
        stored = profiles.agent_credential(self._url, name)
        try:
            known = await services.agents.get(admin, name)
        except NotFound:
            return (await services.credentials.create_enrolment(admin, name=name))[1]
        if stored:
            with suppress(Problem):
                held = await services.authenticator.authenticate(f"Bearer {stored}", services.clock.now())
                if held.id == known.id:
                    return ""
        profiles.save_agent_credential(self._url, name, await services.credentials.issue(admin, known.id, name))
        return ""
