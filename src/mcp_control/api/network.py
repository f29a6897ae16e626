"""The network under the application: the socket, uvicorn and its limits, and signals."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import uvicorn
from typing_extensions import override

from mcp_control.api.app import ControlApp
from mcp_control.api.protocol import ControlHttpProtocol, ControlSocketProtocol
from mcp_control.configuration.settings import Settings

_GRACE_SECONDS: Final = 3
_SEND_BUFFER: Final = 512 << 10


class NetworkServer(uvicorn.Server):
    """uvicorn that leaves signals to `serve` and ends what would wait for ever before it closes connections."""

    def __init__(self, app: ControlApp, settings: Settings, before_end: Callable[[], None]) -> None:
        """Take the application to serve; `before_end` is called before connections are closed."""
        super().__init__(_config(settings, app))
        self._before_end = before_end
        self.answering = asyncio.Event()

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_end()
        await super().shutdown(sockets)


def listening(settings: Settings) -> socket.socket:
    """Return the bound socket. Raises OSError where the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048)
    # Connections inherit both. An answer is small and complete, so it must not wait for the acknowledgement of the one before;
    # and what a peer does not read waits in the kernel only up to this.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    return listener


def _config(settings: Settings, app: ControlApp) -> uvicorn.Config:
    limits = settings.limits
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=partial(
            ControlHttpProtocol, headers_max=limits.max_header_bytes, headers_seconds=limits.header_timeout_seconds
        ),  # type: ignore[arg-type]  # called like a class
        ws=ControlSocketProtocol,
        ws_max_size=limits.max_frame_bytes,
        ws_per_message_deflate=False,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        backlog=2048,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


@contextlib.contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGINT and SIGTERM while the block runs."""
    loop = asyncio.get_running_loop()
    names = (signal.SIGINT, signal.SIGTERM)
    main = (
        threading.current_thread() is threading.main_thread()
    )  # elsewhere, as in tests, signals belong to somebody else
    for name in names if main else ():
        loop.add_signal_handler(name, stop)
    try:
        yield
    finally:
        for name in names if main else ():
            loop.remove_signal_handler(name)
