"""Callers that wait for runs to end."""

import asyncio
from collections.abc import Sequence
from typing import Final

from mcp_control.kernel.changes import StoredFact
from mcp_control.pipelines.model import RUN_FINAL, Run

_ENDED: Final = frozenset(f"run.{state.value}" for state in RUN_FINAL)
Future = asyncio.Future[Run | None]


class Waiters:
    """Futures by run, done when it has ended: with the run, or with None where it must be read."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Future]] = {}

    def expect(self, run_id: str) -> Future:
        """Return a future of the end of a run."""
        future: Future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run_id, []).append(future)
        return future

    async def wait(self, future: Future, seconds: float) -> Run | None:
        """Return the run that has ended; None after so many seconds, or where it must be read."""
        patience = asyncio.get_running_loop().call_later(seconds, _tell, future, None)
        try:
            return await future
        finally:
            patience.cancel()

    def abandon(self, run_id: str, future: Future) -> None:
        """Wait no longer."""
        futures = self._waiting.get(run_id, [])
        if future in futures:
            futures.remove(future)
            if not futures:
                del self._waiting[run_id]

    def ended(self, run_id: str, run: Run | None) -> None:
        """Tell everybody who waits for this run that it has ended."""
        for future in self._waiting.pop(run_id, ()):
            _tell(future, run)

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that runs ended, by whatever server."""
        if self._waiting:
            for stored in facts:
                if stored.fact.type in _ENDED:
                    self.ended(stored.fact.subject, None)


def _tell(future: Future, run: Run | None) -> None:
    if not future.done():
        future.set_result(run)
