"""Programs that tests start, freeze, kill and start again; none outlives the process that started it, however that one went."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

HOST: Final = "127.0.0.1"
START_SECONDS: Final = 30.0
ANSWER_SECONDS: Final = 1.0

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = START_SECONDS) -> T:
    """Wait until a condition gives something true, and return that. Raises TimeoutError that names `what`."""
    ends_at = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > ends_at:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Starter:
    """Starts processes that end with this one, frozen ones too.

    Linux ends a child (PDEATHSIG) when the thread that started it is gone, so that is a thread of its own, which lives until `close`.
    """

    _BOUND: Final = ("setpriv", "--pdeathsig", "KILL") if sys.platform == "linux" else ()

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"starter-{name}")

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a program with these options of `Popen`."""
        return self._thread.submit(lambda: subprocess.Popen([*self._BOUND, *command], **options)).result()

    def close(self) -> None:
        """End, and with it what was started and still runs. Calling it twice is a no-op."""
        self._thread.shutdown()


class Program:
    """One database process, which ends with the process that started it."""

    def __init__(self, command: Sequence[str], port: int, output: Path) -> None:
        self.port = port
        self.output = output
        self.paused = False
        self._command = list(command)
        self._starter = Starter(str(port))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether its process runs, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and return when its port answers; one that runs is left alone."""
        if not self.alive:
            with self.output.open("ab") as output:
                self._process = self._starter.start(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # an interrupt at the terminal is for the tests, not for their databases
                )
            until(self._listens, f"{self._command[0]} on port {self.port}")

    def _listens(self) -> bool:
        if not self.alive:
            raise RuntimeError(f"{self._command[0]} ended at once: {self.output.read_text()[-2000:]}")
        with suppress(OSError), socket.create_connection((HOST, self.port), timeout=ANSWER_SECONDS):
            return True
        return False

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.paused = False
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.paused = False
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(timeout=START_SECONDS)

    def close(self) -> None:
        """Kill it for good."""
        self.kill()
        self._starter.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            assert self._process is not None
            self._process.send_signal(number)
