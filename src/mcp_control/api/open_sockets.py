"""The open sockets of a server, to close them all when it can no longer serve them."""

from collections.abc import Iterator
from contextlib import contextmanager

from mcp_control.api.outbox import Outbox


class OpenSockets:
    """Outboxes of the sockets that are open."""

    def __init__(self) -> None:
        self._open: dict[Outbox, None] = {}

    @contextmanager
    def one(self, outbox: Outbox) -> Iterator[Outbox]:
        """Count a socket as open."""
        self._open[outbox] = None
        try:
            yield outbox
        finally:
            self._open.pop(outbox, None)

    def close(self, code: int, reason: str) -> int:
        """Close every socket with this code; returns how many there were."""
        outboxes, self._open = list(self._open), {}
        for outbox in outboxes:
            outbox.close(code, reason)
        return len(outboxes)
