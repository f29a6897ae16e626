"""Work beside the calls: done again whenever it is asked for, and now and then anyway."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from pymongo.errors import PyMongoError

from mcp_control.storage.mongo.client import Primary, unavailable

_log = structlog.get_logger(__name__)
_AFTER_ERROR: Final = 0.25
_GRACE: Final = 2.0


class Background:
    """Calls `once` until it is stopped.

    Args:
        name: for the log.
        once: does what there is to do, and returns the seconds after which to look again unasked. Errors of the database are logged.
        primary: given up is what a primary was asked for that has a successor.
    """

    def __init__(self, name: str, once: Callable[[], Awaitable[float]], primary: Primary) -> None:
        self._name = name
        self._primary = primary
        self._once = once
        self._asked = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin at once."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    def ask(self) -> None:
        """Have it done once more, from the beginning."""
        self._asked.set()

    async def stop(self) -> None:
        """End it; what is under way gets two seconds."""
        self._stopping = True
        self._asked.set()
        if self._task is None:
            return
        _, late = await asyncio.wait([self._task], timeout=_GRACE)
        while late:
            self._task.cancel()
            _, late = await asyncio.wait([self._task], timeout=_GRACE)

    async def _run(self) -> None:
        failures = 0
        while not self._stopping:
            self._asked.clear()
            try:
                async with self._primary.lasting():
                    pause = await self._once()
                failures = 0
            except PyMongoError as error:
                failures += 1
                if failures == 1:  # a fault that stays must not fill the log
                    _log.warning("background-failed", work=self._name, error=unavailable(error).detail)
                pause = _AFTER_ERROR
            try:
                async with asyncio.timeout(pause):
                    await self._asked.wait()
            except TimeoutError:
                continue
