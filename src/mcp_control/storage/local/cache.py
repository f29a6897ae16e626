"""The cache of one server process: the least recently used entries go first."""

from collections import OrderedDict

from mcp_control.kernel.clock import Clock


class LocalCache:
    """A `Cache` in memory.

    Args:
        clock: whose monotonic time entries live by.
        max_entries: more push out the least recently used.
        max_bytes: as `max_entries`, for the sum of the values; a single larger value is not kept.
    """

    def __init__(self, clock: Clock, *, max_entries: int = 100_000, max_bytes: int = 64 << 20) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0

    async def get(self, key: str) -> bytes | None:
        """See `Cache.get`."""
        found = self._live(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """See `Cache.set`."""
        self._put(key, value, self._clock.monotonic() + ttl)

    async def delete(self, key: str) -> None:
        """See `Cache.delete`."""
        self._drop(key)

    async def add(self, key: str, amount: int, ttl: float) -> int:
        """See `Cache.add`. `get` shows a counter as decimal digits; adding to a value that is none raises ValueError."""
        found = self._live(key)
        value, until = found or (b"0", self._clock.monotonic() + ttl)
        total = int(value) + amount
        self._put(key, b"%d" % total, until)
        return total

    def _live(self, key: str) -> tuple[bytes, float] | None:
        found = self._entries.get(key)
        if found is not None and found[1] <= self._clock.monotonic():
            self._drop(key)
            return None
        return found

    def _put(self, key: str, value: bytes, until: float) -> None:
        self._drop(key)
        self._entries[key] = (value, until)
        self._bytes += len(value)
        while self._bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            self._bytes -= len(found[0])
