"""`mcpctl` as people run it: real processes against a real `mcpctl up`."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from mcp_control.cli.main import run

HERE = Path(__file__).parent
MCPCTL = (sys.executable, "-m", "mcp_control.cli.main")


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for a condition and return what it gave."""
    ends_at = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > ends_at:
            raise AssertionError("the condition did not come true")
        time.sleep(0.05)
    return found


class Cli:
    """Runs commands of one person: with a configuration folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")}
        self.environ = {**kept, "MCP_CONTROL_CONFIG_DIR": str(self.config), "COLUMNS": "80"}

    def __call__(
        self, *args: str, code: int = 0, stdin: str | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its exit code must be `code`."""
        done = subprocess.run(
            [*MCPCTL, *args],
            capture_output=True,
            text=True,
            input=stdin,
            timeout=60,
            cwd=HERE,
            env={**self.environ, **environ},
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def inside(self, *args: str, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command as `__call__` does, piped, but in this process: where the process itself is not what is tested."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with (
            patch.dict(os.environ, {**self.environ, **environ}, clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch("sys.stdin", io.StringIO()),
        ):
            returned = run(list(args))
        done = subprocess.CompletedProcess(
            args, returned, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()
        )
        assert returned == code, f"exit {returned}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str, code: int = 0) -> Any:
        """Run a command with --json in this process and return what it printed."""
        return json.loads(self.inside(*args, "--json", code=code).stdout)

    def background(self, *args: str, **environ: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [*MCPCTL, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env={**self.environ, **environ},
        )


class Up:
    """A running `mcpctl up`, ready."""

    def __init__(self, cli: Cli, data: Path, *args: str, port: int = 0) -> None:
        self.process = cli.background(
            "up", "--json", "--log-level", "error", "--data", str(data), "--port", str(port), *args
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.told: dict[str, Any] = json.loads(line)
        self.url: str = self.told["url"]
        self.data = data

    def agents(self) -> list[psutil.Process]:
        """The agent processes, once all are there."""
        return psutil.Process(self.process.pid).children()

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Commands of one person."""
    return Cli(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="session")
def panel(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A server with one techdeck agent, and an agent for tests beside it."""
    up = Up(cli, tmp_path_factory.mktemp("panel") / "data", "--agents", "1")
    agent = cli.background("agents", "start", "agent_for_tests:agent")
    try:
        until(lambda: any(one["name"] == "tests" and one["state"] == "online" for one in cli.json("agents", "ls")))
        yield up
    finally:
        agent.terminate()
        agent.communicate(timeout=30)
        assert up.stop() == 0


@pytest.fixture
def own(tmp_path: Path) -> Cli:
    """Commands of a person nobody else is."""
    return Cli(tmp_path)


@pytest.fixture
def started(own: Cli, tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts servers of that person; they are stopped at the end."""
    running: list[Up] = []

    def start(*args: str, port: int = 0) -> Up:
        running.append(Up(own, tmp_path / "data", *args, port=port))
        return running[-1]

    yield start
    for up in running:
        up.stop()
