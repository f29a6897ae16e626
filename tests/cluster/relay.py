"""TCP in between: a load balancer in front of servers, a link that can be frozen, and networks of their own for single processes."""

import asyncio
import ctypes
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, ParamSpec, Self, TypeVar

HOST: Final = "127.0.0.1"
_CLONE_NEWNET: Final = 0x40000000
_CHUNK: Final = 1 << 16
_CHECK_SECONDS: Final = 0.25
_ANSWER_SECONDS: Final = 1.0
_HEALTH_SECONDS: Final = 2.5
P = ParamSpec("P")
T = TypeVar("T")
Door = Callable[[], Awaitable[socket.socket]]
"""Opens a connection, or raises OSError."""


def door(port: int) -> Door:
    """Return what connects to a port of loopback."""

    async def opened() -> socket.socket:
        return await _connected(socket.socket(), port)

    return opened


async def _connected(made: socket.socket, port: int) -> socket.socket:
    made.setblocking(False)
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await asyncio.get_running_loop().sock_connect(made, (HOST, port))
    except BaseException:
        made.close()
        raise
    return made


class Island:
    """A network of its own with nothing but loopback. Programs started in it reach only what is relayed into it.

    Needs the right to make network namespaces (root).
    """

    def __init__(self) -> None:
        # A namespace belongs to a thread, and so do the processes and sockets that the thread makes.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="island")
        self.run(_leave)

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something in there."""
        return self._thread.submit(call, *args, **kwargs).result()

    def listener(self, port: int = 0) -> socket.socket:
        """Listen on a port in there; whoever accepts may be outside."""
        return self.run(socket.create_server, (HOST, port))

    def door(self, port: Callable[[], int]) -> Door:
        """Return what connects to a port in there from outside."""

        async def opened() -> socket.socket:
            return await _connected(self.run(socket.socket), port())

        return opened

    def close(self) -> None:
        """Leave it; it goes with the last process in it."""
        self._thread.shutdown()


def _leave() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot make a network namespace ({os.strerror(number)}); run this test as root")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


class Relay:
    """Passes bytes between those who connect to it and a door. While frozen nothing passes and nothing is closed, as when packets vanish.

    Attributes:
        port: where it listens.
    """

    def __init__(self, *doors: Door) -> None:
        self._doors: Sequence[Door] = doors
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, listener: socket.socket | None = None) -> Self:
        """Begin to listen, on a port of loopback unless a listening socket is given."""
        listener = listener or socket.create_server((HOST, 0), backlog=512)
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._accepted, sock=listener)
        return self

    @property
    def url(self) -> str:
        """Where it is, for HTTP."""
        return f"http://{HOST}:{self.port}"

    def freeze(self) -> None:
        """Let nothing pass."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Let pass what waits, and all that comes."""
        self._flowing.set()

    async def close(self) -> None:
        """Close all connections and stop listening."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _choose(self) -> socket.socket:
        """Open a connection onwards. Raises OSError."""
        return await self._doors[0]()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        writers = [writer]
        try:
            await self._flowing.wait()
            there_reader, there_writer = await asyncio.open_connection(sock=await self._choose())
            writers.append(there_writer)
            ways = [
                asyncio.create_task(self._carry(reader, there_writer)),
                asyncio.create_task(self._carry(there_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # to whoever connected it looks like a connection that was reset
        finally:
            self._connections.discard(connection)
            for each in writers:
                each.close()
            for each in writers:
                with suppress(OSError, asyncio.CancelledError):
                    await each.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()


class Balancer(Relay):
    """Gives each new connection to the next server that says it is ready, whoever connects.

    Attributes:
        ready: by place of the door.
        aside: places that get no new connections.
    """

    def __init__(self, *doors: Door) -> None:
        super().__init__(*doors)
        self.ready = [True] * len(doors)
        self.aside: set[int] = set()
        self._turn = 0
        self._checks: list[asyncio.Task[None]] = []

    async def start(self, listener: socket.socket | None = None) -> Self:
        """Begin to listen and to ask the servers how they are."""
        await super().start(listener)
        self._checks = [asyncio.create_task(self._check(place)) for place in range(len(self._doors))]
        return self

    async def close(self) -> None:
        """End it all."""
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await super().close()

    async def _choose(self) -> socket.socket:
        places = [(self._turn + step) % len(self._doors) for step in range(1, len(self._doors) + 1)]
        # Where none says that it is ready, any that answers is better than nobody.
        for place in sorted(places, key=lambda place: not self.ready[place]):
            if place in self.aside:
                continue
            with suppress(OSError, TimeoutError):
                opened = await self._doors[place]()
                self._turn = place
                return opened
            self.ready[place] = False
        raise ConnectionRefusedError("no server is there")

    async def _check(self, place: int) -> None:
        while True:
            try:
                async with asyncio.timeout(_HEALTH_SECONDS):
                    self.ready[place] = await status_of(self._doors[place], "/health/ready") == 200
            except (OSError, TimeoutError):
                self.ready[place] = False
            await asyncio.sleep(_CHECK_SECONDS)


async def status_of(way: Door, path: str) -> int:
    """Ask for a path and return the status of the answer, 0 where there is none. Raises OSError."""
    reader, writer = await asyncio.open_connection(sock=await way())
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        words = (await reader.readline()).split()
        return int(words[1]) if len(words) > 1 else 0
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
