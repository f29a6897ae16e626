"""A server as a process: the composed application behind its address, from the first request to the last."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mcp_control.api.network import NetworkServer, listening, on_signals
from mcp_control.api.services import Services
from mcp_control.app import Fate, composed
from mcp_control.backend import Around
from mcp_control.configuration.settings import Settings
from mcp_control.monitoring.loop_lag import spare_collections


@dataclass(frozen=True)
class Ready:
    """A server that answers.

    Attributes:
        url: where.
        one_time_password: the first administrator's, when it was made now; shown once, kept nowhere.
        services: for what the owner of the process may do, e.g. make a token.
    """

    url: str
    one_time_password: str | None
    services: Services
    _stop: Callable[[], None] = field(repr=False)

    def stop(self) -> None:
        """End the server in good order."""
        self._stop()


async def serve(
    settings: Settings, ready: Callable[[Ready], Awaitable[None]] | None = None, around: Around | None = None
) -> int:
    """Run a server until SIGINT, SIGTERM, `Ready.stop` or a fatal error of the store.

    Args:
        ready: called once it answers; when it raises, the server ends and the exception goes to the caller.
        around: puts something around the store; see `composed`.

    Returns:
        The exit code of the process: 0 after an orderly end, 1 after a fatal error of the store.

    Raises:
        StoreUnavailable: the data folder cannot be used.
        OSError: the address is taken.
    """
    listener = listening(settings)
    try:
        fate = Fate()
        async with composed(settings, fate, around) as control:
            server = NetworkServer(control.app, settings, control.services.end)

            def stop() -> None:
                server.should_exit = True

            def stop_now() -> None:
                server.should_exit = server.force_exit = True

            fate.stop = stop_now
            spare_collections()
            with on_signals(stop):
                running = asyncio.create_task(server.serve([listener]))
                try:
                    answering = asyncio.create_task(server.answering.wait())
                    await asyncio.wait((answering, running), return_when=asyncio.FIRST_COMPLETED)
                    answering.cancel()
                    if ready is not None:
                        scheme = "http" if settings.tls_cert is None else "https"
                        host = f"[{settings.host}]" if ":" in settings.host else settings.host
                        url = f"{scheme}://{host}:{listener.getsockname()[1]}"
                        await ready(Ready(url, control.one_time_password, control.services, stop))
                    await asyncio.shield(running)
                finally:
                    stop()
                    await running
        return 0 if fate.problem is None else 1
    finally:
        listener.close()
