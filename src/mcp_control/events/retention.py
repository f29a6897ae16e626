"""Removing old events, a little at a time."""

from typing import Final

from mcp_control.storage.ports import Store

_ROUNDS: Final = 100


class EventRetention:
    """Keeps events for `keep_ms`, and at most `keep_count` of them; whichever ends first.

    Args:
        batch: about how many go in one step, so that removal never holds up the commits behind it.
    """

    def __init__(self, store: Store, *, keep_ms: int, keep_count: int, batch: int = 10_000) -> None:
        self._store = store
        self._keep_ms = keep_ms
        self._keep_count = keep_count
        self._batch = batch

    async def once(self, now: int) -> int:
        """Remove what is due; returns the oldest `seq` that is kept. What one pass does not finish, the next one does."""
        before = now - self._keep_ms
        oldest = -1
        for _ in range(_ROUNDS):
            still, _newest = await self._store.trim_facts(before, self._keep_count, self._batch)
            if still == oldest:
                break
            oldest = still
        return oldest
