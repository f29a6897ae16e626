"""What `mcpctl up` does: the server, a profile for it, local agents, and an end in good order."""

import asyncio
import errno
import fcntl
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import uvloop

from mcp_control.cli.errors import FAILED, CliError
from mcp_control.cli.local_agents import LocalAgent, LocalAgents
from mcp_control.cli.output import say, write_json
from mcp_control.configuration.settings import Settings
from mcp_control.kernel.errors import Invalid, Problem, StoreUnavailable
from mcp_control.monitoring.logs import configure
from mcp_control.plugins.manager import Plugins
from mcp_control.sdk.profiles import Profile, Profiles, normal_url
from mcp_control.server import Ready, serve

AGENTS_SECONDS: Final = 20.0
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]")
_NO_ADDRESS: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)
TOKEN_NAME: Final = "mcpctl up"  # noqa: S105 - the name of a token


def serve_here(settings: Settings, *, as_json: bool) -> int:
    """Run a server in this process until it is told to end; returns the exit code. Raises CliError when it cannot start."""
    configure(settings.log.level, settings.log.format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Server(settings, as_json).run())


class _Server:
    """One run of `up`."""

    def __init__(self, settings: Settings, as_json: bool) -> None:
        self._settings = settings
        self._as_json = as_json
        self._agents: LocalAgents | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve to the end and return the exit code. Raises CliError when it cannot start."""
        settings = self._settings
        try:
            return await serve(settings, self._ready)
        except StoreUnavailable as error:
            raise CliError(error.detail or str(error)) from None
        except OSError as error:
            raise self._not_started(error) from None
        finally:
            if self._agents is not None:
                await self._agents.kill()

    def _not_started(self, error: OSError) -> CliError:
        settings = self._settings
        holder = _holder(settings.data)
        if holder:
            return CliError(f"the data folder {settings.data} is in use by another server (process {holder})")
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        if error.errno in _NO_ADDRESS or isinstance(error, socket.gaierror):
            hint = "choose another --port; 0 takes a free one"
            return CliError(f"cannot listen on {settings.host}:{settings.port}: {why}", FAILED, hint)
        return CliError(f"the server did not start: {why}{f': {error.filename}' if error.filename else ''}")

    async def _ready(self, there: Ready) -> None:
        url = _local(there.url)
        if there.one_time_password and not self._as_json:
            _line(
                f"First administrator: admin   one-time password: {there.one_time_password}   (shown this once; `mcpctl login`)"
            )
        try:
            profile = await _profile(there, url)
        except OSError as error:  # the server is of use without it: MCP_CONTROL_TOKEN, or a login elsewhere
            say(f"the profile was not written: {error}")
            profile = "none"
        targets = _agents(there.services.plugins)
        for name, why in there.services.plugins.failed.items():
            say(f"the plugin {name} is left out: {why}")
        count = self._settings.agents
        # The servers of a cluster share the agents' names, and each has agents of its own.
        place = f"-{_NOT_IN_NAMES.sub('-', there.services.node)[:60]}" if self._settings.mongo.uri is not None else ""
        wanted = [LocalAgent(f"{name}{place}-{n}", target) for name, target in targets for n in range(1, count + 1)]
        folder = self._settings.data / "local-agents"
        self._agents = LocalAgents(wanted, there.services, url, folder, self._settings.log)
        self._on_signals(there)
        self._agents.start()
        all_there = await self._agents.connected(AGENTS_SECONDS)
        if self._stopping is not None:
            return
        if not all_there:
            say(f"not all local agents have connected within {AGENTS_SECONDS:g} s; see the log")
        if self._as_json:
            told = {
                "url": url,
                "pid": os.getpid(),
                "data": str(self._settings.data) if self._settings.mongo.uri is None else "mongodb",
                "agents": [agent.name for agent in wanted],
                "one_time_password": there.one_time_password,
            }
            write_json(told)
            return
        data = str(self._settings.data) if self._settings.mongo.uri is None else "MongoDB, as a member of a cluster"
        _line(f"Data: {data}   profile: {profile}")
        if wanted:
            _line(f"Agents: {', '.join(agent.name for agent in wanted)}")
        _line(f"Ready: {url}   (docs: {url}/docs; Ctrl-C stops)")

    def _on_signals(self, there: Ready) -> None:
        """From here on the first signal drains the agents, then stops the server; the second one stops at once."""
        loop = asyncio.get_running_loop()

        async def stop() -> None:
            assert self._agents is not None
            await self._agents.drain()
            there.stop()

        async def stop_now() -> None:
            assert self._agents is not None
            await self._agents.kill()
            there.stop()

        def told() -> None:
            if self._stopping is None:
                self._stopping = loop.create_task(stop())
            else:
                self._stopping.cancel()
                self._stopping = loop.create_task(stop_now())

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told)


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _local(url: str) -> str:
    """Return the address by which this machine reaches a server that listens everywhere."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _holder(data: Path) -> str:
    """Return the process id of the server that uses the folder; empty when none does."""
    try:
        with (data / "lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read(32).strip() or "unknown"
    except OSError:
        pass
    return ""


async def _profile(there: Ready, url: str) -> str:
    """Keep a profile with a token that works; returns the file."""
    services = there.services
    profiles = Profiles()
    file = str(profiles.folder / "profiles.json")
    known = {profile.url: profile for profile in profiles.all()}
    old = known.get(normal_url(url))
    default = not profiles.default or _is_local(profiles.default)
    if old is not None and old.token:
        try:
            await services.authenticator.authenticate(f"Bearer {old.token}", services.clock.now())
        except Problem:
            pass
        else:
            profiles.save(old, default)
            return file
    admin = await services.accounts.administrator()
    name = f"{TOKEN_NAME} ({socket.gethostname()[:60]})"
    try:
        token = (await services.accounts.create_token(admin, name))[1]
    except Invalid:  # too many: the oldest of ours goes
        ours = [one for one in await services.accounts.list_tokens(admin) if one.name.startswith(TOKEN_NAME)]
        if not ours:
            raise
        await services.accounts.revoke_token(admin, ours[0].id)
        token = (await services.accounts.create_token(admin, name))[1]
    profiles.save(Profile(url=url, token=token, name=old.name if old else ""), default)
    if not default:
        say(f"the default profile stays {profiles.default}; `mcpctl profile use {url}` chooses this server")
    return file


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _agents(plugins: Plugins) -> list[tuple[str, str]]:
    """Return what to run: names, made from the plugins' and unique among them, and what does their tasks."""
    agents: list[tuple[str, str]] = []
    for plugin, target in plugins.agents():
        first = all(name != plugin for name, _ in agents)
        agents.append((plugin if first else f"{plugin}-{target.rpartition(':')[2]}", target))
    return agents
