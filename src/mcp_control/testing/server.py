"""A real server for tests: on a free port of loopback, with its data in a temporary folder.

`running_server` runs it on the test's own event loop. `ServerProcess` runs it as a process of its own, to be stopped, killed and started
again on the same data and port.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self

import uvloop

from mcp_control.api.services import Services
from mcp_control.backend import Around
from mcp_control.configuration.settings import Settings, load
from mcp_control.monitoring.logs import configure
from mcp_control.server import Ready, serve
from mcp_control.testing.programs import Starter

START_SECONDS = 20.0
PREFIX: Final = "servertest_"
_MONGODB: Final = "MCP_TEST_MONGODB"
_REDIS: Final = "MCP_TEST_REDIS"


@dataclass
class RunningServer:
    """A server that answers.

    Attributes:
        url: where.
        admin_token: an API token of the first administrator.
        one_time_password: of the administrator `admin`; None on a data folder that was used before.
        services: what runs inside.
    """

    url: str
    admin_token: str
    one_time_password: str | None
    services: Services

    @property
    def headers(self) -> dict[str, str]:
        """The header that authenticates as the administrator."""
        return {"Authorization": f"Bearer {self.admin_token}"}

    async def enrolment_token(self, uses: int = 100) -> str:
        """Return a token with which agents register."""
        admin = await self.services.accounts.administrator()
        return (await self.services.credentials.create_enrolment(admin, uses=uses))[1]


def settings_for(folder: Path, given: Mapping[str, object]) -> Settings:
    """Return settings for tests: a free port, cheap passwords, quiet logs, no plugins; `given` are settings by name, dots as `__`."""
    flags: dict[str, object] = {
        "port": 0,
        "data": folder,
        "security.password_memory_kib": 19_456,
        "log.level": "error",
        "plugins": (),
    }
    flags |= databases_for(folder)
    flags |= {name.replace("__", "."): value for name, value in given.items()}
    return load(flags, environ={}, file=_nothing(folder)).settings


def databases_for(folder: Path) -> dict[str, object]:
    """Return settings for the databases that `on_databases` named: one of its own for each data folder; empty outside of it."""
    mongodb, redis = os.environ.get(_MONGODB), os.environ.get(_REDIS)
    if mongodb is None:
        return {}
    # The folder stands for the data, so that a server that is started again finds what it had.
    name = f"{PREFIX}{blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()}"
    return {"mongo.uri": mongodb.replace("DATABASE", name), "redis.url": redis, "redis.namespace": name}


@contextmanager
def on_databases(mongodb: str, redis: str) -> Iterator[None]:
    """Let every server that is started in this block keep its data in these databases instead of its folder.

    Args:
        mongodb: URI with `DATABASE` where the name of the database goes.
        redis: URL.
    """
    os.environ[_MONGODB], os.environ[_REDIS] = mongodb, redis
    try:
        yield
    finally:
        del os.environ[_MONGODB], os.environ[_REDIS]


def _nothing(folder: Path) -> Path:
    """An empty settings file, so that the one of whoever runs the tests is not read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(folder.name + ".toml")
    path.touch()
    return path


async def _token(services: Services) -> str:
    admin = await services.accounts.administrator()
    return (await services.accounts.create_token(admin, "tests"))[1]


@asynccontextmanager
async def running_server(
    folder: Path, *, around: Around | None = None, **settings: object
) -> AsyncIterator[RunningServer]:
    """Run a server on this event loop; it is stopped in good order at the end.

    Args:
        folder: where its data goes, under `data`.
        around: puts something around its store.
        settings: by name, with `__` for dots: `limits__body_timeout_seconds=0.2`.
    """
    started: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()

    async def ready(there: Ready) -> None:
        started.set_result(there)

    running = asyncio.create_task(serve(settings_for(folder / "data", settings), ready, around))
    await asyncio.wait((running, started), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if not started.done():
        running.cancel()
        await running
        raise TimeoutError("the server did not start")
    there = started.result()
    try:
        yield RunningServer(there.url, await _token(there.services), there.one_time_password, there.services)
    finally:
        there.stop()
        await running


class ServerProcess:
    """A server as a process, which ends with the one that started it. Not started until `start`; the port of its first start is kept."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = dict(settings)
        self._starter: Starter | None = None
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.admin_token = ""
        self.one_time_password: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The header that authenticates as the administrator."""
        return {"Authorization": f"Bearer {self.admin_token}"}

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start it and return when it answers. Raises RuntimeError with what it wrote when it does not."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._starter = Starter(self._folder.name)
        with (self._folder / "server.log").open("a") as log:
            self._process = self._starter.start(
                [
                    sys.executable,
                    "-m",
                    "mcp_control.testing.server",
                    str(self._folder / "data"),
                    json.dumps(self._settings, default=str),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._end(signal.SIGKILL)
            raise RuntimeError((self._folder / "server.log").read_text()[-4000:])
        told = json.loads(line)
        self.url = told["url"]
        # The first start makes the token; it holds on.
        self.admin_token = self.admin_token or told["token"]
        self.one_time_password = self.one_time_password or told["one_time_password"]
        self._settings["port"] = int(self.url.rpartition(":")[2])
        return self

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        return self._end(signal.SIGTERM)

    def ended(self, seconds: float = 30.0) -> int:
        """Wait until it ends by itself, and return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def _end(self, by: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(by)
        code = process.wait(timeout=30)
        assert process.stdout is not None
        assert self._starter is not None
        process.stdout.close()
        self._starter.close()
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def main(folder: str, given: str) -> int:
    """Run a server and say where it is on the first line of standard output."""

    async def ready(there: Ready) -> None:
        told = {"url": there.url, "token": await _token(there.services), "one_time_password": there.one_time_password}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()

    settings: dict[str, Any] = json.loads(given)
    configure("warning", "json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings_for(Path(folder), settings), ready))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
