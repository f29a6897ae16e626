"""Work beside the calls that nobody waits for: begun now, held until it ends, ended with its owner."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from mcp_control.kernel.errors import Problem

_log = structlog.get_logger(__name__)


class Background:
    """Runs coroutines to their end. An error ends its own work alone: it is logged and counted.

    A `Problem` is what a caller would have been told (the store was away, somebody else was first): a warning. Anything else is a fault
    of ours and is logged with its trace.

    Attributes:
        failures: how many raised.
    """

    __slots__ = ("_name", "_tasks", "failures")

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures = 0

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it. Waiting for the task is allowed and not needed."""
        task = asyncio.create_task(work, name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._tasks)

    async def idle(self) -> None:
        """Wait until nothing is under way, nor anything that was begun meanwhile. Errors are not raised here."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)  # so that `_ended` is called

    def cancel(self) -> None:
        """Cancel what is under way, without waiting for it."""
        for task in tuple(self._tasks):
            task.cancel()

    async def close(self, grace: float = 0.0) -> None:
        """Give what is under way `grace` seconds to end, then cancel it; returns when nothing is left."""
        if self._tasks and grace > 0:
            await asyncio.wait(self._tasks, timeout=grace)
        while self._tasks:
            self.cancel()
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self.failures += 1
        if isinstance(error, Problem):
            _log.warning("background-failed", work=self._name, code=error.code, error=error.detail)
        else:
            _log.error("background-failed", work=self._name, error=repr(error), exc_info=error)
